"""Device code of sparse prefill's indices: the window's slots, and the rows that combine it with compressed tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from mla_patch.compat.triton import watch_compiles


@triton.jit
def _gathered(seq_lens, extend_lens, row, mask, window):
    """Tokens in the windows of a request's queries, together."""
    seq = tl.load(seq_lens + row, mask=mask, other=0)
    extend = tl.load(extend_lens + row, mask=mask, other=0)
    return tl.maximum(tl.minimum(seq, tl.maximum(extend, 0) + window - 1), 0)


_SWA_ARGS = ["ids", "first", "gather", "offsets", "seq_lens", "extend_lens", "req_pool", "req_to_token", "full_to_swa"]


@triton.jit(
    do_not_specialize=["rows", "total", "window", "slots_end", "stride"], do_not_specialize_on_alignment=_SWA_ARGS
)
def _swa_kernel(
    ids,
    first,
    gather,
    offsets,
    seq_lens,
    extend_lens,
    req_pool,
    req_to_token,
    full_to_swa,
    rows,
    total,
    window,
    slots_end,
    stride,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A share of one request's window. Every program adds up the requests before it: a scan would be a launch more."""
    row = tl.program_id(0)
    lane = tl.arange(0, ROWS)
    begin = 0
    top = 0
    while top < row:
        begin += tl.sum(_gathered(seq_lens, extend_lens, top + lane, top + lane < row, window), 0)
        top += ROWS
    count = _gathered(seq_lens, extend_lens, row, row < rows, window)
    start = tl.load(seq_lens + row) - count
    if tl.program_id(1) == 0:
        tl.store(first + row, start)
        tl.store(gather + row, count)
        tl.store(offsets + row, begin)
        if row == rows - 1:
            tl.store(offsets + rows, begin + count)
    # ids may be longer than what is gathered: the last request also writes the rest
    span = tl.where(row == rows - 1, total - begin, tl.minimum(count, total - begin))
    source = req_to_token + tl.load(req_pool + row).to(tl.int64) * stride + start
    done = tl.program_id(1).to(tl.int64) * BLOCK
    while done < span:
        i = done + tl.arange(0, BLOCK)
        slot = tl.load(source + i, mask=(i < span) & (i < count), other=-1)
        known = (slot >= 0) & (slot < slots_end)
        swa = tl.load(full_to_swa + slot, mask=known, other=-1)
        tl.store(ids + (begin + i), swa.to(tl.int32), mask=i < span)
        done += tl.num_programs(1) * BLOCK


_COMBINE_ARGS = ["out", "lens", "topk_indices", "query_start_loc", "query_pos", "seq_lens", "gather_lens"]
_COMBINE_ARGS += ["compressed_base", "swa_base"]


@triton.jit(
    do_not_specialize=["rows", "window", "ratio", "topk", "width", "topk_stride", "out_stride"],
    do_not_specialize_on_alignment=_COMBINE_ARGS,
)
def _combine_kernel(
    out,
    lens,
    topk_indices,
    query_start_loc,
    query_pos,
    seq_lens,
    gather_lens,
    compressed_base,
    swa_base,
    rows,
    window,
    ratio,
    topk,
    width,
    topk_stride,
    out_stride,
    FOURS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One query. Its request is the first that ends past it, which passes over requests without one.

    FOURS: rows begin on 16 bytes and ``topk`` is a multiple of 4, so that four columns move at once.
    """
    t = tl.program_id(0).to(tl.int64)
    at = t + tl.load(query_start_loc)
    lane = tl.arange(0, ROWS)
    row = 0
    top = 0
    while top < rows:
        mask = top + lane < rows
        ends = tl.load(query_start_loc + 1 + top + lane, mask=mask, other=0)
        row += tl.sum((mask & (ends <= at)).to(tl.int32), 0)
        top += ROWS
    owned = row < rows
    seq = tl.load(seq_lens + row, mask=owned, other=0).to(tl.int64)
    if query_pos is not None:
        pos = tl.load(query_pos + t, mask=owned, other=-1).to(tl.int64)
    else:
        pos = seq - tl.load(query_start_loc + 1 + row, mask=owned, other=0) + at
    seen = tl.where(owned, tl.maximum(pos + 1, 0), 0)
    compressed = tl.minimum(seen // ratio, topk).to(tl.int32)
    recent = tl.minimum(seen, window).to(tl.int32)
    total = compressed + recent
    tl.store(lens + t, total)
    base = tl.load(compressed_base + row, mask=owned, other=0)
    # what is added to a column of the window's part
    shift = tl.load(swa_base + row, mask=owned, other=0) + (pos - recent + 1) - compressed
    shift -= seq - tl.load(gather_lens + row, mask=owned, other=0)
    # up to where sums are int32: decided here, as 64 bits for every column cost more time than memory does
    max_index = 2147483647 - tl.maximum(base, 0)
    last = tl.minimum(total, 2147483648 - shift).to(tl.int32)
    shift = shift.to(tl.int32)
    source = topk_indices + t * topk_stride
    to = out + t * out_stride
    readable = compressed
    if FOURS:
        source, to = tl.multiple_of(source, 16), tl.multiple_of(to, 16)
        readable = (compressed + 3) // 4 * 4
    end = width // 128 * 128  # what it is; said so, fours are stored at once
    for begin in range(0, width, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        v = tl.load(source + j, mask=j < readable, other=-1)
        found = tl.where((j < compressed) & (v >= 0) & (v <= max_index), v + base, -1)
        found = tl.where((j >= compressed) & (j < last), j + shift, found)
        tl.store(to + j, found, mask=j < end)


watch_compiles(_swa_kernel, _combine_kernel)
