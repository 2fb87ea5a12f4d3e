"""A made-up batch of requests, and what its indices have to be by definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# 1, exact pages of 32, 64 and 128, one token to either side, and rows longer than a 4096-token block
LENGTHS = (1, 64, 4097, 63, 128, 9000, 65, 4096, 31)


@dataclass(frozen=True)
class Batch:
    """Requests as SGLang keeps them: a wide table of token slots, one row each, in no particular order."""

    lens: torch.Tensor  # [n] int64
    rows: torch.Tensor  # [n] int64, each request's row of the table
    table: torch.Tensor  # [rows, width] int32, token slots; those of one page are consecutive
    lens_list: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        return self.lens.device


def make_batch(device: str, lens: Sequence[int] = LENGTHS, width: int = 16384, page: int = 128, seed: int = 0) -> Batch:
    """Requests of ``lens`` tokens whose pages lie anywhere in the pool; slots past a length are poison."""
    rng = torch.Generator().manual_seed(seed)
    count, pages = len(lens) + 3, -(-width // page)
    first = torch.randperm(count * pages, generator=rng).view(count, pages) * page
    table = (first[:, :, None] + torch.arange(page)).view(count, -1)[:, :width].to(torch.int32)
    rows = torch.randperm(count, generator=rng)[: len(lens)]
    for row, length in zip(rows.tolist(), lens, strict=True):
        table[row, length:] = -7
    return Batch(torch.tensor(lens).to(device), rows.to(device), table.contiguous().to(device), tuple(lens))


def expected_token_ids(batch: Batch, lens: Sequence[int]) -> torch.Tensor:
    """The definition: every request's slots, one request after the other."""
    return torch.cat([batch.table[row, :length] for row, length in zip(batch.rows.tolist(), lens, strict=True)]).long()


def expected_page_table(batch: Batch, page: int, width: int) -> torch.Tensor:
    """The definition: the page of every page's first token; the host fills the rest with -1."""
    out = torch.full((len(batch.lens_list), width), -1, dtype=torch.int32, device=batch.device)
    for i, (row, length) in enumerate(zip(batch.rows.tolist(), batch.lens_list, strict=True)):
        slots = batch.table[row, :length:page]
        out[i, : len(slots)] = slots // page
    return out


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((out.double() - expected).norm() / expected.norm())
