"""Compares our sparse prefill with FlashMLA's on the same tensors in one process: each kernel, and the whole path.

    python bench/sparse_prefill.py [SECTION ...] [--match TEXT ...] [--provider NAME ...] [--heads N] [--sweep]
                                   [--rounds N] [--rep MS] [--json OUT] [--device cpu]

    attention     the attention kernel over a workspace
    dequantise    fp8 tokens to bfloat16, and a plain copy of as many bytes
    indices       the kernels that build indices, for 4096 queries
    path          from the fp8 cache to the output, for chunks of a prefill:
                      all        dequantise every token of the context, then attend; "by sglang" uses the dequantiser of
                                 an installed SGLang 0.5.23 or later
                      pages      attend directly to the pages, as the provider's decode kernel does
                  "share" is the fraction of the context from which the chunk's indices are drawn: all of it, or a part,
                  as of an indexer that prefers few tokens

Without a section, all of them run. ``--match`` selects cases: `path --match "V3.2" --match "chunk 2048" --match "share
1"` runs the cases whose titles contain all three texts. ``--provider`` names the package that attends over a workspace:
ours, flash_mla, sgl_kernel.flash_mla. If one is missing or refuses a case, the reason is printed. ``--sweep`` tries our
launch numbers and no peers. ``--device cpu`` with TRITON_INTERPRET=1 runs cases so small that their times mean nothing.

Every arm is first checked: attention against a float64 reference (at most eight queries including the first and the
last; the results of all others must be finite), everything else exactly. Then the arms of a case take turns at
CUDA-graph replay, and the medians are reported.

`sparse_prefill` is an arm for an external script that measures it together with its peers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # peers: this file may be loaded by its path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without an install

import peers
from peers import Call

from mla_patch.compat.sglang.flash_mla import before_v41
from mla_patch.compat.sglang.v4_chunk import most_queries
from mla_patch.compat.triton import interpreted
from mla_patch.kernels.cache.dequantize import dequantize, dequantize_config, dequantize_ref
from mla_patch.kernels.cache.layouts import V4, V32, Layout, new_pages
from mla_patch.kernels.cache.quantize import quantize
from mla_patch.kernels.indices.prefill import (
    build_swa_token_ids,
    build_swa_token_ids_ref,
    combine_topk_swa_indices,
    combine_topk_swa_indices_ref,
)
from mla_patch.kernels.sparse import mla_sparse_prefill, mla_sparse_prefill_ref, sparse_decode, sparse_decode_ref
from mla_patch.kernels.sparse.config import sparse_prefill_config

DEVICE = "cuda"
PROVIDERS = ("ours", "flash_mla", "sgl_kernel.flash_mla")
# V4: a query attends to its WINDOW most recent tokens, and to the top COMPRESSED of the context's compressed tokens,
# each of which stands for RATIO tokens
WINDOW, RATIO, COMPRESSED = 128, 4, 512
ALL_RATIO = 128  # the same ratio in V4's layers that attend to every compressed token
TOPK = 2048  # tokens that a query of V3.2 attends to
PAGE, WINDOW_PAGE = 64, 256

Case = SimpleNamespace
Cases = Iterator[
    tuple[str, Callable[[], Case]]
]  # title, and a function that makes the case, since memory holds only one


def sparse_prefill(case: Any) -> tuple[Call, Any]:
    """``(call, out)`` for the measuring script."""
    out = torch.full((*case.q.shape[:2], 512), float("nan"), device=case.q.device, dtype=case.q.dtype)
    return lambda: mla_sparse_prefill(case.q, case.kv, case.indices, case.sm_scale, out=out), out


def provider(name: str) -> Callable[..., Any]:
    """The function of a provider that attends over a workspace."""
    return mla_sparse_prefill if name == "ours" else before_v41(peers.package(name).flash_mla_sparse_fwd)


def tiny() -> bool:
    return DEVICE == "cpu"


def pick(case: Case) -> torch.Tensor:
    """Choose the queries of a case that are compared with the reference."""
    case.picks = peers.pick(len(case.q)).to(DEVICE)
    return case.picks


# attention


def attention_cases(args: argparse.Namespace) -> Cases:
    every = [(5, 50, 3, 20, 576), (4, 40, 17, 33, 512)]
    if not tiny():
        every = [
            (4096, 32768, 128, 2048, 576),
            (4096, 32768, 64, 2048, 576),
            (4096, 8192, 64, 640, 512),
            (4096, 131072, 128, 1152, 512),
            (4096, 32768, 16, 2048, 576),
        ]
    for queries, rows, heads, topk, width in every:
        title = f"attention queries {queries} rows {rows} heads {args.heads or heads} topk {topk} width {width}"
        yield title, lambda c=(queries, rows, args.heads or heads, topk, width): attention_case(*c)


def attention_case(queries: int, rows: int, heads: int, topk: int, width: int) -> Case:
    case = Case(
        q=torch.randn(queries, heads, width, device=DEVICE, dtype=torch.bfloat16),
        kv=torch.randn(rows, 1, width, device=DEVICE, dtype=torch.bfloat16),
        indices=torch.randint(0, rows, (queries, 1, topk), device=DEVICE, dtype=torch.int32),
        sm_scale=width**-0.5, flops=2 * queries * heads * topk * (width + 512),
        default=sparse_prefill_config(heads, peers.capability(), interpreted()),
    )  # fmt: skip
    picks = pick(case)
    case.want = mla_sparse_prefill_ref(case.q[picks], case.kv, case.indices[picks], case.sm_scale)[0]
    return case


def attention_arms(case: Case, args: argparse.Namespace) -> peers.Arms:
    def arm(name: str, **options: Any) -> Callable[[Case], Call]:
        def make(case: Case) -> Call:
            attend = provider(name)
            return lambda: attend(case.q, case.kv, case.indices, case.sm_scale, **options)

        return make

    if not args.sweep:
        return {name: arm(name) for name in args.provider}
    sweep = peers.configs(case.q.shape[1], (1, 2, 3, 5))
    return {"ours": arm("ours")} | {name: arm("ours", config=config) for name, config in sweep.items()}


# dequantise


def new_cache(layout: Layout, pages: int, page_size: int) -> torch.Tensor:
    """A pool with a random token in every slot."""
    cache = new_pages(layout, pages, page_size, DEVICE)
    for first in range(0, pages * page_size, 2**16):
        slots = torch.arange(first, min(first + 2**16, pages * page_size), device=DEVICE)
        quantize(torch.randn(len(slots), layout.width, device=DEVICE).clamp(-1, 1), cache, slots)
    return cache


def slots_of(table: torch.Tensor, page_size: int, tokens: int) -> torch.Tensor:
    """The slots of a context's tokens. ``table``: the context's pages."""
    return (table[:, None] * page_size + torch.arange(page_size, device=DEVICE)).flatten()[:tokens].int()


def dequantise_cases(args: argparse.Namespace) -> Cases:
    for layout, tokens in itertools.product((V32, V4), (128,) if tiny() else (8192, 131072, 1048576)):
        title = f"dequantise {layout.name} tokens {tokens}"
        yield title, lambda c=(layout, tokens): dequantise_case(*c)


def dequantise_case(layout: Layout, tokens: int) -> Case:
    pages = tokens // PAGE
    case = Case(cache=new_cache(layout, pages, PAGE))
    case.slots = slots_of(torch.randperm(pages, device=DEVICE), PAGE, tokens)
    case.out = torch.full((tokens, layout.width), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    case.bytes = tokens * (layout.bytes + 2 * layout.width)
    case.picks = torch.randint(0, tokens, (4096,), device=DEVICE)
    case.want = dequantize_ref(case.cache, case.slots[case.picks]).bfloat16()
    case.default = dequantize_config()
    return case


def dequantise_error(case: Case, result: torch.Tensor) -> float:
    if result is not case.out:  # the result of the plain copy
        return 0.0
    right = torch.equal(result[case.picks], case.want) and bool(torch.isfinite(result).all())
    result.fill_(float("nan"))  # so that the next arm cannot pass with these values
    return 0.0 if right else 1.0


def dequantise_arms(case: Case, args: argparse.Namespace) -> peers.Arms:
    def by_slots(case: Case, config: Any = None) -> Call:
        return lambda: dequantize(case.cache, case.slots, case.out, config=config)

    def copy(case: Case) -> Call:
        source = torch.ones(case.bytes // 2, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    arms: peers.Arms = {"slots": by_slots, "copy": copy}
    for tokens, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)) if args.sweep else ():
        config = {"TOKENS": tokens, "num_warps": warps}
        arms[f"slots, {tokens} tokens {warps} warps"] = lambda case, config=config: by_slots(case, config)
    return arms


# indices


def indices_cases(args: argparse.Namespace) -> Cases:
    queries = 12 if tiny() else 4096
    for topk in (8,) if tiny() else (512, 1024):
        yield f"indices combine queries {queries} topk {topk}", lambda topk=topk: combine_case(queries, topk)
    yield f"indices swa ids queries {queries}", lambda: swa_case(queries)


def ints(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def combine_case(queries: int, topk: int) -> Case:
    """A chunk of four requests, each with as many tokens before the chunk as in it."""
    requests, seq = 4, queries // 2
    count = queries // requests
    columns = seq // RATIO
    raw = torch.randint(-1, columns, (queries, topk), device=DEVICE, dtype=torch.int32)
    pos = ints([seq - count + i for _ in range(requests) for i in range(count)])
    starts = ints([count * r for r in range(requests + 1)])
    gather = min(seq, count + WINDOW - 1)
    lengths = (ints([seq] * requests), ints([gather] * requests))
    bases = (ints([columns * r for r in range(requests)]), ints([columns * requests + gather * r for r in range(4)]))
    numbers = (WINDOW, RATIO, topk)
    case = Case(call=lambda: combine_topk_swa_indices(raw, starts, *lengths, *bases, *numbers))
    ids, lens = case.call()
    case.call = lambda: combine_topk_swa_indices(
        raw, starts, *lengths, *bases, *numbers, out_indices=ids, out_lens=lens
    )
    case.bytes = 4 * (raw.numel() + ids.numel() + lens.numel())
    picks = peers.pick(queries)
    some = torch.bucketize(starts.cpu(), picks).int()
    inputs = [tensor.cpu() for tensor in (*lengths, *bases)]
    want = combine_topk_swa_indices_ref(raw.cpu()[picks], some, *inputs, *numbers, query_pos=pos.cpu()[picks])
    case.right = lambda result: (result[0].cpu()[picks].tolist(), result[1].cpu()[picks].tolist()) == want
    return case


def swa_case(queries: int) -> Case:
    requests, seq = 4, queries // 2
    count = queries // requests
    table = torch.randperm(requests * seq).int().view(requests, seq)
    swa = torch.randperm(requests * seq)
    vectors = [torch.tensor([n] * requests, dtype=torch.int32) for n in (seq, count)]
    inputs = [*vectors, torch.arange(requests, dtype=torch.int32), table, swa]
    total = requests * min(seq, count + WINDOW - 1)
    own = [tensor.to(DEVICE) for tensor in inputs]
    want = [list(part) for part in build_swa_token_ids_ref(*inputs, WINDOW)]
    return Case(
        call=lambda: build_swa_token_ids(*own, WINDOW, total), bytes=total * (4 + 8 + 4),
        right=lambda result: [part.tolist() for part in result] == want,
    )  # fmt: skip


def indices_error(case: Case, result: Any) -> float:
    return 0.0 if case.right(result) else 1.0


def indices_arms(case: Case, args: argparse.Namespace) -> peers.Arms:
    return {"ours": lambda case: case.call}


# the whole path


def path_cases(args: argparse.Namespace) -> Cases:
    chunks, contexts, shares = (2048, 4096, 8192, 16384), (8192, 32768, 131072), (1.0, 0.25)
    few = list(itertools.product((8192, 131072, 1048576), (16, 64, 256, 1024), (1.0,)))  # pages may be faster for these
    if tiny():
        chunks, contexts, shares, few = (4,), (256,), (0.25,), []
    every = [*few, *itertools.product(contexts, chunks, shares)]
    wanted = [(layout, *one, RATIO) for layout, one in itertools.product((V32, V4), every)]
    wanted += [(V4, *one, ALL_RATIO) for one in few]
    for layout, context, chunk, share, ratio in wanted:
        heads = args.heads or (3 if tiny() else 128 if layout is V32 else 64)
        if chunk <= context:
            title = f"path {layout.name} heads {heads} chunk {chunk} context {context} share {share:g}"
            title += f" ratio {ratio}" if ratio != RATIO else ""
            yield title, lambda c=(layout, heads, chunk, context, share, ratio): path_case(*c)


def drawn(seen: torch.Tensor, topk: int, share: float) -> torch.Tensor:
    """Indices [queries, topk] into the first ``share`` of the tokens that each query sees; -1 where topk is larger."""
    most = (seen * share).ceil()[:, None]
    ids = (torch.rand(len(seen), topk, device=DEVICE) * most).int().minimum(most.int() - 1)
    return torch.where(torch.arange(topk, device=DEVICE) < seen[:, None], ids, -1)


def through(ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Map tokens of a context to their slots. -1 stays -1."""
    return torch.where(ids >= 0, slots[ids.clamp(min=0).long()], -1)


def path_case(layout: Layout, heads: int, chunk: int, context: int, share: float, ratio: int) -> Case:
    """The last ``chunk`` tokens of one request of ``context`` tokens, in a pool twice as large."""
    case = Case(layout=layout, chunk=chunk, sm_scale=layout.width**-0.5, ratio=ratio)
    case.q = (torch.randn(chunk, heads, layout.width, device=DEVICE) / 4).bfloat16()
    pos = torch.arange(context - chunk, context, device=DEVICE)
    tokens, topk = (context, TOPK) if layout is V32 else (context // ratio, COMPRESSED)
    topk = tokens if ratio == ALL_RATIO else min(topk, tokens // 2) if tiny() else topk
    case.pages = -(-tokens // PAGE)
    case.cache = new_cache(layout, 2 * case.pages, PAGE)
    case.slots = slots_of(torch.randperm(2 * case.pages, device=DEVICE)[: case.pages], PAGE, tokens)
    seen = pos + 1 if layout is V32 else (pos + 1) // ratio
    case.raw = drawn(seen, topk, share).int()
    case.ids = through(case.raw, case.slots)[:, None]
    case.extra = {}
    if layout is V4:
        case.gather = min(context, chunk + WINDOW - 1)
        case.window_pages = -(-case.gather // WINDOW_PAGE)
        case.window = new_cache(V4, 2 * case.window_pages, WINDOW_PAGE)
        table = torch.randperm(2 * case.window_pages, device=DEVICE)[: case.window_pages]
        case.window_slots = slots_of(table, WINDOW_PAGE, case.gather)
        recent = pos[:, None] - WINDOW + 1 + torch.arange(WINDOW, device=DEVICE)
        recent = torch.where(recent >= 0, recent - (context - case.gather), -1).int()
        case.extra = {"extra_k_cache": case.window, "extra_indices": through(recent, case.window_slots)[:, None]}
        case.lengths = [ints([n]) for n in (context, case.gather, 0, tokens)]
        case.starts = ints([0, chunk])
    keys = topk + (WINDOW if layout is V4 else 0)
    case.flops = 2 * chunk * heads * keys * (layout.width + 512)
    picks = pick(case)
    extra = {name: value if name == "extra_k_cache" else value[picks] for name, value in case.extra.items()}
    queries = case.q[picks][:, None]  # each as a request of one token
    case.want = sparse_decode_ref(queries, case.cache, case.ids[picks], sm_scale=case.sm_scale, **extra)[0][:, 0]
    named = torch.unique(case.ids[case.ids >= 0] // PAGE).numel()
    case.default = f"{named} of {case.pages} pages named"
    return case


def workspace(case: Case) -> torch.Tensor:
    """A workspace for the context, of the same size for every arm: rows for the first cache, then for the second."""
    rows = case.pages * PAGE + (case.window_pages * WINDOW_PAGE if case.extra else 0)
    return torch.full((rows, 1, case.layout.width), float("nan"), dtype=torch.bfloat16, device=DEVICE)


def sglangs(cache: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """SGLang's dequantiser. For V3.2 it ignores ``out`` and returns a tensor of its own."""
    home = "sglang.kernels.ops.attention"
    if cache.shape[-1] == V32.bytes:
        read = peers.package(f"{home}.dsa.dequant_k_cache").dequantize_k_cache_paged_dsa
        return read(cache.view(torch.float8_e4m3fn), slots)[:, 0]
    read = peers.package(f"{home}.dsv4.dequant_k_cache").dequantize_k_cache_paged_dsv4
    pages = cache.as_strided((len(cache), cache.stride(0)), (cache.stride(0), 1))
    return read(pages, slots, cache.shape[1], out=out[:, None])[:, 0]


def all_tokens(name: str, dequantize: Callable[..., Any] = dequantize) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        attend, kv, tokens = provider(name), workspace(case), len(case.slots)

        def call() -> Any:
            rows = dequantize(case.cache, case.slots, kv[:tokens, 0])
            ids = case.raw
            if case.extra:
                dequantize(case.window, case.window_slots, kv[tokens : tokens + case.gather, 0])
                numbers = (WINDOW, case.ratio, case.raw.shape[1])
                ids, _ = combine_topk_swa_indices(case.raw, case.starts, *case.lengths, *numbers)
            return attend(case.q, kv if case.extra else rows[:, None], ids[:, None], case.sm_scale)

        return call

    return make


def over_pages(name: str) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        if name == "ours":
            return decoded(case)
        most = most_queries(case.q.device)
        if most is not None and case.chunk > most:
            raise RuntimeError(f"{case.chunk} queries, expected at most {most}, the most that its schedule takes")
        call = peers.over_pages(name, case.q[:, None], case.cache, case.ids, case.sm_scale, case.extra)
        return lambda: (call()[0][:, 0],)

    return make


def decoded(case: Case, config: dict[str, int] | None = None) -> Call:
    """Each query as a request of one token, by our decode kernel, which splits the keys.

    mla-patch serves few queries over pages this way on GPUs for which FlashMLA has no build.
    """
    options = {"sm_scale": case.sm_scale, "config": config, **case.extra}
    return lambda: (sparse_decode(case.q[:, None], case.cache, case.ids, **options)[0][:, 0],)


def path_arms(case: Case, args: argparse.Namespace) -> peers.Arms:
    arms: peers.Arms = {}
    if args.sweep:
        arms["pages"] = decoded
        for name, config in peers.configs(case.q.shape[1], (1, 2, 3)).items():
            arms[f"pages {name}"] = lambda case, config=config | {"PER_SM": 1}: decoded(case, config)
        return arms
    for name in args.provider:
        arms |= {f"all, {name}": all_tokens(name), f"pages, {name}": over_pages(name)}
    if "flash_mla" in args.provider:
        arms["all by sglang, flash_mla"] = all_tokens("flash_mla", sglangs)
    return arms


SECTIONS: dict[str, tuple[Any, Any, Any]] = {
    "attention": (attention_cases, attention_arms, peers.error),
    "dequantise": (dequantise_cases, dequantise_arms, dequantise_error),
    "indices": (indices_cases, indices_arms, indices_error),
    "path": (path_cases, path_arms, peers.error),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--match", action="append", default=[], help="only cases whose titles contain this; repeatable")
    parser.add_argument("--provider", action="append", choices=PROVIDERS, help="default: all; repeatable")
    parser.add_argument("--heads", type=int, help="in place of each case's own")
    parser.add_argument("--sweep", action="store_true", help="our launch numbers instead of peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=40, help="milliseconds of replay per figure")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.provider = args.provider or list(PROVIDERS)
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}: expected {', '.join(SECTIONS)}")
    if (args.device == "cpu") != interpreted():
        parser.error("--device cpu and TRITON_INTERPRET=1 go together")
    global DEVICE
    DEVICE = args.device
    versions = peers.versions()
    print(*versions.values())
    torch.manual_seed(0)
    rows = []
    for section in args.sections or SECTIONS:
        cases, arms, error = SECTIONS[section]
        for title, make in cases(args):
            if not all(text in title for text in args.match):
                continue
            case = make()
            table = peers.measure(case, arms(case, args), args.rounds, args.rep, error)
            heading = f"{title}   {case.default}" if hasattr(case, "default") else title
            rows.append(peers.show(heading, case, table))
            del case, make
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
    if not rows:
        parser.error("no case has all that --match wants")
    if args.json:
        args.json.write_text(json.dumps(versions | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
