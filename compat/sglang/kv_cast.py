"""SGLang: attention of the FA3 and FlashInfer backends over a 16-bit copy of an 8-bit MLA pool, per release.

    FlashAttentionBackend.forward_extend       srt.layers.attention.flashattention_backend
    FlashInferMLAAttnBackend.forward_extend    srt.layers.attention.flashinfer_mla_backend; FlashMLA's, CUTLASS MLA's
                                               and TRT-LLM MLA's prompts come here by inheritance

In every release both say `get_key_buffer(layer).to(q.dtype)` of the whole pool of a layer: for target verify, draft
extend, and the prompts that attend to a prefix in MLA's absorbed form. Parameters, pool and the write of the new keys,
which comes first, are forward_decode's: see `backends`.

FA3 finds its pages by the metadata's page_table and cache_seqlens_int32, of requests. Target verify with topk > 1 reads
the drafts by a second table, in forward_metadata_spec_decode_expand, of slots for every page size.

FlashInfer finds them by a list in the planned wrapper. An eager plan keeps a list of which every entry counts. A
wrapper for CUDA graphs has a buffer, and the last number of _kv_indptr_buf tells how much of it counts: plan() writes
both, and so does the host's fast_mla_prefill_plan (from 0.5.18). Replays of DFLASH (from 0.5.19) do not write the
latter.

Neither applies a scale: what an 8-bit MLA pool stores is a plain cast.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from mla_patch.compat.eras import era_of
from mla_patch.compat.sglang import backends as sglang_backends
from mla_patch.compat.sglang.backends import latent_pool, pool_of, shares_context
from mla_patch.compat.types import Home

LATENT, WIDTH = 512, 576
_EIGHT_BIT = ("torch.float8_e4m3fn", "torch.float8_e5m2")
_SIXTEEN_BIT = ("torch.bfloat16", "torch.float16")

NOT_ABSORBED = "keys that come with the call: the layer is not in MLA's absorbed form"
NOT_16_BIT = "a query that is not 16 bits wide"
WINDOW = "a window, or encoder keys"
PARALLEL = "context parallelism: the call does not read the pool"
OTHER_POOL = "a pool in another layout"
OTHER_TABLE = "a page table in another layout"
SLOTS_IN_PAGES = "a tree of drafts over pages: its table holds slots"
RAGGED = "keys that come with the call: the call does not read the pool"
NO_LENGTHS = "a graph whose replays do not give the number of keys"
MANY = "the requests name more tokens than the pool holds"
NOTHING = "no request"


class Table(NamedTuple):
    """Pages that a call reads."""

    ids: Any  # [B, W] int32
    lens: Any  # [B], tokens; None: all columns count
    page_size: int


class ExtendCall:
    """One call of forward_extend, of either backend and of any release."""

    __slots__ = ("args", "backend", "batch", "k", "kwargs", "layer", "q", "v")
    tensors = ("q",)
    home: type[sglang_backends.BackendCall]  # which says where the backend is

    def __init__(self, backend, q, k, v, layer, forward_batch, *args, **kwargs):
        self.backend = backend
        self.q = q
        self.k = k
        self.v = v
        self.layer = layer
        self.batch = forward_batch
        self.args = args
        self.kwargs = kwargs

    def tables(self) -> list[Table]:
        raise NotImplementedError

    def problem(self) -> str | None:
        """Why the backend's own tables cannot be followed, or None."""
        raise NotImplementedError


class Fa3Extend(ExtendCall):
    __slots__ = ()
    home = sglang_backends.Fa3Call

    def _reads_a_tree(self) -> bool:
        return (getattr(self.backend, "topk", 0) or 0) > 1 and self.batch.forward_mode.is_target_verify()

    def tables(self) -> list[Table]:
        metadata, size = self.backend.forward_metadata, self.backend.page_size
        tables = [Table(metadata.page_table, metadata.cache_seqlens_int32, size)]
        if self._reads_a_tree():
            drafts = self.backend.forward_metadata_spec_decode_expand
            tables.append(Table(drafts.page_table, drafts.cache_seqlens_int32, size))
        return tables

    def problem(self) -> str | None:
        if not self.backend.use_mla:
            return NOT_ABSORBED
        return SLOTS_IN_PAGES if self._reads_a_tree() and self.backend.page_size > 1 else None


class FlashInferExtend(ExtendCall):
    __slots__ = ()
    home = sglang_backends.FlashInferCall

    def tables(self) -> list[Table]:
        wrapper = self.backend.forward_metadata.prefill_wrapper
        lens = wrapper._kv_indptr_buf[-1:] if wrapper._use_cuda_graph else None
        return [Table(wrapper._kv_indices_buf[None], lens, wrapper._page_size)]

    def problem(self) -> str | None:
        metadata = self.backend.forward_metadata
        if getattr(metadata, "use_ragged", False):
            return RAGGED
        wrapper: Any = getattr(metadata, "prefill_wrapper", None)
        if getattr(wrapper, "_kv_indices_buf", None) is None:
            return OTHER_TABLE
        kind = getattr(getattr(self.batch, "spec_info", None), "spec_input_type", None)
        if wrapper._use_cuda_graph and "DFLASH" in getattr(kind, "name", ""):
            return NO_LENGTHS
        return None


def problem(call: ExtendCall) -> str | None:
    """Why the engine casts the pool, or None."""
    layer = call.layer
    pool = latent_pool(pool_of(call))
    if pool is None:
        return OTHER_POOL
    if str(pool.dtype) not in _EIGHT_BIT:
        return f"a cache of {str(pool.dtype).removeprefix('torch.')}: nothing to cast"
    if (layer.head_dim, layer.v_head_dim, layer.tp_k_head_num) != (WIDTH, LATENT, 1):
        return NOT_ABSORBED
    if str(call.q.dtype) not in _SIXTEEN_BIT:
        return NOT_16_BIT
    window = getattr(layer, "sliding_window_size", None)
    if layer.is_cross_attention or getattr(layer, "use_irope", False) or (window is not None and window > -1):
        return WINDOW
    if shares_context(sys.modules[call.home.module]) or getattr(call.batch, "attn_cp_metadata", None) is not None:
        return PARALLEL
    reason = call.problem()
    if reason is not None:
        return reason
    cache = read(call)
    if cache.dtype is not pool.dtype or cache.shape[1:] != (1, WIDTH) or cache.stride(2) != 1:
        return OTHER_POOL
    tables = call.tables()
    for table in tables:
        if str(table.ids.dtype) != "torch.int32" or table.ids.dim() != 2 or cache.shape[0] % table.page_size:
            return OTHER_TABLE
    if not tables[0].ids.numel():
        return NOTHING
    named = getattr(call.batch, "seq_lens_sum", None)  # the engine's number; no address depends on it
    return MANY if isinstance(named, int) and named > cache.shape[0] else None


def read(call: ExtendCall) -> Any:
    """What the pool holds of the call's layer: [N, 1, 576]."""
    return pool_of(call).get_key_buffer(call.layer.layer_id)


@dataclass(frozen=True)
class CastWarmup:
    """What a backend's calls can ask of the cast."""

    device: Any
    dtype: Any  # of its queries
    cache_dtype: Any
    page_sizes: tuple[int, ...]


def warmup_of(backend: Any, runner: Any) -> CastWarmup | None:
    """What a backend can ask, once it is built; None: nothing."""
    config = runner.model_config
    shape = getattr(config, "kv_lora_rank", None), getattr(config, "qk_rope_head_dim", None)
    if shape != (LATENT, WIDTH - LATENT) or not getattr(backend, "use_mla", True):
        return None
    if str(runner.kv_cache_dtype) not in _EIGHT_BIT:
        return None
    # FlashInfer's lists are of slots, but for the first releases
    sizes = tuple(dict.fromkeys((1, backend.page_size)))
    return CastWarmup(runner.device, runner.dtype, runner.kv_cache_dtype, sizes)


CALLS: tuple[type[ExtendCall], ...] = (Fa3Extend, FlashInferExtend)


def homes(call: type[ExtendCall], version: str | None) -> list[Home]:
    """``forward_extend`` of the backend that makes ``call``, in ``version``; in every shape where that is unknown."""
    home = call.home
    name = f"{home.owner}.forward_extend"
    return [Home(home.module, name, params, bind=call) for params in era_of(sglang_backends.PARAMS[home], version)]
