"""Device code of the sparse family in Triton.

    sparse_query_kernel      a query's nope values as float16, for sparse_kernel
    sparse_kernel            sparse decode over the pages of an fp8 cache, or of two
    dense_kernel             dense decode over a paged cache
    sparse_merge_kernel      the results of either from its splits
    sparse_prefill_kernel    sparse prefill over a 16-bit workspace

All attend with an online softmax to the base 2, which is what the chip computes. Their loops go over blocks of BLOCK_N
keys and hold, for BLOCK_H heads:

    q           [BLOCK_H, 512]        the query's latent values; a sparse cache's as float16, V4's padded with zeros
    q_rope      [BLOCK_H, 64]         its rotary values
    k           [BLOCK_N, 512]        the keys' latent values, which are the values of attention, too
    k_rope      [BLOCK_N, 64]         their rotary values
    score       [BLOCK_H, BLOCK_N]    base-2 scores; -inf where there is no key
    top         [BLOCK_H]             the running maximum of the scores; -inf before the first key
    weight      [BLOCK_H, BLOCK_N]    2**(score - top)
    weights     [BLOCK_H, BLOCK_N]    the running sum of weights, by column: it is reduced over columns once, at the end
    acc         [BLOCK_H, 512]        the running sum of weight * value
    acc_rope    [BLOCK_H, 64]         the same of V4's rotary values, which are values of attention in V4

An index that names no key is masked and not clamped: its row is not read, because a weight of 0 times NaN, which other
requests' rows or unwritten ones may hold, is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mla_patch.compat.triton import watch_compiles
from mla_patch.kernels.cache import offsets
from mla_patch.kernels.common.e4m3 import unpack_scaled_e4m3x2
from mla_patch.kernels.common.launch import INTERPRETED
from mla_patch.kernels.common.rounding import operand, rounded

_PLAIN = tl.constexpr(INTERPRETED)  # the interpreter multiplies no bfloat16


@triton.jit(do_not_specialize=["Sq", "q_b", "q_s"], do_not_specialize_on_alignment=["q"])
def sparse_query_kernel(q, q_f16, q_scales, H, Sq, q_b, q_s, q_h, NOPE: tl.constexpr, BLOCK_H: tl.constexpr):
    """One query, BLOCK_H of its heads: ``q_f16`` [B * Sq, H, 512] float16, times ``q_scales`` [B * Sq, H] float32.

    A head's scale is the power of two of its largest value, so that nothing is lost. Columns from NOPE on are zeros.
    """
    tiles = (H + BLOCK_H - 1) // BLOCK_H
    line, head = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, 512)
    mask = (head < H)[:, None] & (d < NOPE)[None, :]
    b, s = (line // Sq).to(tl.int64), (line % Sq).to(tl.int64)
    row = tl.multiple_of(q + b * q_b + s * q_s + head[:, None].to(tl.int64) * q_h, [16, 16])
    x = tl.load(row + d[None, :], mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 1)
    # the exponent bits alone are the power of two
    q_scale = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    q_scale = tl.where(q_scale > 0, q_scale, 1.0)
    at = line.to(tl.int64) * H + head
    tl.store(q_f16 + at[:, None] * 512 + d[None, :], (x / q_scale[:, None]).to(tl.float16), mask=(head < H)[:, None])
    tl.store(q_scales + at, q_scale, mask=head < H)


@triton.jit
def _softmax_step(score, is_key, top):
    """One block of an online softmax -> (the new maximum, what earlier sums are multiplied by, the block's weights)."""
    score = tl.where(is_key[None, :], score, -float("inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    base = tl.where(new_top == -float("inf"), 0.0, new_top)  # no key so far: -inf - -inf would be NaN
    return new_top, tl.exp2(top - base), tl.exp2(score - base[:, None])


@triton.jit
def _attend_dense(
    top,
    weights,
    acc,
    q,
    q_rope,
    values,
    table,
    first,
    blocks,
    keys,
    pages,
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
    """Attend to ``blocks`` blocks from block ``first`` on, of a request of ``keys`` keys in the pages of its ``table``.

    E4M3 values are read as int16 pairs. ``scale`` holds their descales, and both products are float16.
    """
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, 512)[None, :]
    r = tl.arange(0, 64)[None, :]
    for i in tl.range(0, blocks, num_stages=STAGES):
        j = (first + i) * BLOCK_N + n
        page = tl.load(table + j // PAGE, mask=j < keys, other=-1)
        is_key = (page >= 0) & (page < pages)
        row = tl.where(is_key, page, 0).to(tl.int64) * page_stride + (j % PAGE).to(tl.int64) * row_stride
        mask = is_key[:, None]
        if E4M3:
            pair = values + row[:, None] + tl.arange(0, 256)[None, :]
            k = unpack_scaled_e4m3x2(tl.load(pair, mask=mask, other=0), tl.full([BLOCK_N, 256], 1.0, tl.float16), BITS)
            rope_pair = values + row[:, None] + (256 + tl.arange(0, 32)[None, :])
            k_rope = unpack_scaled_e4m3x2(
                tl.load(rope_pair, mask=mask, other=0), tl.full([BLOCK_N, 32], 1.0, tl.float16), BITS
            )
        else:
            k = operand(tl.load(values + row[:, None] + d, mask=mask, other=0.0))
            if ROPE:
                k_rope = operand(tl.load(values + row[:, None] + (512 + r), mask=mask, other=0.0))
        score = tl.dot(q, k.T)
        if ROPE:
            score = tl.dot(q_rope, k_rope.T, score)
        score = score * scale
        top, keep, weight = _softmax_step(score, is_key, top)
        weights = weights * keep[:, None] + weight
        acc = tl.dot(weight.to(k.dtype), k, acc * keep[:, None])
    return top, weights, acc


@triton.jit(
    do_not_specialize=["Sq", "max_keys", "pages", "sm_scale", "causal", "splits", "table_b", "lse_b", "lse_h", "lse_s"],
    do_not_specialize_on_alignment=["table", "lens", "descale_q", "descale_k"],
)
def dense_kernel(
    q,
    out,
    lse,
    partial,
    partial_lse,
    values,
    table,
    lens,
    descale_q,
    descale_k,
    H,
    Sq,
    max_keys,
    pages,
    sm_scale,
    causal,
    splits,
    q_b,
    q_s,
    q_h,
    page_stride,
    row_stride,
    table_b,
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
    """One query, BLOCK_H of its heads, one of the splits of its keys. MERGE: there is more than one split."""
    tiles = (H + BLOCK_H - 1) // BLOCK_H
    tile = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    split = rest % splits
    line = rest // splits
    b, s = line // Sq, line % Sq
    head = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = head < H
    keys = tl.minimum(tl.maximum(tl.load(lens + b), 0), max_keys).to(tl.int32)
    if causal > 0:
        keys = tl.maximum(keys - (Sq - 1 - s), 0)
    blocks = (keys + BLOCK_N - 1) // BLOCK_N
    per_split = (blocks + splits - 1) // splits
    start = split * per_split
    stop = tl.minimum(start + per_split, blocks)
    request = b.to(tl.int64)
    source = q + request * q_b + s.to(tl.int64) * q_s + head[:, None].to(tl.int64) * q_h
    mask = is_head[:, None]
    d = tl.arange(0, 512)[None, :]
    scale = sm_scale * 1.4426950408889634  # log2(e)
    if descale_q is not None:
        scale = scale * tl.load(descale_q) * tl.load(descale_k)
    q_latent = operand(tl.load(source + d, mask=mask, other=0.0))
    if ROPE:
        q_rope = tl.load(source + 512 + tl.arange(0, 64)[None, :], mask=mask, other=0.0)
    else:
        q_rope = q_latent
    q_rope = operand(q_rope)
    top = tl.full([BLOCK_H], -float("inf"), tl.float32)
    weights = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_H, 512], tl.float32)
    top, weights, acc = _attend_dense(
        top, weights, acc, q_latent, q_rope, values, table + request * table_b, start, stop - start, keys, pages,
        scale, page_stride, row_stride, E4M3, ROPE, PAGE, BITS, BLOCK_N, STAGES,
    )  # fmt: skip
    denominator = tl.sum(weights, 1)
    has_no_key = denominator == 0.0
    base = tl.where(top == -float("inf"), 0.0, top)
    log = base + tl.log2(tl.where(has_no_key, 1.0, denominator))
    if MERGE:
        factor = (1.0 / tl.where(has_no_key, 1.0, denominator))[:, None]
        place = (line.to(tl.int64) * splits + split) * H
        tl.store(partial_lse + place + head, tl.where(has_no_key, -float("inf"), log), mask=is_head)
        target = partial + (place + head[:, None]) * 512
    else:
        factor = 1.0 / tl.where(has_no_key, 1.0, denominator)
        if descale_k is not None:
            factor = factor * tl.load(descale_k)
        factor = factor[:, None]
        log = tl.where(has_no_key, float("inf"), log * 0.6931471805599453)  # ln 2
        tl.store(lse + request * lse_b + s.to(tl.int64) * lse_s + head.to(tl.int64) * lse_h, log, mask=is_head)
        target = out + (line.to(tl.int64) * H + head[:, None]) * 512
    tl.store(target + d, rounded(acc * factor, target.dtype.element_ty), mask=mask)


@triton.jit
def _attend_sparse(
    top,
    weights,
    acc,
    acc_rope,
    q,
    q_rope,
    q_scale,
    values,
    rope,
    scales,
    indices,
    first,
    blocks,
    keys,
    slots,
    scale,
    page_stride,
    V4: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to ``blocks`` blocks from block ``first`` on, of ``keys`` slots that ``indices`` lists. The cache has
    ``slots`` slots. ``values`` and ``rope`` count in 2 bytes, ``page_stride`` in 16, ``scales`` in 4 (V3.2) or 8 (V4).

    A token's e4m3 values become float16 relative to the largest of its tiles' scales, so that one product serves all
    tiles. That scale goes into the scores as a factor. Into the weights it goes as a logarithm, beneath the maximum:
    weight * value then stays in float16's range, and ``weights`` take it back out.
    """
    # V4 has seven tiles, and an eighth of zeros
    TILES: tl.constexpr = 8 if V4 else 4
    PAIRS: tl.constexpr = 256 // TILES
    n = tl.arange(0, BLOCK_N)
    t = tl.arange(0, TILES)[None, :]
    pair = (tl.arange(0, TILES)[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :])[None, :, :]
    r = tl.arange(0, 64)[None, :]
    for i in tl.range(0, blocks, num_stages=STAGES):
        j = (first + i) * BLOCK_N + n
        slot = tl.load(indices + j, mask=j < keys, other=-1)
        is_key = (slot >= 0) & (slot < slots)
        slot = tl.where(is_key, slot, 0)
        page = (slot // PAGE).to(tl.int64) * page_stride  # in 16 bytes
        token = slot % PAGE
        mask = is_key[:, None]
        if V4:
            row = page * (16 // 2) + token * (offsets.V4_TOKEN // 2)
            k_rope = tl.load(rope + (row + offsets.V4_ROPE // 2)[:, None] + r, mask=mask, other=0.0)
            # the scales of a page's tokens lie behind them; a token's, seven powers of two, are one int64
            codes = tl.load(scales + page * (16 // 8) + (PAGE * (offsets.V4_TOKEN // 8) + token), mask=is_key, other=0)
            exponent = (codes[:, None] >> (8 * t).to(tl.int64)).to(tl.int32) & 0xFF
            tile_scale = tl.where(t < 7, (exponent << 23).to(tl.float32, bitcast=True), 0.0)
            in_tile = pair < offsets.V4_ROPE // 2
            x = tl.load(values + row[:, None, None] + pair, mask=is_key[:, None, None] & in_tile, other=0)
        else:
            row = page * (16 // 2) + token * (offsets.V32_TOKEN // 2)
            k_rope = tl.load(rope + (row + offsets.V32_ROPE // 2)[:, None] + r, mask=mask, other=0.0)
            row_scales = page * (16 // 4) + (token * (offsets.V32_TOKEN // 4) + offsets.V32_SCALES // 4)
            tile_scale = tl.load(scales + row_scales[:, None] + t, mask=mask, other=0.0)
            x = tl.load(values + row[:, None, None] + pair, mask=is_key[:, None, None], other=0)
        token_scale = tl.max(tl.abs(tile_scale), 1)
        token_scale = tl.maximum(token_scale, 8.673617379884035e-19)  # 2**-60: a token of zeros has a weight, too
        inverse_scale = 1.0 / token_scale
        ratio = (tile_scale * inverse_scale[:, None]).to(tl.float16)
        ratio = tl.broadcast_to(ratio[:, :, None], [BLOCK_N, TILES, PAIRS])
        k = tl.reshape(unpack_scaled_e4m3x2(x, ratio, BITS), [BLOCK_N, 512])
        score = tl.dot(q, k.T)
        score = score * q_scale[:, None] * token_scale[None, :]
        score = tl.dot(q_rope, operand(k_rope).T, score)
        score = score * scale
        score = score + tl.log2(token_scale)[None, :]
        top, keep, weight = _softmax_step(score, is_key, top)
        p = weight.to(k.dtype)
        weight = weight * inverse_scale[None, :]
        weights = weights * keep[:, None] + weight
        acc = tl.dot(p, k, acc * keep[:, None])
        if V4:  # rotary values are stored as they are, so that their weights are, too
            if _PLAIN:
                acc_rope = tl.dot(weight, k_rope.to(tl.float32), acc_rope * keep[:, None])
            else:
                acc_rope = tl.dot(weight.to(tl.bfloat16), k_rope, acc_rope * keep[:, None])
    return top, weights, acc, acc_rope


@triton.jit(
    do_not_specialize=[
        "Sq", "topk", "extra_topk", "slots", "extra_slots", "sm_scale", "splits", "indices_b", "indices_s",
        "extra_indices_b", "extra_indices_s", "lse_b", "lse_h", "lse_s",
    ],
    do_not_specialize_on_alignment=["indices", "extra_indices", "lens", "extra_lens", "sinks"],
)  # fmt: skip
def sparse_kernel(
    q,
    q_f16,
    q_scales,
    out,
    lse,
    partial,
    partial_lse,
    values,
    rope,
    scales,
    indices,
    lens,
    extra_values,
    extra_rope,
    extra_scales,
    extra_indices,
    extra_lens,
    sinks,
    H,
    Sq,
    topk,
    extra_topk,
    slots,
    extra_slots,
    sm_scale,
    splits,
    q_b,
    q_s,
    q_h,
    page_stride,
    extra_page_stride,
    indices_b,
    indices_s,
    extra_indices_b,
    extra_indices_s,
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
    """One query, BLOCK_H of its heads, one of the splits of its keys. MERGE: there is more than one split.

    EXTRA_PAGE is 0 where there is one cache. The blocks of a second one follow the first one's.
    """
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
    per_split = (total + splits - 1) // splits
    start = split * per_split
    stop = tl.minimum(start + per_split, total)
    request, query = b.to(tl.int64), s.to(tl.int64)
    source = q + request * q_b + query * q_s + head[:, None].to(tl.int64) * q_h
    mask = is_head[:, None]
    d = tl.arange(0, 512)[None, :]
    NOPE: tl.constexpr = 448 if V4 else 512
    scale = sm_scale * 1.4426950408889634  # log2(e)
    # float16 already, and loaded as such: what is computed first, Triton would hold in registers
    place = line.to(tl.int64) * H + head
    q_scale = tl.load(q_scales + place, mask=is_head, other=1.0)
    q_nope = operand(tl.load(q_f16 + place[:, None] * 512 + d, mask=mask, other=0.0))
    q_rope = operand(tl.load(source + NOPE + tl.arange(0, 64)[None, :], mask=mask, other=0.0))
    top = tl.full([BLOCK_H], -float("inf"), tl.float32)
    weights = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_H, 512], tl.float32)
    acc_rope = tl.zeros([BLOCK_H, 64], tl.float32)
    own_indices = indices + request * indices_b + query * indices_s
    top, weights, acc, acc_rope = _attend_sparse(
        top, weights, acc, acc_rope, q_nope, q_rope, q_scale, values, rope, scales, own_indices, start,
        tl.minimum(stop, blocks) - start, keys, slots, scale, page_stride, V4, PAGE, BITS, BLOCK_N, STAGES,
    )  # fmt: skip
    if EXTRA_PAGE > 0:
        begin = tl.maximum(start - blocks, 0)
        own_indices = extra_indices + request * extra_indices_b + query * extra_indices_s
        top, weights, acc, acc_rope = _attend_sparse(
            top, weights, acc, acc_rope, q_nope, q_rope, q_scale, extra_values, extra_rope, extra_scales, own_indices,
            begin, stop - blocks - begin, extra_keys, extra_slots, scale, extra_page_stride, V4, EXTRA_PAGE, BITS,
            BLOCK_N, STAGES,
        )  # fmt: skip
    denominator = tl.sum(weights, 1)
    has_no_key = denominator == 0.0
    base = tl.where(top == -float("inf"), 0.0, top)
    log = base + tl.log2(tl.where(has_no_key, 1.0, denominator))
    if MERGE:
        factor = (1.0 / tl.where(has_no_key, 1.0, denominator))[:, None]
        place = (line.to(tl.int64) * splits + split) * H
        tl.store(partial_lse + place + head, tl.where(has_no_key, -float("inf"), log), mask=is_head)
        target = partial + (place + head[:, None]) * 512
    else:
        denominator_with_sink = denominator
        if sinks is not None:
            sink = tl.load(sinks + head, mask=is_head, other=0.0).to(tl.float32)
            denominator_with_sink += tl.exp2(sink * 1.4426950408889634 - base)
        factor = (1.0 / tl.where(has_no_key, 1.0, denominator_with_sink))[:, None]
        log = tl.where(has_no_key, float("inf"), log * 0.6931471805599453)  # ln 2
        tl.store(lse + request * lse_b + query * lse_s + head.to(tl.int64) * lse_h, log, mask=is_head)
        target = out + (line.to(tl.int64) * H + head[:, None]) * 512
    tl.store(target + d, rounded(acc * factor, target.dtype.element_ty), mask=mask & (d < NOPE))
    if V4:
        rotary = rounded(acc_rope * factor, target.dtype.element_ty)
        tl.store(target + NOPE + tl.arange(0, 64)[None, :], rotary, mask=mask)


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
    """One head of one query from its splits, in ascending order. SPLITS: a power of two, at least ``splits``."""
    line = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    lane = tl.arange(0, SPLITS)
    first = line * splits
    logs = tl.load(partial_lse + (first + lane) * H + h, mask=lane < splits, other=-float("inf"))
    top = tl.max(logs, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    denominator = tl.sum(tl.exp2(logs - base), 0)
    has_no_key = denominator == 0.0
    denominator_with_sink = denominator
    if sinks is not None:
        denominator_with_sink += tl.exp2(tl.load(sinks + h).to(tl.float32) * 1.4426950408889634 - base)
    factor = 1.0 / tl.where(has_no_key, 1.0, denominator_with_sink)
    if descale_k is not None:
        factor = factor * tl.load(descale_k)
    natural = (base + tl.log2(tl.where(has_no_key, 1.0, denominator))) * 0.6931471805599453  # ln 2
    natural = tl.where(has_no_key, float("inf"), natural)
    tl.store(lse + line // Sq * lse_b + line % Sq * lse_s + h.to(tl.int64) * lse_h, natural)
    d = tl.arange(0, 512)
    acc = tl.zeros([512], tl.float32)
    for begin in range(0, splits, BLOCK_S):
        split = begin + tl.arange(0, BLOCK_S)
        place = (first + split) * H + h
        weight = tl.exp2(tl.load(partial_lse + place, mask=split < splits, other=-float("inf")) - base)
        part = tl.load(partial + place[:, None] * 512 + d[None, :], mask=(split < splits)[:, None], other=0.0)
        acc += tl.sum(part * weight[:, None], 0)
    tl.store(out + (line * H + h) * 512 + d, rounded(acc * factor, out.dtype.element_ty))


@triton.jit(
    do_not_specialize=["topk", "rows", "sm_scale", "log_unit", "indices_s"],
    do_not_specialize_on_alignment=["indices", "lens", "sinks", "max_logits", "lse"],
)
def sparse_prefill_kernel(
    q,
    kv,
    indices,
    lens,
    sinks,
    out,
    max_logits,
    lse,
    H,
    topk,
    rows,
    sm_scale,
    log_unit,
    q_s,
    q_h,
    kv_s,
    indices_s,
    out_s,
    out_h,
    ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One query, BLOCK_H of its heads. ``log_unit`` is what a base-2 logarithm of the statistics is multiplied by.

    Here weights are summed over the columns in every step: ``denominator`` [BLOCK_H].
    """
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
    q_latent = operand(tl.load(source + d, mask=mask, other=0.0))
    q_rope = q_latent
    if ROPE:
        q_rope = operand(tl.load(source + 512 + r, mask=mask, other=0.0))
    scale = sm_scale * 1.4426950408889634  # log2(e)
    top = tl.full([BLOCK_H], -float("inf"), tl.float32)
    denominator = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, 512], tl.float32)
    n = tl.arange(0, BLOCK_N)
    own_indices = indices + s * indices_s
    for i in tl.range(0, (keys + BLOCK_N - 1) // BLOCK_N, num_stages=STAGES):
        j = i * BLOCK_N + n
        index = tl.load(own_indices + j, mask=j < keys, other=-1)
        is_key = (index >= 0) & (index < rows)
        row = kv + tl.where(is_key, index, 0).to(tl.int64)[:, None] * kv_s
        k = operand(tl.load(row + d, mask=is_key[:, None], other=0.0))
        score = tl.dot(q_latent, k.T)
        if ROPE:
            score = tl.dot(q_rope, operand(tl.load(row + 512 + r, mask=is_key[:, None], other=0.0)).T, score)
        top, keep, weight = _softmax_step(score * scale, is_key, top)
        denominator = denominator * keep + tl.sum(weight, 1)
        acc = tl.dot(weight.to(k.dtype), k, acc * keep[:, None])
    has_no_key = denominator == 0.0
    base = tl.where(top == -float("inf"), 0.0, top)
    denominator_with_sink = denominator
    if sinks is not None:
        sink = tl.load(sinks + head, mask=is_head, other=0.0).to(tl.float32)
        denominator_with_sink += tl.exp2(sink * 1.4426950408889634 - base)
    factor = 1.0 / tl.where(has_no_key, 1.0, denominator_with_sink)
    log = tl.where(has_no_key, float("inf"), base + tl.log2(tl.where(has_no_key, 1.0, denominator)))
    tl.store(max_logits + s * H + head, top * log_unit, mask=is_head)
    tl.store(lse + s * H + head, log * log_unit, mask=is_head)
    target = out + s * out_s + head[:, None].to(tl.int64) * out_h
    tl.store(target + d, rounded(acc * factor[:, None], out.dtype.element_ty), mask=mask)


watch_compiles(sparse_query_kernel, sparse_kernel, dense_kernel, sparse_merge_kernel, sparse_prefill_kernel)
