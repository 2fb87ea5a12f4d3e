"""Sparse MLA attention for 17 to 128 heads on sm_90, in Gluon: `mla_patch.kernels.sparse.prefill` and `sparse_decode`
reach it, by the same definitions.

A program has one query, 64 of its heads and one split of its keys. `mla_patch.kernels.sm90.seesaw_pipeline` does
what is done with keys; here they are gathered. A key that is not known comes as zeros and counts for nothing.

    16 bits     rows of a workspace, copied asynchronously
    V3.2, V4    e4m3 values land as they are, and become bfloat16 times their scale where they will be read; that is
                exact where scales are powers of two, else to 2**-9, as FlashMLA has it. Rope is copied
"""

from __future__ import annotations

import itertools
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from mla_patch.compat.triton import CompileCase, gluon_barrier, gluon_copy, gluon_reinterpret, watch_compiles
from mla_patch.kernels.sm90 import layouts as sm90
from mla_patch.kernels.sm90 import seesaw_pipeline as seesaw

HEADS = 64  # a program's


@gluon.jit
def _share(lens, extra_lens, b, topk, extra_topk, split, splits, EXTRA: gl.constexpr):
    """A split's units of 128 keys: the first, how many, at least one; units of the first cache, keys of both."""
    keys = topk
    if lens is not None:
        keys = gl.minimum(gl.maximum(gl.load(lens + b), 0), topk).to(gl.int32)
    units = (keys + (sm90.UNIT - 1)) // sm90.UNIT
    total = units
    extra_keys = extra_topk
    if EXTRA:
        if extra_lens is not None:
            extra_keys = gl.minimum(gl.maximum(gl.load(extra_lens + b), 0), extra_topk).to(gl.int32)
        total += (extra_keys + (sm90.UNIT - 1)) // sm90.UNIT
    each = (total + splits - 1) // splits
    start = split * each
    # where nothing is left a unit of unknown keys is all that the groups have
    return start, gl.maximum(gl.minimum(start + each, total) - start, 1), units, keys, extra_keys


@gluon.jit
def _finish(
    acc, weights, m, stage, out, lse, max_logits, partial, partial_lse, sinks, tile, line, b, s, split, splits, H,
    base_unit, out_l, out_h, lse_b, lse_h, lse_s, MERGE: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    head = tile * 64 + gl.arange(0, 64, layout=sm90.HEAD)
    lonely = weights == 0
    whole = gl.where(lonely, 1.0, weights)
    log = m + gl.log2(whole)
    if MERGE:
        place = (line.to(gl.int64) * splits + split) * H
        to = partial + place * 512
        if HALF == 0:
            gl.store(partial_lse + place + head, gl.where(lonely, -float("inf"), log), mask=head < H)
    else:
        to = out + line.to(gl.int64) * out_l
        if HALF == 0:
            at = b.to(gl.int64) * lse_b + s.to(gl.int64) * lse_s + head.to(gl.int64) * lse_h
            gl.store(lse + at, gl.where(lonely, float("inf"), log * base_unit), mask=head < H)
            if max_logits is not None:
                gl.store(max_logits + at, gl.where(lonely, -float("inf"), m * base_unit), mask=head < H)
        if sinks is not None:
            sink = gl.load(sinks + head, mask=head < H, other=0.0).to(gl.float32)
            whole = gl.where(lonely, 1.0, weights + gl.exp2(sink * 1.4426950408889634 - m))
    acc = acc * gl.convert_layout(1.0 / whole, sm90.OUTPUT_HEAD)[:, None]
    seesaw.put(acc.to(to.dtype.element_ty), to, 512 if MERGE else out_h, tile, H, stage, HALF)


@gluon.jit
def _even(
    q, lens, extra_lens, sinks, out, lse, max_logits, partial, partial_lse, H, Sq, topk, extra_topk, scale, base_unit,
    splits, q_b, q_s, q_h, out_l, out_h, lse_b, lse_h, lse_s, q_low, q_high, q_rope, low, high, rope, odd_low, odd_rope,
    known, top_even, top_odd, sum_even, sum_odd, barriers, ROPE: gl.constexpr, COPIED: gl.constexpr,
    EXTRA: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    zero = gl.to_tensor(0)
    tile, line, b, s, split = _place(H, Sq, splits)
    _start, count, _units, _keys, _more = _share(lens, extra_lens, b, topk, extra_topk, split, splits, EXTRA)
    source = q + b.to(gl.int64) * q_b + s.to(gl.int64) * q_s
    u = seesaw.begin_query(
        source, source + 512, tile, H, q_h, q_h, q_low, q_high, q_rope, scale, None, barriers, zero, 0, ROPE, False
    )  # fmt: skip
    acc, weights, m, _turn = seesaw.even_units(
        q_low, q_high, q_rope, low, high, rope, odd_low, odd_rope, top_even, top_odd, known, barriers, zero, count, u,
        0, 0, 0.0, 1.0, sm90.LEAST, ROPE, COPIED, False, False,
    )  # fmt: skip
    weights = seesaw.end_query(weights, sum_even, sum_odd, barriers, zero)
    _finish(
        acc, weights, m, q_low, out, lse, max_logits, partial, partial_lse, sinks, tile, line, b, s, split, splits,
        H, base_unit, out_l, out_h, lse_b, lse_h, lse_s, MERGE, 0,
    )  # fmt: skip


@gluon.jit
def _odd(
    q, lens, extra_lens, sinks, out, lse, max_logits, partial, partial_lse, H, Sq, topk, extra_topk, scale, base_unit,
    splits, q_b, q_s, q_h, out_l, out_h, lse_b, lse_h, lse_s, q_low, q_high, q_rope, low, high, rope, even_high,
    even_rope, known, top_even, top_odd, sum_even, sum_odd, barriers, ROPE: gl.constexpr, COPIED: gl.constexpr,
    EXTRA: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    zero = gl.to_tensor(0)
    tile, line, b, s, split = _place(H, Sq, splits)
    _start, count, _units, _keys, _more = _share(lens, extra_lens, b, topk, extra_topk, split, splits, EXTRA)
    source = q + b.to(gl.int64) * q_b + s.to(gl.int64) * q_s
    u = seesaw.begin_query(
        source, source + 512, tile, H, q_h, q_h, q_low, q_high, q_rope, scale, None, barriers, zero, 1, ROPE, False
    )  # fmt: skip
    acc, weights, m, _turn = seesaw.odd_units(
        q_low, q_high, q_rope, low, high, rope, even_high, even_rope, top_even, top_odd, known, barriers, zero, count,
        u, 0, 0, 0.0, 1.0, sm90.LEAST, ROPE, COPIED, False, False,
    )  # fmt: skip
    weights = seesaw.end_query(weights, sum_odd, sum_even, barriers, zero)
    _finish(
        acc, weights, m, q_high, out, lse, max_logits, partial, partial_lse, sinks, tile, line, b, s, split, splits,
        H, base_unit, out_l, out_h, lse_b, lse_h, lse_s, MERGE, 1,
    )  # fmt: skip


@gluon.jit
def _place(H, Sq, splits):
    """This program's tile of heads, query and split. Tiles of one query are neighbours, which find its keys in L2."""
    tiles = (H + 63) // 64
    rest = gl.program_id(0) // tiles
    line = rest // splits
    return gl.program_id(0) % tiles, line, line // Sq, line % Sq, rest % splits


@gluon.jit
def _named(
    own, extra_own, unit, at: gl.constexpr, units, keys, extra_keys, places, extra_places, EXTRA: gl.constexpr,
    L: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """Slots of a unit's keys from ``at`` on, -1 where there is none."""
    n = at + gl.arange(0, N, layout=L)
    first = unit * sm90.UNIT
    if EXTRA and unit >= units:
        own = extra_own
        first = (unit - units) * sm90.UNIT
        keys = extra_keys
        places = extra_places
    slot = gl.load(own + first + n, mask=first + n < keys, other=-1)
    return gl.where(slot < places, slot, -1)


@gluon.jit
def _copy_rows(
    kv, ids, lens, H, Sq, topk, places, splits, kv_s, ids_b, ids_s, even_low, even_high, even_rope, odd_low, odd_high,
    odd_rope, seen_even, seen_odd, barriers, ROPE: gl.constexpr,
):  # fmt: skip
    """16-bit rows, as they are."""
    L: gl.constexpr = gl.SliceLayout(1, sm90.ROWS)
    c = gl.arange(0, 256, layout=gl.SliceLayout(0, sm90.ROWS))[None, :]
    r = gl.arange(0, 64, layout=gl.SliceLayout(0, sm90.ROWS))[None, :]
    _tile, _line, b, s, split = _place(H, Sq, splits)
    start, count, units, keys, _more = _share(lens, None, b, topk, 0, split, splits, False)
    own = ids + b.to(gl.int64) * ids_b + s.to(gl.int64) * ids_s
    even = _named(own, own, start, 0, units, keys, 0, places, 0, False, L, 64)
    odd = _named(own, own, start, 64, units, keys, 0, places, 0, False, L, 64)
    for i in range(count):
        free = (i & 1) ^ 1
        row = (kv + gl.maximum(even, 0).to(gl.int64) * kv_s)[:, None]
        known = even >= 0
        even = _named(own, own, start + i + 1, 0, units, keys, 0, places, 0, False, L, 64)
        seesaw.bring(
            row, c, r, known, seen_even, even_low, 0, even_high, 256, even_rope, barriers, free, sm90.FREE_EVEN_LOW,
            sm90.FULL_EVEN_LOW, sm90.FREE_EVEN_HIGH, sm90.FULL_EVEN_HIGH, ROPE,
        )  # fmt: skip
        row = (kv + gl.maximum(odd, 0).to(gl.int64) * kv_s)[:, None]
        known = odd >= 0
        odd = _named(own, own, start + i + 1, 64, units, keys, 0, places, 0, False, L, 64)
        seesaw.bring(
            row, c, r, known, seen_odd, odd_high, 256, odd_low, 0, odd_rope, barriers, free, sm90.FREE_ODD_HIGH,
            sm90.FULL_ODD_HIGH, sm90.FREE_ODD_LOW, sm90.FULL_ODD_LOW, ROPE,
        )  # fmt: skip
    async_copy.wait_group(0)


@gluon.jit
def _row(values, slot, page_stride, PAGE: gl.constexpr, V4: gl.constexpr):
    """Where a slot's values and scales lie, in int32; pages are counted in 16 bytes."""
    page = values + (slot // PAGE).to(gl.int64) * page_stride * 4
    at = slot % PAGE
    if V4:
        return page + at * 144, page + (PAGE * 144 + at * 2)
    else:
        return page + at * 164, page + (at * 164 + 128)


@gluon.jit
def _rows(
    values, extra_values, slot, unit, units, page_stride, extra_page_stride, PAGE: gl.constexpr,
    EXTRA_PAGE: gl.constexpr, V4: gl.constexpr,
):  # fmt: skip
    row, scale = _row(values, slot, page_stride, PAGE, V4)
    if EXTRA_PAGE > 0 and unit >= units:
        row, scale = _row(extra_values, slot, extra_page_stride, EXTRA_PAGE, V4)
    return row, scale


@gluon.jit
def _prefetch(row, scale):
    """Rows into the second-level cache, before they are copied."""
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
def _block(place, K: gl.constexpr):
    """Landing of a half's k-th 64 values: 16 int32 of 64 rows, anywhere that is read before it is written."""
    L: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, [1, 0])
    return gluon_reinterpret(place, gl.int32, [512, 16], L).slice(K * 64, 64, 0)


@gluon.jit
def _columns(place, K: gl.constexpr):
    """The same values as bfloat16 in a tile, in pairs."""
    L: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    return gluon_reinterpret(place, gl.int32, [place.shape[1], 32], L).slice(K * 64, 64, 0)


@gluon.jit
def _scaled(x, scale):
    """Four e4m3 values in an int32, times a scale each row -> four bfloat16."""
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
def _scale_of(code, K: gl.constexpr):
    """The k-th of four ue8m0 scales in an int32."""
    return (((code >> (K * 8)) & 0xFF) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _widen(place, scales, HIGH: gl.constexpr, V4: gl.constexpr):
    """A half that has landed -> bfloat16. All of it is read before any is overwritten, and its scales with it: behind
    a store they would be waited for."""
    if V4:
        code = scales.slice(HIGH, 1, 1).load(sm90.READ)
    else:
        one = scales.slice(2 * HIGH, 1, 1).load(sm90.READ).to(gl.float32, bitcast=True)
        two = scales.slice(2 * HIGH + 1, 1, 1).load(sm90.READ).to(gl.float32, bitcast=True)
    a = _block(place, 0).load(sm90.READ)
    b = _block(place, 1).load(sm90.READ)
    c = _block(place, 2).load(sm90.READ)
    if not (HIGH and V4):
        d = _block(place, 3).load(sm90.READ)
    gluon_barrier()
    _columns(place, 0).store(_scaled(a, _scale_of(code, 0) if V4 else one))
    _columns(place, 1).store(_scaled(b, _scale_of(code, 1) if V4 else one))
    _columns(place, 2).store(_scaled(c, _scale_of(code, 2) if V4 else two))
    if not (HIGH and V4):
        _columns(place, 3).store(_scaled(d, _scale_of(code, 3) if V4 else two))


@gluon.jit
def _land(
    place, rope, row, scale, known, seen, scales, barriers, free, FREE: gl.constexpr, HIGH: gl.constexpr,
    FIRST: gl.constexpr, V4: gl.constexpr,
):  # fmt: skip
    """Begin to copy a half once it is free: ``FIRST`` with scales and what is known, second with the rope."""
    mbarrier.wait(barriers.index(FREE), free)
    mask = known[:, None]
    row = row[:, None]
    c = gl.arange(0, 16, layout=gl.SliceLayout(0, sm90.FETCH))[None, :]
    r = gl.arange(0, 32, layout=gl.SliceLayout(0, sm90.FETCH))[None, :]
    if FIRST:
        seen.store(known.to(gl.int32))
        n = gl.arange(0, scales.shape[1], layout=gl.SliceLayout(0, sm90.FETCH))[None, :]
        gluon_copy(scales, scale[:, None] + n, mask=mask)
    gluon_copy(_block(place.index(0), 0), row + (HIGH * 64 + c), mask=mask)
    gluon_copy(_block(place.index(0), 1), row + (HIGH * 64 + 16 + c), mask=mask)
    gluon_copy(_block(place.index(0), 2), row + (HIGH * 64 + 32 + c), mask=mask)
    if HIGH and V4:  # the rope is the rest of the row
        gluon_copy(_columns(place.index(0), 3), row + (112 + r), mask=mask)
    else:
        gluon_copy(_block(place.index(0), 3), row + (HIGH * 64 + 48 + c), mask=mask)
    if not FIRST and not V4:
        gluon_copy(_columns(rope.index(0), 0), row + (132 + r), mask=mask)
    async_copy.commit_group()


@gluon.jit
def _landed(place, scales, barriers, FULL: gl.constexpr, HIGH: gl.constexpr, LEFT: gl.constexpr, V4: gl.constexpr):
    """Convert a half, all but the last ``LEFT`` groups of copies having come."""
    async_copy.wait_group(LEFT)
    gluon_barrier()
    _widen(place.index(0), scales, HIGH, V4)
    fence_async_shared()
    seesaw.arrive(barriers, FULL)


@gluon.jit
def _bring_scaled(
    row, scale, known, seen, scales, one, two, rope, barriers, free, FREE_ONE: gl.constexpr, FULL_ONE: gl.constexpr,
    FREE_TWO: gl.constexpr, FULL_TWO: gl.constexpr, HIGH: gl.constexpr, V4: gl.constexpr,
):  # fmt: skip
    """A tile of an fp8 cache: the half that is free first, ``HIGH`` or low, then the other."""
    _land(one, rope, row, scale, known, seen, scales, barriers, free, FREE_ONE, HIGH, True, V4)
    _land(two, rope, row, scale, known, seen, scales, barriers, free, FREE_TWO, 1 - HIGH, False, V4)
    _landed(one, scales, barriers, FULL_ONE, HIGH, 1, V4)
    _landed(two, scales, barriers, FULL_TWO, 1 - HIGH, 0, V4)


@gluon.jit
def _scale_rows(
    values, ids, lens, extra_values, extra_ids, extra_lens, H, Sq, topk, extra_topk, places, extra_places, splits,
    page_stride, extra_page_stride, ids_b, ids_s, extra_ids_b, extra_ids_s, even_low, even_high, even_rope, odd_low,
    odd_high, odd_rope, seen_even, seen_odd, scales, barriers, V4: gl.constexpr, PAGE: gl.constexpr,
    EXTRA_PAGE: gl.constexpr,
):  # fmt: skip
    """fp8 caches: rows land, and become bfloat16."""
    L: gl.constexpr = gl.SliceLayout(1, sm90.FETCH)
    EXTRA: gl.constexpr = EXTRA_PAGE > 0
    _tile, _line, b, s, split = _place(H, Sq, splits)
    start, count, units, keys, more = _share(lens, extra_lens, b, topk, extra_topk, split, splits, EXTRA)
    own = ids + b.to(gl.int64) * ids_b + s.to(gl.int64) * ids_s
    other = own
    if EXTRA:
        other = extra_ids + b.to(gl.int64) * extra_ids_b + s.to(gl.int64) * extra_ids_s
    even = _named(own, other, start, 0, units, keys, more, places, extra_places, EXTRA, L, 64)
    odd = _named(own, other, start, 64, units, keys, more, places, extra_places, EXTRA, L, 64)
    ahead = _named(own, other, start + 1, 0, units, keys, more, places, extra_places, EXTRA, sm90.LANES, 128)
    for i in range(count):
        free = (i & 1) ^ 1
        at = start + i
        known = even >= 0
        row, scale = _rows(
            values, extra_values, gl.maximum(even, 0), at, units, page_stride, extra_page_stride, PAGE, EXTRA_PAGE, V4
        )
        even = _named(own, other, at + 1, 0, units, keys, more, places, extra_places, EXTRA, L, 64)
        _bring_scaled(
            row, scale, known, seen_even, scales.index(0), even_low, even_high, even_rope, barriers, free,
            sm90.FREE_EVEN_LOW, sm90.FULL_EVEN_LOW, sm90.FREE_EVEN_HIGH, sm90.FULL_EVEN_HIGH, 0, V4,
        )  # fmt: skip
        row, scale = _rows(
            values, extra_values, gl.maximum(ahead, 0), at + 1, units, page_stride, extra_page_stride, PAGE, EXTRA_PAGE,
            V4,
        )  # fmt: skip
        _prefetch(row, scale)
        ahead = _named(own, other, at + 2, 0, units, keys, more, places, extra_places, EXTRA, sm90.LANES, 128)
        known = odd >= 0
        row, scale = _rows(
            values, extra_values, gl.maximum(odd, 0), at, units, page_stride, extra_page_stride, PAGE, EXTRA_PAGE, V4
        )
        odd = _named(own, other, at + 1, 64, units, keys, more, places, extra_places, EXTRA, L, 64)
        _bring_scaled(
            row, scale, known, seen_odd, scales.index(1), odd_high, odd_low, odd_rope, barriers, free,
            sm90.FREE_ODD_HIGH, sm90.FULL_ODD_HIGH, sm90.FREE_ODD_LOW, sm90.FULL_ODD_LOW, 1, V4,
        )  # fmt: skip


_CHANGING = [
    "Sq", "topk", "extra_topk", "places", "extra_places", "sm_scale", "base_unit", "splits", "ids_b", "ids_s",
    "extra_ids_b", "extra_ids_s", "lse_b", "lse_h", "lse_s", "q_b", "q_s",
]  # fmt: skip
_ANYWHERE = ["q", "ids", "extra_ids", "lens", "extra_lens", "sinks", "lse", "max_logits", "out"]


@gluon.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_ANYWHERE)
def sparse_sm90(
    q, values, ids, lens, extra_values, extra_ids, extra_lens, sinks, out, lse, max_logits, partial, partial_lse, H, Sq,
    topk, extra_topk, places, extra_places, sm_scale, base_unit, splits, q_b, q_s, q_h, stride, extra_stride, ids_b,
    ids_s, extra_ids_b, extra_ids_s, out_l, out_h, lse_b, lse_h, lse_s, WIDTH: gl.constexpr, PAGE: gl.constexpr,
    EXTRA_PAGE: gl.constexpr, MERGE: gl.constexpr, KEY: gl.constexpr,
):  # fmt: skip
    """Queries [b, s, head], lines of b * Sq + s in ``out`` and partials. ``values`` is a 16-bit workspace with rows
    ``stride`` apart, or, as int32, an fp8 cache with pages 16 * ``stride`` bytes apart: V3.2 for a WIDTH of 576, V4
    for 512. ``base_unit`` multiplies base-2 statistics. sm_scale above 0."""
    EIGHT: gl.constexpr = values.dtype.element_ty.primitive_bitwidth == 32
    V4: gl.constexpr = WIDTH == 512
    ROPE: gl.constexpr = WIDTH == 576
    EXTRA: gl.constexpr = EXTRA_PAGE > 0
    to: gl.constexpr = gl.bfloat16 if EIGHT else values.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    VALUES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_low = gl.allocate_shared_memory(to, [1, 64, 256], TILE)
    q_high = gl.allocate_shared_memory(to, [1, 64, 256], TILE)
    q_rope = gl.allocate_shared_memory(to, [1, 64, 64], TILE)
    e_low = gl.allocate_shared_memory(to, [1, 64, 256], TILE)
    e_high = gl.allocate_shared_memory(to, [1, 64, 256], TILE)
    e_rope = gl.allocate_shared_memory(to, [1, 64, 64], TILE)
    o_low = gl.allocate_shared_memory(to, [1, 64, 256], TILE)
    o_high = gl.allocate_shared_memory(to, [1, 64, 256], TILE)
    o_rope = gl.allocate_shared_memory(to, [1, 64, 64], TILE)
    top_even = gl.allocate_shared_memory(gl.float32, [64], VALUES)
    top_odd = gl.allocate_shared_memory(gl.float32, [64], VALUES)
    sum_even = gl.allocate_shared_memory(gl.float32, [64], VALUES)
    sum_odd = gl.allocate_shared_memory(gl.float32, [64], VALUES)
    seen_even = gl.allocate_shared_memory(gl.int32, [64], VALUES)
    seen_odd = gl.allocate_shared_memory(gl.int32, [64], VALUES)
    barriers = gl.allocate_shared_memory(gl.int64, [sm90.BARRIERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(0, 4):
        if EIGHT:
            mbarrier.init(barriers.index(i), count=1)
        else:  # every copying thread arrives by itself, and all once more behind which keys are known
            mbarrier.init(barriers.index(i), count=129 if i == 0 or i == 3 else 128)
    for i in gl.static_range(4, 10):
        mbarrier.init(barriers.index(i), count=1)
    for i in gl.static_range(10, 13):
        mbarrier.init(barriers.index(i), count=2)
    fence_async_shared()
    gluon_barrier()
    scale = sm_scale * 1.4426950408889634  # exp2 is what the chip has
    # The arguments are written out for every group: a tuple with a name would lose its constants.
    if EIGHT:
        N: gl.constexpr = 2 if V4 else 4
        scales = gl.allocate_shared_memory(gl.int32, [2, 64, N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        gl.warp_specialize(
            [
                (_even, (q, lens, extra_lens, sinks, out, lse, max_logits, partial, partial_lse, H, Sq, topk,
                         extra_topk, scale, base_unit, splits, q_b, q_s, q_h, out_l, out_h, lse_b, lse_h, lse_s, q_low,
                         q_high, q_rope, e_low, e_high, e_rope, o_low, o_rope, seen_even, top_even, top_odd, sum_even,
                         sum_odd, barriers, ROPE, False, EXTRA, MERGE)),
                (_odd, (q, lens, extra_lens, sinks, out, lse, max_logits, partial, partial_lse, H, Sq, topk,
                        extra_topk, scale, base_unit, splits, q_b, q_s, q_h, out_l, out_h, lse_b, lse_h, lse_s, q_low,
                        q_high, q_rope, o_low, o_high, o_rope, e_high, e_rope, seen_odd, top_even, top_odd, sum_even,
                        sum_odd, barriers, ROPE, False, EXTRA, MERGE)),
                (_scale_rows, (values, ids, lens, extra_values, extra_ids, extra_lens, H, Sq, topk, extra_topk, places,
                               extra_places, splits, stride, extra_stride, ids_b, ids_s, extra_ids_b, extra_ids_s,
                               e_low, e_high, e_rope, o_low, o_high, o_rope, seen_even, seen_odd, scales, barriers, V4,
                               PAGE, EXTRA_PAGE)),
            ],
            [4, 4],
            [208, 88],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_even, (q, lens, extra_lens, sinks, out, lse, max_logits, partial, partial_lse, H, Sq, topk,
                         extra_topk, scale, base_unit, splits, q_b, q_s, q_h, out_l, out_h, lse_b, lse_h, lse_s, q_low,
                         q_high, q_rope, e_low, e_high, e_rope, o_low, o_rope, seen_even, top_even, top_odd, sum_even,
                         sum_odd, barriers, ROPE, True, EXTRA, MERGE)),
                (_odd, (q, lens, extra_lens, sinks, out, lse, max_logits, partial, partial_lse, H, Sq, topk,
                        extra_topk, scale, base_unit, splits, q_b, q_s, q_h, out_l, out_h, lse_b, lse_h, lse_s, q_low,
                        q_high, q_rope, o_low, o_high, o_rope, e_high, e_rope, seen_odd, top_even, top_odd, sum_even,
                        sum_odd, barriers, ROPE, True, EXTRA, MERGE)),
                (_copy_rows, (values, ids, lens, H, Sq, topk, places, splits, stride, ids_b, ids_s, e_low, e_high,
                              e_rope, o_low, o_high, o_rope, seen_even, seen_odd, barriers, ROPE)),
            ],
            [4, 4],
            [216, 72],
        )  # fmt: skip


watch_compiles(sparse_sm90)


def compile_cases(every: bool = False) -> list[CompileCase]:
    """A workspace and both fp8 layouts, all options off and all on, or, for ``every``, the product."""
    cases = []
    switches = list(itertools.product((False, True), repeat=2)) if every else [(False, False), (True, True)]
    for eight, width, (full, merge) in itertools.product((False, True), (576, 512), switches):
        merge = merge and eight  # a prefill has no splits
        signature = {"q": "*bf16", "values": "*i32" if eight else "*bf16", "ids": "*i32", "out": "*bf16"}
        signature |= {"lse": "*fp32", "partial": "*fp32", "partial_lse": "*fp32", "sm_scale": "fp32"}
        signature |= dict.fromkeys(("H", "Sq", "topk", "places", "splits", "q_b", "q_s", "q_h", "stride"), "i32")
        signature |= dict.fromkeys(("ids_b", "ids_s", "out_l", "out_h", "lse_b", "lse_h", "lse_s"), "i32")
        signature |= {"base_unit": "fp32"} | ({} if eight else {"max_logits": "*fp32"})
        options: dict[str, Any] = {"WIDTH": width, "PAGE": 64 if eight else 0, "MERGE": merge, "KEY": sm90.KEY}
        options |= {"max_logits": None} if eight else {}
        second = eight and full
        options["EXTRA_PAGE"] = 2 if second else 0
        extra_tensors = ("extra_values", "extra_ids", "extra_lens")
        extra_numbers = ("extra_topk", "extra_places", "extra_stride", "extra_ids_b", "extra_ids_s")
        if second:
            signature |= dict.fromkeys(extra_tensors, "*i32") | dict.fromkeys(extra_numbers, "i32")
        else:
            options |= dict.fromkeys(extra_tensors) | dict.fromkeys(extra_numbers, 0)
        given = {"lens": "*i32", "sinks": "*fp32"}
        signature |= given if full else {}
        options |= {} if full else dict.fromkeys(given)
        divisible: tuple[str, ...] = ("values", "partial", "partial_lse", "q_h", "out_l", "out_h")
        divisible += ("extra_values",) if second else ()
        divisible += () if eight else ("stride",)
        what = ("V3.2" if width == 576 else "V4") if eight else f"16 bits {width}"
        name = f"sparse_sm90 {what}, {full} {merge}"
        # strides of what comes last, kept while keys are read: 8 with Triton 3.6, 80 with 3.9
        cases.append(CompileCase(name, sparse_sm90, signature, options, divisible, targets=(90,), stack=80))
    return cases
