"""Tables of what holds from which release on. This file alone compares a host's versions.

A table has rows of (first release, value), the newest release first. A row holds up to the row above it.
"""

from __future__ import annotations

from typing import TypeVar

from packaging.version import Version

Value = TypeVar("Value")
Eras = tuple[tuple[str, Value], ...]


def era_of(eras: Eras[Value], version: str | None) -> list[Value]:
    """What holds for ``version``; every value that ever held, each once, where the version is unknown.

    A release before the first row gets the first row's value: nobody has read it, so that its signature decides.
    """
    if version is None:
        return list(dict.fromkeys(value for _, value in eras))
    return [value_at(eras, version)]


def value_at(eras: Eras[Value], version: str | None) -> Value:
    """What holds for ``version``; the newest value where the version is unknown."""
    if version is None:
        return eras[0][1]
    return next((value for first, value in eras if since(version, first)), eras[-1][1])


def since(version: str | None, first: str, *, unknown: bool = False) -> bool:
    """Whether ``version`` is ``first`` or a later one; ``unknown`` where nobody can tell.

    Raises:
        InvalidVersion: one of the two is not a version.
    """
    return unknown if version is None else Version(version) >= Version(first)


def between(version: str | None, first: str, until: str, *, unknown: bool = False) -> bool:
    """Whether ``version`` is ``first`` or a later one, but earlier than ``until``; ``unknown`` where nobody can tell.

    Raises:
        InvalidVersion: one of the three is not a version.
    """
    return unknown if version is None else since(version, first) and not since(version, until)
