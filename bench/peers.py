"""Shared code of the benchmarks that compare our kernels with those of other packages ("peers").

An arm is checked before it is timed. Arms take turns, and every round is kept, so that the spread can be reported.

A case is a namespace with the inputs, with ``picks`` (the indices of at most eight queries) and with ``want`` (the
float64 reference of the outputs of these queries). The reference is computed once for all arms. For all queries it
would take minutes.
"""

from __future__ import annotations

import importlib
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from mla_patch.compat.sglang.flash_mla import before_v41
from mla_patch.compat.triton import interpreted

Call = Callable[[], Any]
Arms = dict[str, Callable[[Any], Call]]
WRONG = 0.02  # an arm with a larger error is not timed; relative to the norm of the reference


def pick(count: int, most: int = 8) -> torch.Tensor:
    """Indices of the first query, the last query, and some others at random."""
    return torch.tensor(sorted({0, count - 1, *torch.randint(0, count, (most - 2,)).tolist()}))


def package(name: str) -> Any:
    return importlib.import_module(name)


def over_pages(package_name: str, q: Any, cache: Any, indices: Any, sm_scale: float, options: dict[str, Any]) -> Call:
    """A call of a package's `flash_mla_with_kvcache` over fp8 pages. All calls share one FlashMLASchedMeta."""
    module = package(package_name)
    meta = module.get_mla_metadata()[0]
    renamed = {"extra_indices": "extra_indices_in_kvcache"}
    options = {renamed.get(name, name): value for name, value in options.items()}
    decode = before_v41(module.flash_mla_with_kvcache)
    return lambda: decode(
        q=q, k_cache=cache.view(torch.float8_e4m3fn), block_table=None, cache_seqlens=None, head_dim_v=512,
        tile_scheduler_metadata=meta, softmax_scale=sm_scale, is_fp8_kvcache=True, indices=indices, **options,
    )  # fmt: skip


def error(case: Any, result: Any) -> float:
    """The largest error of the picked queries, relative to the norm of the reference. All queries must be finite."""
    out = result[0]
    assert torch.isfinite(out).all(), "not every row is finite"
    wrong = (out[case.picks.to(out.device)].double() - case.want).flatten(1).norm(dim=1)
    return float((wrong / case.want.flatten(1).norm(dim=1)).max())


def time_us(call: Call, rep: int) -> float:
    """Median microseconds of CUDA-graph replays over ``rep`` milliseconds. In the interpreter, the time of one call."""
    if interpreted():
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    from triton.testing import do_bench, do_bench_cudagraph

    try:
        return do_bench_cudagraph(call, rep=rep, return_mode="median") * 1e3
    except Exception:  # time a peer that cannot be captured with events instead
        torch.cuda.synchronize()
        return do_bench(call, rep=rep, return_mode="median") * 1e3


def checked(
    case: Any, arms: Arms, error: Callable[[Any, Any], float] = error, limit: float = WRONG
) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
    """The calls of the arms that are right, and for every arm its error or the reason why it is refused."""
    ready, table = {}, {}
    for name, make in arms.items():
        try:
            call = make(case)
            wrong = error(case, call())
            if not wrong < limit:
                raise RuntimeError(f"error {wrong}")
        except Exception as problem:
            table[name] = {"refused": f"{type(problem).__name__}: {problem}".splitlines()[0][:160]}
            continue
        ready[name] = call
        table[name] = {"error": wrong, "us": []}
    return ready, table


def measure(
    case: Any, arms: Arms, rounds: int, rep: int, error: Callable[[Any, Any], float] = error
) -> dict[str, dict[str, Any]]:
    """For every arm, its error and its microseconds in each round, or the reason why it is refused."""
    ready, table = checked(case, arms, error)
    for _ in range(rounds):
        for name, call in ready.items():
            table[name]["us"].append(time_us(call, rep))
    return table


def show(title: str, case: Any, table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Print the arms of a case, fastest first, with GB/s and TFLOP/s if it has ``bytes`` and ``flops``.

    Returns the row for the JSON file.
    """
    print(title)
    for name, row in sorted(table.items(), key=lambda item: statistics.median(item[1].get("us") or [math.inf])):
        if "refused" in row:
            print(f"    {name:32s} {row['refused']}", flush=True)
            continue
        us = statistics.median(row["us"])
        spread = (max(row["us"]) - min(row["us"])) / us
        rates = [f"{count / us * scale:6.0f} {unit}" for unit, count, scale in _rates(case)]
        cells = [f"{us:10.1f} us", f"spread {spread:5.1%}", f"error {row['error']:.5f}", *rates]
        print(f"    {name:32s} {'  '.join(cells)}", flush=True)
    counts = {name: getattr(case, name) for name in ("bytes", "flops") if hasattr(case, name)}
    return {"case": title, **counts, "arms": table}


def _rates(case: Any) -> list[tuple[str, int, float]]:
    known = (("GB/s", "bytes", 1e-3), ("TFLOP/s", "flops", 1e-6))
    return [(unit, getattr(case, name), scale) for unit, name, scale in known if hasattr(case, name)]


def versions() -> dict[str, str]:
    """The GPU and the versions that every row must state."""
    import triton

    gpu = "Triton's interpreter: times say nothing" if interpreted() else torch.cuda.get_device_name()
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}


def capability() -> tuple[int, int]:
    return (0, 0) if interpreted() else torch.cuda.get_device_capability()


def configs(heads: int, stages: tuple[int, ...]) -> dict[str, dict[str, int]]:
    """Launch numbers of an attention kernel that are worth trying besides the default, by name."""
    found = {}
    for block_h, block_n, count, warps in itertools.product((16, 64), (32, 64), stages, (4, 8)):
        if block_h == 64 and (warps == 4 or heads <= 16):
            continue  # an accumulator of 512 columns leaves four warps no registers
        name = f"{block_h}x{block_n} {count} stages {warps} warps"
        found[name] = {"BLOCK_H": block_h, "BLOCK_N": block_n, "STAGES": count, "num_warps": warps}
    return found
