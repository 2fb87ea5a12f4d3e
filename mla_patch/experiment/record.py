"""What each process keeps of an experiment: rows of JSON, appended by a thread, bounded in size; and their reader.

    <process>.steps.jsonl       {"format": 1, "run": ..., "rank": ...}     a header, then one row a line:
                                ["t", step, feature, arm, block, group, bucket, us]
                                ["e", step, feature, tag, max_abs, relative, nan]
                                ["n", step, feature, what, text]
                                ["lost", rows]
    <process>.steps.old.jsonl   the half before it; in both, about 350000 steps

The step path appends to a bounded deque and nothing else. What cannot be written is counted, never raised:
a full disk, a removed directory or a broken file costs rows, and the next write starts on a line of its own.
A reader drops the lines that are torn and says how many.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

log = logging.getLogger("mla_patch")
FORMAT = 1
SUFFIX, OLD = ".steps.jsonl", ".steps.old.jsonl"
INTERVAL = 0.25  # seconds between two writes


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
_KINDS: dict[str, type] = {"t": Timing, "e": Error, "n": Note}
_TYPES = {
    letter: [(int, float) if hint is float else (hint,) for hint in get_type_hints(kind).values()]
    for letter, kind in _KINDS.items()
}
_LETTERS = {kind: letter for letter, kind in _KINDS.items()}


def bucket(mode: str, batch: int, context: int) -> str:
    """The class of steps that a step is compared within: ``graph/16/8192``.

    ``mode`` is ``graph``, ``eager`` or ``prefill``, which are never mixed. ``batch`` and ``context`` (the longest
    or the mean, always the same one) go up to the next power of two, as graphs' batch sizes mostly do by themselves.
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
        self.lost = 0  # rows that no file will have
        self._told = 0  # what the file says of it
        self._queue: deque[Row] = deque()
        self._file = -1
        self._size = self._rows = 0
        self._complained = False
        self._lock = threading.Lock()
        self._start()

    def add(self, row: Row) -> None:
        if len(self._queue) >= self.capacity:
            self.lost += 1
        else:
            self._queue.append(row)

    def flush(self) -> None:
        """Write what there is; never raises."""
        with self._lock:
            rows = [self._queue.popleft() for _ in range(len(self._queue))]
            try:
                self._write(rows)
            except Exception as problem:
                self.lost += len(rows)
                self._close()
                if not self._complained:
                    self._complained = True
                    log.warning("mla-patch: experiment rows are lost, %s: %s", self.path, problem)

    def restart(self) -> None:
        """In a forked child: another process, another file, and no thread yet."""
        self._queue.clear()
        self._lock = threading.Lock()
        self._close()
        self.lost = self._told = 0
        self.header["pid"] = os.getpid()
        self.path = self.path.with_name(f"{self.path.name.removesuffix(SUFFIX)}-{os.getpid()}{SUFFIX}")
        self._start()

    def _start(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._stop,), name="mla-patch-steps", daemon=True)
        self._thread.start()

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(INTERVAL):
            self.flush()

    def close(self) -> None:
        """Stop the thread and write the rest."""
        self._stop.set()
        self._thread.join()
        self.flush()
        with self._lock:
            self._close()

    def _write(self, rows: list[Row]) -> None:
        if self._file >= 0 and not self._still_there():
            self.lost += self._rows
            self._close()
        if not rows and self._told == self.lost:
            return
        if self._size >= self.limit // 2:
            self._close()
            os.replace(self.path, self.path.with_name(self.path.name.replace(SUFFIX, OLD)))
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
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(self.path, flags, 0o600)
        self._size = os.fstat(self._file).st_size
        self._rows = self._told = 0
        # what a failed write has left stays on a line of its own
        self._put(b"\n" * (self._size > 0) + json.dumps(self.header).encode() + b"\n")

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


# -- reading


@dataclass
class Log:
    """One process's rows, as far as they can be read."""

    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    damaged: int = 0  # lines that are no row
    lost: int = 0  # rows that the process says it could not write


@dataclass
class Merged:
    """All ranks of one run."""

    run: str
    timings: list[Timing] = field(default_factory=list)  # the lowest rank's: in a collective the others wait for it
    errors: list[Error] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    differed: int = 0  # steps on which the ranks' arms were not the same, left out
    damaged: int = 0
    lost: int = 0


def read_log(path: Path) -> Log:
    """One process: the older half, if there is one, then the newer.

    Raises:
        OSError: the newer half cannot be read.
        ValueError: it has no header of ours.
    """
    found: Log | None = None
    older = path.with_name(path.name.replace(SUFFIX, OLD))
    for half in (older, path) if older.exists() else (path,):
        if not stat.S_ISREG(half.stat().st_mode):
            raise ValueError(f"{half.name}: not a plain file")
        with open(half, encoding="utf-8", errors="replace") as file:
            for line in file:
                found = _take(found, line)
    if found is None:
        raise ValueError(f"{path.name}: no header of a format that this version reads ({FORMAT})")
    return found


def _take(log: Log | None, line: str) -> Log | None:
    """Add one line to ``log``, which the first header makes."""
    text = line.strip("\n")
    if not text:
        return log
    try:
        value = json.loads(text) if line.endswith("\n") else None  # the last one, torn
    except ValueError:
        value = None
    if isinstance(value, dict) and value.get("format") == FORMAT and isinstance(value.get("rank"), int):
        return log or Log(value)
    if log is None:
        return None
    if isinstance(value, list) and len(value) == 2 and value[0] == "lost" and isinstance(value[1], int):
        log.lost = max(log.lost, value[1])
    elif isinstance(value, list) and value and isinstance(value[0], str) and _fits(value):
        log.rows.append(_KINDS[value[0]](*value[1:]))
    else:
        log.damaged += 1
    return log


def _fits(value: list[Any]) -> bool:
    types = _TYPES.get(value[0])
    return types is not None and len(types) == len(value) - 1 and all(map(isinstance, value[1:], types))


def read_runs(directory: Path) -> tuple[list[Merged], list[str]]:
    """Every run whose records lie in ``directory``, and what could not be read, each with the reason."""
    runs: dict[str, list[Log]] = {}
    problems = []
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            log = read_log(path)
            runs.setdefault(str(log.header.get("run", "")), []).append(log)
        except (OSError, ValueError) as problem:
            problems.append(str(problem))
    return [merge(name, logs) for name, logs in sorted(runs.items())], problems


def merge(run: str, logs: Iterable[Log]) -> Merged:
    """One run's ranks as one."""
    logs = sorted(logs, key=lambda log: log.header["rank"])
    merged = Merged(run, ranks=[log.header["rank"] for log in logs])
    arms: dict[tuple[int, str], str] = {}
    differed: set[int] = set()
    for log in logs:
        merged.damaged += log.damaged
        merged.lost += log.lost
        for row in log.rows:
            if isinstance(row, Error):
                merged.errors.append(row)
            elif isinstance(row, Note):
                merged.notes.append(row)
            elif arms.setdefault((row.step, row.feature), row.arm) != row.arm:
                differed.add(row.step)  # of one feature: no comparison can use the step
    lowest = logs[0].rows if logs else []
    merged.timings = [row for row in lowest if isinstance(row, Timing) and row.step not in differed]
    merged.differed = len(differed)
    merged.errors.sort(key=lambda row: row.step)
    merged.notes.sort(key=lambda row: row.step)
    return merged
