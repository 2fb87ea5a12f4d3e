"""Device code of both KV-index builders: one gather, of pages or of tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from mla_patch.compat.triton import watch_compiles


@triton.jit
def _row(
    req_to_token,
    req_pool_indices,
    lens,
    kv_indptr,
    kv_start_idx,
    out,
    row,
    req_to_token_stride,
    out_stride,
    PAGE_SIZE: tl.constexpr,
):
    """How many entries a row has, where its first slot is, where its first entry goes."""
    entries = (tl.load(lens + row).to(tl.int64) + (PAGE_SIZE - 1)) // PAGE_SIZE
    source = req_to_token + tl.load(req_pool_indices + row).to(tl.int64) * req_to_token_stride
    if kv_start_idx is not None:
        source += tl.load(kv_start_idx + row).to(tl.int64)
    if kv_indptr is not None:
        target = out + tl.load(kv_indptr + row).to(tl.int64)
    else:
        target = out + row * out_stride
    return entries, source, target


@triton.jit
def _copy_block(source, out, first, entries, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Entries [first, first + BLOCK) of one row; 64-bit once per block, 32-bit per lane."""
    lane = tl.arange(0, BLOCK)
    mask = lane < tl.maximum(tl.minimum(entries - first, BLOCK), 0).to(tl.int32)
    slot = tl.load(source + first * PAGE_SIZE + lane * PAGE_SIZE, mask=mask)
    tl.store(out + first + lane, (slot // PAGE_SIZE).to(out.dtype.element_ty), mask=mask)


# Nothing is specialised: widths, row counts and alignments change from call to call, and one compile while
# serving costs more than all of them could gain (the loads are one slot per lane either way).
_CALL_ARGS = ["req_to_token", "req_pool_indices", "lens", "kv_indptr", "kv_start_idx", "out"]


@triton.jit(do_not_specialize=["rows", "req_to_token_stride", "out_stride"], do_not_specialize_on_alignment=_CALL_ARGS)
def _kv_indices_kernel(
    req_to_token,
    req_pool_indices,
    lens,
    kv_indptr,
    kv_start_idx,
    out,
    rows,
    req_to_token_stride,
    out_stride,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(1)  # per row
    # These loads do not wait for each other. The first block is not inside a loop: behind a loop's branch, the
    # assembler would hold back every load but the length, and the chain would be one memory latency longer.
    if ROWS > 0:
        lane = tl.arange(0, ROWS)
        lengths = tl.load(lens + lane, mask=lane < rows, other=0)
    entries, source, target = _row(
        req_to_token, req_pool_indices, lens, kv_indptr, kv_start_idx, out,
        row, req_to_token_stride, out_stride, PAGE_SIZE,
    )  # fmt: skip
    _copy_block(source, target, tl.program_id(1).to(tl.int64) * BLOCK, entries, PAGE_SIZE, BLOCK)
    direct = programs * BLOCK  # entries of every row that are done now
    if ROWS == 0:
        first = direct.to(tl.int64) + tl.program_id(1).to(tl.int64) * (BLOCK * WIDE)
        while first < entries:
            _copy_block(source, target, first, entries, PAGE_SIZE, BLOCK * WIDE)
            first += programs.to(tl.int64) * (BLOCK * WIDE)
    else:
        # What is left of all rows, in chunks, is one line of work; a program finds the rows of its chunks by itself.
        chunk = (row * programs).to(tl.int32) + tl.program_id(1)
        top = 0
        before = 0  # chunks in the rows above `top`
        while top < rows:
            if top > 0:
                lengths = tl.load(lens + top + lane, mask=top + lane < rows, other=0)
            left = ((tl.maximum(lengths, 0) + (PAGE_SIZE - 1)) // PAGE_SIZE).to(tl.int32) - direct
            chunks = (tl.maximum(left, 0) + (BLOCK * WIDE - 1)) // (BLOCK * WIDE)
            after = before + tl.sum(chunks, 0)
            if chunk < after:
                begins = before + tl.cumsum(chunks, 0) - chunks
                while chunk < after:
                    # one row holds this chunk; its number and its first chunk travel in one reduction
                    holds = (begins <= chunk) & (chunk < begins + chunks)
                    packed = tl.sum(tl.where(holds, (lane.to(tl.int64) << 32) + begins, 0), 0)
                    entries, source, target = _row(
                        req_to_token, req_pool_indices, lens, kv_indptr, kv_start_idx, out,
                        top + (packed >> 32), req_to_token_stride, out_stride, PAGE_SIZE,
                    )  # fmt: skip
                    first = direct + (chunk - (packed & 0x7FFFFFFF)) * (BLOCK * WIDE)
                    _copy_block(source, target, first, entries, PAGE_SIZE, BLOCK * WIDE)
                    chunk += programs * rows
            before = after
            top += ROWS


watch_compiles(_kv_indices_kernel)
