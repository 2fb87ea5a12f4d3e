"""The arm of a step: the schedule, unless a command or the breaker says otherwise."""

from __future__ import annotations

import logging
from dataclasses import replace

from mla_patch.experiment.breaker import Breaker
from mla_patch.experiment.control import Control, Inbox
from mla_patch.experiment.control_file import Command
from mla_patch.experiment.schedule import OUTSIDE, Plan, Schedule, Turn

log = logging.getLogger("mla_patch")


class Assigner:
    """One feature's, in one rank. Ask once a step, with the host's own step number."""

    def __init__(
        self, feature: str, plan: Plan, control: Control | None = None, breaker: Breaker | None = None
    ) -> None:
        self.feature = feature
        self.plan = plan  # as it was given
        self.schedule = Schedule(plan)
        self.forced: Turn | None = None  # an arm by command
        self.late = 0  # commands that arrived after their step; the ranks' records tell which steps differed
        self.taken: list[Command] = []
        self._control = control
        self._inbox = control.inbox(feature) if control else Inbox()
        self._breaker = breaker
        self._last = -1

    def turn(self, step: int) -> Turn:
        if self._control is not None:
            self._control.step = step
            if step >= self._inbox.next_at:
                self._obey(step)
        self._last = step
        if self._breaker is not None and self._breaker.reason:
            return self._host
        return self.forced or self.schedule.turn(step)

    @property
    def _host(self) -> Turn:
        return Turn(self.plan.arms[0], OUTSIDE, OUTSIDE)

    def _obey(self, step: int) -> None:
        for command in self._inbox.take(step):
            # one rank alone obeys when it has read a command, and cannot part from others
            self.late += command.at <= self._last and self._control is not None and self._control.ranks > 1
            self.taken.append(command)
            plan = self.plan
            if command.kind == "trip":
                if self._breaker is not None:
                    self._breaker.trip(f"{command.by}: {command.reason}", told=True)
                self.forced = self._host
                self._inbox = Inbox()  # for good: nothing comes any more
                return
            if command.kind == "arm" and command.value not in plan.arms:
                expected = ", ".join(plan.arms)
                log.warning("mla-patch: %s: no arm %r, expected one of %s", self.feature, command.value, expected)
            elif command.kind == "arm":
                self.forced = Turn(str(command.value), OUTSIDE, OUTSIDE)
            elif command.kind == "stop":
                self.forced = self._host
            elif command.kind == "ratio":
                self.forced = None
                self.schedule = Schedule(replace(plan, ratio=float(command.value or 0), start=command.at, warmup=0))
            else:
                self.forced = None
                self.schedule = Schedule(replace(plan, start=command.at))
