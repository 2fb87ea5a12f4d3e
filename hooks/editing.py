"""How edits put methods and other names into a host, and take them back. Standard library only."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mla_patch.compat.types import Undo

log = logging.getLogger("mla_patch")

Methods = tuple[type, dict[str, Any]]  # a class, and methods for it by name
Names = list[tuple[Any, str, Any]]  # (holder, name there, what an edit has put there); a holder may be a dict


@dataclass(frozen=True)
class Undoing:
    """An `Undo` that knows under which names the edit has put what: a report looks whether it stands there."""

    undo: Undo
    places: Callable[[], Names]

    def __call__(self) -> None:
        self.undo()


def set_methods(owner: type, methods: dict[str, Any]) -> Undoing:
    """Give ``owner`` these methods, in place of its own: the class itself is bound elsewhere by value."""
    before = {name: vars(owner)[name] for name in methods}
    for name, method in methods.items():
        setattr(owner, name, method)

    def undo() -> None:
        for name, method in methods.items():
            if vars(owner).get(name) is method:  # or somebody has put something else there since
                setattr(owner, name, before[name])

    return Undoing(undo, lambda: [(owner, name, method) for name, method in methods.items()])


def checked_method(owner: type, name: str, *params: str) -> Callable[..., Any]:
    """``owner``'s own method, which must begin with ``self`` and these parameters.

    Raises:
        TypeError: it does not, or there is no such method.
    """
    method = vars(owner).get(name)
    found = tuple(inspect.signature(method).parameters) if method is not None else ()
    if found[: len(params) + 1] != ("self", *params):
        told = f"takes ({', '.join(found)})" if method is not None else "does not exist"
        raise TypeError(f"{owner.__qualname__}.{name} {told}, expected (self, {', '.join((*params, '...'))})")
    assert method is not None
    return method


_shared: dict[type, tuple[int, Undoing]] = {}  # by class: how many features use the edit, and how to take it back


def shared_edit(
    at_end: Callable[[], None] | None = None,
) -> Callable[[Callable[[ModuleType], Methods]], Callable[[ModuleType], Undo]]:
    """Make of ``edit``, (module) -> a class and its new methods, an edit that several features can ask for.

    It is made for the first of them and undone after the last; then ``at_end`` is called.
    """

    def share(edit: Callable[[ModuleType], Methods]) -> Callable[[ModuleType], Undo]:
        @functools.wraps(edit)
        def edit_once(module: ModuleType) -> Undo:
            owner, methods = edit(module)
            if owner not in _shared:
                _shared[owner] = (0, set_methods(owner, methods))
            count, undo = _shared[owner]
            _shared[owner] = (count + 1, undo)

            def give_back() -> None:
                count, undo = _shared.pop(owner)
                if count > 1:
                    _shared[owner] = (count - 1, undo)
                    return
                undo()
                if at_end is not None:
                    at_end()

            return Undoing(give_back, undo.places)

        return edit_once

    return share


_said: set[str] = set()


def say_once(what: str, text: str, *values: Any) -> None:
    """Warn once in a process, even if the feature is restored and applied again. ``what`` names the warning."""
    if what not in _said:
        _said.add(what)
        log.warning("mla-patch: " + text, *values)
