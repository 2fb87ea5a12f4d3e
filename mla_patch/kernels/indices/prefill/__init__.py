"""Indices of sparse prefill, SGLang's for DeepSeek V4: which rows of the workspace each query attends to.

The workspace holds a chunk's keys, dequantised: the compressed tokens of all R requests, then their sliding window
(SWA). Each request has a region of both, and a query at position p sees its W last tokens, itself among them. All
tensors are int32, except where another type is named.

    seq_lens, extend_lens  [R]         tokens of a request, and how many of them are this chunk's queries
    req_pool               [R]         which row of req_to_token a request owns
    req_to_token           [rows, P]   physical slot of (row, position)
    full_to_swa            [slots]     int64 or int32, from slots to slots of the SWA cache
    query_start_loc        [R + 1]     first query of each request; may begin at any number
    query_pos              [T]         position of each query, or None: the last tokens of its request, in order
    topk_indices           [T, K]      compressed tokens of the query's own request, numbered from 0; -1 is a hole
    compressed_base        [R]         where a request's compressed tokens begin
    swa_base               [R]         where its window begins

    windows     gather_r = min(seq_r, extend_r + W - 1)     first_r = seq_r - gather_r    offset = running sum of gather
                ids[offset_r + i] = full_to_swa[req_to_token[req_pool_r, first_r + i]]    for 0 <= i < gather_r
    combined    n = min((p + 1) // ratio, topk) compressed tokens, then m = min(p + 1, W) of the window, one after the
                other; -1 to the row's end; length n + m
                row[j] = compressed_base_r + topk_indices[t, j], or -1 if that is a hole          for j < n
                row[n + i] = swa_base_r + p - m + 1 + i - (seq_r - gather_r)                      for i < m

A hole stays a hole and counts in the length: a base added to -1 would name a row of another request. So is a row that
int32 cannot name. A query that no request owns (padding) has a row of -1 and length 0.
"""

from __future__ import annotations

from mla_patch.kernels.indices.prefill.cases import warmup
from mla_patch.kernels.indices.prefill.config import combine_config, combined_topk_width, swa_config
from mla_patch.kernels.indices.prefill.launch import build_swa_token_ids, combine_topk_swa_indices
from mla_patch.kernels.indices.prefill.reference import build_swa_token_ids_ref, combine_topk_swa_indices_ref

__all__ = [
    "build_swa_token_ids", "build_swa_token_ids_ref", "combine_config", "combine_topk_swa_indices",
    "combine_topk_swa_indices_ref", "combined_topk_width", "swa_config", "warmup",
]  # fmt: skip
