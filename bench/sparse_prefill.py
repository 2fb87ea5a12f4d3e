"""Sparse prefill beside FlashMLA's own, on the same tensors in one process, and a sweep of launch numbers.

    python bench/sparse_prefill.py [--sweep] [--rounds N] [--json OUT]      needs a GPU

Peers, where they can be had: `flash_mla` and `sgl_kernel.flash_mla`. A peer that is missing, or refuses a case, is
named with the reason. Every arm is first checked against float64 (at most eight queries, the first and the last among
them; all others must be finite), and only then timed: CUDA-graph replay, median, arms of a case in turn.

`sparse_prefill` is an arm for the peers' measuring script.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # peers: this file may be loaded by its path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without an install

import peers
from peers import Call

from mla_patch.kernels.sparse_prefill import mla_sparse_prefill, mla_sparse_prefill_ref, sparse_prefill_config

DEVICE = "cuda"
# queries, rows, heads, topk, width
CASES = [
    (4096, 32768, 128, 2048, 576),
    (4096, 32768, 64, 2048, 576),
    (4096, 8192, 64, 640, 512),
    (4096, 131072, 128, 1152, 512),
    (4096, 32768, 16, 2048, 576),
]


def make_case(queries: int, rows: int, heads: int, topk: int, width: int) -> types.SimpleNamespace:
    case = types.SimpleNamespace(
        q=torch.randn(queries, heads, width, device=DEVICE, dtype=torch.bfloat16),
        kv=torch.randn(rows, 1, width, device=DEVICE, dtype=torch.bfloat16),
        indices=torch.randint(0, rows, (queries, 1, topk), device=DEVICE, dtype=torch.int32),
        sm_scale=width**-0.5, flops=2 * queries * heads * topk * (width + 512), picks=peers.pick(queries),
    )  # fmt: skip
    picks = case.picks.to(DEVICE)
    case.want = mla_sparse_prefill_ref(case.q[picks], case.kv, case.indices[picks], case.sm_scale)[0]
    return case


def ours(case: Any, config: dict[str, int] | None = None) -> Call:
    return lambda: mla_sparse_prefill(case.q, case.kv, case.indices, case.sm_scale, config=config)


def sparse_prefill(case: Any) -> tuple[Call, Any]:
    """(call, out) as the measuring script wants them."""
    out = torch.full((*case.q.shape[:2], 512), float("nan"), device=case.q.device, dtype=case.q.dtype)
    return lambda: mla_sparse_prefill(case.q, case.kv, case.indices, case.sm_scale, out=out), out


def peer(module: str) -> Callable[[Any], Call]:
    def make(case: Any) -> Call:
        package = peers.package(module)
        return lambda: package.flash_mla_sparse_fwd(case.q, case.kv, case.indices, case.sm_scale)

    return make


def configs(heads: int) -> dict[str, dict[str, int]]:
    """Launch numbers that are worth a try, beside the default's."""
    found = {}
    for block_h, block_n, stages, warps in itertools.product((16, 64), (32, 64), (1, 2, 3, 5), (4, 8)):
        if block_h == 64 and (warps == 4 or heads <= 16):
            continue  # an accumulator of 512 columns leaves four warps no registers
        name = f"{block_h}x{block_n} {stages} stages {warps} warps"
        found[name] = {"BLOCK_H": block_h, "BLOCK_N": block_n, "STAGES": stages, "num_warps": warps}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="our launch numbers instead of peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=40, help="milliseconds of replay per figure")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    versions = peers.versions()
    print(*versions.values())
    torch.manual_seed(0)
    rows = []
    for queries, count, heads, topk, width in CASES:
        case = make_case(queries, count, heads, topk, width)
        arms: peers.Arms = {"ours": ours}
        if args.sweep:
            for name, config in configs(heads).items():
                arms[name] = lambda case, config=config: ours(case, config)
        else:
            arms |= {"flash_mla": peer("flash_mla"), "sgl_kernel": peer("sgl_kernel.flash_mla")}
        title = f"queries {queries} rows {count} heads {heads} topk {topk} width {width}"
        table = peers.measure(case, arms, args.rounds, args.rep)
        rows.append(peers.show(f"{title}   default {sparse_prefill_config(heads, peers.capability())}", case, table))
    if args.json:
        args.json.write_text(json.dumps(versions | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
