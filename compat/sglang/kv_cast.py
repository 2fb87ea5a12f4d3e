"""SGLang: attention of the FA3 and FlashInfer backends over a 16-bit copy of an 8-bit MLA pool, per release.

    FlashAttentionBackend.forward_extend       srt.layers.attention.flashattention_backend
    FlashInferMLAAttnBackend.forward_extend    srt.layers.attention.flashinfer_mla_backend; FlashMLA's, CUTLASS MLA's
                                               and TRT-LLM MLA's prompts come here by inheritance

In every release both say `get_key_buffer(layer).to(q.dtype)` of the whole pool of a layer: for target verify, draft
extend, and the prompts that attend to a prefix in MLA's absorbed form. Parameters, pool and the write of the new keys,
which comes first, are forward_decode's: see `sglang_backends`.

FA3 finds its pages by the metadata's page_table and cache_seqlens_int32, of requests. Target verify with topk > 1 reads
the drafts by a second table, in forward_metadata_spec_decode_expand, of slots whatever the page size.

FlashInfer finds them by a list in the planned wrapper. An eager plan keeps a list of which every entry counts. A
wrapper for CUDA graphs has a buffer, and the last number of _kv_indptr_buf tells how much of it counts: plan() writes
both, and so does the host's fast_mla_prefill_plan (from 0.5.18). Replays of DFLASH (from 0.5.19) do not write the
latter.

Neither applies a scale: what an 8-bit MLA pool stores is a plain cast.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import wrapt

from mla_patch.compat.sglang import backends as sglang_backends
from mla_patch.compat.sglang import decode as sglang
from mla_patch.compat.sglang.backends import latent_pool, pool_of, shares_context
from mla_patch.compat.types import Change, Edit, Target, Undo

_HOOK = "mla_patch.hooks.sglang.kv_cast"
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
    """One call of forward_extend, whatever the backend and the release."""

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

    def renumbered(self, places: list[Any]) -> dict[str, Any]:
        """The backend's attributes with ``places`` instead of the ids of `tables`."""
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

    def renumbered(self, places: list[Any]) -> dict[str, Any]:
        names = ("forward_metadata", "forward_metadata_spec_decode_expand")
        return {
            name: _Seen(getattr(self.backend, name), page_table=place)
            for name, place in zip(names, places, strict=False)
        }


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

    def renumbered(self, places: list[Any]) -> dict[str, Any]:
        metadata = self.backend.forward_metadata
        wrapper = _Wrapper(metadata.prefill_wrapper, places[0][0])
        return {"forward_metadata": _Seen(metadata, prefill_wrapper=wrapper)}


def problem(call: ExtendCall) -> str | None:
    """Why the host casts the pool itself, or None."""
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
    named = getattr(call.batch, "seq_lens_sum", None)  # a number of the host's, which no address depends on
    return MANY if isinstance(named, int) and named > cache.shape[0] else None


def read(call: ExtendCall) -> Any:
    """What the pool holds of the call's layer: [N, 1, 576]."""
    return pool_of(call).get_key_buffer(call.layer.layer_id)


class _Seen(wrapt.ObjectProxy):
    """An object of the host's as one call sees it: some attributes are others."""

    def __init__(self, wrapped: Any, **seen: Any) -> None:
        super().__init__(wrapped)
        self._self_seen = seen

    def __getattr__(self, name: str) -> Any:
        seen = self._self_seen
        return seen[name] if name in seen else getattr(self.__wrapped__, name)


class _Pool(wrapt.ObjectProxy):
    """The pool as one call sees it: what it reads of a layer is in 16 bits already."""

    def __init__(self, wrapped: Any, cast: Callable[[Any], Any]) -> None:
        super().__init__(wrapped)
        self._self_cast = cast

    def get_key_buffer(self, layer_id: int) -> Any:
        return self._self_cast(self.__wrapped__.get_key_buffer(layer_id))


class _Wrapper(wrapt.ObjectProxy):
    """FlashInfer's wrapper with another list of pages while it runs."""

    def __init__(self, wrapped: Any, ids: Any) -> None:
        super().__init__(wrapped)
        self._self_ids = ids

    def run(self, *args: Any, **kwargs: Any) -> Any:
        wrapper = self.__wrapped__
        planned, wrapper._kv_indices_buf = wrapper._kv_indices_buf, self._self_ids
        try:
            return wrapper.run(*args, **kwargs)
        finally:
            wrapper._kv_indices_buf = planned


def extend(original: Callable[..., Any], call: ExtendCall, cast: Callable[[Any], Any], places: list[Any] | None) -> Any:
    """The host's own method. What it reads of the pool is ``cast(cache)``, in which it finds its pages under the
    numbers in ``places``, one tensor for each of `tables`, or under their own."""
    batch = call.batch
    view = _Pool(pool_of(call), cast)
    seen = call.renumbered(places) if places is not None else {}
    if getattr(batch, "token_to_kv_pool", None) is None:
        seen["token_to_kv_pool"] = view
    else:
        batch = _Seen(batch, token_to_kv_pool=view)
    backend = _Seen(call.backend, **seen) if seen else call.backend
    return original(backend, call.q, call.k, call.v, call.layer, batch, *call.args, **call.kwargs)


@dataclass(frozen=True)
class Casts:
    """What a backend's calls can ask of the cast."""

    device: Any
    dtype: Any  # of its queries
    cache_dtype: Any
    page_sizes: tuple[int, ...]


def casts(backend: Any, runner: Any) -> Casts | None:
    """What a backend can ask, once it is built; None: nothing."""
    config = runner.model_config
    shape = getattr(config, "kv_lora_rank", None), getattr(config, "qk_rope_head_dim", None)
    if shape != (LATENT, WIDTH - LATENT) or not getattr(backend, "use_mla", True):
        return None
    if str(runner.kv_cache_dtype) not in _EIGHT_BIT:
        return None
    # FlashInfer's lists are of slots, but for the first releases
    sizes = tuple(dict.fromkeys((1, backend.page_size)))
    return Casts(runner.device, runner.dtype, runner.kv_cache_dtype, sizes)


def warm_fa3(module: ModuleType) -> Undo:
    """Have what its calls can reach compiled once a backend is built."""
    return sglang.warm_once_built(module.FlashAttentionBackend, f"{_HOOK}:warm", casts)


def warm_flashinfer(module: ModuleType) -> Undo:
    """As `warm_fa3`; backends that inherit from it are built by its constructor, too."""
    return sglang.warm_once_built(module.FlashInferMLAAttnBackend, f"{_HOOK}:warm", casts)


def targets(version: str | None) -> tuple[Change, ...]:
    """Both backends in ``version``; FA3's in every shape when it is unknown."""
    found: list[Change] = []
    for call, warm in ((Fa3Extend, warm_fa3), (FlashInferExtend, warm_flashinfer)):
        module, owner, group = call.home.module, call.home.owner, call.home.name
        found += [
            Target(
                module, f"{owner}.forward_extend", params, bind=call, declines=f"{_HOOK}:declines",
                serve=f"{_HOOK}:serve", around=True, shadow_clone=shadow_clone, group=group,
            )
            for params in sglang.era_of(sglang_backends.PARAMS[call.home], version)
        ]  # fmt: skip
        found.append(Edit(module, f"{owner}.warmup", warm, group=group))
    return tuple(found)


def shadow_clone(call: ExtendCall) -> tuple[ExtendCall, None]:
    """For a shadow check: the same call, since the method returns what it makes, and stores the same keys twice."""
    return call, None
