"""``mla-patch doctor``: what each feature would do on this machine, and why."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import mla_patch
from mla_patch import files
from mla_patch import flags as flags_
from mla_patch.cli import here, show
from mla_patch.cli.exits import FINDING, OK
from mla_patch.cli.show import Line
from mla_patch.cli.status import unsatisfied
from mla_patch.compat import gpu, hosts
from mla_patch.compat.types import Host
from mla_patch.eligibility import nothing_active
from mla_patch.features import Feature, State
from mla_patch.session import find_host

ENTRY_POINT = "mla_patch"  # our name in the hosts' own plugin groups, and so in their filters


def doctor(args: argparse.Namespace) -> int:
    """Judge every feature from source, import no engine."""
    plugins, flags = here.read_flags(args.feature)
    found = [one for one in map(find_host, hosts.HOSTS) if one is not None]
    device, unknown = gpu.for_engines()  # before the features, which may depend on it
    rows = [here.would_be(feature, flags, plugins) for feature in plugins.features]
    report = {
        "version": mla_patch.__version__,
        "python": sys.version.split()[0],
        "torch": _version("torch"),
        "triton": _version("triton"),
        "gpu": None if device is None else asdict(device) | {"sm": device.sm},
        "gpu_unknown": unknown,
        "hosts": [{"name": h.host.name, "version": h.version, "reviewed": h.version in h.host.reviewed} for h in found],
        "findings": [*plugins.problems, *flags.problems, *_findings(found, flags, rows), *_unsatisfied(rows)],
        "notes": [note for one in found for note in _promised(one.host, plugins.features)],
        "features": rows,
    }
    if args.json:
        show.as_json(report)
    else:
        _show_doctor(report)
    return FINDING if report["findings"] else OK


def _promised(host: Host, features: Sequence[Feature]) -> list[str]:
    """What this environment makes the host promise about results, and who says what becomes of it."""
    names = [feature.name for feature in features if feature.host_name == host.name]
    asks = f"; `mla-patch explain` says what this means for {', '.join(names)}" if names else ""
    return [f"{host.name}, {text}{asks}" for text in hosts.promised(host)]


def _unsatisfied(rows: list[dict[str, Any]]) -> list[str]:
    """Features that were asked for and that no installed host gets. What has no host here at all is not missing."""
    return unsatisfied([row for row in rows if not _not_installed(row)])


def _not_installed(row: Mapping[str, Any]) -> bool:
    return row["state"] == State.ABSENT and find_host(row["host"]) is None


def _findings(found: Sequence[hosts.Installed], flags: flags_.Flags, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What about this interpreter and environment keeps the plugin out, or makes what it finds less sure."""
    findings = []
    active = flags.on("MLA_PATCH")
    if flags.on("MLA_PATCH_STRICT") and not active:
        findings.append("MLA_PATCH_STRICT is set but MLA_PATCH is not: nothing is active, so nothing is enforced")
    directory = flags.text("MLA_PATCH_REPORT")
    problem = files.directory_problem(directory) if directory else None
    if problem:
        findings.append(f"MLA_PATCH_REPORT={directory}: {problem}; no process would write a report")
    if sys.flags.no_site:
        findings.append("Python runs with -S and does not read the start-up file: use `mla-patch run`")
    elif active and not here.start_file():
        findings.append(
            "the start-up file mla_patch.pth is in no site directory: use `mla-patch run`, or install again"
        )
    for one in found:
        name = one.host.plugin_filter
        wanted = [part.strip() for part in os.environ.get(name, "").split(",") if part.strip()] if name else []
        if wanted and ENTRY_POINT not in wanted:
            findings.append(
                f"{name}={os.environ[name]} excludes {ENTRY_POINT}: only the start-up file can activate the plugin"
            )
        if one.note:
            findings.append(one.note)
    return findings + nothing_active(found, rows)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _show_doctor(report: Mapping[str, Any]) -> None:
    device = report["gpu"]
    shown = f"{device['name']} ({device['sm']}, driver {device['driver'] or 'unknown'})" if device else "none"
    shown = f"unknown: {report['gpu_unknown']}" if report["gpu_unknown"] else shown
    versions = f"  Python {report['python']}  torch {report['torch']}  Triton {report['triton']}  GPU {shown}"
    show.show(Line(versions, head=f"mla-patch {report['version']}"))
    for host in report["hosts"]:
        note = "" if host["reviewed"] else " (unreviewed)"
        show.lines([f"{host['name']} {host['version'] or 'of an unknown version'}{note}"])
    if not report["hosts"]:
        show.lines(["no engine is installed here"])
    value = os.environ.get("MLA_PATCH")
    if value is None or value.strip().lower() in mla_patch.OFF:
        off = "is not set" if value is None else f"is {value!r}, which means off"
        show.lines([f"MLA_PATCH {off}: an engine that starts here runs without the plugin. With MLA_PATCH=1:"], "dim")
    columns = ["name", "host", "flag", "value", "source", "state", "reason"]
    show.table("features", columns, report["features"])
    targets = [{"feature": f["name"], **target} for f in report["features"] for target in f["targets"]]
    if targets:
        show.table("entry points", ["feature", "module", "name", "kind", "replaced_by"], targets)
    show.lines([f"note: {text}" for text in report["notes"]])
    show.lines([f"finding: {text}" for text in report["findings"]], "yellow")
