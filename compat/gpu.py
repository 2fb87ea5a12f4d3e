"""Devices: what can be known of them without touching CUDA, and what a call tells later."""

from __future__ import annotations

import gc
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mla_patch.compat.types import Gpu

if TYPE_CHECKING:
    import torch


@lru_cache(maxsize=1)
def from_nvml() -> Gpu | None:
    """The first device that NVML lists, or None where there is no NVML; CUDA stays uninitialised."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            device = pynvml.nvmlDeviceGetHandleByIndex(0)
            return Gpu(
                _text(pynvml.nvmlDeviceGetName(device)),
                tuple(pynvml.nvmlDeviceGetCudaComputeCapability(device)),
                _text(pynvml.nvmlSystemGetDriverVersion()),
            )
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def known() -> Gpu | None:
    """The device that NVML tells of, else the one that a call has told of, else None."""
    return from_nvml() or (_told[-1] if _told else None)


def from_tensor(tensor: torch.Tensor) -> Gpu | None:
    """The device that a call's tensor lies on, or None for a CPU tensor."""
    return _tell(_from_index(tensor.device.index or 0)) if tensor.is_cuda else None


def from_torch() -> Gpu | None:
    """The first device as torch sees it. Initialises CUDA, so it is for our own processes only."""
    import torch

    return _tell(_from_index(0)) if torch.cuda.is_available() else None


_told: list[Gpu] = []  # at most one


def _tell(device: Gpu) -> Gpu:
    _told[:] = [device]
    return device


@lru_cache(maxsize=16)
def _from_index(index: int) -> Gpu:
    import torch

    return Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


def not_nvidia(device: Gpu) -> str | None:
    """Why this device cannot run what is written for NVIDIA's, or None."""
    return "not an NVIDIA GPU" if device.name.startswith("AMD") else None


def on_nvidia(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies on an NVIDIA GPU, or on none."""
    device = from_tensor(tensor)
    return device is None or not_nvidia(device) is None


@lru_cache(maxsize=16)
def capability(index: int) -> tuple[int, int]:
    """Compute capability of a device that a call already uses."""
    import torch

    return torch.cuda.get_device_capability(index)


def capability_of(tensor: Any) -> tuple[int, int] | None:
    """Of the GPU that a call's tensor lies on; None on a CPU."""
    return capability(tensor.device.index) if tensor.is_cuda else None


@lru_cache(maxsize=16)
def sm_count(index: int) -> int:
    """Streaming multiprocessors of a device that a call already uses."""
    import torch

    return torch.cuda.get_device_properties(index).multi_processor_count


# bytes of shared memory that one block may ask for, in KiB, by compute capability
_SHARED = {(8, 0): 163, (8, 7): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}


def shared_memory(index: int) -> int:
    """Bytes of shared memory that one block can have, on a device that a call already uses."""
    import torch

    told = getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", None)
    return told or _SHARED.get(capability(index), 48) * 1024


def elsewhere(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies on another GPU than the current one, where Triton launches whatever tensors say."""
    import torch

    return tensor.is_cuda and tensor.device.index != torch.cuda.current_device()


def aligned(tensor: torch.Tensor) -> bool:
    """Whether every row begins on 16 bytes. Kernels say so of q and out: if Triton were to find out, it would compile
    them twice, and without it they move two bytes at a time."""
    size = tensor.element_size()
    return not (tensor.data_ptr() % 16 or any(stride * size % 16 for stride in tensor.stride()[:-1]))


def realigned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or, where it is not `aligned`, a copy that is."""
    if aligned(tensor):
        return tensor
    import torch

    return tensor.clone(memory_format=torch.contiguous_format)


def capturing() -> bool:
    """Whether the current stream records a CUDA graph; False, and CUDA untouched, before CUDA is in use."""
    torch = sys.modules.get("torch")  # asked at every served call, and a host without torch captures nothing
    return torch is not None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def free_memory() -> int:
    """Bytes that the current device has left; 0 before CUDA is in use."""
    torch = sys.modules.get("torch")
    return torch.cuda.mem_get_info()[0] if torch is not None and torch.cuda.is_initialized() else 0


def has_graphs() -> bool:
    """Whether a CUDA graph lives in this process. Walks all objects: for the moments when ours is put in place."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch.cuda, "CUDAGraph"):
        return False
    kinds = {torch.cuda.CUDAGraph, *torch.cuda.CUDAGraph.__subclasses__()}
    return any(type(one) in kinds for one in gc.get_objects())


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
