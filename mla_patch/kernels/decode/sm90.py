"""MLA decode for 17 to 128 heads on sm_90, in Gluon: `mla_patch.kernels.decode` reaches it, by the same definition.

`mla_patch.kernels.sm90.seesaw_pipeline` has the work on one query and its keys, and says what is in shared memory, in
registers, and at which barrier. Here are the schedule, which keys, and what becomes of the results. All of these are
the portable kernel's, with its partials and tables; pieces are in units of 128 keys.

The line of work has, for each request with keys, its units and sm90.CHANGE_UNITS more, which stand for what a change of
requests costs. Every program takes an equal piece of the line, for 64 heads. Its three groups of warps walk the piece
by themselves, each with its own look at the lengths, so that no list of work has to be written or passed.

Rows of a 16-bit cache are copied asynchronously. Rows of an 8-bit cache land in the upper half of the place that their
float16 will take, and are converted there; q is divided by a power of two for each head, as in the portable kernel.
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
def _add(a, b):
    return a + b


@gluon.jit
def _times_value_at(number, at):
    """A number times that on the device, if there is one there."""
    if at is not None:
        number *= gl.load(at).to(gl.float32)
    return number


@gluon.jit
def _key_count(lens, b, mask, PAGE_SIZE: gl.constexpr):
    """Keys of requests; without pages ``lens`` is where they begin."""
    if PAGE_SIZE > 0:
        count = gl.load(lens + b, mask=mask, other=0)
    else:
        count = gl.load(lens + 1 + b, mask=mask, other=0) - gl.load(lens + b, mask=mask, other=0)
    return gl.maximum(count, 0).to(gl.int32)


@gluon.jit
def _line_units(lens, B, first_request, PAGE_SIZE: gl.constexpr):
    """128 requests' lengths on the line of work: their units and a change of requests; an empty one has none."""
    lane = first_request + gl.arange(0, 128, layout=sm90.LANES)
    count = _key_count(lens, lane, lane < B, PAGE_SIZE)
    return lane, gl.where(count > 0, (count + (sm90.KEYS_PER_UNIT - 1)) // sm90.KEYS_PER_UNIT + sm90.CHANGE_UNITS, 0)


@gluon.jit
def _cut_line(lens, B, PAGE_SIZE: gl.constexpr):
    """This program's piece of the line: how long pieces are, where it begins, and where it ends."""
    total_units = gl.to_tensor(0)
    max_units = gl.to_tensor(0)
    for first_request in range(0, B, 128):
        _lane, units = _line_units(lens, B, first_request, PAGE_SIZE)
        total_units += gl.sum(units, 0)
        max_units = gl.maximum(max_units, gl.max(units, 0))
    per_program = (total_units + gl.num_programs(0) - 1) // gl.num_programs(0)
    if total_units == max_units * B:
        # requests of one length: whole ones, which leave nothing to merge, if that makes pieces little longer
        whole_requests = (per_program + max_units - 1) // gl.maximum(max_units, 1) * max_units
        per_program = gl.where(whole_requests * 16 <= per_program * 17, whole_requests, per_program)
    start = gl.program_id(0) * per_program
    return per_program, start, gl.minimum(start + per_program, total_units)


@gluon.jit
def _find_request(lens, B, position, PAGE_SIZE: gl.constexpr):
    """The request at a position of the line, where it begins, and the position; behind its units, the next one's."""
    b = gl.to_tensor(0)
    begin = gl.to_tensor(0)
    end = gl.to_tensor(2147483647)
    units_before = gl.to_tensor(0)
    for first_request in range(0, B, 128):
        lane, units = _line_units(lens, B, first_request, PAGE_SIZE)
        ends = gl.associative_scan(units, 0, _add) + units_before
        b += gl.sum(((ends <= position) & (lane < B)).to(gl.int32), 0)
        begin = gl.maximum(begin, gl.max(gl.where(ends <= position, ends, 0), 0))
        end = gl.minimum(end, gl.min(gl.where(ends > position, ends, 2147483647), 0))
        units_before += gl.sum(units, 0)
    if position >= end - sm90.CHANGE_UNITS:
        b += 1
        begin = end
        position = end
    return b, begin, position


@gluon.jit
def _next_request(lens, b, begin, position, stop, table_stride, PAGE_SIZE: gl.constexpr):
    """Of the request that begins at ``begin`` and is b or, where that is empty, a later one: its number, its list of
    tokens or pages, its length, where its units end on the line, how many of them are in this piece."""
    length = gl.to_tensor(0)
    b -= 1
    while length <= 0:  # `position` is before the end of the line, so there is one
        b += 1
        if PAGE_SIZE > 0:
            length = gl.load(lens + b).to(gl.int32)
        else:
            length = (gl.load(lens + b + 1) - gl.load(lens + b)).to(gl.int32)
    if PAGE_SIZE > 0:
        first = b.to(gl.int64) * table_stride
    else:
        first = gl.load(lens + b).to(gl.int64)
    end = begin + (length + (sm90.KEYS_PER_UNIT - 1)) // sm90.KEYS_PER_UNIT
    return b, first, length, end, gl.minimum(stop, end) - position


@gluon.jit
def _temperature(length, xai_len):
    last = gl.maximum(length - 1, 1).to(gl.float32)  # log2(0) of a single key is not selected
    return gl.where(length - 1 > xai_len, gl.log2(last) / gl.log2(xai_len.to(gl.float32)), 1.0)


@gluon.jit
def _scratch_tables(partial, H):
    """What lies behind the partials in the scratch, as in the portable kernel."""
    programs = gl.num_programs(0)
    rows = 2 * programs.to(gl.int64) * H
    lse = (partial + rows * 512).to(gl.pointer_type(gl.float32), bitcast=True)
    shared_requests = (lse + rows).to(gl.pointer_type(gl.int32), bitcast=True)
    return lse, shared_requests, shared_requests + programs * 4


@gluon.jit
def _write_piece(
    acc, weights, m, stage, out, lse, partial, sinks, b, begin, end, position, count, per_program, H,
    v_scale, out_stride_b, out_stride_h, lse_stride_b, lse_stride_h, HALF: gl.constexpr,
):  # fmt: skip
    """Write what a piece has of a request: the output where that is all, else a partial and who shares it."""
    program = gl.program_id(0)
    partial_lse, shared_requests, owners = _scratch_tables(partial, H)
    is_unsplit = (position == begin) & (position + count == end)
    head = gl.program_id(1) * 64 + gl.arange(0, 64, layout=sm90.HEAD)
    piece_lse = m + gl.log2(weights)
    if sinks is not None:
        sink = gl.load(sinks + head, mask=head < H, other=0.0).to(gl.float32)
        weights += gl.where(is_unsplit, gl.exp2(sink * 1.4426950408889634 - m), 0.0)
    acc = acc * gl.convert_layout(gl.where(is_unsplit, v_scale, 1.0) / weights, sm90.OUTPUT_HEAD)[:, None]
    if is_unsplit:
        to_out = out + b.to(gl.int64) * out_stride_b
        seesaw.store_tile(acc.to(out.dtype.element_ty), to_out, out_stride_h, gl.program_id(1), H, stage, HALF)
        if HALF == 0:
            gl.store(owners + 2 * b + 1, -1)
            if lse is not None:
                to = lse + b.to(gl.int64) * lse_stride_b + head.to(gl.int64) * lse_stride_h
                value = (m + gl.log2(weights)) * 0.6931471805599453
                gl.store(to, value.to(lse.dtype.element_ty), mask=head < H)
    else:
        # a request that began before this piece goes to the even row, one that begins inside it to the odd one
        row = (2 * program + (position == begin).to(gl.int32)).to(gl.int64) * H
        to_partial = partial + row * 512
        seesaw.store_tile(acc.to(partial.dtype.element_ty), to_partial, 512, gl.program_id(1), H, stage, HALF)
        if HALF == 0:
            gl.store(partial_lse + row + head, piece_lse, mask=head < H)
            if position == begin:
                gl.store(owners + 2 * b, program)
                gl.store(owners + 2 * b + 1, (end - 1) // per_program)
            else:
                gl.store(shared_requests + program * 4, b)
                gl.store(shared_requests + program * 4 + 1, begin // per_program)
                gl.store(shared_requests + program * 4 + 2, (end - 1) // per_program)


@gluon.jit
def _consumer_even(
    q, rope_of_q, out, lse, lens, sinks, partial, B, H, scale, v_scale, logit_cap, xai_len, q_stride_b, q_stride_h,
    rope_stride_b, rope_stride_h, out_stride_b, out_stride_h, lse_stride_b, lse_stride_h, table_stride, q_low, q_high,
    q_rope, low, high, rope, odd_low, odd_rope, top_even, top_odd, sum_even, sum_odd, q_scale, barriers,
    SCALED: gl.constexpr, CAPPED: gl.constexpr, XAI: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    per_program, start, stop = _cut_line(lens, B, PAGE_SIZE)
    _lse, shared_requests, owners = _scratch_tables(partial, H)
    gl.store(shared_requests + gl.program_id(0) * 4, -1)
    units_done = gl.to_tensor(0)
    queries_done = gl.to_tensor(0)
    b, begin, position = _find_request(lens, B, start, PAGE_SIZE)
    while position < stop:
        b, _first, length, end, count = _next_request(lens, b, begin, position, stop, table_stride, PAGE_SIZE)
        source = q + b.to(gl.int64) * q_stride_b
        source_rope = rope_of_q + b.to(gl.int64) * rope_stride_b
        score_scale = seesaw.begin_query(
            source, source_rope, gl.program_id(1), H, q_stride_h, rope_stride_h, q_low, q_high, q_rope, scale, q_scale,
            barriers, queries_done, 0, True, SCALED,
        )  # fmt: skip
        acc, weights, m, units_done = seesaw.consumer_even(
            q_low, q_high, q_rope, low, high, rope, odd_low, odd_rope, top_even, top_odd, None, barriers, units_done,
            count, score_scale, (position - begin) * sm90.KEYS_PER_UNIT, length, logit_cap,
            _temperature(length, xai_len), -float("inf"), True, not SCALED, CAPPED, XAI,
        )  # fmt: skip
        weights = seesaw.end_query(weights, sum_even, sum_odd, barriers, queries_done)
        _write_piece(
            acc, weights, m, q_low if SCALED else None, out, lse, partial, sinks, b, begin, end, position, count,
            per_program, H, v_scale, out_stride_b, out_stride_h, lse_stride_b, lse_stride_h, 0,
        )  # fmt: skip
        seesaw.signal(barriers, sm90.Q_FREE)
        queries_done += 1
        b += 1
        begin = end + sm90.CHANGE_UNITS
        position = begin
    # nobody else comes by a request of no keys
    for empty in range(gl.program_id(0), B, gl.num_programs(0)):
        if _key_count(lens, empty, empty < B, PAGE_SIZE) == 0:
            h = gl.program_id(1) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, sm90.ROWS))
            c = gl.arange(0, 512, layout=gl.SliceLayout(0, sm90.ROWS))
            to_out = out + gl.to_tensor(empty).to(gl.int64) * out_stride_b + h[:, None].to(gl.int64) * out_stride_h
            to_out = gl.multiple_of(to_out, [16, 16])
            zero = gl.zeros([64, 512], out.dtype.element_ty, layout=sm90.ROWS)
            gl.store(to_out + c[None, :], zero, mask=(h < H)[:, None])
            gl.store(owners + 2 * empty + 1, -1)  # nothing to merge
            if lse is not None:
                head = gl.program_id(1) * 64 + gl.arange(0, 64, layout=sm90.HEAD)
                to_lse = lse + gl.to_tensor(empty).to(gl.int64) * lse_stride_b + head.to(gl.int64) * lse_stride_h
                no_lse = gl.full([64], -float("inf"), lse.dtype.element_ty, layout=sm90.HEAD)
                gl.store(to_lse, no_lse, mask=head < H)


@gluon.jit
def _consumer_odd(
    q, rope_of_q, out, lse, lens, sinks, partial, B, H, scale, v_scale, logit_cap, xai_len, q_stride_b, q_stride_h,
    rope_stride_b, rope_stride_h, out_stride_b, out_stride_h, lse_stride_b, lse_stride_h, table_stride, q_low, q_high,
    q_rope, low, high, rope, even_high, even_rope, top_even, top_odd, sum_even, sum_odd, q_scale, barriers,
    SCALED: gl.constexpr, CAPPED: gl.constexpr, XAI: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    per_program, start, stop = _cut_line(lens, B, PAGE_SIZE)
    units_done = gl.to_tensor(0)
    queries_done = gl.to_tensor(0)
    b, begin, position = _find_request(lens, B, start, PAGE_SIZE)
    while position < stop:
        b, _first, length, end, count = _next_request(lens, b, begin, position, stop, table_stride, PAGE_SIZE)
        source = q + b.to(gl.int64) * q_stride_b
        source_rope = rope_of_q + b.to(gl.int64) * rope_stride_b
        score_scale = seesaw.begin_query(
            source, source_rope, gl.program_id(1), H, q_stride_h, rope_stride_h, q_low, q_high, q_rope, scale, q_scale,
            barriers, queries_done, 1, True, SCALED,
        )  # fmt: skip
        acc, weights, m, units_done = seesaw.consumer_odd(
            q_low, q_high, q_rope, low, high, rope, even_high, even_rope, top_even, top_odd, None, barriers, units_done,
            count, score_scale, (position - begin) * sm90.KEYS_PER_UNIT + 64, length, logit_cap,
            _temperature(length, xai_len), -float("inf"), True, not SCALED, CAPPED, XAI,
        )  # fmt: skip
        weights = seesaw.end_query(weights, sum_odd, sum_even, barriers, queries_done)
        _write_piece(
            acc, weights, m, q_high if SCALED else None, out, lse, partial, sinks, b, begin, end, position, count,
            per_program, H, v_scale, out_stride_b, out_stride_h, lse_stride_b, lse_stride_h, 1,
        )  # fmt: skip
        seesaw.signal(barriers, sm90.Q_FREE)
        queries_done += 1
        b += 1
        begin = end + sm90.CHANGE_UNITS
        position = begin


@gluon.jit
def _slots(token_ids, first, at, length, PAGE_SIZE: gl.constexpr, L: gl.constexpr, N: gl.constexpr = 64):
    """Where keys' rows are, in the cache or among its pages; past the end the last key's again."""
    j = gl.minimum(at + gl.arange(0, N, layout=L), length - 1)
    if PAGE_SIZE > 0:
        slot = gl.load(token_ids + first + j // PAGE_SIZE).to(gl.int32) * PAGE_SIZE + j % PAGE_SIZE
    else:
        slot = gl.load(token_ids + first + j).to(gl.int32)  # half the registers; a pool has fewer than 2**31 rows
    return slot


@gluon.jit
def _addresses(kv, slot, kv_stride, page_stride, PAGE_SIZE: gl.constexpr):
    slot = slot.to(gl.int64)
    if PAGE_SIZE > 0:
        row = kv + (slot // PAGE_SIZE) * page_stride + (slot % PAGE_SIZE) * kv_stride
    else:
        row = kv + slot * kv_stride
    return row


@gluon.jit
def _producer_16bit(
    kv, lens, token_ids, B, kv_stride, table_stride, page_stride, even_low, even_high, even_rope, odd_low, odd_high,
    odd_rope, barriers, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """Brings the rows of a 16-bit cache as they are. Slots are loaded a unit before their rows are copied."""
    _per_program, start, stop = _cut_line(lens, B, PAGE_SIZE)
    c = gl.arange(0, 256, layout=gl.SliceLayout(0, sm90.ROWS))[None, :]
    r = gl.arange(0, 64, layout=gl.SliceLayout(0, sm90.ROWS))[None, :]
    units_done = gl.to_tensor(0)
    b, begin, position = _find_request(lens, B, start, PAGE_SIZE)
    while position < stop:
        b, first, length, end, count = _next_request(lens, b, begin, position, stop, table_stride, PAGE_SIZE)
        key = (position - begin) * sm90.KEYS_PER_UNIT
        even = _slots(token_ids, first, key, length, PAGE_SIZE, gl.SliceLayout(1, sm90.ROWS))
        odd = _slots(token_ids, first, key + 64, length, PAGE_SIZE, gl.SliceLayout(1, sm90.ROWS))
        for i in range(count):
            free = (units_done & 1) ^ 1
            row = _addresses(kv, even, kv_stride, page_stride, PAGE_SIZE)[:, None]
            seesaw.load_tile_async(
                row, c, r, None, None, even_low, 0, even_high, 256, even_rope, barriers, free, sm90.FREE_EVEN_LOW,
                sm90.FULL_EVEN_LOW, sm90.FREE_EVEN_HIGH, sm90.FULL_EVEN_HIGH, True,
            )  # fmt: skip
            even = _slots(
                token_ids, first, key + (i + 1) * sm90.KEYS_PER_UNIT, length, PAGE_SIZE, gl.SliceLayout(1, sm90.ROWS)
            )
            row = _addresses(kv, odd, kv_stride, page_stride, PAGE_SIZE)[:, None]
            seesaw.load_tile_async(
                row, c, r, None, None, odd_high, 256, odd_low, 0, odd_rope, barriers, free, sm90.FREE_ODD_HIGH,
                sm90.FULL_ODD_HIGH, sm90.FREE_ODD_LOW, sm90.FULL_ODD_LOW, True,
            )  # fmt: skip
            odd = _slots(
                token_ids,
                first,
                key + (i + 1) * sm90.KEYS_PER_UNIT + 64,
                length,
                PAGE_SIZE,
                gl.SliceLayout(1, sm90.ROWS),
            )
            units_done += 1
        b += 1
        begin = end + sm90.CHANGE_UNITS
        position = begin
    async_copy.wait_group(0)


@gluon.jit
def _prefetch(kv, slot, kv_stride, page_stride, PAGE_SIZE: gl.constexpr):
    """Rows of 576 bytes into the second-level cache, a unit before they are copied."""
    row = _addresses(kv, slot, kv_stride, page_stride, PAGE_SIZE).to(gl.int64, bitcast=True)
    gl.inline_asm_elementwise(
        """prefetch.global.L2 [$1];
        prefetch.global.L2 [$1+128];
        prefetch.global.L2 [$1+256];
        prefetch.global.L2 [$1+384];
        prefetch.global.L2 [$1+512];
        mov.b32 $0, 0;""",
        "=r,l",
        [row],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _landing_place(place):
    """Where a half's 8-bit values land, as int32: the upper half of the place that their float16 take."""
    N: gl.constexpr = place.shape[1] // 4
    L: gl.constexpr = gl.SwizzledSharedLayout(16, 1, N // 16, [1, 0])
    return gluon_reinterpret(place, gl.int32, [128, N], L).slice(64, 64, 0)


@gluon.jit
def _copy_8bit_async(place, row, AT: gl.constexpr):
    N: gl.constexpr = place.shape[1] // 4
    c = AT + gl.arange(0, N, layout=gl.SliceLayout(0, sm90.FETCH))
    gluon_copy(_landing_place(place), row + c[None, :])


@gluon.jit
def _land_8bit(place, E5M2: gl.constexpr):
    """A half that has landed -> float16, exact."""
    N: gl.constexpr = place.shape[1] // 2
    L: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    x = _landing_place(place).load(sm90.READ)
    gluon_barrier()  # what is read is overwritten
    if E5M2:  # the upper half of a float16
        low, high = gl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424;",
            "=&r,=r,r",
            [x],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        low, high = gl.inline_asm_elementwise(
            """{
            .reg .b16 a, b;
            mov.b32 {a, b}, $2;
            cvt.rn.f16x2.e4m3x2 $0, a;
            cvt.rn.f16x2.e4m3x2 $1, b;
            }""",
            "=&r,=r,r",
            [x],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    gluon_reinterpret(place, gl.int32, [64, N], L).store(gl.reshape(gl.join(low, high), [64, N]))


@gluon.jit
def _load_tile_8bit(
    row, first, AT_FIRST: gl.constexpr, second, AT_SECOND: gl.constexpr, rope, barriers, free, FREE_FIRST: gl.constexpr,
    FULL_FIRST: gl.constexpr, FREE_SECOND: gl.constexpr, FULL_SECOND: gl.constexpr, E5M2: gl.constexpr,
):  # fmt: skip
    """A tile of an 8-bit cache: the half that is free first, then the other and the rope; AT_* where they begin."""
    mbarrier.wait(barriers.index(FREE_FIRST), free)
    _copy_8bit_async(first.index(0), row, AT_FIRST)
    async_copy.commit_group()
    mbarrier.wait(barriers.index(FREE_SECOND), free)
    _copy_8bit_async(second.index(0), row, AT_SECOND)
    _copy_8bit_async(rope.index(0), row, 128)
    async_copy.commit_group()
    async_copy.wait_group(1)
    gluon_barrier()
    _land_8bit(first.index(0), E5M2)
    fence_async_shared()
    seesaw.signal(barriers, FULL_FIRST)
    async_copy.wait_group(0)
    gluon_barrier()
    _land_8bit(second.index(0), E5M2)
    _land_8bit(rope.index(0), E5M2)
    fence_async_shared()
    seesaw.signal(barriers, FULL_SECOND)


@gluon.jit
def _producer_8bit(
    kv, lens, token_ids, B, kv_stride, table_stride, page_stride, even_low, even_high, even_rope, odd_low, odd_high,
    odd_rope, barriers, PAGE_SIZE: gl.constexpr, E5M2: gl.constexpr,
):  # fmt: skip
    """Brings the rows of an 8-bit cache, which is read as int32: they land, and become float16 where they are.

    The copies of a tile have to be waited for before its values can be converted. So rows are brought into the
    second-level cache a unit before, and their slots are loaded two units before.
    """
    _per_program, start, stop = _cut_line(lens, B, PAGE_SIZE)
    units_done = gl.to_tensor(0)
    b, begin, position = _find_request(lens, B, start, PAGE_SIZE)
    while position < stop:
        b, first, length, end, count = _next_request(lens, b, begin, position, stop, table_stride, PAGE_SIZE)
        key = (position - begin) * sm90.KEYS_PER_UNIT
        even = _slots(token_ids, first, key, length, PAGE_SIZE, gl.SliceLayout(1, sm90.FETCH))
        odd = _slots(token_ids, first, key + 64, length, PAGE_SIZE, gl.SliceLayout(1, sm90.FETCH))
        ahead = _slots(token_ids, first, key + sm90.KEYS_PER_UNIT, length, PAGE_SIZE, sm90.LANES, 128)
        for i in range(count):
            free = (units_done & 1) ^ 1
            row = _addresses(kv, even, kv_stride, page_stride, PAGE_SIZE)[:, None]
            even = _slots(
                token_ids, first, key + (i + 1) * sm90.KEYS_PER_UNIT, length, PAGE_SIZE, gl.SliceLayout(1, sm90.FETCH)
            )
            _load_tile_8bit(
                row, even_low, 0, even_high, 64, even_rope, barriers, free, sm90.FREE_EVEN_LOW, sm90.FULL_EVEN_LOW,
                sm90.FREE_EVEN_HIGH, sm90.FULL_EVEN_HIGH, E5M2,
            )  # fmt: skip
            _prefetch(kv, ahead, kv_stride, page_stride, PAGE_SIZE)
            ahead = _slots(token_ids, first, key + (i + 2) * sm90.KEYS_PER_UNIT, length, PAGE_SIZE, sm90.LANES, 128)
            row = _addresses(kv, odd, kv_stride, page_stride, PAGE_SIZE)[:, None]
            odd = _slots(
                token_ids,
                first,
                key + (i + 1) * sm90.KEYS_PER_UNIT + 64,
                length,
                PAGE_SIZE,
                gl.SliceLayout(1, sm90.FETCH),
            )
            _load_tile_8bit(
                row, odd_high, 64, odd_low, 0, odd_rope, barriers, free, sm90.FREE_ODD_HIGH, sm90.FULL_ODD_HIGH,
                sm90.FREE_ODD_LOW, sm90.FULL_ODD_LOW, E5M2,
            )  # fmt: skip
            units_done += 1
        b += 1
        begin = end + sm90.CHANGE_UNITS
        position = begin


@gluon.jit(
    do_not_specialize=["B", "sm_scale", "v_scale", "logit_cap", "xai_len", "table_stride"],
    do_not_specialize_on_alignment=[
        "q",
        "rope_of_q",
        "out",
        "lse",
        "lens",
        "token_ids",
        "sinks",
        "k_scale_at",
        "v_scale_at",
    ],
)
def decode_sm90(
    q, rope_of_q, kv, out, lse, lens, token_ids, sinks, k_scale_at, v_scale_at, partial, B, H, sm_scale, v_scale,
    logit_cap, xai_len, q_stride_b, q_stride_h, rope_stride_b, rope_stride_h, kv_stride, out_stride_b, out_stride_h,
    lse_stride_b, lse_stride_h, table_stride, page_stride, CAPPED: gl.constexpr, XAI: gl.constexpr, E5M2: gl.constexpr,
    PAGE_SIZE: gl.constexpr, KEY: gl.constexpr,
):  # fmt: skip
    """The portable kernel's arguments, but for an 8-bit cache as int32 and rows 16 bytes aligned; sm_scale above 0."""
    IS_8BIT: gl.constexpr = kv.dtype.element_ty.primitive_bitwidth == 32
    to: gl.constexpr = gl.float16 if IS_8BIT else kv.dtype.element_ty
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
    q_scale = gl.allocate_shared_memory(gl.float32, [64], VALUES)
    barriers = gl.allocate_shared_memory(gl.int64, [sm90.BARRIERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(0, 4):  # FULL_*: every thread of the producer arrives by itself when its copies are there
        mbarrier.init(barriers.index(i), count=1 if IS_8BIT else 128)
    for i in gl.static_range(4, 10):  # FREE_*, WEIGHTS_*
        mbarrier.init(barriers.index(i), count=1)
    for i in gl.static_range(10, 13):  # Q_FREE, Q_FULL, SUMS: both consumers arrive
        mbarrier.init(barriers.index(i), count=2)
    fence_async_shared()
    gluon_barrier()
    sm_scale, v_scale = _times_value_at(sm_scale, k_scale_at), _times_value_at(v_scale, v_scale_at)
    scale = sm_scale if CAPPED else sm_scale * 1.4426950408889634  # exp2 is what the chip has
    # The arguments are written out for every group: a tuple with a name would lose its constants. Behind the groups are
    # the warps and the registers a thread of the last two of them.
    if IS_8BIT:
        gl.warp_specialize(
            [
                (_consumer_even, (
                    q, rope_of_q, out, lse, lens, sinks, partial, B, H, scale, v_scale, logit_cap, xai_len, q_stride_b,
                    q_stride_h, rope_stride_b, rope_stride_h, out_stride_b, out_stride_h, lse_stride_b, lse_stride_h,
                    table_stride, q_low, q_high, q_rope, even_low, even_high, even_rope, odd_low, odd_rope, top_even,
                    top_odd, sum_even, sum_odd, q_scale, barriers, True, CAPPED, XAI, PAGE_SIZE
                )),
                (_consumer_odd, (
                    q, rope_of_q, out, lse, lens, sinks, partial, B, H, scale, v_scale, logit_cap, xai_len, q_stride_b,
                    q_stride_h, rope_stride_b, rope_stride_h, out_stride_b, out_stride_h, lse_stride_b, lse_stride_h,
                    table_stride, q_low, q_high, q_rope, odd_low, odd_high, odd_rope, even_high, even_rope, top_even,
                    top_odd, sum_even, sum_odd, q_scale, barriers, True, CAPPED, XAI, PAGE_SIZE
                )),
                (_producer_8bit, (
                    kv, lens, token_ids, B, kv_stride, table_stride, page_stride, even_low, even_high, even_rope,
                    odd_low, odd_high, odd_rope, barriers, PAGE_SIZE, E5M2
                )),
            ],
            [4, 4],
            [208, 88],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer_even, (
                    q, rope_of_q, out, lse, lens, sinks, partial, B, H, scale, v_scale, logit_cap, xai_len, q_stride_b,
                    q_stride_h, rope_stride_b, rope_stride_h, out_stride_b, out_stride_h, lse_stride_b, lse_stride_h,
                    table_stride, q_low, q_high, q_rope, even_low, even_high, even_rope, odd_low, odd_rope, top_even,
                    top_odd, sum_even, sum_odd, q_scale, barriers, False, CAPPED, XAI, PAGE_SIZE
                )),
                (_consumer_odd, (
                    q, rope_of_q, out, lse, lens, sinks, partial, B, H, scale, v_scale, logit_cap, xai_len, q_stride_b,
                    q_stride_h, rope_stride_b, rope_stride_h, out_stride_b, out_stride_h, lse_stride_b, lse_stride_h,
                    table_stride, q_low, q_high, q_rope, odd_low, odd_high, odd_rope, even_high, even_rope, top_even,
                    top_odd, sum_even, sum_odd, q_scale, barriers, False, CAPPED, XAI, PAGE_SIZE
                )),
                (_producer_16bit, (
                    kv, lens, token_ids, B, kv_stride, table_stride, page_stride, even_low, even_high, even_rope,
                    odd_low, odd_high, odd_rope, barriers, PAGE_SIZE
                )),
            ],
            [4, 4],
            [216, 72],
        )  # fmt: skip


watch_compiles(decode_sm90)


def compile_cases(every: bool = False) -> list[CompileCase]:
    """Both kinds of cache, all options off and all on, or, for ``every``, the product."""
    product = list(itertools.product((False, True), repeat=4))
    switches = product if every else [product[0], product[-1]]
    cases = []
    for eight, (capped, xai, sinks, paged) in itertools.product((False, True), switches):
        index = "*i64" if sinks else "*i32"
        pointers = {"q": "*bf16", "kv": "*i32" if eight else "*bf16", "out": "*fp32" if sinks else "*bf16"}
        pointers |= {"rope_of_q": "*bf16", "lens": index, "token_ids": index, "partial": "*fp16" if eight else "*fp32"}
        pointers |= {"sinks": "*fp32"} if sinks else {}
        strides = (
            "q_stride_b",
            "q_stride_h",
            "rope_stride_b",
            "rope_stride_h",
            "kv_stride",
            "out_stride_b",
            "out_stride_h",
        )
        scalars = dict.fromkeys(("B", "H", "xai_len", *strides), "i32")
        scalars |= dict.fromkeys(("sm_scale", "v_scale", "logit_cap"), "fp32")
        options: dict[str, Any] = {"CAPPED": capped, "XAI": xai, "E5M2": eight and capped, "KEY": sm90.KEY}
        if sinks:  # with all else that a call may bring
            pointers |= {"lse": "*fp32", "k_scale_at": "*fp32", "v_scale_at": "*fp32"}
            scalars |= {"lse_stride_b": "i32", "lse_stride_h": "i32"}
        else:
            options |= dict.fromkeys(("lse", "k_scale_at", "v_scale_at", "lse_stride_b", "lse_stride_h"))
        options["PAGE_SIZE"] = 64 if paged else 0
        if paged:
            scalars |= {"table_stride": "i32", "page_stride": "i32"}
        else:
            options |= {"table_stride": None, "page_stride": None}
        if not sinks:
            options["sinks"] = None
        cases.append(
            CompileCase(
                f"decode_sm90 {'8' if eight else '16'} bits, {capped} {xai} {sinks} {paged}",
                decode_sm90,
                pointers | scalars,
                options,
                ("kv", "partial", "H", *strides, *(("page_stride",) if paged else ())),
                targets=(90,),
                # numbers of the piece and the request, kept while keys are read: 104 with Triton 3.6, 240 with 3.9
                stack=240,
            )
        )
    return cases
