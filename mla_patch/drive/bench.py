"""Compares our kernels with those of the installed engine: first their results, then their times.

``mla-patch bench`` starts this in an interpreter of its own, in which no plugin is applied. It prints lines of JSON.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from mla_patch.cli.explain import in_range
from mla_patch.compat import interpreter
from mla_patch.compat.triton import interpreted
from mla_patch.drive import DTYPES
from mla_patch.drive import sglang as trial
from mla_patch.hooks.sglang import decode as sglang_decode
from mla_patch.hooks.sglang import kv_indices as sglang_kv_indices
from mla_patch.kernels import decode as decode_
from mla_patch.kernels.indices import kv as kv_indices
from mla_patch.stand_ins import is_ours

RAGGED = "ragged"  # one request of 131072 tokens, the others of 512
# (requests, tokens of each)
DECODE_CASES = ((1, 8192), (16, 16384), (128, 8192), (64, RAGGED))
INDEX_CASES = ((1, 131072), (64, 16384), (256, 512), (64, RAGGED))
WIDTH = 163_840  # columns of the table of token slots; an engine's table is as wide as its longest context
PAGE = 64
TYPES: dict[str, torch.dtype] = {name: getattr(torch, full) for name, full in DTYPES.items()}
# The largest error of our kernel that counts as right: relative, in the Frobenius norm, against a float64 reference
# over the stored bytes. Rounding a result to 16 bits alone costs 2e-3.
LIMIT = 4e-3
ROUNDS = 3
Call = Callable[[], Any]


@dataclass(frozen=True)
class Side:
    """One of the two kernels of a case, with buffers of its own."""

    call: Call
    out: torch.Tensor


@dataclass(frozen=True)
class Case:
    """The inputs of both kernels, and how a result is scored."""

    name: str
    bytes: int  # bytes that any implementation must read or write
    make: dict[str, Callable[[], Side]]
    metric: str  # what `score` returns: "error", relative in the Frobenius norm, or "equal"
    score: Callable[[torch.Tensor], float | bool]


def main() -> int:
    for message in run(**json.loads(sys.argv[1])):
        print("bench " + json.dumps(message), flush=True)
    return 0


def run(
    kernel: str,
    heads: Sequence[int] = (),
    batch: Sequence[int] = (),
    length: Sequence[int] = (),
    dtype: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Measure one kernel. Yields messages of progress, then the result.

    ``heads``, ``batch``, ``length`` and ``dtype`` list the shapes to measure. An empty list means the defaults for this
    device.
    """
    from mla_patch.session import find_host

    device = "cpu" if interpreted() else "cuda"
    if device == "cpu":
        interpreter.quicken()
    torch.manual_seed(0)
    yield {"step": "importing the engine", "at": 0, "of": None}
    installed = find_host("sglang")
    host, notes = _host_kernel(kernel, installed.version) if installed is not None else (None, [])
    if installed is None:
        notes = ["no engine is installed, so only our kernel is measured"]
    shapes: Sequence[tuple[int, int | str]] = DECODE_CASES if kernel == "decode" else INDEX_CASES
    if device == "cpu":
        shapes = ((3, 97),)
        notes += ["there is no GPU: the kernels run in Triton's interpreter, and their times mean nothing"]
    elif kernel == "decode":
        notes += ["replays find small inputs in the L2 cache, so a small case can be faster than a copy"]
    if batch or length:
        shapes = [(b, n) for b in batch or (1,) for n in length or (8192 if device == "cuda" else 97,)]
    made: Iterator[tuple[str, Callable[[], Case]]]
    if kernel == "decode":
        kinds = dtype or (("bf16", "e4m3") if device == "cuda" else ("fp16", "e4m3"))
        counts = heads or ((16, 128) if device == "cuda" else (16,))
        made = _decode_cases(shapes, counts, kinds, device, host)
    else:
        made = _index_cases(kernel, shapes, device, host)
    rows = []
    for at, (name, make) in enumerate(cases := list(made)):
        yield {"step": name, "at": at, "of": len(cases)}
        try:
            rows.append(_measure(make(), device, notes))
        except torch.OutOfMemoryError:
            notes.append(f"{name}: left out, because it needs more memory than this device has free")
        if device == "cuda":
            torch.cuda.empty_cache()
    copy = _copy_gbps() if device == "cuda" else None
    for row in rows:
        row["of_copy"] = round(row["gbps"] / copy, 3) if copy and row["gbps"] else None
    device_name = torch.cuda.get_device_name() if device == "cuda" else "the CPU, through Triton's interpreter"
    engine = f"SGLang {installed.version}" if installed is not None else None
    floor = _time([lambda: _nothing[(1,)]()], device)[0]
    yield {"result": {
        "kernel": kernel, "device": device_name, "host": engine, "floor_us": floor, "copy_gbps": copy, "cases": rows,
        "right": bool(rows) and all(row["right"] for row in rows), "notes": notes,
        "findings": _findings(kernel, installed.version, rows) if installed is not None else [],
    }}  # fmt: skip


def _findings(kernel: str, version: str | None, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for an engine outside the reviewed range, and for cases in which the engine's kernel did not run."""
    feature = sglang_decode.FEATURE if kernel == "decode" else sglang_kv_indices.FEATURE
    found = []
    if version is not None and not in_range(version, feature):
        found.append(f"SGLang {version} is outside {feature.requirement()[1]}, for which {feature.name} was reviewed")
    unmeasured = [row["case"] for row in rows if row["us"]["host"] is None]
    if unmeasured:
        which = "every case" if len(unmeasured) == len(rows) else ", ".join(unmeasured)
        found.append(f"nothing to compare with in {which}: the engine's own kernel did not run, as the notes say")
    return found


def _host_kernel(kernel: str, version: str | None) -> tuple[Any, list[str]]:
    """The engine's own entry point, or None with a note that says why it cannot be used."""
    stubs = trial.prepare()
    notes = [f"replaced by stand-ins, because this machine lacks them: {', '.join(stubs)}"] if stubs else []
    try:
        own = trial.imported("decode") if kernel == "decode" else trial.builder(_BUILDERS[kernel], version)
    except Exception as problem:
        return None, [*notes, f"the engine's own kernel cannot be imported here: {problem!r}"]
    return (own.__wrapped__ if is_ours(own) else own), notes


_BUILDERS = {"page-table": trial.PAGE_TABLE, "token-indices": trial.TOKEN_IDS}


def _lengths(batch: int, length: int | str) -> list[int]:
    return [131072] + [512] * (batch - 1) if length == RAGGED else [int(length)] * batch


def _decode_cases(
    shapes: Sequence[tuple[int, int | str]], heads: Sequence[int], dtypes: Sequence[str], device: str, host: Any
) -> Iterator[tuple[str, Callable[[], Case]]]:
    for (batch, length), count, dtype in ((s, h, t) for s in shapes for h in heads for t in dtypes):
        name = f"{batch} x {length}, {count} heads, {dtype}"

        def make(
            name: str = name, batch: int = batch, length: int | str = length, count: int = count, dtype: str = dtype
        ) -> Case:
            return _decode_case(name, _lengths(batch, length), count, dtype, device, host)

        yield name, make


def _decode_case(name: str, rows: list[int], heads: int, dtype: str, device: str, host: Any) -> Case:
    # the interpreter multiplies bf16 wrongly
    own = torch.float16 if dtype == "fp16" or device == "cpu" else torch.bfloat16
    total, scale = sum(rows), 192**-0.5
    pages = torch.randperm(-(-total // PAGE) + len(rows), device=device)
    token_ids = (pages[:, None] * PAGE + torch.arange(PAGE, device=device)).view(-1)[:total].contiguous()
    kv = torch.randn(len(pages) * PAGE, 1, 576, device=device, dtype=own).to(TYPES[dtype])
    q = torch.randn(len(rows), heads, 576, device=device, dtype=own)
    indptr = torch.tensor([0, *rows], device=device).cumsum(0).to(torch.int32)
    lens = torch.tensor(rows, device=device)
    want: list[torch.Tensor] = []

    def empty() -> torch.Tensor:
        return torch.full((len(rows), heads, 512), torch.nan, device=device, dtype=own)

    def ours() -> Side:
        out = empty()
        return Side(lambda: decode_.mla_decode(q, kv, out, indptr, token_ids, sm_scale=scale), out)

    def hosts() -> Side:
        out = empty()
        return Side(trial.decode_launch(host, q, kv, out, indptr, token_ids, lens, scale), out)

    def score(out: torch.Tensor) -> float:
        if not want:
            want.append(decode_.mla_decode_ref(q, kv, indptr, token_ids, sm_scale=scale))
        return trial.relative_error(out, want[0])

    moved = total * (576 * kv.element_size() + token_ids.element_size()) + q.nbytes + len(rows) * heads * 512 * 2
    return Case(name, moved, {"ours": ours} | ({"host": hosts} if host is not None else {}), "error", score)


def _index_cases(
    kernel: str, shapes: Sequence[tuple[int, int | str]], device: str, host: Any
) -> Iterator[tuple[str, Callable[[], Case]]]:
    for batch, length in shapes:
        name = f"{batch} x {length}"

        def make(name: str = name, batch: int = batch, length: int | str = length) -> Case:
            # uneven lengths, as in a real batch
            rows = [max(n - 37 * i % 64, 1) for i, n in enumerate(_lengths(batch, length))]
            return _index_case(kernel, name, rows, device, host)

        yield name, make


def _index_case(kernel: str, name: str, rows: list[int], device: str, host: Any) -> Case:
    width = max(WIDTH if device == "cuda" else 1024, -(-max(rows) // PAGE) * PAGE)
    batch = trial.make_batch(device, rows, width, PAGE)
    indptr = torch.tensor([0, *rows], device=device).cumsum(0).to(torch.int32)
    given = batch.table, batch.rows, batch.lens

    def empty() -> torch.Tensor:
        if kernel == "page-table":
            return torch.full((len(rows), -(-max(rows) // PAGE)), -1, dtype=torch.int32, device=device)
        return torch.full((sum(rows) + PAGE,), -1, dtype=torch.int64, device=device)

    def ours() -> Side:
        out = empty()
        if kernel == "page-table":
            return Side(lambda: kv_indices.build_page_table(*given, out, page_size=PAGE), out)
        return Side(lambda: kv_indices.build_token_indices(*given, indptr, out), out)

    def hosts() -> Side:
        out = empty()
        return Side(trial.launch(host, _BUILDERS[kernel], batch, out), out)

    def score(out: torch.Tensor) -> bool:
        if kernel == "page-table":
            return torch.equal(out, kv_indices.page_table_ref(*given, empty(), page_size=PAGE))
        return torch.equal(out, kv_indices.token_indices_ref(*given, indptr, empty()))

    entries = sum(-(-n // PAGE) for n in rows) if kernel == "page-table" else sum(rows)
    # for each entry, a slot is read and an entry is written
    moved = entries * (4 + (4 if kernel == "page-table" else 8))
    return Case(name, moved, {"ours": ours} | ({"host": hosts} if host is not None else {}), "equal", score)


def _measure(case: Case, device: str, notes: list[str]) -> dict[str, Any]:
    """Score both kernels, then time them. A kernel that fails is not timed, nor is ours if its result is wrong."""
    scores: dict[str, float | bool | None] = {"host": None, "ours": None}
    calls: dict[str, Call] = {}
    for name, make in case.make.items():
        try:
            side = make()
            side.call()
            score = case.score(side.out)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            notes.append(f"{case.name}: {name} failed: {problem!r:.300}")
            continue
        if math.isfinite(score):
            scores[name] = score if isinstance(score, bool) else round(score, 6)
        else:  # JSON has no value for it
            notes.append(f"{case.name}: {name} is not finite everywhere")
        if name == "host" or _is_right(score):
            calls[name] = side.call
    us: dict[str, float | None] = {"host": None, "ours": None}
    us |= dict(zip(calls, _time(list(calls.values()), device), strict=True))
    gbps = round(case.bytes / us["ours"] / 1e3, 1) if us["ours"] and device == "cuda" else None
    right = scores["ours"] is not None and _is_right(scores["ours"])
    return {"case": case.name, "bytes": case.bytes, "us": us, case.metric: scores, "gbps": gbps, "right": right}


def _is_right(score: float | bool) -> bool:
    # false for NaN, too
    return score if isinstance(score, bool) else score <= LIMIT


def _time(calls: Sequence[Call], device: str) -> list[float]:
    """Median microseconds of each call. The calls take turns, so that a drift of the clocks affects all of them alike.

    On a GPU, each call is captured in a CUDA graph and the graph is replayed.
    """
    rounds: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS if device == "cuda" else 1):
        for call, times in zip(calls, rounds, strict=True):
            times.append(_time_once(call, device))
    return [round(statistics.median(times), 2) for times in rounds]


def _time_once(call: Call, device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench_cudagraph

        return do_bench_cudagraph(call, rep=20, return_mode="median") * 1e3
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


@triton.jit
def _nothing():
    pass


def _copy_gbps() -> float:
    """GB/s of a plain copy within the device, counting both reads and writes."""
    free, _ = torch.cuda.mem_get_info()
    size = min(2**30, free // 4)
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return round(2 * size / _time([lambda: target.copy_(source)], "cuda")[0] / 1e3, 1)


if __name__ == "__main__":
    raise SystemExit(main())
