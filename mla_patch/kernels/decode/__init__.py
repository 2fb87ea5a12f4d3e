"""MLA decode: one query token per request attends to its rows of the paged latent cache.

    q          [B, H, 576]          bfloat16, float16 or float32; 512 latent and 64 rope values, or these two as a pair
                                    of tensors, [B, H, 512] and [B, H, 64], each with strides of its own
    kv         [N, 576] (or [N, 1, 576])  float8_e4m3fn, float8_e5m2 or the dtype of q (bfloat16 or float16 where q is
                                    float32); V is the first 512 values of K
    out        [B, H, 512]          bfloat16, float16 or float32
    indptr     [>= B + 1]           int32 or int64; request b owns token_ids[indptr[b] : indptr[b + 1]]
    token_ids  [>= indptr[B]]       int32 or int64, physical rows of kv in any order, repeats allowed
    sinks      [H]                  float32 or bfloat16, or None
    lse        [B, H]               float32 or the dtype of q, written where it is given
    k_scale, v_scale                numbers, or one-element float tensors on the device, which the kernel reads

    s_bhj = q_bh . kv[slot_bj] * sm_scale * k_scale;   cap * tanh(s / cap) where there is a cap;
            * log2(L_b - 1) / log2(xai_len) where L_b - 1 > xai_len > 0
    out_bh = v_scale * sum_j exp(s_bhj) kv[slot_bj, :512] / (sum_j exp(s_bhj) + exp(sink_h));   0 where L_b = 0
    lse_bh = log(sum_j exp(s_bhj) + exp(sink_h));   -inf where L_b = 0

Every row of the cache is read once per tile of query heads. An 8-bit row is read as 288 pairs of bytes: one copy in
shared memory serves both products, and each register of pairs becomes one operand of even and one of odd values, both
float16 and exact. q and the probabilities stay 16-bit, so the error does not grow as attention sharpens. A float32 q
becomes float16 beside an 8-bit cache and the sum of two operands beside a 16-bit one, inside the kernel.

A cache may also be read by pages, `mla_decode_paged`. Callers who read the splits: `mla_patch.kernels.decode.splits`.

The keys of all requests, in tiles, are one line of work that is cut into equal pieces, one per program; a program finds
its requests on the device, so a captured graph stays right when lengths change. A request that one program has to
itself is written at once; the others leave at most two partials per program, which a second kernel merges: the programs
that shared a long request share the work of merging it, too.

On sm_90, calls with 17 heads and more, 16-byte rows and no float32 go to the Gluon kernel of
`mla_patch.kernels.decode.sm90`.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl

from mla_patch.compat import gpu
from mla_patch.compat.compiles import COMPILES
from mla_patch.compat.triton import (
    FEW_TARGETS,
    HAS_GLUON,
    HAS_PDL,
    TARGETS,
    CompileCase,
    Relaunch,
    gdc_launch_dependents,
    gdc_wait,
    interpreted,
    watch_compiles,
)
from mla_patch.kernels.cache.dequantize import operand, rounded
from mla_patch.kernels.cache.layouts import told

NARROW = 16  # up to so many heads the portable kernel is the faster one on sm_90

_INTERPRETED = interpreted()  # asked here, because decoration is when Triton decides

# how a cache's bytes become operands; E4M3_BITS where the chip has no conversion
DIRECT, E4M3, E4M3_BITS, E5M2 = 0, 1, 2, 3
_PLAIN = tl.constexpr(_INTERPRETED)  # the interpreter knows no assembler


def decode_config(heads: int, eight_bit: bool, capability: tuple[int, int], interpret: bool = False) -> dict[str, int]:
    """Launch numbers by architecture and shape class; ``PER_SM`` programs fit on a multiprocessor."""
    if interpret:  # few programs, and small tiles that tests can fill
        return {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 1, "PER_SM": 3, "num_warps": 4}
    if capability == (9, 0) and not eight_bit and heads > 16:
        # an 8-bit cache's conversion costs more than reading it half as often gains
        return {"BLOCK_H": 32, "BLOCK_N": 64, "STAGES": 5, "PER_SM": 1, "num_warps": 8}
    if eight_bit:
        # two pairs of buffers and q are 95 KiB: two programs where there are 227, one elsewhere
        per_sm = 2 if capability in ((9, 0), (10, 0), (10, 3)) else 1
        return {"BLOCK_H": 16, "BLOCK_N": 64, "STAGES": 5, "PER_SM": per_sm, "num_warps": 4}
    if capability == (9, 0):
        # Left to itself ptxas takes 182 to 188 registers with more than 16 requests, by schedules that differ by 20%;
        # told of 255, it takes all of them, by the fastest.
        return {"BLOCK_H": 16, "BLOCK_N": 64, "STAGES": 5, "PER_SM": 1, "num_warps": 4, "maxnreg": 255}
    if capability[0] in (9, 10):
        return {"BLOCK_H": 16, "BLOCK_N": 64, "STAGES": 5, "PER_SM": 1, "num_warps": 4}
    return {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 5, "PER_SM": 1, "num_warps": 4}


@triton.jit
def _halves(x, KIND: tl.constexpr):
    """int16 pairs of 8-bit values -> (even, odd) float16 values, exact; NaN stays NaN."""
    if KIND == 3:  # e5m2 is the upper half of a float16
        even = ((x & 0xFF) << 8).to(tl.float16, bitcast=True)
        odd = (x & -256).to(tl.float16, bitcast=True)
    elif _PLAIN:
        even, odd = _e4m3(x & 0xFF), _e4m3((x >> 8) & 0xFF)
    elif KIND == 1:
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            .reg .b16 a, b;
            prmt.b32 t, $2, 0, 0x3120;
            mov.b32 {a, b}, t;
            cvt.rn.f16x2.e4m3x2 $0, a;
            cvt.rn.f16x2.e4m3x2 $1, b;
            }""",
            "=r,=r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        # Two values at a time, as in `_e4m3`. Adding one to a magnitude of 0x7f carries into its sign's place; prmt
        # spreads that bit over the half, which makes the NaN.
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, s, m, n, c;
            mov.b32 c, 0x5c005c00;
            shl.b32 t, $2, 8;
            and.b32 s, t, 0x80008000;
            and.b32 m, t, 0x7f007f00;
            add.u32 n, m, 0x01000100;
            prmt.b32 n, n, 0, 0xbb99;
            and.b32 n, n, 0x7e007e00;
            shr.u32 m, m, 1;
            mul.f16x2 m, m, c;
            or.b32 m, m, n;
            or.b32 $0, m, s;
            and.b32 s, $2, 0x80008000;
            and.b32 m, $2, 0x7f007f00;
            add.u32 n, m, 0x01000100;
            prmt.b32 n, n, 0, 0xbb99;
            and.b32 n, n, 0x7e007e00;
            shr.u32 m, m, 1;
            mul.f16x2 m, m, c;
            or.b32 m, m, n;
            or.b32 $1, m, s;
            }""",
            "=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return even, odd


@triton.jit
def _e4m3(byte):
    """e4m3 by integer arithmetic: shifted into a float16's place it is 2**-8 of its value."""
    magnitude = byte & 0x7F
    value = (((byte & 0x80) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def _largest(x0, x1, x2, x3, xr):
    """The largest magnitude in each row of five pieces, float32."""
    top = tl.maximum(tl.max(tl.abs(x0.to(tl.float32)), 1), tl.max(tl.abs(x1.to(tl.float32)), 1))
    top = tl.maximum(top, tl.maximum(tl.max(tl.abs(x2.to(tl.float32)), 1), tl.max(tl.abs(x3.to(tl.float32)), 1)))
    return tl.maximum(top, tl.max(tl.abs(xr.to(tl.float32)), 1))


@triton.jit
def _half(x, unit):
    return (x.to(tl.float32) / unit[:, None]).to(tl.float16)


@triton.jit
def _split(x, unit, kind):
    """A float32 in units of ``unit``, as the sum of two 16-bit numbers."""
    x = x / unit[:, None]
    high = x.to(kind)
    return operand(high), operand((x - high.to(tl.float32)).to(kind))


@triton.jit
def _tanh(x):
    t = tl.exp2(tl.abs(x) * -2.8853900817779268)
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - t) / (1.0 + t)


@triton.jit
def _requests(indptr, B, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PAGED: tl.constexpr):
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
def _tables(partial, programs, H):
    """What lies behind the partials in the scratch (`_scratch`): their log-sum-exps, and who shares which request."""
    # 32 bits hold it, since programs are a few for each multiprocessor. In 64 bits ptxas chose a schedule of the
    # bfloat16 kernel that was 3 - 7% slower (Triton 3.6, sm_90, 16 heads, up to 16 requests).
    places = 2 * programs * H
    lse = (partial + places * 512).to(tl.pointer_type(tl.float32), bitcast=True)
    spans = (lse + places).to(tl.pointer_type(tl.int32), bitcast=True)
    return lse, spans, spans + programs * 4


@triton.jit
def _store_chunk(pointer, one, other, mask, KIND: tl.constexpr):
    """128 values of every head, from the two operands that a chunk is read as."""
    kind = pointer.dtype.element_ty
    if KIND == 0:
        c = tl.arange(0, 64)
        tl.store(pointer + c[None, :], rounded(one, kind), mask=mask)
        tl.store(pointer + 64 + c[None, :], rounded(other, kind), mask=mask)
    else:
        tl.store(pointer + tl.arange(0, 128)[None, :], rounded(tl.interleave(one, other), kind), mask=mask)


@triton.jit
def _store_lse(lse, b, head, lse_stride_b, lse_stride_h, m, denominator, mask):
    """A request's log-sum-exp, from the base 2 of `_attend` to e."""
    place = lse + b.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h
    value = (m + tl.log2(denominator)) * 0.6931471805599453
    tl.store(place, rounded(value, lse.dtype.element_ty), mask=mask)


@triton.jit
def _load_chunk(row, c, KIND: tl.constexpr):
    """128 values of every key as two operands: even and odd values of an 8-bit cache, else one half and the other."""
    one = tl.load(row + c[None, :])
    if KIND == 0:
        one, other = operand(one), operand(tl.load(row + c.shape[0] + c[None, :]))
    else:
        one, other = _halves(one, KIND)
    return one, other


@triton.jit
def _load_query(source, c, mask, KIND: tl.constexpr):
    """A chunk of every head's query, as `_load_chunk` has the keys'."""
    if KIND == 0:
        one = tl.load(source + c[None, :], mask=mask, other=0.0)
        other = tl.load(source + c.shape[0] + c[None, :], mask=mask, other=0.0)
    else:
        both = tl.load(source + tl.arange(0, 2 * c.shape[0])[None, :], mask=mask, other=0.0)
        one, other = tl.split(both.reshape(both.shape[0], c.shape[0], 2))
    return one, other


@triton.jit
def _attend(
    source,
    source_rope,
    mask,
    kv,
    ids,
    first,
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
    """``count`` tiles of a request's keys, from tile ``first`` on: the largest score, the sum of weights, weighted V.

    ``source`` points at the heads' queries, ``source_rope`` at their rope, ``ids`` at ``keys`` rows of the cache or,
    where there is a PAGE_SIZE, at their pages. The temperature is that of a request of ``length`` keys.
    """
    # A row is four chunks of 128 values and 64 of rope, each read as two operands. In an 8-bit cache these are even and
    # odd values, and the row has half as many elements, of two bytes.
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
    # The other operand's q is negated: Triton chains dot + dot into one, and here two chains run side by side.
    scale = sm_scale if CAPPED else sm_scale * 1.4426950408889634  # exp2 is what the chip has
    TWICE: tl.constexpr = KIND == 0 and q0.dtype == tl.float32
    if KIND == 0 and not TWICE:
        q0, q1, q2, q3, qr = operand(q0), operand(q1), operand(q2), operand(q3), operand(qr)
        p0, p1, p2, p3, pr = -operand(p0), -operand(p1), -operand(p2), -operand(p3), -operand(pr)
    else:
        # a power of two takes every head's q into float16's range, and loses nothing
        largest = tl.maximum(_largest(q0, q1, q2, q3, qr), _largest(p0, p1, p2, p3, pr))
        unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.where(unit > 0, unit, 1.0)
        scale = (scale * unit)[:, None]
    if TWICE:
        # a float32 is more than one operand of the cache's type holds: what is left of it makes another
        kind = kv.dtype.element_ty
        q0, u0 = _split(q0, unit, kind)
        q1, u1 = _split(q1, unit, kind)
        q2, u2 = _split(q2, unit, kind)
        q3, u3 = _split(q3, unit, kind)
        qr, ur = _split(qr, unit, kind)
        p0, w0 = _split(p0, -unit, kind)
        p1, w1 = _split(p1, -unit, kind)
        p2, w2 = _split(p2, -unit, kind)
        p3, w3 = _split(p3, -unit, kind)
        pr, wr = _split(pr, -unit, kind)
    elif KIND != 0:
        q0, q1, q2, q3, qr = _half(q0, unit), _half(q1, unit), _half(q2, unit), _half(q3, unit), _half(qr, unit)
        p0, p1, p2, p3, pr = (
            _half(p0, -unit),
            _half(p1, -unit),
            _half(p2, -unit),
            _half(p3, -unit),
            _half(pr, -unit),
        )
    for i in tl.range(0, count, num_stages=STAGES):
        j = (first + i) * BLOCK_N + n
        # a key past the end reads the last one again: its weight is 0, and 0 times a stranger's NaN is NaN
        at = tl.minimum(j, keys - 1)
        if PAGE_SIZE == 0:
            slot = tl.load(ids + at).to(tl.int64)
            row = kv + slot[:, None] * kv_stride
        elif PAGE_SIZE % BLOCK_N == 0:
            # one look-up for a tile, which lies in one page
            start = (first + i) * BLOCK_N
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
        if TWICE:
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
        top = tl.maximum(m, tl.max(s, 1))
        keep = tl.exp2(m - top)
        p = tl.exp2(s - top[:, None])
        weights = weights * keep[:, None] + p
        m = top
        keep = keep[:, None]
        p = p.to(k0.dtype)
        a0 = tl.dot(p, k0, a0 * keep)
        b0 = tl.dot(p, l0, b0 * keep)
        a1 = tl.dot(p, k1, a1 * keep)
        b1 = tl.dot(p, l1, b1 * keep)
        a2 = tl.dot(p, k2, a2 * keep)
        b2 = tl.dot(p, l2, b2 * keep)
        a3 = tl.dot(p, k3, a3 * keep)
        b3 = tl.dot(p, l3, b3 * keep)
    denominator = tl.sum(weights, 1)
    return m, denominator, a0, a1, a2, a3, b0, b1, b2, b3


@triton.jit
def _times(number, at):
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
    partial_lse, spans, requests = _tables(partial, tl.num_programs(0), H)
    if PDL:
        gdc_launch_dependents()  # the merge may be set up; it waits for the end of this kernel before it reads
    lane, tiles = _requests(indptr, B, ROWS, BLOCK_N, PAGE_SIZE > 0)
    total = tl.sum(tiles, 0)
    each = (total + tl.num_programs(0) - 1) // tl.num_programs(0)
    start = program * each
    stop = tl.minimum(start + each, total)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = head < H
    sm_scale, v_scale = _times(sm_scale, k_scale_at), _times(v_scale, v_scale_at)
    span = spans + program * 4  # which request this program shares with those before it, and with how many
    tl.store(span, -1)
    position = start
    while position < stop:
        # counted anew for every request, so that the counts hold no registers while keys are read
        lane, tiles = _requests(indptr, B, ROWS, BLOCK_N, PAGE_SIZE > 0)
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
        own_lse = m + tl.log2(denominator)
        whole = (position == begin) & (position + count == end)
        if sinks is not None:
            sink = tl.load(sinks + head, mask=is_head, other=0.0).to(tl.float32)
            denominator += tl.where(whole, tl.exp2(sink * 1.4426950408889634 - m), 0.0)
        factor = (tl.where(whole, v_scale, 1.0) / denominator)[:, None]
        a0, a1, a2, a3 = a0 * factor, a1 * factor, a2 * factor, a3 * factor
        b0, b1, b2, b3 = b0 * factor, b1 * factor, b2 * factor, b3 * factor
        if whole:
            tl.store(requests + 2 * b + 1, -1)
            final = out + b.to(tl.int64) * out_stride_b + head[:, None].to(tl.int64) * out_stride_h
            final = tl.multiple_of(final, [16, 16])
            _store_chunk(final, a0, b0, mask, KIND)
            _store_chunk(final + 128, a1, b1, mask, KIND)
            _store_chunk(final + 256, a2, b2, mask, KIND)
            _store_chunk(final + 384, a3, b3, mask, KIND)
            if lse is not None:
                _store_lse(lse, b, head, lse_stride_b, lse_stride_h, m, denominator, is_head)
        else:
            if position == begin:
                tl.store(requests + 2 * b, program)
                tl.store(requests + 2 * b + 1, (end - 1) // each)
            else:
                tl.store(span, b)
                tl.store(span + 1, begin // each)
                tl.store(span + 2, (end - 1) // each)
            # a request that began before this piece goes to the even place, one that begins inside it to the odd one
            place = (2 * program + (position == begin).to(tl.int32)).to(tl.int64) * H
            part = partial + (place + head[:, None]) * 512
            _store_chunk(part, a0, b0, mask, KIND)
            _store_chunk(part + 128, a1, b1, mask, KIND)
            _store_chunk(part + 256, a2, b2, mask, KIND)
            _store_chunk(part + 384, a3, b3, mask, KIND)
            tl.store(partial_lse + place + head, own_lse, mask=is_head)
        position += count
    # nobody else comes by a request of no keys
    for empty in range(program, B, tl.num_programs(0)):
        if PAGE_SIZE > 0:
            nothing = tl.load(indptr + empty) <= 0
        else:
            nothing = tl.load(indptr + empty + 1) <= tl.load(indptr + empty)
        if nothing:
            zero = tl.zeros([BLOCK_H, 512], out.dtype.element_ty)
            to = out + tl.cast(empty, tl.int64) * out_stride_b + head[:, None].to(tl.int64) * out_stride_h
            to = tl.multiple_of(to, [16, 16])
            tl.store(to + tl.arange(0, 512)[None, :], zero, mask=is_head[:, None])
            tl.store(requests + 2 * empty + 1, -1)  # nothing to merge
            if lse is not None:
                none = lse + tl.cast(empty, tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h
                tl.store(none, tl.full([BLOCK_H], -float("inf"), lse.dtype.element_ty), mask=is_head)


@triton.jit
def _merge_columns(partial, partial_lse, first, last, h, H, m, d, BLOCK_S: tl.constexpr):
    """The weighted sum of a request's partials in columns ``d``; ``m`` is the largest log-sum-exp."""
    acc = tl.zeros([d.shape[0]], tl.float32)
    for at in range(first, last + 1, BLOCK_S):
        some = at + tl.arange(0, BLOCK_S)
        place = _place(some, first, H) + h
        weight = tl.exp2(tl.load(partial_lse + place, mask=some <= last, other=-float("inf")) - m)
        part = tl.load(partial + place[:, None] * 512 + d[None, :], mask=(some <= last)[:, None], other=0.0)
        acc += tl.sum(part.to(tl.float32) * weight[:, None], 0)
    return acc


@triton.jit
def _place(program, first, H):
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
    partial_lse, spans, requests = _tables(partial, programs, H)
    if PDL:
        gdc_wait()
    if SLICES > 0:
        b = program // SLICES
        mine = program % SLICES
        first = tl.load(requests + 2 * b)
        last = tl.load(requests + 2 * b + 1)
        wanted = last >= 0  # else one program had all of it, and wrote it
    else:
        b = tl.load(spans + program * 4)
        first = tl.load(spans + program * 4 + 1)
        last = tl.load(spans + program * 4 + 2)
        mine = program - first - 1
        wanted = (b >= 0) & ((mine == 0) | ((last - first >= 16) & (mine < 16)))
    if wanted:
        s = first + tl.arange(0, PARTIALS)
        parts = tl.load(partial_lse + _place(s, first, H) + h, mask=s <= last, other=-float("inf"))
        m = tl.max(parts, 0)
        denominator = tl.sum(tl.exp2(parts - m), 0)
        if sinks is not None:
            denominator += tl.exp2(tl.load(sinks + h).to(tl.float32) * 1.4426950408889634 - m)
        if lse is not None:
            _store_lse(lse, b, h, lse_stride_b, lse_stride_h, m, denominator, mine == 0)
        factor = _times(v_scale, v_scale_at) / denominator
        to = out + b.to(tl.int64) * out_stride_b + h.to(tl.int64) * out_stride_h
        kind = out.dtype.element_ty
        if SLICES > 0:
            d = mine * (512 // SLICES) + tl.arange(0, 512 // SLICES)
            acc = _merge_columns(partial, partial_lse, first, last, h, H, m, d, BLOCK_S)
            tl.store(to + d, rounded(acc * factor, kind))
        elif last - first < 16:
            d = tl.arange(0, 512)
            acc = _merge_columns(partial, partial_lse, first, last, h, H, m, d, 4)
            tl.store(to + d, rounded(acc * factor, kind))
        else:
            few = mine * 32 + tl.arange(0, 32)
            part = _merge_columns(partial, partial_lse, first, last, h, H, m, few, BLOCK_S)
            tl.store(to + few, rounded(part * factor, kind))


def merge_config(batch: int, wide: bool = False, interpret: bool = False) -> dict[str, int]:
    """Launch numbers of the merge, ``wide`` after decode_sm90. Few requests have many partials each; among many, few
    have any."""
    if interpret and batch <= 32:  # programs run one after the other there, and each costs the same
        return {"SLICES": 2, "BLOCK_S": 16, "num_warps": 1}
    if batch == 1:
        return {"SLICES": 16, "BLOCK_S": 32, "num_warps": 1} if wide else {"SLICES": 16, "BLOCK_S": 128, "num_warps": 4}
    if batch <= 8 and not wide:
        return {"SLICES": 8, "BLOCK_S": 64, "num_warps": 2}
    if batch <= 32:
        return {"SLICES": 4, "BLOCK_S": 16, "num_warps": 1}
    return {"SLICES": 0, "BLOCK_S": 64, "num_warps": 1}


Query: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def mla_decode(
    q: Query,
    kv: torch.Tensor,
    out: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    sm_scale: float,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    xai_temperature_len: int = -1,
    lse: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """Attend from every request's query to its cached rows; see the module for shapes and the formula.

    ``q``, ``kv``, ``out`` and ``lse`` may be strided, the first three not in their last dimension. A request of no rows
    gets zeros, and -inf in ``lse``; no requests launch nothing. Two launches on the current stream, no sync; the
    scratch (9 MB at 16 heads, whatever the lengths) comes from torch's allocator at every call, so a captured graph has
    it in its pool, once for all of its calls; rows of ``q`` or ``out`` that do not begin on 16 bytes are copied. Equal
    inputs, equal outputs, with ``lse`` and without. ``config`` replaces the launch numbers of `decode_config`. Returns
    ``out``.

    Raises:
        ValueError: a tensor's shape, type, device or layout, or a scale that is not finite and positive. Values in
            tensors are not looked at.
    """
    options = (k_scale, v_scale, sinks, lse, sm_scale, logit_cap, xai_temperature_len, config)
    return _decode(q, kv, out, indptr, token_ids, False, *options)


def mla_decode_paged(
    q: Query,
    kv: torch.Tensor,
    out: torch.Tensor,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    *,
    sm_scale: float,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    xai_temperature_len: int = -1,
    lse: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`mla_decode` by pages: request b owns the first ``lens[b]`` rows of the pages in ``block_table[b]``.

        kv           [pages, page_size, 576] (or [pages, page_size, 1, 576]), any page size; pages may lie apart
        block_table  [>= B, pages], int32 or int64; rows may lie apart. A view of its first columns will do, as long as
                     the memory behind it goes on with the request's other pages
        lens         [>= B], int32 or int64

    What the table holds past a request's pages is not read. All else is as there; Triton compiles page sizes apart.
    """
    options = (k_scale, v_scale, sinks, lse, sm_scale, logit_cap, xai_temperature_len, config)
    return _decode(q, kv, out, lens, block_table, True, *options)


def _decode(
    query: Query,
    kv: torch.Tensor,
    out: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    paged: bool,
    k_scale: float | torch.Tensor,
    v_scale: float | torch.Tensor,
    sinks: torch.Tensor | None,
    lse: torch.Tensor | None,
    sm_scale: float,
    logit_cap: float,
    xai_temperature_len: int,
    config: dict[str, int] | None,
) -> torch.Tensor:
    """Launch; where ``paged``, ``indptr`` holds lengths and ``token_ids`` is the block table.

    Every layer of every step makes the same call but for addresses, so what was found out about the first is kept. The
    key has all that checks look at and that Triton compiles apart, but for what changes from step to step.
    """
    q, rope = query if isinstance(query, tuple) else (query, None)
    batch = q.shape[0]
    key = (
        q.shape, q.stride(), q.dtype, q.device, kv.shape, kv.stride(), kv.dtype, kv.device,
        out.shape, out.stride(), out.dtype, out.device, indptr.shape, indptr.stride(), indptr.dtype, indptr.device,
        token_ids.dtype, token_ids.device, paged, _told(k_scale), _told(v_scale),
        # a number may come as a tensor, which is equal to itself alone
        bool(sm_scale > 0), bool(logit_cap > 0), bool(xai_temperature_len > 0),
        rope if rope is None else (rope.shape, rope.stride(), rope.dtype, rope.device),
        sinks if sinks is None else (sinks.shape, sinks.stride(), sinks.dtype, sinks.device),
        lse if lse is None else (lse.shape, lse.stride(), lse.dtype, lse.device),
    )  # fmt: skip
    launches = _KNOWN.get(key)
    if (
        launches is None
        or config is not None
        or not _fits(token_ids, paged, batch)
        or (q.data_ptr() | kv.data_ptr() | out.data_ptr()) % 16
        or (rope is not None and rope.data_ptr() % 16)
        or gpu.elsewhere(q)
    ):
        return _first(
            q, rope, kv, out, indptr, token_ids, paged, k_scale, v_scale, sinks, lse, sm_scale, logit_cap,
            xai_temperature_len, config, key,
        )  # fmt: skip
    launches.launch(
        q, rope, kv, out, indptr, token_ids, sinks, lse, k_scale, v_scale, batch, token_ids.stride(0), sm_scale,
        float(logit_cap), int(xai_temperature_len),
    )  # fmt: skip
    return out


def _first(
    q: torch.Tensor,
    rope: torch.Tensor | None,
    kv: torch.Tensor,
    out: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    paged: bool,
    k_scale: float | torch.Tensor,
    v_scale: float | torch.Tensor,
    sinks: torch.Tensor | None,
    lse: torch.Tensor | None,
    sm_scale: float,
    logit_cap: float,
    xai_temperature_len: int,
    config: dict[str, int] | None,
    key: Any,
) -> torch.Tensor:
    """`_decode` of a call whose like has not been before, or that needs another device or copies first."""
    rows = kv[:, :, 0] if paged and kv.dim() == 4 and kv.shape[2] == 1 else kv
    kind = _check(q, rope, rows, out, indptr, token_ids, paged, sinks, lse)
    _check_scale("k_scale", k_scale, q)
    _check_scale("v_scale", v_scale, q)
    options = (paged, k_scale, v_scale, sinks, lse, sm_scale, logit_cap, xai_temperature_len, config)
    if gpu.elsewhere(q):
        with torch.cuda.device(q.device):
            return _decode(q if rope is None else (q, rope), kv, out, indptr, token_ids, *options)
    batch, heads = q.shape[0], q.shape[1]
    if batch == 0:
        return out
    if not gpu.aligned(q) or (rope is not None and not gpu.aligned(rope)):
        q = gpu.realigned(q)
        return _decode(q if rope is None else (q, gpu.realigned(rope)), kv, out, indptr, token_ids, *options)
    if not gpu.aligned(out):
        own = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        return out.copy_(_decode(q if rope is None else (q, rope), kv, own, indptr, token_ids, *options))
    # without pages these two are no parameters at all
    page_stride, row_stride = None, rows.stride(0)
    if paged:
        page_stride, row_stride = rows.stride(0), rows.stride(1)
    capability, sms = (0, 0), 1
    if not _INTERPRETED:
        index = q.device.index
        capability, sms = gpu.capability(index), gpu.sm_count(index)
    kernel, wide_key, seen_as = _decode_kernel, None, None
    wide = config is None and capability == (9, 0) and heads > NARROW and sm_scale > 0
    if wide and _is_wide(q, kv, row_stride, page_stride):
        kernel, wide_key = _wide()
    if kind != DIRECT:  # seen as wider integers, and strides with it
        if kind == E4M3:
            kind = _kinds(capability)[1]
        width, seen_as = (2, torch.int16) if wide_key is None else (4, torch.int32)
        row_stride, page_stride = row_stride // width, page_stride and page_stride // width
    work = (heads, batch, kind, q.dtype is torch.float32, capability, sms, wide_key)
    plan = _plan(work, (logit_cap > 0, xai_temperature_len > 0, rows.shape[1] if paged else 0), config)
    programs, grid, numbers, merge_grid, merge = plan
    launches = _Launches(
        Relaunch(kernel, grid, numbers),
        Relaunch(_merge_kernel, merge_grid, merge),
        programs,
        heads,
        _scratch(programs, heads, batch, kind),
        seen_as,
        isinstance(k_scale, torch.Tensor),
        isinstance(v_scale, torch.Tensor),
        (*q.stride()[:2], *(q if rope is None else rope).stride()[:2]),
        row_stride,
        page_stride,
        out.stride()[:2],
        (None, None) if lse is None else lse.stride(),
    )
    launches.launch(
        q, rope, kv, out, indptr, token_ids, sinks, lse, k_scale, v_scale, batch, token_ids.stride(0), sm_scale,
        float(logit_cap), int(xai_temperature_len),
    )  # fmt: skip
    if config is None and kv.data_ptr() % 16 == 0:
        launches.settle()
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        _KNOWN[key] = launches
    return out


class _Launches:
    """Both launches of calls that are alike, whose tensors have been checked.

    The first time Triton looks at all arguments, and compiles what it has not; from `settle` on addresses will do.
    """

    __slots__ = (
        "address", "decode", "heads", "k_on_device", "kv_stride", "lse_strides", "merge", "out_strides", "page_stride",
        "programs", "q_strides", "rope_of", "rows_of", "scratch", "v_on_device",
    )  # fmt: skip

    def __init__(
        self, decode: Relaunch, merge: Relaunch, programs: int, heads: int, scratch: tuple[int, torch.dtype],
        seen_as: torch.dtype | None, k_on_device: bool, v_on_device: bool, q_strides: Any, kv_stride: int,
        page_stride: int | None, out_strides: Any, lse_strides: Any,
    ) -> None:  # fmt: skip
        self.decode, self.merge, self.programs, self.heads, self.scratch = decode, merge, programs, heads, scratch
        self.k_on_device, self.v_on_device = k_on_device, v_on_device
        self.q_strides, self.kv_stride, self.page_stride = q_strides, kv_stride, page_stride
        self.out_strides, self.lse_strides = out_strides, lse_strides
        self.address: Any = lambda tensor: tensor
        self.rope_of: Any = lambda q: q[..., 512:]
        self.rows_of: Any = lambda kv: kv if seen_as is None else _as_wider(kv, seen_as)

    def settle(self) -> None:
        if self.decode.settle() and self.merge.settle():
            self.address = self.rows_of = torch.Tensor.data_ptr
            self.rope_of = lambda q: q.data_ptr() + 512 * q.element_size()

    def launch(
        self, q: Any, rope: Any, kv: Any, out: Any, indptr: Any, token_ids: Any, sinks: Any, lse: Any, k_scale: Any,
        v_scale: Any, batch: int, table_stride: int, sm_scale: float, logit_cap: float, xai_len: int,
    ) -> None:  # fmt: skip
        at, page_stride = self.address, self.page_stride
        size, dtype = self.scratch
        # held until both launches are made: an address keeps no memory
        scratch = torch.empty(size, dtype=dtype, device=q.device)
        partial, result = at(scratch), at(out)
        if sinks is not None:
            sinks = at(sinks)
        if lse is not None:
            lse = at(lse)
        k_scale_at = v_scale_at = None
        if self.k_on_device:
            k_scale_at = at(k_scale)
        else:
            sm_scale *= k_scale
        if self.v_on_device:
            v_scale_at, v_scale = at(v_scale), 1.0
        self.decode(
            at(q), self.rope_of(q) if rope is None else at(rope), self.rows_of(kv), result, lse, at(indptr),
            at(token_ids), sinks, k_scale_at, v_scale_at, partial, batch, self.heads, float(sm_scale), float(v_scale),
            logit_cap, xai_len, *self.q_strides, self.kv_stride, *self.out_strides, *self.lse_strides,
            None if page_stride is None else table_stride, page_stride,
        )  # fmt: skip
        self.merge(
            result, lse, sinks, v_scale_at, partial, self.programs, self.heads, float(v_scale), *self.out_strides,
            *self.lse_strides,
        )  # fmt: skip


def _as_wider(kv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of 8-bit values as rows of a wider type. A view looks at the strides of dimensions of one, too, which may be
    anything."""
    strides = [stride if size > 1 else 0 for size, stride in zip(kv.shape, kv.stride(), strict=True)]
    return kv.as_strided(kv.shape, strides).view(dtype)


_KNOWN: dict[Any, _Launches] = {}
_MOST = 8192  # an eager engine comes by a few for each number of requests


def _told(scale: float | torch.Tensor) -> Any:
    """What a scale is, for a key: True is a number that is right."""
    if isinstance(scale, torch.Tensor):
        return scale.shape, scale.dtype, scale.device
    return 0 < scale < math.inf  # false of NaN, too


def _fits(token_ids: torch.Tensor, paged: bool, batch: int) -> bool:
    """Whether a list of ids or a block table is right, in what no key can hold since it changes from step to step."""
    if paged:
        if token_ids.dim() != 2 or not 0 <= token_ids.stride(0) < 2**31:
            return False
        rows, columns = token_ids.shape
        return rows >= batch and (columns <= 1 or token_ids.stride(1) == 1)
    return token_ids.dim() == 1 and token_ids.is_contiguous()


_Plan = tuple[int, tuple[int, int], dict[str, Any], tuple[int, int], dict[str, Any]]


def _plan(
    work: tuple[int, int, int, bool, tuple[int, int], int, int | None],
    variant: tuple[bool, bool, int],
    config: dict[str, int] | None,
) -> _Plan:
    """How many programs, and both launches' grids and numbers.

    ``work``: heads, requests, how the cache is read, whether q is float32, the chip and its multiprocessors, and the
    key of decode_sm90 where that kernel serves.
    """
    heads, batch, kind, float32, capability, sms, key = work
    capped, xai, page_size = variant
    numbers: dict[str, Any]
    if key is not None:
        numbers, tiles, per_sm = {"E5M2": kind == E5M2, "KEY": key, "num_warps": 4}, -(-heads // 64), 1
    else:
        numbers = dict(config or _numbers(heads, kind, capability, float32))
        tiles, per_sm = -(-heads // numbers["BLOCK_H"]), numbers.pop("PER_SM")
        rows = next((rows for rows in (16, 64, 256, 1024, 4096) if rows >= batch), 1 << (batch - 1).bit_length())
        # measured: with few requests the merge's early programs only stand in the way
        numbers |= {"KIND": kind, "ROWS": rows, "PDL": capability >= (9, 0) and HAS_PDL and batch >= 64}
    numbers |= {"CAPPED": capped, "XAI": xai, "PAGE_SIZE": page_size}
    programs = max(1, per_sm * sms // tiles)
    merge: dict[str, Any] = merge_config(batch, key is not None, _INTERPRETED)
    pdl = numbers.get("PDL", False)
    merge |= {"PARTIALS": max(1 << (programs - 1).bit_length(), 2), "PDL": pdl} | ({"launch_pdl": True} if pdl else {})
    return programs, (programs, tiles), numbers, (batch * merge["SLICES"] or programs, heads), merge


def mla_decode_ref(
    q: Query,
    kv: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    sm_scale: float,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    xai_temperature_len: int = -1,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, in float64 on the stored bytes: [B, H, 512]; ``lse`` is written where it is given."""
    if isinstance(q, tuple):
        q = torch.cat(q, -1)
    batch, heads = q.shape[:2]
    if lse is not None:
        lse.fill_(-math.inf)
    out = torch.zeros(batch, heads, 512, dtype=torch.float64, device=q.device)
    bounds = indptr[: batch + 1].tolist()
    for b in range(batch):
        length = bounds[b + 1] - bounds[b]
        if length <= 0:
            continue
        keys = kv.reshape(kv.shape[0], -1)[token_ids[bounds[b] : bounds[b + 1]].long()].double()
        s = q[b].double() @ keys.T * (sm_scale * k_scale)
        if logit_cap > 0:
            s = logit_cap * torch.tanh(s / logit_cap)
        if xai_temperature_len > 0 and length - 1 > xai_temperature_len:
            s = s * (math.log2(length - 1) / math.log2(xai_temperature_len))
        total = s.logsumexp(-1)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.double())
        if lse is not None:
            lse[b] = total
        out[b] = torch.exp(s - total[:, None]) @ keys[:, :512] * v_scale
    return out


def compile_cases(every: bool = False) -> list[CompileCase]:
    """What the launch tables can ask Triton to compile: all options off and all on, or, for ``every``, the product."""
    switches = (
        list(itertools.product((False, True), repeat=3)) if every else [(False, False, False), (True, True, True)]
    )
    cases = []
    for sm in TARGETS:
        capability = (sm // 10, sm % 10)
        for kind, heads, (capped, xai, sinks), form in itertools.product(
            _kinds(capability), (16, 128), switches, ("", "paged", "float32")
        ):
            # of what differs only at the ends of the loop, or in few of its instructions, one case will do
            if form and not every and not (heads == 16 and sinks and kind != E5M2 and sm in FEW_TARGETS):
                continue
            # e5m2 has an instruction less than e4m3, and a case without options less than the one with all
            if not every and sm not in FEW_TARGETS and (kind == E5M2 or not sinks):
                continue
            numbers = _numbers(heads, kind, capability, form == "float32")
            if heads > 16 and numbers == _numbers(16, kind, capability, form == "float32"):
                continue
            del numbers["PER_SM"]
            warps, registers = numbers.pop("num_warps"), numbers.pop("maxnreg", None)
            index = "*i64" if sinks else "*i32"
            pointers = {"q": "*bf16", "kv": "*bf16" if kind == DIRECT else "*i16", "out": "*fp32" if sinks else "*bf16"}
            pointers |= {"indptr": index, "token_ids": index, "partial": "*fp32" if kind == DIRECT else "*fp16"}
            pointers |= {"sinks": "*fp32"} if sinks else {}
            pointers |= {"q": "*fp32"} if form == "float32" else {}
            pointers |= {"q_rope": pointers["q"]}
            scalars = dict.fromkeys(("B", "H", "xai_len", *_STRIDES), "i32")
            scalars |= dict.fromkeys(("sm_scale", "v_scale", "logit_cap"), "fp32")
            options: dict[str, Any] = {
                "KIND": kind,
                "CAPPED": capped,
                "XAI": xai,
                "ROWS": 256,
                "PDL": sm >= 90 and sinks,
                "PAGE_SIZE": 64 if form == "paged" else 0,
            }
            if form == "paged":
                scalars |= {"table_stride": "i32", "page_stride": "i64"}
            else:
                options |= {"table_stride": None, "page_stride": None}
            if sinks:  # with all else that a call may bring
                pointers |= {"lse": "*fp32", "k_scale_at": "*fp32", "v_scale_at": "*fp32"}
                scalars |= {"lse_stride_b": "i32", "lse_stride_h": "i32"}
            else:
                absent = ("sinks", "lse", "k_scale_at", "v_scale_at", "lse_stride_b", "lse_stride_h")
                options |= dict.fromkeys(absent)
            what = f"{('direct', 'e4m3', 'e4m3 bits', 'e5m2')[kind]}, {heads} heads, {capped} {xai} {sinks}"
            cases.append(
                CompileCase(
                    f"decode {what} {form}".rstrip(),
                    _decode_kernel,
                    pointers | scalars,
                    options | numbers,
                    ("kv", "partial", "H", *_STRIDES, *(("page_stride",) if form == "paged" else ())),
                    warps,
                    maxnreg=registers,
                    targets=(sm,),
                    # bounds and pointers that the loop over keys has no use for: stored before it, loaded after it
                    stack=192,
                )
            )
    sizes = [(1, False), (4, False), (16, False), (64, False), (1, True)]
    for (batch, wide), sinks in itertools.product(sizes, (False, True)):
        numbers = merge_config(batch, wide)
        warps = numbers.pop("num_warps")
        pointers = {"out": "*bf16", "partial": "*fp32"}
        scalars = {"programs": "i32", "H": "i32", "v_scale": "fp32", "out_stride_b": "i32", "out_stride_h": "i32"}
        options = {"PARTIALS": 512, "PDL": False}
        if sinks:
            pointers |= {"sinks": "*fp32", "lse": "*fp32", "v_scale_at": "*fp32"}
            scalars |= {"lse_stride_b": "i32", "lse_stride_h": "i32"}
        else:
            options |= dict.fromkeys(("sinks", "lse", "v_scale_at", "lse_stride_b", "lse_stride_h"))
        name = f"merge {numbers} {sinks}"
        cases.append(CompileCase(name, _merge_kernel, pointers | scalars, options | numbers, num_warps=warps))
    return cases


def _numbers(heads: int, kind: int, capability: tuple[int, int], float32: bool) -> dict[str, int]:
    """Launch numbers of `decode_config`; a float32 q over a 16-bit cache takes twice the shared memory."""
    numbers = decode_config(heads, kind != DIRECT, capability, _INTERPRETED)
    if float32 and kind == DIRECT:
        numbers["BLOCK_N"] //= 2
    return numbers


def _kinds(capability: tuple[int, int]) -> tuple[int, ...]:
    """How caches are read on a chip: e4m3 has an instruction from sm_89 on."""
    return (DIRECT, E4M3 if capability >= (8, 9) else E4M3_BITS, E5M2)


_STRIDES = (
    "q_stride_b", "q_stride_h", "rope_stride_b", "rope_stride_h", "kv_stride", "out_stride_b", "out_stride_h",
)  # fmt: skip


def _scratch(programs: int, heads: int, batch: int, kind: int) -> tuple[int, torch.dtype]:
    """One call's scratch: two partials per program and head, their log-sum-exps, and who shares which request.

    It comes from torch's allocator at every call and is kept for none: whatever knows where a call's memory belongs (a
    stream, the pool of a captured graph, a thread's own pool) is the allocator, and a key of ours would mean something
    else in one of these.
    """
    places = 2 * programs * heads
    tables = places + 4 * programs + 2 * batch  # numbers of 4 bytes
    if kind == DIRECT:
        return places * 512 + tables, torch.float32
    # no mean of 8-bit values leaves float16's range
    return places * 512 + 2 * tables, torch.float16


def _is_wide(q: torch.Tensor, kv: torch.Tensor, row_stride: int, page_stride: int | None) -> bool:
    """Whether decode_sm90 takes these: rows that can be copied 16 bytes at a time."""
    unit = 64 if kv.element_size() == 1 else 16  # Triton wants to know of 16 elements, in int32 where they are 8-bit
    aligned = not (row_stride % unit or (page_stride or 0) % unit or kv.data_ptr() % 16)
    return aligned and HAS_GLUON and q.dtype is not torch.float32


@functools.cache
def _wide() -> tuple[Any, int]:
    from mla_patch.kernels.decode.sm90 import decode_sm90
    from mla_patch.kernels.sm90 import layouts as sm90

    return decode_sm90, sm90.KEY


_EIGHT_BIT = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
_INDEX = (torch.int32, torch.int64)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _check(
    q: torch.Tensor,
    rope: torch.Tensor | None,
    kv: torch.Tensor,
    out: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    paged: bool,
    sinks: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> int:
    """How the cache is read, or ValueError; reads metadata only."""
    if paged:
        if kv.dim() != 3 or kv.shape[1] < 1 or kv.shape[2] != 576 or kv.stride(2) != 1:
            found = f"shape {tuple(kv.shape)}, strides {kv.stride()}"
            raise ValueError(f"kv: {found}, expected [pages, page_size, 576] or [pages, page_size, 1, 576]")
    else:
        _check_rows(kv)
    kind = _check_call(q, rope, kv, out, sinks)
    batch, heads = q.shape[:2]
    if lse is not None:
        if lse.shape != (batch, heads) or lse.dtype not in (torch.float32, q.dtype):
            raise ValueError(f"lse: {told(lse)}, expected torch.float32 or {q.dtype} as q, {[batch, heads]}")
        _check_device("lse", lse, q)
    if not paged:
        _check_list("indptr", indptr, batch + 1, q)
        _check_list("token_ids", token_ids, 0, q)
        return kind
    _check_list("lens", indptr, batch, q)
    if token_ids.dtype not in _INDEX or token_ids.dim() != 2 or token_ids.shape[0] < batch:
        found = f"{token_ids.dtype}, shape {tuple(token_ids.shape)}"
        raise ValueError(f"block_table: {found}, expected int32 or int64, [{batch} or more, pages]")
    if token_ids.stride(1) != 1 and token_ids.shape[1] > 1:
        raise ValueError(f"block_table: stride {token_ids.stride(1)} in the last dimension, expected 1")
    _check_device("block_table", token_ids, q)
    return kind


def _check_rows(kv: torch.Tensor) -> None:
    if kv.shape[1:] not in ((1, 576), (576,)) or kv.stride(-1) != 1:
        raise ValueError(f"kv: shape {tuple(kv.shape)}, strides {kv.stride()}, expected [N, 1, 576] or [N, 576]")


def _check_call(
    q: torch.Tensor, rope: torch.Tensor | None, kv: torch.Tensor, out: torch.Tensor, sinks: torch.Tensor | None
) -> int:
    """How the cache is read, or ValueError, from all but its shape."""
    if not q.is_cuda and not _INTERPRETED:
        raise ValueError(f"q: on {q.device}, expected a CUDA device (or TRITON_INTERPRET=1 at import)")
    q_type, shape, kv_type = q.dtype, q.shape, kv.dtype
    if q_type not in _FLOATS:
        raise ValueError(f"q: {q_type}, expected torch.bfloat16, torch.float16 or torch.float32")
    width = 576 if rope is None else 512
    if len(shape) != 3 or shape[2] != width or q.stride(2) != 1:
        expected = f"[B, H, {width}]{'' if rope is None else ' beside a rope of its own'}, the last contiguous"
        raise ValueError(f"q: shape {tuple(shape)}, strides {q.stride()}, expected {expected}")
    batch, heads, _ = shape
    if not 1 <= heads <= 128:
        raise ValueError(f"q: {heads} heads, expected 1 to 128")
    if rope is not None:
        if rope.shape != (batch, heads, 64) or rope.dtype is not q_type or rope.stride(2) != 1:
            raise ValueError(
                f"q's rope: {told(rope)}, expected {q_type} as q, {[batch, heads, 64]}, the last contiguous"
            )
        _check_device("q's rope", rope, q)
    kind = _EIGHT_BIT.get(kv_type, DIRECT)
    if kind != DIRECT:
        if kv.stride(0) % 2 or kv.stride(-2) % 2 or kv.storage_offset() % 2:
            found = f"strides {kv.stride()}, offset {kv.storage_offset()}"
            raise ValueError(f"kv: {found}, expected even numbers: 8-bit values are read two at a time")
    elif kv_type not in _FLOATS[:2] or (kv_type is not q_type and q_type is not torch.float32):
        own = "torch.bfloat16, torch.float16" if q_type is torch.float32 else f"{q_type} as q"
        raise ValueError(f"kv: {kv_type}, expected {own}, torch.float8_e4m3fn or torch.float8_e5m2")
    if out.shape != (batch, heads, 512) or out.stride(2) != 1:
        raise ValueError(f"out: shape {tuple(out.shape)}, strides {out.stride()}, expected {[batch, heads, 512]}")
    if out.dtype not in _FLOATS:
        raise ValueError(f"out: {out.dtype}, expected torch.bfloat16, torch.float16 or torch.float32")
    if sinks is not None:
        if sinks.shape != (heads,) or not sinks.is_floating_point() or not sinks.is_contiguous():
            raise ValueError(f"sinks: {told(sinks)}, expected a float for each of {heads} heads, contiguous")
        _check_device("sinks", sinks, q)
    _check_device("kv", kv, q)
    _check_device("out", out, q)
    return kind


def _check_list(name: str, index: torch.Tensor, least: int, q: torch.Tensor) -> None:
    if index.dtype not in _INDEX or index.dim() != 1 or index.numel() < least or not index.is_contiguous():
        found = f"{index.dtype}, shape {tuple(index.shape)}"
        raise ValueError(f"{name}: {found}, expected int32 or int64, contiguous, at least {least} long")
    _check_device(name, index, q)


def _check_device(name: str, tensor: torch.Tensor, q: torch.Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name}: on {tensor.device}, expected {q.device} as q")


def _check_scale(name: str, value: float | torch.Tensor, q: torch.Tensor) -> None:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"{name}: {told(value)}, expected a number or one float on the device")
        _check_device(name, value, q)
    elif not 0 < value < math.inf:  # false of NaN, too
        raise ValueError(f"{name}: {value}, expected a finite number above 0")


watch_compiles(_decode_kernel, _merge_kernel)


def warmup(
    device: torch.device | str,
    heads: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    max_batch: int,
    page_size: int = 0,
    index: tuple[torch.dtype, torch.dtype] = (torch.int32, torch.int64),
    parts: bool = False,
) -> int:
    """Compile what `mla_decode` can reach with up to ``max_batch`` requests; how many kernels that took.

    With a ``page_size``, what `mla_decode_paged` can. ``index``: the types of indptr and token_ids, or of lens and
    block_table. ``parts``: of a query in two parts. Real launches over empty requests, so that Triton specialises as
    it will when serving; without sinks, cap and temperature, which MLA models do not have. Keeps no memory. Nothing to
    do on a CPU.

    Raises:
        ValueError: heads or types that `mla_decode` does not take.
    """
    q = torch.zeros(1, heads, 576, dtype=dtype, device=device)
    if not q.is_cuda and not _INTERPRETED:
        return 0
    before = COMPILES.total
    out = torch.empty(1, heads, 512, dtype=dtype, device=device)
    kv = torch.zeros(1, page_size or 1, 576, dtype=dtype, device=device).to(cache_dtype)
    ids = torch.zeros(1, dtype=index[1], device=device)
    # launch numbers change at a power of two or beside it; all requests share one row, by a stride of 0
    sizes = {size + beside for size in (2**n for n in range(max_batch.bit_length())) for beside in (-1, 0, 1)}
    with COMPILES.warming():
        for batch in sorted(size for size in sizes | {max_batch} if 0 < size <= max_batch):
            indptr = torch.zeros(batch + 1, dtype=index[0], device=device)
            rows = (batch, -1, -1)
            every = q.expand(rows)
            query = (every[..., :512], every[..., 512:]) if parts else every
            if page_size:
                mla_decode_paged(query, kv, out.expand(rows), ids.expand(batch, 1), indptr, sm_scale=1.0)
            else:
                mla_decode(query, kv, out.expand(rows), indptr, ids, sm_scale=1.0)
    return COMPILES.total - before
