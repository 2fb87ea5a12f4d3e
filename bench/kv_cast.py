"""Compares our cast of the pages that a batch uses with SGLang's cast of a layer's whole pool, `cache.to(bfloat16)`.

    python bench/kv_cast.py [--rounds N] [--sweep] [--peers DIR] [--json OUT]     needs a GPU

--peers    Also run a target verify of four tokens per request by FlashAttention-3 after each cast. It is taken from
           `flash_ops` in DIR, or from `sgl_kernel.flash_ops`. Its results after the three casts must be equal bit for
           bit, although all rows that our cast does not write are NaN.
--sweep    Also time other launch numbers.

Each result is first compared with torch's. Then the arms take turns at CUDA-graph replay, so that a drift of the clocks
affects all of them alike, and the medians are reported. GB/s counts 576 bytes read and 1152 bytes written per token.
The arm `idle` is a graph that was captured for the model's longest context and is replayed with lengths of 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without an install

from mla_patch.kernels.cache.kv_cast import cast_config, cast_pages
from mla_patch.kernels.common.constants import WIDTH

CONTEXT = 163_840  # tokens: the longest context of the models that are served
HEADS, DRAFTS = 16, 4
POOLS = (131_072, 1_048_576)
# requests, tokens of each
CASES = ((1, 1024), (1, 8192), (1, 131_072), (8, 8192), (16, 8192), (64, 1024), (64, 8192), (256, 512))
SWEEP = [
    {"ROWS": rows, "PROGRAMS": programs, "MIN_PROGRAMS": 64, "num_warps": warps}
    for rows in (8, 16, 32) for programs in (1024, 2048, 4096) for warps in (2, 4, 8)
]  # fmt: skip


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def timed(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, float]:
    """Median microseconds of each graph. The graphs take turns."""
    seen: dict[str, list[float]] = {name: [] for name in graphs}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(rounds):
        for name, graph in graphs.items():
            start.record()
            for _ in range(10):
                graph.replay()
            end.record()
            end.synchronize()
            seen[name].append(start.elapsed_time(end) * 100)
    return {name: statistics.median(values) for name, values in seen.items()}


def flash_attention_3(folder: Path) -> Callable[..., Any]:
    """A function of (16-bit cache, page table, lengths, page size, queries) that attends as SGLang's verify does."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        importlib.import_module("flash_ops")
    except ImportError:
        importlib.import_module("sgl_kernel.flash_ops")
    forward = torch.ops.sgl_kernel.fwd.default
    names = [argument.name for argument in forward._schema.arguments]  # releases of sglang-kernel add to them

    def attend(kv: torch.Tensor, table: torch.Tensor, lens: torch.Tensor, page: int, q: torch.Tensor) -> Any:
        row = kv.view(-1, page, 1, WIDTH)
        starts = torch.arange(0, len(q) + 1, DRAFTS, device="cuda", dtype=torch.int32)
        given = {
            "q": q[..., 512:], "q_v": q[..., :512], "k": row[..., 512:], "v": row[..., :512], "page_table": table,
            "seqused_k": lens, "cu_seqlens_q": starts, "max_seqlen_q": DRAFTS, "softmax_scale": 192**-0.5,
            "is_causal": True, "window_size_left": -1, "window_size_right": -1, "attention_chunk": 0, "softcap": 0.0,
            "is_rotary_interleaved": True, "num_splits": 0, "sm_margin": 0, "only_qv": False,
        }  # fmt: skip
        return forward(*[given.get(name) for name in names])[0]

    return attend


def case(
    slots: int, batch: int, length: int, page: int, config: dict[str, int] | None, attend: Any = None
) -> dict[str, float]:
    cache = torch.randn(slots, 1, WIDTH, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)
    pages = -(-length // page)
    table = torch.randperm(slots // page, device="cuda")[: batch * pages].int().view(batch, pages)
    lens = torch.full((batch,), length, device="cuda", dtype=torch.int32)
    places, packed = torch.empty_like(table), torch.empty(table.numel() * page, 1, WIDTH, device="cuda").bfloat16()
    whole = torch.empty(slots, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
    wide = torch.zeros(batch, CONTEXT // page, device="cuda", dtype=torch.int32)
    wide[:, :pages] = table
    ones = torch.ones_like(lens)

    def cast(ids: torch.Tensor, counts: torch.Tensor, out: torch.Tensor, to: torch.Tensor | None) -> None:
        cast_pages(cache, ids, counts, out, page_size=page, places=to, config=config)

    graphs = {
        "packed": captured(lambda: cast(table, lens, packed, places)),
        "own numbers": captured(lambda: cast(wide, lens, whole, None)),
        "idle": captured(lambda: cast(wide, ones, whole, None)),
        "pool": captured(lambda: cache.to(torch.bfloat16)),
    }
    graphs["packed"].replay()
    graphs["own numbers"].replay()
    rows = (table[..., None] * page + torch.arange(page, device="cuda")).view(batch, -1)[:, :length].long()
    want = cache.view(torch.uint8)[rows].view(torch.float8_e4m3fn).to(torch.bfloat16)
    assert torch.equal(whole[rows], want)
    assert torch.equal(packed.view(batch, -1, 1, WIDTH)[:, :length], want)
    if attend is not None:
        q = torch.randn(batch * DRAFTS, HEADS, WIDTH, device="cuda").bfloat16()
        whole.fill_(float("nan"))
        packed.fill_(float("nan"))

        def own() -> Any:
            cast(table, lens, whole, None)
            return attend(whole, table, lens, page, q)

        def packs() -> Any:
            cast(table, lens, packed, places)
            return attend(packed, places, lens, page, q)

        arms = {
            "pool": lambda: attend(cache.to(torch.bfloat16), table, lens, page, q),
            "own numbers": own,
            "packed": packs,
        }
        results = [arm() for arm in arms.values()]
        assert results[0].isfinite().all() and all(torch.equal(results[0], one) for one in results[1:])
        graphs |= {f"{name} + FA3": captured(arm) for name, arm in arms.items()}
    return timed(graphs, ROUNDS)


def main() -> None:
    global ROUNDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    ROUNDS = given.rounds
    attend = flash_attention_3(given.peers) if given.peers else None
    rows = []
    for slots in POOLS:
        for batch, length in CASES:
            if batch * length > slots:
                continue
            for page in (1, 64):
                for config in (None, *(SWEEP if given.sweep else ())):
                    us = case(slots, batch, length, page, config, attend)
                    rates = {n: round(batch * length * 1728 / us[n] / 1e3) for n in ("packed", "own numbers")}
                    row = {"pool": slots, "requests": batch, "tokens": length, "page": page} | {"GB/s": rates}
                    row |= {"config": config or cast_config(), "us": {name: round(one, 1) for name, one in us.items()}}
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


ROUNDS = 20

if __name__ == "__main__":
    main()
