"""SGLang's attention backends with no model behind them, and the steps that they are given."""

from __future__ import annotations

import dis
import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from mla_patch.drive.batch import Batch


def triton_backend(batch: Batch, **known: Any) -> Any:
    module = importlib.import_module("sglang.srt.layers.attention.triton_backend")
    count = len(batch.lens_list)
    usual: dict[str, Any] = {
        "kv_indptr": torch.zeros(count + 1, dtype=torch.int32, device=batch.device),
        "qo_indptr": torch.zeros(count + 1, dtype=torch.int64, device=batch.device),
        "num_head": 16,
        "num_kv_head": 1,
        "v_head_dim": 512,
        "max_kv_splits": 8,
        "static_kv_splits": True,
        "device_core_count": 0,
        "lean_total_programs": 1,
        "lean_block_m": 1,
    }
    return bare_backend(module.TritonAttnBackend, batch, **usual | known)


def as_started(batch: Batch) -> dict[str, Any]:
    """How a server's backend would decode on this device; on a CPU, the smaller numbers of the trials."""
    if batch.device.type != "cuda":
        return {}
    module = importlib.import_module("sglang.srt.layers.attention.triton_backend")
    cores = torch.cuda.get_device_properties(batch.device).multi_processor_count
    cap = getattr(module, "_mla_decode_kv_splits_cap", None)  # from 0.5.12
    splits = 8 if cap is None else cap(8, cores, batch.table.shape[1])
    pdl = getattr(module, "is_arch_support_pdl", None)  # likewise
    own = {"device_core_count": cores, "static_kv_splits": False, "max_kv_splits": splits}
    return own | {"use_pdl": pdl is not None and pdl() is True}  # it may be stood in for


def as_deterministic(batch: Batch) -> dict[str, Any]:
    """What TritonAttnBackend.__init__ sets for deterministic inference, with tiles of 64 keys for 256."""
    splits = -(-batch.table.shape[1] // 64)
    return {
        "enable_deterministic": True, "split_tile_size": 64, "static_kv_splits": False, "max_kv_splits": splits,
    }  # fmt: skip


def bare_backend(cls: type, batch: Batch, **known: Any) -> Any:
    """An instance with no model behind it: all that ``__init__`` would set is None, but for what is known here."""
    backend: Any = object.__new__(cls)
    for base in cls.__mro__:
        code = getattr(
            inspect.unwrap(vars(base).get("__init__", object.__init__)), "__code__", None
        )  # ours warms up after it
        names = (step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR") if code else ()
        vars(backend).update((name, None) for name in names if not hasattr(cls, name))
    common = {"device": batch.device, "req_to_token": batch.table, "page_size": 1, "dcp_size": 1, "dcp_rank": 0}
    vars(backend).update(common | known)
    backend.kv_index_translator = translator(batch, backend.page_size)
    return backend


def translator(batch: Batch, page: int) -> Any:
    """From 0.5.20 backends ask this class of the host's for indices; over a plain pool it calls the builder."""
    if importlib.util.find_spec("sglang.srt.mem_cache.kv_index_translator") is None:
        return None
    module = importlib.import_module("sglang.srt.mem_cache.kv_index_translator")
    given = {
        "req_to_token": batch.table,
        "token_to_kv_pool_allocator": None,
        "token_to_kv_pool": None,
        "page_size": page,
        "device": str(batch.device),
    }
    names = inspect.signature(module.KVIndexTranslator).parameters
    return module.KVIndexTranslator(**{name: value for name, value in given.items() if name in names})


class ForwardBatch(SimpleNamespace):
    """A class of its own, since 0.5.19 keeps weak references to these."""


def forward_batch(batch: Batch, mode: str, backend: Any, prefix: Sequence[int] | None = None) -> Any:
    """What a scheduler hands ``backend`` for one step, as far as its metadata method reads it."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    prefix = list(prefix) if prefix is not None else [0] * len(batch.lens_list)
    extend = [length - cached for length, cached in zip(batch.lens_list, prefix, strict=True)]
    reads = {"req_pool_indices": batch.rows, "seq_lens": batch.lens, "seq_lens_cpu": batch.lens.cpu()}
    # from 0.5.22 a step's reads are planned once, by the translator
    plan = getattr(backend.kv_index_translator, "plan", None)
    return ForwardBatch(
        forward_mode=getattr(ForwardMode, mode),
        batch_size=len(batch.lens_list),
        seq_lens_sum=sum(batch.lens_list),
        extend_prefix_lens=torch.tensor(prefix, device=batch.device),
        extend_prefix_lens_cpu=prefix,
        extend_seq_lens=torch.tensor(extend, device=batch.device),
        extend_seq_lens_cpu=extend,
        kv_loc_plan=plan(**reads, write_virtual=None) if plan is not None else None,
        spec_info=None,
        encoder_lens=None,
        out_cache_loc=None,
        **reads,
    )


class PrefillMetadata(SimpleNamespace):
    """A prefill step's metadata, which only the attention kernel would read."""

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def one_rank() -> Iterator[None]:
    """From 0.5.16 backends ask a process-wide context how decode is split over ranks; a server publishes it."""
    with ExitStack() as stack:
        if importlib.util.find_spec("sglang.srt.runtime_context") is not None:
            parallel = importlib.import_module("sglang.srt.runtime_context").get_parallel()
            if hasattr(type(parallel), "dcp_enabled"):
                stack.enter_context(parallel.override(dcp_enabled=False))
        yield
