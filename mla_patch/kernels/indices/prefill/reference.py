"""The definitions of sparse prefill's indices, query by query."""

from __future__ import annotations

import torch

from mla_patch.kernels.indices.prefill.config import combined_topk_width


def build_swa_token_ids_ref(
    seq_lens: torch.Tensor,
    extend_lens: torch.Tensor,
    req_pool: torch.Tensor,
    req_to_token: torch.Tensor,
    full_to_swa: torch.Tensor,
    swa_window: int,
) -> tuple[list[int], list[int], list[int], list[int]]:
    """The definition of `build_swa_token_ids`, for slots that ``full_to_swa`` has."""
    ids, first, gather, offsets = [], [], [], [0]
    for seq, extend, row in zip(seq_lens.tolist(), extend_lens.tolist(), req_pool.tolist(), strict=True):
        gather.append(min(seq, extend + swa_window - 1))
        first.append(seq - gather[-1])
        offsets.append(offsets[-1] + gather[-1])
        ids += [int(full_to_swa[int(req_to_token[row, position])]) for position in range(first[-1], seq)]
    return ids, first, gather, offsets


def combine_topk_swa_indices_ref(
    topk_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    gather_lens: torch.Tensor,
    compressed_base: torch.Tensor,
    swa_base: torch.Tensor,
    window_size: int,
    compress_ratio: int,
    topk: int,
    query_pos: torch.Tensor | None = None,
) -> tuple[list[list[int]], list[int]]:
    """The definition of `combine_topk_swa_indices`, query by query."""
    width = combined_topk_width(topk, window_size)
    queries = len(topk_indices)
    indices, lens = [[-1] * width for _ in range(queries)], [0] * queries
    starts = [start - int(query_start_loc[0]) for start in query_start_loc.tolist()]
    numbers = (tensor.tolist() for tensor in (seq_lens, gather_lens, compressed_base, swa_base))
    for r, (seq, gather, base, swa) in enumerate(zip(*numbers, strict=True)):
        for t in range(starts[r], min(starts[r + 1], queries)):
            pos = seq - (starts[r + 1] - t) if query_pos is None else int(query_pos[t])
            compressed, recent = min((pos + 1) // compress_ratio, topk), min(pos + 1, window_size)
            row = [v + base if v >= 0 else -1 for v in topk_indices[t, :compressed].tolist()]
            row += [swa + pos - recent + 1 - (seq - gather) + i for i in range(recent)]
            indices[t][: len(row)] = [found if found < 2**31 else -1 for found in row]
            lens[t] = compressed + recent
    return indices, lens
