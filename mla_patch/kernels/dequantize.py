"""Read tokens of an fp8 latent cache back: `mla_patch.kernels.layouts` says how they are stored.

    slots  [n]                int32 or int64, any order, repeats allowed; a slot outside the cache gives zeros
    out    [n, 576 or 512]    bfloat16: float32(e4m3) * scale, rounded once; rope copied bit by bit

Bit for bit what SGLang's own kernels read. The values are decoded by integer arithmetic, on every chip alike.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mla_patch.compat import gpu
from mla_patch.compat.triton import CompileCase, interpreted, watch_compiles
from mla_patch.kernels.layouts import V4, V32, Pages, pages_of

_INTERPRETED = interpreted()


@triton.jit
def e4m3_value(byte):
    """e4m3 codes in an integer's low byte -> float32, exact; NaN stays NaN."""
    magnitude = byte & 0x7F
    half = (((byte & 0x80) << 8) | (magnitude << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where(magnitude == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def ue8m0_value(byte):
    """2**(byte - 127), as the host reads it: 0 is 0 and 255 infinity."""
    return (byte.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_bf16(x):
    """float32 -> the bits of the nearest bfloat16, ties to even; by integers, since interpreters round otherwise."""
    bits = x.to(tl.int32, bitcast=True)
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, up).to(tl.int16)


@triton.jit(do_not_specialize=["slots_end"], do_not_specialize_on_alignment=["out", "slots"])
def _dequantize_kernel(
    out, slots, values, rope, scales, slots_end, page_chunks, out_stride, PAGE: tl.constexpr, V4: tl.constexpr
):
    """One token. ``out``, ``rope`` are int16 bits of bfloat16, ``values`` bytes; ``page_chunks`` counts 16 bytes."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    known = (slot >= 0) & (slot < slots_end)
    slot = tl.where(known, slot, 0)
    page = slot // PAGE * page_chunks * 16
    at = slot % PAGE
    NOPE: tl.constexpr = 448 if V4 else 512
    d = tl.arange(0, 512)
    mask = d < tl.where(known, NOPE, 0)
    if V4:
        row = page + at * 576
        scale = ue8m0_value(tl.load(scales + page + PAGE * 576 + at * 8 + d // 64, mask=mask, other=0))
    else:
        row = page + at * 656
        scale = tl.load(scales + (row + 512) // 4 + d // 128, mask=mask, other=0.0)
    value = e4m3_value(tl.load(values + row + d, mask=mask, other=0).to(tl.int32)) * scale
    to = out + token * out_stride
    tl.store(to + d, round_bf16(value), mask=d < NOPE)
    r = tl.arange(0, 64)
    SKIP: tl.constexpr = 448 if V4 else 528
    tl.store(to + NOPE + r, tl.load(rope + (row + SKIP) // 2 + r, mask=r < tl.where(known, 64, 0), other=0))


def dequantize(cache: torch.Tensor, slots: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tokens in ``slots`` as bfloat16; see the module. One launch, none where there is no slot.

    Raises:
        ValueError: a cache of no known layout, slots or out of another shape or type.
    """
    pages = pages_of("cache", cache)
    if slots.dim() != 1 or slots.dtype not in (torch.int32, torch.int64) or not slots.is_contiguous():
        raise ValueError(f"slots: {slots.dtype}, shape {tuple(slots.shape)}, expected int32 or int64, [n], contiguous")
    shape = (slots.numel(), pages.layout.width)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=cache.device)
    if out.shape != shape or out.dtype != torch.bfloat16 or out.stride(1) != 1:
        raise ValueError(f"out: {out.dtype}, shape {tuple(out.shape)}, expected bfloat16, {shape}, last contiguous")
    for name, tensor in (("slots", slots), ("out", out)):
        if tensor.device != cache.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {cache.device} as cache")
    if gpu.elsewhere(cache):
        with torch.cuda.device(cache.device):
            return dequantize(cache, slots, out)
    if pages.slots == 0:
        return out.zero_()
    if slots.numel():
        _dequantize_kernel[(slots.numel(),)](
            out.view(torch.int16), slots, pages.pairs.view(torch.uint8), pages.rope.view(torch.int16), pages.scales,
            pages.slots, pages.page_bytes // 16, out.stride(0),
            PAGE=pages.page_size, V4=pages.layout is V4, num_warps=4,
        )  # fmt: skip
    return out


def dequantize_ref(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The definition in float64, before the rounding: [n, 576 or 512]. Slots must be in the cache."""
    pages = pages_of("cache", cache)
    values, scales, rope = gather(pages, slots.long())
    tiles = values.double().view(-1, pages.layout.tiles, pages.layout.tile)
    return torch.cat([(tiles * scales.double()[..., None]).flatten(1), rope.double()], 1)


def gather(pages: Pages, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is stored of some tokens: e4m3 values, scales as float32, rope."""
    flat = pages.pairs.view(torch.uint8)
    raw = flat.as_strided((pages.pages, pages.page_size * pages.layout.bytes), (pages.page_bytes, 1))
    page, at = slots // pages.page_size, slots % pages.page_size

    def bytes_at(first: torch.Tensor, count: int) -> torch.Tensor:
        return raw[page[:, None], first[:, None] + torch.arange(count, device=slots.device)]

    if pages.layout is V32:
        values, scales, rope = bytes_at(at * 656, 512), bytes_at(at * 656 + 512, 16), bytes_at(at * 656 + 528, 128)
        scale = scales.view(torch.float32)
    else:
        values, rope = bytes_at(at * 576, 448), bytes_at(at * 576 + 448, 128)
        scale = (bytes_at(pages.page_size * 576 + at * 8, 7).int() << 23).view(torch.float32)
    return values.view(torch.float8_e4m3fn), scale, rope.view(torch.bfloat16)


def compile_cases(every: bool = False) -> list[CompileCase]:
    """Both layouts; page sizes differ by a constant alone."""
    cases = []
    for v4 in (False, True):
        signature = {"out": "*i16", "slots": "*i64" if v4 else "*i32", "values": "*u8", "rope": "*i16"}
        signature |= {"scales": "*u8" if v4 else "*fp32", "slots_end": "i64" if v4 else "i32"}
        signature |= {"page_chunks": "i32", "out_stride": "i32"}
        divisible = ("values", "rope", "scales", "out_stride")
        name = f"dequantize {'V4' if v4 else 'V3.2'}"
        cases.append(CompileCase(name, _dequantize_kernel, signature, {"PAGE": 64, "V4": v4}, divisible))
    return cases


watch_compiles(_dequantize_kernel)
