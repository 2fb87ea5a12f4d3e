"""What a feature declares about its host: entry points, variables, arms. Standard library only.

A ``Target`` is one entry point of a host that ours takes the place of. The core reads these
declarations and never a host's version; the files beside this one know the versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

Undo = Callable[[], None]


@dataclass(frozen=True)
class Held:
    """Living instances that keep a target's function in an attribute, where a late activation can set ours."""

    place: str  # "module:Class.attribute"
    # what they keep is within(function), a function made by functools.wraps; None: the function itself
    within: Callable[[Any], Any] | None = None
    fixed: Callable[[Any], str | None] | None = None  # (instance) -> why ours would not be reached from it, or None


@dataclass(frozen=True)
class Target:
    """One entry point of a host.

    Several targets of a feature with the same ``name`` are alternative homes of one entry point:
    the first whose module exists and whose parameters match is taken.
    """

    module: str  # "sglang.srt.layers.attention.utils"
    name: str  # "create_flashmla_kv_indices_triton" or "Class.method"; an edit's name is a label
    params: tuple[str, ...] = ()  # reviewed parameter names, in order; "*args" and "**kwargs" as written
    kind: Literal["call", "kernel", "edit"] = "call"
    # call: bind(*args, **kwargs); kernel: bind(grid, *args, **kwargs). Returns the call object,
    # raises TypeError for arguments that it does not know.
    bind: Callable[..., Any] | None = None
    declines: str = ""  # "module:function", (call) -> reason or None
    serve: str = ""  # "module:function", (call) -> what the host's function returns
    edit: Callable[[Any], Undo] | None = None  # kind "edit": edit(module) -> undo
    lasting: bool = False  # an edit of what is stored: it outlives the breaker and restore()
    held_by: tuple[Held, ...] = ()
    # for shadow checks: (call) -> the same call with outputs of its own, filled as the host's are now, and pairs of
    # (the host's, its own) tensors to compare; raises ValueError with the reason why this call has none
    twin: Callable[[Any], tuple[Any, list[tuple[Any, Any]]]] | None = None


@dataclass(frozen=True)
class Variable:
    """One ``MLA_PATCH_<FEATURE>_<NAME>`` of a feature."""

    name: str  # "MATH" for MLA_PATCH_DECODE_MATH
    values: tuple[str, ...]  # what it may be set to; empty: anything
    default: str
    help: str


@dataclass(frozen=True)
class Arm:
    """One more implementation of a feature's calls, beside ``host`` and ``patch``."""

    name: str
    feature: str  # "decode" or "decode@sglang"
    serve: str  # "module:function", as in Target
    declines: str = ""  # empty: the feature's own


@dataclass(frozen=True)
class Gpu:
    """One device, as far as it is known without touching CUDA."""

    name: str
    capability: tuple[int, int]
    driver: str = ""

    @property
    def sm(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Host:
    """One engine that features can be written for."""

    name: str  # its name in reports: "sglang"
    package: str  # the top package whose import wakes the plugin
    distributions: tuple[str, ...]  # names under which it is installed
    reviewed: tuple[str, ...] = ()  # releases whose entry points were read
    plugin_filter: str = ""  # environment variable that narrows the host's own plugins


def key_targets(targets: Iterable[Target]) -> dict[str, tuple[Target, ...]]:
    """Targets by entry point, alternatives in order."""
    keyed: dict[str, list[Target]] = {}
    for target in targets:
        keyed.setdefault(target.name, []).append(target)
    return {name: tuple(homes) for name, homes in keyed.items()}
