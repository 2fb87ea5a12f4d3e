"""Ids of parametrised cases: what a case is, where pytest would number it."""

import enum
import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

LONGEST = 80  # characters of one value


def text_of(value: Any) -> str | None:
    """A value in a few words; None where nothing describes it."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("ascii", "backslashreplace")
    if isinstance(value, BaseException):
        return f"{type(value).__name__}({value})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{text_of(value.dtype)}[{','.join(map(str, value.shape))}]"
    if isinstance(value, SimpleNamespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return ",".join(f"{text_of(key)}={text_of(one)}" for key, one in value.items()) or "{}"
    if isinstance(value, (set, frozenset)):  # every worker of pytest-xdist needs the same order
        return ",".join(sorted(str(text_of(one)) for one in value)) or "()"
    if isinstance(value, (list, tuple)):
        return ",".join(str(text_of(one)) for one in value) or "()"
    if hasattr(value, "__name__"):
        return None if value.__name__ == "<lambda>" else value.__name__
    if type(value).__repr__ is object.__repr__:
        return type(value).__name__
    return re.sub(r"\s+", " ", re.sub(r" at 0x[0-9a-f]+", "", str(value).removeprefix("torch.")))


def pytest_make_parametrize_id(config: pytest.Config, val: Any, argname: str) -> str | None:
    """A number says what it is a number of; text stands for itself; an object is described."""
    text = text_of(val)
    if text is None:
        return None
    text = " ".join(text.split()) if "\n" in text else text
    text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    # pytest numbers values of one name apart, and a number behind the name is what nobody can read
    return f"{argname}={text}" if not text or isinstance(val, (bool, int, float)) or val is None else text


def numbered(items: Iterable[pytest.Item]) -> list[str]:
    """Tests with a case of which the id is the parameter's name and a number."""
    found = {}
    for item in items:
        call = getattr(item, "callspec", None)
        for name in call.params if call is not None else ():
            if re.search(rf"(^|-){re.escape(name)}\d+(-|$)", call.id):
                found[item.nodeid.partition("[")[0]] = item.nodeid
    return sorted(found.values())
