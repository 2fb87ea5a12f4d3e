"""Dense MLA decode over a paged cache by block table, with the log-sum-exp that FlashMLA's callers may read.

    q               [B, Sq, H, 576 or 512]    bfloat16 or float16, or float8_e4m3fn; 1 to 128 heads
    k_cache         [pages, ps, 1, width of q]    dtype of q; any page size; pages and rows may lie apart
    block_table     [B, most pages of a request]    int32; what it holds past a request's pages is not read
    cache_seqlens   [B]    int32 or int64
    out             [B, Sq, H, 512]    dtype of q; bfloat16 under e4m3
    lse             [B, H, Sq]    float32, natural log

Query s of Sq sees len - Sq + 1 + s keys where ``causal``, else all. A query without a key has out 0 and lse +inf. e4m3
values are ``descale_q`` and ``descale_k``, one float32 each, times what is stored; both products stay 16-bit.

`mla_patch.kernels.decode.mla_decode_paged` is the faster kernel where nobody wants the log-sum-exp.
"""

from __future__ import annotations

import math

import torch

from mla_patch.compat.compiles import COMPILES
from mla_patch.compat.triton import interpreted
from mla_patch.kernels.sparse.decode import DENSE, DENSE_E4M3, check_device, check_q, launch

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

    Splits are cut on the device from the lengths, so one captured graph is right for all of them. No sync; no queries
    launch nothing. ``batch_invariant``: as in `mla_patch.kernels.sparse.decode.sparse_decode`.

    Raises:
        ValueError: a tensor's shape, type, device or layout. Values in tensors are not looked at.
    """
    check_q(q)
    batch, queries, _, width = q.shape
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
    descale = None
    if descale_q is not None and descale_k is not None:
        for name, scale in (("descale_q", descale_q), ("descale_k", descale_k)):
            if scale.dtype is not torch.float32 or scale.numel() != 1:
                raise ValueError(f"{name}: {scale.dtype}, shape {tuple(scale.shape)}, expected torch.float32, [1]")
            check_device(name, scale, q)
        descale = (descale_q, descale_k)
    size, dtype, kind, values = shape[1], q.dtype, DENSE, k_cache
    if q.dtype is _E4M3:
        if width != 576:
            raise ValueError(f"q: {width} wide e4m3, expected 576")
        if k_cache.stride(0) % 2 or k_cache.stride(1) % 2 or k_cache.storage_offset() % 2:
            raise ValueError(f"k_cache: strides {k_cache.stride()}, expected even: values are read two at a time")
        dtype, kind, values = torch.bfloat16, DENSE_E4M3, k_cache.view(torch.int16)
        q = q.to(torch.float16)  # exact
    keys = (values, None, None, size, values.stride(0), values.stride(1), shape[0])
    most = block_table.shape[1] * size
    return launch(
        kind, q, keys, block_table, cache_seqlens.contiguous(), most, sm_scale=sm_scale,
        descale=descale, causal=causal and queries > 1, dtype=dtype, batch_invariant=batch_invariant, config=config,
    )  # fmt: skip


def dense_decode_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    sm_scale: float,
    causal: bool = False,
    descale_q: torch.Tensor | None = None,
    descale_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in float64 on the stored bytes: out [B, Sq, H, 512] and lse [B, H, Sq]."""
    batch, queries, heads, width = q.shape
    out = torch.zeros(batch, queries, heads, 512, dtype=torch.float64, device=q.device)
    lse = torch.full((batch, heads, queries), math.inf, dtype=torch.float64, device=q.device)
    size = k_cache.shape[1]
    for b in range(batch):
        length = int(cache_seqlens[b])
        j = torch.arange(max(length, 0), device=q.device)
        pages = block_table[b].long()[j // size]
        keys = k_cache.reshape(-1, size, width)[pages, j % size].double() * (1 if descale_k is None else descale_k)
        for s in range(queries):
            seen = keys[: max(length - queries + 1 + s, 0)] if causal and queries > 1 else keys
            if len(seen):
                scores = q[b, s].double() @ seen.T * sm_scale * (1 if descale_q is None else descale_q)
                lse[b, :, s] = total = scores.logsumexp(-1)
                out[b, s] = torch.exp(scores - total[:, None]) @ seen[:, :512]
    return out, lse


def warmup(device: torch.device | str, heads: int, dtype: torch.dtype, page_size: int = 64, width: int = 576) -> int:
    """Compile what `dense_decode` can reach with queries and a cache of this kind; how many kernels that took.

    Real launches over one token, e4m3 with descales; one that is split and one that is not, which is all that batches
    and lengths change. Nothing to do on a CPU.
    """
    q = torch.zeros(1, 1, heads, width, device=device).to(dtype)
    if not q.is_cuda and not interpreted():
        return 0
    before = COMPILES.total
    cache = torch.zeros(1, page_size, 1, width, device=device).to(dtype)
    scale = torch.ones(1, device=device) if dtype is _E4M3 else None
    with COMPILES.warming():
        for pages in (1, 8192 // page_size + 1):
            table = torch.zeros(1, pages, dtype=torch.int32, device=device)
            dense_decode(q, cache, table, table[0, :1] + 1, sm_scale=1.0, descale_q=scale, descale_k=scale)
    return COMPILES.total - before
