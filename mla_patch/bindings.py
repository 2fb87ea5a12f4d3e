"""The names that are bound to one object of the host, and how one of them is given another object and gets it back."""

from __future__ import annotations

import logging
import sys
import types
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mla_patch.standing import attribute_of, describe, is_a, names_of, own, text_of

log = logging.getLogger("mla_patch")


@dataclass
class Binding:
    """A name that was bound to the host's object and is bound to ours now."""

    holder: Any  # a module, a class, or a weak reference to an instance
    attribute: str
    before: Any
    ours: Any
    inherited: bool = False  # the holder had no such attribute of its own

    def where(self) -> Any:
        """The holder itself; None where it was an instance that is gone."""
        return self.holder() if is_a(self.holder, weakref.ref) else self.holder

    def put_back(self) -> None:
        """Undo, unless somebody has put something else there since."""
        holder = self.where()
        if own(holder, self.attribute) is not self.ours:
            return
        if self.inherited:
            delattr(holder, self.attribute)
        else:
            setattr(holder, self.attribute, self.before)


@contextmanager
def going_on(attribute: str, holder: Any) -> Iterator[None]:
    """One name that cannot be given back must not keep the others."""
    try:
        yield
    except Exception:
        what = text_of(attribute_of(holder, "__name__")) or f"a {type(holder).__name__}"
        log.warning("mla-patch: %s of %s could not be restored", attribute, what, exc_info=True)


def name_of(holder: Any) -> str:
    """A module's or a class's name, or what an instance is."""
    if is_a(holder, types.ModuleType):
        return text_of(own(holder, "__name__"))
    if is_a(holder, type):
        return describe(holder).replace(":", ".")
    return "sys.modules" if holder is sys.modules else describe(holder)


def loaded_modules() -> Iterator[tuple[types.ModuleType, Mapping[str, Any]]]:
    for module in list(sys.modules.values()):
        if is_a(module, types.ModuleType):  # some programs keep other objects there
            yield module, names_of(module)


def bindings_of(value: Any, instead: Any, package: str) -> list[tuple[Any, str, Any, Any]]:
    """Every module-level name, and every class attribute in ``package``, that is ``value`` itself.

    Rows of (holder, attribute, bound now, what to bind instead).
    """
    found: list[tuple[Any, str, Any, Any]] = []
    for module, names in loaded_modules():
        home = text_of(names.get("__name__"))
        inside = home.partition(".")[0] == package
        for name, bound in list(names.items()):
            if bound is value:
                found.append((module, name, bound, instead))
            elif inside and is_a(bound, type) and text_of(own(bound, "__module__")) == home:
                found += class_bindings(bound, value, instead)
    return found


def class_bindings(owner: type, value: Any, instead: Any) -> Iterator[tuple[Any, str, Any, Any]]:
    for name, bound in list(names_of(owner).items()):
        if bound is value:
            yield owner, name, bound, instead
        elif is_a(bound, staticmethod, classmethod) and bound.__func__ is value:
            yield owner, name, bound, type(bound)(instead)
