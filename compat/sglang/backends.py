"""SGLang: how FlashAttention-3, FlashInfer MLA and FlashMLA decode, the backends that Hopper's users run, per release.

Each decodes in ``forward_decode`` of its class, which is looked up on the class at every call, also by the backends
that hold one inside (HybridAttnBackend, HybridLinearAttnBackend; these pass save_kv_cache by position), and once per
draft step. Target verify, draft extend, prompts and mixed batches go to ``forward_extend``.

    fa3         srt.layers.attention.flashattention_backend   FlashAttentionBackend
    flashinfer  srt.layers.attention.flashinfer_mla_backend   FlashInferMLAAttnBackend
    flashmla    srt.layers.attention.flashmla_backend         FlashMLABackend, which inherits FlashInfer's

    self, q, k, v, layer, forward_batch, save_kv_cache=True, then
        flashmla            nothing
        flashinfer          q_rope=None, k_rope=None
        fa3 to 0.5.15       and sinks=None, which its MLA branch drops
        fa3 0.5.16 - 0.5.20 and seven more that belong to other layers than MLA's
        fa3 from 0.5.21     and return_lse=False, which raises for MLA

The cache is written inside the method, without a scale in any release, so an fp8 cache holds the plain cast:

    to 0.5.12         forward_batch.token_to_kv_pool, at forward_batch.out_cache_loc
    0.5.13 - 0.5.21   self.token_to_kv_pool, which fa3 has from 0.5.7; the same pool
    from 0.5.22       at KVWriteLoc.for_layer(forward_batch, layer) (fa3) or .for_batch(forward_batch), of the module

Then fa3 and flashinfer convert the whole pool of the layer to the query's dtype, ``get_key_buffer(id).to(q.dtype)``;
flashmla has an fp8 kernel, for which it rounds the query to e4m3. From 0.5.6 it reads an 8-bit cache times the layer's
k_scale, with which nobody has divided: its own result is wrong unless that is 1.

What a step's metadata holds for us:

    fa3         forward_metadata.page_table and .cache_seqlens_int32; at a draft step its own lengths
    flashmla    forward_metadata.block_kv_indices, of pages of 64. When a graph is captured it is a view that is one
                column wide, over a buffer of full width: only its rows' stride means something
                forward_batch.seq_lens, int32 or int64
    flashinfer  self.kv_indptr, and _kv_indices_buf of the wrapper: slots, for every server's page size. At a graph's
                replay the wrapper's own _kv_indptr_buf is what it was at capture. A draft step's backend has a row of
                the drafts' buffers as its kv_indptr, which spec_info shows, too

Decode context parallelism (flashinfer and flashmla from 0.5.15) wants the log-sum-exp beside the output.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple

from mla_patch.compat.eras import Eras, era_of, value_at
from mla_patch.compat.types import Home

_ATTENTION = "sglang.srt.layers.attention"
_POOLS = "sglang.srt.mem_cache.memory_pool"
FLASHMLA_PAGE = 64


class BackendCall:
    """One decode step of one layer, as a backend is asked for it.

    q        [B, H, 576] or flat, or with q_rope [B, H, 512], which may be the transpose of [H, B, 512]
    q_rope   [B, H, 64] or None
    k, v     the new tokens' latents, or None where nothing is to be stored
    k_rope   [B, 1, 64], or None where k has all 576
    """

    __slots__ = ("backend", "batch", "extra", "k", "k_rope", "layer", "q", "q_rope", "save", "v")
    tensors, optional = ("q",), ("k", "v", "q_rope", "k_rope")
    name = module = owner = ""  # as MLA_PATCH_DECODE_BACKENDS has it; where the backend's class is

    def __init__(
        self, backend, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None, extra=None
    ):
        self.backend = backend
        self.q = q
        self.k = k
        self.v = v
        self.layer = layer
        self.batch = forward_batch
        self.save = save_kv_cache
        self.q_rope = q_rope
        self.k_rope = k_rope
        self.extra = extra  # what of this call our kernel does not do

    def metadata_problem(self, rows: int) -> str | None:
        """What keeps this step's metadata from being those of one query for each of ``rows`` requests, or None."""
        raise NotImplementedError

    def location(self) -> Any:
        """Where the new tokens are stored, as the pool of this release takes it."""
        kind: Any = getattr(sys.modules[self.module], "KVWriteLoc", None)
        return kind.for_batch(self.batch) if hasattr(kind, "for_batch") else self.batch.out_cache_loc


class Fa3Call(BackendCall):
    """Takes a call of any release, in the newest release's order."""

    __slots__ = ()
    name, module, owner = "fa3", f"{_ATTENTION}.flashattention_backend", "FlashAttentionBackend"

    def __init__(
        self, backend, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None, sinks=None,
        q_descale=None, k_descale=None, v_descale=None, score_mod=None, aux_tensors=None, rel_bias=None,
        rel_bias_event=None, return_lse=False,
    ):  # fmt: skip
        extra = None
        if sinks is not None:
            extra = "sinks, which the engine's MLA decode ignores"
        elif return_lse:
            extra = "return_lse"
        elif not (
            q_descale is k_descale is v_descale is score_mod is aux_tensors is rel_bias is rel_bias_event is None
        ):
            given = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale, "score_mod": score_mod}
            given |= {"aux_tensors": aux_tensors, "rel_bias": rel_bias, "rel_bias_event": rel_bias_event}
            extra = next(name for name, value in given.items() if value is not None)
        super().__init__(backend, q, k, v, layer, forward_batch, save_kv_cache, q_rope, k_rope, extra)

    def metadata_problem(self, rows: int) -> str | None:
        backend = self.backend
        if self.batch.spec_info is not None and backend.topk > 1:
            return f"a cascade of draft tokens (topk {backend.topk})"
        if getattr(backend, "fa_impl_ver", 3) != 3:
            return f"FlashAttention {backend.fa_impl_ver}"
        if getattr(backend, "num_splits", 0):
            return "deterministic inference: one split"
        if self.k is not None and self.save and self.k_rope is None:
            return "no k_rope, without which the engine cannot store the token"
        metadata = backend.forward_metadata
        queries = getattr(metadata, "max_seq_len_q", None)
        if queries != 1:
            return f"{queries} queries per request"
        if metadata.cache_seqlens_int32.shape[0] != rows:
            return f"lengths of {metadata.cache_seqlens_int32.shape[0]} requests, not of {rows}"
        return None

    def location(self) -> Any:
        kind: Any = getattr(sys.modules[self.module], "KVWriteLoc", None)
        return kind.for_layer(self.batch, self.layer) if hasattr(kind, "for_layer") else self.batch.out_cache_loc

    def pages(self) -> tuple[Any, Any, int]:
        """The block table, the lengths and the page size."""
        metadata = self.backend.forward_metadata
        return metadata.page_table, metadata.cache_seqlens_int32, self.backend.page_size


class FlashMlaCall(BackendCall):
    __slots__ = ()
    name, module, owner = "flashmla", f"{_ATTENTION}.flashmla_backend", "FlashMLABackend"

    def __init__(self, backend, q, k, v, layer, forward_batch, save_kv_cache=True):
        super().__init__(backend, q, k, v, layer, forward_batch, save_kv_cache)

    def metadata_problem(self, rows: int) -> str | None:
        if getattr(self.backend.forward_metadata, "block_kv_indices", None) is None:
            return "no block table"
        return _dropped_cap(self.layer)

    def pages(self) -> tuple[Any, Any, int]:
        """The block table, the lengths and the page size."""
        return self.backend.forward_metadata.block_kv_indices, self.batch.seq_lens, FLASHMLA_PAGE


class FlashInferCall(BackendCall):
    __slots__ = ()
    name, module, owner = "flashinfer", f"{_ATTENTION}.flashinfer_mla_backend", "FlashInferMLAAttnBackend"

    def __init__(self, backend, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None):
        super().__init__(backend, q, k, v, layer, forward_batch, save_kv_cache, q_rope, k_rope)

    def metadata_problem(self, rows: int) -> str | None:
        wrapper = getattr(self.backend.forward_metadata, "decode_wrapper", None)
        if getattr(wrapper, "_kv_indices_buf", None) is None:
            return "no token ids in FlashInfer's wrapper"
        return _dropped_cap(self.layer)

    def tokens(self) -> tuple[Any, Any]:
        """indptr and token ids; both lie in memory that a replay of a graph fills anew."""
        backend = self.backend
        return backend.kv_indptr[: self.batch.batch_size + 1], backend.forward_metadata.decode_wrapper._kv_indices_buf


CALLS: tuple[type[BackendCall], ...] = (Fa3Call, FlashInferCall, FlashMlaCall)
NAMES = ("triton", *(call.name for call in CALLS))


def is_built_on(call: type[BackendCall], capability: tuple[int, int]) -> bool:
    """Whether the engine builds a backend for MLA on a GPU: it asserts that fa3 runs on Hopper, in every release."""
    return call is not Fa3Call or capability[0] == 9


def _dropped_cap(layer: Any) -> str | None:
    return "a logit cap, which the engine's decode ignores" if (getattr(layer, "logit_cap", 0) or 0) > 0 else None


def problem(call: BackendCall) -> str | None:
    """Why this is not certainly a decode that our kernels serve as the engine would, or None.

    Reads Python numbers, shapes and types, never what tensors hold.
    """
    backend, layer = call.backend, call.layer
    kind = type(backend)
    if kind.__qualname__ != call.owner or kind.__module__ != call.module:
        return f"another backend class, {kind.__qualname__}"
    if not getattr(backend, "use_mla", True):
        return "no MLA"
    if call.extra is not None:
        return call.extra
    if layer.head_dim != 576 or layer.v_head_dim != 512 or layer.tp_k_head_num != 1:
        return f"{layer.tp_k_head_num} kv heads of {layer.head_dim} and {layer.v_head_dim}, not one of 512 + 64"
    if layer.is_cross_attention:
        return "cross attention"
    window = layer.sliding_window_size
    if window is not None and window > -1:
        return "a sliding window, which the engine's MLA decode ignores"
    rows, heads, rope = call.batch.batch_size, layer.tp_q_head_num, call.q_rope
    width = 576 if rope is None else 512
    if call.q.numel() != rows * heads * width or (rope is not None and rope.numel() != rows * heads * 64):
        return f"{call.q.numel() / (heads * width):g} rows of queries for {rows} requests"
    if call.k is not None and call.v is None:
        return "keys without values"
    if shares_context(sys.modules[call.module]):
        return "decode context parallelism, which needs the log-sum-exp"
    pool = pool_of(call)
    if latent_pool(pool) is None:
        return f"another kind of cache, {type(pool).__name__}" if pool is not None else "two caches, or none"
    return call.metadata_problem(rows)


def pool_of(call: Any) -> Any:
    """Where the release's method stores and reads for a ``call`` of a backend with a batch; None where that is not
    certain."""
    own, batchs = getattr(call.backend, "token_to_kv_pool", None), getattr(call.batch, "token_to_kv_pool", None)
    if own is None or batchs is None:
        return batchs if own is None else own
    return own if own is batchs else None


def latent_pool(pool: Any) -> Any:
    """The plain pool of latents that ``pool`` is, or keeps for the layers of full attention; None: it is no such.

    Its subclasses store other rows (FP4, DSA), or rows elsewhere (unified memory).
    """
    kind = type(pool)
    if kind.__module__ != _POOLS:
        return None
    if kind.__qualname__ == "MLATokenToKVPool":
        return pool
    if kind.__qualname__ == "HybridLinearKVPool":
        pool = getattr(pool, "full_kv_pool", None)
        kind = type(pool)
    return pool if kind.__qualname__ == "MLATokenToKVPool" and kind.__module__ == _POOLS else None


def shares_context(module: ModuleType) -> bool:
    """Whether decode context parallelism is on, as the backend's ``module`` asks for it."""
    names = module.__dict__
    ask = names.get("dcp_enabled")  # 0.5.15, whose get_parallel() does not tell
    if ask is not None:
        return bool(ask())
    parallel = names.get("get_parallel")
    return parallel is not None and bool(getattr(parallel(), "dcp_enabled", False))


def store(call: BackendCall) -> None:
    """Store the new tokens' latents as the release's method does."""
    if call.k is None or not call.save:
        return
    pool = pool_of(call)
    if call.k_rope is None:
        pool.set_kv_buffer(call.layer, call.location(), call.k, call.v)
    else:
        pool.set_mla_kv_buffer(call.layer, call.location(), call.k, call.k_rope)


def rows_of(call: BackendCall) -> Any:
    """The layer's whole cache, [slots, 1, 576]; rows may lie apart.

    Raises:
        ValueError: it has another shape.
    """
    cache = pool_of(call).get_key_buffer(call.layer.layer_id)
    if cache.dim() != 3 or cache.shape[1:] != (1, 576) or cache.stride(2) != 1:
        raise ValueError(f"a cache of shape {tuple(cache.shape)}, strides {cache.stride()}, not [slots, 1, 576]")
    return cache


def paged(cache: Any, page_size: int) -> Any:
    """``cache`` as [pages, page_size, 576], without a copy."""
    row = cache.stride(0)
    return cache.as_strided((cache.shape[0] // page_size, page_size, 576), (row * page_size, row, 1))


_FIRST = ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache")
_HALVES = (*_FIRST, "q_rope", "k_rope")
_SINKS = (*_HALVES, "sinks")
_DESCALES = (
    *_SINKS, "q_descale", "k_descale", "v_descale", "score_mod", "aux_tensors", "rel_bias", "rel_bias_event",
)  # fmt: skip
# of forward_decode; forward_extend takes the same, but for FlashMLA's
PARAMS: dict[type[BackendCall], Eras[tuple[str, ...]]] = {
    Fa3Call: (("0.5.21", (*_DESCALES, "return_lse")), ("0.5.16", _DESCALES), ("0.5.1", _SINKS)),
    FlashInferCall: (("0.5.1", _HALVES),),
    FlashMlaCall: (("0.5.1", _FIRST),),
}


# FlashMLA multiplies what it reads of an 8-bit cache by k_scale, with which nobody has divided
_FLASHMLA_SCALES: Eras[bool] = (("0.5.6", True), ("0.5.1", False))


def flashmla_reads_scales(version: str | None) -> bool:
    """Whether FlashMLA's backend reads an 8-bit cache with k_scale; an unknown release is taken for a new one."""
    return value_at(_FLASHMLA_SCALES, version)


def homes(call: type[BackendCall], version: str | None) -> list[Home]:
    """``forward_decode`` of the backend that makes ``call``, in ``version``; in every shape where that is unknown."""
    name = f"{call.owner}.forward_decode"
    return [Home(call.module, name, params, "call", call) for params in era_of(PARAMS[call], version)]


class BackendWarmup(NamedTuple):
    """What a backend can be asked to decode, as far as it is known when it has been built: what a warm-up compiles."""

    name: str  # "fa3"
    device: Any
    heads: int  # of this rank
    dtype: Any
    cache_dtype: Any
    max_batch: int
    page_size: int  # 0: by token ids


def warmup_of(call: type[BackendCall], backend: Any, runner: Any) -> BackendWarmup | None:
    """What ``backend`` can be asked to decode of a latent cache; None where its calls are declined."""
    kind = type(backend)
    pool = latent_pool(runner.token_to_kv_pool)
    if kind.__qualname__ != call.owner or not getattr(backend, "use_mla", True) or pool is None:
        return None  # FlashMLA's __init__ calls FlashInfer's
    if (pool.kv_lora_rank, pool.qk_rope_head_dim) != (512, 64) or shares_context(sys.modules[call.module]):
        return None
    page = {"fa3": getattr(backend, "page_size", 1), "flashmla": FLASHMLA_PAGE}.get(call.name, 0)
    heads = runner.model_config.num_attention_heads // _attention_ranks()
    requests = runner.req_to_token_pool.size
    return BackendWarmup(call.name, runner.device, heads, runner.dtype, pool.dtype, requests, page)


def _attention_ranks() -> int:
    """Over how many ranks one layer's heads are divided: from 0.5.16 the runtime's context knows."""
    ask = getattr(sys.modules.get("sglang.srt.layers.dp_attention"), "get_attention_tp_size", None)
    if ask is not None:
        return int(ask())
    return int(sys.modules["sglang.srt.runtime_context"].get_parallel().attn_tp_size)
