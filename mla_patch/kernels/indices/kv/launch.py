"""Launchers of the two KV-index builders, and their checks, which are on the path of every decode step."""

from __future__ import annotations

import torch

from mla_patch.kernels.common.checks import INDEX_TYPES
from mla_patch.kernels.common.launch import INTERPRETED, chip_of, on_device_of
from mla_patch.kernels.indices.kv.config import page_table_config, token_indices_config
from mla_patch.kernels.indices.kv.triton import _kv_indices_kernel


def build_page_table(
    req_to_token: torch.Tensor,
    req_pool: torch.Tensor,
    lens: torch.Tensor,
    out: torch.Tensor,
    *,
    kv_start: torch.Tensor | None = None,
    page_size: int = 64,
    rows: int | None = None,
    row_stride: int | None = None,
    out_stride: int | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """Write the physical page of every page of the first ``rows`` requests into ``out``; see the package for shapes.

    ``rows`` defaults to ``len(lens)``; the index tensors and ``out`` may be longer, as a graph's buffers are. The
    strides (elements from row to row of ``req_to_token`` and ``out``) default to the tensors' own. ``page_size`` is a
    power of two up to 4096. Entries past a request's last page, and rows of no length, keep what they held.
    One launch on the current stream, no allocation, no sync: it can be captured in a CUDA graph. ``config`` replaces
    the launch numbers of `page_table_config`. Returns ``out``.

    Raises:
        ValueError: a tensor's type, device, rank or layout, more rows than a tensor holds, a page size or a stride
            out of range. Values in tensors are not looked at.
    """
    if page_size < 1 or page_size > 4096 or page_size & (page_size - 1):
        raise ValueError(f"page_size: {page_size}, expected a power of two from 1 to 4096")
    rows = _check(req_to_token, req_pool, lens, None, kv_start, out, rows)
    row_stride = _stride("row_stride", row_stride, req_to_token)
    out_stride = _stride("out_stride", out_stride, out, rows)
    if rows == 0:
        return out
    if config is None:
        config = page_table_config(rows, page_size, chip_of(out).multiprocessors, INTERPRETED)
    _launch(config, rows, req_to_token, req_pool, lens, None, kv_start, out, row_stride, out_stride, page_size)
    return out


def build_token_indices(
    req_to_token: torch.Tensor,
    req_pool: torch.Tensor,
    lens: torch.Tensor,
    indptr: torch.Tensor,
    out: torch.Tensor,
    *,
    kv_start: torch.Tensor | None = None,
    rows: int | None = None,
    row_stride: int | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """Write the physical slot of every token of the first ``rows`` requests into ``out``, request r at ``indptr[r]``.

    As `build_page_table` otherwise: ``rows``, ``row_stride``, graph capture, errors. ``config`` replaces the launch
    numbers of `token_indices_config`.
    """
    rows = _check(req_to_token, req_pool, lens, indptr, kv_start, out, rows)
    row_stride = _stride("row_stride", row_stride, req_to_token)
    if rows == 0:
        return out
    if config is None:
        config = token_indices_config(rows, chip_of(out).multiprocessors, INTERPRETED)
    _launch(config, rows, req_to_token, req_pool, lens, indptr, kv_start, out, row_stride, 0, 1)
    return out


_INT32 = (torch.int32,)


def _check(
    req_to_token: torch.Tensor,
    req_pool: torch.Tensor,
    lens: torch.Tensor,
    indptr: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    out: torch.Tensor,
    rows: int | None,
) -> int:
    """How many rows to build, or ValueError. On the hot path of every decode step: reads metadata, each item once."""
    device = req_to_token.device
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"req_to_token: on {device}, expected a CUDA device (or TRITON_INTERPRET=1 at import)")
    if rows is None:
        rows = lens.numel()
    elif rows < 0:
        raise ValueError(f"rows: {rows}, expected 0 or more")
    _check_tensor("req_to_token", req_to_token, _INT32, 2, 0, device)
    _check_tensor("req_pool", req_pool, INDEX_TYPES, 1, rows, device)
    _check_tensor("lens", lens, INDEX_TYPES, 1, rows, device)
    if kv_start is not None:
        _check_tensor("kv_start", kv_start, INDEX_TYPES, 1, rows, device)
    if indptr is not None:
        _check_tensor("indptr", indptr, INDEX_TYPES, 1, rows, device)
        _check_tensor("out", out, INDEX_TYPES, 1, 0, device)
    else:
        _check_tensor("out", out, INDEX_TYPES, 2, rows, device)
    return rows


def _check_tensor(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], rank: int, rows: int, device: torch.device
) -> None:
    shape = tensor.shape
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if len(shape) != rank:
        raise ValueError(f"{name}: shape {tuple(shape)}, expected {rank} dimension{'s' * (rank > 1)}")
    if shape[0] < rows:
        raise ValueError(f"{name}: {shape[0]} rows, expected {rows} or more")
    # a dimension of one may have any stride; `is_contiguous` is the cheapest of the three to ask
    if not tensor.is_contiguous() and tensor.stride(-1) != 1 and shape[-1] > 1:
        raise ValueError(f"{name}: stride {tensor.stride(-1)} in the last dimension, expected 1")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, expected {device} as req_to_token")


def _stride(name: str, stride: int | None, tensor: torch.Tensor, rows: int | None = None) -> int:
    """A row stride as the host passed it; one that is not the tensor's own must still keep all rows in its memory."""
    natural = tensor.stride(0)
    if stride is None or stride == natural:
        return natural
    last = (tensor.shape[0] if rows is None else rows) - 1
    room = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    if stride < 0 or last * stride >= max(room, 1):
        raise ValueError(f"{name}: {stride} for {last + 1} rows, expected {natural} as the tensor has, or less")
    return stride


def _launch(
    config: dict[str, int],
    rows: int,
    req_to_token: torch.Tensor,
    req_pool: torch.Tensor,
    lens: torch.Tensor,
    indptr: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    out: torch.Tensor,
    row_stride: int,
    out_stride: int,
    page_size: int,
) -> None:
    numbers = {name: value for name, value in config.items() if name != "ctas"}
    args = (req_to_token, req_pool, lens, indptr, kv_start, out, rows, row_stride, out_stride)
    with on_device_of(out):
        _kv_indices_kernel[(rows, config["ctas"])](*args, PAGE_SIZE=page_size, **numbers)
