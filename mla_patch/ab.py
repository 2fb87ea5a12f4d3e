"""``mla-patch ab``: steer a running experiment, watch it, and read its verdict.

What it reads and writes are the files in the engine's MLA_PATCH_REPORT; no engine and no torch is needed.
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

# what a process that is killed may not have written: its last rows, and steps whose events it has not read
PENDING_STEPS, PENDING_S = 64, 1.0
SILENT = 5.0  # seconds without a heartbeat, of which an engine gives 20 a second, idle or not
IDLE = 1.0  # seconds without a step


class NotThere(Exception):
    """There is no such run, feature or file; the text says what there is."""


def command(
    directory: Path, run: str | None, kind: str, features: Sequence[str], value: Any = None, wait: float | None = None
) -> dict[str, Any]:
    """Send one command for each feature, all that are under test if none is named, and see who has read it.

    ``wait``: seconds within which every rank is to have reached the step from which the command holds; None: it is
    enough that all have read it. ``findings`` of the answer says what did not happen.

    Raises:
        NotThere: no experiment lives here.
        ControlError: the control file cannot be trusted, or the command cannot be taken.
        ValueError: a value that no command has.
    """
    path = _control(directory, run)
    about = _all_ranks(path)
    sent: list[Command] = []
    with Controller(path) as control:
        for feature in features or about.get("features", {}):
            sent.append(control.send(feature, kind, value))
    ranks, findings = _follow(path, sent, int(about.get("ranks", 1)), wait)
    told = {"run": about.get("run", path.stem), "commands": [asdict(one) for one in sent]}
    return told | {"ranks": ranks, "findings": findings}


def _follow(
    path: Path, sent: Sequence[Command], ranks: int, wait: float | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Until the ranks have done what was asked, or the time is over: where each stands, and what is not so."""
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
        # nothing steps in an idle engine, and what steps next obeys
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
    """The engine takes commands of its own user alone, and root is another."""
    with suppress(OSError):
        owner, mine = path.lstat().st_uid, os.geteuid()
        if owner != mine:
            name = _user(owner)
            raise NotThere(
                f"{path}: the engine runs as user {name}, this is user {_user(mine)}: run it as that user, as in "
                f"`sudo -u {name.partition(' ')[0]} mla-patch ab ...` or `docker exec --user {owner} ...`"
            )


def _user(number: int) -> str:
    """A user's name with its number, or the number that sudo takes where there is no name."""
    try:
        return f"{pwd.getpwuid(number).pw_name} ({number})"
    except KeyError:
        return f"#{number}"


def _changed(path: Path) -> float:
    """When; a link to nothing changed long ago, and is refused for itself if it is the only one."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _all_ranks(path: Path) -> dict[str, Any]:
    """What the file is about. A command that reached some ranks alone would set them apart."""
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
    """The runs whose records lie here, oldest first, and what could not be read.

    Raises:
        NotThere: none, or not that one.
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
    """Every run's verdicts; with ``findings``, what a person must know beside them."""
    found, problems = runs(directory, run)
    rows = []
    findings = list(problems)
    for one in found:
        row = analysis.analyse(one)
        row["tolerance"] = min(one.header.get("tolerance", {}).values(), default=None)
        rows.append(row)
        findings += [f"{one.run}: {n.feature}: {n.text}" for n in one.notes if n.what == "breaker"]
        last = {n.text.partition(":")[0]: n.text for n in one.notes if n.what == "lost"}  # of each rank
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
    """Steps that a rank has reached and has no row of, by rank: more than a process loses that is killed.

    How far a rank came is in the control file, whose size never changes, so that a full disk does not stop it.
    """
    if not one.timings:
        return {}
    reached = {rank: max(one.last.values()) for rank in one.ranks}  # ranks step together
    with suppress(ControlError, OSError):
        for beat in read(directory / f"{one.run}.control")[1]:
            if beat.rank in reached:
                reached[beat.rank] = max(reached[beat.rank], beat.step)
    usual = PENDING_STEPS + PENDING_S * 1e6 / median(row.us for row in one.timings)
    return {rank: step - one.last[rank] for rank, step in reached.items() if step - one.last[rank] > usual}


def page(directory: Path, told: dict[str, Any]) -> str:
    """One run's report, the newest where there are several, as a page."""
    processes, _ = survey.read_directory(directory)
    return report_html(told["runs"][-1], processes)


def snapshot(directory: Path, run: str | None = None) -> dict[str, Any]:
    """Where a running experiment stands: no verdict, since looking until one comes finds false ones."""
    path = _control(directory, run)
    content, beats = read(path)
    now = time.time_ns()
    told: dict[str, Any] = {
        "run": content.about.get("run", path.stem),
        "ranks": [{"rank": b.rank, "step": b.step, "heard_s": round((now - b.ns) / 1e9, 1)} for b in beats],
        "features": content.about.get("features", {}),
        "commands": [asdict(one) for one in content.commands],
        "buckets": [],
        "shadow": [],
        "notes": [],
    }
    try:
        ((one,), _) = runs(directory, told["run"])
    except NotThere:  # nothing is written yet
        return told
    times: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in one.timings:
        if row.block != NOT_COMPARED:
            times[row.feature, row.bucket][row.arm].append(row.us)
    for (feature, bucket), arms in sorted(times.items(), key=lambda item: analysis.by_size(*item[0])):
        for arm, values in sorted(arms.items()):
            row_ = {"feature": feature, "bucket": bucket, "arm": arm, "steps": len(values)}
            told["buckets"].append(row_ | {"median_us": median(values)})
    told["shadow"] = [
        {key: row[key] for key in ("feature", "comparisons", "relative", "nan")} for row in analysis.shadow(one.errors)
    ]
    told["notes"] = [row._asdict() for row in one.notes[-5:]]
    return told
