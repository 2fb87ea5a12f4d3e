"""How edits put methods into a host's class, and take them back. Standard library only."""

from __future__ import annotations

from typing import Any

from mla_patch.compat.types import Undo


def set_methods(owner: type, ours: dict[str, Any]) -> Undo:
    """Give ``owner`` these methods, in place of its own: the class itself is bound elsewhere by value."""
    before = {name: vars(owner)[name] for name in ours}
    for name, method in ours.items():
        setattr(owner, name, method)

    def undo() -> None:
        for name, method in ours.items():
            if vars(owner).get(name) is method:  # or somebody has put something else there since
                setattr(owner, name, before[name])

    return undo
