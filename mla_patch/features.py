"""What a feature is, and the words in which its fate is told.

Declarations are data: importing this file, or a hook's, imports no engine and no torch.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mla_patch.compat.types import Change, Gpu, Mark
from mla_patch.compat.types import Variable as Variable


class State(str, Enum):
    """Where a feature stands in one process."""

    OFF = "off"
    ABSENT = "absent"
    ARMED = "armed"
    NATIVE = "native"
    DRIFTED = "drifted"
    REFUSED = "refused"
    APPLIED = "applied"
    DISPLACED = "displaced"
    FAILED = "failed"

    __str__ = str.__str__


SATISFIED = frozenset({State.APPLIED, State.NATIVE, State.ARMED})

MEANING = {
    State.OFF: "its flag or restore() switched it off",
    State.ABSENT: "the engine, or a package with its entry points, is not installed, or is outside the range",
    State.ARMED: "everything checked so far is right; the engine has not imported its module yet",
    State.NATIVE: "the engine has its own implementation, so our code steps aside",
    State.DRIFTED: "an entry point is missing or its parameters changed; the engine keeps its own code",
    State.REFUSED: "this GPU, configuration, flag or moment does not allow it",
    State.APPLIED: "our code stands in place of the engine's",
    State.DISPLACED: "other code stands where we put our code, and takes its calls; apply() puts ours back",
    State.FAILED: "our code raised an error; the engine's own code serves",
}


DeviceCheck = Callable[[Gpu], "str | None"]  # a device -> why not, or None


@dataclass(frozen=True)
class Feature:
    """One replaceable piece of one host."""

    name: str  # and the flag: MLA_PATCH_<NAME>
    host: str  # a requirement, closed above: "sglang>=0.5.1,<0.5.24"
    targets: Callable[[str | None], tuple[Change, ...]]  # version -> entry points; None: every known home
    why: str
    upstream: str
    drop_when: str
    # (target, version) -> why the host's own is good enough, or None; asked once per target. Where that depends on the
    # GPU, a function of it: asked, as hardware is, at import where NVML tells, else at the first call for all targets
    native: Callable[[Change, str | None], str | DeviceCheck | None] | None = None
    hardware: DeviceCheck | None = None  # (gpu) -> why this device cannot, or None
    # () -> why ours would break what the host promises in a process with this environment, or None
    environment: Callable[[], str | None] | None = None
    variables: tuple[Variable, ...] = ()
    default: str = "on"
    # version -> edits that tell an experiment of the host's steps and graphs; None: no host arm, so no experiment
    steps: Callable[[str | None], tuple[Change, ...]] | None = None
    # (who serves, when), where that is chosen call by call; the first that applies. For `explain`
    providers: tuple[tuple[str, str], ...] = ()
    # what tells releases apart in the host's source where the targets look the same in all
    marks: tuple[Mark, ...] = ()
    # (version, compute capability, heads, whether the flag is an explicit on) -> (kind of call, who serves it), by
    # default settings. For `explain`
    serves: Callable[[str, tuple[int, int], int, bool], list[tuple[str, str]]] | None = None
    # what becomes of the host's promises about results, such as batch invariance. For `explain` and the docs
    promises: str = ""
    memory: Callable[[], int] | None = None  # bytes that ours holds between calls in this process, for the report
    # (mode, whether somebody set it): told whenever this process has decided about the feature, for hooks that serve
    # more calls where they are asked for
    on_decision: Callable[[str, bool], None] | None = None

    @property
    def flag(self) -> str:
        return f"MLA_PATCH_{self.name.upper()}"

    @property
    def host_name(self) -> str:
        """The distribution's name: "sglang"."""
        return self.requirement()[0]

    @property
    def label(self) -> str:
        return f"{self.name}@{self.host_name}"

    def requirement(self) -> tuple[str, str]:
        """The host's name and its version specifier, as text."""
        end = next((i for i, c in enumerate(self.host) if c in "<>=!~ ["), len(self.host))
        return self.host[:end].strip(), self.host[end:].strip()

    def refusal(self, device: Gpu | None) -> str | None:
        """Why ours cannot serve here, as the environment and ``device`` (None: it is not known) say, or None."""
        promised = self.environment() if self.environment is not None else None
        if promised is not None or self.hardware is None or device is None:
            return promised
        return self.hardware(device)

    def matches(self, name: str) -> bool:
        """Whether ``name`` ("decode" or "decode@sglang") means this feature."""
        return name in (self.name, self.label)


class CallRejected(Exception):
    """A ``serve``'s refusal of a call that the host cannot serve either: the caller is raised ``refusal``."""

    def __init__(self, refusal: ValueError) -> None:
        super().__init__(refusal)
        self.refusal = refusal


MAX_REASONS = 64
FIRST_CALLS = 64  # a feature that has declined so many for one reason, and served none, is worth a word


@dataclass
class Counts:
    """How often a feature's entry points served a call of the host's.

    The dispatcher adds to the numbers without a lock: CPython switches threads only at calls and
    backward jumps, so an in-place addition to an attribute is whole. A free-threaded build may lose
    a few.
    """

    served: int = 0
    served_by: dict[str, int] = field(default_factory=dict)  # by entry point
    captured: int = 0
    replayed: int | None = None
    traced: int = 0  # graphs of torch.compile that hold the host's code, because they may not be broken
    declined: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _tracer: Any = field(default=None, repr=False, compare=False)

    def serve(self, entry: str) -> None:
        """Count a call that ours served at one entry point."""
        self.served += 1
        self.served_by[entry] = self.served_by.get(entry, 0) + 1

    def decline(self, reason: str) -> bool:
        """Count a call that ours did not serve; reasons beyond the first 64 share one line.

        Returns whether this is the last of the first calls, none of which was served, all for this one reason.
        """
        with self._lock:
            if reason not in self.declined and len(self.declined) >= MAX_REASONS:
                reason = "other reasons"
            count = self.declined[reason] = self.declined.get(reason, 0) + 1
            return count == FIRST_CALLS and not self.served and len(self.declined) == 1

    def trace(self, tracer: Any) -> None:
        """Count a graph of torch.compile that takes the host's code; one tracer asks many times."""
        if self._tracer is None or self._tracer() is not tracer:
            self._tracer = weakref.ref(tracer)
            self.traced += 1

    def reset(self) -> None:
        """Start from nothing, as a forked child does."""
        self._lock = threading.Lock()
        self.served = self.captured = self.traced = 0
        self.served_by = {}
        self.replayed = None
        self.declined = {}
