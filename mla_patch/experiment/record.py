"""The records that each process writes during an experiment: lines of JSON, appended by a thread, bounded in size.

    <process>.steps.jsonl       a header, then one row per line:
                                {"format": 1, "run": ..., "rank": ...}
                                ["t", step, feature, arm, block, group, bucket, us]    `Timing`
                                ["e", step, feature, tag, max_abs, relative, nan]      `Error`
                                ["n", step, feature, what, text]                       `Note`
                                ["lost", rows]                                         rows lost so far
    <process>.steps.old.jsonl   the rows before those; both files together hold about 350000 steps

The engine's thread only appends to a bounded queue. Rows that cannot be written (a full disk, a removed directory, a
damaged file) are counted, no exception is raised, and the next write begins a new line. At a normal exit the remaining
rows are written. `merge` reads the files.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from mla_patch import files
from mla_patch.at_exit import AtExit

log = logging.getLogger("mla_patch")
FORMAT = 1
SUFFIX, OLD = ".steps.jsonl", ".steps.old.jsonl"
DRAFT = "draft"  # the buckets of draft models' decode steps begin with it
INTERVAL = 0.25  # seconds between two writes
EXIT_WAIT = 1.0  # seconds that a normal exit waits for the last write


class Timing(NamedTuple):
    """The device time of one step, and what it ran."""

    step: int
    feature: str
    arm: str
    block: int
    group: int
    bucket: str
    us: float


class Error(NamedTuple):
    """How far our result differed from the engine's in one layer of one shadow step."""

    step: int
    feature: str
    tag: int  # the layer
    max_abs: float
    relative: float  # Frobenius norm of the difference, divided by that of the engine's result
    nan: int  # elements that are NaN or infinite in our result and finite in the engine's


class Note(NamedTuple):
    """An event: a breaker tripped, a command was obeyed, rows were lost."""

    step: int
    feature: str
    what: str
    text: str


Row = Timing | Error | Note
KINDS: dict[str, type] = {"t": Timing, "e": Error, "n": Note}
TYPES = {
    letter: [(int, float) if hint is float else (hint,) for hint in get_type_hints(kind).values()]
    for letter, kind in KINDS.items()
}
_LETTERS = {kind: letter for letter, kind in KINDS.items()}


def bucket(mode: str, batch: int, context: int) -> str:
    """The name of the class of steps that a step is compared with, such as ``graph/16/8192``.

    ``mode`` is ``graph``, ``eager`` or ``prefill``; for a draft model's decode it is ``draft`` (all steps of a draft in
    one graph) or ``draft-eager`` (one step). ``batch`` (requests) and ``context`` (mean tokens per request) are rounded
    up to powers of two.
    """
    return f"{mode}/{1 << max(batch - 1, 0).bit_length()}/{1 << max(context - 1, 0).bit_length()}"


class Recorder:
    """Writes the rows of one process. ``add`` is for the engine's thread; everything else happens in our own thread."""

    def __init__(self, path: Path, header: dict[str, Any], *, limit: int = 32 << 20, capacity: int = 65536) -> None:
        """``path``: without suffix. ``limit``: bytes of both files. ``capacity``: rows that may wait to be written."""
        self.path = path.with_name(path.name + SUFFIX)
        self.header = {"format": FORMAT, **header}
        self.limit = limit
        self.capacity = capacity
        self._refused = 0  # rows for which the queue had no room; counted by the engine's thread
        self._gone = 0  # rows that could not be written, or whose file was removed; counted by our thread
        self._told = 0  # the number of lost rows that the file states
        self._queue: deque[Row] = deque()
        self._file = -1
        self._size = self._rows = 0
        self._complained = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._exit = AtExit(self._leave)
        self._thread = threading.Thread(target=self._run, name="mla-patch-steps", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Rows that no file has or will have."""
        return self._refused + self._gone

    def add(self, row: Row) -> None:
        """Queue a row; never waits."""
        if len(self._queue) >= self.capacity:
            self._refused += 1
        else:
            self._queue.append(row)

    def flush(self) -> None:
        """Write all queued rows. Never raises."""
        with self._lock:
            rows = [self._queue.popleft() for _ in range(len(self._queue))]
            try:
                self._write(rows)
            except Exception as problem:
                self._gone += len(rows)
                self._close()
                if not self._complained:
                    self._complained = True
                    log.warning("mla-patch: experiment rows are lost, %s: %s", self.path, problem)

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.flush()
        self.flush()

    def _leave(self) -> None:
        """At a normal exit: let the thread write the rest, but do not wait long, since its file system may hang."""
        self._stop.set()
        self._thread.join(EXIT_WAIT)

    def close(self) -> None:
        """Stop the thread and write the rest."""
        self._exit.cancel()
        self._stop.set()
        self._thread.join()
        self.flush()
        with self._lock:
            self._close()

    def _write(self, rows: list[Row]) -> None:
        if self._file >= 0 and not self._still_there():
            self._gone += self._rows
            self._close()
        if not rows and self._told == self.lost:
            return
        if self._size >= self.limit // 2:
            self._close()
            files.rename(self.path, self.path.name.replace(SUFFIX, OLD))
        if self._file < 0:
            self._open()
        lines = [[_LETTERS[type(row)], *row] for row in rows]
        lost = self.lost
        if lost != self._told:
            lines.append(["lost", lost])
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        self._put(text.encode())
        self._told, self._complained = lost, False
        self._rows += len(rows)

    def _open(self) -> None:
        header = json.dumps(self.header).encode() + b"\n"
        try:
            new = files.create(self.path, header)  # with its header, so that no reader finds the file without one
        except OSError:  # a file system without hard links, or a problem of which the next line raises a better error
            new = False
        self._file = files.open_ours(self.path, os.O_WRONLY | os.O_APPEND)
        self._size = os.fstat(self._file).st_size
        self._rows = self._told = 0
        if not new:
            # end the line that a failed write may have left incomplete
            self._put(b"\n" * (self._size > 0) + header)

    def _put(self, data: bytes) -> None:
        while data:  # a disk that fills up takes part of the data, then raises
            done = os.write(self._file, data)
            self._size += done
            data = data[done:]

    def _still_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except OSError:
            return False

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file, self._size, self._rows = -1, 0, 0
