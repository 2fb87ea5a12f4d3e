"""Device code of MLA decode for every chip; `mla_patch.kernels.decode` has shapes and the formula.

`_decode_kernel` has one program for each piece of the work and each tile of heads. `_merge_kernel` adds up what several
programs left of one request.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mla_patch.compat.triton import gdc_launch_dependents, gdc_wait, watch_compiles
from mla_patch.kernels.common.e4m3 import unpack_e4m3x2
from mla_patch.kernels.common.rounding import operand, rounded


@triton.jit
def _unpack_8bit(x, KIND: tl.constexpr):
    """int16 pairs of 8-bit values -> (even, odd) float16 values, exact; NaN stays NaN."""
    if KIND == 3:  # e5m2 is the upper half of a float16
        even = ((x & 0xFF) << 8).to(tl.float16, bitcast=True)
        odd = (x & -256).to(tl.float16, bitcast=True)
    else:
        even, odd = unpack_e4m3x2(x, KIND == 2)
    return even, odd


@triton.jit
def _row_max_abs(x0, x1, x2, x3, xr):
    """The largest magnitude in each row of five pieces, float32."""
    top = tl.maximum(tl.max(tl.abs(x0.to(tl.float32)), 1), tl.max(tl.abs(x1.to(tl.float32)), 1))
    top = tl.maximum(top, tl.maximum(tl.max(tl.abs(x2.to(tl.float32)), 1), tl.max(tl.abs(x3.to(tl.float32)), 1)))
    return tl.maximum(top, tl.max(tl.abs(xr.to(tl.float32)), 1))


@triton.jit
def _to_scaled_f16(x, q_scale):
    return (x.to(tl.float32) / q_scale[:, None]).to(tl.float16)


@triton.jit
def _split_float32(x, q_scale, kind):
    """A float32 in units of ``q_scale``, as the sum of two 16-bit numbers."""
    x = x / q_scale[:, None]
    high = x.to(kind)
    return operand(high), operand((x - high.to(tl.float32)).to(kind))


@triton.jit
def _tanh(x):
    t = tl.exp2(tl.abs(x) * -2.8853900817779268)
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - t) / (1.0 + t)


@triton.jit
def _count_tiles(indptr, B, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PAGED: tl.constexpr):
    """Every request's tiles, and where they end on the line of all tiles."""
    lane = tl.arange(0, ROWS)
    begin = tl.load(indptr + lane, mask=lane < B, other=0)
    if PAGED:
        keys = begin
    else:
        keys = tl.load(indptr + 1 + lane, mask=lane < B, other=0) - begin
    tiles = (tl.maximum(keys, 0).to(tl.int32) + (BLOCK_N - 1)) // BLOCK_N
    return lane, tiles


@triton.jit
def _scratch_tables(partial, programs, H):
    """What lies behind the partials in the scratch (`remembered.scratch_size`), all of it of 32 bits:

    lse               [2 * programs, H]    float32, base 2, of each partial
    shared_requests   [programs, 4]        int32: the request that a program shares with programs before it, or -1,
                                           and the first and the last program that have a part of that request
    owners            [B, 2]               int32: the first and the last program that have a part of a request; -1
                                           as the last one says that a single program has written it
    """
    # 32 bits hold the number of rows, since programs are a few for each multiprocessor. In 64 bits ptxas chose a
    # schedule of the bfloat16 kernel that was 3 - 7% slower (Triton 3.6, sm_90, 16 heads, up to 16 requests).
    rows = 2 * programs * H
    lse = (partial + rows * 512).to(tl.pointer_type(tl.float32), bitcast=True)
    shared_requests = (lse + rows).to(tl.pointer_type(tl.int32), bitcast=True)
    return lse, shared_requests, shared_requests + programs * 4


@triton.jit
def _store_chunk(pointer, a, b, mask, KIND: tl.constexpr):
    """128 values of every head, from the two operands that a chunk is read as."""
    kind = pointer.dtype.element_ty
    if KIND == 0:
        c = tl.arange(0, 64)
        tl.store(pointer + c[None, :], rounded(a, kind), mask=mask)
        tl.store(pointer + 64 + c[None, :], rounded(b, kind), mask=mask)
    else:
        tl.store(pointer + tl.arange(0, 128)[None, :], rounded(tl.interleave(a, b), kind), mask=mask)


@triton.jit
def _store_lse(lse, b, head, lse_stride_b, lse_stride_h, m, denominator, mask):
    """A request's log-sum-exp, from the base 2 of `_attend` to e."""
    to = lse + b.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h
    value = (m + tl.log2(denominator)) * 0.6931471805599453
    tl.store(to, rounded(value, lse.dtype.element_ty), mask=mask)


@triton.jit
def _load_chunk(row, c, KIND: tl.constexpr):
    """128 values of every key as two operands: even and odd values of an 8-bit cache, else one half and the other."""
    a = tl.load(row + c[None, :])
    if KIND == 0:
        a, b = operand(a), operand(tl.load(row + c.shape[0] + c[None, :]))
    else:
        a, b = _unpack_8bit(a, KIND)
    return a, b


@triton.jit
def _load_query(source, c, mask, KIND: tl.constexpr):
    """A chunk of every head's query, as `_load_chunk` has the keys'."""
    if KIND == 0:
        a = tl.load(source + c[None, :], mask=mask, other=0.0)
        b = tl.load(source + c.shape[0] + c[None, :], mask=mask, other=0.0)
    else:
        both = tl.load(source + tl.arange(0, 2 * c.shape[0])[None, :], mask=mask, other=0.0)
        a, b = tl.split(both.reshape(both.shape[0], c.shape[0], 2))
    return a, b


@triton.jit
def _attend(
    source,
    source_rope,
    mask,
    kv,
    ids,
    first_tile,
    count,
    keys,
    length,
    sm_scale,
    logit_cap,
    xai_len,
    kv_stride,
    page_stride,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    XAI: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """``count`` tiles of a request's keys, from ``first_tile`` on: the largest score, the sum of weights, weighted V.

    ``source`` points at the heads' queries, ``source_rope`` at their rope, ``ids`` at ``keys`` rows of the cache or,
    where there is a PAGE_SIZE, at their pages. The temperature is that of a request of ``length`` keys.
    Scores are to the base 2, since exp2 is what the chip has.

    A row is four chunks of 128 values and 64 of rope, and each of these five is read as two operands, A and B. They are
    the chunk's first and second half. In an 8-bit cache, which is read as int16 pairs, they are its even and its odd
    values, because one conversion of a register of pairs gives both. Keys come through shared memory, where one copy of
    them serves scores and output. These are the tiles in registers:

        operand    q            rest of a float32 q    keys              output
        A          q0 .. q3 qr  u0 .. u3 ur            k0 .. k3 kr       a0 .. a3
        B          p0 .. p3 pr  w0 .. w3 wr            l0 .. l3 lr       b0 .. b3
        shape      [BLOCK_H, 64], rope [BLOCK_H, 32]   [BLOCK_N, 64]     [BLOCK_H, 64]
                                                       rope [BLOCK_N, 32]

    A score is s - t: s sums the products of A, and t those of B, whose queries are negated. Of s + t Triton would make
    one chain of ten products, each of which waits for the one before. The chains of s and t do not wait for each other.
    """
    # in an 8-bit cache the row has half as many elements, of two bytes
    STEP: tl.constexpr = 1 if KIND == 0 else 2
    CHUNK: tl.constexpr = 128 // STEP  # elements of the cache
    n = tl.arange(0, BLOCK_N)
    c = tl.arange(0, 64)
    r = tl.arange(0, 32)
    if XAI:
        # log2(0) of a single key is not selected
        last = tl.maximum(length - 1, 1).to(tl.float32)
        temperature = tl.where(length - 1 > xai_len, tl.log2(last) / tl.log2(xai_len.to(tl.float32)), 1.0)
    m = tl.full([BLOCK_H], -float("inf"), tl.float32)
    weights = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    a0 = tl.zeros([BLOCK_H, 64], tl.float32)
    a1 = tl.zeros([BLOCK_H, 64], tl.float32)
    a2 = tl.zeros([BLOCK_H, 64], tl.float32)
    a3 = tl.zeros([BLOCK_H, 64], tl.float32)
    b0 = tl.zeros([BLOCK_H, 64], tl.float32)
    b1 = tl.zeros([BLOCK_H, 64], tl.float32)
    b2 = tl.zeros([BLOCK_H, 64], tl.float32)
    b3 = tl.zeros([BLOCK_H, 64], tl.float32)
    q0, p0 = _load_query(source, c, mask, KIND)
    q1, p1 = _load_query(source + 128, c, mask, KIND)
    q2, p2 = _load_query(source + 256, c, mask, KIND)
    q3, p3 = _load_query(source + 384, c, mask, KIND)
    qr, pr = _load_query(source_rope, r, mask, KIND)
    scale = sm_scale if CAPPED else sm_scale * 1.4426950408889634  # exp2 is what the chip has
    FLOAT32_Q: tl.constexpr = KIND == 0 and q0.dtype == tl.float32
    if KIND == 0 and not FLOAT32_Q:
        q0, q1, q2, q3, qr = operand(q0), operand(q1), operand(q2), operand(q3), operand(qr)
        p0, p1, p2, p3, pr = -operand(p0), -operand(p1), -operand(p2), -operand(p3), -operand(pr)
    else:
        # a power of two takes every head's q into float16's range, and loses nothing
        max_abs = tl.maximum(_row_max_abs(q0, q1, q2, q3, qr), _row_max_abs(p0, p1, p2, p3, pr))
        q_scale = (max_abs.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        q_scale = tl.where(q_scale > 0, q_scale, 1.0)
        scale = (scale * q_scale)[:, None]
    if FLOAT32_Q:
        # a float32 is more than one operand of the cache's type holds: what is left of it makes another, u and w
        kind = kv.dtype.element_ty
        q0, u0 = _split_float32(q0, q_scale, kind)
        q1, u1 = _split_float32(q1, q_scale, kind)
        q2, u2 = _split_float32(q2, q_scale, kind)
        q3, u3 = _split_float32(q3, q_scale, kind)
        qr, ur = _split_float32(qr, q_scale, kind)
        p0, w0 = _split_float32(p0, -q_scale, kind)
        p1, w1 = _split_float32(p1, -q_scale, kind)
        p2, w2 = _split_float32(p2, -q_scale, kind)
        p3, w3 = _split_float32(p3, -q_scale, kind)
        pr, wr = _split_float32(pr, -q_scale, kind)
    elif KIND != 0:
        q0, q1, q2, q3, qr = (
            _to_scaled_f16(q0, q_scale),
            _to_scaled_f16(q1, q_scale),
            _to_scaled_f16(q2, q_scale),
            _to_scaled_f16(q3, q_scale),
            _to_scaled_f16(qr, q_scale),
        )
        p0, p1, p2, p3, pr = (
            _to_scaled_f16(p0, -q_scale),
            _to_scaled_f16(p1, -q_scale),
            _to_scaled_f16(p2, -q_scale),
            _to_scaled_f16(p3, -q_scale),
            _to_scaled_f16(pr, -q_scale),
        )
    for i in tl.range(0, count, num_stages=STAGES):
        j = (first_tile + i) * BLOCK_N + n
        # a key past the end reads the last one again: its weight is 0, and 0 times a stranger's NaN is NaN
        at = tl.minimum(j, keys - 1)
        if PAGE_SIZE == 0:
            slot = tl.load(ids + at).to(tl.int64)
            row = kv + slot[:, None] * kv_stride
        elif PAGE_SIZE % BLOCK_N == 0:
            # one look-up for a tile, which lies in one page
            start = (first_tile + i) * BLOCK_N
            page = tl.load(ids + start // PAGE_SIZE).to(tl.int64)
            row = kv + page * page_stride + ((at - start + start % PAGE_SIZE).to(tl.int64) * kv_stride)[:, None]
        else:
            page = tl.load(ids + at // PAGE_SIZE).to(tl.int64)
            row = kv + (page * page_stride + (at % PAGE_SIZE).to(tl.int64) * kv_stride)[:, None]
        k0, l0 = _load_chunk(row, c, KIND)
        k1, l1 = _load_chunk(row + CHUNK, c, KIND)
        k2, l2 = _load_chunk(row + 2 * CHUNK, c, KIND)
        k3, l3 = _load_chunk(row + 3 * CHUNK, c, KIND)
        kr, lr = _load_chunk(row + 4 * CHUNK, r, KIND)
        s = tl.dot(qr, kr.T)
        t = tl.dot(pr, lr.T)
        s = tl.dot(q0, k0.T, s)
        t = tl.dot(p0, l0.T, t)
        s = tl.dot(q1, k1.T, s)
        t = tl.dot(p1, l1.T, t)
        s = tl.dot(q2, k2.T, s)
        t = tl.dot(p2, l2.T, t)
        s = tl.dot(q3, k3.T, s)
        t = tl.dot(p3, l3.T, t)
        if FLOAT32_Q:
            s = tl.dot(ur, kr.T, s)
            t = tl.dot(wr, lr.T, t)
            s = tl.dot(u0, k0.T, s)
            t = tl.dot(w0, l0.T, t)
            s = tl.dot(u1, k1.T, s)
            t = tl.dot(w1, l1.T, t)
            s = tl.dot(u2, k2.T, s)
            t = tl.dot(w2, l2.T, t)
            s = tl.dot(u3, k3.T, s)
            t = tl.dot(w3, l3.T, t)
        s = (s - t) * scale
        if CAPPED:
            s = (logit_cap * 1.4426950408889634) * _tanh(s / logit_cap)
        if XAI:
            s = s * temperature
        s = tl.where((j < keys)[None, :], s, -float("inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        rescale = tl.exp2(m - new_m)
        p = tl.exp2(s - new_m[:, None])
        weights = weights * rescale[:, None] + p
        m = new_m
        rescale = rescale[:, None]
        p = p.to(k0.dtype)
        a0 = tl.dot(p, k0, a0 * rescale)
        b0 = tl.dot(p, l0, b0 * rescale)
        a1 = tl.dot(p, k1, a1 * rescale)
        b1 = tl.dot(p, l1, b1 * rescale)
        a2 = tl.dot(p, k2, a2 * rescale)
        b2 = tl.dot(p, l2, b2 * rescale)
        a3 = tl.dot(p, k3, a3 * rescale)
        b3 = tl.dot(p, l3, b3 * rescale)
    denominator = tl.sum(weights, 1)
    return m, denominator, a0, a1, a2, a3, b0, b1, b2, b3


@triton.jit
def _times_value_at(number, at):
    """A number times that on the device, if there is one there."""
    if at is not None:
        number *= tl.load(at).to(tl.float32)
    return number


_CHANGING = ["B", "sm_scale", "v_scale", "logit_cap", "xai_len", "table_stride"]
_CALL_ARGS = ["q", "q_rope", "out", "lse", "indptr", "token_ids", "sinks", "k_scale_at", "v_scale_at"]


@triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_CALL_ARGS)
def _decode_kernel(
    q,
    q_rope,
    kv,
    out,
    lse,
    indptr,
    token_ids,
    sinks,
    k_scale_at,
    v_scale_at,
    partial,
    B,
    H,
    sm_scale,
    v_scale,
    logit_cap,
    xai_len,
    q_stride_b,
    q_stride_h,
    rope_stride_b,
    rope_stride_h,
    kv_stride,
    out_stride_b,
    out_stride_h,
    lse_stride_b,
    lse_stride_h,
    table_stride,
    page_stride,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    XAI: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """One piece of the work. With a PAGE_SIZE, ``indptr`` holds lengths and ``token_ids`` is the block table. What
    stands at k_scale_at and v_scale_at, where these are given, goes with sm_scale and v_scale."""
    program = tl.program_id(0)
    partial_lse, shared_requests, owners = _scratch_tables(partial, tl.num_programs(0), H)
    if PDL:
        gdc_launch_dependents()  # the merge may be set up; it waits for the end of this kernel before it reads
    lane, tiles = _count_tiles(indptr, B, ROWS, BLOCK_N, PAGE_SIZE > 0)
    total_tiles = tl.sum(tiles, 0)
    per_program = (total_tiles + tl.num_programs(0) - 1) // tl.num_programs(0)
    start = program * per_program
    stop = tl.minimum(start + per_program, total_tiles)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = head < H
    sm_scale, v_scale = _times_value_at(sm_scale, k_scale_at), _times_value_at(v_scale, v_scale_at)
    # what this program shares with programs before it: nothing so far
    shared_request = shared_requests + program * 4
    tl.store(shared_request, -1)
    position = start
    while position < stop:
        # counted anew for every request, so that the counts hold no registers while keys are read
        lane, tiles = _count_tiles(indptr, B, ROWS, BLOCK_N, PAGE_SIZE > 0)
        ends = tl.cumsum(tiles, 0)
        b = tl.sum(((ends <= position) & (lane < B)).to(tl.int32), 0)
        end = tl.sum(tl.where(lane == b, ends, 0), 0)
        if PAGE_SIZE > 0:
            first = b.to(tl.int64) * table_stride
            length = tl.load(indptr + b).to(tl.int32)
        else:
            first = tl.load(indptr + b).to(tl.int64)
            length = (tl.load(indptr + b + 1).to(tl.int64) - first).to(tl.int32)
        begin = end - (length + (BLOCK_N - 1)) // BLOCK_N
        count = tl.minimum(stop, end) - position
        ids = token_ids + first
        # launchers see to it; pointers that are compiled for their own alignment would make kernels of their own
        source = q + b.to(tl.int64) * q_stride_b + head[:, None].to(tl.int64) * q_stride_h
        rope = q_rope + b.to(tl.int64) * rope_stride_b + head[:, None].to(tl.int64) * rope_stride_h
        source, rope = tl.multiple_of(source, [16, 16]), tl.multiple_of(rope, [16, 16])
        mask = is_head[:, None]
        m, denominator, a0, a1, a2, a3, b0, b1, b2, b3 = _attend(
            source, rope, mask, kv, ids, position - begin, count, length, length, sm_scale, logit_cap, xai_len,
            kv_stride, page_stride, KIND, CAPPED, XAI, BLOCK_H, BLOCK_N, STAGES, PAGE_SIZE,
        )  # fmt: skip
        piece_lse = m + tl.log2(denominator)
        is_unsplit = (position == begin) & (position + count == end)
        if sinks is not None:
            sink = tl.load(sinks + head, mask=is_head, other=0.0).to(tl.float32)
            denominator += tl.where(is_unsplit, tl.exp2(sink * 1.4426950408889634 - m), 0.0)
        factor = (tl.where(is_unsplit, v_scale, 1.0) / denominator)[:, None]
        a0, a1, a2, a3 = a0 * factor, a1 * factor, a2 * factor, a3 * factor
        b0, b1, b2, b3 = b0 * factor, b1 * factor, b2 * factor, b3 * factor
        if is_unsplit:
            tl.store(owners + 2 * b + 1, -1)
            to_out = out + b.to(tl.int64) * out_stride_b + head[:, None].to(tl.int64) * out_stride_h
            to_out = tl.multiple_of(to_out, [16, 16])
            _store_chunk(to_out, a0, b0, mask, KIND)
            _store_chunk(to_out + 128, a1, b1, mask, KIND)
            _store_chunk(to_out + 256, a2, b2, mask, KIND)
            _store_chunk(to_out + 384, a3, b3, mask, KIND)
            if lse is not None:
                _store_lse(lse, b, head, lse_stride_b, lse_stride_h, m, denominator, is_head)
        else:
            if position == begin:
                tl.store(owners + 2 * b, program)
                tl.store(owners + 2 * b + 1, (end - 1) // per_program)
            else:
                tl.store(shared_request, b)
                tl.store(shared_request + 1, begin // per_program)
                tl.store(shared_request + 2, (end - 1) // per_program)
            # a request that began before this piece goes to the even row, one that begins inside it to the odd one
            row = (2 * program + (position == begin).to(tl.int32)).to(tl.int64) * H
            to_partial = partial + (row + head[:, None]) * 512
            _store_chunk(to_partial, a0, b0, mask, KIND)
            _store_chunk(to_partial + 128, a1, b1, mask, KIND)
            _store_chunk(to_partial + 256, a2, b2, mask, KIND)
            _store_chunk(to_partial + 384, a3, b3, mask, KIND)
            tl.store(partial_lse + row + head, piece_lse, mask=is_head)
        position += count
    # nobody else comes by a request of no keys
    for empty in range(program, B, tl.num_programs(0)):
        if PAGE_SIZE > 0:
            has_no_key = tl.load(indptr + empty) <= 0
        else:
            has_no_key = tl.load(indptr + empty + 1) <= tl.load(indptr + empty)
        if has_no_key:
            zero = tl.zeros([BLOCK_H, 512], out.dtype.element_ty)
            to = out + tl.cast(empty, tl.int64) * out_stride_b + head[:, None].to(tl.int64) * out_stride_h
            to = tl.multiple_of(to, [16, 16])
            tl.store(to + tl.arange(0, 512)[None, :], zero, mask=is_head[:, None])
            tl.store(owners + 2 * empty + 1, -1)  # nothing to merge
            if lse is not None:
                to_lse = lse + tl.cast(empty, tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h
                tl.store(to_lse, tl.full([BLOCK_H], -float("inf"), lse.dtype.element_ty), mask=is_head)


@triton.jit
def _merge_columns(partial, partial_lse, first, last, h, H, m, d, BLOCK_S: tl.constexpr):
    """The weighted sum of a request's partials in columns ``d``; ``m`` is the largest log-sum-exp."""
    acc = tl.zeros([d.shape[0]], tl.float32)
    for block in range(first, last + 1, BLOCK_S):
        program = block + tl.arange(0, BLOCK_S)
        row = _partial_row(program, first, H) + h
        weight = tl.exp2(tl.load(partial_lse + row, mask=program <= last, other=-float("inf")) - m)
        part = tl.load(partial + row[:, None] * 512 + d[None, :], mask=(program <= last)[:, None], other=0.0)
        acc += tl.sum(part.to(tl.float32) * weight[:, None], 0)
    return acc


@triton.jit
def _partial_row(program, first, H):
    """Where a program left its part of a request: the odd one of its two places where the request begins."""
    return (2 * program + (program == first).to(tl.int32)).to(tl.int64) * H


@triton.jit(
    do_not_specialize=["programs", "v_scale"], do_not_specialize_on_alignment=["out", "lse", "sinks", "v_scale_at"]
)
def _merge_kernel(
    out,
    lse,
    sinks,
    v_scale_at,
    partial,
    programs,
    H,
    v_scale,
    out_stride_b,
    out_stride_h,
    lse_stride_b,
    lse_stride_h,
    PARTIALS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some columns of one head of one request, from what several programs left of it.

    With SLICES, a request has that many programs of its own. Without, program p looks after the request that its
    namesake shared with programs before it: up to sixteen partials are the work of the second of them alone, more that
    of sixteen with 32 columns each, so that one long request among many short ones finds many hands.
    """
    program, h = tl.program_id(0), tl.program_id(1)
    partial_lse, shared_requests, owners = _scratch_tables(partial, programs, H)
    if PDL:
        gdc_wait()
    if SLICES > 0:
        b = program // SLICES
        share = program % SLICES
        first = tl.load(owners + 2 * b)
        last = tl.load(owners + 2 * b + 1)
        has_work = last >= 0  # else one program had all of it, and wrote it
    else:
        b = tl.load(shared_requests + program * 4)
        first = tl.load(shared_requests + program * 4 + 1)
        last = tl.load(shared_requests + program * 4 + 2)
        share = program - first - 1
        has_work = (b >= 0) & ((share == 0) | ((last - first >= 16) & (share < 16)))
    if has_work:
        sharing = first + tl.arange(0, PARTIALS)
        piece_lse = tl.load(
            partial_lse + _partial_row(sharing, first, H) + h, mask=sharing <= last, other=-float("inf")
        )
        m = tl.max(piece_lse, 0)
        denominator = tl.sum(tl.exp2(piece_lse - m), 0)
        if sinks is not None:
            denominator += tl.exp2(tl.load(sinks + h).to(tl.float32) * 1.4426950408889634 - m)
        if lse is not None:
            _store_lse(lse, b, h, lse_stride_b, lse_stride_h, m, denominator, share == 0)
        factor = _times_value_at(v_scale, v_scale_at) / denominator
        to = out + b.to(tl.int64) * out_stride_b + h.to(tl.int64) * out_stride_h
        kind = out.dtype.element_ty
        if SLICES > 0:
            d = share * (512 // SLICES) + tl.arange(0, 512 // SLICES)
            acc = _merge_columns(partial, partial_lse, first, last, h, H, m, d, BLOCK_S)
            tl.store(to + d, rounded(acc * factor, kind))
        elif last - first < 16:
            d = tl.arange(0, 512)
            acc = _merge_columns(partial, partial_lse, first, last, h, H, m, d, 4)
            tl.store(to + d, rounded(acc * factor, kind))
        else:
            columns = share * 32 + tl.arange(0, 32)
            part = _merge_columns(partial, partial_lse, first, last, h, H, m, columns, BLOCK_S)
            tl.store(to + columns, rounded(part * factor, kind))


watch_compiles(_decode_kernel, _merge_kernel)
