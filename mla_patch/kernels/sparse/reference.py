"""What the kernels of this family compute, in float64 on the stored values: the oracle of tests and benchmarks."""

from __future__ import annotations

import itertools
import math

import torch

from mla_patch.kernels.cache.dequantize import dequantize_ref
from mla_patch.kernels.common.constants import LATENT, LOG2_E
from mla_patch.kernels.common.reference import attend_ref


def sparse_decode_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    sm_scale: float,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sparse_decode` in float64 on the stored bytes: out [B, Sq, H, 512] and lse [B, H, Sq]."""
    out, lse = _without_keys(q)
    sets = [(k_cache, indices, topk_length)]
    if extra_k_cache is not None and extra_indices is not None:
        sets.append((extra_k_cache, extra_indices, extra_topk_length))
    for b, s in itertools.product(range(q.shape[0]), range(q.shape[1])):
        found = []
        for cache, ids, lens in sets:
            slots = _counted(ids[b, s], lens, b)
            known = slots[(slots >= 0) & (slots < cache.shape[0] * cache.shape[1])]
            found.append(dequantize_ref(cache, known))
        keys = torch.cat(found)
        if len(keys):
            out[b, s], lse[b, :, s], _ = attend_ref(q[b, s], keys, sm_scale=sm_scale, sinks=attn_sink)
    return out, lse


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
    """`dense_decode` in float64 on the stored bytes: out [B, Sq, H, 512] and lse [B, H, Sq]."""
    out, lse = _without_keys(q)
    queries, size, width = q.shape[1], k_cache.shape[1], q.shape[-1]
    scale = sm_scale * (1 if descale_q is None else descale_q.double())
    for b in range(q.shape[0]):
        length = int(cache_seqlens[b])
        j = torch.arange(max(length, 0), device=q.device)
        pages = block_table[b].long()[j // size]
        keys = k_cache.reshape(-1, size, width)[pages, j % size].double() * (1 if descale_k is None else descale_k)
        for s in range(queries):
            seen = keys[: max(length - queries + 1 + s, 0)] if causal and queries > 1 else keys
            if len(seen):
                out[b, s], lse[b, :, s], _ = attend_ref(q[b, s], seen, sm_scale=scale)
    return out, lse


def mla_sparse_prefill_ref(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = LATENT,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    return_log2: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mla_sparse_prefill` in float64: out [Sq, H, 512], max_logits and lse [Sq, H]."""
    queries, heads = q.shape[:2]
    out = torch.zeros(queries, heads, d_v, dtype=torch.float64, device=q.device)
    max_logits = torch.full((queries, heads), -math.inf, dtype=torch.float64, device=q.device)
    lse = torch.full((queries, heads), math.inf, dtype=torch.float64, device=q.device)
    for s in range(queries):
        rows = _counted(indices[s, 0], topk_length, s)
        keys = kv[rows[(rows >= 0) & (rows < kv.shape[0])], 0]
        if len(keys):
            out[s], lse[s], max_logits[s] = attend_ref(q[s], keys, sm_scale=sm_scale, sinks=attn_sink, values=d_v)
    log_unit = LOG2_E if return_log2 else 1.0
    return out, max_logits * log_unit, lse * log_unit


def _without_keys(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of a decode whose queries have no key: out 0, lse +inf."""
    batch, queries, heads = q.shape[:3]
    out = torch.zeros(batch, queries, heads, LATENT, dtype=torch.float64, device=q.device)
    return out, torch.full((batch, heads, queries), math.inf, dtype=torch.float64, device=q.device)


def _counted(ids: torch.Tensor, lens: torch.Tensor | None, at: int) -> torch.Tensor:
    """The indices of one list that count."""
    return ids[: max(0, int(lens[at])) if lens is not None else None].long()
