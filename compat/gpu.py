"""Devices: what can be known of them without touching CUDA, and what a call tells later.

Before the first call the GPU is known where NVML and the environment leave no doubt:

    CUDA_VISIBLE_DEVICES    unset: all GPUs; else numbers, UUIDs or beginnings of UUIDs (GPU-...), MIG instances
                            (MIG-..., or MIG-GPU-<uuid>/<gi>/<ci> of older drivers), up to an entry that names none
    CUDA_DEVICE_ORDER       PCI_BUS_ID: CUDA counts as NVML does; else the fastest GPU comes first, so that a number
                            means nothing certain where the GPUs of a machine differ

GPUs of one compute capability are one GPU to a feature. Where those that a process sees differ, its first call decides.
"""

from __future__ import annotations

import ast
import gc
import os
import re
import sys
from functools import lru_cache
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any, NamedTuple

from mla_patch.compat.types import Gpu

if TYPE_CHECKING:
    import torch


def from_nvml() -> Gpu | None:
    """The GPU that this process will use, if that is certain; CUDA stays uninitialised.

    None where there is no GPU, where NVML cannot be asked, and where the visible GPUs differ; `why_unknown` says which.
    """
    return _by_nvml()[0]


def why_unknown() -> str:
    """Why `from_nvml` does not know the GPU; empty where it does."""
    return _by_nvml()[1]


def _by_nvml() -> tuple[Gpu | None, str]:
    build = _torch_build()
    if build is not None and build.hip:
        return None, "torch is built for ROCm, and NVML knows only NVIDIA GPUs"
    return _visible(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER"))


class _Listed(NamedTuple):
    """One GPU, as NVML lists it."""

    name: str
    capability: tuple[int, int]
    uuid: str  # these two are empty where nobody needs them
    instances: tuple[str, ...]  # UUIDs of its MIG instances


@lru_cache(maxsize=8)
def _visible(chosen: str | None, order: str | None) -> tuple[Gpu | None, str]:
    """What a process with this CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER will use, or why that is not known."""
    try:
        gpus, driver = _ask_nvml(uuids=chosen is not None and "-" in chosen)
    except Exception:  # no NVML, no driver, or a module of that name that is something else
        gpus, driver = [], ""
    if not gpus:
        return None, "NVML reports no GPU"
    seen = gpus
    if chosen is not None:
        numbers, places = _choose(chosen, gpus)
        if not places:
            return None, "CUDA_VISIBLE_DEVICES excludes every GPU"
        if numbers and order != "PCI_BUS_ID" and _differ(gpus):
            return None, f"CUDA_VISIBLE_DEVICES counts GPUs from the fastest on, and they differ ({_kinds(gpus)})"
        seen = [gpus[place] for place in places]
    if _differ(seen):
        return None, f"the visible GPUs differ ({_kinds(seen)})"
    return Gpu(", ".join(dict.fromkeys(one.name for one in seen)), seen[0].capability, driver), ""


def _differ(gpus: list[_Listed]) -> bool:
    return len({one.capability for one in gpus}) > 1


def _kinds(gpus: list[_Listed]) -> str:
    return ", ".join(dict.fromkeys(f"sm_{one.capability[0]}{one.capability[1]}" for one in gpus))


def _choose(chosen: str, gpus: list[_Listed]) -> tuple[bool, list[int]]:
    """Whether CUDA_VISIBLE_DEVICES holds numbers, and the places in ``gpus`` that its entries name.

    As CUDA reads it: the first entry says whether all are numbers, GPUs or instances, the list ends before an entry
    that names nothing, and one that comes twice leaves nothing.
    """
    entries = [entry.strip() for entry in chosen.split(",")]
    kind = next((kind for kind in ("GPU-", "MIG-") if entries[0].upper().startswith(kind)), "")
    places: list[int] = []
    keys: list[str] = []
    for entry in entries:
        if not entry.upper().startswith(kind):
            break
        place = _place(entry, kind, gpus)
        if place is None:
            break
        key = entry.upper() if kind else str(place)
        if key in keys:
            return not kind, []
        keys.append(key)
        places.append(place)
    return not kind, places


def _place(entry: str, kind: str, gpus: list[_Listed]) -> int | None:
    """The one GPU that an entry of CUDA_VISIBLE_DEVICES names, or None."""
    if not kind:
        number = re.match(r"\+?[0-9]+", entry)  # CUDA reads digits up to what is none
        return int(number[0]) if number and int(number[0]) < len(gpus) else None
    wanted = entry.upper()
    if wanted.startswith("MIG-GPU-"):
        wanted = wanted[len("MIG-") :].partition("/")[0]
        kind = "GPU-"
    uuids = [(one.uuid,) if kind == "GPU-" else one.instances for one in gpus]
    named = [(place, uuid) for place, several in enumerate(uuids) for uuid in several if uuid.startswith(wanted)]
    return named[0][0] if len(named) == 1 else None


def _ask_nvml(uuids: bool) -> tuple[list[_Listed], str]:
    """All GPUs by their PCI bus, as NVML numbers them, and the driver's version.

    Raises:
        Exception: whatever an odd NVML or a missing one raises.
    """
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        gpus = []
        for handle in handles:
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            uuid = _text(pynvml.nvmlDeviceGetUUID(handle)).upper() if uuids else ""
            instances = tuple(_mig_instances(pynvml, handle)) if uuids else ()
            gpus.append(_Listed(_text(pynvml.nvmlDeviceGetName(handle)), (int(major), int(minor)), uuid, instances))
        return gpus, _text(pynvml.nvmlSystemGetDriverVersion())
    finally:
        try:
            pynvml.nvmlShutdown()
        except Exception:  # what it has told before is no less so
            pass


def _mig_instances(pynvml: Any, handle: Any) -> list[str]:
    """UUIDs of a GPU's MIG instances; none where it has none or NVML is too old to tell."""
    found = []
    try:
        for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
            except Exception:  # not every place is taken
                continue
            found.append(_text(pynvml.nvmlDeviceGetUUID(instance)).upper())
    except Exception:
        pass
    return found


def _text(value: Any) -> str:
    """A name is for people: one that is not UTF-8 makes nothing else about a GPU uncertain."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def known() -> Gpu | None:
    """The GPU that a call has told of, else the one that NVML tells of, else None."""
    return _told[-1] if _told else from_nvml()


def from_tensor(tensor: torch.Tensor) -> Gpu | None:
    """The GPU that a call's tensor lies on, or None for a CPU tensor."""
    return _tell(_from_index(index_of(tensor.device))) if tensor.is_cuda else None


def from_torch() -> Gpu | None:
    """The current GPU as torch sees it. Initialises CUDA, so it is for our own processes only."""
    import torch

    return _from_index(torch.cuda.current_device()) if torch.cuda.is_available() else None


def for_engines() -> tuple[Gpu | None, str]:
    """The GPU that an engine started from here will use, or why that is not certain; neither where there is none.

    May initialise CUDA, as `from_torch` does.
    """
    found = from_nvml()
    if found is not None:
        return found, ""
    try:
        current = from_torch()
        kinds = _torch_kinds() if current is not None else []
    except Exception:  # no torch, or one that does not load
        current, kinds = None, []
    if len(kinds) > 1:
        return None, f"the visible GPUs differ ({', '.join(kinds)})"
    if current is None:
        why = why_unknown()
        return None, why if "differ" in why else ""
    return _tell(current), ""


def _torch_kinds() -> list[str]:
    import torch

    return list(dict.fromkeys(_from_index(index).sm for index in range(torch.cuda.device_count())))


_told: list[Gpu] = []  # at most one


def _tell(device: Gpu) -> Gpu:
    _told[:] = [device]
    return device


@lru_cache(maxsize=16)
def _from_index(index: int) -> Gpu:
    import torch

    return Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), cuda=_runs_cuda())


def index_of(device: torch.device) -> int:
    """The number of a GPU; a torch.device without one means the current GPU."""
    if device.index is not None:
        return device.index
    import torch

    return torch.cuda.current_device()


class _Build(NamedTuple):
    """What torch is built for; a CPU build has neither."""

    cuda: str | None
    hip: str | None


def _torch_build() -> _Build | None:
    """What torch is built for, torch itself not imported; None where there is no torch or it does not say."""
    version = getattr(sys.modules.get("torch"), "version", None)
    if version is not None:
        return _Build(getattr(version, "cuda", None), getattr(version, "hip", None))
    return _build_in_source()


@lru_cache(maxsize=1)
def _build_in_source() -> _Build | None:
    try:
        spec = PathFinder.find_spec("torch")
        (folder,) = spec.submodule_search_locations  # type: ignore[union-attr, misc]
        with open(os.path.join(folder, "version.py"), encoding="utf-8") as file:
            body = ast.parse(file.read()).body
    except Exception:  # no torch, or one that is made otherwise
        return None
    told: dict[str, Any] = {}
    for node in body:
        names = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for name in names:
            if isinstance(name, ast.Name) and isinstance(node.value, ast.Constant):  # type: ignore[attr-defined]
                told[name.id] = node.value.value  # type: ignore[attr-defined]
    return _Build(told.get("cuda"), told.get("hip"))


@lru_cache(maxsize=1)
def _runs_cuda() -> bool:
    """Whether torch's GPUs are NVIDIA's: torch is built for CUDA, and so is Triton's backend.

    Makers of other chips show theirs as torch.cuda, too, with capabilities and names of their own.
    """
    build = _torch_build()
    if build is None or not build.cuda or build.hip:
        return False
    try:
        from triton.runtime import driver

        return driver.active.get_current_target().backend == "cuda"
    except Exception:  # no Triton, or none that finds a GPU: torch alone tells
        return True


def not_nvidia(device: Gpu) -> str | None:
    """Why this device cannot run what is written for NVIDIA's, or None."""
    return None if device.cuda else "not an NVIDIA GPU"


def on_nvidia(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies on an NVIDIA GPU, or on none."""
    device = from_tensor(tensor)
    return device is None or not_nvidia(device) is None


@lru_cache(maxsize=16)
def capability(index: int) -> tuple[int, int]:
    """CUDA's compute capability of a device that a call already uses; (0, 0) of another maker's."""
    import torch

    return torch.cuda.get_device_capability(index) if _runs_cuda() else (0, 0)


def capability_of(tensor: Any) -> tuple[int, int] | None:
    """Of the GPU that a call's tensor lies on; None on a CPU."""
    return capability(tensor.device.index) if tensor.is_cuda else None


@lru_cache(maxsize=16)
def sm_count(index: int) -> int:
    """Streaming multiprocessors of a device that a call already uses."""
    import torch

    return torch.cuda.get_device_properties(index).multi_processor_count


# every compute capability of NVIDIA's GPUs that CUDA 12 or 13 has compiled for
CAPABILITIES = (
    (5, 0), (5, 2), (5, 3), (6, 0), (6, 1), (6, 2), (7, 0), (7, 2), (7, 5), (8, 0), (8, 6), (8, 7), (8, 8), (8, 9),
    (9, 0), (10, 0), (10, 1), (10, 3), (11, 0), (12, 0), (12, 1),
)  # fmt: skip

# KiB of shared memory that one block may ask for, by compute capability
SHARED_KIB = {(8, 0): 163, (8, 7): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}


def shared_memory(index: int) -> int:
    """Bytes of shared memory that one block can have, on a device that a call already uses."""
    import torch

    told = getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", None)
    return told or SHARED_KIB.get(capability(index), 48) * 1024


def on_other_device(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies on another GPU than the current one. Triton launches on the current one, whatever tensors
    say."""
    import torch

    return tensor.is_cuda and tensor.device.index != torch.cuda.current_device()


def has_16b_rows(tensor: torch.Tensor) -> bool:
    """Whether every row begins on 16 bytes. Kernels rely on it for q and out, and tell Triton so.

    Triton would find it out by itself, too, but then it would compile every kernel twice. Without it, kernels move two
    bytes at a time.
    """
    if tensor.data_ptr() % 16:
        return False
    size = tensor.element_size()
    # at every call: a generator takes twice as long
    for stride in tensor.stride()[:-1]:  # noqa: SIM110
        if stride * size % 16:
            return False
    return True


def ensure_16b_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy whose rows begin on 16 bytes, where its own do not."""
    if has_16b_rows(tensor):
        return tensor
    import torch

    return tensor.clone(memory_format=torch.contiguous_format)


def capturing() -> bool:
    """Whether the current stream records a CUDA graph; False, and CUDA untouched, before CUDA is in use."""
    torch = sys.modules.get("torch")  # asked at every served call, and a host without torch captures nothing
    return torch is not None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def current_stream() -> int:
    """The current stream's handle; 0, and CUDA untouched, before CUDA is in use."""
    torch = sys.modules.get("torch")
    return torch.cuda.current_stream().cuda_stream if torch is not None and torch.cuda.is_initialized() else 0


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
