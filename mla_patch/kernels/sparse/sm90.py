"""Sparse MLA attention for 17 to 128 heads on sm_90, in Gluon, as `sparse_decode` and `mla_sparse_prefill` define it.

A program has one query, 64 of its heads and one split of its keys. `mla_patch.kernels.sm90.seesaw_pipeline` multiplies
the keys; its docstring says what the shared buffers, the registers and the barriers hold. Here is the producer, which
gathers the keys by their indices, and what becomes of the results. A slot that names no key comes as zeros and counts
for nothing.

    16 bits     rows of a workspace are copied asynchronously
    V3.2, V4    e4m3 values are copied asynchronously to where their bfloat16 will be read, and converted there in
                place: value times scale, exact where scales are powers of two, else to 2**-9, as in FlashMLA. Rotary
                values are copied
"""

from __future__ import annotations

import itertools
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from mla_patch.compat.triton import CompileCase, gluon_barrier, gluon_copy, gluon_reinterpret, watch_compiles
from mla_patch.kernels.cache import offsets
from mla_patch.kernels.common.constants import LATENT, WIDTH
from mla_patch.kernels.sm90 import layouts as sm90
from mla_patch.kernels.sm90 import seesaw_pipeline as seesaw


@gluon.jit
def _split_range(lens, extra_lens, b, topk, extra_topk, split, splits, EXTRA: gl.constexpr):
    """A split's units of 128 keys -> (first unit, how many, units of the first cache, keys of each cache)."""
    keys = topk
    if lens is not None:
        keys = gl.minimum(gl.maximum(gl.load(lens + b), 0), topk).to(gl.int32)
    units = (keys + (sm90.KEYS_PER_UNIT - 1)) // sm90.KEYS_PER_UNIT
    total = units
    extra_keys = extra_topk
    if EXTRA:
        if extra_lens is not None:
            extra_keys = gl.minimum(gl.maximum(gl.load(extra_lens + b), 0), extra_topk).to(gl.int32)
        total += (extra_keys + (sm90.KEYS_PER_UNIT - 1)) // sm90.KEYS_PER_UNIT
    per_split = (total + splits - 1) // splits
    start = split * per_split
    # at least one: where nothing is left, the consumers get a unit without keys
    return start, gl.maximum(gl.minimum(start + per_split, total) - start, 1), units, keys, extra_keys


@gluon.jit
def _store_results(
    acc, weights, m, stage, out, lse, max_logits, partial, partial_lse, sinks, tile, line, b, s, split, splits, H,
    log_unit, out_l, out_h, lse_b, lse_h, lse_s, MERGE: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """A consumer's half of the output's columns; HALF 0 writes the statistics, too. MERGE: as partials of a split."""
    head = tile * 64 + gl.arange(0, 64, layout=sm90.HEAD)
    has_no_key = weights == 0
    denominator = gl.where(has_no_key, 1.0, weights)
    log = m + gl.log2(denominator)
    if MERGE:
        place = (line.to(gl.int64) * splits + split) * H
        to = partial + place * 512
        if HALF == 0:
            gl.store(partial_lse + place + head, gl.where(has_no_key, -float("inf"), log), mask=head < H)
    else:
        to = out + line.to(gl.int64) * out_l
        if HALF == 0:
            at = b.to(gl.int64) * lse_b + s.to(gl.int64) * lse_s + head.to(gl.int64) * lse_h
            gl.store(lse + at, gl.where(has_no_key, float("inf"), log * log_unit), mask=head < H)
            if max_logits is not None:
                gl.store(max_logits + at, gl.where(has_no_key, -float("inf"), m * log_unit), mask=head < H)
        if sinks is not None:
            sink = gl.load(sinks + head, mask=head < H, other=0.0).to(gl.float32)
            denominator = gl.where(has_no_key, 1.0, weights + gl.exp2(sink * 1.4426950408889634 - m))
    acc = acc * gl.convert_layout(1.0 / denominator, sm90.OUTPUT_HEAD)[:, None]
    seesaw.store_tile(acc.to(to.dtype.element_ty), to, 512 if MERGE else out_h, tile, H, stage, HALF)


@gluon.jit
def _consumer_even(
    q, lens, extra_lens, sinks, out, lse, max_logits, partial, partial_lse, H, Sq, topk, extra_topk, scale, log_unit,
    splits, q_b, q_s, q_h, out_l, out_h, lse_b, lse_h, lse_s, q_low, q_high, q_rope, low, high, rope, odd_low, odd_rope,
    known, top_even, top_odd, sum_even, sum_odd, barriers, ROPE: gl.constexpr, COPIED: gl.constexpr,
    EXTRA: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """The first group of warps: one query, so that every barrier is at its first use."""
    zero = gl.to_tensor(0)
    tile, line, b, s, split = _program_place(H, Sq, splits)
    _start, count, _units, _keys, _extra_keys = _split_range(
        lens, extra_lens, b, topk, extra_topk, split, splits, EXTRA
    )
    source = q + b.to(gl.int64) * q_b + s.to(gl.int64) * q_s
    u = seesaw.begin_query(
        source, source + 512, tile, H, q_h, q_h, q_low, q_high, q_rope, scale, None, barriers, zero, 0, ROPE, False
    )  # fmt: skip
    acc, weights, m, _turn = seesaw.consumer_even(
        q_low, q_high, q_rope, low, high, rope, odd_low, odd_rope, top_even, top_odd, known, barriers, zero, count, u,
        0, 0, 0.0, 1.0, sm90.EMPTY_MAX, ROPE, COPIED, False, False,
    )  # fmt: skip
    weights = seesaw.end_query(weights, sum_even, sum_odd, barriers, zero)
    _store_results(
        acc, weights, m, q_low, out, lse, max_logits, partial, partial_lse, sinks, tile, line, b, s, split, splits, H,
        log_unit, out_l, out_h, lse_b, lse_h, lse_s, MERGE, 0,
    )  # fmt: skip


@gluon.jit
def _consumer_odd(
    q, lens, extra_lens, sinks, out, lse, max_logits, partial, partial_lse, H, Sq, topk, extra_topk, scale, log_unit,
    splits, q_b, q_s, q_h, out_l, out_h, lse_b, lse_h, lse_s, q_low, q_high, q_rope, low, high, rope, even_high,
    even_rope, known, top_even, top_odd, sum_even, sum_odd, barriers, ROPE: gl.constexpr, COPIED: gl.constexpr,
    EXTRA: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """The second group of warps, as `_consumer_even`."""
    zero = gl.to_tensor(0)
    tile, line, b, s, split = _program_place(H, Sq, splits)
    _start, count, _units, _keys, _extra_keys = _split_range(
        lens, extra_lens, b, topk, extra_topk, split, splits, EXTRA
    )
    source = q + b.to(gl.int64) * q_b + s.to(gl.int64) * q_s
    u = seesaw.begin_query(
        source, source + 512, tile, H, q_h, q_h, q_low, q_high, q_rope, scale, None, barriers, zero, 1, ROPE, False
    )  # fmt: skip
    acc, weights, m, _turn = seesaw.consumer_odd(
        q_low, q_high, q_rope, low, high, rope, even_high, even_rope, top_even, top_odd, known, barriers, zero, count,
        u, 0, 0, 0.0, 1.0, sm90.EMPTY_MAX, ROPE, COPIED, False, False,
    )  # fmt: skip
    weights = seesaw.end_query(weights, sum_odd, sum_even, barriers, zero)
    _store_results(
        acc, weights, m, q_high, out, lse, max_logits, partial, partial_lse, sinks, tile, line, b, s, split, splits, H,
        log_unit, out_l, out_h, lse_b, lse_h, lse_s, MERGE, 1,
    )  # fmt: skip


@gluon.jit
def _program_place(H, Sq, splits):
    """This program's tile of heads, query (b * Sq + s, b, s) and split.

    The tiles of one query are neighbours, so that they find its keys in the second-level cache.
    """
    tiles = (H + 63) // 64
    rest = gl.program_id(0) // tiles
    line = rest // splits
    return gl.program_id(0) % tiles, line, line // Sq, line % Sq, rest % splits


@gluon.jit
def _load_slots(
    listed, extra_listed, unit, at: gl.constexpr, units, keys, extra_keys, slots, extra_slots, EXTRA: gl.constexpr,
    L: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """Slots of N of a unit's keys, from its key ``at`` on; -1 where there is none. Of unit ``units`` on they are in the
    second cache."""
    n = at + gl.arange(0, N, layout=L)
    first = unit * sm90.KEYS_PER_UNIT
    if EXTRA and unit >= units:
        listed = extra_listed
        first = (unit - units) * sm90.KEYS_PER_UNIT
        keys = extra_keys
        slots = extra_slots
    slot = gl.load(listed + first + n, mask=first + n < keys, other=-1)
    return gl.where(slot < slots, slot, -1)


@gluon.jit
def _producer_16bit(
    kv, indices, lens, H, Sq, topk, slots, splits, kv_s, indices_b, indices_s, even_low, even_high, even_rope, odd_low,
    odd_high, odd_rope, seen_even, seen_odd, barriers, ROPE: gl.constexpr,
):  # fmt: skip
    """Brings 16-bit rows as they are. The next unit's slots are loaded while this one's rows are copied."""
    L: gl.constexpr = gl.SliceLayout(1, sm90.ROWS)
    c = gl.arange(0, 256, layout=gl.SliceLayout(0, sm90.ROWS))[None, :]
    r = gl.arange(0, 64, layout=gl.SliceLayout(0, sm90.ROWS))[None, :]
    _tile, _line, b, s, split = _program_place(H, Sq, splits)
    start, count, units, keys, _extra_keys = _split_range(lens, None, b, topk, 0, split, splits, False)
    listed = indices + b.to(gl.int64) * indices_b + s.to(gl.int64) * indices_s
    even = _load_slots(listed, listed, start, 0, units, keys, 0, slots, 0, False, L, 64)
    odd = _load_slots(listed, listed, start, 64, units, keys, 0, slots, 0, False, L, 64)
    for i in range(count):
        free = (i & 1) ^ 1
        row = (kv + gl.maximum(even, 0).to(gl.int64) * kv_s)[:, None]
        known = even >= 0
        even = _load_slots(listed, listed, start + i + 1, 0, units, keys, 0, slots, 0, False, L, 64)
        seesaw.load_tile_async(
            row, c, r, known, seen_even, even_low, 0, even_high, 256, even_rope, barriers, free, sm90.FREE_EVEN_LOW,
            sm90.FULL_EVEN_LOW, sm90.FREE_EVEN_HIGH, sm90.FULL_EVEN_HIGH, ROPE,
        )  # fmt: skip
        row = (kv + gl.maximum(odd, 0).to(gl.int64) * kv_s)[:, None]
        known = odd >= 0
        odd = _load_slots(listed, listed, start + i + 1, 64, units, keys, 0, slots, 0, False, L, 64)
        seesaw.load_tile_async(
            row, c, r, known, seen_odd, odd_high, 256, odd_low, 0, odd_rope, barriers, free, sm90.FREE_ODD_HIGH,
            sm90.FULL_ODD_HIGH, sm90.FREE_ODD_LOW, sm90.FULL_ODD_LOW, ROPE,
        )  # fmt: skip
    async_copy.wait_group(0)


@gluon.jit
def _addresses(values, slot, page_stride, PAGE: gl.constexpr, V4: gl.constexpr):
    """Where a slot's values and its scales lie. ``values`` counts in 4 bytes, ``page_stride`` in 16."""
    page = values + (slot // PAGE).to(gl.int64) * page_stride * (16 // 4)
    at = slot % PAGE
    ROW: gl.constexpr = offsets.V4_TOKEN // 4 if V4 else offsets.V32_TOKEN // 4
    if V4:
        return page + at * ROW, page + (PAGE * ROW + at * (offsets.V4_SCALES // 4))
    else:
        return page + at * ROW, page + (at * ROW + offsets.V32_SCALES // 4)


@gluon.jit
def _addresses_of_either(
    values, extra_values, slot, unit, units, page_stride, extra_page_stride, PAGE: gl.constexpr,
    EXTRA_PAGE: gl.constexpr, V4: gl.constexpr,
):  # fmt: skip
    row, scale = _addresses(values, slot, page_stride, PAGE, V4)
    if EXTRA_PAGE > 0 and unit >= units:
        row, scale = _addresses(extra_values, slot, extra_page_stride, EXTRA_PAGE, V4)
    return row, scale


@gluon.jit
def _prefetch(row, scale):
    """Rows into the second-level cache, one unit before they are copied: 584 or 656 bytes, and their scales."""
    gl.inline_asm_elementwise(
        """prefetch.global.L2 [$1];
        prefetch.global.L2 [$1+128];
        prefetch.global.L2 [$1+256];
        prefetch.global.L2 [$1+384];
        prefetch.global.L2 [$1+512];
        prefetch.global.L2 [$2];
        mov.b32 $0, 0;""",
        "=r,l,l",
        [row.to(gl.int64, bitcast=True), scale.to(gl.int64, bitcast=True)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _landing_place(place, K: gl.constexpr):
    """Where the K-th 64 e4m3 values of a half land: 16 int32 of each of 64 rows, packed at the half's beginning.

    They may lie anywhere in the half, because `_convert_half` reads all of them before it writes.
    """
    L: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, [1, 0])
    return gluon_reinterpret(place, gl.int32, [512, 16], L).slice(K * 64, 64, 0)


@gluon.jit
def _tile_columns(place, K: gl.constexpr):
    """The same 64 values as bfloat16, in pairs, where the tensor cores read them: columns 64 K on of the half."""
    L: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    return gluon_reinterpret(place, gl.int32, [place.shape[1], 32], L).slice(K * 64, 64, 0)


@gluon.jit
def _scale_e4m3x4(x, scale):
    """Four e4m3 values in each int32, times their row's scale -> four bfloat16, rounded once, as pairs."""
    one, other = gl.inline_asm_elementwise(
        """{
        .reg .b16 a, b, l, u;
        .reg .b32 h;
        .reg .f32 f, g;
        mov.b32 {a, b}, $2;
        cvt.rn.f16x2.e4m3x2 h, a;
        mov.b32 {l, u}, h;
        cvt.f32.f16 f, l;
        cvt.f32.f16 g, u;
        mul.f32 f, f, $3;
        mul.f32 g, g, $3;
        cvt.rn.bf16x2.f32 $0, g, f;
        cvt.rn.f16x2.e4m3x2 h, b;
        mov.b32 {l, u}, h;
        cvt.f32.f16 f, l;
        cvt.f32.f16 g, u;
        mul.f32 f, f, $3;
        mul.f32 g, g, $3;
        cvt.rn.bf16x2.f32 $1, g, f;
        }""",
        "=&r,=r,r,r",
        [x, scale],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    return gl.reshape(gl.join(one, other), [64, 32])


@gluon.jit
def _ue8m0_scale(code, K: gl.constexpr):
    """The K-th of four ue8m0 scales in an int32: a power of two each."""
    return (((code >> (K * 8)) & 0xFF) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _convert_half(place, scales, HIGH: gl.constexpr, V4: gl.constexpr):
    """Convert a half that has landed to bfloat16, in place.

    All values are loaded before any is overwritten. So are the scales: behind a store, their loads would be waited for.
    A scale belongs to 128 values in V3.2, that is to two blocks of 64, and to one block in V4.
    """
    if V4:
        code = scales.slice(HIGH, 1, 1).load(sm90.READ)
    else:
        one = scales.slice(2 * HIGH, 1, 1).load(sm90.READ).to(gl.float32, bitcast=True)
        two = scales.slice(2 * HIGH + 1, 1, 1).load(sm90.READ).to(gl.float32, bitcast=True)
    a = _landing_place(place, 0).load(sm90.READ)
    b = _landing_place(place, 1).load(sm90.READ)
    c = _landing_place(place, 2).load(sm90.READ)
    if not (HIGH and V4):
        d = _landing_place(place, 3).load(sm90.READ)
    gluon_barrier()
    _tile_columns(place, 0).store(_scale_e4m3x4(a, _ue8m0_scale(code, 0) if V4 else one))
    _tile_columns(place, 1).store(_scale_e4m3x4(b, _ue8m0_scale(code, 1) if V4 else one))
    _tile_columns(place, 2).store(_scale_e4m3x4(c, _ue8m0_scale(code, 2) if V4 else two))
    if not (HIGH and V4):
        _tile_columns(place, 3).store(_scale_e4m3x4(d, _ue8m0_scale(code, 3) if V4 else two))


@gluon.jit
def _copy_half_async(
    place, rope, row, scale, known, seen, scales, barriers, free, FREE: gl.constexpr, HIGH: gl.constexpr,
    FIRST: gl.constexpr, V4: gl.constexpr,
):  # fmt: skip
    """Start to copy a half once it is free: HIGH or low. The half that comes FIRST brings the scales and ``seen``, the
    other one the rope, which in V4 is the last quarter of the high half."""
    mbarrier.wait(barriers.index(FREE), free)
    mask = known[:, None]
    row = row[:, None]
    c = gl.arange(0, 16, layout=gl.SliceLayout(0, sm90.FETCH))[None, :]
    r = gl.arange(0, 32, layout=gl.SliceLayout(0, sm90.FETCH))[None, :]
    if FIRST:
        seen.store(known.to(gl.int32))
        n = gl.arange(0, scales.shape[1], layout=gl.SliceLayout(0, sm90.FETCH))[None, :]
        gluon_copy(scales, scale[:, None] + n, mask=mask)
    gluon_copy(_landing_place(place.index(0), 0), row + (HIGH * 64 + c), mask=mask)
    gluon_copy(_landing_place(place.index(0), 1), row + (HIGH * 64 + 16 + c), mask=mask)
    gluon_copy(_landing_place(place.index(0), 2), row + (HIGH * 64 + 32 + c), mask=mask)
    if HIGH and V4:  # values 448 to 511 are the rope
        gluon_copy(_tile_columns(place.index(0), 3), row + (offsets.V4_ROPE // 4 + r), mask=mask)
    else:
        gluon_copy(_landing_place(place.index(0), 3), row + (HIGH * 64 + 48 + c), mask=mask)
    if not FIRST and not V4:
        gluon_copy(_tile_columns(rope.index(0), 0), row + (offsets.V32_ROPE // 4 + r), mask=mask)
    async_copy.commit_group()


@gluon.jit
def _publish_half(
    place, scales, barriers, FULL: gl.constexpr, HIGH: gl.constexpr, LEFT: gl.constexpr, V4: gl.constexpr
):
    """Wait for a half, convert it and say so. LEFT: how many groups of copies may still be on their way."""
    async_copy.wait_group(LEFT)
    gluon_barrier()
    _convert_half(place.index(0), scales, HIGH, V4)
    fence_async_shared()
    seesaw.signal(barriers, FULL)


@gluon.jit
def _load_fp8_tile(
    row, scale, known, seen, scales, one, two, rope, barriers, free, FREE_ONE: gl.constexpr, FULL_ONE: gl.constexpr,
    FREE_TWO: gl.constexpr, FULL_TWO: gl.constexpr, HIGH: gl.constexpr, V4: gl.constexpr,
):  # fmt: skip
    """Bring a tile of an fp8 cache: first the half that is free first (HIGH says which), then the other.

    Both copies are started before the first conversion, so that the second runs beneath it.
    """
    _copy_half_async(one, rope, row, scale, known, seen, scales, barriers, free, FREE_ONE, HIGH, True, V4)
    _copy_half_async(two, rope, row, scale, known, seen, scales, barriers, free, FREE_TWO, 1 - HIGH, False, V4)
    _publish_half(one, scales, barriers, FULL_ONE, HIGH, 1, V4)
    _publish_half(two, scales, barriers, FULL_TWO, 1 - HIGH, 0, V4)


@gluon.jit
def _producer_fp8(
    values, indices, lens, extra_values, extra_indices, extra_lens, H, Sq, topk, extra_topk, slots, extra_slots, splits,
    page_stride, extra_page_stride, indices_b, indices_s, extra_indices_b, extra_indices_s, even_low, even_high,
    even_rope, odd_low, odd_high, odd_rope, seen_even, seen_odd, scales, barriers, V4: gl.constexpr, PAGE: gl.constexpr,
    EXTRA_PAGE: gl.constexpr,
):  # fmt: skip
    """Brings the rows of fp8 caches as bfloat16.

    ``even`` and ``odd`` are the slots of the tiles to come. ``ahead`` are those of the whole unit behind them, whose
    rows are prefetched between the two tiles.
    """
    L: gl.constexpr = gl.SliceLayout(1, sm90.FETCH)
    EXTRA: gl.constexpr = EXTRA_PAGE > 0
    _tile, _line, b, s, split = _program_place(H, Sq, splits)
    start, count, units, keys, extra_keys = _split_range(lens, extra_lens, b, topk, extra_topk, split, splits, EXTRA)
    listed = indices + b.to(gl.int64) * indices_b + s.to(gl.int64) * indices_s
    extra_listed = listed
    if EXTRA:
        extra_listed = extra_indices + b.to(gl.int64) * extra_indices_b + s.to(gl.int64) * extra_indices_s
    even = _load_slots(listed, extra_listed, start, 0, units, keys, extra_keys, slots, extra_slots, EXTRA, L, 64)
    odd = _load_slots(listed, extra_listed, start, 64, units, keys, extra_keys, slots, extra_slots, EXTRA, L, 64)
    ahead = _load_slots(
        listed, extra_listed, start + 1, 0, units, keys, extra_keys, slots, extra_slots, EXTRA, sm90.LANES, 128
    )
    for i in range(count):
        free = (i & 1) ^ 1
        at = start + i
        known = even >= 0
        row, scale = _addresses_of_either(
            values, extra_values, gl.maximum(even, 0), at, units, page_stride, extra_page_stride, PAGE, EXTRA_PAGE, V4
        )
        even = _load_slots(listed, extra_listed, at + 1, 0, units, keys, extra_keys, slots, extra_slots, EXTRA, L, 64)
        _load_fp8_tile(
            row, scale, known, seen_even, scales.index(0), even_low, even_high, even_rope, barriers, free,
            sm90.FREE_EVEN_LOW, sm90.FULL_EVEN_LOW, sm90.FREE_EVEN_HIGH, sm90.FULL_EVEN_HIGH, 0, V4,
        )  # fmt: skip
        row, scale = _addresses_of_either(
            values, extra_values, gl.maximum(ahead, 0), at + 1, units, page_stride, extra_page_stride, PAGE, EXTRA_PAGE,
            V4,
        )  # fmt: skip
        _prefetch(row, scale)
        ahead = _load_slots(
            listed, extra_listed, at + 2, 0, units, keys, extra_keys, slots, extra_slots, EXTRA, sm90.LANES, 128
        )
        known = odd >= 0
        row, scale = _addresses_of_either(
            values, extra_values, gl.maximum(odd, 0), at, units, page_stride, extra_page_stride, PAGE, EXTRA_PAGE, V4
        )
        odd = _load_slots(listed, extra_listed, at + 1, 64, units, keys, extra_keys, slots, extra_slots, EXTRA, L, 64)
        _load_fp8_tile(
            row, scale, known, seen_odd, scales.index(1), odd_high, odd_low, odd_rope, barriers, free,
            sm90.FREE_ODD_HIGH, sm90.FULL_ODD_HIGH, sm90.FREE_ODD_LOW, sm90.FULL_ODD_LOW, 1, V4,
        )  # fmt: skip


_CHANGING = [
    "Sq", "topk", "extra_topk", "slots", "extra_slots", "sm_scale", "log_unit", "splits", "indices_b", "indices_s",
    "extra_indices_b", "extra_indices_s", "lse_b", "lse_h", "lse_s", "q_b", "q_s",
]  # fmt: skip
_ANYWHERE = ["q", "indices", "extra_indices", "lens", "extra_lens", "sinks", "lse", "max_logits", "out"]


@gluon.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_ANYWHERE)
def sparse_sm90(
    q, values, indices, lens, extra_values, extra_indices, extra_lens, sinks, out, lse, max_logits, partial,
    partial_lse, H, Sq, topk, extra_topk, slots, extra_slots, sm_scale, log_unit, splits, q_b, q_s, q_h, stride,
    extra_stride, indices_b, indices_s, extra_indices_b, extra_indices_s, out_l, out_h, lse_b, lse_h, lse_s,
    WIDTH: gl.constexpr, PAGE: gl.constexpr, EXTRA_PAGE: gl.constexpr, MERGE: gl.constexpr, KEY: gl.constexpr,
):  # fmt: skip
    """Queries [b, s, head]; lines of b * Sq + s in ``out`` and the partials.

    ``values`` is a 16-bit workspace whose rows lie ``stride`` elements apart, or, as int32, an fp8 cache whose pages
    lie ``stride`` times 16 bytes apart: V3.2 for a WIDTH of 576, V4 for 512. ``log_unit`` multiplies the base-2
    statistics. ``sm_scale`` must be above 0. EXTRA_PAGE is 0 where there is one cache. KEY is that of `sm90.layouts`.
    """
    FP8: gl.constexpr = values.dtype.element_ty.primitive_bitwidth == 32
    V4: gl.constexpr = WIDTH == 512
    ROPE: gl.constexpr = WIDTH == 576
    EXTRA: gl.constexpr = EXTRA_PAGE > 0
    to: gl.constexpr = gl.bfloat16 if FP8 else values.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    VALUES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_low = gl.allocate_shared_memory(to, [1, 64, 256], TILE)
    q_high = gl.allocate_shared_memory(to, [1, 64, 256], TILE)
    q_rope = gl.allocate_shared_memory(to, [1, 64, 64], TILE)
    even_low = gl.allocate_shared_memory(to, [1, 64, 256], TILE)
    even_high = gl.allocate_shared_memory(to, [1, 64, 256], TILE)
    even_rope = gl.allocate_shared_memory(to, [1, 64, 64], TILE)
    odd_low = gl.allocate_shared_memory(to, [1, 64, 256], TILE)
    odd_high = gl.allocate_shared_memory(to, [1, 64, 256], TILE)
    odd_rope = gl.allocate_shared_memory(to, [1, 64, 64], TILE)
    top_even = gl.allocate_shared_memory(gl.float32, [64], VALUES)
    top_odd = gl.allocate_shared_memory(gl.float32, [64], VALUES)
    sum_even = gl.allocate_shared_memory(gl.float32, [64], VALUES)
    sum_odd = gl.allocate_shared_memory(gl.float32, [64], VALUES)
    seen_even = gl.allocate_shared_memory(gl.int32, [64], VALUES)
    seen_odd = gl.allocate_shared_memory(gl.int32, [64], VALUES)
    barriers = gl.allocate_shared_memory(gl.int64, [sm90.BARRIERS, 1], mbarrier.MBarrierLayout())
    # FULL_*. Of 16-bit rows every copying thread arrives by itself. The halves that come first, FULL_EVEN_LOW and
    # FULL_ODD_HIGH, have one more arrival, behind which `seen` is there.
    for i in gl.static_range(0, 4):
        if FP8:
            mbarrier.init(barriers.index(i), count=1)
        else:
            mbarrier.init(barriers.index(i), count=129 if i == 0 or i == 3 else 128)
    for i in gl.static_range(4, 10):  # FREE_*, WEIGHTS_*: one group arrives
        mbarrier.init(barriers.index(i), count=1)
    for i in gl.static_range(10, 13):  # Q_FREE, Q_FULL, SUMS: both consumers arrive
        mbarrier.init(barriers.index(i), count=2)
    fence_async_shared()
    gluon_barrier()
    scale = sm_scale * 1.4426950408889634  # log2(e): weights are powers of two
    # Arguments are written out for every group, because a tuple with a name would lose its constants. The two lists at
    # the end are the warps, and the registers per thread, of consumer_odd and of the producer.
    if FP8:
        N: gl.constexpr = 2 if V4 else 4
        scales = gl.allocate_shared_memory(gl.int32, [2, 64, N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        gl.warp_specialize(
            [
                (_consumer_even, (
                    q, lens, extra_lens, sinks, out, lse, max_logits, partial, partial_lse, H, Sq, topk, extra_topk,
                    scale, log_unit, splits, q_b, q_s, q_h, out_l, out_h, lse_b, lse_h, lse_s, q_low, q_high, q_rope,
                    even_low, even_high, even_rope, odd_low, odd_rope, seen_even, top_even, top_odd, sum_even,
                    sum_odd, barriers, ROPE, False, EXTRA, MERGE
                )),
                (_consumer_odd, (
                    q, lens, extra_lens, sinks, out, lse, max_logits, partial, partial_lse, H, Sq, topk, extra_topk,
                    scale, log_unit, splits, q_b, q_s, q_h, out_l, out_h, lse_b, lse_h, lse_s, q_low, q_high, q_rope,
                    odd_low, odd_high, odd_rope, even_high, even_rope, seen_odd, top_even, top_odd, sum_even, sum_odd,
                    barriers, ROPE, False, EXTRA, MERGE
                )),
                (_producer_fp8, (
                    values, indices, lens, extra_values, extra_indices, extra_lens, H, Sq, topk, extra_topk, slots,
                    extra_slots, splits, stride, extra_stride, indices_b, indices_s, extra_indices_b, extra_indices_s,
                    even_low, even_high, even_rope, odd_low, odd_high, odd_rope, seen_even, seen_odd, scales,
                    barriers, V4, PAGE, EXTRA_PAGE
                )),
            ],
            [4, 4],
            [208, 88],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer_even, (
                    q, lens, extra_lens, sinks, out, lse, max_logits, partial, partial_lse, H, Sq, topk, extra_topk,
                    scale, log_unit, splits, q_b, q_s, q_h, out_l, out_h, lse_b, lse_h, lse_s, q_low, q_high, q_rope,
                    even_low, even_high, even_rope, odd_low, odd_rope, seen_even, top_even, top_odd, sum_even,
                    sum_odd, barriers, ROPE, True, EXTRA, MERGE
                )),
                (_consumer_odd, (
                    q, lens, extra_lens, sinks, out, lse, max_logits, partial, partial_lse, H, Sq, topk, extra_topk,
                    scale, log_unit, splits, q_b, q_s, q_h, out_l, out_h, lse_b, lse_h, lse_s, q_low, q_high, q_rope,
                    odd_low, odd_high, odd_rope, even_high, even_rope, seen_odd, top_even, top_odd, sum_even, sum_odd,
                    barriers, ROPE, True, EXTRA, MERGE
                )),
                (_producer_16bit, (
                    values, indices, lens, H, Sq, topk, slots, splits, stride, indices_b, indices_s, even_low,
                    even_high, even_rope, odd_low, odd_high, odd_rope, seen_even, seen_odd, barriers, ROPE
                )),
            ],
            [4, 4],
            [216, 72],
        )  # fmt: skip


watch_compiles(sparse_sm90)


def compile_cases(every: bool = False) -> list[CompileCase]:
    """A workspace and both fp8 layouts, all options off and all on, or, for ``every``, the product."""
    cases = []
    switches = list(itertools.product((False, True), repeat=2)) if every else [(False, False), (True, True)]
    for fp8, width, (full, merge) in itertools.product((False, True), (WIDTH, LATENT), switches):
        merge = merge and fp8  # a prefill has no splits
        signature = {"q": "*bf16", "values": "*i32" if fp8 else "*bf16", "indices": "*i32", "out": "*bf16"}
        signature |= {"lse": "*fp32", "partial": "*fp32", "partial_lse": "*fp32", "sm_scale": "fp32"}
        signature |= dict.fromkeys(("H", "Sq", "topk", "slots", "splits", "q_b", "q_s", "q_h", "stride"), "i32")
        signature |= dict.fromkeys(("indices_b", "indices_s", "out_l", "out_h", "lse_b", "lse_h", "lse_s"), "i32")
        signature |= {"log_unit": "fp32"} | ({} if fp8 else {"max_logits": "*fp32"})
        options: dict[str, Any] = {"WIDTH": width, "PAGE": 64 if fp8 else 0, "MERGE": merge, "KEY": sm90.KEY}
        options |= {"max_logits": None} if fp8 else {}
        second = fp8 and full
        options["EXTRA_PAGE"] = 2 if second else 0
        extra_tensors = ("extra_values", "extra_indices", "extra_lens")
        extra_numbers = ("extra_topk", "extra_slots", "extra_stride", "extra_indices_b", "extra_indices_s")
        if second:
            signature |= dict.fromkeys(extra_tensors, "*i32") | dict.fromkeys(extra_numbers, "i32")
        else:
            options |= dict.fromkeys(extra_tensors) | dict.fromkeys(extra_numbers, 0)
        given = {"lens": "*i32", "sinks": "*fp32"}
        signature |= given if full else {}
        options |= {} if full else dict.fromkeys(given)
        divisible: tuple[str, ...] = ("values", "partial", "partial_lse", "q_h", "out_l", "out_h")
        divisible += ("extra_values",) if second else ()
        divisible += () if fp8 else ("stride",)
        what = ("V3.2" if width == WIDTH else "V4") if fp8 else f"16 bits {width}"
        name = f"sparse_sm90 {what}, {full} {merge}"
        # strides of what comes last, kept while keys are read: 8 with Triton 3.6, 80 with 3.9
        cases.append(CompileCase(name, sparse_sm90, signature, options, divisible, targets=(90,), stack=80))
    return cases
