"""Sparse MLA decode: every query attends to the cached tokens that a list of slots names, in an fp8 latent cache.

    q               [B, Sq, H, 576 or 512]    bfloat16; strides free but for the last dimension; 1 to 128 heads
    k_cache         [pages, ps, 1, 656 or 584]    one-byte elements, V3.2 under 576 wide queries and V4 under 512 wide
                    ones; `mla_patch.kernels.cache.layouts` says where its values lie
    indices         [B, Sq, topk]    int32, slots in any order, repeats count again; -1 and any other slot outside the
                    cache is no key
    topk_length     [B]    int32 or None: only the first so many indices of a request's lists count
    extra_*         a second cache with its own page size, indices and lengths, of the same layout: one softmax
    attn_sink       [H]    float32 or None
    out             [B, Sq, H, 512]    bfloat16
    lse             [B, H, Sq]    float32, natural log

    s_j = sm_scale * q . k_j        out = sum_j exp(s_j) k_j[:512] / (sum_j exp(s_j) + exp(sink))
    lse = log sum_j exp(s_j), which leaves the sink out; a query without a key has out 0 and lse +inf

A token's nope values become float16 in units of its largest scale, so that one product of scores and one of values
serves all its tiles: exact where scales are powers of two that lie within 2**15 of each other in a token, else to
2**-12 of a value and 448 * 2**-25 of the token's largest scale. The latter is at most 2**-24 of the token's largest
value, as writers choose scales, but much of a tile whose scale is 2**-22 of the largest, and all of one below 2**-25.
That unit goes into the scores as a factor and into the weights as a logarithm, beneath the softmax's maximum, so that
weights times values stay in float16's range.

One program per query, tile of heads and split; splits are cut from the lengths that it finds on the device, so one
captured graph is right for all of them. A second kernel merges where there is more than one split.

On sm_90 more than 16 heads are `mla_patch.kernels.sparse.sm90`'s, where values become bfloat16: exact where scales are
powers of two, else to 2**-9.

The same kernel serves paged dense caches for `mla_patch.kernels.sparse.dense`.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from mla_patch.compat import gpu
from mla_patch.compat.compiles import COMPILES
from mla_patch.compat.triton import HAS_GLUON, TARGETS, CompileCase, interpreted, watch_compiles
from mla_patch.kernels.cache.dequantize import dequantize_ref, operand, rounded
from mla_patch.kernels.cache.layouts import V4, V32, Pages, new_pages, pages_of, told

_INTERPRETED = interpreted()
_PLAIN = tl.constexpr(_INTERPRETED)  # the interpreter knows no assembler

# how keys are stored
DENSE, DENSE_E4M3, SPARSE_V32, SPARSE_V4 = 0, 1, 2, 3
NARROW = 16  # up to so many heads a tile of 64 on sm_90 is mostly empty
LN2 = math.log(2.0)


def sparse_config(heads: int, capability: tuple[int, int], interpret: bool = False) -> dict[str, int]:
    """Launch numbers by architecture and heads; ``PER_SM`` programs fit on a multiprocessor."""
    if interpret:
        return {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 1, "PER_SM": 3, "num_warps": 4}
    if capability[0] in (9, 10) and heads > 16:
        # 64 heads are a whole tile of the tensor cores, and each key is decoded once for all of them
        return {"BLOCK_H": 64, "BLOCK_N": 64, "STAGES": 2, "PER_SM": 1, "num_warps": 8}
    if capability[0] in (9, 10):
        return {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 3, "PER_SM": 2, "num_warps": 4}
    return {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 2, "PER_SM": 1, "num_warps": 4}


@lru_cache(maxsize=4096)
def split_count(tiles: int, blocks: int, slots: int) -> int:
    """How many programs share a query's ``blocks`` of keys, where ``tiles`` tiles of queries fill ``slots`` places."""
    best, least = 1, math.inf
    for splits in range(1, max(1, min(blocks, slots // max(tiles, 1), 256)) + 1):
        waves = -(-tiles * splits // slots)
        # a merge and a program's own beginning and end cost about as much as two blocks of keys
        cost = waves * (-(-blocks // splits) + 2) + (2 if splits > 1 else 0)
        if cost < least:
            best, least = splits, cost
    return best


@triton.jit
def _halves(pairs, ratio, BITS: tl.constexpr):
    """int16 pairs of e4m3 codes times a float16 of at most 1 -> float16 values, in order; NaN stays NaN."""
    if BITS or _PLAIN:
        even, odd = _half(pairs & 0xFF) * ratio, _half((pairs >> 8) & 0xFF) * ratio
    else:
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, r;
            .reg .b16 a, b;
            prmt.b32 t, $2, 0, 0x3120;
            mov.b32 {a, b}, t;
            cvt.rn.f16x2.e4m3x2 t, a;
            mul.f16x2 $0, t, $3;
            cvt.rn.f16x2.e4m3x2 r, b;
            mul.f16x2 $1, r, $3;
            }""",
            "=&r,=r,r,r",
            [pairs, ratio],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return tl.interleave(even, odd)


@triton.jit
def _half(byte):
    """An e4m3 code as float16, by integer arithmetic: shifted into its place it is 2**-8 of its value."""
    magnitude = byte & 0x7F
    value = (((byte & 0x80) << 8) | (magnitude << 7)).to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit(do_not_specialize=["Sq", "q_b", "q_s"], do_not_specialize_on_alignment=["q"])
def _query_kernel(q, halves, units, H, Sq, q_b, q_s, q_h, NOPE: tl.constexpr, BLOCK_H: tl.constexpr):
    """A query's nope values as float16, in units of each head's: a power of two, so that nothing is lost."""
    groups = (H + BLOCK_H - 1) // BLOCK_H
    line, head = tl.program_id(0) // groups, tl.program_id(0) % groups * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, 512)
    mask = (head < H)[:, None] & (d < NOPE)[None, :]
    b, s = (line // Sq).to(tl.int64), (line % Sq).to(tl.int64)
    row = tl.multiple_of(q + b * q_b + s * q_s + head[:, None].to(tl.int64) * q_h, [16, 16])
    x = tl.load(row + d[None, :], mask=mask, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(x), 1)
    unit = (most.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.where(unit > 0, unit, 1.0)
    place = line.to(tl.int64) * H + head
    tl.store(halves + place[:, None] * 512 + d[None, :], (x / unit[:, None]).to(tl.float16), mask=(head < H)[:, None])
    tl.store(units + place, unit, mask=head < H)


@triton.jit
def _attend(
    m,
    weights,
    acc,
    acc_rope,
    q,
    qr,
    unit,
    values,
    rope,
    scales,
    ids,
    first,
    count,
    keys,
    places,
    scale,
    page_stride,
    row_stride,
    KIND: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``count`` blocks of keys more, from block ``first`` of ``keys`` that ``ids`` names: pages of a dense cache, else
    slots. ``places`` says how many of them the cache has."""
    # nope values of a sparse cache as tiles of pairs; V4 has seven, and an eighth of zeros
    TILES: tl.constexpr = 8 if KIND == 3 else 4
    PAIRS: tl.constexpr = 256 // TILES
    n = tl.arange(0, BLOCK_N)
    t = tl.arange(0, TILES)[None, :]
    pair = (tl.arange(0, TILES)[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :])[None, :, :]
    c = tl.arange(0, 512)[None, :]
    r = tl.arange(0, 64)[None, :]
    for i in tl.range(0, count, num_stages=STAGES):
        j = (first + i) * BLOCK_N + n
        if KIND < 2:
            page = tl.load(ids + j // PAGE, mask=j < keys, other=-1)
            known = (page >= 0) & (page < places)
            row = tl.where(known, page, 0).to(tl.int64) * page_stride + (j % PAGE).to(tl.int64) * row_stride
        else:
            slot = tl.load(ids + j, mask=j < keys, other=-1)
            known = (slot >= 0) & (slot < places)
            slot = tl.where(known, slot, 0)
            page = (slot // PAGE).to(tl.int64) * page_stride  # of 16 bytes
            at = slot % PAGE
        # masked, not clamped: an unknown slot has no row, and 0 times a stranger's NaN is NaN
        mask = known[:, None]
        if KIND == 0:
            k = operand(tl.load(values + row[:, None] + c, mask=mask, other=0.0))
            if ROPE:
                kr = operand(tl.load(values + row[:, None] + (512 + r), mask=mask, other=0.0))
        elif KIND == 1:
            one = tl.full([BLOCK_N, 256], 1.0, tl.float16)
            k = _halves(tl.load(values + row[:, None] + tl.arange(0, 256)[None, :], mask=mask, other=0), one, BITS)
            few = tl.full([BLOCK_N, 32], 1.0, tl.float16)
            at_rope = values + row[:, None] + (256 + tl.arange(0, 32)[None, :])
            kr = _halves(tl.load(at_rope, mask=mask, other=0), few, BITS)
        else:
            if KIND == 2:
                row = page * 8 + at * 328
                kr = tl.load(rope + (row + 264)[:, None] + r, mask=mask, other=0.0)
                s_t = tl.load(scales + (page * 4 + (at * 164 + 128))[:, None] + t, mask=mask, other=0.0)
                x = tl.load(values + row[:, None, None] + pair, mask=known[:, None, None], other=0)
            else:
                row = page * 8 + at * 288
                kr = tl.load(rope + (row + 224)[:, None] + r, mask=mask, other=0.0)
                codes = tl.load(scales + page * 2 + (PAGE * 72 + at), mask=known, other=0)
                power = (codes[:, None] >> (8 * t).to(tl.int64)).to(tl.int32) & 0xFF
                s_t = tl.where(t < 7, (power << 23).to(tl.float32, bitcast=True), 0.0)
                x = tl.load(values + row[:, None, None] + pair, mask=known[:, None, None] & (pair < 224), other=0)
            own = tl.max(tl.abs(s_t), 1)
            own = tl.maximum(own, 8.673617379884035e-19)  # 2**-60: a token of zeros has a weight, too
            part = 1.0 / own
            ratio = (s_t * part[:, None]).to(tl.float16)
            ratio = tl.broadcast_to(ratio[:, :, None], [BLOCK_N, TILES, PAIRS])
            k = tl.reshape(_halves(x, ratio, BITS), [BLOCK_N, 512])
        s = tl.dot(q, k.T)
        if KIND < 2:
            if ROPE:
                s = tl.dot(qr, kr.T, s)
            s = s * scale
        else:
            s = s * unit[:, None] * own[None, :]
            s = tl.dot(qr, operand(kr).T, s)
            s = s * scale
            s = s + tl.log2(own)[None, :]
        s = tl.where(known[None, :], s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1))
        base = tl.where(top == -float("inf"), 0.0, top)  # no key so far: -inf - -inf would be NaN
        keep = tl.exp2(m - base)
        w = tl.exp2(s - base[:, None])
        m = top
        p = w.to(k.dtype)
        if KIND >= 2:
            w = w * part[None, :]
        weights = weights * keep[:, None] + w
        acc = tl.dot(p, k, acc * keep[:, None])
        if KIND == 3:
            if _PLAIN:
                acc_rope = tl.dot(w, kr.to(tl.float32), acc_rope * keep[:, None])
            else:
                acc_rope = tl.dot(w.to(tl.bfloat16), kr, acc_rope * keep[:, None])
    return m, weights, acc, acc_rope


_STRIDES = (
    "q_b",
    "q_s",
    "q_h",
    "page_stride",
    "row_stride",
    "extra_page_stride",
    "ids_b",
    "ids_s",
    "extra_ids_b",
    "extra_ids_s",
    "lse_b",
    "lse_h",
    "lse_s",
)
_CHANGING = ["Sq", "topk", "extra_topk", "places", "extra_places", "sm_scale"]
_CHANGING += ["causal", "ids_b", "ids_s", "extra_ids_b", "extra_ids_s", "lse_b", "lse_h", "lse_s", "splits"]
_CALL_ARGS = ["ids", "extra_ids", "lens", "extra_lens", "sinks"]
_CALL_ARGS += ["descale_q", "descale_k"]


@triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_CALL_ARGS)
def _sparse_kernel(
    q,
    halves,
    units,
    out,
    lse,
    partial,
    partial_lse,
    values,
    rope,
    scales,
    ids,
    lens,
    extra_values,
    extra_rope,
    extra_scales,
    extra_ids,
    extra_lens,
    sinks,
    descale_q,
    descale_k,
    H,
    Sq,
    topk,
    extra_topk,
    places,
    extra_places,
    sm_scale,
    causal,
    splits,
    q_b,
    q_s,
    q_h,
    page_stride,
    row_stride,
    extra_page_stride,
    ids_b,
    ids_s,
    extra_ids_b,
    extra_ids_s,
    lse_b,
    lse_h,
    lse_s,
    KIND: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    EXTRA_PAGE: tl.constexpr,
    BITS: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One query, BLOCK_H of its heads, one of the splits of its keys. EXTRA_PAGE is 0 where there is one cache."""
    tiles = (H + BLOCK_H - 1) // BLOCK_H
    tile = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    split = rest % splits
    line = rest // splits
    b, s = line // Sq, line % Sq
    head = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = head < H
    keys = topk
    if lens is not None:
        keys = tl.minimum(tl.maximum(tl.load(lens + b), 0), topk).to(tl.int32)
        if causal > 0:
            keys = tl.maximum(keys - (Sq - 1 - s), 0)
    blocks = (keys + BLOCK_N - 1) // BLOCK_N
    total = blocks
    if EXTRA_PAGE > 0:
        extra_keys = extra_topk
        if extra_lens is not None:
            extra_keys = tl.minimum(tl.maximum(tl.load(extra_lens + b), 0), extra_topk).to(tl.int32)
        total += (extra_keys + BLOCK_N - 1) // BLOCK_N
    each = (total + splits - 1) // splits
    start = split * each
    stop = tl.minimum(start + each, total)
    at = b.to(tl.int64)
    source = q + at * q_b + s.to(tl.int64) * q_s + head[:, None].to(tl.int64) * q_h
    mask = is_head[:, None]
    d = tl.arange(0, 512)[None, :]
    NOPE: tl.constexpr = 448 if KIND == 3 else 512
    scale = sm_scale * 1.4426950408889634  # exp2 is what the chip has
    if descale_q is not None:
        scale = scale * tl.load(descale_q) * tl.load(descale_k)
    if KIND >= 2:
        # float16 already, and loaded as such: what is computed first, Triton would hold in registers
        place = line.to(tl.int64) * H + head
        unit = tl.load(units + place, mask=is_head, other=1.0)
        nope = halves + place[:, None] * 512
    else:
        unit = tl.full([BLOCK_H], 1.0, tl.float32)
        nope = source
    query = operand(tl.load(nope + d, mask=mask, other=0.0))
    if ROPE:
        qr = tl.load(source + NOPE + tl.arange(0, 64)[None, :], mask=mask, other=0.0)
    else:
        qr = query
    qr = operand(qr)
    m = tl.full([BLOCK_H], -float("inf"), tl.float32)
    weights = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_H, 512], tl.float32)
    acc_rope = tl.zeros([BLOCK_H, 64], tl.float32)
    own = ids + at * ids_b
    if KIND >= 2:
        own += s.to(tl.int64) * ids_s
    m, weights, acc, acc_rope = _attend(
        m, weights, acc, acc_rope, query, qr, unit, values, rope, scales, own, start,
        tl.minimum(stop, blocks) - start, keys, places, scale, page_stride, row_stride,
        KIND, ROPE, PAGE, BITS, BLOCK_N, STAGES,
    )  # fmt: skip
    if EXTRA_PAGE > 0:
        begin = tl.maximum(start - blocks, 0)
        own = extra_ids + at * extra_ids_b + s.to(tl.int64) * extra_ids_s
        m, weights, acc, acc_rope = _attend(
            m, weights, acc, acc_rope, query, qr, unit, extra_values, extra_rope, extra_scales, own,
            begin, stop - blocks - begin, extra_keys, extra_places, scale, extra_page_stride, row_stride,
            KIND, ROPE, EXTRA_PAGE, BITS, BLOCK_N, STAGES,
        )  # fmt: skip
    denominator = tl.sum(weights, 1)
    lonely = denominator == 0.0
    base = tl.where(m == -float("inf"), 0.0, m)
    log = base + tl.log2(tl.where(lonely, 1.0, denominator))
    if MERGE:
        factor = (1.0 / tl.where(lonely, 1.0, denominator))[:, None]
        place = (line.to(tl.int64) * splits + split) * H
        tl.store(partial_lse + place + head, tl.where(lonely, -float("inf"), log), mask=is_head)
        to = partial + (place + head[:, None]) * 512
    else:
        whole = denominator
        if sinks is not None:
            sink = tl.load(sinks + head, mask=is_head, other=0.0).to(tl.float32)
            whole += tl.exp2(sink * 1.4426950408889634 - base)
        factor = 1.0 / tl.where(lonely, 1.0, whole)
        if descale_k is not None:
            factor = factor * tl.load(descale_k)
        factor = factor[:, None]
        log = tl.where(lonely, float("inf"), log * 0.6931471805599453)
        tl.store(lse + at * lse_b + s.to(tl.int64) * lse_s + head.to(tl.int64) * lse_h, log, mask=is_head)
        to = out + (line.to(tl.int64) * H + head[:, None]) * 512
    kind = to.dtype.element_ty
    tl.store(to + d, rounded(acc * factor, kind), mask=mask & (d < NOPE))
    if KIND == 3:
        tl.store(to + NOPE + tl.arange(0, 64)[None, :], rounded(acc_rope * factor, kind), mask=mask)


_MERGE = {"SPLITS": 256, "BLOCK_S": 8, "num_warps": 4}  # one for any number of splits
_MERGE_CHANGING = ["Sq", "splits", "lse_b", "lse_h", "lse_s"]


@triton.jit(do_not_specialize=_MERGE_CHANGING, do_not_specialize_on_alignment=["sinks", "descale_k"])
def _sparse_merge_kernel(
    out,
    lse,
    partial,
    partial_lse,
    sinks,
    descale_k,
    H,
    Sq,
    splits,
    lse_b,
    lse_h,
    lse_s,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One head of one query from its splits, in ascending order."""
    line = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    some = tl.arange(0, SPLITS)
    first = line * splits
    logs = tl.load(partial_lse + (first + some) * H + h, mask=some < splits, other=-float("inf"))
    top = tl.max(logs, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    denominator = tl.sum(tl.exp2(logs - base), 0)
    lonely = denominator == 0.0
    whole = denominator
    if sinks is not None:
        whole += tl.exp2(tl.load(sinks + h).to(tl.float32) * 1.4426950408889634 - base)
    factor = 1.0 / tl.where(lonely, 1.0, whole)
    if descale_k is not None:
        factor = factor * tl.load(descale_k)
    natural = (base + tl.log2(tl.where(lonely, 1.0, denominator))) * 0.6931471805599453
    natural = tl.where(lonely, float("inf"), natural)
    tl.store(lse + line // Sq * lse_b + line % Sq * lse_s + h.to(tl.int64) * lse_h, natural)
    d = tl.arange(0, 512)
    acc = tl.zeros([512], tl.float32)
    for at in range(0, splits, BLOCK_S):
        split = at + tl.arange(0, BLOCK_S)
        place = (first + split) * H + h
        weight = tl.exp2(tl.load(partial_lse + place, mask=split < splits, other=-float("inf")) - base)
        part = tl.load(partial + place[:, None] * 512 + d[None, :], mask=(split < splits)[:, None], other=0.0)
        acc += tl.sum(part * weight[:, None], 0)
    tl.store(out + (line * H + h) * 512 + d, rounded(acc * factor, out.dtype.element_ty))


def launch(
    kind: int,
    q: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, int, int],
    ids: torch.Tensor,
    lens: torch.Tensor | None,
    most: int,
    *,
    sm_scale: float,
    extra: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, int, int] | None = None,
    extra_ids: torch.Tensor | None = None,
    extra_lens: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    descale: tuple[torch.Tensor, torch.Tensor] | None = None,
    causal: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch over tensors that are checked. ``keys``: values, rope, scales, page size, page and row stride, places.

    What is to be ``batch_invariant`` is not split: how many splits there are depends on how many queries there are.
    """
    if gpu.elsewhere(q):
        with torch.cuda.device(q.device):
            return launch(
                kind, q, keys, ids, lens, most, sm_scale=sm_scale, extra=extra, extra_ids=extra_ids,
                extra_lens=extra_lens, sinks=sinks, descale=descale, causal=causal, dtype=dtype,
                batch_invariant=batch_invariant, config=config,
            )  # fmt: skip
    batch, queries, heads, width = q.shape
    out = torch.empty(batch, queries, heads, 512, dtype=dtype, device=q.device)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device).transpose(1, 2)
    if batch == 0 or queries == 0:
        return out, lse
    capability, sms = (0, 0), 1
    if not _INTERPRETED:
        capability, sms = gpu.capability(q.device.index), gpu.sm_count(q.device.index)
    if kind >= SPARSE_V32:
        q = gpu.realigned(q)
    wide = config is None and kind >= SPARSE_V32 and is_wide(q, out, sm_scale, capability)
    numbers = dict(_WIDE if wide else config or sparse_config(heads, capability, _INTERPRETED))
    places = numbers.pop("PER_SM") * sms
    tiles = -(-heads // numbers["BLOCK_H"])
    size = numbers["BLOCK_N"]
    extra_most = extra_ids.shape[-1] if extra_ids is not None else 0
    lines = batch * queries
    splits = 1
    if not batch_invariant:
        splits = split_count(lines * tiles, -(-most // size) + -(-extra_most // size), places)
    partial, partial_lse = out, lse  # not read
    if splits > 1:
        partial = torch.empty(lines * splits * heads * 512, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(lines * splits * heads, dtype=torch.float32, device=q.device)
    values, rope, scales, page, page_stride, row_stride, count = keys
    x_values, x_rope, x_scales, x_page, x_stride, _, x_count = extra or (None, None, None, 0, 0, 0, 0)
    strides = (ids.stride(0), ids.stride(1) if ids.dim() == 3 else 0)
    x_strides = (extra_ids.stride(0), extra_ids.stride(1)) if extra_ids is not None else (0, 0)
    descale_q, descale_k = descale or (None, None)
    halves = units = None
    if wide:
        launch_wide(
            q, values, page_stride, page, count, ids, lens, out, lse, None, partial, partial_lse, splits,
            sm_scale=sm_scale, log_unit=LN2, sinks=sinks,
            extra=extra and (extra[0], x_stride, x_page, x_count, extra_ids, extra_lens),
        )  # fmt: skip
    else:
        if kind >= SPARSE_V32:
            halves = torch.empty_like(out, dtype=torch.float16)
            units = torch.empty(lines * heads, dtype=torch.float32, device=q.device)
            _query_kernel[(lines * -(-heads // 4),)](
                q, halves, units, heads, queries, q.stride(0), q.stride(1), q.stride(2), NOPE=width - 64, BLOCK_H=4,
                num_warps=4,
            )  # fmt: skip
        _sparse_kernel[(tiles * splits * lines,)](
            q, halves, units, out, lse, partial, partial_lse, values, rope, scales, ids, lens, x_values, x_rope,
            x_scales, extra_ids, extra_lens, sinks, descale_q, descale_k, heads, queries, most, extra_most,
            count, x_count, float(sm_scale), int(causal), splits, q.stride(0), q.stride(1), q.stride(2),
            page_stride, row_stride, x_stride, *strides, *x_strides, *lse.stride(),
            KIND=kind, ROPE=width == 576 or kind == SPARSE_V4, PAGE=page, EXTRA_PAGE=x_page,
            BITS=(0, 0) < capability < (8, 9), MERGE=splits > 1, **numbers,
        )  # fmt: skip
    if splits > 1:
        _sparse_merge_kernel[(lines * heads,)](
            out, lse, partial, partial_lse, sinks, descale_k, heads, queries, splits, *lse.stride(),
            **_MERGE,
        )  # fmt: skip
    return out, lse


_WIDE = {"BLOCK_H": 64, "BLOCK_N": 128, "PER_SM": 1}  # sparse_sm90's tiles


@lru_cache
def _wide() -> tuple[Any, int]:
    from mla_patch.kernels.sm90 import layouts as sm90
    from mla_patch.kernels.sparse.sm90 import sparse_sm90

    return sparse_sm90, sm90.KEY


def is_wide(q: torch.Tensor, out: torch.Tensor, sm_scale: float, capability: tuple[int, int]) -> bool:
    """Whether sparse_sm90 serves these queries, given `gpu.realigned`."""
    return HAS_GLUON and capability == (9, 0) and q.shape[-2] > NARROW and sm_scale > 0 and gpu.aligned(out)


def launch_wide(
    q: torch.Tensor,
    values: torch.Tensor,
    stride: int,
    page: int,
    places: int,
    ids: torch.Tensor,
    lens: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    max_logits: torch.Tensor | None,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    splits: int,
    *,
    sm_scale: float,
    log_unit: float,
    sinks: torch.Tensor | None,
    extra: tuple[torch.Tensor, int, int, int, torch.Tensor | None, torch.Tensor | None] | None = None,
) -> None:
    """sparse_sm90 over q [B, Sq, H, width]; lse [B, H, Sq] and max_logits [B, Sq, H] lie alike."""
    kernel, key = _wide()
    if page:  # e4m3 values, four at a time
        values = values.view(torch.int32)
    batch, queries, heads, width = q.shape
    x_values, x_stride, x_page, x_places, x_ids, x_lens = extra or (None, 0, 0, 0, None, None)
    x_topk, x_strides = (x_ids.shape[-1], x_ids.stride()) if x_ids is not None else (0, (0, 0))
    if x_values is not None:
        x_values = x_values.view(torch.int32)
    kernel[(-(-heads // 64) * splits * batch * queries,)](
        q, values, ids, lens, x_values, x_ids, x_lens, sinks, out, lse, max_logits, partial, partial_lse, heads,
        queries, ids.shape[-1], x_topk, places, x_places, float(sm_scale), log_unit, splits, q.stride(0), q.stride(1),
        q.stride(2), stride, x_stride, ids.stride(0), ids.stride(1), x_strides[0], x_strides[1], out.stride(-3),
        out.stride(-2), *lse.stride(), WIDTH=width, PAGE=page, EXTRA_PAGE=x_page, MERGE=splits > 1, KEY=key,
    )  # fmt: skip


def sparse_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    sm_scale: float,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    batch_invariant: bool = False,
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from every query to the tokens that its indices name; see the module. Returns ``out, lse``.

    No queries launch nothing. Without sync; results and scratch come from torch's allocator at every call, so a
    captured graph has them in its pool. Equal inputs give equal outputs. With ``batch_invariant`` a query's results are
    the same bit for bit whatever other queries there are: one program takes all keys of a query and a tile of heads,
    which is slower for few queries with many keys. ``config`` replaces `sparse_config`'s numbers.

    Raises:
        ValueError: a tensor's shape, type, device or layout. Values in tensors are not looked at.
    """
    pages = _check_queries(q, k_cache)
    _check_indices("indices", indices, q)
    _check_lengths("topk_length", topk_length, q)
    check_sinks(attn_sink, q)
    extra = None
    if (extra_k_cache is None) != (extra_indices is None):
        lacks = "extra_k_cache" if extra_k_cache is None else "extra_indices"
        raise ValueError(f"{lacks}: None, expected a tensor, since the other half of the extra cache is given")
    if extra_k_cache is not None and extra_indices is not None:
        second = pages_of("extra_k_cache", extra_k_cache)
        if second.layout is not pages.layout:
            found = f"{second.layout.bytes} bytes a token"
            raise ValueError(f"extra_k_cache: {found}, expected {pages.layout.bytes} as k_cache")
        _check_indices("extra_indices", extra_indices, q)
        check_device("extra_k_cache", extra_k_cache, q)
        extra = _addresses(second)
    elif extra_topk_length is not None:
        raise ValueError("extra_topk_length: given, expected None without extra_indices")
    _check_lengths("extra_topk_length", extra_topk_length, q)
    return launch(
        SPARSE_V4 if pages.layout is V4 else SPARSE_V32, q, _addresses(pages), indices, topk_length,
        indices.shape[-1], extra=extra, extra_ids=extra_indices, extra_lens=extra_topk_length, sinks=attn_sink,
        sm_scale=sm_scale, batch_invariant=batch_invariant, config=config,
    )  # fmt: skip


def _addresses(pages: Pages) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, int, int]:
    """A cache for the kernel. V3.2's tokens lie evenly where its pages do, whatever their size."""
    size, stride = pages.page_size, pages.page_bytes
    # V4's eight bytes of scales are read as one number
    scales = pages.pairs.view(torch.int64) if pages.layout is V4 else pages.scales
    if pages.layout is V32 and stride == size * 656:
        size, stride = 1, 656
    return pages.pairs, pages.rope, scales, size, stride // 16, 0, pages.slots


def sparse_decode_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    sm_scale: float,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in float64 on the stored bytes: out [B, Sq, H, 512] and lse [B, H, Sq]."""
    batch, queries, heads = q.shape[:3]
    out = torch.zeros(batch, queries, heads, 512, dtype=torch.float64, device=q.device)
    lse = torch.full((batch, heads, queries), math.inf, dtype=torch.float64, device=q.device)
    sets = [(k_cache, indices, topk_length)]
    if extra_k_cache is not None and extra_indices is not None:
        sets.append((extra_k_cache, extra_indices, extra_topk_length))
    for b, s in itertools.product(range(batch), range(queries)):
        found = []
        for cache, ids, lens in sets:
            slots = ids[b, s, : max(0, int(lens[b])) if lens is not None else None].long()
            known = slots[(slots >= 0) & (slots < cache.shape[0] * cache.shape[1])]
            found.append(dequantize_ref(cache, known))
        keys = torch.cat(found)
        if len(keys):
            scores = q[b, s].double() @ keys.T * sm_scale
            lse[b, :, s] = total = scores.logsumexp(-1)
            if attn_sink is not None:
                total = torch.logaddexp(total, attn_sink.double())
            out[b, s] = torch.exp(scores - total[:, None]) @ keys[:, :512]
    return out, lse


def _check_queries(q: torch.Tensor, k_cache: torch.Tensor) -> Pages:
    check_q(q)
    pages = pages_of("k_cache", k_cache)
    if q.shape[-1] != pages.layout.width:
        found = f"{q.shape[-1]} wide beside {pages.layout.bytes} bytes a token"
        raise ValueError(f"q: {found}, expected {pages.layout.width}")
    if q.dtype is not torch.bfloat16:
        raise ValueError(f"q: {q.dtype}, expected torch.bfloat16")
    check_device("k_cache", k_cache, q)
    return pages


def check_q(q: torch.Tensor) -> None:
    if not q.is_cuda and not _INTERPRETED:
        raise ValueError(f"q: on {q.device}, expected a CUDA device (or TRITON_INTERPRET=1 at import)")
    if q.dim() != 4 or q.shape[3] not in (576, 512) or (q.stride(3) != 1 and q.numel()):
        found = f"shape {tuple(q.shape)}, strides {q.stride()}"
        raise ValueError(f"q: {found}, expected [B, Sq, H, 576 or 512], the last contiguous")
    if not 1 <= q.shape[2] <= 128:
        raise ValueError(f"q: {q.shape[2]} heads, expected 1 to 128")


def check_sinks(sinks: torch.Tensor | None, q: torch.Tensor) -> None:
    if sinks is not None:
        if sinks.shape != (q.shape[2],) or not sinks.is_floating_point() or not sinks.is_contiguous():
            raise ValueError(f"attn_sink: {told(sinks)}, expected a float for each of {q.shape[2]} heads, contiguous")
        check_device("attn_sink", sinks, q)


def check_device(name: str, tensor: torch.Tensor, q: torch.Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name}: on {tensor.device}, expected {q.device} as q")


def _check_indices(name: str, ids: torch.Tensor, q: torch.Tensor) -> None:
    if ids.dtype is not torch.int32 or ids.dim() != 3 or ids.shape[:2] != q.shape[:2]:
        expected = f"torch.int32, [{q.shape[0]}, {q.shape[1]}, topk]"
        raise ValueError(f"{name}: {ids.dtype}, shape {tuple(ids.shape)}, expected {expected}")
    if ids.shape[2] > 1 and ids.stride(2) != 1:
        raise ValueError(f"{name}: stride {ids.stride(2)} in the last dimension, expected 1")
    check_device(name, ids, q)


def _check_lengths(name: str, lens: torch.Tensor | None, q: torch.Tensor) -> None:
    if lens is not None:
        if lens.dtype not in (torch.int32, torch.int64) or lens.shape != q.shape[:1] or not lens.is_contiguous():
            raise ValueError(f"{name}: {told(lens)}, expected int32 or int64, [{q.shape[0]}], contiguous")
        check_device(name, lens, q)


def compile_cases(every: bool = False) -> list[CompileCase]:
    """Every way of storing keys, with all options off and all on; page sizes differ in a constant."""
    cases = []
    for sm, kind, heads, full in itertools.product(TARGETS, range(4), (16, 64), (False, True)):
        numbers = sparse_config(heads, (sm // 10, sm % 10))
        extra = full and kind >= SPARSE_V32
        if (heads > 16 and numbers == sparse_config(16, (sm // 10, sm % 10))) or (
            heads == 64 and not full and not every
        ):
            continue
        del numbers["PER_SM"]
        warps = numbers.pop("num_warps")
        kinds = {DENSE: "*bf16", DENSE_E4M3: "*i16", SPARSE_V32: "*i16", SPARSE_V4: "*i16"}
        scales = {SPARSE_V32: "*fp32", SPARSE_V4: "*i64"}.get(kind)
        signature = {"q": "*fp16" if kind == DENSE_E4M3 else "*bf16", "out": "*bf16", "lse": "*fp32", "ids": "*i32"}
        signature |= {"partial": "*fp32", "partial_lse": "*fp32", "values": kinds[kind]}
        signature |= dict.fromkeys((*_COUNTS, *_STRIDES), "i32") | {"sm_scale": "fp32"}
        options: dict[str, Any] = {"rope": None, "scales": None, "halves": None, "units": None, "lens": None}
        options |= dict.fromkeys(("sinks", "descale_q", "descale_k"))
        options |= dict.fromkeys(("extra_values", "extra_rope", "extra_scales", "extra_ids", "extra_lens"))
        if scales is not None:
            signature |= {"rope": "*bf16", "scales": scales, "halves": "*fp16", "units": "*fp32"}
        if full or kind < SPARSE_V32:
            signature |= {"lens": "*i32"}
        if full:
            signature |= {"sinks": "*fp32"} | (
                {"descale_q": "*fp32", "descale_k": "*fp32"} if kind == DENSE_E4M3 else {}
            )
        if extra:
            signature |= {"extra_values": "*i16", "extra_rope": "*bf16", "extra_scales": scales or ""}
            signature |= {"extra_ids": "*i32", "extra_lens": "*i32"}
        options = {name: value for name, value in options.items() if name not in signature}
        options |= {"KIND": kind, "ROPE": True, "PAGE": 64, "EXTRA_PAGE": 2 if extra else 0, "BITS": sm < 89}
        options |= {"MERGE": full, **numbers}
        divisible: tuple[str, ...] = (
            "q",
            "out",
            "lse",
            "partial",
            "partial_lse",
            "values",
            "q_b",
            "q_s",
            "q_h",
            "page_stride",
        )
        divisible += ("row_stride",) if kind < SPARSE_V32 else ("rope", "scales", "halves", "units")
        divisible += ("extra_values", "extra_rope", "extra_scales") if extra else ()
        what = ("dense", "dense e4m3", "sparse V3.2", "sparse V4")[kind]
        name = f"sparse_decode {what}, {heads} heads, {full}"
        # addresses of the tensor cores' operands, which the loop over keys has no registers for
        stack = 1100 if heads > 16 else 192
        cases.append(
            CompileCase(name, _sparse_kernel, signature, options, divisible, warps, targets=(sm,), stack=stack)
        )
    query = {"q": "*bf16", "halves": "*fp16", "units": "*fp32"}
    query |= dict.fromkeys(("H", "Sq", "q_b", "q_s", "q_h"), "i32")
    name = "sparse_decode query"
    cases.append(CompileCase(name, _query_kernel, query, {"NOPE": 448, "BLOCK_H": 4}, ("halves", "units", "q_h")))
    merge = {"out": "*bf16", "lse": "*fp32", "partial": "*fp32", "partial_lse": "*fp32", "sinks": "*fp32"}
    merge |= {"descale_k": "*fp32"} | dict.fromkeys(("H", "Sq", "splits", "lse_b", "lse_h", "lse_s"), "i32")
    options = {name: value for name, value in _MERGE.items() if name != "num_warps"}
    aligned = ("out", "lse", "partial", "partial_lse")
    cases.append(CompileCase("sparse_decode merge", _sparse_merge_kernel, merge, options, aligned))
    return cases


_COUNTS = ("H", "Sq", "topk", "extra_topk", "places", "extra_places", "causal", "splits")


def warmup(
    device: torch.device | str, heads: int, page_sizes: tuple[int, ...] = (), extra: tuple[int, ...] = ()
) -> int:
    """Compile what `sparse_decode` can reach of V4's caches with pages of these sizes, alone and beside each of
    ``extra``, or, where no sizes are given, of V3.2's; how many kernels that took.

    Real launches over one token, with lengths and sinks beside V4, whose models have them; one that is split and one
    that is not, which is all that batches and topk change. Nothing to do on a CPU.
    """
    layout = V4 if page_sizes else V32
    q = torch.zeros(1, 1, heads, layout.width, dtype=torch.bfloat16, device=device)
    if not q.is_cuda and not _INTERPRETED:
        return 0
    before = COMPILES.total
    lens = torch.ones(1, dtype=torch.int32, device=device)
    with COMPILES.warming():
        for size, second, topk in itertools.product(page_sizes or (64,), (0, *extra), (1, 8192)):
            ids = torch.zeros(1, 1, topk, dtype=torch.int32, device=device)
            options: dict[str, Any] = {}
            if layout is V4:
                options = {"topk_length": lens, "attn_sink": torch.zeros(heads, device=device)}
            if second:
                options |= {"extra_k_cache": new_pages(layout, 1, second, device), "extra_indices": ids}
                options |= {"extra_topk_length": lens}
            sparse_decode(q, new_pages(layout, 1, size, device), ids, sm_scale=1.0, **options)
    return COMPILES.total - before


watch_compiles(_query_kernel, _sparse_kernel, _sparse_merge_kernel)
