"""Launchers of sparse prefill's indices, and their checks."""

from __future__ import annotations

import torch

from mla_patch.compat import gpu
from mla_patch.kernels.common.checks import INDEX_TYPES, check_can_launch, check_device, describe, is_last_contiguous
from mla_patch.kernels.common.launch import chip_of, on_device_of
from mla_patch.kernels.indices.prefill.config import combine_config, combined_topk_width, swa_config
from mla_patch.kernels.indices.prefill.triton import _combine_kernel, _swa_kernel


def build_swa_token_ids(
    seq_lens: torch.Tensor,
    extend_lens: torch.Tensor,
    req_pool: torch.Tensor,
    req_to_token: torch.Tensor,
    full_to_swa: torch.Tensor,
    swa_window: int,
    total_swa: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots of the SWA cache in every request's window: (ids [total], first [R], gather [R], offsets [R + 1]), int32.

    ``total_swa`` is the sum of ``gather``, or more, and then the rest of ids is -1. Without it the device is asked,
    which waits for it and cannot be captured. -1 also where req_to_token names no entry of ``full_to_swa``. One launch,
    none for no request.

    Raises:
        ValueError: a tensor's type, shape, layout or device, a window below 1, a total below 0 or past int32.
    """
    device, rows = seq_lens.device, seq_lens.numel()
    check_can_launch("seq_lens", seq_lens)
    for name, tensor in (("seq_lens", seq_lens), ("extend_lens", extend_lens), ("req_pool", req_pool)):
        _check_vector(name, tensor, rows, device)
    if req_to_token.dtype != torch.int32 or req_to_token.dim() != 2 or not is_last_contiguous(req_to_token):
        raise ValueError(f"req_to_token: {describe(req_to_token)}, expected torch.int32, [rows, positions], last dense")
    if full_to_swa.dtype not in INDEX_TYPES or full_to_swa.dim() != 1 or not full_to_swa.is_contiguous():
        raise ValueError(
            f"full_to_swa: {describe(full_to_swa)}, expected torch.int64 or torch.int32, [slots], contiguous"
        )
    for name, tensor in (("req_to_token", req_to_token), ("full_to_swa", full_to_swa)):
        check_device(name, tensor, seq_lens, "seq_lens")
    if swa_window < 1:
        raise ValueError(f"swa_window: {swa_window}, expected 1 or more")
    if total_swa is None:
        reach = extend_lens.clamp(min=0) + (swa_window - 1)
        total_swa = int(torch.minimum(seq_lens, reach).clamp(min=0).sum())
    if not 0 <= total_swa < 2**31:
        raise ValueError(f"total_swa: {total_swa}, expected 0 to 2**31 - 1, as offsets are int32")
    if rows == 0:
        none = torch.empty(0, dtype=torch.int32, device=device)
        ids = torch.full((total_swa,), -1, dtype=torch.int32, device=device)
        return ids, none, none.clone(), torch.zeros(1, dtype=torch.int32, device=device)
    sizes = (total_swa, rows, rows, rows + 1)
    ids, first, gather, offsets = (torch.empty(size, dtype=torch.int32, device=device) for size in sizes)
    config = swa_config(rows, total_swa, chip_of(seq_lens).multiprocessors)
    numbers = {name: value for name, value in config.items() if name != "ctas"}
    with on_device_of(seq_lens):
        _swa_kernel[(rows, config["ctas"])](
            ids, first, gather, offsets, seq_lens, extend_lens, req_pool, req_to_token, full_to_swa,
            rows, total_swa, swa_window, full_to_swa.numel(), req_to_token.stride(0), **numbers,
        )  # fmt: skip
    return ids, first, gather, offsets


def combine_topk_swa_indices(
    topk_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    gather_lens: torch.Tensor,
    compressed_base: torch.Tensor,
    swa_base: torch.Tensor,
    window_size: int,
    compress_ratio: int,
    topk: int,
    *,
    query_pos: torch.Tensor | None = None,
    out_indices: torch.Tensor | None = None,
    out_lens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the workspace that each query attends to: indices [T, `combined_topk_width`] and lengths [T], int32.

    Whole rows are written, whatever ``out_indices`` held. Layers without compressed tokens pass ``topk`` 0 and ratio 1.
    One launch, none for no query; given both outputs it allocates nothing. It can be captured in a CUDA graph.

    Raises:
        ValueError: a tensor's type, shape, layout or device, fewer than ``topk`` columns, a number out of range.
    """
    device = topk_indices.device
    check_can_launch("topk_indices", topk_indices)
    if topk_indices.dtype != torch.int32 or topk_indices.dim() != 2 or not is_last_contiguous(topk_indices):
        raise ValueError(f"topk_indices: {describe(topk_indices)}, expected torch.int32, [queries, topk], last dense")
    for name, number, minimum in (
        ("window_size", window_size, 1),
        ("compress_ratio", compress_ratio, 1),
        ("topk", topk, 0),
    ):
        if number < minimum:
            raise ValueError(f"{name}: {number}, expected {minimum} or more")
    queries, columns = topk_indices.shape
    if columns < topk:
        raise ValueError(f"topk_indices: {columns} columns, expected topk = {topk} or more")
    rows, width = seq_lens.numel(), combined_topk_width(topk, window_size)
    _check_vector("query_start_loc", query_start_loc, rows + 1, device)
    _check_vector("seq_lens", seq_lens, rows, device)
    _check_vector("gather_lens", gather_lens, rows, device)
    _check_vector("compressed_base", compressed_base, rows, device)
    _check_vector("swa_base", swa_base, rows, device)
    if query_pos is not None:
        _check_vector("query_pos", query_pos, queries, device)
    if out_indices is None:
        out_indices = torch.empty(queries, width, dtype=torch.int32, device=device)
    elif (
        out_indices.dtype != torch.int32 or out_indices.shape != (queries, width) or not is_last_contiguous(out_indices)
    ):
        raise ValueError(
            f"out_indices: {describe(out_indices)}, expected torch.int32, [{queries}, {width}], last dense"
        )
    elif out_indices.device != device:
        raise ValueError(f"out_indices: on {out_indices.device}, expected {device}")
    if out_lens is None:
        out_lens = torch.empty(queries, dtype=torch.int32, device=device)
    _check_vector("out_lens", out_lens, queries, device)
    if queries:
        fours = topk % 4 == 0 and gpu.has_16b_rows(topk_indices) and gpu.has_16b_rows(out_indices)
        with on_device_of(topk_indices):
            _combine_kernel[(queries,)](
                out_indices, out_lens, topk_indices, query_start_loc, query_pos, seq_lens, gather_lens,
                compressed_base, swa_base, rows, window_size, compress_ratio, topk, width,
                topk_indices.stride(0), out_indices.stride(0), FOURS=fours, **combine_config(),
            )  # fmt: skip
    return out_indices, out_lens


def _check_vector(name: str, tensor: torch.Tensor, size: int, device: torch.device) -> None:
    if tensor.dtype != torch.int32 or tensor.shape != (size,) or not tensor.is_contiguous():
        raise ValueError(f"{name}: {describe(tensor)}, expected torch.int32, [{size}], contiguous")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, expected {device}")
