"""``mla-patch ab``: control a running experiment, watch it, and read its verdict.

The files of a run are read and written by `mla_patch.experiment.files`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mla_patch import files
from mla_patch.cli import show
from mla_patch.cli.exits import FINDING, OK, Misuse
from mla_patch.cli.show import Line, Table


def send(args: argparse.Namespace) -> int:
    """Send a command; it holds from a step that no rank has reached."""
    from mla_patch.experiment import files as run_files
    from mla_patch.experiment.control_file import ControlError

    kind, value = args.setting if args.kind == "set" else (args.kind, None)
    features = [args.feature] if args.kind == "set" else args.features
    try:
        told = run_files.command(args.directory, args.run, kind, features, value, args.wait)
    except (run_files.NotThere, ControlError, ValueError, OSError) as problem:
        raise Misuse(f"ab {args.kind}: {problem}") from None
    if args.json:
        show.as_json(told)
        return FINDING if told["findings"] else OK
    for one in told["commands"]:
        what = f"{kind} {value}" if value is not None else kind
        show.lines([f"{one['feature']}: {what}, from step {one['at']} of run {told['run']} on"])
    if not told["findings"]:
        reached = all(row["reached"] for row in told["ranks"])
        show.lines([f"{len(told['ranks'])} rank(s) have {'reached that step' if reached else 'read the command'}"])
    show.lines([f"finding: {text}" for text in told["findings"]], "yellow")
    return FINDING if told["findings"] else OK


def watch(args: argparse.Namespace) -> int:
    """Look again and again, until interrupted."""
    from mla_patch.experiment import files as run_files
    from mla_patch.experiment.control_file import ControlError

    def look() -> dict[str, Any]:
        try:
            return run_files.snapshot(args.directory, args.run)
        except (run_files.NotThere, ControlError, OSError) as problem:
            raise Misuse(f"ab watch: {problem}") from None

    if args.json:
        show.as_json(look())
    elif args.once:
        show.show(*_watched(look()))
    else:
        with suppress(KeyboardInterrupt):
            show.keep_showing(lambda: _watched(look()), args.every)
    return OK


def _watched(told: Mapping[str, Any]) -> list[Line | Table]:
    under = "; ".join(f"{name}: {', '.join(arms)}" for name, arms in told["features"].items())
    last = told["commands"][-1] if told["commands"] else None
    says = [f"run {told['run']}, {under}", "no verdict while it runs: use `mla-patch ab report` once, at the end"]
    if last:
        says.append(f"last command: {last['feature']} {last['kind']} {last['value'] or ''} from step {last['at']}")
    says += [_note(note) for note in told["notes"]]
    parts: list[Line | Table] = [*map(Line, says), Table("ranks", ["rank", "step", "heard_s"], told["ranks"])]
    if told["buckets"]:
        rows = [row | {"median_us": f"{row['median_us']:.1f}"} for row in told["buckets"]]
        parts.append(Table("steps compared", ["feature", "bucket", "arm", "steps", "median_us"], rows))
    if told["shadow"]:
        rows = [_errors(row) for row in told["shadow"]]
        parts.append(Table("shadow checks", ["feature", "comparisons", "median", "worst", "nan"], rows))
    return parts


def _note(note: Mapping[str, Any]) -> str:
    return f"step {note['step']}: {note['feature']} {note['what']}: {note['text']}"


def _errors(row: Mapping[str, Any]) -> dict[str, Any]:
    told = {
        name: None if value is None else f"{value:.3g}"
        for name, value in (("median", row["relative"]["0.5"]), ("worst", row["relative"]["1.0"]))
    }
    return {**row, **told}


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def report(args: argparse.Namespace) -> int:
    from mla_patch.experiment import analysis
    from mla_patch.experiment import files as run_files

    try:
        told = run_files.report(args.directory, args.run)
        if args.html:
            files.export(args.html, run_files.page(args.directory, told))
    except (run_files.NotThere, OSError) as problem:
        raise Misuse(f"ab report: {problem}") from None
    if args.json:
        show.as_json(told)
        return FINDING if told["findings"] else OK
    for run in told["runs"]:
        differed = f", {run['differed']} on which ranks differed" if run["differed"] else ""
        show.show(Line(f" {run['steps']} steps, {len(run['ranks'])} rank(s){differed}", head=f"run {run['run']}"))
        enough, few = analysis.by_groups(run["comparisons"])
        rows = [{**one, "host": _us(one["host_us"]), "arm_us": _us(one["arm_us"])} for one in enough]
        if rows:
            show.table("verdicts", ["feature", "bucket", "arm", "host", "arm_us", "text"], rows)
        if few:
            show.lines([analysis.in_few_groups(few)])
        if run["shadow"]:
            columns = ["feature", "comparisons", "median", "worst", "nan"]
            show.table("shadow checks", columns, [_errors(row) for row in run["shadow"]])
        show.lines(map(_note, run["notes"]))
    show.lines([f"finding: {text}" for text in told["findings"]], "yellow")
    if args.html:
        show.lines([f"written: {args.html}"])
    return FINDING if told["findings"] else OK
