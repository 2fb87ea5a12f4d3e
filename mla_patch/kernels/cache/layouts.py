"""The two fp8 layouts of a paged latent cache, as SGLang writes them and FlashMLA reads them.

    V32, DeepSeek V3.2: 656 bytes a token, one token after the other
        0 .. 511      512 e4m3 values
        512 .. 527    4 float32 scales, one for each 128 values; any number
        528 .. 655    64 bfloat16 rope values
    V4, DeepSeek V4: page by page, 584 bytes a token, pages padded to a multiple of 576 bytes
        576 i .. + 447          448 e4m3 values of the page's token i
        576 i + 448 .. + 575    64 bfloat16 rope values
        576 ps + 8 i .. + 6     7 scales, one for each 64 values: powers of two, 2**(byte - 127); 0 means 0, and 255
                                infinity. The eighth byte holds nothing

A cache is a tensor [pages, ps, 1, bytes] (or without the 1) of one-byte elements, whose pages may lie apart, as
FlashMLA takes it. Of a V4 cache, only the first byte's address and the page stride mean anything: its 584-byte rows are
not tokens. A slot is page * ps + token. Addresses are 64-bit.

Formats of 528 or 288 bytes a token are not supported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_patch.kernels.common.constants import ROPE, V4_PAGE_MULTIPLE, V4_TOKEN_BYTES, V32_TOKEN_BYTES

__all__ = ["LAYOUTS", "ROPE", "V4", "V32", "Layout", "Pages", "new_pages", "pages_of"]


@dataclass(frozen=True)
class Layout:
    """Where a token's values and scales lie."""

    name: str
    bytes: int  # a token, nominally
    nope: int  # e4m3 values
    tile: int  # values that share a scale

    @property
    def width(self) -> int:
        """Values of a token: the keys' width."""
        return self.nope + ROPE

    @property
    def tiles(self) -> int:
        return self.nope // self.tile

    def page_bytes(self, page_size: int) -> int:
        """Bytes from one page to the next in a pool that holds nothing else."""
        if self is V32:
            return page_size * self.bytes
        return -(-page_size * self.bytes // V4_PAGE_MULTIPLE) * V4_PAGE_MULTIPLE


V32 = Layout("V3.2", V32_TOKEN_BYTES, nope=512, tile=128)
V4 = Layout("V4", V4_TOKEN_BYTES, nope=448, tile=64)
LAYOUTS = {layout.bytes: layout for layout in (V32, V4)}
_BYTES = (torch.float8_e4m3fn, torch.uint8, torch.int8)


@dataclass(frozen=True)
class Pages:
    """A cache as kernels address it: three views of the same bytes, of the first page alone."""

    layout: Layout
    pages: int
    page_size: int
    page_bytes: int
    pairs: torch.Tensor  # int16: e4m3 values two at a time
    rope: torch.Tensor  # bfloat16
    scales: torch.Tensor  # float32 (V3.2) or uint8 (V4)

    @property
    def slots(self) -> int:
        return self.pages * self.page_size


def pages_of(name: str, cache: torch.Tensor) -> Pages:
    """The layout and the views of a cache. Errors call it ``name``.

    Raises:
        ValueError: no layout has that many bytes a token, elements are not one byte, or an address is not a multiple of
            16.
    """
    shape = tuple(cache.shape)
    if cache.dim() == 4 and shape[2] == 1:
        cache = cache[:, :, 0]
    layout = LAYOUTS.get(shape[-1]) if shape else None
    if layout is None or cache.dim() != 3 or cache.dtype not in _BYTES or shape[1] < 1:
        found = f"{cache.dtype}, shape {shape}"
        sizes = f"{V32.bytes} or {V4.bytes}"
        raise ValueError(f"{name}: {found}, expected [pages, page size, 1, {sizes}] of one-byte elements")
    size, (page_bytes, row, last) = shape[1], cache.stride()
    # a single page's stride means nothing
    page_bytes = page_bytes if shape[0] > 1 else layout.page_bytes(size)
    if last != 1 or (size > 1 and row != layout.bytes) or page_bytes % 16 or cache.data_ptr() % 16:
        found = f"strides {cache.stride()}, address {cache.data_ptr()}"
        expected = f"tokens {layout.bytes} bytes apart, pages and the first byte at multiples of 16"
        raise ValueError(f"{name}: {found}, expected {expected}")
    if page_bytes < size * layout.bytes:
        raise ValueError(f"{name}: pages {page_bytes} bytes apart, expected at least {size * layout.bytes}")
    raw = cache.view(torch.uint8)
    # one page is enough, because kernels compute the addresses of the others
    flat = raw.as_strided((min(shape[0], 1), size * layout.bytes), (page_bytes, 1))
    scales = flat.view(torch.float32) if layout is V32 else flat
    return Pages(layout, shape[0], size, page_bytes, flat.view(torch.int16), flat.view(torch.bfloat16), scales)


def new_pages(layout: Layout, pages: int, page_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A cache of zeros in the form that FlashMLA takes, over a pool as SGLang allocates it."""
    pool = torch.zeros(pages, layout.page_bytes(page_size), dtype=torch.uint8, device=device)
    return pool[:, : page_size * layout.bytes].view(pages, page_size, 1, layout.bytes)
