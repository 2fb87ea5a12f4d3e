"""Store tokens in an fp8 latent cache: `mla_patch.kernels.cache.layouts` says how.

    x      [n, 576 or 512]    bfloat16, float16 or float32: the nope values, then 64 rotary values
    slots  [n]                int32 or int64; a token with a slot outside the cache, such as -1, is not stored

    V3.2    s = max|x| / 448 of 128 values, y = x / s, rounded to the nearest e4m3, ties to even. A tile of zeros is
            stored as zeros. SGLang's kernel stores 448 times a scale of 0, which reads the same. A tile with an
            infinity reads as NaN, as with SGLang.
    V4      s = the power of two at or above max(max|x|, least) / 448 of 64 values. ``least`` is 1e-8 in SGLang's Triton
            writer and 1e-4 in its CUDA writer. It matters only in tiles without a value above 5.3e-5. An infinity is
            stored as 448 times 2**120, the scale of float32's largest number, and reads as an infinity of its sign.

Rounding is integer arithmetic, so that chips without e4m3 and Triton's interpreter write the same bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mla_patch.compat.triton import CompileCase, watch_compiles
from mla_patch.kernels.cache import offsets
from mla_patch.kernels.cache.layouts import V4, V32, pages_of
from mla_patch.kernels.common.checks import FLOAT_TYPES, check_device, describe
from mla_patch.kernels.common.launch import on_device_of
from mla_patch.kernels.common.rounding import round_bf16


@triton.jit
def e4m3_bits(y):
    """float32 -> the byte of the nearest e4m3, ties to even; beyond 448 it is 448, and NaN stays NaN."""
    bits = y.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(y), 448.0)
    large = magnitude.to(tl.int32, bitcast=True)
    normal = ((large + 0x7FFFF + ((large >> 20) & 1)) >> 20) - (120 << 3)
    # below 2**-6 codes are multiples of 2**-9, to which a float32 of 2**14 rounds what is added
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0.015625, small, normal)
    return (tl.where(y != y, 0x7F, code) | sign).to(tl.uint8)


@triton.jit(do_not_specialize=["least", "slots_end"], do_not_specialize_on_alignment=["x", "slots"])
def _quantize_kernel(
    x, slots, values, rope, scales, least, slots_end, page_chunks, x_stride, PAGE: tl.constexpr, V4: tl.constexpr
):
    """One token. ``values`` are bytes, ``rope`` is int16 bits of bfloat16, and ``page_chunks`` counts 16 bytes."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if (slot >= 0) & (slot < slots_end):
        page = slot // PAGE * page_chunks * 16
        at = slot % PAGE
        if V4:
            row = page + at * offsets.V4_TOKEN
        else:
            row = page + at * offsets.V32_TOKEN
        source = x + token * x_stride
        TILES: tl.constexpr = 8 if V4 else 4
        TILE: tl.constexpr = 64 if V4 else 128
        t = tl.arange(0, TILES)
        d = t[:, None] * TILE + tl.arange(0, TILE)[None, :]
        NOPE: tl.constexpr = 448 if V4 else 512
        value = tl.load(source + d, mask=d < NOPE, other=0.0).to(tl.float32)
        largest = tl.max(tl.abs(value), 1)
        if V4:
            # the power of an infinity would be infinity, and the other values of its tile would become 0
            largest = tl.minimum(tl.maximum(largest, least), 3.4028234663852886e38)
            ratio = tl.div_rn(largest, 448.0).to(tl.int32, bitcast=True)
            power = (ratio >> 23) + ((ratio & 0x7FFFFF) != 0).to(tl.int32)
            codes = scales + page + PAGE * offsets.V4_TOKEN + at * offsets.V4_SCALES
            tl.store(codes + t, power.to(tl.uint8), mask=t < 7)
            factor = ((254 - power) << 23).to(tl.float32, bitcast=True)
        else:
            scale = tl.div_rn(largest, tl.full([TILES], 448.0, tl.float32))
            tl.store(scales + (row + offsets.V32_SCALES) // 4 + t, scale)
            # 1 / s of a subnormal s may overflow: a power of two on both sides changes nothing else
            boost = tl.where(scale < 1.1754943508222875e-38, 18446744073709551616.0, 1.0)
            one = tl.full([TILES], 1.0, tl.float32)
            factor = tl.where(scale > 0, tl.div_rn(one, tl.where(scale > 0, scale * boost, 1.0)), 0.0)
            value = value * boost[:, None]
        tl.store(values + row + d, e4m3_bits(value * factor[:, None]), mask=d < NOPE)
        r = tl.arange(0, 64)
        bits = round_bf16(tl.load(source + NOPE + r).to(tl.float32))
        if V4:
            tl.store(rope + (row + offsets.V4_ROPE) // 2 + r, bits)
        else:
            tl.store(rope + (row + offsets.V32_ROPE) // 2 + r, bits)


def quantize(x: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, least: float = 1e-8) -> torch.Tensor:
    """Store ``x`` in ``slots`` of ``cache``, and return the cache; see the module.

    It makes one launch, or none if there are no tokens.

    Raises:
        ValueError: the cache has no known layout, x or slots have another shape, type or device, or least is not
            between 1e-30 and 1.
    """
    pages = pages_of("cache", cache)
    width = pages.layout.width
    if x.dim() != 2 or x.shape[1] != width or x.stride(1) != 1 or x.dtype not in FLOAT_TYPES:
        found = f"{x.dtype}, shape {tuple(x.shape)}, strides {x.stride()}"
        raise ValueError(f"x: {found}, expected bfloat16, float16 or float32, [n, {width}], the last contiguous")
    if slots.shape != x.shape[:1] or slots.dtype not in (torch.int32, torch.int64) or not slots.is_contiguous():
        raise ValueError(f"slots: {describe(slots)}, expected int32 or int64, [{x.shape[0]}], contiguous")
    if not 1e-30 <= least <= 1.0:
        raise ValueError(f"least: {least}, expected 1e-30 to 1")
    check_device("x", x, cache, "cache")
    check_device("slots", slots, cache, "cache")
    if x.shape[0] and pages.slots:
        with on_device_of(cache):
            _quantize_kernel[(x.shape[0],)](
                x, slots, pages.pairs.view(torch.uint8), pages.rope.view(torch.int16), pages.scales, least,
                pages.slots, pages.page_bytes // 16, x.stride(0), PAGE=pages.page_size, V4=pages.layout is V4,
                num_warps=4,
            )  # fmt: skip
    return cache


def quantize_ref(x: torch.Tensor, layout_tiles: int, least: float = 1e-8) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in torch's own types: e4m3 values [n, tiles, tile], and scales (bytes where powers of two)."""
    tiles = x[:, :-64].float().unflatten(1, (layout_tiles, -1))
    largest = tiles.abs().amax(-1)
    if layout_tiles == V32.tiles:
        stored = largest / 448
        boost = torch.where(stored < 2**-126, 2.0**64, 1.0)
        factor = torch.where(stored > 0, 1 / (stored * boost), 0.0)
        tiles = tiles * boost[..., None]
    else:
        most = torch.finfo(torch.float32).max
        power = torch.ceil(torch.log2(largest.clamp(least, most).double() / 448))
        factor, stored = torch.exp2(-power).float(), (power + 127).to(torch.uint8)
    return (tiles * factor[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn), stored


def compile_cases(every: bool = False) -> list[CompileCase]:
    """Both layouts; page sizes differ by a constant alone."""
    cases = []
    for v4 in (False, True):
        signature = {"x": "*bf16" if v4 else "*fp32", "slots": "*i64" if v4 else "*i32", "values": "*u8"}
        signature |= {"rope": "*i16", "scales": "*u8" if v4 else "*fp32", "least": "fp32"}
        signature |= {"slots_end": "i64" if v4 else "i32", "page_chunks": "i32", "x_stride": "i32"}
        divisible = ("values", "rope", "scales", "x_stride")
        name = f"quantize {'V4' if v4 else 'V3.2'}"
        cases.append(CompileCase(name, _quantize_kernel, signature, {"PAGE": 64, "V4": v4}, divisible))
    return cases


watch_compiles(_quantize_kernel)
