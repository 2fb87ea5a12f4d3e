"""KV indices for paged attention: each request's row of a wide slot table becomes pages, or flat token ids.

    req_to_token  [R, W]     int32         physical token slot of (request row, position)
    req_pool      [>= rows]  int32, int64  which row of req_to_token a request owns
    lens          [>= rows]  int32, int64  tokens of the request; zero or less writes nothing
    kv_start      [>= rows]  int32, int64  first position, or None for 0
    indptr        [>= rows]  int32, int64  where the request's ids start (need not be the cumsum of lens)
    out           page table: [>= rows, W'] int32, int64;  token ids: flat int32, int64

    page table    out[r, j] = req_to_token[req_pool[r], kv_start[r] + j * page_size] // page_size
                  for 0 <= j < cdiv(lens[r], page_size)
    token ids     out[indptr[r] + j] = req_to_token[req_pool[r], kv_start[r] + j]
                  for 0 <= j < lens[r]

Nothing else is written. Both are one gather of `entries`, one per page or one per token, BLOCK at a time. Lengths are
known only on the device, so the grid is sized from the row count and the GPU, never from a tensor's width. What of a
long row is left over when every program has copied one block is shared out: among the row's own programs (page tables,
which are short), or among all of them (token ids, where one long request beside many short ones would otherwise keep a
few programs busy and the rest idle).
"""

from __future__ import annotations

from mla_patch.kernels.indices.kv.cases import warmup
from mla_patch.kernels.indices.kv.config import page_table_config, token_indices_config
from mla_patch.kernels.indices.kv.launch import build_page_table, build_token_indices
from mla_patch.kernels.indices.kv.reference import page_table_ref, token_indices_ref

__all__ = [
    "build_page_table", "build_token_indices", "page_table_config", "page_table_ref", "token_indices_config",
    "token_indices_ref", "warmup",
]  # fmt: skip
