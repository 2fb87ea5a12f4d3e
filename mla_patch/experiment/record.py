"""What each process keeps of an experiment: rows of JSON, appended by a thread, bounded in size.

    <process>.steps.jsonl       {"format": 1, "run": ..., "rank": ...}     a header, then one row a line:
                                ["t", step, feature, arm, block, group, bucket, us]
                                ["e", step, feature, tag, max_abs, relative, nan]
                                ["n", step, feature, what, text]
                                ["lost", rows]
    <process>.steps.old.jsonl   the half before it; in both, about 350000 steps

The step path appends to a bounded deque and nothing else. What cannot be written is counted, never raised:
a full disk, a removed directory or a broken file costs rows, and the next write starts on a line of its own.
What has been added by a normal exit is written then. `merge` reads them.
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
DRAFT = "draft"  # how the buckets of draft models' decodes begin
INTERVAL = 0.25  # seconds between two writes
EXIT_WAIT = 1.0  # seconds that a normal exit waits for the last write


class Timing(NamedTuple):
    """What one step cost."""

    step: int
    feature: str
    arm: str
    block: int
    group: int
    bucket: str
    us: float


class Error(NamedTuple):
    """How far the arms were apart on one shadow step, in one layer."""

    step: int
    feature: str
    tag: int  # the layer
    max_abs: float
    relative: float  # Frobenius norm of the difference over the host's
    nan: int  # elements that are NaN or infinite in our result alone


class Note(NamedTuple):
    """Something that happened: the breaker, a command."""

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
    """The class of steps that a step is compared within: ``graph/16/8192``.

    ``mode`` is ``graph``, ``eager`` or ``prefill``, for a draft model's decode ``draft`` (all its steps in one graph)
    or ``draft-eager`` (one step); they are never mixed. ``batch`` and ``context`` (the mean of the requests') go up to
    the next power of two, as graphs' batch sizes mostly do by themselves.
    """
    return f"{mode}/{1 << max(batch - 1, 0).bit_length()}/{1 << max(context - 1, 0).bit_length()}"


class Recorder:
    """Keeps one process's rows. ``add`` is for the step path; everything else happens in a thread."""

    def __init__(self, path: Path, header: dict[str, Any], *, limit: int = 32 << 20, capacity: int = 65536) -> None:
        """``path`` without suffix; ``limit`` in bytes for both halves, ``capacity`` in rows not yet written."""
        self.path = path.with_name(path.name + SUFFIX)
        self.header = {"format": FORMAT, **header}
        self.limit = limit
        self.capacity = capacity
        self._refused = 0  # rows for which the queue had no room: counted on the step path
        self._gone = 0  # rows that could not be written, or were and are gone: counted by the writer
        self._told = 0  # what the file says of both
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
        """Rows that no file will have."""
        return self._refused + self._gone

    def add(self, row: Row) -> None:
        if len(self._queue) >= self.capacity:
            self._refused += 1
        else:
            self._queue.append(row)

    def flush(self) -> None:
        """Write what there is; never raises."""
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
        """At a normal exit: the thread writes the rest, and may hang in a dead file system."""
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
            new = files.create(self.path, header)  # whoever reads it finds a header, however early
        except OSError:  # a file system without links, or what the next line says better
            new = False
        self._file = files.open_ours(self.path, os.O_WRONLY | os.O_APPEND)
        self._size = os.fstat(self._file).st_size
        self._rows = self._told = 0
        if not new:
            # what a failed write has left stays on a line of its own
            self._put(b"\n" * (self._size > 0) + header)

    def _put(self, data: bytes) -> None:
        while data:  # a disk that fills up takes a part, then raises
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
