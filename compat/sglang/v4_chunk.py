"""SGLang: what its objects say of one prompt of DeepSeek V4, and how its backend hands over a layer, per release.

    0.5.12             `forward`, for every step; the release has no sparse prefill
    0.5.13 - 0.5.20    `_forward_prefill_sparse`, once the release has taken that route

`sparse_prefill` beside this has the history of the route.
"""

from __future__ import annotations

import sys
from typing import Any

from mla_patch.compat import gpu
from mla_patch.compat.generations import generation_of
from mla_patch.compat.sglang.flash_mla import SGL_KERNEL

BACKEND = "sglang.srt.layers.attention.deepseek_v4_backend"
PACKAGE = "flash_mla"  # which V4 of 0.5.12 attends with
ROW_BYTES = 20  # of a block's shared memory for every query, when FlashMLA makes a schedule
PREFILL = (
    "self", "q", "layer_id", "compress_ratio", "forward_batch", "token_to_kv_pool", "core_attn_metadata", "attn_sink",
)  # fmt: skip
FORWARD = ("self", "q", "k", "v", "layer", "forward_batch", "compress_ratio", "save_kv_cache", "attn_sink", "**_")


class Prompt:
    """A V4 prompt, as far as its route depends on it; ``heads`` and ``ratio`` None: all layers of a step."""

    __slots__ = ("backend", "batch", "core", "device", "heads", "queries", "ratio")

    def __init__(self, backend, batch, core, queries, device, heads=None, ratio=None):
        self.backend = backend
        self.batch = batch
        self.core = core
        self.queries = queries  # rows of q, padding among them
        self.device = device
        self.heads = heads
        self.ratio = ratio


class ChunkCall(Prompt):
    """One layer of a V4 prefill, or on 0.5.12 of any forward: what our route serves.

    ``k`` is what is stored first, where the engine has not done so.
    """

    __slots__ = ("attn_sink", "k", "layer_id", "module", "pool", "q")

    def __init__(self, backend, q, layer_id, ratio, batch, pool, core, attn_sink, module=SGL_KERNEL, k=None):
        q = q.squeeze(1) if q.dim() == 4 else q
        super().__init__(backend, batch, core, q.shape[0], q.device, q.shape[1], ratio)
        self.q = q
        self.layer_id = layer_id
        self.pool = pool
        self.attn_sink = attn_sink
        self.module = module  # whose flash_mla_sparse_fwd the release would call
        self.k = k

    @property
    def is_routed(self) -> bool:
        """Whether the engine itself has taken its sparse route for this layer."""
        return self.module != PACKAGE


def prefill_call(
    backend, q, layer_id, compress_ratio, forward_batch, token_to_kv_pool, core_attn_metadata, attn_sink
):  # fmt: skip
    """0.5.13 - 0.5.20: `_forward_prefill_sparse`."""
    return ChunkCall(
        backend, q, layer_id, compress_ratio, forward_batch, token_to_kv_pool, core_attn_metadata, attn_sink
    )


def forward_call(
    backend, q, k, v, layer, forward_batch, compress_ratio, save_kv_cache=True, attn_sink=None, **_
):  # fmt: skip
    """0.5.12: `forward`."""
    core = getattr(backend.forward_metadata, "core_attn_metadata", None)
    return ChunkCall(
        backend, q, layer.layer_id, compress_ratio, forward_batch, forward_batch.token_to_kv_pool, core, attn_sink,
        PACKAGE, k if save_kv_cache else None,
    )  # fmt: skip


# what the engine's objects say of a prompt


def is_strided(core: Any) -> bool:
    """Whether a rank's own queries have been picked out of the step's: what is stored stays whole."""
    return core.raw_out_loc.shape[0] != core.seq_lens_casual.shape[0]


def has_hisparse(call: ChunkCall) -> bool:
    """Whether HiSparse moves this backend's slots."""
    return any(getattr(owner, "hisparse_coordinator", None) for owner in (call.backend, call.batch))


def is_built_ahead(call: ChunkCall) -> bool:
    """Whether the release built the metadata of this chunk before its forward."""
    return getattr(call.backend.forward_metadata, "sparse_prefill_cache", None) is not None


def lacks_positions(call: ChunkCall) -> bool:
    """Whether the indexer of such a layer has chosen slots alone."""
    return call.ratio == 4 and getattr(call.core, "c4_sparse_raw_indices", None) is None


def has_known_pages(call: ChunkCall) -> bool:
    """Whether a layer's pages are laid out as 584 bytes a token, in pages that its ratio divides."""
    if call.ratio not in (0, 4, 128) or call.pool.swa_kv_pool.kv_cache_total_dim != 584:
        return False
    return not call.ratio or call.pool.get_extra_key_page_size(call.layer_id) * call.ratio == call.backend.page_size


def topk(core: Any, ratio: int) -> int | None:
    """Compressed tokens that a query of such a layer attends to; None: all."""
    return core.c4_sparse_page_indices.shape[-1] if ratio == 4 else None


def has_host_lens(batch: Any) -> bool:
    """Whether the scheduler knows the lengths of a batch without the device."""
    return all(getattr(batch, f"{name}_cpu", None) is not None for name in ("seq_lens", "extend_seq_lens"))


def host_lens(batch: Any) -> tuple[list[int], list[int]]:
    """Tokens of each request, and new ones, as the scheduler has them; without those the device is asked."""

    def numbers(name: str) -> list[int]:
        known = getattr(batch, f"{name}_cpu", None)
        known = getattr(batch, name) if known is None else known
        return known.tolist() if hasattr(known, "tolist") else [int(one) for one in known]

    return numbers("seq_lens"), numbers("extend_seq_lens")


def window(backend: Any) -> int:
    """Tokens that a query sees uncompressed."""
    module = next(sys.modules[owner.__module__] for owner in type(backend).__mro__ if owner.__module__ == BACKEND)
    return module.SWA_WINDOW


def most_queries(device: Any) -> int | None:
    """Queries for which FlashMLA can still make a schedule on this GPU: a block's shared memory holds them all."""
    return gpu.shared_memory(gpu.index_of(device)) // ROW_BYTES if device.type == "cuda" else None


def has_another_route(module: Any, backend: Any) -> bool:
    """Whether this backend's prompts take another route of the release's than the one that we replace: TRT-LLM's,
    over pages of another layout (0.5.20), or that with e4m3 queries (0.5.19 and 0.5.20)."""
    if getattr(backend, "trtllm_attn", False):
        return True
    asked = getattr(module, "use_dsv4_q8kv8_sparse_prefill", None)
    return asked is not None and asked(backend.dsv4_prefill_backend)


class ChunkView:
    """One layer of a V4 prompt as `mla_patch.chunk_cache` takes it.

    q          [queries, heads, 512]
    swa_pages  the layer's pages of the SWA cache
    pages      its compressed pages, or None
    positions  compressed tokens that its indexer has chosen, or None
    """

    __slots__ = ("attn_sink", "backend", "call", "q", "ratio", "sm_scale")

    def __init__(self, call: ChunkCall) -> None:
        self.call = call
        self.backend = call.backend
        self.q = call.q
        self.ratio = call.ratio
        self.sm_scale = call.backend.softmax_scale
        self.attn_sink = call.attn_sink

    @property
    def generation(self) -> tuple[int, ...]:
        """What all layers of a chunk share, and no other chunk does."""
        call, backend = self.call, self.backend
        return (
            generation_of(backend.forward_metadata), generation_of(call.batch), generation_of(call.pool),
            call.pool.full_to_swa_index_mapping.data_ptr(), backend.req_to_token.data_ptr(), call.q.shape[0],
        )  # fmt: skip

    def inputs(self) -> dict[str, Any]:
        """The chunk as `mla_patch.chunk_cache.ChunkInputs` takes it."""
        import torch

        call, batch, seq_lens, extend_lens = self.call, self.call.batch, *host_lens(self.call.batch)
        return {
            "seq_lens": batch.seq_lens.to(torch.int32),
            "extend_lens": batch.extend_seq_lens.to(torch.int32),
            "seq_lens_cpu": seq_lens,
            "extend_lens_cpu": extend_lens,
            "req_pool": batch.req_pool_indices.to(torch.int32),
            "req_to_token": self.backend.req_to_token,
            "full_to_swa": call.pool.full_to_swa_index_mapping,
            "page_table": call.core.page_table,
            "queries": call.q.shape[0],
            "window": window(self.backend),
            "page_size": self.backend.page_size,
            "swa_page_size": call.pool.swa_page_size,
        }

    @property
    def swa_pages(self) -> Any:
        return self.call.pool.get_swa_key_buffer_radix(self.call.layer_id)

    @property
    def pages(self) -> Any:
        return self.call.pool.get_extra_key_buffer(self.call.layer_id) if self.ratio else None

    @property
    def positions(self) -> Any:
        return self.call.core.c4_sparse_raw_indices if self.ratio == 4 else None

    def store(self) -> None:
        """What the engine's forward does first: this chunk's keys go into the SWA cache."""
        call = self.call
        if call.k is not None:
            self.backend.store_cache(call.layer_id, call.k, call.batch)


def view(call: ChunkCall) -> ChunkView:
    """All that serving a layer asks of the engine."""
    return ChunkView(call)
