"""``mla-patch bench``: check our kernels and the installed engine's on the same inputs, then time both."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from mla_patch.cli import here, show
from mla_patch.cli.child import run_child
from mla_patch.cli.exits import FINDING, OK, Misuse
from mla_patch.cli.show import Line


def bench(args: argparse.Namespace) -> int:
    """Measure in a fresh interpreter, in which the engine's kernels are its own."""
    here.need_triton("bench")
    for name in ("heads", "dtype"):
        if args.kernel != "decode" and getattr(args, name):
            raise Misuse(f"bench {args.kernel}: --{name} is for decode")
    if here.torch_gpu() is None and "bf16" in args.dtype:
        raise Misuse(
            "bench: --dtype bf16 without a GPU: in Triton's interpreter the engine's kernel multiplies bf16 wrongly; "
            "expected fp16"
        )
    options = {name: getattr(args, name) for name in ("kernel", "heads", "batch", "length", "dtype")}
    environ = {name: value for name, value in os.environ.items() if name != "MLA_PATCH"}
    result = run_child("bench", [json.dumps(options)], environ, args)
    if result is None:
        return FINDING
    if args.json:
        show.as_json(result)
    else:
        _show_bench(result)
    return OK if result["right"] and not result["findings"] else FINDING


def _show_bench(result: Mapping[str, Any]) -> None:
    show.show(Line(f", {result['host'] or 'no engine installed'}, on {result['device']}", head=result["kernel"]))
    rows = []
    for case in result["cases"]:
        us, told = case["us"], case.get("error") or case.get("equal") or {}
        ratio = f"{us['host'] / us['ours']:.2f}x" if us["host"] and case["gbps"] else None
        share = f"{case['of_copy']:.0%}" if case["of_copy"] else None
        rows.append({
            "case": case["case"], "host us": us["host"], "ours us": us["ours"], "host / ours": ratio,
            "GB/s": case["gbps"], "of a copy": share, "host": told.get("host"), "ours": told.get("ours"),
        })  # fmt: skip
    title = "median of each; host and ours: relative error" if result["kernel"] == "decode" else "host and ours: equal"
    show.table(title, ["case", "host us", "ours us", "host / ours", "GB/s", "of a copy", "host", "ours"], rows)
    right, style = ("right", "green") if result["right"] else ("NOT right", "red")
    copy = f", a copy reaches {result['copy_gbps']} GB/s" if result["copy_gbps"] else ""
    show.lines([f"our kernel is {right}; an empty launch takes {result['floor_us']} us{copy}"], style)
    show.lines(result["notes"])
    show.lines([f"finding: {text}" for text in result["findings"]], "yellow")
