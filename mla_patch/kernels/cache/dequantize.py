"""Read tokens of an fp8 latent cache back: `mla_patch.kernels.cache.layouts` says how they are stored.

    slots  [n]                int32 or int64; any order, repeats allowed; a slot outside the cache gives zeros
    out    [n, 576 or 512]    bfloat16: float32(e4m3) * scale, rounded once; rotary values are copied bit by bit

The results equal those of SGLang's kernels bit for bit. From sm_89 on, the chip's own conversion decodes the values;
before, integer arithmetic does.
"""

from __future__ import annotations

import itertools
import math

import torch
import triton
import triton.language as tl

from mla_patch.compat.triton import TARGETS, CompileCase, watch_compiles
from mla_patch.kernels.cache import offsets
from mla_patch.kernels.cache.layouts import LAYOUTS, V4, V32, Pages, new_pages, pages_of
from mla_patch.kernels.common.checks import check_device, describe
from mla_patch.kernels.common.constants import ROPE
from mla_patch.kernels.common.e4m3 import e4m3_to_f32, scale_e4m3_to_bf16
from mla_patch.kernels.common.launch import INTERPRETED, can_launch, chip_of, on_device_of, warming_up
from mla_patch.kernels.common.rounding import round_bf16

_PLAIN = tl.constexpr(INTERPRETED)  # the interpreter knows no assembler


def dequantize_config() -> dict[str, int]:
    """Launch numbers: 32 values a thread, loaded and stored 16 bytes at a time, through shared memory in between."""
    return {"TOKENS": 4, "num_warps": 2}


@triton.jit
def ue8m0_value(byte):
    """2**(byte - 127), as the engine reads it: 0 is 0, and 255 is infinity."""
    return (byte.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit(
    do_not_specialize=["tokens", "slots_end"], do_not_specialize_on_alignment=["slots"]
)  # out's address decides how wide it is written
def _dequantize_kernel(
    out,
    slots,
    values,
    rope,
    scales,
    tokens,
    slots_end,
    page_chunks,
    out_stride,
    PAGE: tl.constexpr,
    V4: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """TOKENS of ``tokens`` rows. ``out`` and ``rope`` are int16 bits of bfloat16, ``values`` are bytes, and
    ``page_chunks`` is from one page to the next in units of 16 bytes.

    A slot outside the cache, which ends at ``slots_end``, gives zeros.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    wanted = token < tokens
    slot = tl.load(slots + token, mask=wanted, other=-1).to(tl.int64)
    is_slot = (slot >= 0) & (slot < slots_end)
    slot = tl.where(is_slot, slot, 0)
    page = slot // PAGE * page_chunks * 16
    token_in_page = slot % PAGE
    # V4 has seven tiles, and an eighth that is none
    TILES: tl.constexpr = 8 if V4 else 4
    TILE: tl.constexpr = 512 // TILES
    t = tl.arange(0, TILES)
    d = (t[:, None] * TILE + tl.arange(0, TILE)[None, :])[None, :, :]
    if V4:
        row = page + token_in_page * offsets.V4_TOKEN
        is_tile = (t < 7)[None, :]
        codes = page + PAGE * offsets.V4_TOKEN + token_in_page * offsets.V4_SCALES
        code = tl.load(scales + codes[:, None] + t[None, :], mask=is_slot[:, None] & is_tile, other=0)
        scale = ue8m0_value(code)
    else:
        row = page + token_in_page * offsets.V32_TOKEN
        is_tile = (t < 4)[None, :]
        row_scales = (row + offsets.V32_SCALES) // 4
        scale = tl.load(scales + row_scales[:, None] + t[None, :], mask=is_slot[:, None] & is_tile, other=0.0)
    code = tl.load(values + row[:, None, None] + d, mask=(is_slot[:, None] & is_tile)[:, :, None], other=0)
    if BITS or _PLAIN:
        value = round_bf16(e4m3_to_f32(code.to(tl.int32)) * scale[:, :, None])
    else:
        value = scale_e4m3_to_bf16(code, tl.broadcast_to(scale[:, :, None], [TOKENS, TILES, TILE]))
    target = out + token * out_stride
    tl.store(target[:, None, None] + d, value, mask=(wanted[:, None] & is_tile)[:, :, None])
    r = tl.arange(0, 64)[None, :]
    if V4:
        row_rope = (row + offsets.V4_ROPE) // 2
    else:
        row_rope = (row + offsets.V32_ROPE) // 2
    NOPE: tl.constexpr = 448 if V4 else 512
    rotary = tl.load(rope + row_rope[:, None] + r, mask=is_slot[:, None], other=0)
    tl.store(target[:, None] + (NOPE + r), rotary, mask=wanted[:, None])


def dequantize(
    cache: torch.Tensor, slots: torch.Tensor, out: torch.Tensor | None = None, *, config: dict[str, int] | None = None
) -> torch.Tensor:
    """The tokens in ``slots`` as bfloat16; see the module. It makes one launch, or none if there are no slots.

    ``config`` replaces `dequantize_config`'s numbers.

    Raises:
        ValueError: the cache has no known layout, or slots or out have another shape, type or device.
    """
    pages = pages_of("cache", cache)
    if slots.dim() != 1 or slots.dtype not in (torch.int32, torch.int64) or not slots.is_contiguous():
        raise ValueError(f"slots: {describe(slots)}, expected int32 or int64, [n], contiguous")
    shape = (slots.numel(), pages.layout.width)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=cache.device)
    if out.shape != shape or out.dtype != torch.bfloat16 or out.stride(1) != 1:
        raise ValueError(f"out: {describe(out)}, expected bfloat16, {shape}, the last contiguous")
    check_device("slots", slots, cache, "cache")
    check_device("out", out, cache, "cache")
    if pages.slots == 0:
        return out.zero_()
    if out.shape[0]:
        with on_device_of(cache):
            numbers = config or dequantize_config()
            _dequantize_kernel[(-(-out.shape[0] // numbers["TOKENS"]),)](
                out.view(torch.int16), slots, pages.pairs.view(torch.uint8), pages.rope.view(torch.int16),
                pages.scales, out.shape[0], pages.slots, pages.page_bytes // 16, out.stride(0), PAGE=pages.page_size,
                V4=pages.layout is V4, BITS=chip_of(cache).capability < (8, 9), **numbers,
            )  # fmt: skip
    return out


def dequantize_k_cache_paged(
    cache: torch.Tensor, slots: torch.Tensor, page_size: int | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`dequantize` for caches as SGLang holds them: [n, 1, 576 or 512] of the tokens in ``slots``, in their order.

        V4      page_size given; cache [pages, bytes of a page], of any type: its bytes count
        V3.2    page_size None; cache [..., 656], tokens one after the other

    ``out`` may be a slice of a workspace: its rows may lie apart. Nothing else of it is written, and no launch is made
    for no slot.

    Raises:
        ValueError: a cache of another shape or layout, a page size that it cannot have, slots or out as `dequantize`.
    """
    found = describe(cache)
    if page_size is None:
        if not cache.shape or cache.shape[-1] != V32.bytes or not cache.is_contiguous():
            raise ValueError(f"cache: {found}, expected [..., {V32.bytes}], contiguous, or a page_size for V4's")
        cache = cache.view(cache.numel() // V32.bytes, 1, V32.bytes)
    else:
        if page_size < 1:
            raise ValueError(f"page_size: {page_size}, expected 1 or more")
        if cache.dim() != 2 or cache.stride(1) != 1:
            raise ValueError(f"cache: {found}, expected [pages, bytes of a page], pages contiguous")
        cache, used = cache.view(torch.uint8), page_size * V4.bytes
        if cache.shape[1] < used:
            least = V4.page_bytes(page_size)
            raise ValueError(f"cache: {cache.shape[1]} bytes a page, expected {least} for a page_size of {page_size}")
        cache = cache[:, :used].view(len(cache), page_size, 1, V4.bytes)
    if out is not None:
        shape = (slots.numel(), 1, LAYOUTS[cache.shape[-1]].width)
        if out.shape != shape:
            raise ValueError(f"out: shape {tuple(out.shape)}, expected {shape}")
        out = out[:, 0]
    return dequantize(cache, slots, out)[:, None]


def dequantize_ref(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The definition in float64, before the rounding: [n, 576 or 512]. Slots must be in the cache."""
    pages = pages_of("cache", cache)
    values, scales, rope = gather(pages, slots.long())
    tiles = values.double().view(-1, pages.layout.tiles, pages.layout.tile)
    return torch.cat([(tiles * scales.double()[..., None]).flatten(1), rope.double()], 1)


def dequantize_k_cache_paged_ref(
    cache: torch.Tensor, slots: torch.Tensor, page_size: int | None = None
) -> torch.Tensor:
    """The definition of `dequantize_k_cache_paged`, byte by byte, on the CPU. Slots must be in the cache."""
    raw = cache.cpu().view(torch.uint8).flatten()
    tokens = []
    for slot in slots.tolist():
        if page_size is None:
            at = slot * V32.bytes
            values, rope, tile = raw[at : at + 512], raw[at + 528 : at + 656], V32.tile
            scales = raw[at + 512 : at + 528].clone().view(torch.float32).tolist()
        else:
            page = slot // page_size * (raw.numel() // cache.shape[0])
            at, scale_at = page + slot % page_size * 576, page + page_size * 576 + slot % page_size * 8
            values, rope, tile = raw[at : at + 448], raw[at + 448 : at + 576], 64
            codes = raw[scale_at : scale_at + 7].tolist()
            scales = [0.0 if code == 0 else math.inf if code == 255 else 2.0 ** (code - 127) for code in codes]
        nope = values.view(torch.float8_e4m3fn).float().view(-1, tile) * torch.tensor(scales)[:, None]
        tokens.append(torch.cat([nope.bfloat16().flatten(), rope.clone().view(torch.bfloat16)]))
    width = V32.width if page_size is None else V4.width
    return torch.stack(tokens)[:, None] if tokens else torch.empty(0, 1, width, dtype=torch.bfloat16)


def gather(pages: Pages, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is stored of some tokens: e4m3 values, scales as float32, rope."""
    flat = pages.pairs.view(torch.uint8)
    raw = flat.as_strided((pages.pages, pages.page_size * pages.layout.bytes), (pages.page_bytes, 1))
    page, at = slots // pages.page_size, slots % pages.page_size

    def bytes_at(first: torch.Tensor, count: int) -> torch.Tensor:
        return raw[page[:, None], first[:, None] + torch.arange(count, device=slots.device)]

    if pages.layout is V32:
        first, nope = at * V32.bytes, V32.nope
        values, scales = bytes_at(first, nope), bytes_at(first + nope, 4 * V32.tiles)
        rope = bytes_at(first + nope + 4 * V32.tiles, 2 * ROPE)
        scale = scales.view(torch.float32)
    else:
        token, nope = V4.nope + 2 * ROPE, V4.nope
        values, rope = bytes_at(at * token, nope), bytes_at(at * token + nope, 2 * ROPE)
        scale = (bytes_at(pages.page_size * token + at * 8, V4.tiles).int() << 23).view(torch.float32)
    return values.view(torch.float8_e4m3fn), scale, rope.view(torch.bfloat16)


def compile_cases(every: bool = False) -> list[CompileCase]:
    """Both layouts; page sizes differ by a constant alone."""
    cases = []
    numbers = dequantize_config()
    kinds = ((False, 1), (False, 64), (True, 64))
    for sm, (v4, page) in itertools.product(TARGETS, kinds):
        signature = {"out": "*i16", "slots": "*i64" if v4 else "*i32", "values": "*u8", "rope": "*i16"}
        signature |= {"scales": "*u8" if v4 else "*fp32", "tokens": "i32", "slots_end": "i64" if v4 else "i32"}
        signature |= {"page_chunks": "i32", "out_stride": "i32"}
        constants = {"PAGE": page, "V4": v4, "BITS": sm < 89, "TOKENS": numbers["TOKENS"]}
        divisible = ("out", "values", "rope", "scales", "out_stride")
        name = f"dequantize {'V4' if v4 else 'V3.2'} {page}"
        warps = numbers["num_warps"]
        cases.append(
            CompileCase(name, _dequantize_kernel, signature, constants, divisible, num_warps=warps, targets=(sm,))
        )
    return cases


def warmup(device: torch.device | str, page_sizes: tuple[int, ...] = ()) -> int:
    """Compile what `dequantize` can reach. Returns how many kernels that took; 0 on a CPU.

    With ``page_sizes``, for V4's caches with pages of these sizes. Without, for V3.2's caches, as pages of one token
    and of 64. Slots are of both types, and rows begin at multiples of 16 bytes, as torch's do.
    """
    one = torch.zeros(1, dtype=torch.int32, device=device)
    if not can_launch(one):
        return 0
    with warming_up() as compiled:
        for size in page_sizes or (1, 64):
            cache = new_pages(V4 if page_sizes else V32, 1, size, device)
            for slots in (one, one.long()):
                dequantize(cache, slots)
    return compiled()


watch_compiles(_dequantize_kernel)
