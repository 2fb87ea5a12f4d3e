"""What stands where: seen without running anybody's code, and named by where it was written."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import pytest
import wrapt

from mla_patch.standing import describe, find, is_found, names_of, reaches


def ours(*args: Any) -> str:
    return "ours"


def by_name(*args: Any) -> str:
    return ours(*args)


def theirs(*args: Any) -> str:
    return "theirs"


def closes_over(fn: Any) -> Any:
    def inner(*args: Any) -> Any:
        return fn(*args)

    return inner


class Keeps:
    def __init__(self, fn: Any) -> None:
        self.fn = fn

    def method(self, *args: Any) -> Any:
        return self.fn(*args)

    __call__ = method


class Slotted:
    __slots__ = ("fn",)


def circle() -> Any:
    one, other = closes_over(None), closes_over(None)
    one.__wrapped__, other.__wrapped__ = other, one
    return one


def unset() -> Any:
    def inner() -> Any:
        return later

    if False:
        later = None
    return inner


def wrapped(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs)


SEEN_THROUGH = {
    "itself": ours,
    "functools.wraps": functools.wraps(ours)(closes_over(None)),
    "wrapt": wrapt.FunctionWrapper(ours, wrapped),
    "closure": closes_over(ours),
    "global name": by_name,
    "partial": functools.partial(theirs, ours),
    "instance": Keeps(ours),
    "bound method": Keeps(ours).method,
    "staticmethod": staticmethod(ours),
    "classmethod": classmethod(ours),
    "cache": functools.lru_cache(ours),
    "five deep": closes_over(functools.partial(closes_over(Keeps(staticmethod(ours))))),
}
OPAQUE = {
    "another function": theirs,
    "nothing": None,
    "a circle": circle(),
    "an empty cell": unset(),
    "a table": Keeps({"fn": ours}),
    "a builtin": print,
    "slots": Slotted(),
}


@pytest.mark.parametrize("value", SEEN_THROUGH.values(), ids=SEEN_THROUGH)
def test_wrappers_that_can_be_seen_through(value: Any) -> None:
    assert reaches(value, lambda one: one is ours)


@pytest.mark.parametrize("value", OPAQUE.values(), ids=OPAQUE)
def test_what_cannot(value: Any) -> None:
    assert not reaches(value, lambda one: one is ours)


def test_a_wrapper_is_named_by_its_own_code() -> None:
    assert describe(ours) == "test_standing:ours"
    # functools.wraps copies the names of what it wraps; a code object knows where it is nested from 3.11 on
    nested = "closes_over.<locals>.inner" if sys.version_info >= (3, 11) else "inner"
    assert describe(SEEN_THROUGH["functools.wraps"]) == f"test_standing:{nested}"
    assert describe(SEEN_THROUGH["wrapt"]) == "test_standing:wrapped"
    assert describe(Keeps(ours).method) == "test_standing:Keeps.method"
    assert describe(staticmethod(ours)) == "test_standing:ours"
    assert describe(Keeps(ours)) == "an instance of test_standing:Keeps"
    assert describe(Keeps) == "test_standing:Keeps"
    assert describe(None) == "nothing"


def test_lazy_modules_and_their_names_are_read_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"loaded for {name}")

    lazy = Lazy("lazy")
    names_of(lazy)["fn"] = ours  # type: ignore[index]
    monkeypatch.setitem(sys.modules, "lazy", lazy)
    assert find(lazy, "fn") == (lazy, ours)
    assert find(lazy, "Missing.method")[1] is None
    assert is_found(lazy)
    monkeypatch.delitem(sys.modules, "lazy")
    assert not is_found(lazy)


def test_methods_are_found_where_they_are_inherited_from() -> None:
    class Derived(Keeps):
        pass

    home = types.ModuleType("home")
    home.Derived = Derived  # type: ignore[attr-defined]
    assert find(home, "Derived.method") == (Derived, Keeps.method)
    assert is_found(Keeps) and not is_found(Derived)
