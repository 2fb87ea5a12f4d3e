"""Both fp8 layouts, byte by byte: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import math

import pytest
import torch

from mla_patch.compat.triton import interpreted
from mla_patch.kernels.cache.dequantize import dequantize, dequantize_ref
from mla_patch.kernels.cache.layouts import V4, V32, new_pages, pages_of
from mla_patch.kernels.cache.quantize import quantize, quantize_ref

DEVICE = "cpu" if interpreted() else "cuda"
E4M3 = torch.float8_e4m3fn
BYTES = torch.zeros(11000, dtype=torch.uint8)


@pytest.mark.parametrize(
    "page_size, page_bytes", [(1, 1152), (2, 1728), (32, 19008), (64, 37440), (128, 74880), (256, 149760)]
)
def test_pages_are_padded(page_size, page_bytes):
    assert V4.page_bytes(page_size) == page_bytes
    cache = new_pages(V4, 3, page_size)
    assert cache.shape == (3, page_size, 1, 584) and cache.stride(0) == page_bytes
    assert pages_of("cache", cache).page_bytes == page_bytes
    assert V32.page_bytes(page_size) == page_size * 656


def test_the_worked_example():
    """Slot 5 of pages of 64: where each byte goes, what it is, and what it reads as."""
    x = torch.zeros(1, 512, dtype=torch.bfloat16, device=DEVICE)
    x[0, :4] = torch.tensor([1, -3, 0.3, 7])
    for tile, values in {1: [448.0], 2: [450.0], 3: [0.001], 4: [100.0, 1.0]}.items():
        x[0, 64 * tile : 64 * tile + len(values)] = torch.tensor(values)
    x[0, 448:] = torch.arange(64)
    pool = torch.zeros(2, 37440, dtype=torch.uint8, device=DEVICE)
    cache = pool[:, : 64 * 584].view(2, 64, 1, 584)
    slot = torch.tensor([5], device=DEVICE)
    quantize(x, cache, slot)
    page = pool[0].cpu().clone()
    assert page[36904:36912].tolist() == [0x79, 0x7F, 0x80, 0x6D, 0x7D, 0x5C, 0x5C, 0]
    tiles = page[2880 : 2880 + 448].view(7, 64)
    assert tiles[0, :5].tolist() == [0x68, 0xF4, 0x5A, 0x7E, 0]
    assert [tiles[t, 0].item() for t in (1, 2, 3, 4)] == [0x7E, 0x76, 0x78, 0x7C]
    assert tiles[4, 1] == 0x48 and not tiles[5:].any()
    assert torch.equal(page[2880 + 448 : 3456].view(torch.bfloat16), torch.arange(64).bfloat16())
    # nothing else was touched
    page[2880:3456] = 0
    page[36904:36911] = 0
    assert not page.any() and not pool[1].any()
    back = dequantize(cache, slot)[0].cpu().float()
    assert back[:4].tolist() == [1, -3, 0.3125, 7]
    assert [back[64 * t].item() for t in (1, 2, 3, 4)] == [448, 448, 0.0009765625, 96]
    # the fused writer's least scale
    quantize(x, cache, slot, least=1e-4)
    assert pool[0, 36904 + 5].item() == 105


@pytest.mark.parametrize("layout", [V32, V4], ids=lambda layout: layout.name)
@pytest.mark.parametrize("page_size", [1, 2, 61, 64])
def test_bytes_and_values(layout, page_size):
    count, pages = 23, 40 if page_size < 8 else 3
    gain = torch.exp2(torch.randint(-20, 14, (count, 1)).float())
    x = (torch.randn(count, layout.width) * gain).bfloat16().to(DEVICE)
    x[3, :128] = 0
    x[4] = 0
    cache = new_pages(layout, pages, page_size, DEVICE)
    cache.fill_(0xFF)  # NaN wherever nothing is stored
    slots = torch.randperm(pages * page_size)[:count].to(DEVICE)
    slots[7] = -1
    slots[8] = pages * page_size
    quantize(x, cache, slots)
    kept = torch.tensor([i for i in range(count) if i not in (7, 8)], device=DEVICE)
    # on a GPU torch's division by a scalar may be a product, and a tie then another code
    codes, scales = quantize_ref(x[kept].cpu(), layout.tiles)
    want = codes.float() * (scales if layout is V32 else torch.exp2(scales.float() - 127))[..., None]
    stored = dequantize_ref(cache, slots[kept])
    assert torch.equal(stored[:, : layout.nope].float().cpu(), want.flatten(1))
    assert torch.equal(stored[:, layout.nope :].bfloat16(), x[kept, layout.nope :])
    again = dequantize(cache, slots.int() if page_size == 2 else slots)
    assert torch.equal(again[kept], stored.bfloat16())
    assert not again[7:9].any()  # outside the cache


def stored_and_read(layout, x):
    """As the kernels write and read it; what is stored is what the definition says."""
    cache = new_pages(layout, len(x), 1, DEVICE)
    slots = torch.arange(len(x), device=DEVICE)
    quantize(x.to(DEVICE), cache, slots)
    codes, scales = quantize_ref(x, layout.tiles)
    row = cache.as_strided((len(x), layout.page_bytes(1)), (layout.page_bytes(1), 1)).cpu()
    assert torch.equal(row[:, : layout.nope], codes.view(torch.uint8).flatten(1))
    at = 576 if layout is V4 else 512
    kept = scales.view(torch.uint8).flatten(1)
    assert torch.equal(row[:, at : at + kept.shape[1]], kept)
    return dequantize(cache, slots)[:, : layout.nope].float().cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tiles_so_small_that_the_reciprocal_of_their_scale_overflows(dtype):
    largest = [1e-34, 5e-36, 1.4e-36, 1.3e-36, 1e-36, 1e-37]
    if dtype is torch.float32:  # the interpreter reads bfloat16's subnormals wrong
        largest += [1e-38, 1e-40, 3e-42, 4e-43, 1e-45]
    largest = torch.tensor(largest, dtype=dtype)
    x = torch.zeros(2 * len(largest), 576, dtype=dtype)
    x[:, 3] = torch.cat([largest, -largest])
    x[:, 5] = x[:, 3] / -4
    got, x = stored_and_read(V32, x), x.float()
    assert torch.isfinite(got).all() and not got[:, 6:].any() and not got[:, 128:].any()
    # half an ulp of e4m3 and of bfloat16, subnormals too. A subnormal scale is a multiple of 2**-149, so that
    # a value is wrong by up to 448 / 2 of them, and by all of itself where the scale is 0
    for j in (3, 5):
        off = (got[:, j] - x[:, j]).abs()
        assert (off <= x[:, j].abs() * (2**-4 + 2**-8) + 224 * 2.0**-149 + 2.0**-134).all()
        assert (got[:, j] * x[:, j] >= 0).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_infinity_keeps_its_sign_and_its_neighbours(sign):
    x = torch.zeros(1, 512)
    x[0, :4] = torch.tensor([sign * math.inf, 5.0, -3e38, -sign * math.inf])
    got = stored_and_read(V4, x)
    assert got[0, 0] == sign * math.inf and got[0, 3] == -got[0, 0] and got[0, 1] == 0
    assert abs(got[0, 2] / -3e38 - 1) < 2**-4 and not got[0, 4:].any()


def test_every_code_under_every_scale():
    cache = new_pages(V4, 256, 1, DEVICE)
    raw = cache.as_strided((256, 1152), (1152, 1))
    raw[:, :256] = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    raw[:, 576:583] = torch.arange(256, dtype=torch.uint8, device=DEVICE)[:, None]
    got = dequantize(cache, torch.arange(256, device=DEVICE))[:, :256]
    code = torch.arange(256, dtype=torch.uint8).view(E4M3).float().double()
    scale = torch.exp2(torch.arange(256).double() - 127)
    scale[0], scale[255] = 0, math.inf
    want = (code[None] * scale[:, None]).float().bfloat16()
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


def test_every_rounding_to_e4m3():
    """Every value of 11 bits from below the smallest code to above the largest, ties among them."""
    x = torch.arange(0x2E00, 0x5F10, 1, dtype=torch.int16).view(torch.float16).float() / 2**6
    x = torch.cat([x[: len(x) // 63 * 63].view(-1, 63), torch.full((len(x) // 63, 1), 448.0)], 1).clamp(max=448)
    x = torch.cat([x, torch.zeros(len(x), 448)], 1).to(DEVICE)
    cache = new_pages(V4, len(x), 1, DEVICE)
    for one in (x, -x):
        quantize(one, cache, torch.arange(len(x), device=DEVICE))
        codes, _ = quantize_ref(one, 7)
        got = cache.as_strided((len(x), 64), (1152, 1))
        assert torch.equal(got.cpu(), codes[:, 0].view(torch.uint8).cpu())


def test_slots_beyond_31_bits_of_bytes(monkeypatch):
    """Addresses are 64-bit: the same tokens through a page stride that takes the last page past 2**31 bytes."""
    stride = 576 * 2**21  # two pages, 1.2 GB apart, of memory that is never touched but for a few bytes
    raw = torch.empty(2 * stride + 1152, dtype=torch.uint8, device=DEVICE)
    cache = raw.as_strided((3, 1, 1, 584), (stride, 584, 584, 1))
    x = torch.randn(3, 512).bfloat16().to(DEVICE)
    slots = torch.arange(3, device=DEVICE)
    quantize(x, cache, slots)
    small = quantize(x, new_pages(V4, 3, 1, DEVICE), slots)
    assert torch.equal(dequantize(cache, slots.int()), dequantize(small, slots))


@pytest.mark.parametrize(
    "cache, message",
    [
        (BYTES[:4224].view(2, 4, 1, 528), r"cache: torch.uint8, shape \(2, 4, 1, 528\), expected"),
        (torch.zeros(2, 4, 1, 656), r"cache: torch.float32, shape .* one-byte elements"),
        (BYTES[:10496].view(2, 4, 2, 656), r"cache: torch.uint8, shape \(2, 4, 2, 656\)"),
        (BYTES[:5600].view(2, 4, 1, 700)[..., :656], r"cache: strides .*, expected tokens 656 bytes apart"),
        (BYTES.as_strided((2, 4, 1, 584), (1152, 584, 584, 1)), "cache: pages 1152 bytes"),
        (BYTES.as_strided((2, 1, 1, 584), (1152, 584, 584, 1), 8), "multiples of 16"),
    ],
)  # fmt: skip
def test_caches_that_are_refused(cache, message):
    with pytest.raises(ValueError, match=message):
        pages_of("cache", cache)


def test_misuse():
    cache, slots = new_pages(V32, 1, 4, DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    x = torch.zeros(2, 576, device=DEVICE)
    with pytest.raises(ValueError, match=r"x: torch.float32, shape \(2, 512\)"):
        quantize(x[:, :512], cache, slots)
    with pytest.raises(ValueError, match=r"slots: torch.float32"):
        quantize(x, cache, slots.float())
    with pytest.raises(ValueError, match=r"least: 0.0"):
        quantize(x, cache, slots, least=0.0)
    with pytest.raises(ValueError, match=r"slots: torch.int64, shape \(1, 2\)"):
        dequantize(cache, slots[None])
    for refuses in (lambda slots: quantize(x, cache, slots), lambda slots: dequantize(cache, slots)):
        with pytest.raises(
            ValueError, match=r"slots: torch.int64, shape \(2,\), strides \(2,\), expected .* contiguous"
        ):
            refuses(slots.repeat(2)[::2])
    with pytest.raises(ValueError, match=r"out: torch.float32"):
        dequantize(cache, slots, x)
    assert dequantize(cache, slots[:0]).shape == (0, 576)
    assert not dequantize(new_pages(V4, 0, 4, DEVICE), slots).any()
