"""``mla-patch demo``: patch the installed engine in a new interpreter, and compare its kernels with ours."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from mla_patch.cli import explain as explain_
from mla_patch.cli import here, show
from mla_patch.cli.child import run_child
from mla_patch.cli.exits import FINDING, OK, Misuse
from mla_patch.cli.show import Line


def demo(args: argparse.Namespace) -> int:
    """Run the demonstration in a fresh interpreter, as an engine's process would start."""
    here.need_triton("demo")
    if args.fetch is not None:
        _demo_takes(args.fetch)
    result = run_child("demo", [], dict(os.environ) | {"MLA_PATCH": "1"}, args)
    if result is None:
        return FINDING
    if args.json:
        show.as_json(result)
    else:
        _show_demo(result)
    return OK if result["equal"] else FINDING


def _demo_takes(release: str) -> None:
    """Refuse a release that no feature of the demonstration is applied to."""
    from mla_patch.drive.demo import DECODE, FEATURE

    plugins, flags = here.read_flags([])
    for feature in plugins.features:
        shown = feature.label in (DECODE, FEATURE)
        if shown and not flags.on("MLA_PATCH_SKIP_VERSION_CHECK") and not explain_.in_range(release, feature):
            range_ = feature.requirement()[1]
            raise Misuse(f"demo: --fetch {release:.80}: {feature.name} is for SGLang {range_}, such as 0.5.23")


def _show_demo(result: Mapping[str, Any]) -> None:
    show.show(Line(f" on {result['device']}", head=result["host"] or "no engine installed"))
    if result["targets"]:
        show.table("patched", ["module", "name", "replaced_by"], result["targets"])
    rows = [row | {f"error_{side}": error for side, error in row.get("error", {}).items()} for row in result["routes"]]
    columns = ["route", "builder", "equal", "error_host", "error_ours", "us_host", "us_ours"]
    show.table("same input, both kernels", columns, rows)
    equal, style = ("equal", "green") if result["equal"] else ("NOT equal", "red")
    show.lines([f"our kernels served {result['served']} calls of the engine; outputs {equal}"], style)
    show.lines(result["notes"])
