"""Device code of the sparse family in Triton.

sparse_query_kernel      a query's nope values as float16, for sparse_kernel
sparse_kernel            sparse decode over pages of an fp8 cache, or of two
dense_kernel             dense decode over a paged cache
sparse_merge_kernel      the results of either from its splits
sparse_prefill_kernel    sparse prefill over a 16-bit workspace
"""

from __future__ import annotations

import triton
import triton.language as tl

from mla_patch.compat.triton import watch_compiles
from mla_patch.kernels.common.e4m3 import unpack_scaled_e4m3x2
from mla_patch.kernels.common.launch import INTERPRETED
from mla_patch.kernels.common.rounding import operand, rounded

_PLAIN = tl.constexpr(INTERPRETED)  # the interpreter multiplies no bfloat16


@triton.jit(do_not_specialize=["Sq", "q_b", "q_s"], do_not_specialize_on_alignment=["q"])
def sparse_query_kernel(q, halves, units, H, Sq, q_b, q_s, q_h, NOPE: tl.constexpr, BLOCK_H: tl.constexpr):
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
def _attend_dense(
    m,
    weights,
    acc,
    q,
    qr,
    values,
    ids,
    first,
    count,
    keys,
    places,
    scale,
    page_stride,
    row_stride,
    E4M3: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``count`` blocks of keys more, from block ``first`` of ``keys`` in the pages that ``ids`` names. ``places`` says
    how many pages the cache has."""
    n = tl.arange(0, BLOCK_N)
    c = tl.arange(0, 512)[None, :]
    r = tl.arange(0, 64)[None, :]
    for i in tl.range(0, count, num_stages=STAGES):
        j = (first + i) * BLOCK_N + n
        page = tl.load(ids + j // PAGE, mask=j < keys, other=-1)
        known = (page >= 0) & (page < places)
        row = tl.where(known, page, 0).to(tl.int64) * page_stride + (j % PAGE).to(tl.int64) * row_stride
        # masked, not clamped: an unknown page has no row, and 0 times a stranger's NaN is NaN
        mask = known[:, None]
        if E4M3:
            one = tl.full([BLOCK_N, 256], 1.0, tl.float16)
            at_nope = values + row[:, None] + tl.arange(0, 256)[None, :]
            k = unpack_scaled_e4m3x2(tl.load(at_nope, mask=mask, other=0), one, BITS)
            few = tl.full([BLOCK_N, 32], 1.0, tl.float16)
            at_rope = values + row[:, None] + (256 + tl.arange(0, 32)[None, :])
            kr = unpack_scaled_e4m3x2(tl.load(at_rope, mask=mask, other=0), few, BITS)
        else:
            k = operand(tl.load(values + row[:, None] + c, mask=mask, other=0.0))
            if ROPE:
                kr = operand(tl.load(values + row[:, None] + (512 + r), mask=mask, other=0.0))
        s = tl.dot(q, k.T)
        if ROPE:
            s = tl.dot(qr, kr.T, s)
        s = s * scale
        s = tl.where(known[None, :], s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1))
        base = tl.where(top == -float("inf"), 0.0, top)  # no key so far: -inf - -inf would be NaN
        keep = tl.exp2(m - base)
        w = tl.exp2(s - base[:, None])
        m = top
        p = w.to(k.dtype)
        weights = weights * keep[:, None] + w
        acc = tl.dot(p, k, acc * keep[:, None])
    return m, weights, acc


@triton.jit(
    do_not_specialize=["Sq", "topk", "places", "sm_scale", "causal", "splits", "ids_b", "lse_b", "lse_h", "lse_s"],
    do_not_specialize_on_alignment=["ids", "lens", "descale_q", "descale_k"],
)
def dense_kernel(
    q,
    out,
    lse,
    partial,
    partial_lse,
    values,
    ids,
    lens,
    descale_q,
    descale_k,
    H,
    Sq,
    topk,
    places,
    sm_scale,
    causal,
    splits,
    q_b,
    q_s,
    q_h,
    page_stride,
    row_stride,
    ids_b,
    lse_b,
    lse_h,
    lse_s,
    E4M3: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One query, BLOCK_H of its heads, one of the splits of its keys."""
    tiles = (H + BLOCK_H - 1) // BLOCK_H
    tile = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    split = rest % splits
    line = rest // splits
    b, s = line // Sq, line % Sq
    head = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = head < H
    keys = tl.minimum(tl.maximum(tl.load(lens + b), 0), topk).to(tl.int32)
    if causal > 0:
        keys = tl.maximum(keys - (Sq - 1 - s), 0)
    total = (keys + BLOCK_N - 1) // BLOCK_N
    each = (total + splits - 1) // splits
    start = split * each
    stop = tl.minimum(start + each, total)
    at = b.to(tl.int64)
    source = q + at * q_b + s.to(tl.int64) * q_s + head[:, None].to(tl.int64) * q_h
    mask = is_head[:, None]
    d = tl.arange(0, 512)[None, :]
    scale = sm_scale * 1.4426950408889634  # exp2 is what the chip has
    if descale_q is not None:
        scale = scale * tl.load(descale_q) * tl.load(descale_k)
    query = operand(tl.load(source + d, mask=mask, other=0.0))
    if ROPE:
        qr = tl.load(source + 512 + tl.arange(0, 64)[None, :], mask=mask, other=0.0)
    else:
        qr = query
    qr = operand(qr)
    m = tl.full([BLOCK_H], -float("inf"), tl.float32)
    weights = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_H, 512], tl.float32)
    m, weights, acc = _attend_dense(
        m, weights, acc, query, qr, values, ids + at * ids_b, start, stop - start, keys, places, scale, page_stride,
        row_stride, E4M3, ROPE, PAGE, BITS, BLOCK_N, STAGES,
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
        factor = 1.0 / tl.where(lonely, 1.0, denominator)
        if descale_k is not None:
            factor = factor * tl.load(descale_k)
        factor = factor[:, None]
        log = tl.where(lonely, float("inf"), log * 0.6931471805599453)
        tl.store(lse + at * lse_b + s.to(tl.int64) * lse_s + head.to(tl.int64) * lse_h, log, mask=is_head)
        to = out + (line.to(tl.int64) * H + head[:, None]) * 512
    kind = to.dtype.element_ty
    tl.store(to + d, rounded(acc * factor, kind), mask=mask)


@triton.jit
def _attend_sparse(
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
    V4: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``count`` blocks of keys more, from block ``first`` of ``keys`` slots in ``ids``. ``places`` says how many slots
    the cache has."""
    # nope values as tiles of pairs; V4 has seven, and an eighth of zeros
    TILES: tl.constexpr = 8 if V4 else 4
    PAIRS: tl.constexpr = 256 // TILES
    n = tl.arange(0, BLOCK_N)
    t = tl.arange(0, TILES)[None, :]
    pair = (tl.arange(0, TILES)[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :])[None, :, :]
    r = tl.arange(0, 64)[None, :]
    for i in tl.range(0, count, num_stages=STAGES):
        j = (first + i) * BLOCK_N + n
        slot = tl.load(ids + j, mask=j < keys, other=-1)
        known = (slot >= 0) & (slot < places)
        slot = tl.where(known, slot, 0)
        page = (slot // PAGE).to(tl.int64) * page_stride  # of 16 bytes
        at = slot % PAGE
        # masked, not clamped: an unknown slot has no row, and 0 times a stranger's NaN is NaN
        mask = known[:, None]
        if V4:
            row = page * 8 + at * 288
            kr = tl.load(rope + (row + 224)[:, None] + r, mask=mask, other=0.0)
            codes = tl.load(scales + page * 2 + (PAGE * 72 + at), mask=known, other=0)
            power = (codes[:, None] >> (8 * t).to(tl.int64)).to(tl.int32) & 0xFF
            s_t = tl.where(t < 7, (power << 23).to(tl.float32, bitcast=True), 0.0)
            x = tl.load(values + row[:, None, None] + pair, mask=known[:, None, None] & (pair < 224), other=0)
        else:
            row = page * 8 + at * 328
            kr = tl.load(rope + (row + 264)[:, None] + r, mask=mask, other=0.0)
            s_t = tl.load(scales + (page * 4 + (at * 164 + 128))[:, None] + t, mask=mask, other=0.0)
            x = tl.load(values + row[:, None, None] + pair, mask=known[:, None, None], other=0)
        own = tl.max(tl.abs(s_t), 1)
        own = tl.maximum(own, 8.673617379884035e-19)  # 2**-60: a token of zeros has a weight, too
        part = 1.0 / own
        ratio = (s_t * part[:, None]).to(tl.float16)
        ratio = tl.broadcast_to(ratio[:, :, None], [BLOCK_N, TILES, PAIRS])
        k = tl.reshape(unpack_scaled_e4m3x2(x, ratio, BITS), [BLOCK_N, 512])
        s = tl.dot(q, k.T)
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
        w = w * part[None, :]
        weights = weights * keep[:, None] + w
        acc = tl.dot(p, k, acc * keep[:, None])
        if V4:
            if _PLAIN:
                acc_rope = tl.dot(w, kr.to(tl.float32), acc_rope * keep[:, None])
            else:
                acc_rope = tl.dot(w.to(tl.bfloat16), kr, acc_rope * keep[:, None])
    return m, weights, acc, acc_rope


@triton.jit(
    do_not_specialize=[
        "Sq", "topk", "extra_topk", "places", "extra_places", "sm_scale", "ids_b", "ids_s", "extra_ids_b",
        "extra_ids_s", "lse_b", "lse_h", "lse_s", "splits",
    ],
    do_not_specialize_on_alignment=["ids", "extra_ids", "lens", "extra_lens", "sinks"],
)  # fmt: skip
def sparse_kernel(
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
    H,
    Sq,
    topk,
    extra_topk,
    places,
    extra_places,
    sm_scale,
    splits,
    q_b,
    q_s,
    q_h,
    page_stride,
    extra_page_stride,
    ids_b,
    ids_s,
    extra_ids_b,
    extra_ids_s,
    lse_b,
    lse_h,
    lse_s,
    V4: tl.constexpr,
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
    NOPE: tl.constexpr = 448 if V4 else 512
    scale = sm_scale * 1.4426950408889634  # exp2 is what the chip has
    # float16 already, and loaded as such: what is computed first, Triton would hold in registers
    place = line.to(tl.int64) * H + head
    unit = tl.load(units + place, mask=is_head, other=1.0)
    query = operand(tl.load(halves + place[:, None] * 512 + d, mask=mask, other=0.0))
    qr = operand(tl.load(source + NOPE + tl.arange(0, 64)[None, :], mask=mask, other=0.0))
    m = tl.full([BLOCK_H], -float("inf"), tl.float32)
    weights = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_H, 512], tl.float32)
    acc_rope = tl.zeros([BLOCK_H, 64], tl.float32)
    own = ids + at * ids_b + s.to(tl.int64) * ids_s
    m, weights, acc, acc_rope = _attend_sparse(
        m, weights, acc, acc_rope, query, qr, unit, values, rope, scales, own, start,
        tl.minimum(stop, blocks) - start, keys, places, scale, page_stride,
        V4, PAGE, BITS, BLOCK_N, STAGES,
    )  # fmt: skip
    if EXTRA_PAGE > 0:
        begin = tl.maximum(start - blocks, 0)
        own = extra_ids + at * extra_ids_b + s.to(tl.int64) * extra_ids_s
        m, weights, acc, acc_rope = _attend_sparse(
            m, weights, acc, acc_rope, query, qr, unit, extra_values, extra_rope, extra_scales, own,
            begin, stop - blocks - begin, extra_keys, extra_places, scale, extra_page_stride,
            V4, EXTRA_PAGE, BITS, BLOCK_N, STAGES,
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
        factor = factor[:, None]
        log = tl.where(lonely, float("inf"), log * 0.6931471805599453)
        tl.store(lse + at * lse_b + s.to(tl.int64) * lse_s + head.to(tl.int64) * lse_h, log, mask=is_head)
        to = out + (line.to(tl.int64) * H + head[:, None]) * 512
    kind = to.dtype.element_ty
    tl.store(to + d, rounded(acc * factor, kind), mask=mask & (d < NOPE))
    if V4:
        tl.store(to + NOPE + tl.arange(0, 64)[None, :], rounded(acc_rope * factor, kind), mask=mask)


@triton.jit(
    do_not_specialize=["Sq", "splits", "lse_b", "lse_h", "lse_s"],
    do_not_specialize_on_alignment=["sinks", "descale_k"],
)
def sparse_merge_kernel(
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


@triton.jit(
    do_not_specialize=["topk", "rows", "sm_scale", "unit", "ids_s"],
    do_not_specialize_on_alignment=["ids", "lens", "sinks", "max_logits", "lse"],
)
def sparse_prefill_kernel(
    q,
    kv,
    ids,
    lens,
    sinks,
    out,
    max_logits,
    lse,
    H,
    topk,
    rows,
    sm_scale,
    unit,
    q_s,
    q_h,
    kv_s,
    ids_s,
    out_s,
    out_h,
    ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One query, BLOCK_H of its heads. ``unit`` is what a base-2 logarithm of the statistics is multiplied by."""
    tiles = (H + BLOCK_H - 1) // BLOCK_H
    s = (tl.program_id(0) // tiles).to(tl.int64)
    head = tl.program_id(0) % tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = head < H
    mask = is_head[:, None]
    d = tl.arange(0, 512)[None, :]
    r = tl.arange(0, 64)[None, :]
    keys = topk
    if lens is not None:
        keys = tl.minimum(tl.maximum(tl.load(lens + s), 0), topk).to(tl.int32)
    source = q + s * q_s + head[:, None].to(tl.int64) * q_h
    nope = operand(tl.load(source + d, mask=mask, other=0.0))
    rope = nope
    if ROPE:
        rope = operand(tl.load(source + 512 + r, mask=mask, other=0.0))
    scale = sm_scale * 1.4426950408889634  # exp2 is what the chip has
    m = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, 512], tl.float32)
    n = tl.arange(0, BLOCK_N)
    own = ids + s * ids_s
    for i in tl.range(0, (keys + BLOCK_N - 1) // BLOCK_N, num_stages=STAGES):
        j = i * BLOCK_N + n
        row = tl.load(own + j, mask=j < keys, other=-1)
        known = (row >= 0) & (row < rows)
        # masked, not clamped: an unknown index has no row, and 0 times a stranger's NaN is NaN
        at = kv + tl.where(known, row, 0).to(tl.int64)[:, None] * kv_s
        k = operand(tl.load(at + d, mask=known[:, None], other=0.0))
        score = tl.dot(nope, k.T)
        if ROPE:
            score = tl.dot(rope, operand(tl.load(at + 512 + r, mask=known[:, None], other=0.0)).T, score)
        score = tl.where(known[None, :], score * scale, -float("inf"))
        top = tl.maximum(m, tl.max(score, 1))
        base = tl.where(top == -float("inf"), 0.0, top)  # no key so far: -inf - -inf would be NaN
        keep = tl.exp2(m - base)
        weight = tl.exp2(score - base[:, None])
        m = top
        total = total * keep + tl.sum(weight, 1)
        acc = tl.dot(weight.to(k.dtype), k, acc * keep[:, None])
    lonely = total == 0.0
    base = tl.where(m == -float("inf"), 0.0, m)
    whole = total
    if sinks is not None:
        sink = tl.load(sinks + head, mask=is_head, other=0.0).to(tl.float32)
        whole += tl.exp2(sink * 1.4426950408889634 - base)
    factor = 1.0 / tl.where(lonely, 1.0, whole)
    log = tl.where(lonely, float("inf"), base + tl.log2(tl.where(lonely, 1.0, total)))
    tl.store(max_logits + s * H + head, m * unit, mask=is_head)
    tl.store(lse + s * H + head, log * unit, mask=is_head)
    to = out + s * out_s + head[:, None].to(tl.int64) * out_h
    tl.store(to + d, rounded(acc * factor[:, None], out.dtype.element_ty), mask=mask)


watch_compiles(sparse_query_kernel, sparse_kernel, dense_kernel, sparse_merge_kernel, sparse_prefill_kernel)
