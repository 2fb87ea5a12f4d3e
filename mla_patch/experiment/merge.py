"""Reads the records of all ranks and merges them into one run.

Damaged lines are dropped and counted. Steps on which the ranks ran different arms are left out and counted.
"""

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
    """The records of one process, as far as they can be read."""

    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    damaged: int = 0  # lines that are not valid rows
    lost: int = 0  # rows that the process could not write, by its own count


@dataclass
class Merged:
    """The records of all ranks of one run."""

    run: str
    timings: list[Timing] = field(default_factory=list)  # of the lowest rank: collectives make the ranks keep pace
    errors: list[Error] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    differed: int = 0  # steps that were left out because the ranks ran different arms
    damaged: int = 0
    lost: int = 0
    header: dict[str, Any] = field(default_factory=dict)  # of the lowest rank
    last: dict[int, int] = field(default_factory=dict)  # rank -> the last step for which it has a time


def read_log(path: Path) -> Log:
    """Read the records of one process: the older file, if there is one, then the newer.

    Raises:
        OSError: one of them is not a plain file, or cannot be read.
        ValueError: there is no header in a format that this version reads.
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
    """Add one line to ``log``. The first header creates the log; lines before it are dropped."""
    text = line.strip("\n")
    if not text:
        return log
    try:
        value = files.parse(text, finite=False) if line.endswith("\n") else None  # else the last line, torn
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
    """Whether ``value`` is a header in which every key that we read later is absent or has the right type."""
    types: dict[str, Any] = {"run": str, "started": (int, float), "tolerance": dict}
    fits = all(isinstance(value[name], kind) for name, kind in types.items() if name in value)
    numbers = [value.get("started", 1), *value.get("tolerance", {}).values()] if fits else []
    fits = fits and all(isinstance(one, (int, float)) and 0 < one < math.inf for one in numbers)
    return value.get("format") == FORMAT and isinstance(value.get("rank"), int) and fits


def _fits(value: list[Any]) -> bool:
    types = TYPES.get(value[0])
    return types is not None and len(types) == len(value) - 1 and all(map(isinstance, value[1:], types))


def read_runs(directory: Path) -> tuple[list[Merged], list[str]]:
    """Every run that has records in ``directory``, and a line about each file that could not be read."""
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
    """Merge the records of one run's ranks."""
    logs = sorted(logs, key=lambda log: log.header["rank"])
    merged = Merged(run, ranks=[log.header["rank"] for log in logs])
    merged.header = logs[0].header if logs else {}
    arms: dict[tuple[int, str, bool], str] = {}  # (step, feature, whether a draft model ran it) -> arm
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
                differed.add(row.step)  # for all features: the step's time is not of one arm
    lowest = logs[0].rows if logs else []
    merged.timings = [row for row in lowest if isinstance(row, Timing) and row.step not in differed]
    merged.differed = len(differed)
    merged.errors.sort(key=lambda row: row.step)
    merged.notes.sort(key=lambda row: row.step)
    return merged
