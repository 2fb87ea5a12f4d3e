"""The cast of named pages beside the cast of a whole pool, `cache.to(bfloat16)`, which SGLang makes for each layer.

    python bench/kv_cast.py [--rounds N] [--sweep] [--json OUT]     needs a GPU

Medians of CUDA-graph replay, in turn, so that drift in the clocks hits all alike; each result is compared with torch's
first. A named token moves 576 bytes in and 1152 out, which GB/s counts. `idle` is a graph that was captured for the
model's longest context and is replayed at lengths of 1. `--sweep` times other launch numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without an install

from mla_patch.kernels.kv_cast import WIDTH, cast_config, cast_pages

CONTEXT = 163_840  # tokens, as wide as the longest context of the models served
POOLS = (131_072, 1_048_576)
# requests, tokens of each
CASES = ((1, 1024), (1, 8192), (1, 131_072), (8, 8192), (16, 8192), (64, 1024), (64, 8192), (256, 512))
SWEEP = [
    {"ROWS": rows, "PROGRAMS": programs, "LEAST": 64, "num_warps": warps}
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
    """Microseconds of each, by turns."""
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


def case(slots: int, batch: int, length: int, page: int, config: dict[str, int] | None) -> dict[str, float]:
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
    return timed(graphs, ROUNDS)


def main() -> None:
    global ROUNDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    ROUNDS = given.rounds
    rows = []
    for slots in POOLS:
        for batch, length in CASES:
            if batch * length > slots:
                continue
            for page in (1, 64):
                for config in (None, *(SWEEP if given.sweep else ())):
                    us = case(slots, batch, length, page, config)
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
