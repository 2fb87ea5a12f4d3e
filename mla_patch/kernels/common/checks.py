"""Checks of arguments that several launchers make. All read a tensor's metadata only, never its values.

Every error names the argument, says what was found, and then what was expected.
"""

from __future__ import annotations

import math

import torch

from mla_patch.kernels.common.launch import can_launch

INDEX_TYPES = (torch.int32, torch.int64)
FLOAT_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def describe(tensor: torch.Tensor) -> str:
    """A tensor that is refused, with its strides where they may be why."""
    strides = "" if tensor.is_contiguous() else f", strides {tensor.stride()}"
    return f"{tensor.dtype}, shape {tuple(tensor.shape)}{strides}"


def is_last_contiguous(tensor: torch.Tensor) -> bool:
    """Whether neighbours in the last dimension are neighbours in memory. A dimension of one may have any stride."""
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


def check_can_launch(name: str, tensor: torch.Tensor) -> None:
    """A kernel can run where the tensor lies."""
    if not can_launch(tensor):
        raise ValueError(f"{name}: on {tensor.device}, expected a CUDA device (or TRITON_INTERPRET=1 at import)")


def check_device(name: str, tensor: torch.Tensor, like: torch.Tensor, like_name: str = "q") -> None:
    """The tensor lies where ``like`` does."""
    if tensor.device != like.device:
        raise ValueError(f"{name}: on {tensor.device}, expected {like.device} as {like_name}")


def check_sinks(name: str, sinks: torch.Tensor | None, heads: int, like: torch.Tensor) -> None:
    """Attention sinks: a float for each head, or none at all."""
    if sinks is not None:
        if sinks.shape != (heads,) or not sinks.is_floating_point() or not sinks.is_contiguous():
            raise ValueError(f"{name}: {describe(sinks)}, expected a float for each of {heads} heads, contiguous")
        check_device(name, sinks, like)


def check_index_list(name: str, index: torch.Tensor, min_length: int, like: torch.Tensor) -> None:
    """A contiguous list of int32 or int64."""
    if index.dtype not in INDEX_TYPES or index.dim() != 1 or index.numel() < min_length or not index.is_contiguous():
        found = f"{index.dtype}, shape {tuple(index.shape)}"
        raise ValueError(f"{name}: {found}, expected int32 or int64, contiguous, at least {min_length} long")
    check_device(name, index, like)


def check_scale(name: str, value: float | torch.Tensor, like: torch.Tensor) -> None:
    """A scale: a finite number above 0, or one float on the device, whose value is not looked at."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"{name}: {describe(value)}, expected a number or one float on the device")
        check_device(name, value, like)
    elif not 0 < value < math.inf:  # false of NaN, too
        raise ValueError(f"{name}: {value}, expected a finite number above 0")
