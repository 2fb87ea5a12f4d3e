"""The files of a run in the engine's MLA_PATCH_REPORT directory: commands are written, records and states are read.

``mla-patch ab`` uses it. It needs neither an engine nor torch.
"""

from __future__ import annotations

import os
import pwd
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from mla_patch import survey
from mla_patch.experiment import analysis, merge
from mla_patch.experiment.control import Controller
from mla_patch.experiment.control_file import Command, ControlError, read
from mla_patch.experiment.html import report_html
from mla_patch.experiment.merge import Merged
from mla_patch.experiment.schedule import NOT_COMPARED

# A process that is killed loses its last rows, and steps whose events it has not read: at most so many steps, or the
# steps of so many seconds.
PENDING_STEPS, PENDING_S = 64, 1.0
SILENT = 5.0  # seconds without a heartbeat after which a rank counts as gone; ranks send 20 a second, even when idle
IDLE = 1.0  # seconds without a step after which an engine counts as idle


class NotThere(Exception):
    """There is no such run, feature or file. The text says what there is."""


def command(
    directory: Path, run: str | None, kind: str, features: Sequence[str], value: Any = None, wait: float | None = None
) -> dict[str, Any]:
    """Send one command for each of ``features`` (none: every feature under test) and wait until all ranks have read it.

    ``wait``: also wait this many seconds until every rank has reached the step at which the command takes effect.
    ``findings`` in the result says which ranks have not.

    Raises:
        NotThere: there is no running experiment in ``directory``.
        ControlError: the control file cannot be trusted, or the command is refused.
        ValueError: no command has this value.
    """
    path = _control(directory, run)
    about = _all_ranks(path)
    sent: list[Command] = []
    with Controller(path) as control:
        for feature in features or about.get("features", {}):
            sent.append(control.send(feature, kind, value))
    ranks, findings = _follow(path, sent, int(about.get("ranks", 1)), wait)
    result = {"run": about.get("run", path.stem), "commands": [asdict(one) for one in sent]}
    return result | {"ranks": ranks, "findings": findings}


def _follow(
    path: Path, sent: Sequence[Command], ranks: int, wait: float | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Wait until the ranks have obeyed or the time is over. Returns the state of each rank, and what is missing."""
    newest, at = max((one.seq for one in sent), default=0), max((one.at for one in sent), default=0)
    start = time.monotonic()
    first: dict[int, int] = {}
    while True:
        beats = read(path)[1]
        now = time.time_ns()
        rows = []
        for beat in sorted(beats, key=lambda one: one.rank):
            idle = first.setdefault(beat.rank, beat.step) == beat.step
            row = {"rank": beat.rank, "step": beat.step, "heard_s": round((now - beat.ns) / 1e9, 1)}
            rows.append(row | {"read": beat.seen >= newest, "reached": beat.step >= at, "idle": idle})
        taken = time.monotonic() - start
        have_read = len(rows) >= ranks and all(row["read"] for row in rows)
        # an idle engine runs no steps, and its next step obeys the command
        held = all(row["reached"] for row in rows) or (taken > IDLE and all(row["idle"] for row in rows))
        if have_read and (wait is None or held):
            return rows, []
        if taken > (SILENT if wait is None or not have_read else wait):
            break
        time.sleep(0.02)
    return rows, [text for row in rows for text in [_behind(row, at)] if text]


def _behind(row: dict[str, Any], at: int) -> str:
    if not row["read"]:
        heard = f"heard {row['heard_s']} s ago" + ("; has the engine ended?" if row["heard_s"] > 1 else "")
        return f"rank {row['rank']} has not read the command: {heard}"
    return (
        "" if row["reached"] else f"rank {row['rank']} has read the command and is at step {row['step']}, before {at}"
    )


def _control(directory: Path, run: str | None) -> Path:
    """The control file of ``run``, or of the newest run."""
    if not os.path.isdir(directory):
        raise NotThere(f"{directory}: not a directory")
    found = sorted(directory.glob("*.control"), key=_changed)
    if run is not None:
        found = [path for path in found if path.stem == run]
    if found:
        _need_owner(found[-1])
    if not found:
        which = f"no run {run}" if run else "no experiment"
        raise NotThere(
            f"{directory}: {which} has a control file here; is MLA_PATCH_<FEATURE>=ab set, and has it stepped?"
        )
    return found[-1]


def _need_owner(path: Path) -> None:
    """Raise unless this process runs as the engine's user. The engine obeys no other user, not even root."""
    with suppress(OSError):
        owner, mine = path.lstat().st_uid, os.geteuid()
        if owner != mine:
            name = _user(owner)
            raise NotThere(
                f"{path}: the engine runs as user {name}, this is user {_user(mine)}: run it as that user, as in "
                f"`sudo -u {name.partition(' ')[0]} mla-patch ab ...` or `docker exec --user {owner} ...`"
            )


def _user(number: int) -> str:
    """A user's name with its number; if there is no name, the number in the form that sudo accepts."""
    try:
        return f"{pwd.getpwuid(number).pw_name} ({number})"
    except KeyError:
        return f"#{number}"


def _changed(path: Path) -> float:
    """When the file was changed. A dangling link sorts first, so it is read (and refused) only if there is no file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _all_ranks(path: Path) -> dict[str, Any]:
    """The run that the file describes, once every rank can be heard: no command may reach only some of the ranks.

    Raises:
        ControlError: a rank cannot be heard, or the file cannot be trusted.
    """
    content, beats = read(path)
    ranks = int(content.about.get("ranks", 1))
    if len(beats) < ranks:
        raise ControlError(
            f"{path}: {len(beats)} of {ranks} ranks are heard here; ranks on several nodes need a shared directory"
        )
    newest = max((beat.ns for beat in beats), default=0)
    silence = (time.time_ns() - newest) / 1e9
    if silence > SILENT:
        raise ControlError(f"{path}: no rank has been heard for {survey.age(silence)}; has the engine ended?")
    return content.about


def runs(directory: Path, run: str | None = None) -> tuple[list[Merged], list[str]]:
    """The runs that have records in ``directory``, oldest first, and a line about each file that could not be read.

    Raises:
        NotThere: there is no run, or not the one that was asked for.
    """
    if not os.path.isdir(directory):
        raise NotThere(f"{directory}: not a directory")
    found, problems = merge.read_runs(directory)
    found.sort(key=lambda one: one.header.get("started", 0))
    names = [one.run for one in found]
    if run is not None:
        found = [one for one in found if one.run == run]
    if not found:
        known = f"; there are {', '.join(names)}" if names else ""
        raise NotThere(f"{directory}: no records of {f'run {run}' if run else 'an experiment'}{known}")
    return found, problems


def report(directory: Path, run: str | None = None) -> dict[str, Any]:
    """The verdicts of every run. ``findings`` lists what limits them, such as lost rows or a tripped breaker."""
    found, problems = runs(directory, run)
    rows = []
    findings = list(problems)
    for one in found:
        row = analysis.analyse(one)
        row["tolerance"] = min(one.header.get("tolerance", {}).values(), default=None)
        rows.append(row)
        findings += [f"{one.run}: {n.feature}: {n.text}" for n in one.notes if n.what == "breaker"]
        last = {n.text.partition(":")[0]: n.text for n in one.notes if n.what == "lost"}  # the last note of each rank
        findings += [f"{one.run}: {text}" for text in last.values()]
        lost = {"steps on which ranks differed": one.differed, "rows lost": one.lost, "damaged lines": one.damaged}
        findings += [f"{one.run}: {count} {what}" for what, count in lost.items() if count]
        row["missing_at_end"] = _missing_at_end(directory, one)
        findings += [
            f"{one.run}: rank {rank}: the last {steps} steps are not in its record, which ends at step "
            f"{one.last[rank]}: was the disk full?"
            for rank, steps in row["missing_at_end"].items()
        ]
    return {"runs": rows, "findings": findings}


def _missing_at_end(directory: Path, one: Merged) -> dict[int, int]:
    """Rank -> how many of its last steps are missing in its record, if more than a killed process loses.

    The control file says how far a rank came. A full disk cannot stop that, because the size of the file is fixed.
    """
    if not one.timings:
        return {}
    reached = {rank: max(one.last.values()) for rank in one.ranks}  # all ranks run the same steps
    with suppress(ControlError, OSError):
        for beat in read(directory / f"{one.run}.control")[1]:
            if beat.rank in reached:
                reached[beat.rank] = max(reached[beat.rank], beat.step)
    usual = PENDING_STEPS + PENDING_S * 1e6 / median(row.us for row in one.timings)
    return {rank: step - one.last[rank] for rank, step in reached.items() if step - one.last[rank] > usual}


def page(directory: Path, result: dict[str, Any]) -> str:
    """The HTML page of the newest run in ``result``, which is what `report` returned."""
    processes, _ = survey.read_directory(directory)
    return report_html(result["runs"][-1], processes)


def snapshot(directory: Path, run: str | None = None) -> dict[str, Any]:
    """The state of a running experiment. Without a verdict: looking repeatedly until one appears finds false ones."""
    path = _control(directory, run)
    content, beats = read(path)
    now = time.time_ns()
    result: dict[str, Any] = {
        "run": content.about.get("run", path.stem),
        "ranks": [{"rank": b.rank, "step": b.step, "heard_s": round((now - b.ns) / 1e9, 1)} for b in beats],
        "features": content.about.get("features", {}),
        "commands": [asdict(one) for one in content.commands],
        "buckets": [],
        "shadow": [],
        "notes": [],
    }
    try:
        ((one,), _) = runs(directory, result["run"])
    except NotThere:  # nothing is written yet
        return result
    times: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in one.timings:
        if row.block != NOT_COMPARED:
            times[row.feature, row.bucket][row.arm].append(row.us)
    for (feature, bucket), arms in sorted(times.items(), key=lambda item: analysis.by_size(*item[0])):
        for arm, values in sorted(arms.items()):
            row_ = {"feature": feature, "bucket": bucket, "arm": arm, "steps": len(values)}
            result["buckets"].append(row_ | {"median_us": median(values)})
    result["shadow"] = [
        {key: row[key] for key in ("feature", "comparisons", "relative", "nan")} for row in analysis.shadow(one.errors)
    ]
    result["notes"] = [row._asdict() for row in one.notes[-5:]]
    return result
