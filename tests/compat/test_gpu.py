"""Devices: which one launches go to."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import test_decode
import test_decode_splits
import test_kv_cast
import test_prefill_indices
import test_sparse_decode
import test_sparse_prefill
import torch

from mla_patch.compat import gpu
from mla_patch.compat.triton import interpreted
from mla_patch.kernels import decode
from mla_patch.kernels.cache import dequantize, kv_cast
from mla_patch.kernels.cache.layouts import V4
from mla_patch.kernels.decode import splits as decode_splits
from mla_patch.kernels.indices import kv as kv_indices
from mla_patch.kernels.indices import prefill as prefill_indices
from mla_patch.kernels.sparse import decode as sparse_decode
from mla_patch.kernels.sparse import prefill as sparse_prefill


def tensor(index: int | None) -> Any:
    return SimpleNamespace(is_cuda=index is not None, device=SimpleNamespace(index=index))


def test_on_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert gpu.on_other_device(tensor(0)) and gpu.on_other_device(tensor(2)) and not gpu.on_other_device(tensor(1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("CUDA was asked about a CPU tensor"))
    assert not gpu.on_other_device(tensor(None))


def test_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch tells, else what the chip is known to have, else what every chip has."""
    told = SimpleNamespace(shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: told if index == 0 else SimpleNamespace())
    monkeypatch.setattr(gpu, "capability", lambda index: {1: (8, 9), 2: (7, 5)}[index])
    assert [gpu.shared_memory(index) for index in range(3)] == [232448, 99 * 1024, 48 * 1024]


def token_indices() -> None:
    table, lens = torch.arange(40, dtype=torch.int32).view(2, 20), torch.tensor([3, 20])
    out = torch.full((23,), -1)
    kv_indices.build_token_indices(table, torch.tensor([1, 0]), lens, torch.tensor([0, 3]), out)
    assert out.tolist() == [20, 21, 22, *range(20)]


def paged_tokens() -> None:
    slots = torch.tensor([2, 0], dtype=torch.int32)
    assert not dequantize.dequantize_k_cache_paged(torch.zeros(3, 1, 656, dtype=torch.uint8), slots).any()


CALLS: dict[str, tuple[Any, list[str], Callable[[], None]]] = {
    "decode": (decode.launch, ["_decode_kernel", "_merge_kernel"], lambda: test_decode.Case([40, 3], 2).check()),
    "pages": (decode.launch, ["_decode_kernel", "_merge_kernel"], lambda: test_decode.Paged([40, 3], 2, 16).check()),
    "splits": (
        decode_splits,
        ["_splits_kernel", "_merge_splits_kernel"],
        lambda: test_decode_splits.Splits([40, 3], 2, 2).check(),
    ),
    "dequantize": (dequantize, ["_dequantize_kernel"], paged_tokens),
    "sparse prefill": (sparse_prefill, ["sparse_prefill_kernel"], lambda: test_sparse_prefill.Case(topk=9).check()),
    "sparse decode": (
        sparse_decode,
        ["sparse_query_kernel", "sparse_kernel"],
        lambda: test_sparse_decode.Case(V4, topk=9).check(),
    ),
    "combine": (
        prefill_indices.launch,
        ["_combine_kernel"],
        lambda: test_prefill_indices.Chunk([9], [2], 4, 4, 4).check(),
    ),
    "swa ids": (prefill_indices.launch, ["_swa_kernel"], test_prefill_indices.test_golden_windows),
    "cast pages": (kv_cast, ["_cast_kernel"], lambda: test_kv_cast.test_a_list_of_slots_without_lengths(True)),
    "token ids": (kv_indices.launch, ["_kv_indices_kernel"], token_indices),
}


@pytest.mark.skipif(not interpreted(), reason="on a GPU, test_two_devices shows it")
@pytest.mark.parametrize("name", CALLS)
def test_launches_follow_the_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another device is the current one: every launch is made while theirs is, and once."""
    module, kernels, call = CALLS[name]
    current, launched = ["another"], []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = str(device)

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *problem: object) -> None:
            current.pop()

    class Watched:
        def __init__(self, kernel: str) -> None:
            self.name, self.kernel = kernel, getattr(module, kernel)

        def __getitem__(self, grid: Any) -> Any:
            launched.append((self.name, current[-1]))
            return self.kernel[grid]

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(gpu, "on_other_device", lambda tensor: current[-1] != str(tensor.device))
    for kernel in kernels:
        monkeypatch.setattr(module, kernel, Watched(kernel))
    call()
    assert launched == [(kernel, "cpu") for kernel in kernels] and current == ["another"]


@pytest.mark.gpu
@pytest.mark.skipif(interpreted() or torch.cuda.device_count() < 2, reason="needs two GPUs and TRITON_INTERPRET=0")
@pytest.mark.parametrize("name", ["decode", "pages", "splits"])
def test_two_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (test_decode, test_decode_splits):
        monkeypatch.setattr(module, "DEVICE", "cuda:1")
    with torch.cuda.device(0):
        CALLS[name][2]()
        assert torch.cuda.current_device() == 0
