"""The warp-specialised two-consumer pipeline of the MLA kernels on sm_90, in Gluon: 64 heads, two tiles of 64 keys at
a time, three groups of four warps.

    consumer_even    scores of the even tile;  columns 0 to 255 of the output
    consumer_odd     scores of the odd tile;   columns 256 to 511 of the output
    producer         brings both tiles into shared memory; the kernels have it, since each has other keys

Each consumer multiplies its own probabilities from registers and the other's from shared memory. So every key's latent
values are read from the cache once for 64 heads, and the softmax of one consumer runs while the other keeps the tensor
cores busy. A row maximum that both agree on goes with the probabilities.

Shared memory, 216 KiB of 16-bit values, in tiles that the tensor cores read as they are:

    q_low, q_high         64 heads x 256    the query's latent values: columns 0 to 255, and 256 to 511
    q_rope                64 heads x 64     its rotary values
    even_low, even_high   64 keys x 256     the even tile's latent values; odd_low, odd_high likewise
    even_rope             64 keys x 64      the even tile's rotary values, and later its probabilities (heads x keys);
                                            odd_rope likewise

There are also vectors of 64: top_even and top_odd (row maxima), sum_even and sum_odd (sums of weights) and, in the
sparse kernel, seen_even and seen_odd, which tell the consumers as ``known`` which keys count. There is no room for a
third tile. Therefore a tile is brought in two halves, each as soon as the consumer that reads it last has let go of it.

Registers of a consumer, per warp group: the score tile ``s`` (64 x 64 float32), its probabilities (64 x 64), and
``acc`` (64 x 256 float32), its columns of the output.

One unit of work is one even and one odd tile. In this order the consumers go through a unit:

    even    scores | softmax, with the maximum of the last odd tile | publishes even probabilities | acc += even_low
    odd     waits for the even probabilities | acc += even_high | scores | softmax, with the maximum of the even tile |
            publishes odd probabilities | acc += odd_high
    even    next unit's scores; meanwhile acc += odd_low

`layouts` numbers the barriers. FULL_* and FREE_* pass between producer and consumers, WEIGHTS_* between the consumers,
and Q_FREE, Q_FULL and SUMS separate one query from the next. A wait takes the parity of how often the barrier has
completed before.

This follows FlashMLA's "seesaw" schedule (https://github.com/deepseek-ai/FlashMLA,
docs/20250422-new-kernel-deep-dive.md).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mla_patch.compat.triton import gluon_barrier, gluon_copy, gluon_reinterpret
from mla_patch.kernels.sm90 import layouts as sm90


@gluon.jit
def signal(barriers, WHICH: gl.constexpr):
    """Arrive at a barrier once all warps of this group have come here."""
    gluon_barrier()  # one thread arrives for all
    mbarrier.arrive(barriers.index(WHICH), count=1)


@gluon.jit
def _load_q(
    source, source_rope, tile, H, q_stride_h, rope_stride_h, q_low, q_high, q_rope, q_scale, HALF: gl.constexpr,
    ROPE: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Half of a tile of heads' queries into shared memory: 32 heads. SCALED: as float16, divided by ``q_scale``, a
    power of two for each head, which is stored, too."""
    to: gl.constexpr = q_low.dtype
    AT: gl.constexpr = HALF * 32
    h = tile * 64 + AT + gl.arange(0, 32, layout=gl.SliceLayout(1, sm90.ROWS))
    c = gl.arange(0, 256, layout=gl.SliceLayout(0, sm90.ROWS))
    r = gl.arange(0, 64, layout=gl.SliceLayout(0, sm90.ROWS))
    # launchers see to it; a pointer's own alignment, or a stride's, would make a kernel of its own each
    source = gl.multiple_of(source + h[:, None].to(gl.int64) * q_stride_h, [16, 16])
    mask = (h < H)[:, None]
    low = gl.load(source + c[None, :], mask=mask, other=0.0)
    high = gl.load(source + 256 + c[None, :], mask=mask, other=0.0)
    if ROPE:
        source_rope = gl.multiple_of(source_rope + h[:, None].to(gl.int64) * rope_stride_h, [16, 16])
        rope = gl.load(source_rope + r[None, :], mask=mask, other=0.0)
    if SCALED:
        top = gl.maximum(gl.max(gl.abs(low.to(gl.float32)), 1), gl.max(gl.abs(high.to(gl.float32)), 1))
        top = gl.maximum(top, gl.max(gl.abs(rope.to(gl.float32)), 1))
        u = (top.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
        u = gl.where(u > 0, u, 1.0)
        q_scale.slice(AT, 32, 0).store(u)
        q_low.index(0).slice(AT, 32, 0).store((low.to(gl.float32) / u[:, None]).to(to))
        q_high.index(0).slice(AT, 32, 0).store((high.to(gl.float32) / u[:, None]).to(to))
        q_rope.index(0).slice(AT, 32, 0).store((rope.to(gl.float32) / u[:, None]).to(to))
    else:
        q_low.index(0).slice(AT, 32, 0).store(low.to(to))
        q_high.index(0).slice(AT, 32, 0).store(high.to(to))
        if ROPE:
            q_rope.index(0).slice(AT, 32, 0).store(rope.to(to))
    fence_async_shared()


@gluon.jit
def _score_scales(scale, q_scale, SCALED: gl.constexpr):
    """What a raw score of each head is multiplied by."""
    if SCALED:
        u = q_scale.load(sm90.HEAD) * scale
    else:
        u = gl.full([64], scale, gl.float32, layout=sm90.HEAD)
    return u


@gluon.jit
def begin_query(
    source, source_rope, tile, H, q_stride_h, rope_stride_h, q_low, q_high, q_rope, scale, q_scale, barriers, asked,
    HALF: gl.constexpr, ROPE: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Bring this consumer's half of the heads' queries, once both are done with the last ones -> `_score_scales`.

    ``asked`` counts the queries before this one.
    """
    mbarrier.wait(barriers.index(sm90.Q_FREE), (asked & 1) ^ 1)
    _load_q(
        source, source_rope, tile, H, q_stride_h, rope_stride_h, q_low, q_high, q_rope, q_scale, HALF, ROPE, SCALED
    )  # fmt: skip
    signal(barriers, sm90.Q_FULL)
    mbarrier.wait(barriers.index(sm90.Q_FULL), asked & 1)
    return _score_scales(scale, q_scale, SCALED)


@gluon.jit
def end_query(weights, own, other, barriers, asked):
    """Both consumers' sums of weights. After it both are done with the query; who wants another signals Q_FREE."""
    own.store(weights)
    signal(barriers, sm90.SUMS)
    mbarrier.wait(barriers.index(sm90.SUMS), asked & 1)
    return weights + other.load(sm90.HEAD)


@gluon.jit
def store_tile(x, to, stride, tile, H, stage, HALF: gl.constexpr):
    """A consumer's half of the columns of a tile of heads into global memory, where head 0 begins at ``to``.

    Values of 16 bits go through ``stage``, where that is given: shared memory that nobody reads any more. As the tensor
    cores leave them in registers, they would be stored in half sectors, which the second-level cache has to fill first.
    """
    STAGED: gl.constexpr = stage is not None and x.dtype.primitive_bitwidth == 16
    L: gl.constexpr = sm90.ROWS if STAGED else sm90.OUTPUT
    if STAGED:
        TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        place = gluon_reinterpret(stage.index(0), x.dtype, [64, 256], TILE)
        place.store(x)
        gluon_barrier()
        x = place.load(L)
    h = tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    c = HALF * 256 + gl.arange(0, 256, layout=gl.SliceLayout(0, L))
    row = gl.multiple_of(to + h[:, None].to(gl.int64) * stride, [16, 16])
    gl.store(row + c[None, :], x, mask=(h < H)[:, None])


@gluon.jit
def _dot_keys(
    q_one, q_two, q_rope, one, two, rope, z, barriers, phase, FULL_ONE: gl.constexpr, FULL_TWO: gl.constexpr,
    ROPE: gl.constexpr, COPIED: gl.constexpr,
):  # fmt: skip
    """Start the score tile, 64 heads x 64 keys: over the half that comes first, then over the other and the rope.

    The result is in flight until `warpgroup_mma_wait`. COPIED: the producer copies 16-bit rows asynchronously, and does
    not convert them. ``z`` is 0; see `consumer_even`.
    """
    s = gl.zeros([64, 64], gl.float32, layout=sm90.SCORES)
    mbarrier.wait(barriers.index(FULL_ONE), phase)
    if COPIED:
        fence_async_shared()  # copies are seen by the tensor cores; who converts has done it already
    s = warpgroup_mma(q_one.index(z), one.index(z).permute([1, 0]), s, use_acc=False, is_async=True)
    mbarrier.wait(barriers.index(FULL_TWO), phase)
    if COPIED:
        fence_async_shared()
    s = warpgroup_mma(q_two.index(z), two.index(z).permute([1, 0]), s, is_async=True)
    if ROPE:
        s = warpgroup_mma(q_rope.index(z), rope.index(z).permute([1, 0]), s, is_async=True)
    return s


@gluon.jit
def _softmax(s, u, m, key, length, known, logit_cap, temperature, CAPPED: gl.constexpr, XAI: gl.constexpr):
    """Raw scores of the keys from ``key`` on -> (running maximum of each head, weights relative to it).

    ``known`` says which keys count, or, where it is not given, ``length`` says how many do. CAPPED: the logit cap's
    tanh, computed by exp2. XAI: a temperature that depends on the length.
    """
    if CAPPED:
        s = s * u[:, None]
        t = gl.exp2(gl.abs(s / logit_cap) * -2.8853900817779268)
        s = gl.where(s < 0, -1.4426950408889634, 1.4426950408889634) * logit_cap * (1.0 - t) / (1.0 + t)
        u = gl.full([64], 1.0, gl.float32, layout=sm90.HEAD)
    if XAI:
        u = u * temperature
    if known is not None:
        s = gl.where((known.load(gl.SliceLayout(0, sm90.SCORES)) != 0)[None, :], s, -float("inf"))
    elif key + 64 > length:
        n = gl.arange(0, 64, layout=gl.SliceLayout(0, sm90.SCORES))
        s = gl.where((key + n < length)[None, :], s, -float("inf"))
    top = gl.maximum(m, gl.max(s, 1) * u)
    return top, gl.exp2(s * u[:, None] - top[:, None])


@gluon.jit
def consumer_even(
    q_low, q_high, q_rope, low, high, rope, odd_low, odd_rope, top_even, top_odd, known, barriers, turn, count, u, key,
    length, logit_cap, temperature, EMPTY_MAX: gl.constexpr, ROPE: gl.constexpr, COPIED: gl.constexpr,
    CAPPED: gl.constexpr, XAI: gl.constexpr,
):  # fmt: skip
    """One query's ``count`` units, at least one -> (low columns of the output, this consumer's sums of weights, row
    maxima, the turn after).

    ``turn`` counts the units before, and its lowest bit is the parity of the barriers. ``EMPTY_MAX`` is the maximum of
    no keys: finite where a whole tile may have none. The odd tile meets the low columns one unit later, while this
    consumer's next scores are on their way; that is why the loop begins with the second unit.
    """
    to: gl.constexpr = q_low.dtype
    acc = gl.zeros([64, 256], gl.float32, layout=sm90.OUTPUT)
    m = gl.full([64], EMPTY_MAX, gl.float32, layout=sm90.HEAD)
    # 0, which the compiler cannot know: otherwise it keeps the descriptors of 72 operands in registers
    z = turn >> 30
    s = _dot_keys(
        q_low, q_high, q_rope, low, high, rope, z, barriers, turn & 1, sm90.FULL_EVEN_LOW, sm90.FULL_EVEN_HIGH, ROPE,
        COPIED,
    )  # fmt: skip
    s = warpgroup_mma_wait(0, deps=[s])
    top, p = _softmax(s, u, m, key, length, known, logit_cap, temperature, CAPPED, XAI)
    weights = gl.sum(p, 1)
    own = p.to(to)
    gluon_barrier()  # the rope has been read by all
    rope.index(0).store(own)
    top_even.store(top)
    fence_async_shared()
    signal(barriers, sm90.WEIGHTS_EVEN)
    acc = warpgroup_mma(gl.convert_layout(own, sm90.WEIGHTS), low.index(z), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    signal(barriers, sm90.FREE_EVEN_LOW)
    for i in range(1, count):
        before = turn & 1
        turn += 1
        z = turn >> 30
        s = _dot_keys(
            q_low, q_high, q_rope, low, high, rope, z, barriers, turn & 1, sm90.FULL_EVEN_LOW, sm90.FULL_EVEN_HIGH,
            ROPE, COPIED,
        )  # fmt: skip
        mbarrier.wait(barriers.index(sm90.WEIGHTS_ODD), before)
        m = top_odd.load(sm90.HEAD)
        keep = gl.exp2(top - m)
        weights = weights * keep
        acc = acc * gl.convert_layout(keep, sm90.OUTPUT_HEAD)[:, None]
        acc = warpgroup_mma(odd_rope.index(z), odd_low.index(z), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        top, p = _softmax(s, u, m, key + i * sm90.KEYS_PER_UNIT, length, known, logit_cap, temperature, CAPPED, XAI)
        acc = warpgroup_mma_wait(0, deps=[acc])
        signal(barriers, sm90.FREE_ODD_LOW)  # and every warp has read the rope
        own = p.to(to)
        rope.index(0).store(own)
        top_even.store(top)
        fence_async_shared()
        signal(barriers, sm90.WEIGHTS_EVEN)
        keep = gl.exp2(m - top)
        weights = weights * keep + gl.sum(p, 1)
        acc = acc * gl.convert_layout(keep, sm90.OUTPUT_HEAD)[:, None]
        acc = warpgroup_mma(gl.convert_layout(own, sm90.WEIGHTS), low.index(z), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        signal(barriers, sm90.FREE_EVEN_LOW)
    mbarrier.wait(barriers.index(sm90.WEIGHTS_ODD), turn & 1)
    m = top_odd.load(sm90.HEAD)
    keep = gl.exp2(top - m)
    acc = acc * gl.convert_layout(keep, sm90.OUTPUT_HEAD)[:, None]
    z = turn >> 30
    acc = warpgroup_mma(odd_rope.index(z), odd_low.index(z), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    signal(barriers, sm90.FREE_ODD_LOW)
    turn += 1
    return acc, weights * keep, m, turn


@gluon.jit
def consumer_odd(
    q_low, q_high, q_rope, low, high, rope, even_high, even_rope, top_even, top_odd, known, barriers, turn, count, u,
    key, length, logit_cap, temperature, EMPTY_MAX: gl.constexpr, ROPE: gl.constexpr, COPIED: gl.constexpr,
    CAPPED: gl.constexpr, XAI: gl.constexpr,
):  # fmt: skip
    """The odd tiles and the high columns of the output; arguments and results as `consumer_even` has them.

    The even tile meets the high columns first, so that its place is free early.
    """
    to: gl.constexpr = q_low.dtype
    m = gl.full([64], EMPTY_MAX, gl.float32, layout=sm90.HEAD)
    weights = gl.zeros([64], gl.float32, layout=sm90.HEAD)
    acc = gl.zeros([64, 256], gl.float32, layout=sm90.OUTPUT)
    for i in range(count):
        phase = turn & 1
        z = turn >> 30  # see `consumer_even`
        mbarrier.wait(barriers.index(sm90.FULL_EVEN_HIGH), phase)
        mbarrier.wait(barriers.index(sm90.WEIGHTS_EVEN), phase)
        if COPIED:
            fence_async_shared()
        top = top_even.load(sm90.HEAD)
        keep = gl.exp2(m - top)
        weights = weights * keep
        acc = acc * gl.convert_layout(keep, sm90.OUTPUT_HEAD)[:, None]
        acc = warpgroup_mma(even_rope.index(z), even_high.index(z), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        signal(barriers, sm90.FREE_EVEN_HIGH)
        s = _dot_keys(
            q_high, q_low, q_rope, high, low, rope, z, barriers, phase, sm90.FULL_ODD_HIGH, sm90.FULL_ODD_LOW, ROPE,
            COPIED,
        )  # fmt: skip
        s = warpgroup_mma_wait(0, deps=[s])
        m, p = _softmax(s, u, top, key + i * sm90.KEYS_PER_UNIT, length, known, logit_cap, temperature, CAPPED, XAI)
        own = p.to(to)
        gluon_barrier()  # the rope has been read by all
        rope.index(0).store(own)
        top_odd.store(m)
        fence_async_shared()
        signal(barriers, sm90.WEIGHTS_ODD)
        keep = gl.exp2(top - m)
        weights = weights * keep + gl.sum(p, 1)
        acc = acc * gl.convert_layout(keep, sm90.OUTPUT_HEAD)[:, None]
        acc = warpgroup_mma(gl.convert_layout(own, sm90.WEIGHTS), high.index(z), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        signal(barriers, sm90.FREE_ODD_HIGH)
        turn += 1
    return acc, weights, m, turn


@gluon.jit
def load_tile_async(
    row, c, r, known, seen, one, AT_ONE: gl.constexpr, two, AT_TWO: gl.constexpr, rope, barriers, free,
    FREE_ONE: gl.constexpr, FULL_ONE: gl.constexpr, FREE_TWO: gl.constexpr, FULL_TWO: gl.constexpr, ROPE: gl.constexpr,
):  # fmt: skip
    """Start to copy a tile of 16-bit rows: the half that is free first, then the other and the rope.

    ``free`` is the parity of the FREE barriers, and AT_* say at which column a half begins. The copies themselves
    arrive at the FULL barriers. Rows that are not ``known``, where that is given, become zeros, and ``seen`` says so.
    """
    mbarrier.wait(barriers.index(FREE_ONE), free)
    if known is None:
        gluon_copy(one.index(0), row + AT_ONE + c)
    else:
        seen.store(known.to(gl.int32))
        gluon_copy(one.index(0), row + AT_ONE + c, mask=known[:, None])
        signal(barriers, FULL_ONE)
    async_copy.mbarrier_arrive(barriers.index(FULL_ONE), increment_count=False)
    mbarrier.wait(barriers.index(FREE_TWO), free)
    if known is None:
        gluon_copy(two.index(0), row + AT_TWO + c)
        gluon_copy(rope.index(0), row + 512 + r)
    else:
        gluon_copy(two.index(0), row + AT_TWO + c, mask=known[:, None])
        if ROPE:
            gluon_copy(rope.index(0), row + 512 + r, mask=known[:, None])
    async_copy.mbarrier_arrive(barriers.index(FULL_TWO), increment_count=False)
