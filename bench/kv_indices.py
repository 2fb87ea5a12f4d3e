"""Both index builders: arms for an external script that measures them with their peers, and a sweep of launch numbers.

    python bench/kv_indices.py [page-table] [token-indices] [--rounds N] [--json OUT]     needs a GPU

The sweep first compares every configuration with the reference, on outputs that were filled with -1. Then the
configurations of a case take turns at CUDA-graph replay, so that a drift of the clocks affects all of them alike, and
the medians are reported. `default` is the configuration that the launcher chooses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without an install

from mla_patch.kernels.indices.kv import (
    build_page_table,
    build_token_indices,
    page_table_ref,
    token_indices_ref,
)

DEVICE = "cuda"
WIDTH = 163_840  # columns of the table: the longest context of the models that are served
RAGGED = "ragged"
CASES: list[tuple[int, int | str]] = [
    (1, 8192),
    (1, 131072),
    (8, 131072),
    (64, 16384),
    (256, 4096),
    (256, 512),
    (64, RAGGED),
]
EXTRA: list[tuple[int, int | str]] = [
    (256, RAGGED),
    (17, 2048),
]  # a ragged batch that a fixed split per row cannot balance, and a small mixed batch


def page_table(case):
    """``(call, out)`` for the measuring script. Entries past the end of a row are -1."""
    out = torch.full((case.B, -(-case.L // 64)), -1, device=DEVICE, dtype=torch.int32)
    return lambda: build_page_table(case.req_to_token, case.req_pool, case.lens, out), out


def token_indices(case):
    """``(call, out)`` for the measuring script. The 64 entries after the last id stay -1."""
    out = torch.full((case.N + 64,), -1, device=DEVICE, dtype=torch.int64)
    return lambda: build_token_indices(case.req_to_token, case.req_pool, case.lens, case.indptr, out), out


def make_case(rows: int, length: int | str) -> types.SimpleNamespace:
    wanted = [131072] + [512] * (rows - 1) if isinstance(length, str) else [length] * rows
    lens = torch.tensor([max(1, n - (37 * b) % 256) for b, n in enumerate(wanted)])
    pool = torch.randperm(512 if rows > 64 else 128)[:rows]
    pages = torch.randint(0, 2**24, (int(pool.max()) + 1, WIDTH // 64, 1), device=DEVICE, dtype=torch.int32)
    table = (pages * 64 + torch.arange(64, device=DEVICE, dtype=torch.int32)).view(-1, WIDTH)
    return types.SimpleNamespace(
        B=rows,
        L=int(lens.max()),
        N=int(lens.sum()),
        req_to_token=table,
        req_pool=pool.to(DEVICE),
        lens=lens.to(DEVICE),
        indptr=torch.tensor([0, *lens.tolist()]).cumsum(0).to(DEVICE, torch.int32),
    )


def token_configs(rows: int, sms: int) -> dict[str, dict[str, int]]:
    """Configurations in which long rows are worked off by their own programs ("own") or by all programs ("shared")."""
    configs = {}
    for (block, warps), waves, wide in itertools.product(((512, 2), (512, 4), (1024, 4)), (4, 8, 12), (1, 4)):
        ctas = max(1, min(waves * sms // rows, 128 * 1024 // block))
        numbers = {"ctas": ctas, "BLOCK": block, "WIDE": wide, "ROWS": 0, "num_warps": warps}
        configs[f"own    {block:4d}x{warps}w {waves:2d}/SM x{wide}"] = numbers
    for (block, warps), waves, wide in itertools.product(((512, 2), (1024, 2), (1024, 4)), (2, 4, 8), (1, 2)):
        ctas = max(1, min(waves * sms // rows, 128 * 1024 // block))
        numbers = {"ctas": ctas, "BLOCK": block, "WIDE": wide, "ROWS": 256, "num_warps": warps}
        configs[f"shared {block:4d}x{warps}w {waves:2d}/SM x{wide}"] = numbers
    return configs


def table_configs(rows: int, sms: int) -> dict[str, dict[str, int]]:
    configs = {}
    for (block, warps), waves, wide in itertools.product(((64, 1), (128, 1), (128, 4)), (2, 4, 8), (1, 4, 8)):
        ctas = max(1, min(waves * sms // rows, 32))
        numbers = {"ctas": ctas, "BLOCK": block, "WIDE": wide, "ROWS": 0, "num_warps": warps}
        configs[f"own    {block:4d}x{warps}w {waves:2d}/SM x{wide}"] = numbers
    return configs


def time_us(call, rep: int) -> float:
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, rep=rep, return_mode="median") * 1e3


def sweep(what: str, rounds: int, rep: int, sms: int) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for rows, length in CASES + EXTRA:
        case, title = make_case(rows, length), f"{rows}x{length}"
        if what == "page-table":
            out = torch.empty(rows, -(-case.L // 64) + 3, device=DEVICE, dtype=torch.int32)
            configs = table_configs(rows, sms)
            want = page_table_ref(case.req_to_token, case.req_pool, case.lens, out.fill_(-1))

            def build(config, case=case, out=out):
                build_page_table(case.req_to_token, case.req_pool, case.lens, out, config=config)
        else:
            out = torch.empty(case.N + 64, device=DEVICE, dtype=torch.int64)
            configs = token_configs(rows, sms)
            want = token_indices_ref(case.req_to_token, case.req_pool, case.lens, case.indptr, out.fill_(-1))

            def build(config, case=case, out=out):
                build_token_indices(case.req_to_token, case.req_pool, case.lens, case.indptr, out, config=config)

        calls = {}
        for name, config in {"default": None, **configs}.items():
            out.fill_(-1)
            try:
                build(config)
                torch.cuda.synchronize()
            except Exception as problem:  # one configuration that fails does not end the sweep
                print(f"{title} {name}: {problem!r:.150}", flush=True)
                continue
            if torch.equal(out, want):
                calls[name] = lambda config=config, build=build: build(config)
            else:
                print(f"{title} {name}: WRONG in {int((out != want).sum())} places", flush=True)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(time_us(call, rep))
        for name, us in times.items():
            table.setdefault(name, {})[title] = statistics.median(us)
        best = min(times, key=lambda name: statistics.median(times[name]))
        default = table["default"][title]
        print(f"{what} {title:12s} best {table[best][title]:6.2f} us  {best}; default {default:6.2f}", flush=True)
    return table


def show(table: dict[str, dict[str, float]], top: int = 24) -> None:
    """Print the best configurations, by the geometric mean of their times over the best time of each case.

    An asterisk marks times within 3% of the best.
    """
    titles = [f"{rows}x{length}" for rows, length in CASES + EXTRA]
    best = {t: min(row[t] for row in table.values() if t in row) for t in titles}

    def cost(row: dict[str, float]) -> float:
        return statistics.geometric_mean([row[t] / best[t] for t in titles if t in row]) + (len(row) < len(titles))

    print(f"{'us':28s}" + "".join(f"{t:>12s}" for t in titles) + f"{'mean/best':>11s}")
    order = sorted(table.items(), key=lambda item: cost(item[1]))
    for name, row in order[:top] + [item for item in order[top:] if item[0] == "default"]:
        cells = "".join(
            f"{row[t]:11.2f}{'*' if row[t] <= 1.03 * best[t] else ' '}" if t in row else f"{'-':>11s} " for t in titles
        )
        print(f"{name:28s}{cells}{cost(row):11.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="page-table, token-indices; default: both")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rep", type=int, default=10, help="milliseconds of replay per figure")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import triton

    properties = torch.cuda.get_device_properties(0)
    print(properties.name, "torch", torch.__version__, "triton", triton.__version__)
    torch.manual_seed(0)
    tiny = torch.zeros(1, device=DEVICE)
    print(f"launch floor (fill one element): {time_us(lambda: tiny.fill_(1), 20):.2f} us")
    tables = {}
    for what in args.what or ("token-indices", "page-table"):
        tables[what] = sweep(what, args.rounds, args.rep, properties.multi_processor_count)
        show(tables[what])
    if args.json:
        args.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
