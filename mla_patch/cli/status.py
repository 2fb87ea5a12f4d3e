"""``mla-patch status``: what the processes of an engine report, and what of it a person must know.

A *finding* says that something is not as it was asked for, or that nothing is active. A *note* says what is known
and may be as it should be, such as a default feature that no call has reached: which calls come depends on the model
and on the backend, and a report tells neither. Both are of processes that run, or of all where none does.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mla_patch
from mla_patch import survey
from mla_patch.cli import show
from mla_patch.cli.exits import FINDING, OK, Misuse
from mla_patch.cli.show import Line, Table
from mla_patch.features import SATISFIED, State
from mla_patch.reports import INTERVAL, traced_text

Row = Mapping[str, Any]
ACTIVE = frozenset({State.APPLIED, State.ARMED})
ALWAYS_TOLD = frozenset({State.DISPLACED, State.FAILED})  # also of a feature that nobody asked for
_SHOWN = 8  # names of files in one line


def status(args: argparse.Namespace) -> int:
    """What every process of an engine reports, and which processes do not."""
    try:
        pruned = prune(args.directory) if args.prune else {}
        told = look(args.directory) | pruned
    except (OSError, ValueError) as problem:
        raise Misuse(f"{args.directory}: {getattr(problem, 'strerror', None) or problem}") from None
    if args.json:
        show.as_json(told)
    else:
        show.show(*blocks(args.directory, told, args.all))
    return FINDING if told["findings"] or told["missing"] else OK


def look(directory: Path) -> dict[str, Any]:
    """Everything that ``mla-patch status --json`` prints.

    Raises:
        OSError: the directory cannot be read.
    """
    processes, missing = survey.survey(directory)
    current = survey.current(processes)
    findings = list(dict.fromkeys(problem for report in current for problem in report.get("problems") or []))
    notes: list[str] = []
    if not processes:
        findings.append(f"no process reports in {directory}: {_contents(directory)}")
    for report in current:
        told = [*unsatisfied(report["features"]), *_traced(report["features"]), *_odd(report)]
        findings += [f"pid {report['pid']}: {text}" for text in told]
    findings += parted(current)
    for engine, run in by_engine(current).items():
        inactive, wanted = _inactive(engine, run)
        (notes if wanted else findings).extend(inactive)
        for label, asked in uncalled(run):
            text = f"{label} is applied, but nothing has called it yet"
            if asked:
                findings.append(text)
            else:
                notes.append(f"{text}: the model or the backend may not need it")
        for report in idle(run):
            report["idle"] = True
    return {"processes": processes, "missing": missing, "findings": findings, "notes": notes}


def prune(directory: Path) -> dict[str, Any]:
    """Remove the reports of processes that have ended; what ``--json`` has of it.

    Raises:
        OSError: the directory cannot be read.
    """
    removed, left = survey.prune(directory)
    return {"pruned": removed, "not_pruned": left}


def by_engine(processes: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The processes of each engine."""
    found: dict[str, list[dict[str, Any]]] = {}
    for report in processes:
        found.setdefault(report["engine"], []).append(report)
    return found


def unsatisfied(rows: Sequence[Row]) -> list[str]:
    """Features that were asked for and that no installed host gets, and those that an error of ours has stopped."""
    found = []
    for row in rows:
        asked = row["source"] != "default" and row["state"] not in (State.OFF, *SATISFIED)
        elsewhere = any(other["name"] == row["name"] and other["state"] in SATISFIED for other in rows)
        if row["state"] in ALWAYS_TOLD or (asked and not elsewhere):
            # a value that could not be taken is in the reason as it was written; nobody set the one held instead
            by = "" if row["reason"].startswith("MLA_PATCH") else f" ({row['flag']}={row['value']})"
            found.append(f"{_label(row)}{by}: {row['state']}, {row['reason']}")
    return found


def _traced(rows: Sequence[Row]) -> list[str]:
    """Features that torch.compile goes past."""
    return [f"{_label(row)}: {traced_text(row['traced'])}" for row in rows if row.get("traced")]


def parted(reports: list[dict[str, Any]]) -> list[str]:
    """Features that ranks of one engine have in different states.

    A process that has not imported the feature's module, as a detokenizer never does, is armed, and no rank of it.
    """
    found = []
    for group in survey.siblings(reports):
        for label in sorted({_label(row) for report in group for row in report["features"]}):
            pids: dict[str, list[str]] = {}
            for report in sorted(group, key=lambda report: int(report["pid"])):
                for row in report["features"]:
                    if _label(row) == label and row["state"] != State.ARMED:
                        pids.setdefault(row["state"], []).append(str(report["pid"]))
            if len(pids) > 1:
                told = "; ".join(f"{state} in pid {', '.join(some)}" for state, some in pids.items())
                found.append(f"{label} differs between processes of one engine: {told}")
    return found


def uncalled(run: Sequence[Row]) -> list[tuple[str, bool]]:
    """Features that are applied and that no process of the engine has called, each with whether it was asked for."""
    found = []
    for label in sorted({_label(row) for report in run for row in report["features"]}):
        rows = [row for report in run for row in report["features"] if _label(row) == label]
        # what only adds a choice is not called by those who choose something else
        choices = [row for row in rows if {target.get("kind") for target in row["targets"]} == {"edit"}]
        applied = [row for row in rows if row["state"] == State.APPLIED and row not in choices]
        if applied and not any(map(_called, applied)):
            found.append((label, any(row["source"] != "default" for row in applied)))
    return found


def idle(run: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Processes that only wait: launchers, detokenizers.

    They have called nothing and compiled nothing while another process of the engine has, and nothing is wrong in them.
    """

    def works(report: Row) -> bool:
        compiled = report.get("compiled") or {}
        return any(map(_called, report["features"])) or any(compiled.values())

    def well(report: Row) -> bool:
        fine = (*SATISFIED, State.OFF, State.ABSENT)
        return not unsatisfied(report["features"]) and all(row["state"] in fine for row in report["features"])

    if not any(map(works, run)):
        return []
    return [report for report in run if report["features"] and not works(report) and well(report)]


def _label(row: Row) -> str:
    return f"{row['name']}@{row['host']}"


def _called(row: Row) -> bool:
    return bool(row["served"] or row["declined"] or row["captured"] or row.get("replayed") or row.get("traced"))


def _odd(report: Row) -> list[str]:
    """States that this version does not know."""
    known = set(map(str, State))
    return [
        f"{_label(row)}: state {row['state']!r} is not known to mla-patch {mla_patch.__version__}, "
        "so another version wrote the report"
        for row in report["features"]
        if row["state"] not in known
    ]


def _inactive(engine: str, run: Sequence[Row]) -> tuple[list[str], bool]:
    """That nothing of ours is active in any process of an engine, and what is there instead.

    Also whether somebody wants it so: all is switched off, or the engine has all of it itself.
    """
    rows = [row for report in run for row in report["features"]]
    if any(row["state"] in ACTIVE for row in rows):
        return [], True
    where = f"{engine or 'an unnamed engine'} (pid {', '.join(str(report['pid']) for report in run)})"
    if not rows:
        return [
            f"nothing is active in {where}: its reports list no feature, because none exists for this engine"
        ], False
    states: dict[str, set[str]] = {}
    for row in rows:
        states.setdefault(row["state"], set()).add(row["name"])
    told = "; ".join(f"{state}: {', '.join(sorted(names))}" for state, names in sorted(states.items()))
    return [f"nothing is active in {where}: {told}"], all(row["state"] in (State.OFF, State.NATIVE) for row in rows)


def _contents(directory: Path) -> str:
    """What lies in a directory that holds no report."""
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        return "it is empty"
    runs = [name for name in names if name.endswith((".control", ".steps.jsonl"))]
    told = f"it holds {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if names[_SHOWN:] else ''}"
    return f"{told}; `mla-patch ab report` reads an experiment's records" if runs else told


def blocks(directory: Path, told: Mapping[str, Any], everything: bool = False) -> Iterable[Line | Table]:
    """What a person is shown; ``everything``: the idle processes and earlier ones, too."""
    if "pruned" in told:
        count, left = len(told["pruned"]), told["not_pruned"]
        others = f"; left: {left} that another user owns or that could not be removed" if left else ""
        yield Line(f"removed {count} report{'s' * (count != 1)} of processes that have ended{others}")
    current = survey.current(told["processes"])
    is_current = set(map(id, current))  # a directory may hold thousands of reports, and comparing them takes long
    earlier = [report for report in told["processes"] if id(report) not in is_current and not everything]
    left_out = [report for report in current if report.get("idle") and not everything]
    hidden = set(map(id, [*earlier, *left_out]))
    shown = [report for report in told["processes"] if id(report) not in hidden]
    rows = [_row(report, feature) for report in shown for feature in report["features"]]
    if rows:
        columns = ["engine", "pid", "process", "name", "state", "reason", "served", "declined", "graphs"]
        yield Table(str(directory), columns, rows)
    if left_out:
        pids = f"pid {', '.join(str(report['pid']) for report in left_out)}"
        what = "process that calls nothing is" if len(left_out) == 1 else "processes that call nothing are"
        yield Line(f"{len(left_out)} {what} left out ({pids}): --all shows them")
    if earlier:
        what = "process that has ended is" if len(earlier) == 1 else "processes that have ended are"
        yield Line(f"{len(earlier)} {what} left out: --all shows them, --prune removes their reports")
    for report in shown:
        if report["life"] == survey.GONE:
            yield Line(f"pid {report['pid']}: it did not exit normally, so its counts may lack the last {INTERVAL} s")
        compiled = report.get("compiled", {})
        if compiled is None:
            yield Line(f"pid {report['pid']}: this Triton does not let us count compilations")
        elif any(compiled.values()):
            text = f"pid {report['pid']}: {compiled['before']} of our kernels compiled before the first served call"
            yield Line(f"{text}, {compiled['serving']} later", "yellow" if compiled["serving"] else "")
    for one in told["missing"]:
        yield Line(f"missing: {', '.join(f'{key} {value}' for key, value in one.items())}", "yellow")
    yield from (Line(f"note: {text}") for text in told["notes"])
    yield from (Line(f"finding: {text}", "yellow") for text in told["findings"])


def _served(feature: Row) -> str:
    """How many calls ours served, and at which entry points where there are several."""
    by_entry = ", ".join(f"{count} {entry}" for entry, count in (feature.get("served_by") or {}).items())
    return f"{feature['served']} ({by_entry})" if by_entry else str(feature["served"])


def _row(report: Row, feature: Row) -> dict[str, Any]:
    replays, captured = feature.get("replayed"), feature["captured"]
    replayed = "replays not counted" if replays is None else f"{replays} replayed"
    return {
        **feature,
        "served": _served(feature),
        "pid": report["pid"],
        "engine": report["engine"],
        "process": survey.life_text(report),
        "declined": ", ".join(f"{count} × {reason}" for reason, count in feature["declined"].items()),
        "graphs": f"{captured} captured, {replayed}" if captured else "",
    }
