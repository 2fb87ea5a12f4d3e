"""The control file: commands to a running engine, safe against torn writes and against other users.

    offset  content
    0       magic, version
    64      128 cells of 32 bytes, one per rank: rank, step, time, sequence number of the newest command read, CRC
    8192    slot 0: generation, length, CRC, JSON
    24576   slot 1: the same

The two slots are written alternately, and the whole slot with the higher generation is valid. A torn write damages only
the slot that was not valid before. The cells say how far each rank is, so that a writer can name a later step.

The file is read, never mapped: truncating a mapped file kills its readers with SIGBUS. It is opened anew for each read.
So a reader notices when the file has been removed, replaced or given to another owner, and on a network file system it
sees what other nodes have written.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mla_patch import files

MAGIC, VERSION = b"MLAPCTRL", 2
HEADER = struct.Struct("<8sI")
CELL, CELLS_AT, CELLS, CELL_BYTES = struct.Struct("<IQQQ"), 64, 128, 32
SLOT, SLOTS_AT, SLOT_BYTES = struct.Struct("<QI"), 8192, 16384
CRC = struct.Struct("<I")
SIZE = SLOTS_AT + 2 * SLOT_BYTES
NEVER = 1 << 62  # a step that no engine reaches
GONE = 10.0  # seconds by which a rank's heartbeat may be older than the newest one; then the rank is not waited for
WAIT = 2.0  # seconds that a writer waits for another writer
KINDS = {
    "start": "run the schedule as configured, beginning with its warmup",
    "ratio": "run the schedule with this ratio",
    "arm": "run this arm, without comparing",
    "stop": "run the engine's own kernel",
    "trip": "written by a breaker: run the engine's own kernel for the rest of the process's life",
}


class ControlError(Exception):
    """The file cannot be used. The text says why."""


@dataclass(frozen=True)
class Command:
    """What all ranks do with a feature from step ``at`` on."""

    feature: str
    kind: str
    at: int
    seq: int  # counts the commands of a file
    value: str | float | None = None  # the arm's name, or the ratio
    reason: str = ""
    by: str = ""  # which process or rank wrote it

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
    """The content of a slot."""

    generation: int
    about: dict[str, Any]  # the run, its features and their arms; the engine writes it once
    commands: tuple[Command, ...]


@dataclass(frozen=True)
class Heartbeat:
    """How far a rank is."""

    rank: int
    step: int
    ns: int  # when it said so, nanoseconds since 1970
    seen: int = 0  # the ``seq`` of the newest command that the rank has read and will obey


def create(path: Path, about: dict[str, Any]) -> None:
    """Create the file with its full content in one step. If several ranks try, the first one succeeds.

    Raises:
        OSError: the directory cannot be written, or somebody else owns it or may write to it.
        ControlError: ``about`` does not fit.
    """
    blank = bytearray(SIZE)
    HEADER.pack_into(blank, 0, MAGIC, VERSION)
    slot = _pack(Content(1, about, ()))
    blank[SLOTS_AT + SLOT_BYTES : SLOTS_AT + SLOT_BYTES + len(slot)] = slot  # generation 1 lies in slot 1
    files.create(path, bytes(blank))


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of the file, once owner, mode, size and version have been checked.

    Raises:
        ControlError: the file cannot be opened, or a check has failed.
    """
    try:
        file = files.open_plain(path, flags)
    except files.Refused as problem:
        raise ControlError(str(problem)) from None
    except OSError as problem:
        raise ControlError(f"{path}: {problem.strerror}") from None
    try:
        found = os.fstat(file)
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
    """The bytes of a slot. If there is no room, the oldest commands are dropped, those of breakers last."""
    commands = list(content.commands)
    while True:
        text = {"about": content.about, "commands": [asdict(command) for command in commands]}
        data = json.dumps(text, allow_nan=False).encode()
        head = SLOT.pack(content.generation, len(data))
        if SLOT.size + CRC.size + len(data) <= SLOT_BYTES:
            return head + CRC.pack(zlib.crc32(head + data)) + data
        if not commands:
            raise ControlError(f"{len(data)} bytes of content, expected at most {SLOT_BYTES}")
        commands.remove(next((c for c in commands if c.kind != "trip"), commands[0]))


def _unpack(slot: bytes) -> Content | None:
    """The content of a slot, or None if it is torn or empty, or if mla-patch has not written it."""
    if len(slot) < SLOT.size + CRC.size:
        return None
    generation, length = SLOT.unpack_from(slot)
    data = slot[SLOT.size + CRC.size :][:length]
    (crc,) = CRC.unpack_from(slot, SLOT.size)
    if len(data) != length or zlib.crc32(slot[: SLOT.size] + data) != crc:
        return None
    try:
        value = files.parse(data)
        return Content(generation, dict(value["about"]), tuple(Command(**row) for row in value["commands"]))
    except (ValueError, TypeError, KeyError):
        return None


def content_of(file: int, path: Path) -> Content:
    """The content of the valid slot.

    Raises:
        ControlError: both slots are damaged.
    """
    slots = [_unpack(os.pread(file, SLOT_BYTES, SLOTS_AT + i * SLOT_BYTES)) for i in range(2)]
    whole = [slot for slot in slots if slot is not None]
    if not whole:
        raise ControlError(f"{path}: corrupt, both slots")
    return max(whole, key=lambda content: content.generation)


def read(path: Path) -> tuple[Content, list[Heartbeat]]:
    """The content of the file, and the heartbeats of the ranks.

    Raises:
        ControlError: the file cannot be trusted.
    """
    with opened(path) as file:
        return content_of(file, path), heartbeats_of(file)


def heartbeats_of(file: int) -> list[Heartbeat]:
    """The heartbeats of all ranks that are not `GONE`."""
    data = os.pread(file, CELLS * CELL_BYTES, CELLS_AT)
    found = []
    for at in range(0, len(data) - CELL_BYTES + 1, CELL_BYTES):
        cell = data[at : at + CELL.size]
        if any(cell) and CRC.unpack_from(data, at + CELL.size)[0] == zlib.crc32(cell):
            found.append(Heartbeat(*CELL.unpack(cell)))
    newest = max((beat.ns for beat in found), default=0)
    return [beat for beat in found if newest - beat.ns <= GONE * 1e9]


def beat(file: int, mine: Heartbeat) -> None:
    """Write this rank's heartbeat into its cell."""
    cell = CELL.pack(mine.rank, mine.step, mine.ns, mine.seen)
    os.pwrite(file, cell + CRC.pack(zlib.crc32(cell)), CELLS_AT + mine.rank % CELLS * CELL_BYTES)


def publish(path: Path, make: Callable[[Content, list[Heartbeat]], Command]) -> Command:
    """Add the command that ``make`` derives from the current content, while a lock keeps other writers out.

    Raises:
        ControlError: the file cannot be trusted, another process holds the lock, or ``make`` raises it.
    """
    with opened(path, os.O_RDWR) as file:
        end = time.monotonic() + WAIT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back when the file is closed
                break
            except OSError:
                if time.monotonic() > end:
                    raise ControlError(f"{path}: locked by another process for {WAIT:.0f} s") from None
                time.sleep(0.01)
        content = content_of(file, path)
        command = make(content, heartbeats_of(file))
        later = Content(content.generation + 1, content.about, (*content.commands, command))
        os.pwrite(file, _pack(later), SLOTS_AT + later.generation % 2 * SLOT_BYTES)
        return command


def next_seq(content: Content) -> int:
    return max((command.seq for command in content.commands), default=0) + 1
