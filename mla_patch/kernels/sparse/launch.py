"""What the launchers of the sparse family share: checks, results, split scratch, and the way to `sparse_sm90`.

All of it is on the path of a call and waits for no device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mla_patch.compat import gpu
from mla_patch.compat.triton import HAS_GLUON
from mla_patch.kernels.common.checks import check_can_launch, check_device, describe
from mla_patch.kernels.common.constants import LATENT, WIDTH
from mla_patch.kernels.common.launch import Chip
from mla_patch.kernels.sparse.config import MERGE, SM90_MIN_HEADS, SM90_TILES, split_count
from mla_patch.kernels.sparse.triton import sparse_merge_kernel

MAX_HEADS = 128


class Keys(NamedTuple):
    """A cache, and which of its tokens each query attends to.

    ``stride`` is from one page of an fp8 cache to the next, in units of 16 bytes. A 16-bit workspace has a
    ``page_size`` of 0, and ``stride`` is from one row to the next, in elements.
    """

    values: torch.Tensor | None = None  # an fp8 cache's as int16: two e4m3 values each
    rope: torch.Tensor | None = None  # an fp8 cache's, bfloat16
    scales: torch.Tensor | None = None  # an fp8 cache's: float32 (V3.2), or a token's eight bytes as int64 (V4)
    page_size: int = 0
    stride: int = 0
    slots: int = 0  # how many tokens the cache has
    indices: torch.Tensor | None = None  # int32; [B, Sq, topk], or [Sq, 1, topk] beside q [Sq, 1, H, width]
    lens: torch.Tensor | None = None  # how many indices of a list count, or None: all of them

    @property
    def topk(self) -> int:
        return self.indices.shape[-1] if self.indices is not None else 0

    @property
    def indices_strides(self) -> tuple[int, ...]:
        """Elements from one list to the next: by request, by query."""
        return self.indices.stride()[:2] if self.indices is not None else (0, 0)


NO_KEYS = Keys()


class Results(NamedTuple):
    """What a launch writes. Partials are scratch of a launch with several splits, and else not read."""

    out: torch.Tensor  # [B, Sq, H, 512]
    lse: torch.Tensor  # [B, H, Sq] float32
    partial: torch.Tensor  # [B * Sq * splits * H * 512] float32
    partial_lse: torch.Tensor  # [B * Sq * splits * H] float32, base 2
    splits: int


def check_q(q: torch.Tensor) -> None:
    """Queries of a decode: [B, Sq, H, 576 or 512]."""
    check_can_launch("q", q)
    if q.dim() != 4 or q.shape[3] not in (WIDTH, LATENT) or (q.stride(3) != 1 and q.numel()):
        found = f"shape {tuple(q.shape)}, strides {q.stride()}"
        raise ValueError(f"q: {found}, expected [B, Sq, H, 576 or 512], the last contiguous")
    check_heads(q.shape[2])


def check_heads(heads: int) -> None:
    if not 1 <= heads <= MAX_HEADS:
        raise ValueError(f"q: {heads} heads, expected 1 to {MAX_HEADS}")


def check_lengths(name: str, lens: torch.Tensor | None, q: torch.Tensor) -> None:
    """A length for each entry of q's first dimension, or None."""
    if lens is not None:
        if lens.dtype not in (torch.int32, torch.int64) or lens.shape != q.shape[:1] or not lens.is_contiguous():
            raise ValueError(f"{name}: {describe(lens)}, expected int32 or int64, [{q.shape[0]}], contiguous")
        check_device(name, lens, q)


def new_results(q: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` and ``lse`` of a decode."""
    batch, queries, heads, _ = q.shape
    out = torch.empty(batch, queries, heads, LATENT, dtype=dtype, device=q.device)
    return out, torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device).transpose(1, 2)


def plan_splits(
    out: torch.Tensor,
    lse: torch.Tensor,
    max_keys: tuple[int, ...],
    numbers: dict[str, int],
    chip: Chip,
    batch_invariant: bool,
) -> Results:
    """Decide how many splits share a query, and allocate their scratch.

    ``max_keys``: at most so many keys of a query in each cache. ``numbers``: the launch numbers. A
    ``batch_invariant`` launch has one split, because the number of splits depends on the number of queries.
    """
    batch, queries, heads, width = out.shape
    lines, size = batch * queries, numbers["BLOCK_N"]
    splits = 1
    if not batch_invariant:
        tiles = lines * -(-heads // numbers["BLOCK_H"])
        blocks = sum(-(-count // size) for count in max_keys)
        splits = split_count(tiles, blocks, numbers["PER_SM"] * chip.multiprocessors)
    partial, partial_lse = out, lse
    if splits > 1:
        partial = torch.empty(lines * splits * heads * width, dtype=torch.float32, device=out.device)
        partial_lse = torch.empty(lines * splits * heads, dtype=torch.float32, device=out.device)
    return Results(out, lse, partial, partial_lse, splits)


def merge_splits(results: Results, sinks: torch.Tensor | None, descale_k: torch.Tensor | None) -> None:
    """The second launch, where there is more than one split."""
    out, lse, partial, partial_lse, splits = results
    if splits > 1:
        batch, queries, heads, _ = out.shape
        sparse_merge_kernel[(batch * queries * heads,)](
            out, lse, partial, partial_lse, sinks, descale_k, heads, queries, splits, *lse.stride(), **MERGE
        )


@lru_cache
def _sm90_kernel() -> tuple[Any, int]:
    """`sparse_sm90` and the KEY of its layouts. It is imported late, because older Tritons have no Gluon."""
    from mla_patch.kernels.sm90 import layouts as sm90
    from mla_patch.kernels.sparse.sm90 import sparse_sm90

    return sparse_sm90, sm90.KEY


def takes_sm90(q: torch.Tensor, out: torch.Tensor, sm_scale: float, capability: tuple[int, int]) -> bool:
    """Whether `sparse_sm90` serves these queries, given `gpu.ensure_16b_rows`."""
    return (
        HAS_GLUON and capability == (9, 0) and q.shape[-2] >= SM90_MIN_HEADS and sm_scale > 0 and gpu.has_16b_rows(out)
    )


def launch_sm90(
    q: torch.Tensor,
    keys: Keys,
    extra: Keys,
    results: Results,
    max_logits: torch.Tensor | None,
    *,
    sm_scale: float,
    log_unit: float,
    sinks: torch.Tensor | None,
) -> None:
    """`sparse_sm90` over q [B, Sq, H, width]; ``lse`` [B, H, Sq] and ``max_logits`` [B, Sq, H] lie alike.

    ``log_unit`` is what a base-2 logarithm is multiplied by.
    """
    kernel, layouts_key = _sm90_kernel()
    out, lse, partial, partial_lse, splits = results
    values, extra_values = keys.values, extra.values
    if keys.page_size and values is not None:  # e4m3 values, four at a time
        values = values.view(torch.int32)
    if extra_values is not None:
        extra_values = extra_values.view(torch.int32)
    batch, queries, heads, width = q.shape
    kernel[(-(-heads // SM90_TILES["BLOCK_H"]) * splits * batch * queries,)](
        q, values, keys.indices, keys.lens, extra_values, extra.indices, extra.lens, sinks, out, lse, max_logits,
        partial, partial_lse, heads, queries, keys.topk, extra.topk, keys.slots, extra.slots, float(sm_scale),
        log_unit, splits, q.stride(0), q.stride(1), q.stride(2), keys.stride, extra.stride, *keys.indices_strides,
        *extra.indices_strides, out.stride(-3), out.stride(-2), *lse.stride(), WIDTH=width, PAGE=keys.page_size,
        EXTRA_PAGE=extra.page_size, MERGE=splits > 1, KEY=layouts_key,
    )  # fmt: skip
