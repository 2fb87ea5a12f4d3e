"""The routes by which SGLang's backends launch an index builder, each over a made-up batch."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from mla_patch.compat.sglang import kv_indices
from mla_patch.drive.batch import Batch, expected_page_table, expected_token_ids
from mla_patch.drive.sglang.backends import bare_backend, forward_batch, one_rank, triton_backend

TOKEN_IDS = "create_flashinfer_kv_indices_triton"

PAGE_TABLE = "create_flashmla_kv_indices_triton"


class _TorchOn:
    """``torch``, with ``torch.empty`` on the given device whatever the caller names."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.empty(*args, device=self._device, **kwargs)


@dataclass(frozen=True)
class BuiltIndices:
    """What one of the host's methods built, and what it ought to have built."""

    route: str  # "triton_backend decode"
    builder: str  # the kernel's name in the host
    out: torch.Tensor
    expected: torch.Tensor

    @property
    def wrong(self) -> int:
        """How many entries differ from the definition."""
        return int((self.out != self.expected).sum())


def token_ids_decode(batch: Batch) -> BuiltIndices:
    """Flat token ids, as the Triton backend builds them for a decode step."""
    backend = triton_backend(batch)
    backend.init_forward_metadata(forward_batch(batch, "DECODE", backend))
    out = backend.forward_metadata.kv_indices
    return BuiltIndices("triton_backend decode", TOKEN_IDS, out, expected_token_ids(batch, batch.lens_list))


def token_ids_extend(batch: Batch) -> BuiltIndices:
    """Flat token ids of the cached prefixes, as the Triton backend builds them for a prefill step."""
    prefix = [length // 2 for length in batch.lens_list]
    backend = triton_backend(batch)
    backend.init_forward_metadata(forward_batch(batch, "EXTEND", backend, prefix))
    out = backend.forward_metadata.kv_indices
    return BuiltIndices("triton_backend extend", TOKEN_IDS, out, expected_token_ids(batch, prefix))


def page_table_flashmla(batch: Batch) -> BuiltIndices:
    """A page table of 64-token pages, as the FlashMLA backend builds it for a decode step."""
    module = importlib.import_module("sglang.srt.layers.attention.flashmla_backend")
    backend = bare_backend(
        module.FlashMLABackend, batch, num_q_heads=16, page_size=64, max_context_len=batch.table.shape[1]
    )
    # FlashMLA's own schedule is not on trial, and without its package there is none
    with mock.patch.object(module, "get_mla_metadata", lambda *args, **kwargs: (None, None)):
        backend.init_forward_metadata(forward_batch(batch, "DECODE", backend))
    out = backend.forward_metadata.block_kv_indices
    return BuiltIndices("flashmla_backend decode", PAGE_TABLE, out, expected_page_table(batch, 64, out.shape[1]))


def page_table_cutlass(batch: Batch) -> BuiltIndices:
    """A page table of 128-token pages, as the Cutlass MLA backend builds it for a decode step."""
    module = importlib.import_module("sglang.srt.layers.attention.cutlass_mla_backend")
    backend = bare_backend(module.CutlassMLABackend, batch)
    with ExitStack() as stack:
        # the backend sizes and allocates a workspace, on "cuda" by name, which nothing here reads
        stack.enter_context(
            mock.patch.object(module, "cutlass_mla_get_workspace_size", lambda *args, **kwargs: 0, create=True)
        )
        stack.enter_context(mock.patch.object(module, "torch", _TorchOn(batch.device)))
        backend.init_forward_metadata(forward_batch(batch, "DECODE", backend))
    out = backend.forward_metadata.block_kv_indices
    return BuiltIndices("cutlass_mla_backend decode", PAGE_TABLE, out, expected_page_table(batch, 128, out.shape[1]))


def page_table_trtllm(batch: Batch, page: int) -> BuiltIndices:
    """A page table of ``page``-token pages, as the TRT-LLM MLA backend builds it."""
    module = importlib.import_module("sglang.srt.layers.attention.trtllm_mla_backend")
    backend = bare_backend(module.TRTLLMMLABackend, batch, page_size=page, _kernel_page_multiplier=1)
    given = {
        "plan": forward_batch(batch, "DECODE", backend).kv_loc_plan,
        "batch_size": len(batch.lens_list),
        "max_blocks": backend._calc_padded_blocks(max(batch.lens_list)),
        "req_pool_indices": batch.rows,
        "seq_lens": batch.lens,
        "device": batch.device,
    }
    names = inspect.signature(backend._create_block_kv_indices).parameters
    out = backend._create_block_kv_indices(**{name: given[name] for name in names})
    return BuiltIndices(
        f"trtllm_mla_backend page {page}", PAGE_TABLE, out, expected_page_table(batch, page, out.shape[1])
    )


ROUTES: dict[str, Callable[[Batch], BuiltIndices]] = {
    "triton_backend decode": token_ids_decode,
    "triton_backend extend": token_ids_extend,
    "flashmla_backend decode": page_table_flashmla,
    "cutlass_mla_backend decode": page_table_cutlass,
    "trtllm_mla_backend page 32": lambda batch: page_table_trtllm(batch, 32),
    "trtllm_mla_backend page 64": lambda batch: page_table_trtllm(batch, 64),
}


def run(route: str, batch: Batch) -> BuiltIndices:
    """Let the host build ``batch``'s indices by one of ``routes``."""
    with one_rank(), _poisoned_memory():
        return ROUTES[route](batch)


def routes() -> Iterator[str]:
    """The routes whose backend exists in the SGLang on this path."""
    for route in ROUTES:
        if importlib.util.find_spec(f"sglang.srt.layers.attention.{route.split()[0]}") is not None:
            yield route


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives the largest number, so that an entry nobody wrote cannot be right by chance."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on a GPU, that cumsum is not among those algorithms
            yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def builder(name: str, version: str | None) -> Any:
    """The host's index builder of that name, from where ``version`` has it, or else from wherever it is."""
    find = (kv_indices.page_table, kv_indices.token_indices)
    homes = [home.module for told in (version, None) for homes in find for home in homes(told) if home.name == name]
    home = next((home for home in dict.fromkeys(homes) if importlib.util.find_spec(home) is not None), homes[0])
    return getattr(importlib.import_module(home), name)


def launch(kernel: Any, builder: str, batch: Batch, out: torch.Tensor | None = None) -> Callable[[], None]:
    """One launch of ``builder``, the host's kernel or what stands in for it, into ``out`` or a buffer of its own."""
    count, device = len(batch.lens_list), batch.device
    if builder == TOKEN_IDS:
        indptr = torch.tensor([0, *batch.lens_list], device=device).cumsum(0).to(torch.int32)
        if out is None:
            out = torch.empty(sum(batch.lens_list), dtype=torch.int64, device=device)
        args = (batch.table, batch.rows, batch.lens, indptr, None, out, batch.table.stride(0))
        return lambda: kernel[(count,)](*args)
    if out is None:
        out = torch.empty((count, -(-max(batch.lens_list) // 64)), dtype=torch.int32, device=device)
    # from 0.5.13 the kernel wants the grid's second axis to cover the width
    blocks = getattr(sys.modules[kernel.__module__], "get_num_kv_index_blocks_flashmla", None)
    grid = (count,) if blocks is None else (count, blocks(out.shape[1], 64))
    table = (batch.table, batch.rows, batch.lens, None, out, batch.table.stride(0), out.stride(0))
    return lambda: kernel[grid](*table)
