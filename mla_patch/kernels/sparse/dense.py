"""Dense MLA decode over a paged cache by block table, with the log-sum-exp that FlashMLA's callers may read.

    q               [B, Sq, H, 576 or 512]    bfloat16 or float16, or float8_e4m3fn; 1 to 128 heads
    k_cache         [pages, ps, 1, width of q]    dtype of q; any page size; pages and rows may lie apart
    block_table     [B, pages of the longest request]    int32; entries behind a request's pages are not read
    cache_seqlens   [B]    int32 or int64
    out             [B, Sq, H, 512]    dtype of q; bfloat16 under e4m3
    lse             [B, H, Sq]    float32, natural log

With ``causal``, query s of Sq sees len - Sq + 1 + s keys, otherwise all. A query without a key has out 0 and lse +inf.
An e4m3 value is what is stored times ``descale_q`` or ``descale_k``, one float32 each; both products stay 16-bit.

`mla_patch.kernels.decode.mla_decode_paged` is the faster kernel for callers without use for the log-sum-exp.
"""

from __future__ import annotations

import torch

from mla_patch.kernels.common.checks import check_device
from mla_patch.kernels.common.constants import WIDTH
from mla_patch.kernels.common.launch import INTERPRETED, can_launch, chip_of, on_device_of, warming_up
from mla_patch.kernels.sparse.config import sparse_config
from mla_patch.kernels.sparse.launch import check_q, merge_splits, new_results, plan_splits
from mla_patch.kernels.sparse.triton import dense_kernel

_E4M3 = torch.float8_e4m3fn


def dense_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    sm_scale: float,
    causal: bool = False,
    descale_q: torch.Tensor | None = None,
    descale_k: torch.Tensor | None = None,
    batch_invariant: bool = False,
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from every query to its request's cached rows; see the module. Returns ``out, lse``.

    Programs cut the splits from the lengths on the device, so that one captured graph is right for all lengths. It
    never waits for the device, and launches nothing if there are no queries. ``batch_invariant`` means what it means
    in `sparse_decode`. ``config`` replaces `sparse_config`'s numbers.

    Raises:
        ValueError: a tensor has the wrong shape, type, device or layout. Values in tensors are not looked at.
    """
    k_cache = _check(q, k_cache, block_table, cache_seqlens, descale_q, descale_k)
    batch, queries, heads, width = q.shape
    pages, page_size = k_cache.shape[:2]
    is_e4m3, values, dtype = q.dtype is _E4M3, k_cache, q.dtype
    if is_e4m3:
        q, values, dtype = q.to(torch.float16), k_cache.view(torch.int16), torch.bfloat16  # q: exact
    with on_device_of(q):
        out, lse = new_results(q, dtype)
        if batch == 0 or queries == 0:
            return out, lse
        chip = chip_of(q)
        numbers = dict(config or sparse_config(heads, chip.capability, INTERPRETED))
        max_keys = block_table.shape[1] * page_size
        results = plan_splits(out, lse, (max_keys,), numbers, chip, batch_invariant)
        del numbers["PER_SM"]
        dense_kernel[(-(-heads // numbers["BLOCK_H"]) * results.splits * batch * queries,)](
            q, out, lse, results.partial, results.partial_lse, values, block_table, cache_seqlens.contiguous(),
            descale_q, descale_k, heads, queries, max_keys, pages, float(sm_scale), int(causal and queries > 1),
            results.splits, q.stride(0), q.stride(1), q.stride(2), values.stride(0), values.stride(1),
            block_table.stride(0), *lse.stride(), E4M3=is_e4m3, ROPE=width == WIDTH, PAGE=page_size,
            BITS=(0, 0) < chip.capability < (8, 9), MERGE=results.splits > 1, **numbers,
        )  # fmt: skip
        merge_splits(results, None, descale_k)
    return out, lse


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    descale_q: torch.Tensor | None,
    descale_k: torch.Tensor | None,
) -> torch.Tensor:
    """Check the arguments of `dense_decode`. Returns the cache as [pages, page size, width]."""
    check_q(q)
    batch, _, _, width = q.shape
    shape = tuple(k_cache.shape)
    if k_cache.dim() == 4 and shape[2] == 1:
        k_cache = k_cache[:, :, 0]
    if k_cache.dim() != 3 or shape[-1] != width or shape[1] < 1 or k_cache.stride(2) != 1:
        found = f"shape {shape}, strides {k_cache.stride()}"
        raise ValueError(f"k_cache: {found}, expected [pages, page size, 1, {width}], the last contiguous")
    if q.dtype not in (torch.bfloat16, torch.float16, _E4M3):
        raise ValueError(f"q: {q.dtype}, expected torch.bfloat16, torch.float16 or torch.float8_e4m3fn")
    if k_cache.dtype is not q.dtype:
        raise ValueError(f"k_cache: {k_cache.dtype}, expected {q.dtype} as q")
    check_device("k_cache", k_cache, q)
    if block_table.dtype is not torch.int32 or block_table.dim() != 2 or block_table.shape[0] != batch:
        found = f"{block_table.dtype}, shape {tuple(block_table.shape)}"
        raise ValueError(f"block_table: {found}, expected torch.int32, [{batch}, pages]")
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        raise ValueError(f"block_table: stride {block_table.stride(1)} in the last dimension, expected 1")
    check_device("block_table", block_table, q)
    if cache_seqlens.dtype not in (torch.int32, torch.int64) or cache_seqlens.shape != (batch,):
        found = f"{cache_seqlens.dtype}, shape {tuple(cache_seqlens.shape)}"
        raise ValueError(f"cache_seqlens: {found}, expected int32 or int64, [{batch}]")
    check_device("cache_seqlens", cache_seqlens, q)
    if (descale_q is None) != (descale_k is None):
        raise ValueError(f"descale_{'q' if descale_q is None else 'k'}: None, expected both descales or neither")
    if descale_q is not None and descale_k is not None:
        for name, scale in (("descale_q", descale_q), ("descale_k", descale_k)):
            if scale.dtype is not torch.float32 or scale.numel() != 1:
                raise ValueError(f"{name}: {scale.dtype}, shape {tuple(scale.shape)}, expected torch.float32, [1]")
            check_device(name, scale, q)
    if q.dtype is _E4M3:
        if width != WIDTH:
            raise ValueError(f"q: {width} wide e4m3, expected {WIDTH}")
        if k_cache.stride(0) % 2 or k_cache.stride(1) % 2 or k_cache.storage_offset() % 2:
            raise ValueError(f"k_cache: strides {k_cache.stride()}, expected even: values are read two at a time")
    return k_cache


def warmup(device: torch.device | str, heads: int, dtype: torch.dtype, page_size: int = 64, width: int = WIDTH) -> int:
    """Compile what `dense_decode` can reach with queries and a cache of this kind. Returns how many kernels that took;
    0 on a CPU.

    These are real launches over one token, e4m3 with descales. One has splits and one has not: batches and lengths
    change nothing else.
    """
    q = torch.zeros(1, 1, heads, width, device=device).to(dtype)
    if not can_launch(q):
        return 0
    cache = torch.zeros(1, page_size, 1, width, device=device).to(dtype)
    scale = torch.ones(1, device=device) if dtype is _E4M3 else None
    with warming_up() as compiled:
        for pages in (1, 8192 // page_size + 1):
            table = torch.zeros(1, pages, dtype=torch.int32, device=device)
            dense_decode(q, cache, table, table[0, :1] + 1, sm_scale=1.0, descale_q=scale, descale_k=scale)
    return compiled()
