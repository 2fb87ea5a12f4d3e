"""Decides the arm of a step: the schedule's, unless a live command or the breaker says otherwise."""

from __future__ import annotations

import logging
from dataclasses import replace

from mla_patch.experiment.breaker import Breaker
from mla_patch.experiment.control import Control, Inbox
from mla_patch.experiment.control_file import Command
from mla_patch.experiment.schedule import NOT_COMPARED, Assignment, Plan, Schedule

log = logging.getLogger("mla_patch")


class Assigner:
    """Assigns an arm to each step, for one feature in one rank.

    Call `assignment` once per step, with the engine's own step number.
    """

    def __init__(
        self, feature: str, plan: Plan, control: Control | None = None, breaker: Breaker | None = None
    ) -> None:
        self.feature = feature
        self.plan = plan  # never changed; commands make a schedule of a changed copy
        self.schedule = Schedule(plan)
        self.forced: Assignment | None = None  # set by a command, overrides the schedule
        self.late = 0  # commands that arrived after their step; `merge` finds the steps on which ranks differed
        self.taken: list[Command] = []  # commands obeyed so far
        self._control = control
        self._inbox = control.inbox(feature) if control else Inbox()
        self._breaker = breaker
        self._last = -1

    def assignment(self, step: int) -> Assignment:
        if self._control is not None:
            self._control.step = step
            if step >= self._inbox.next_at:
                self._obey(step)
        self._last = step
        if self._breaker is not None and self._breaker.reason:
            return self._host
        return self.forced or self.schedule.assignment(step)

    @property
    def _host(self) -> Assignment:
        return Assignment(self.plan.arms[0], NOT_COMPARED, NOT_COMPARED)

    def _obey(self, step: int) -> None:
        for command in self._inbox.take(step):
            # a single rank obeys as soon as it has read a command, so for it no command is late
            self.late += command.at <= self._last and self._control is not None and self._control.ranks > 1
            self.taken.append(command)
            plan = self.plan
            if command.kind == "trip":
                if self._breaker is not None:
                    self._breaker.trip(f"{command.by}: {command.reason}", told=True)
                self.forced = self._host
                self._inbox = Inbox()  # an inbox that gets nothing: no later command undoes the breaker
                return
            if command.kind == "arm" and command.value not in plan.arms:
                expected = ", ".join(plan.arms)
                log.warning("mla-patch: %s: no arm %r, expected one of %s", self.feature, command.value, expected)
            elif command.kind == "arm":
                self.forced = Assignment(str(command.value), NOT_COMPARED, NOT_COMPARED)
            elif command.kind == "stop":
                self.forced = self._host
            elif command.kind == "ratio":
                self.forced = None
                self.schedule = Schedule(replace(plan, ratio=float(command.value or 0), start=command.at, warmup=0))
            else:
                self.forced = None
                self.schedule = Schedule(replace(plan, start=command.at))
