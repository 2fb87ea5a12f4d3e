"""How edits put methods and other names into a host, and take them back. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mla_patch.compat.types import Undo

Names = list[tuple[Any, str, Any]]  # (holder, name there, what an edit has put there); a holder may be a dict


@dataclass(frozen=True)
class Undoing:
    """An `Undo` that knows under which names the edit has put what: a report looks whether it stands there."""

    undo: Undo
    places: Callable[[], Names]

    def __call__(self) -> None:
        self.undo()


def set_methods(owner: type, ours: dict[str, Any]) -> Undoing:
    """Give ``owner`` these methods, in place of its own: the class itself is bound elsewhere by value."""
    before = {name: vars(owner)[name] for name in ours}
    for name, method in ours.items():
        setattr(owner, name, method)

    def undo() -> None:
        for name, method in ours.items():
            if vars(owner).get(name) is method:  # or somebody has put something else there since
                setattr(owner, name, before[name])

    return Undoing(undo, lambda: [(owner, name, method) for name, method in ours.items()])
