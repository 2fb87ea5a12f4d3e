"""Which pages of a cache a chunk's indices name, and where their tokens lie in a workspace of nothing else.

    indices        [Sq, 1, topk]    int32, slots: page * ps + token; outside the cache is no key
    topk_length    [Sq]             int32, int64 or None: only the first so many indices of a query count
    rows           [Sq, 1, topk]    int32, rows of the workspace instead of slots; -1 where there is no key
    named          [capacity]       int32, the pages that are named, ascending; what lies past count is not written
    count          [1]              int32, how many pages are named: more than capacity is an overflow

    row = base + n * ps + token     n named pages come before the index's

`mla_patch.kernels.cache.dequantize.dequantize_pages` fills such a workspace, and sparse prefill attends to its rows:

    rows, named, count = name_pages(indices, len(cache), cache.shape[1], capacity)
    dequantize_pages(cache, named, count, kv)    # kv [capacity * ps, 1, 576 or 512]
    out, max_logits, lse = mla_sparse_prefill(q, kv, rows, sm_scale)

A second cache has its own part of kv, which ``base`` tells. Pages may be of any size: V3.2's tokens may be named one by
one, as pages of 1.

Four small launches: marks in an array of all pages, marks a block of pages has, numbers, rows. Whatever the order in
which programs run, the numbers are the same. Past the capacity pages have no place and their tokens no row, so that an
overflow stays within the workspace but loses keys; count says so on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mla_patch.compat import gpu
from mla_patch.compat.compiles import COMPILES
from mla_patch.compat.triton import CompileCase, interpreted, watch_compiles
from mla_patch.kernels.cache.layouts import told

_INTERPRETED = interpreted()


def named_config() -> dict[str, int]:
    """Launch numbers: BLOCK indices or pages at a time."""
    return {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def _keys(lens, s, topk):
    """How many indices of a query count."""
    keys = topk
    if lens is not None:
        keys = tl.minimum(tl.maximum(tl.load(lens + s), 0), topk).to(tl.int32)
    return keys


_CHANGING = ["slots_end", "topk", "ids_s"]
_CALL_ARGS = ["ids", "lens"]


@triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_CALL_ARGS)
def _mark_kernel(places, ids, lens, slots_end, topk, ids_s, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """One query: 1 for every page that it names."""
    s = tl.program_id(0).to(tl.int64)
    keys = _keys(lens, s, topk)
    for begin in range(0, keys, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        slot = tl.load(ids + s * ids_s + j, mask=j < keys, other=-1)
        known = (slot >= 0) & (slot < slots_end)
        place = places + tl.where(known, slot, 0) // PAGE
        # most pages are marked already, and reading is cheaper than writing one line from every program
        marked = tl.load(place, mask=known, other=1)
        tl.store(place, 1, mask=known & (marked == 0))


@triton.jit(do_not_specialize=["pages"])
def _count_kernel(counts, places, pages, BLOCK: tl.constexpr):
    """How many of a block's pages are marked."""
    page = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts + tl.program_id(0), tl.sum(tl.load(places + page, mask=page < pages, other=0), 0))


@triton.jit(do_not_specialize=["pages", "capacity"])
def _number_kernel(named, count, places, counts, pages, capacity, BLOCK: tl.constexpr):
    """A block's pages, from marks to numbers, or to -1. Every program adds up the blocks before it."""
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = 0
    top = 0
    while top < block:
        before += tl.sum(tl.load(counts + top + lane, mask=top + lane < block, other=0), 0)
        top += BLOCK
    page = block * BLOCK + lane
    marked = tl.load(places + page, mask=page < pages, other=0)
    number = before + tl.cumsum(marked, 0) - marked
    kept = (marked > 0) & (number < capacity)
    tl.store(named + number, page, mask=kept)
    tl.store(places + page, tl.where(kept, number, -1), mask=page < pages)
    if block == tl.num_programs(0) - 1:
        tl.store(count, before + tl.sum(marked, 0))


@triton.jit(do_not_specialize=[*_CHANGING, "base", "rows_s"], do_not_specialize_on_alignment=[*_CALL_ARGS, "rows"])
def _rows_kernel(
    rows, ids, lens, places, slots_end, topk, ids_s, rows_s, base, PAGE: tl.constexpr, BLOCK: tl.constexpr
):
    """One query: where the tokens that it names lie."""
    s = tl.program_id(0).to(tl.int64)
    keys = _keys(lens, s, topk)
    for begin in range(0, topk, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        slot = tl.load(ids + s * ids_s + j, mask=j < keys, other=-1)
        known = (slot >= 0) & (slot < slots_end)
        slot = tl.where(known, slot, 0)
        number = tl.load(places + slot // PAGE, mask=known, other=-1)
        row = tl.where(number >= 0, base + number * PAGE + slot % PAGE, -1)
        tl.store(rows + s * rows_s + j, row, mask=j < topk)


def name_pages(
    indices: torch.Tensor,
    pages: int,
    page_size: int,
    capacity: int,
    *,
    topk_length: torch.Tensor | None = None,
    base: int = 0,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages that indices into a cache of ``pages`` name, and rows in place of slots; see the module.

    Returns ``rows, named, count``. ``out`` is where rows go, perhaps a part of wider lists; whole rows are written. No
    capacity of `most_pages` or more overflows. Without sync; results and scratch come from torch's allocator at every
    call, so a captured graph has them in its pool. No queries: count is 0.

    Raises:
        ValueError: a tensor's type, shape, layout or device, a number out of range, or a workspace whose rows int32
            cannot name.
    """
    device = indices.device
    if not indices.is_cuda and not _INTERPRETED:
        raise ValueError(f"indices: on {device}, expected a CUDA device (or TRITON_INTERPRET=1 at import)")
    _check_ids("indices", indices, None)
    queries, _, topk = indices.shape
    if topk_length is not None and (
        topk_length.dtype not in (torch.int32, torch.int64)
        or topk_length.shape != (queries,)
        or not topk_length.is_contiguous()
    ):
        raise ValueError(f"topk_length: {told(topk_length)}, expected int32 or int64, [{queries}], contiguous")
    for name, number, least in (("pages", pages, 0), ("page_size", page_size, 1), ("capacity", capacity, 0)):
        if number < least:
            raise ValueError(f"{name}: {number}, expected {least} or more")
    if base < 0:
        raise ValueError(f"base: {base}, expected 0 or more")
    if pages * page_size >= 2**31:
        raise ValueError(f"pages: {pages} of {page_size} tokens, expected less than 2**31 tokens, as indices are int32")
    # places past the cache's pages are never taken
    end = base + min(capacity, pages) * page_size
    if end > 2**31:
        raise ValueError(f"base and capacity: {end} rows, expected at most 2**31, which is all that int32 indices name")
    if out is not None:
        _check_ids("out", out, tuple(indices.shape))
    for name, tensor in (("topk_length", topk_length), ("out", out)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: on {tensor.device}, expected {device} as indices")
    if gpu.elsewhere(indices):
        with torch.cuda.device(device):
            return name_pages(indices, pages, page_size, capacity, topk_length=topk_length, base=base, out=out)
    rows = torch.empty(queries, 1, topk, dtype=torch.int32, device=device) if out is None else out
    config = named_config()
    blocks = max(1, -(-pages // config["BLOCK"]))
    places = torch.zeros(pages, dtype=torch.int32, device=device)
    counts = torch.empty(blocks, dtype=torch.int32, device=device)
    named = torch.empty(capacity, dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    slots_end = pages * page_size
    if queries:
        _mark_kernel[(queries,)](
            places, indices, topk_length, slots_end, topk, indices.stride(0), PAGE=page_size, **config
        )
    _count_kernel[(blocks,)](counts, places, pages, **config)
    _number_kernel[(blocks,)](named, count, places, counts, pages, capacity, **config)
    if queries:
        _rows_kernel[(queries,)](
            rows, indices, topk_length, places, slots_end, topk, indices.stride(0), rows.stride(0), base,
            PAGE=page_size, **config,
        )  # fmt: skip
    return rows, named, count


def most_pages(pages: int, queries: int, topk: int) -> int:
    """How many pages of a cache the indices of a chunk can name: a capacity that never overflows."""
    return min(pages, queries * topk)


def name_pages_ref(
    indices: torch.Tensor,
    pages: int,
    page_size: int,
    capacity: int,
    *,
    topk_length: torch.Tensor | None = None,
    base: int = 0,
) -> tuple[list[list[list[int]]], list[int], int]:
    """The definition, index by index: rows, the named pages that have a place, and how many are named."""
    known = []
    for s, slots in enumerate(indices[:, 0].tolist()):
        keys = len(slots) if topk_length is None else int(topk_length[s])
        known.append([slot if j < keys and 0 <= slot < pages * page_size else None for j, slot in enumerate(slots)])
    every = sorted({slot // page_size for slots in known for slot in slots if slot is not None})
    places = {page: number for number, page in enumerate(every[:capacity])}

    def row(slot: int | None) -> int:
        if slot is None or slot // page_size not in places:
            return -1
        return base + places[slot // page_size] * page_size + slot % page_size

    return [[[row(slot) for slot in slots]] for slots in known], every[:capacity], len(every)


def _check_ids(name: str, ids: torch.Tensor, shape: tuple[int, ...] | None) -> None:
    if ids.dtype is not torch.int32 or ids.dim() != 3 or ids.shape[1] != 1 or (shape and tuple(ids.shape) != shape):
        raise ValueError(f"{name}: {told(ids)}, expected torch.int32, {list(shape) if shape else '[Sq, 1, topk]'}")
    if ids.shape[2] > 1 and ids.stride(2) != 1:
        raise ValueError(f"{name}: {told(ids)}, expected the last contiguous")


def compile_cases(every: bool = False) -> list[CompileCase]:
    """All four kernels, with lengths and without; page sizes differ by a constant alone."""
    cases = []
    config = named_config()
    block, warps = {"BLOCK": config["BLOCK"]}, config["num_warps"]
    for page, lens in ((64, None), (61, "*i64")):
        signature = {"places": "*i32", "ids": "*i32"} | dict.fromkeys(_CHANGING, "i32")
        signature |= {"lens": lens} if lens else {}
        constants = block | {"PAGE": page} | ({} if lens else {"lens": None})
        what = f"{page} {lens or 'no lengths'}"
        name = f"named_pages mark {what}"
        cases.append(CompileCase(name, _mark_kernel, signature, constants, ("places",), num_warps=warps))
        signature = signature | {"rows": "*i32", "rows_s": "i32", "base": "i32"}
        name = f"named_pages rows {what}"
        cases.append(CompileCase(name, _rows_kernel, signature, constants, ("places",), num_warps=warps))
    signature = {"counts": "*i32", "places": "*i32", "pages": "i32"}
    aligned: tuple[str, ...] = ("counts", "places")
    cases.append(CompileCase("named_pages count", _count_kernel, signature, block, aligned, num_warps=warps))
    signature = signature | {"named": "*i32", "count": "*i32", "capacity": "i32"}
    aligned += ("named", "count")
    cases.append(CompileCase("named_pages number", _number_kernel, signature, block, aligned, num_warps=warps))
    return cases


def warmup(device: torch.device | str, page_sizes: tuple[int, ...]) -> int:
    """Compile what naming pages of these sizes can reach, without lengths and with int32 ones; how many kernels that
    took. Real launches over one index. Nothing to do on a CPU."""
    one = torch.ones(1, dtype=torch.int32, device=device)
    if not one.is_cuda and not _INTERPRETED:
        return 0
    before = COMPILES.total
    with COMPILES.warming():
        for size in page_sizes:
            for lens in (None, one):
                name_pages(one.view(1, 1, 1), 1, size, 1, topk_length=lens)
    return COMPILES.total - before


watch_compiles(_mark_kernel, _count_kernel, _number_kernel, _rows_kernel)
