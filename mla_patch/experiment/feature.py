"""The experiment on one feature: which arm its calls run now, and the record of each step.

The dispatcher asks it for the arm of each call. `live.ExperimentSession` tells it of steps and captures.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mla_patch.compat import gpu
from mla_patch.compat.steps import StepInfo
from mla_patch.compat.types import HOST, PATCH, SHADOW
from mla_patch.experiment.assign import Assigner
from mla_patch.experiment.breaker import Breaker
from mla_patch.experiment.record import Timing, bucket
from mla_patch.experiment.schedule import AGAIN, NOT_COMPARED, Assignment, Sampling, parse_ab, parse_shadow
from mla_patch.experiment.shadow import Drain, Ring
from mla_patch.features import Counts

if TYPE_CHECKING:
    from mla_patch.dispatch import EntryPoint, FeatureGate
    from mla_patch.experiment.live import ExperimentSession

_HOST_NOT_COMPARED = Assignment(HOST, NOT_COMPARED, NOT_COMPARED)


class FeatureExperiment:
    """The experiment on one feature. Implements the dispatcher's protocol for choosing arms."""

    def __init__(
        self, session: ExperimentSession, name: str, mode: str, ab: str, shadow: str, more: tuple[str, ...] = ()
    ) -> None:
        """``mode``, ``ab`` and ``shadow`` are values of flags. ``more`` names the arms that plugins bring.

        Raises:
            ValueError: a value is not valid, or an arm does not exist.
        """
        self.name = name
        self.ab = "ab" in mode.split("+")
        plan = parse_ab(ab, (HOST, PATCH, *more))
        arms = plan.arms
        known = (HOST, PATCH, AGAIN, *more)
        for arm in arms:
            if arm not in known:
                raise ValueError(f"MLA_PATCH_AB: arms={arm}: {name} has {', '.join(known)}")
        if arms[0] != HOST:
            raise ValueError(f"MLA_PATCH_AB: arms={'+'.join(arms)}: expected {HOST} first")
        self.plan = replace(plan, salt=name)
        self.sampling: Sampling | None = parse_shadow(shadow) if "shadow" in mode.split("+") else None
        self.candidate = next((arm for arm in arms if arm not in (HOST, AGAIN)), PATCH)
        self.arm = HOST  # the arm that runs now
        self.assignment = _HOST_NOT_COMPARED
        self.before = 0  # calls that we had served when this step, or this draft, began
        self.counts = Counts()
        self.assigner = Assigner(name, self.plan)
        self.breaker = Breaker(parse_shadow(shadow).tolerance, self._stop, self._publish)
        self.drain: Drain | None = None
        self._session = session
        self._switch: FeatureGate | None = None
        self._ring: Ring | None = None
        self._tag = 0
        self._in_graph = False

    # for the dispatcher

    def choose(self, site: EntryPoint, call: Any) -> str:
        if self._session.graph_open is not None and gpu.capturing():
            self._session.graph_open.add(self.name)
        return HOST if self.arm == AGAIN else self.arm

    def compare(self, pairs: list[tuple[Any, Any]]) -> None:
        capturing = gpu.capturing()
        if capturing != self._in_graph:  # a capture begins after its warm-ups: count layers from 0 again
            self._in_graph, self._tag = capturing, 0
        if self._ring is None:
            if capturing:
                return  # memory allocated now would belong to the graph; warm-ups, if any, have made the ring before
            self._make_ring(pairs[0][0].device)
        assert self._ring is not None
        for host, ours in pairs:
            self._ring.compare(host, ours, self._tag)
        self._tag += 1

    def _make_ring(self, device: Any) -> None:
        import torch

        with torch.inference_mode(False):  # the engine may step in inference mode and capture outside it, or vice versa
            self._ring = Ring(device)
            self._ring.begin(self._session.step if self._session.graph_open is None else 0)
            self.drain = Drain(self._ring, self.name)

    def attach(self, switch: FeatureGate, counts: Counts) -> None:
        self._switch, self.counts = switch, counts
        counts.replayed = counts.replayed or 0

    def stopped(self, reason: str) -> None:
        self.breaker.trip(reason)

    def _stop(self, reason: str) -> None:
        if self._switch is not None:
            self._switch.trip(reason)

    def _publish(self, reason: str) -> None:
        self._session.note(self.name, "breaker", reason)
        if self._session.control is not None:
            self._session.control.trip(self.name, reason)

    # for the process's steps

    def due(self, step: int) -> bool:
        return self.sampling is not None and not self.breaker.reason and self.sampling.due(step)

    def take(self, step: int) -> None:
        """The engine's step ``step`` begins: obey commands that are due, and take the step's assignment."""
        taken = len(self.assigner.taken)
        self.assignment = self.assigner.assignment(step)
        for command in self.assigner.taken[taken:]:
            text = " ".join(map(str, filter(None, (command.kind, command.value, command.reason))))
            self._session.note(self.name, "command", f"{text}, by {command.by}")

    def begin(self, step: int, shadow: bool, due: bool) -> None:
        """The target model, or a draft model, begins a step with this assignment."""
        self.before = self.counts.served
        self._tag, self._in_graph = 0, False
        if shadow:
            self.arm = SHADOW if due else HOST
            if due and self._ring is not None:
                self._ring.begin(step)
        else:
            self.arm = self.assignment.arm if self.ab and not self.breaker.reason else HOST

    def end(self) -> None:
        if self.arm == SHADOW and self._ring is not None:
            self._ring.end()
        self.arm = HOST

    def prepare(self, arm: str) -> None:
        """A graph with this arm is about to be captured."""
        self.arm, self._tag, self._in_graph = arm, 0, False
        if self._ring is not None:
            self._ring.begin(0)  # comparisons in the warm-ups belong to no step

    def row(self, step: int, mode: str, work: StepInfo, calls: dict[str, int] | None) -> Timing | None:
        """The record of a step, without its time; None if the feature is not compared in this step."""
        if not self.ab or self._switch is None or self._switch.off:  # restored
            return None
        arm, block, group = self.assignment
        ours = (calls or {}).get(self.name) or self.counts.served > self.before
        if arm not in (HOST, AGAIN) and (not ours or self.breaker.reason):
            # Our arm served nothing: it declined every call, there was no call, it has no graph, or it failed. It may
            # have run on other ranks.
            arm, block, group = _HOST_NOT_COMPARED
        return Timing(step, self.name, arm, block, group, bucket(mode, work.batch, work.context), 0.0)
