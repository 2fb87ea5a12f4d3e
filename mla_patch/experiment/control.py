"""Commands to a running engine: one small file in the report directory, read by every rank, effective at a stated step.

    0      magic, version                                             HEADER
    64     128 cells of 32 bytes: rank, step, time, crc               where each rank is, so that "later" can be said
    8192   slot 0: generation, length, crc, JSON                      written in turn: a torn write spoils the slot
    24576  slot 1: the same                                           that nobody reads, and the other still holds

A thread of each rank looks 20 times a second; a step compares two numbers. The file is read, never mapped: whoever
truncates a mapped file kills its readers with SIGBUS. It is opened afresh for each look, so that one that was
removed, replaced or handed to another owner is noticed, and a network file system shows what other nodes wrote.
What cannot be trusted is ignored and reported, and the engine goes on with what it had.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import socket
import stat
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger("mla_patch")
MAGIC, VERSION = b"MLAPCTRL", 1
HEADER = struct.Struct("<8sI")
CELL, CELLS_AT, CELLS, CELL_BYTES = struct.Struct("<IQQ"), 64, 128, 32
SLOT, SLOTS_AT, SLOT_BYTES = struct.Struct("<QI"), 8192, 16384
CRC = struct.Struct("<I")
SIZE = SLOTS_AT + 2 * SLOT_BYTES
NEVER = 1 << 62  # a step that does not come
INTERVAL = 0.05  # seconds between two looks
LEAD = 1.0  # seconds that a command is given to reach every rank
MARGIN = 64  # steps, where that is more
GONE = 10.0  # seconds without a beat, beside a rank that beats, after which one is not waited for
WAIT = 2.0  # seconds that a writer waits for another
KINDS = {
    "start": "run the schedule, from its warmup on",
    "ratio": "run the schedule with this share",
    "arm": "run this arm, outside any comparison",
    "stop": "run the host's",
    "trip": "the breaker: run the host's for good",
}


class ControlError(Exception):
    """The file cannot be used; the text says why."""


@dataclass(frozen=True)
class Command:
    """From step ``at`` on, on all ranks."""

    feature: str
    kind: str
    at: int
    seq: int
    value: str | float | None = None  # the arm, the ratio
    reason: str = ""
    by: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.kind == "arm" and not (isinstance(self.value, str) and self.value):
            raise ValueError(f"arm={self.value!r}: expected an arm's name")
        if self.kind == "ratio" and not (isinstance(self.value, float) and 0 < self.value < 1):
            raise ValueError(f"ratio={self.value!r}: expected a number between 0 and 1")
        for name in ("at", "seq"):
            if type(getattr(self, name)) is not int or not 0 <= getattr(self, name) < NEVER:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a whole number, 0 or more")


@dataclass(frozen=True)
class Content:
    """What the file says."""

    generation: int
    about: dict[str, Any]  # written once by the engine: the run, its features and their arms
    commands: tuple[Command, ...]


@dataclass(frozen=True)
class Heartbeat:
    rank: int
    step: int
    ns: int


def create(path: Path, about: dict[str, Any]) -> None:
    """Make the file, whole at once; of several ranks that try, the first does.

    Raises:
        OSError: the directory cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    blank = bytearray(SIZE)
    HEADER.pack_into(blank, 0, MAGIC, VERSION)
    slot = _pack(Content(1, about, ()))
    blank[SLOTS_AT + SLOT_BYTES : SLOTS_AT + SLOT_BYTES + len(slot)] = slot  # generation 1 lies in slot 1
    beside = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(beside, flags, 0o600), "wb") as file:
            file.write(blank)
        os.link(beside, path)
    except FileExistsError:
        pass
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """The file, after every check that needs no content.

    Raises:
        ControlError: it is not a file that we made.
    """
    try:
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as problem:
        raise ControlError(f"{path}: {problem.strerror}") from None
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise ControlError(f"{path}: not a plain file")
        if found.st_uid != os.geteuid():
            raise ControlError(f"{path}: owned by user {found.st_uid}, expected {os.geteuid()}")
        if found.st_mode & 0o077:
            raise ControlError(f"{path}: mode {stat.S_IMODE(found.st_mode):04o}, expected 0600")
        if found.st_size != SIZE:
            raise ControlError(f"{path}: {found.st_size} bytes, expected {SIZE}")
        if os.pread(file, HEADER.size, 0) != HEADER.pack(MAGIC, VERSION):
            raise ControlError(f"{path}: not a control file of version {VERSION}")
        yield file
    finally:
        os.close(file)


def _pack(content: Content) -> bytes:
    """A slot; the oldest commands go where there is no room, the breaker's last."""
    commands = list(content.commands)
    while True:
        text = {"about": content.about, "commands": [asdict(command) for command in commands]}
        data = json.dumps(text, allow_nan=False).encode()
        head = SLOT.pack(content.generation, len(data))
        if SLOT.size + CRC.size + len(data) <= SLOT_BYTES:
            return head + CRC.pack(zlib.crc32(head + data)) + data
        if not commands:
            raise ControlError(f"{len(data)} bytes to say, room for {SLOT_BYTES}")
        commands.remove(next((c for c in commands if c.kind != "trip"), commands[0]))


def _unpack(slot: bytes) -> Content | None:
    """A slot's content, or None where it is torn, empty or nothing that we write."""
    if len(slot) < SLOT.size + CRC.size:
        return None
    generation, length = SLOT.unpack_from(slot)
    data = slot[SLOT.size + CRC.size :][:length]
    (crc,) = CRC.unpack_from(slot, SLOT.size)
    if len(data) != length or zlib.crc32(slot[: SLOT.size] + data) != crc:
        return None
    try:
        value = json.loads(data)
        return Content(generation, dict(value["about"]), tuple(Command(**row) for row in value["commands"]))
    except (ValueError, TypeError, KeyError):
        return None


def _content(file: int, path: Path) -> Content:
    slots = [_unpack(os.pread(file, SLOT_BYTES, SLOTS_AT + i * SLOT_BYTES)) for i in range(2)]
    whole = [slot for slot in slots if slot is not None]
    if not whole:
        raise ControlError(f"{path}: corrupt, both slots")
    return max(whole, key=lambda content: content.generation)


def read(path: Path) -> tuple[Content, list[Heartbeat]]:
    """What the file says, and where the ranks are.

    Raises:
        ControlError: it cannot be trusted.
    """
    with _opened(path) as file:
        return _content(file, path), _heartbeats(file)


def _heartbeats(file: int) -> list[Heartbeat]:
    data = os.pread(file, CELLS * CELL_BYTES, CELLS_AT)
    found = []
    for at in range(0, len(data) - CELL_BYTES + 1, CELL_BYTES):
        cell = data[at : at + CELL.size]
        if any(cell) and CRC.unpack_from(data, at + CELL.size)[0] == zlib.crc32(cell):
            found.append(Heartbeat(*CELL.unpack(cell)))
    newest = max((beat.ns for beat in found), default=0)
    return [beat for beat in found if newest - beat.ns <= GONE * 1e9]


def _publish(path: Path, make: Callable[[Content, list[Heartbeat]], Command]) -> Command:
    """Add the command that ``make`` makes of what is there, with no other writer in between."""
    with _opened(path, os.O_RDWR) as file:
        end = time.monotonic() + WAIT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back when the file is closed
                break
            except OSError:
                if time.monotonic() > end:
                    raise ControlError(f"{path}: locked by another process for {WAIT:.0f} s") from None
                time.sleep(0.01)
        content = _content(file, path)
        command = make(content, _heartbeats(file))
        later = Content(content.generation + 1, content.about, (*content.commands, command))
        os.pwrite(file, _pack(later), SLOTS_AT + later.generation % 2 * SLOT_BYTES)
        return command


def _next_seq(content: Content) -> int:
    return max((command.seq for command in content.commands), default=0) + 1


class Inbox:
    """One feature's commands in one rank; ``next_at`` is all that a step looks at."""

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
        """The commands that hold from ``step`` or before, in order, each once."""
        with self._lock:
            due = [command for command in self._pending if command.at <= step]
            self._done.update(command.seq for command in due)
            self._pending = self._pending[len(due) :]
            self.next_at = self._pending[0].at if self._pending else NEVER
            return due


class Control:
    """One rank's end: reads commands, says where the rank is, tells the others when its breaker trips.

    Never raises into the engine: ``problem`` holds what is wrong, "" while all is well, and each new problem is
    logged once.
    """

    def __init__(self, path: Path, rank: int, *, thread: bool = True) -> None:
        self.path = path
        self.rank = rank
        self.step = 0  # written by the step path
        self.problem = ""
        self.problems = 0
        self._inboxes: dict[str, Inbox] = {}
        self._trips: list[tuple[str, str]] = []  # (feature, reason), to be published
        self._content: Content | None = None
        self._seen: Heartbeat | None = None
        self._rate = 0.0
        self._stop = threading.Event()
        self._wake = threading.Event()
        if thread:
            threading.Thread(target=self._run, name="mla-patch-control", daemon=True).start()

    def inbox(self, feature: str) -> Inbox:
        inbox = self._inboxes.setdefault(feature, Inbox())
        self._deliver()
        return inbox

    def trip(self, feature: str, reason: str) -> None:
        """Ask for the other ranks to go back to the host too; returns at once."""
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
        """One look at the file."""
        try:
            with _opened(self.path, os.O_RDWR) as file:
                content = _content(file, self.path)
                if self._content and content.generation < self._content.generation:
                    raise ControlError(
                        f"{self.path}: generation {content.generation} after {self._content.generation}: replaced"
                    )
                self._beat(file)
            if self._content is None or content.generation > self._content.generation:
                self._content = content
                self._deliver()
            while self._trips:
                _publish(self.path, lambda content, beats: self._make_trip(content, beats, *self._trips[0]))
                self._trips.pop(0)
        except Exception as problem:
            self.problems += 1
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

    def _beat(self, file: int) -> None:
        now = Heartbeat(self.rank, self.step, time.time_ns())
        if self._seen and now.ns > self._seen.ns:
            self._rate = max(now.step - self._seen.step, 0) / (now.ns - self._seen.ns) * 1e9
        self._seen = now
        cell = CELL.pack(now.rank, now.step, now.ns)
        os.pwrite(file, cell + CRC.pack(zlib.crc32(cell)), CELLS_AT + self.rank % CELLS * CELL_BYTES)

    def _make_trip(self, content: Content, beats: list[Heartbeat], feature: str, reason: str) -> Command:
        at = _later(beats, self._rate, self.step)
        return Command(feature, "trip", at, _next_seq(content), None, reason[:500], f"rank {self.rank}")


def _later(beats: list[Heartbeat], rate: float, step: int = 0) -> int:
    """A step that no rank has reached, and that leaves each of them time to read of it."""
    return max([step, *(beat.step for beat in beats)]) + max(MARGIN, math.ceil(rate * LEAD))


class Controller:
    """A person's end, one at a time: ``with Controller(path) as control: control.send("decode", "arm", "host")``.

    Raises:
        ControlError: the file cannot be trusted, or another controller is at work.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1

    def __enter__(self) -> Controller:
        read(self.path)
        lock = self.path.with_name(self.path.name + ".lock")
        try:
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as problem:
            raise ControlError(f"{lock}: {problem.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._lock, 200, 0).decode(errors="replace").strip()
            self.__exit__()
            raise ControlError(f"{self.path}: another controller is at work ({holder or 'unknown'})") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)  # and the lock with it
        self._lock = -1

    def send(self, feature: str, kind: str, value: str | float | None = None, *, at: int | None = None) -> Command:
        """Write one command; what comes back says from which step it holds.

        Raises:
            ControlError: no such feature or arm, a step that a rank has reached, or the file cannot be trusted.
            ValueError: a kind or value that no command has.
        """
        rate = 0.0 if at is not None else self._measure()

        def make(content: Content, beats: list[Heartbeat]) -> Command:
            arms = content.about.get("features", {}).get(feature)
            if arms is None:
                known = ", ".join(content.about.get("features", {})) or "none"
                raise ControlError(f"{feature!r} is not under test here; under test: {known}")
            if kind == "arm" and value not in arms:
                raise ControlError(f"{value!r} is not an arm of {feature}; expected one of {', '.join(arms)}")
            reached = max((beat.step for beat in beats), default=-NEVER)
            if at is not None and at <= reached:
                raise ControlError(f"at={at}: a rank is at step {reached} already")
            step = _later(beats, rate) if at is None else at
            return Command(feature, kind, step, _next_seq(content), value, "", f"process {os.getpid()}")

        return _publish(self.path, make)

    def _measure(self) -> float:
        """Steps per second of the fastest rank, over a quarter of a second."""
        before = {beat.rank: beat for beat in read(self.path)[1]}
        time.sleep(0.25)
        rates = [
            (beat.step - before[beat.rank].step) / (beat.ns - before[beat.rank].ns) * 1e9
            for beat in read(self.path)[1]
            if beat.rank in before and beat.ns > before[beat.rank].ns
        ]
        return max(rates, default=0.0)
