"""Sparse MLA decode: every query attends to the cached tokens that a list of slots names, in an fp8 latent cache.

    q               [B, Sq, H, 576 or 512]    bfloat16; any strides, but the last dimension contiguous; 1 to 128 heads
    k_cache         [pages, ps, 1, 656 or 584]    one-byte elements: V3.2 for queries 576 wide, V4 for queries 512
                    wide; `mla_patch.kernels.cache.layouts` says where the values lie
    indices         [B, Sq, topk]    int32, slots in any order; repeats count again, and -1 or any other slot outside
                    the cache is no key
    topk_length     [B]    int32, int64 or None: how many indices of a request's lists count
    extra_*         a second cache of the same layout, with its own page size, indices and lengths; one softmax for both
    attn_sink       [H]    float32 or None
    out             [B, Sq, H, 512]    bfloat16
    lse             [B, H, Sq]    float32, natural log

    s_j = sm_scale * q . k_j        out = sum_j exp(s_j) k_j[:512] / (sum_j exp(s_j) + exp(sink))
    lse = log sum_j exp(s_j), without the sink; a query without a key has out 0 and lse +inf

A token's nope values become float16 relative to the largest of its scales, so that one product serves all its tiles.
That is exact if the scales of a token are powers of two within 2**15 of each other. Otherwise the error is at most
2**-12 of a value plus 448 * 2**-25 of the token's largest scale. The second term is at most 2**-24 of the token's
largest value, with scales as writers choose them. It is much of a tile whose scale is 2**-22 of the largest, and all of
one below 2**-25.

There is one program for each query, tile of heads and split. Programs cut the splits from the lengths that they find on
the device, so that one captured graph is right for all lengths. A second kernel merges the splits if there are several.

On sm_90, `mla_patch.kernels.sparse.sm90` serves more than 16 heads. There values become bfloat16, which is exact if
scales are powers of two, and otherwise has an error of at most 2**-9.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from mla_patch.compat import gpu
from mla_patch.kernels.cache.layouts import V4, V32, Pages, new_pages, pages_of
from mla_patch.kernels.common.checks import check_device, check_sinks
from mla_patch.kernels.common.constants import LN2, ROPE
from mla_patch.kernels.common.launch import INTERPRETED, can_launch, chip_of, on_device_of, warming_up
from mla_patch.kernels.sparse.config import SM90_TILES, sparse_config
from mla_patch.kernels.sparse.launch import (
    NO_KEYS,
    Keys,
    check_lengths,
    check_q,
    launch_sm90,
    merge_splits,
    new_results,
    plan_splits,
    takes_sm90,
)
from mla_patch.kernels.sparse.triton import sparse_kernel, sparse_query_kernel

_QUERY_HEADS = 4  # heads of a program of sparse_query_kernel


def sparse_decode(
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
    batch_invariant: bool = False,
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from every query to the tokens that its indices name; see the module. Returns ``out, lse``.

    It launches nothing if there are no queries, and never waits for the device. Results and scratch come from torch's
    allocator at every call, so that a captured graph has them in its pool. Equal inputs give equal outputs. With
    ``batch_invariant``, the results of a query do not depend on the other queries, bit for bit: one program takes all
    keys of a query and a tile of heads, which is slower for few queries with many keys. ``config`` replaces
    `sparse_config`'s numbers.

    Raises:
        ValueError: a tensor has the wrong shape, type, device or layout. Values in tensors are not looked at.
    """
    pages = _check_queries(q, k_cache)
    _check_indices("indices", indices, q)
    check_lengths("topk_length", topk_length, q)
    check_sinks("attn_sink", attn_sink, q.shape[2], q)
    extra = NO_KEYS
    if (extra_k_cache is None) != (extra_indices is None):
        lacks = "extra_k_cache" if extra_k_cache is None else "extra_indices"
        raise ValueError(f"{lacks}: None, expected a tensor, since the other half of the extra cache is given")
    if extra_k_cache is not None and extra_indices is not None:
        second = pages_of("extra_k_cache", extra_k_cache)
        if second.layout is not pages.layout:
            found = f"{second.layout.bytes} bytes a token"
            raise ValueError(f"extra_k_cache: {found}, expected {pages.layout.bytes} as k_cache")
        _check_indices("extra_indices", extra_indices, q)
        check_device("extra_k_cache", extra_k_cache, q)
        extra = _keys_of(second, extra_indices, extra_topk_length)
    elif extra_topk_length is not None:
        raise ValueError("extra_topk_length: given, expected None without extra_indices")
    check_lengths("extra_topk_length", extra_topk_length, q)
    with on_device_of(q):
        return _launch(
            q, pages.layout is V4, _keys_of(pages, indices, topk_length), extra, attn_sink, sm_scale,
            batch_invariant, config,
        )  # fmt: skip


def _launch(
    q: torch.Tensor,
    v4: bool,
    keys: Keys,
    extra: Keys,
    sinks: torch.Tensor | None,
    sm_scale: float,
    batch_invariant: bool,
    config: dict[str, int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch over tensors that have been checked, on the current device."""
    batch, queries, heads, width = q.shape
    out, lse = new_results(q, torch.bfloat16)
    if batch == 0 or queries == 0:
        return out, lse
    chip = chip_of(q)
    q = gpu.ensure_16b_rows(q)
    sm90 = config is None and takes_sm90(q, out, sm_scale, chip.capability)
    numbers = dict(SM90_TILES if sm90 else config or sparse_config(heads, chip.capability, INTERPRETED))
    results = plan_splits(out, lse, (keys.topk, extra.topk), numbers, chip, batch_invariant)
    if sm90:
        launch_sm90(q, keys, extra, results, None, sm_scale=sm_scale, log_unit=LN2, sinks=sinks)
    else:
        del numbers["PER_SM"]
        lines = batch * queries
        q_f16 = torch.empty_like(out, dtype=torch.float16)
        q_scales = torch.empty(lines * heads, dtype=torch.float32, device=q.device)
        sparse_query_kernel[(lines * -(-heads // _QUERY_HEADS),)](
            q, q_f16, q_scales, heads, queries, q.stride(0), q.stride(1), q.stride(2), NOPE=width - ROPE,
            BLOCK_H=_QUERY_HEADS, num_warps=4,
        )  # fmt: skip
        sparse_kernel[(-(-heads // numbers["BLOCK_H"]) * results.splits * lines,)](
            q, q_f16, q_scales, out, lse, results.partial, results.partial_lse, keys.values, keys.rope, keys.scales,
            keys.indices, keys.lens, extra.values, extra.rope, extra.scales, extra.indices, extra.lens, sinks, heads,
            queries, keys.topk, extra.topk, keys.slots, extra.slots, float(sm_scale), results.splits, q.stride(0),
            q.stride(1), q.stride(2), keys.stride, extra.stride, *keys.indices_strides, *extra.indices_strides,
            *lse.stride(), V4=v4, PAGE=keys.page_size, EXTRA_PAGE=extra.page_size,
            BITS=(0, 0) < chip.capability < (8, 9), MERGE=results.splits > 1, **numbers,
        )  # fmt: skip
    merge_splits(results, sinks, None)
    return out, lse


def _keys_of(pages: Pages, indices: torch.Tensor, lens: torch.Tensor | None) -> Keys:
    """A cache as the kernels address it. V3.2's tokens lie evenly where its pages do, whatever their size."""
    size, stride = pages.page_size, pages.page_bytes
    # V4's eight bytes of scales are read as one number
    scales = pages.pairs.view(torch.int64) if pages.layout is V4 else pages.scales
    if pages.layout is V32 and stride == size * V32.bytes:
        size, stride = 1, V32.bytes
    return Keys(pages.pairs, pages.rope, scales, size, stride // 16, pages.slots, indices, lens)


def _check_queries(q: torch.Tensor, k_cache: torch.Tensor) -> Pages:
    check_q(q)
    pages = pages_of("k_cache", k_cache)
    if q.shape[-1] != pages.layout.width:
        found = f"{q.shape[-1]} wide beside {pages.layout.bytes} bytes a token"
        raise ValueError(f"q: {found}, expected {pages.layout.width}")
    if q.dtype is not torch.bfloat16:
        raise ValueError(f"q: {q.dtype}, expected torch.bfloat16")
    check_device("k_cache", k_cache, q)
    return pages


def _check_indices(name: str, ids: torch.Tensor, q: torch.Tensor) -> None:
    if ids.dtype is not torch.int32 or ids.dim() != 3 or ids.shape[:2] != q.shape[:2]:
        expected = f"torch.int32, [{q.shape[0]}, {q.shape[1]}, topk]"
        raise ValueError(f"{name}: {ids.dtype}, shape {tuple(ids.shape)}, expected {expected}")
    if ids.shape[2] > 1 and ids.stride(2) != 1:
        raise ValueError(f"{name}: stride {ids.stride(2)} in the last dimension, expected 1")
    check_device(name, ids, q)


def warmup(
    device: torch.device | str, heads: int, page_sizes: tuple[int, ...] = (), extra: tuple[int, ...] = ()
) -> int:
    """Compile what `sparse_decode` can reach. Returns how many kernels that took; 0 on a CPU.

    With ``page_sizes``, for V4's caches with pages of these sizes, each alone and beside a second cache with pages of
    each size in ``extra``. Without, for V3.2's caches.

    These are real launches over one token, with lengths and sinks for V4, whose models have them. One has splits and
    one has not: batches and topk change nothing else.
    """
    layout = V4 if page_sizes else V32
    q = torch.zeros(1, 1, heads, layout.width, dtype=torch.bfloat16, device=device)
    if not can_launch(q):
        return 0
    lens = torch.ones(1, dtype=torch.int32, device=device)
    with warming_up() as compiled:
        for size, second, topk in itertools.product(page_sizes or (64,), (0, *extra), (1, 8192)):
            ids = torch.zeros(1, 1, topk, dtype=torch.int32, device=device)
            options: dict[str, Any] = {}
            if layout is V4:
                options = {"topk_length": lens, "attn_sink": torch.zeros(heads, device=device)}
            if second:
                options |= {"extra_k_cache": new_pages(layout, 1, second, device), "extra_indices": ids}
                options |= {"extra_topk_length": lens}
            sparse_decode(q, new_pages(layout, 1, size, device), ids, sm_scale=1.0, **options)
    return compiled()
