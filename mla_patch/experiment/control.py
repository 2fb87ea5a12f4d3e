"""Live control: commands from a person, or from another rank's breaker, that take effect at one step on all ranks.

A thread in each rank reads the control file 20 times a second, also while the engine is idle. A step only compares two
numbers. A file that cannot be trusted is ignored and reported, and the engine goes on with the last valid commands.

The step at which a command takes effect:

    one rank               its next step after it has read the command
    several ranks, idle    the next step of all ranks
    several ranks          MARGIN steps, and as many as the ranks run in LEAD + INTERVAL seconds, after the last step
                           that any rank has reached, so that every rank has read the command before that step

One rank can still read a command up to INTERVAL seconds after another has obeyed it: if an idle engine begins a step at
that moment, or if steps suddenly come five times as fast. Such steps are left out of every comparison, because the
ranks differ in them, and the late rank counts the command as late.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import socket
import threading
import time
from collections import deque
from pathlib import Path

from mla_patch import files
from mla_patch.experiment.control_file import (
    NEVER,
    Command,
    Content,
    ControlError,
    Heartbeat,
    beat,
    content_of,
    heartbeats_of,
    next_seq,
    opened,
    publish,
    read,
)

log = logging.getLogger("mla_patch")
INTERVAL = 0.05  # seconds between two reads of the file
LEAD = 0.3  # seconds allowed for a command to reach every rank; heartbeats are up to INTERVAL older
MARGIN = 2  # steps added to that: ranks can be one step apart, and one step may have begun
PACE = 0.5  # seconds over which a rank measures its steps per second


class Inbox:
    """The pending commands for one feature in one rank. A step reads only ``next_at``."""

    __slots__ = ("_done", "_lock", "_pending", "next_at")

    def __init__(self) -> None:
        self.next_at = NEVER
        self._pending: list[Command] = []
        self._done: set[int] = set()
        self._lock = threading.Lock()

    def put(self, commands: list[Command]) -> None:
        with self._lock:
            new = [command for command in commands if command.seq not in self._done]
            self._pending = sorted(new, key=lambda command: (command.at, command.seq))
            self.next_at = self._pending[0].at if self._pending else NEVER

    def take(self, step: int) -> list[Command]:
        """Remove and return the commands that take effect at or before ``step``, in order."""
        with self._lock:
            due = [command for command in self._pending if command.at <= step]
            self._done.update(command.seq for command in due)
            self._pending = self._pending[len(due) :]
            self.next_at = self._pending[0].at if self._pending else NEVER
            return due


class Control:
    """The rank's side: reads commands, publishes the rank's step, and tells other ranks when its breaker trips.

    Never raises into the engine. ``problem`` says what is wrong, or is empty. Each new problem is logged once.
    """

    def __init__(self, path: Path, rank: int, *, thread: bool = True) -> None:
        self.path = path
        self.rank = rank
        self.step = 0  # set by the engine's thread at every step
        self.problem = ""
        self.ranks = 1  # how many ranks obey this file
        self._inboxes: dict[str, Inbox] = {}
        self._trips: list[tuple[str, str]] = []  # (feature, reason), not published yet
        self._content: Content | None = None
        self._beats: deque[Heartbeat] = deque()  # this rank's heartbeats of the last PACE seconds
        self._stop = threading.Event()
        self._wake = threading.Event()
        if thread:
            threading.Thread(target=self._run, name="mla-patch-control", daemon=True).start()

    def inbox(self, feature: str) -> Inbox:
        inbox = self._inboxes.setdefault(feature, Inbox())
        self._deliver()
        return inbox

    def trip(self, feature: str, reason: str) -> None:
        """Make the other ranks run the engine's kernel, too. Returns at once; the thread writes the command."""
        self._trips.append((feature, reason))
        self._wake.set()

    def close(self) -> None:
        self._stop.set()
        self._wake.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.poll()
            self._wake.wait(INTERVAL)
            self._wake.clear()

    def poll(self) -> None:
        """Read the file once, publish this rank's heartbeat, and write pending breaker trips."""
        try:
            with opened(self.path, os.O_RDWR) as file:
                content = content_of(file, self.path)
                if self._content and content.generation < self._content.generation:
                    raise ControlError(
                        f"{self.path}: generation {content.generation} after {self._content.generation}: replaced"
                    )
                if self._content is None or content.generation > self._content.generation:
                    self._content = content
                    self.ranks = _ranks(content, heartbeats_of(file))
                    self._deliver()
                self._beat(file, next_seq(self._content) - 1)
            while self._trips:
                publish(self.path, lambda content, beats: self._make_trip(content, beats, *self._trips[0]))
                self._trips.pop(0)
        except Exception as problem:
            text = str(problem) if isinstance(problem, ControlError) else repr(problem)
            if text != self.problem:
                self.problem = text
                log.warning("mla-patch: live control: %s; the engine goes on as it is", text)
        else:
            self.problem = ""

    def _deliver(self) -> None:
        for feature, inbox in list(self._inboxes.items()):
            if self._content:
                inbox.put([command for command in self._content.commands if command.feature == feature])

    def _beat(self, file: int, seen: int) -> None:
        now = Heartbeat(self.rank, self.step, time.time_ns(), seen)
        while self._beats and now.ns - self._beats[0].ns > PACE * 1e9:
            self._beats.popleft()
        self._beats.append(now)
        beat(file, now)

    def _make_trip(self, content: Content, beats: list[Heartbeat], feature: str, reason: str) -> Command:
        mine = [one for one in beats if one.rank != self.rank] + list(self._beats)[-1:]
        at = _later(mine, _pace(self._beats[0], self._beats[-1]), _ranks(content, beats), self.step)
        return Command(feature, "trip", at, next_seq(content), None, reason[:500], f"rank {self.rank}")


def _ranks(content: Content, beats: list[Heartbeat]) -> int:
    """How many ranks obey: the engine's number, or the number of heartbeats if that is higher."""
    return max(int(content.about.get("ranks", 1)), len(beats))


def _pace(first: Heartbeat, last: Heartbeat) -> float:
    """Steps per second of one rank between two of its heartbeats; 0 if they have the same time."""
    return max(last.step - first.step, 0) / (last.ns - first.ns) * 1e9 if last.ns > first.ns else 0.0


def _later(beats: list[Heartbeat], rate: float, ranks: int, step: int = 0) -> int:
    """A step that no rank has reached; with several ranks, far enough ahead for each to read the command first."""
    reached = max([step, *(beat.step for beat in beats)])
    return reached + (MARGIN + math.ceil(rate * (LEAD + INTERVAL)) if ranks > 1 and rate else 1)


class Controller:
    """The operator's side: ``with Controller(path) as control: control.send("decode", "arm", "host")``.

    A lock file keeps a second controller out.

    Raises:
        ControlError: the file cannot be trusted, or another controller is active.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1

    def __enter__(self) -> Controller:
        read(self.path)
        lock = self.path.with_name(self.path.name + ".lock")
        try:
            self._lock = files.open_ours(lock, os.O_RDWR)
        except OSError as problem:
            raise ControlError(f"{lock}: {problem.strerror or problem}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._lock, 200, 0).decode(errors="replace").strip()
            self.__exit__()
            raise ControlError(f"{self.path}: another controller is active ({holder or 'unknown'})") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)  # and the lock with it
        self._lock = -1

    def send(self, feature: str, kind: str, value: str | float | None = None, *, at: int | None = None) -> Command:
        """Write one command and return it. Its ``at`` is the step at which it takes effect.

        ``at``: ask for a certain step instead of the earliest possible one.

        Raises:
            ControlError: there is no such feature or arm, a rank has reached ``at`` already, or the file cannot be
                trusted.
            ValueError: no command has this kind or value.
        """
        rate = self._measure() if at is None and _ranks(*read(self.path)) > 1 else 0.0

        def make(content: Content, beats: list[Heartbeat]) -> Command:
            arms = content.about.get("features", {}).get(feature)
            if arms is None:
                known = ", ".join(content.about.get("features", {})) or "none"
                raise ControlError(f"{feature!r} is not under test here; under test: {known}")
            if kind == "arm" and value not in arms:
                raise ControlError(f"{value!r} is not an arm of {feature}; expected one of {', '.join(arms)}")
            reached = max((beat.step for beat in beats), default=-NEVER)
            if at is not None and at <= reached:
                raise ControlError(f"at={at}: a rank is already at step {reached}")
            step = _later(beats, rate, _ranks(content, beats)) if at is None else at
            return Command(feature, kind, step, next_seq(content), value, "", f"process {os.getpid()}")

        return publish(self.path, make)

    def _measure(self) -> float:
        """Steps per second of the fastest rank, measured over a quarter of a second."""
        before = {beat.rank: beat for beat in read(self.path)[1]}
        time.sleep(0.25)
        rates = [_pace(before[beat.rank], beat) for beat in read(self.path)[1] if beat.rank in before]
        return max(rates, default=0.0)
