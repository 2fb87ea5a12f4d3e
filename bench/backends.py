"""Compares our MLA decode with the kernels that SGLang's backends call on Hopper, in one process on one sm_90 GPU.

    python bench/backends.py fp8|bf16 ... [--peers DIR] [--pools N ...] [--requests N ...] [--shapes BxL ...]
                             [--heads N ...] [--arms TEXT ...] [--rounds N] [--json OUT] [--list]

fp8    An e4m3 cache, used as each backend uses it for one layer of one step. FlashAttention-3 and FlashInfer have no
       kernel for it, so their backends first convert the layer's whole pool to bfloat16, whatever the batch. FlashMLA's
       backend converts q to e4m3. Our kernel reads the e4m3 tokens of the batch. A request has 8192 tokens, or an equal
       share of the pool if that is less.
bf16   A bfloat16 cache in seven shapes. 64xragged is one request of 131072 tokens and 63 requests of 512.

Peers are imported from the folder --peers, or else from the environment. FlashAttention-3 is in `flash_ops` (or
`sgl_kernel.flash_ops`, the library of sglang-kernel), FlashMLA in `flash_mla`. FlashInfer needs the folder: it must
have `flashinfer_mla.so`, which is FlashInfer's fa3 module of MLA for bfloat16 without a mask, compiled alone. `tvm_ffi`
loads it. --list says which peers can be loaded. It needs no GPU.

Tokens lie in pages of 64, at random places in the pool. A second page table names the same rows as pages of one slot.
Every arm is first compared with a float64 reference over the stored bytes, for at most four requests including the
first and the last; the results of all others must be finite. Then the arms take turns at CUDA-graph replay. Each round
begins with another arm. If the L2 cache could hold the KV cache, several copies of it are read in turn. FlashMLA's
schedule and FlashInfer's plan are made beforehand, since an engine makes them once per step. FlashAttention-3 and our
kernel divide their work within the measured time.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import math
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # peers lies beside this file
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without an install

import peers
from peers import Arms, Call

from mla_patch.compat.sglang.flash_mla import before_v41
from mla_patch.compat.triton import interpreted
from mla_patch.kernels.decode import mla_decode, mla_decode_paged, mla_decode_ref

DEVICE = "cuda"
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
PAGE = 64
POOLS, REQUESTS, TOKENS = (131072, 524288, 2097152), (1, 16, 64), 8192
RAGGED = "ragged"
LONG, SHORT = 131072, 512  # tokens in a ragged batch: of one request, and of each other
SHAPES = [(1, 8192), (1, 131072), (4, 32768), (16, 16384), (64, 4096), (128, 8192), (64, RAGGED)]
HEADS = (16, 64, 128)
SM_SCALE = 192**-0.5  # DeepSeek's
LIMIT = 0.1  # an arm with a larger error is not timed; FlashMLA's e4m3 q and probabilities cost it 0.03 - 0.05
# a cache of less than ROTATE_BELOW bytes is copied until all copies have TOGETHER bytes, but at most MOST times
ROTATE_BELOW, TOGETHER, MOST = 160 << 20, 400 << 20, 48
REPLAYS = 5  # timed replays in a round, after one that is not timed
ENOUGH_US = 2000  # microseconds of calls that one graph should have
LAYERS = 61  # layers of DeepSeek-V3, for the time of a whole step

Case = types.SimpleNamespace
Load = Callable[["Path | None"], Arms]


def make_case(lens: list[int], heads: int, caches: list[torch.Tensor]) -> Case:
    """Requests whose pages lie at random places of a pool [slots, 1, 576].

    q comes in two parts, as DeepSeek's models pass it to a backend. The first part is the transposed result of a
    batched product, so it is not contiguous.
    """
    batch, slots = len(lens), caches[0].shape[0]
    pages = torch.randperm(slots // PAGE, device=DEVICE, dtype=torch.int32)[: sum(lens) // PAGE]
    table = torch.zeros(batch, max(lens) // PAGE, device=DEVICE, dtype=torch.int32)
    parts = pages.split([n // PAGE for n in lens])
    for row, part in zip(table, parts, strict=True):
        row[: len(part)] = part
    nope = torch.randn(heads, batch, 512, device=DEVICE, dtype=BF16).transpose(0, 1)
    rope = torch.randn(batch, heads, 192, device=DEVICE, dtype=BF16)[..., 128:]
    within = torch.arange(PAGE, device=DEVICE, dtype=torch.int32)
    case = Case(
        batch=batch, heads=heads, lens=lens, caches=caches, table=table, pair=(nope, rope),
        q=torch.cat((nope, rope), -1), slots=(table[:, :, None] * PAGE + within).reshape(batch, -1),
        ids=(pages[:, None] * PAGE + within).flatten(),
        indptr=torch.tensor([0, *lens], device=DEVICE).cumsum(0, dtype=torch.int32),
        keys=torch.tensor(lens, device=DEVICE, dtype=torch.int32), picks=peers.pick(batch, 4),
        bytes=sum(lens) * 576 * caches[0].itemsize, flops=2 * sum(lens) * heads * (576 + 512),
    )  # fmt: skip
    picked = [case.ids[case.indptr[b] : case.indptr[b + 1]] for b in case.picks]
    bounds = torch.tensor([0, *map(len, picked)]).cumsum(0)
    case.want = mla_decode_ref(case.q[case.picks], caches[0], bounds, torch.cat(picked), sm_scale=SM_SCALE)
    return case


def reads(case: Case, attend: Callable[[torch.Tensor], Any]) -> Call:
    """A call of ``attend(cache)``. Without an argument it reads the first cache of the case."""
    return lambda cache=case.caches[0]: attend(cache)


def new_out(case: Case) -> torch.Tensor:
    return torch.full((case.batch, case.heads, 512), math.nan, device=DEVICE, dtype=BF16)


def ours_by_slots(case: Case) -> Call:
    out = new_out(case)
    return reads(case, lambda kv: (mla_decode(case.pair, kv, out, case.indptr, case.ids, sm_scale=SM_SCALE),))


def ours_by_pages(size: int) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        out, table = new_out(case), case.table if size == PAGE else case.slots
        attend = mla_decode_paged
        return reads(
            case, lambda kv: (attend(case.pair, kv.view(-1, size, 576), out, table, case.keys, sm_scale=SM_SCALE),)
        )

    return make


def conversion(case: Case) -> Call:
    """The conversion of an 8-bit pool that the backends of FlashAttention-3 and FlashInfer make before they attend."""
    return reads(case, lambda kv: kv.to(BF16))


def converted(make: Callable[[Case], Call]) -> Callable[[Case], Call]:
    """An arm for bfloat16 caches, with the conversion of the whole pool before it."""

    def make_(case: Case) -> Call:
        call = make(case)
        return reads(case, lambda kv: call(kv.to(BF16)))

    return make_


def flash_attention_3(folder: Path | None) -> Arms:
    reasons = []
    for name in ("flash_ops", "sgl_kernel.flash_ops"):
        try:
            importlib.import_module(name)
            break
        except ImportError as problem:
            reasons.append(str(problem))
    else:
        raise ImportError("; ".join(reasons))
    forward = torch.ops.sgl_kernel.fwd.default
    names = [argument.name for argument in forward._schema.arguments]  # releases of sglang-kernel add to them

    def make(case: Case) -> Call:
        nope, rope = case.pair
        starts = torch.arange(case.batch + 1, device=DEVICE, dtype=torch.int32)
        given = {
            "q": rope, "q_v": nope, "cu_seqlens_q": starts, "seqused_k": case.keys, "max_seqlen_q": 1,
            "page_table": case.slots, "softmax_scale": SM_SCALE, "is_causal": True, "window_size_left": -1,
            "window_size_right": -1, "attention_chunk": 0, "softcap": 0.0, "is_rotary_interleaved": True,
            "num_splits": 0, "sm_margin": 0, "only_qv": False,
        }  # fmt: skip

        def attend(kv: torch.Tensor) -> Any:
            row = kv.view(-1, 1, 1, 576)
            here = given | {"k": row[..., 512:], "v": row[..., :512]}
            return forward(*[here.get(name) for name in names])

        return reads(case, attend)

    return {"FlashAttention-3": make}


def flash_mla(folder: Path | None) -> Arms:
    module = peers.package("flash_mla")
    decode = before_v41(module.flash_mla_with_kvcache)

    def bf16(case: Case) -> Call:
        meta, q = module.get_mla_metadata()[0], case.q[:, None]

        def attend(kv: torch.Tensor) -> tuple[torch.Tensor]:
            pages = kv.view(-1, PAGE, 1, 576)
            out, _ = decode(q, pages, case.table, case.keys, 512, meta, None, softmax_scale=SM_SCALE, causal=True)
            return (out[:, 0],)

        return reads(case, attend)

    def fp8(case: Case) -> Call:
        meta, one = module.get_mla_metadata()[0], torch.ones(1, device=DEVICE)
        schedule = before_v41(module.get_mla_decoding_metadata)
        meta.tile_scheduler_metadata, meta.num_splits = schedule(case.keys, case.heads, 1, is_fp8_kvcache=True)

        def attend(kv: torch.Tensor) -> tuple[torch.Tensor]:
            q, pages = case.q[:, None].to(E4M3), kv.view(-1, PAGE, 1, 576)
            out, _ = decode(
                q, pages, case.table, case.keys, 512, meta, None, softmax_scale=SM_SCALE, causal=True,
                is_fp8_kvcache=True, descale_q=one, descale_k=one,
            )  # fmt: skip
            return (out[:, 0],)

        return reads(case, attend)

    return {"FlashMLA": bf16, "FlashMLA fp8": fp8}


def flashinfer(folder: Path | None) -> Arms:
    if folder is None or not (folder / "flashinfer_mla.so").exists():
        raise RuntimeError("no flashinfer_mla.so in --peers")
    ffi = peers.package("tvm_ffi")
    module = ffi.load_module(str(folder / "flashinfer_mla.so"))

    def make(case: Case) -> Call:
        floats, ints = (torch.empty(mib << 20, dtype=torch.uint8, device=DEVICE) for mib in (128, 8))
        pinned = torch.empty(8 << 20, dtype=torch.uint8, pin_memory=DEVICE == "cuda")
        starts = torch.arange(case.batch + 1, dtype=torch.int32)
        indptr, lens = case.indptr.cpu(), torch.tensor(case.lens, dtype=torch.int32)
        plan, staged = module.plan(floats, ints, pinned, starts, indptr, lens, case.heads, 512, False)
        ints[:staged].copy_(pinned[:staged])
        (nope, rope), out = case.pair, new_out(case)

        def attend(kv: torch.Tensor) -> tuple[torch.Tensor]:
            row = kv.view(-1, 1, 576)
            with ffi.use_torch_stream():
                module.run(
                    floats, ints, plan, nope, rope, row[..., :512], row[..., 512:], case.ids, out, None, 0, case.heads,
                    1, SM_SCALE, False, 1.0, 1.0, None,
                )  # fmt: skip
            return (out,)

        return reads(case, attend)

    return {"FlashInfer": make}


LOADERS: dict[str, Load] = {
    "FlashAttention-3": flash_attention_3,
    "FlashInfer": flashinfer,
    "FlashMLA": flash_mla,
}
OURS: Arms = {"ours, slots": ours_by_slots, **{f"ours, pages of {n}": ours_by_pages(n) for n in (1, PAGE)}}


def find_peers(folder: Path | None) -> tuple[Arms, dict[str, str]]:
    """The arms of the peers that can be loaded, and the reasons why the others cannot."""
    if folder:
        sys.path.insert(0, str(folder.resolve()))
    found: Arms = {}
    missing = {}
    for name, load in LOADERS.items():
        try:
            found |= load(folder)
        except Exception as problem:
            missing[name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:160]
    return found, missing


def arms_of(part: str, found: Arms, only: list[str]) -> Arms:
    """The arms of a part, in the order of the table's columns; only those with a text of ``only`` in their names."""
    if part == "fp8":
        through = {name: converted(found[name]) for name in ("FlashAttention-3", "FlashInfer") if name in found}
        arms = {"conversion": conversion, **through, **{k: v for k, v in found.items() if k == "FlashMLA fp8"}, **OURS}
    else:
        arms = {name: make for name, make in found.items() if name != "FlashMLA fp8"} | OURS
    return {name: make for name, make in arms.items() if any(text in name for text in only)}


def error(case: Case, result: Any) -> float:
    """The error of an output (see `peers.error`), or the largest difference of a converted pool from the stored one."""
    if isinstance(result, torch.Tensor):
        rows = case.ids[:: max(1, len(case.ids) // 4096)].long()
        return float((result[rows].double() - case.caches[0][rows].double()).abs().max())
    return peers.error(case, result)


def captured(call: Call, caches: list[torch.Tensor]) -> tuple[Call, int]:
    """``(replay, count)`` of a CUDA graph of ``count`` calls, which read the caches in turn. Interpreted: one call."""
    if interpreted():
        return call, 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(caches[-1])
    torch.cuda.current_stream().wait_stream(stream)
    count = len(caches) * math.ceil(min(64, ENOUGH_US / elapsed_us(call)) / len(caches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for cache in itertools.islice(itertools.cycle(caches), count):
            call(cache)
    return graph.replay, count


def elapsed_us(launch: Call) -> float:
    if interpreted():
        start = time.perf_counter()
        launch()
        return (time.perf_counter() - start) * 1e6
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    launch()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def measure(case: Case, arms: Arms, rounds: int) -> dict[str, dict[str, Any]]:
    """For every arm, its error and the median microseconds of every round, or the reason why it is refused."""
    ready, table = peers.checked(case, arms, error, LIMIT)
    graphs = {}
    for name, call in ready.items():
        try:
            graphs[name] = captured(call, case.caches)
        except Exception as problem:
            table[name] = {"refused": f"not captured: {type(problem).__name__}: {problem}".splitlines()[0][:160]}
            torch.cuda.synchronize()
    order = list(graphs.items())
    for turn in range(rounds if order else 0):
        first = turn % len(order)
        for name, (replay, count) in order[first:] + order[:first]:
            replay()
            table[name]["us"].append(statistics.median(elapsed_us(replay) / count for _ in range(REPLAYS)))
    return table


def prepare(
    caches: list[torch.Tensor], copies: int, dtype: torch.dtype, slots: int, lens: list[int], heads: int
) -> Case:
    """A case over ``caches``. The first case of those that share the list fills it."""
    if not caches:
        caches += (torch.randn(slots, 1, 576, device=DEVICE, dtype=BF16).to(dtype) for _ in range(copies))
    return make_case(lens, heads, caches)


def fp8_cases(args: Any) -> Iterator[tuple[dict[str, Any], Callable[[], Case]]]:
    """``(description, make)`` of every case: the keys of its row, and the function that makes it."""
    for slots in args.pools:
        caches: list[torch.Tensor] = []
        for requests, heads in itertools.product(args.requests, args.heads):
            tokens = min(TOKENS, slots // requests // PAGE * PAGE)
            make = functools.partial(prepare, caches, 1, E4M3, slots, [tokens] * requests, heads)
            yield {"pool": slots, "requests": requests, "tokens": tokens, "heads": heads}, make


def bf16_cases(args: Any) -> Iterator[tuple[dict[str, Any], Callable[[], Case]]]:
    for requests, tokens in args.shapes:
        lens = [LONG, *[SHORT] * (requests - 1)] if tokens == RAGGED else [tokens] * requests
        caches: list[torch.Tensor] = []
        size = sum(lens) * 576 * BF16.itemsize
        copies = max(1, min(MOST, -(-TOGETHER // size))) if size < ROTATE_BELOW else 1
        for heads in args.heads:
            make = functools.partial(prepare, caches, copies, BF16, sum(lens), lens, heads)
            yield {"requests": requests, "tokens": tokens, "heads": heads}, make


PARTS = {"fp8": fp8_cases, "bf16": bf16_cases}


def title_of(said: dict[str, Any]) -> str:
    pool = f"{said['pool']:>8} " if "pool" in said else ""
    return f"{pool}{said['requests']:>4} x {said['tokens']:<6} {said['heads']:>3}"


def median_of(arm: dict[str, Any]) -> float:
    return statistics.median(arm["us"]) if arm.get("us") else math.nan


def line_of(said: dict[str, Any], table: dict[str, dict[str, Any]], arms: Arms) -> str:
    cells = [f"{us:{len(name)}.{1 if us < 1000 else 0}f}" for name in arms for us in [median_of(table[name])]]
    return " | ".join([title_of(said), *cells])


def summary(part: str, rows: list[dict[str, Any]], arms: Arms) -> Iterator[str]:
    """For each arm: the largest error and spread, and why it was refused; for fp8, also the time of a whole step."""
    for name in arms:
        results = [row["arms"][name] for row in rows]
        timed = [arm for arm in results if arm.get("us")]
        if timed:
            spread = max((max(arm["us"]) - min(arm["us"])) / median_of(arm) for arm in timed)
            worst = max(arm["error"] for arm in timed)
            slowest = max(map(median_of, timed))
            step = f", at most {slowest * LAYERS / 1e3:.1f} ms a step of {LAYERS} layers" if part == "fp8" else ""
            yield f"  {name}: error at most {worst:.4f}, spread at most {spread:.0%}{step}"
        for reason in sorted({arm["refused"] for arm in results if "refused" in arm}):
            count = sum(arm.get("refused") == reason for arm in results)
            yield f"  {name}: {count} of {len(results)} refused: {reason}"


def copy_gb_per_s() -> float | None:
    """GB/s of a plain copy, counting reads and writes: what the GB/s of an arm can be compared with."""
    if interpreted():
        return None
    source = torch.empty(2**30, dtype=BF16, device=DEVICE).normal_()
    target = torch.empty_like(source)
    replay, count = captured(lambda cache=None: target.copy_(source), [source])
    took = [elapsed_us(replay) / count for _ in range(9)]
    return round(2 * source.nbytes / statistics.median(took) / 1e3)


def shape(text: str) -> tuple[int, int | str]:
    batch, _, tokens = text.partition("x")
    if batch.isdigit() and int(batch) and tokens == RAGGED:
        return int(batch), RAGGED
    if not (batch.isdigit() and tokens.isdigit() and int(batch) and int(tokens) and int(tokens) % PAGE == 0):
        raise argparse.ArgumentTypeError(f"{text!r}: requests x tokens, tokens a multiple of {PAGE}, or 64x{RAGGED}")
    return int(batch), int(tokens)


def pool(text: str) -> int:
    if not text.isdigit() or not int(text) or int(text) % PAGE:
        raise argparse.ArgumentTypeError(f"{text!r}: slots, a multiple of {PAGE}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="fp8|bf16", help="default: both")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where peers are that are not installed")
    parser.add_argument("--pools", nargs="+", type=pool, default=POOLS, help="fp8: slots of a pool")
    parser.add_argument("--requests", nargs="+", type=int, default=REQUESTS, help="fp8")
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, help="bf16: requests x tokens")
    parser.add_argument("--heads", nargs="+", type=int, default=HEADS)
    parser.add_argument("--arms", nargs="+", default=[""], metavar="TEXT", help="those with one of these in the name")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--list", action="store_true", help="which peers, arms and cases there are; needs no GPU")
    args = parser.parse_args()
    parts = args.parts or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no part {unknown[0]!r}: expected {', '.join(PARTS)}")
    if "fp8" in parts and min(args.pools) < PAGE * max(args.requests):
        parser.error(
            f"a pool of {min(args.pools)} slots has no page of {PAGE} for each of {max(args.requests)} requests"
        )
    found, missing = find_peers(args.peers)
    for name in LOADERS:
        print(f"{name}: {missing.get(name, 'found')}")
    if args.list:
        for part in parts:
            print(f"{part}: {', '.join(arms_of(part, found, args.arms))}")
            print(*(f"  {title_of(said)}" for said, _ in PARTS[part](args)), sep="\n")
        return
    torch.manual_seed(0)
    about = peers.versions() | {"rounds": args.rounds, "copy_gb_per_s": copy_gb_per_s(), "missing": missing}
    print(*(f"{name} {value}" for name, value in about.items() if name != "missing"), sep=", ", flush=True)
    kept: list[dict[str, Any]] = []
    for part in parts:
        arms, start = arms_of(part, found, args.arms), time.perf_counter()
        blank = "    pool requests heads" if part == "fp8" else "requests   heads"
        print(f"{part}, us a layer\n" + " | ".join([blank, *arms]), flush=True)
        rows = []
        for said, make in PARTS[part](args):
            case = make()
            table = measure(case, arms, args.rounds)
            rows.append({"part": part, **said, "bytes": case.bytes, "flops": case.flops, "arms": table})
            print(line_of(said, table, arms), flush=True)
            del case
            if args.json:
                args.json.write_text(json.dumps(about | {"rows": kept + rows}, indent=1))
        kept += rows
        print(*summary(part, rows, arms), f"  {time.perf_counter() - start:.0f} s", sep="\n", flush=True)


if __name__ == "__main__":
    main()
