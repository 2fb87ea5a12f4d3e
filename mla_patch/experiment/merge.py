"""What the processes of a run have recorded, as one: torn lines dropped, steps on which ranks differed left out."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_patch import files
from mla_patch.experiment.record import DRAFT, FORMAT, KINDS, OLD, SUFFIX, TYPES, Error, Note, Row, Timing


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
    header: dict[str, Any] = field(default_factory=dict)  # the lowest rank's
    last: dict[int, int] = field(default_factory=dict)  # rank -> the last step of which it has a time


def read_log(path: Path) -> Log:
    """One process: the older half, if there is one, then the newer.

    Raises:
        OSError: a half is no plain file, or cannot be read.
        ValueError: it has no header of ours.
    """
    found: Log | None = None
    older = path.with_name(path.name.replace(SUFFIX, OLD))
    for half in (older, path) if os.path.lexists(older) else (path,):
        data = files.read(half, files.RECORD_BYTES)
        for line in io.StringIO(data.decode("utf-8", "replace"), newline="\n"):
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
        value = files.parse(text, finite=False) if line.endswith("\n") else None  # the last one, torn
    except ValueError:
        value = None
    if isinstance(value, dict) and _is_header(value):
        return log or Log(value)
    if log is None:
        return None
    if isinstance(value, list) and len(value) == 2 and value[0] == "lost" and isinstance(value[1], int):
        log.lost = max(log.lost, value[1])
    elif isinstance(value, list) and value and isinstance(value[0], str) and _fits(value):
        log.rows.append(KINDS[value[0]](*value[1:]))
    else:
        log.damaged += 1
    return log


def _is_header(value: dict[str, Any]) -> bool:
    """What is read of it later is there in its type, or not there."""
    types: dict[str, Any] = {"run": str, "started": (int, float), "tolerance": dict}
    fits = all(isinstance(value[name], kind) for name, kind in types.items() if name in value)
    numbers = [value.get("started", 1), *value.get("tolerance", {}).values()] if fits else []
    fits = fits and all(isinstance(one, (int, float)) and 0 < one < math.inf for one in numbers)
    return value.get("format") == FORMAT and isinstance(value.get("rank"), int) and fits


def _fits(value: list[Any]) -> bool:
    types = TYPES.get(value[0])
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
    merged.header = logs[0].header if logs else {}
    arms: dict[tuple[int, str, bool], str] = {}  # step, feature, whether of a draft model -> arm
    differed: set[int] = set()
    for log in logs:
        merged.last[log.header["rank"]] = max((row.step for row in log.rows if isinstance(row, Timing)), default=0)
        merged.damaged += log.damaged
        merged.lost += log.lost
        for row in log.rows:
            if isinstance(row, Error):
                merged.errors.append(row)
            elif isinstance(row, Note):
                merged.notes.append(row)
            elif arms.setdefault((row.step, row.feature, row.bucket.startswith(DRAFT)), row.arm) != row.arm:
                differed.add(row.step)  # of one feature: no comparison can use the step
    lowest = logs[0].rows if logs else []
    merged.timings = [row for row in lowest if isinstance(row, Timing) and row.step not in differed]
    merged.differed = len(differed)
    merged.errors.sort(key=lambda row: row.step)
    merged.notes.sort(key=lambda row: row.step)
    return merged
