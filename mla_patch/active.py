"""What the patcher knows of one feature in this process: what was decided, and what was put where."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mla_patch.bindings import Binding
from mla_patch.compat.types import Change, Edit, Undo
from mla_patch.dispatch import ArmSelector, FeatureGate
from mla_patch.features import Counts, DeviceCheck, Feature, State
from mla_patch.flags import Setting
from mla_patch.reports import FeatureStatus
from mla_patch.stand_ins import is_ours
from mla_patch.standing import own
from mla_patch.turns import Turns

# ours stands in the host, or will once its modules are imported, or somebody has put it aside: `displaced` asks
STANDING = frozenset({State.ARMED, State.APPLIED, State.DISPLACED})


class Mismatch(Exception):
    """The live host is not what was reviewed; the text says where."""

    def __init__(self, text: str, state: State = State.DRIFTED) -> None:
        super().__init__(text)
        self.state = state


class Around:
    """An arm's serve(original, call), called as serve(call). What stood there is asked of the stand-in: whoever else
    keeps it is taken for one of the host's."""

    __slots__ = ("serve", "stand_in")

    def __init__(self, serve: Callable[..., Any]) -> None:
        self.serve = serve
        self.stand_in: Any = None

    def __call__(self, call: Any) -> Any:
        return self.serve(self.stand_in.__wrapped__, call)


@dataclass
class Taken:
    """A target or an edit that is in place, in one execution of its module."""

    target: Change
    module: types.ModuleType
    spec: Any  # the module's: importlib.reload() gives it another
    undo: Undo | None = None  # of an edit

    def is_current(self) -> bool:
        """Whether the module has been neither dropped nor executed again since."""
        return sys.modules.get(self.target.module) is self.module and own(self.module, "__spec__") is self.spec


@dataclass
class ActiveFeature:
    """One feature on one host in this process: what was decided, and what was done."""

    feature: Feature
    setting: Setting
    status: FeatureStatus
    switch: FeatureGate
    arms: ArmSelector | None = None  # the experiment that chooses; None: ours serves
    targets: list[Change] = field(default_factory=list)
    # (gpu) -> why the host's own is kept, or None; and at which entry points that is a question
    device_checks: dict[DeviceCheck, set[str]] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)  # entry point -> stand-in; somebody may keep it over restore()
    places: list[Binding] = field(default_factory=list)
    undos: dict[str, tuple[Edit, Undo]] = field(default_factory=dict)  # an edit's name -> how to take it back
    taken: dict[int, Taken] = field(default_factory=dict)  # by the target's place in `targets`
    lost: set[str] = field(default_factory=set)  # groups of targets that the live host has otherwise than reviewed
    notes: str = ""  # the reason, as long as ours stands
    warned: bool = False
    told: bool = False  # that ours has been displaced
    # what hid ours when that was seen first, and how many calls had come by then; by id, so that ours keeps nothing
    hidden_by: tuple[list[int], int] = field(default_factory=lambda: ([], 0))
    again: dict[str, Callable[[types.ModuleType], None]] = field(default_factory=dict)  # by module: what takes it
    turns: Turns = field(default_factory=Turns)

    def bind(self, place: Binding) -> None:
        """Put ours under a name, and remember what was there."""
        self.places.append(place)
        setattr(place.where(), place.attribute, place.ours)


def declines_nothing(call: Any) -> None:
    return None


def ours_below(value: Any, name: str, counts: Counts) -> Any:
    """The stand-in of the feature that counts in ``counts`` for its entry point ``name``, in what ``value`` wraps."""
    for _ in range(32):  # wrappers can be wound in a circle
        if is_ours(value) and value._self_entry.name == name and value._self_entry.counts is counts:
            return value
        value = getattr(value, "__wrapped__", None)
        if value is None:
            break
    return None
