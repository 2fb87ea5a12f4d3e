"""The definitions of both KV-index builders, request by request."""

from __future__ import annotations

import torch


def page_table_ref(
    req_to_token: torch.Tensor,
    req_pool: torch.Tensor,
    lens: torch.Tensor,
    out: torch.Tensor,
    *,
    kv_start: torch.Tensor | None = None,
    page_size: int = 64,
) -> torch.Tensor:
    """The definition: what `build_page_table` must leave, given what ``out`` held before (it is not changed)."""
    want = out.clone()
    for r, length in enumerate(lens.tolist()):
        start = 0 if kv_start is None else int(kv_start[r])
        slots = req_to_token[int(req_pool[r]), start : start + max(length, 0) : page_size]
        want[r, : slots.numel()] = torch.div(slots, page_size, rounding_mode="trunc").to(out.dtype)
    return want


def token_indices_ref(
    req_to_token: torch.Tensor,
    req_pool: torch.Tensor,
    lens: torch.Tensor,
    indptr: torch.Tensor,
    out: torch.Tensor,
    *,
    kv_start: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition: what `build_token_indices` must leave, given what ``out`` held before (it is not changed)."""
    want = out.clone()
    for r, length in enumerate(lens.tolist()):
        start = 0 if kv_start is None else int(kv_start[r])
        begin, count = int(indptr[r]), max(length, 0)
        want[begin : begin + count] = req_to_token[int(req_pool[r]), start : start + count].to(out.dtype)
    return want
