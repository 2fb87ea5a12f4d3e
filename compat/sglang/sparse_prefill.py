"""SGLang: sparse prefill of DeepSeek V3.2 and V4, per release.

V4, DeepseekV4AttnBackend in srt.layers.attention.deepseek_v4_backend:

    0.5.12             none: `forward` attends over fp8 pages, and FlashMLA cannot make a schedule for many queries; the
                       indexer's choice is kept as slots alone
    0.5.13 - 0.5.23    `forward` (from 0.5.21 `_forward_attention`) calls `_forward_prefill_sparse` for prompts of more
                       than 11673 tokens, or all: SGLANG_OPT_FLASHMLA_SPARSE_PREFILL, on by default from 0.5.15
    0.5.13 - 0.5.14    its chunk's metadata outlives the replay of a breakable graph; it reads back as many tokens as
                       the page table is wide
    to 0.5.20          requests without new tokens index out of range; holes in what the indexer chose become rows of
                       another request; ranks of context parallelism, which have every n-th query, are taken for whole
    0.5.19 - 0.5.20    the metadata may be built ahead, where the tables may change under the forward; beside it
                       `_forward_prefill_sparse_q8kv8`, and in 0.5.20 TRT-LLM's route, both when asked for

Its kernels, all called from there:

    dequantize_k_cache_paged    srt.layers.attention.dsv4.dequant_k_cache to 0.5.15, kernels.ops.attention.dsv4 from
                                0.5.16; `layout` from 0.5.21; another name from 0.5.23. 32-bit addresses of what it
                                writes to 0.5.18
    combine_topk_swa_indices    srt.layers.attention.dsv4.sparse_prefill_utils, from 0.5.23 sparse_prefill_kernels in
                                kernels.ops.attention.dsv4; `query_pos` third from 0.5.21; `swa_indices`, `swa_lengths`
                                from 0.5.22
    build_swa_token_ids         beside it; `total_swa` from 0.5.18

V3.2, NativeSparseAttnBackend in nsa_backend, from 0.5.13 DeepseekSparseAttnBackend in dsa_backend:

    _forward_flashmla_sparse    pads heads to 64, on sm_100 to 128, which have to be a multiple of their number;
                                topk_length from 0.5.17, attn_sink from 0.5.20
    dequantize_k_cache_paged    nsa.dequant_k_cache, dsa from 0.5.13, kernels.ops.attention.dsa from 0.5.16; renamed in
                                0.5.23. 32-bit addresses of what it reads to 0.5.18: wrong beyond slot 3273603
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt
from packaging.version import Version

from mla_patch.compat import gpu
from mla_patch.compat.generations import bump, generation_of
from mla_patch.compat.sglang import deterministic as sglang_deterministic
from mla_patch.compat.sglang.flash_mla import SGL_KERNEL, v4_heads, v32_backend
from mla_patch.compat.types import Change, Edit, Target, Undo
from mla_patch.hooks.editing import set_methods
from mla_patch.hooks.sglang.edits.warmup import warm_once_built

_HOOK = "mla_patch.hooks.sglang.sparse_prefill"
_BACKEND = "sglang.srt.layers.attention.deepseek_v4_backend"
_SRT, _OPS = "sglang.srt.layers.attention", "sglang.kernels.ops.attention"
_PACKAGE = "flash_mla"  # which V4 of 0.5.12 attends with
ROW_BYTES = 20  # of a block's shared memory for every query, when FlashMLA makes a schedule


class DequantizeCall:
    """One call of dequantize_k_cache_paged; ``page_size`` None is V3.2's."""

    __slots__ = ("cache", "layout", "out", "page_size", "slots", "tile")
    tensors, optional = ("cache", "slots"), ("out",)

    def __init__(self, cache, slots, page_size=None, out=None, layout=None, tile=128):
        self.cache = cache
        self.slots = slots
        self.page_size = page_size
        self.out = out
        self.layout = layout
        self.tile = tile


def dequantize_v4(quant_k_cache, page_table_1_flattened, page_size, out=None, layout=None):
    return DequantizeCall(quant_k_cache, page_table_1_flattened, page_size, out, layout)


def dequantize_v32(quant_k_cache, page_table_1_flattened, group_size=128):
    return DequantizeCall(quant_k_cache, page_table_1_flattened, tile=group_size)


class CombineCall:
    """One call of combine_topk_swa_indices, in the newest release's order."""

    __slots__ = (
        "compress_ratio", "compressed_base", "gather_lens", "out_indices", "out_lens", "query_pos", "query_start_loc",
        "seq_lens", "swa_base", "swa_indices", "swa_lengths", "topk", "topk_indices", "window_size",
    )  # fmt: skip

    def __init__(
        self, topk_indices, query_start_loc, query_pos, seq_lens, gather_lens, compressed_base, swa_base, window_size,
        compress_ratio, topk, out_indices=None, out_lens=None, swa_indices=None, swa_lengths=None,
    ):  # fmt: skip
        self.topk_indices = topk_indices
        self.query_start_loc = query_start_loc
        self.query_pos = query_pos
        self.seq_lens = seq_lens
        self.gather_lens = gather_lens
        self.compressed_base = compressed_base
        self.swa_base = swa_base
        self.window_size = window_size
        self.compress_ratio = compress_ratio
        self.topk = topk
        self.out_indices = out_indices
        self.out_lens = out_lens
        self.swa_indices = swa_indices
        self.swa_lengths = swa_lengths


def combine_call(
    topk_indices, query_start_loc, seq_lens, gather_lens, compressed_base, swa_base, window_size, compress_ratio, topk,
    out_indices=None, out_lens=None,
):  # fmt: skip
    """To 0.5.20, without positions."""
    return CombineCall(
        topk_indices, query_start_loc, None, seq_lens, gather_lens, compressed_base, swa_base, window_size,
        compress_ratio, topk, out_indices, out_lens,
    )  # fmt: skip


class SwaCall:
    """One call of build_swa_token_ids."""

    __slots__ = (
        "extend_seq_lens", "full_to_swa", "req_pool_indices", "req_to_token", "seq_lens", "swa_window", "total_swa",
    )  # fmt: skip

    def __init__(
        self, seq_lens, extend_seq_lens, req_pool_indices, req_to_token, full_to_swa, swa_window, total_swa=None
    ):
        self.seq_lens = seq_lens
        self.extend_seq_lens = extend_seq_lens
        self.req_pool_indices = req_pool_indices
        self.req_to_token = req_to_token
        self.full_to_swa = full_to_swa
        self.swa_window = swa_window
        self.total_swa = total_swa


class V32Call:
    """One call of _forward_flashmla_sparse: sparse attention over a 16-bit workspace or cache."""

    __slots__ = ("attn_sink", "d_v", "indices", "kv", "q", "sm_scale", "topk_length")
    tensors, optional, numbers = ("q", "kv", "indices"), ("attn_sink", "topk_length"), ("sm_scale", "d_v")

    def __init__(
        self, backend, q_all, kv_cache, v_head_dim, page_table_1, sm_scale, topk_length=None, attn_sink=None
    ):  # fmt: skip
        self.q = q_all
        self.kv = kv_cache
        self.d_v = v_head_dim
        self.indices = page_table_1
        self.sm_scale = sm_scale
        # as the host does where padding makes them disagree
        whole = topk_length is not None and topk_length.shape[0] == q_all.shape[0]
        self.topk_length = topk_length if whole else None
        self.attn_sink = attn_sink


def pads(heads: int, capability: tuple[int, int] | None) -> bool:
    """Whether the V3.2 backend can give FlashMLA this number of heads, as it is or padded with zeros."""
    wanted = 128 if capability is not None and capability[0] >= 10 else 64
    return heads in (64, 128) if heads % wanted == 0 else wanted % heads == 0


class ChunkCall:
    """One layer of a V4 prefill, or on 0.5.12 any forward of V4's: what ours is served from.

    ``k`` is what is stored first, where the host has not done so.
    """

    __slots__ = ("attn_sink", "backend", "batch", "core", "k", "layer_id", "module", "pool", "q", "ratio", "routed")

    def __init__(self, backend, q, layer_id, ratio, batch, pool, core, attn_sink, module=SGL_KERNEL, k=None):
        self.backend = backend
        self.q = q.squeeze(1) if q.dim() == 4 else q
        self.layer_id = layer_id
        self.ratio = ratio
        self.batch = batch
        self.pool = pool
        self.core = core
        self.attn_sink = attn_sink
        self.module = module  # whose flash_mla_sparse_fwd the release would call
        self.k = k
        # None: the host itself has taken the route
        self.routed = vars(backend.forward_metadata).get(_ROUTE, NOT_A_PROMPT) if module == _PACKAGE else None


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
        _PACKAGE, k if save_kv_cache else None,
    )  # fmt: skip


_ROUTE = "_mla_patch_sparse_prefill"  # on a step's metadata: why ours does not take it, or ""
_RAW = "_mla_patch_raw_indices"  # on the tensor of slots that the indexer fills: where it puts its positions
_CACHE = "_mla_patch_chunk_cache"  # on a backend
_PAGES = "_mla_patch_pages"  # on a backend: a step, and which ratios' layers attend over pages

DETERMINISTIC = sglang_deterministic.REASON
NOT_A_PROMPT = "not a prompt: decode, verify or draft"
HISPARSE = "HiSparse manages its own slots"
PARALLEL = "context parallelism: this rank has every n-th query"
AHEAD = "the release built the metadata of this chunk in advance"
NO_POSITIONS = "the indexer kept no positions"
OTHER_PAGES = "pages in another layout"
CAPTURED = "graph capture: the graph would keep the sizes of this chunk"


def is_strided(core: Any) -> bool:
    """Whether a rank's own queries have been picked out of the step's: what is stored stays whole."""
    return core.raw_out_loc.shape[0] != core.seq_lens_casual.shape[0]


def problem(call: ChunkCall) -> str | None:
    """Why the host serves a layer of a prompt, or None."""
    if sglang_deterministic.is_on():
        return DETERMINISTIC
    if call.routed:
        return call.routed
    if gpu.capturing():
        return CAPTURED
    if getattr(call.backend, "hisparse_coordinator", None) or getattr(call.batch, "hisparse_coordinator", None):
        return HISPARSE
    if is_strided(call.core):
        return PARALLEL
    if getattr(call.backend.forward_metadata, "sparse_prefill_cache", None) is not None:
        return AHEAD
    if call.ratio == 4 and getattr(call.core, "c4_sparse_raw_indices", None) is None:
        return NO_POSITIONS
    if call.ratio not in (0, 4, 128) or call.pool.swa_kv_pool.kv_cache_total_dim != 584:
        return OTHER_PAGES
    if call.ratio and call.pool.get_extra_key_page_size(call.layer_id) * call.ratio != call.backend.page_size:
        return OTHER_PAGES
    return None


def generation(call: ChunkCall) -> tuple[int, ...]:
    """What all layers of a chunk share, and no other chunk does."""
    full_to_swa = call.pool.full_to_swa_index_mapping
    return (
        generation_of(call.backend.forward_metadata), generation_of(call.batch), generation_of(call.pool),
        full_to_swa.data_ptr(), call.backend.req_to_token.data_ptr(), call.q.shape[0],
    )  # fmt: skip


def host_lens(batch: Any) -> tuple[list[int], list[int]]:
    """Tokens of each request, and new ones, as the scheduler has them; without those the device is asked."""

    def numbers(name: str) -> list[int]:
        known = getattr(batch, f"{name}_cpu", None)
        known = getattr(batch, name) if known is None else known
        return known.tolist() if hasattr(known, "tolist") else [int(one) for one in known]

    return numbers("seq_lens"), numbers("extend_seq_lens")


def chunk_inputs(call: ChunkCall) -> dict[str, Any]:
    """A chunk as `mla_patch.chunk_cache.ChunkInputs` takes it."""
    import torch

    batch, seq_lens, extend_lens = call.batch, *host_lens(call.batch)
    return {
        "seq_lens": batch.seq_lens.to(torch.int32),
        "extend_lens": batch.extend_seq_lens.to(torch.int32),
        "seq_lens_cpu": seq_lens,
        "extend_lens_cpu": extend_lens,
        "req_pool": batch.req_pool_indices.to(torch.int32),
        "req_to_token": call.backend.req_to_token,
        "full_to_swa": call.pool.full_to_swa_index_mapping,
        "page_table": call.core.page_table,
        "queries": call.q.shape[0],
        "window": window(call.backend),
        "page_size": call.backend.page_size,
        "swa_page_size": call.pool.swa_page_size,
    }


def window(backend: Any) -> int:
    """Tokens that a query sees uncompressed."""
    module = next(sys.modules[owner.__module__] for owner in type(backend).__mro__ if owner.__module__ == _BACKEND)
    return module.SWA_WINDOW


def pages(call: ChunkCall) -> tuple[Any, Any, Any]:
    """A layer's SWA pages, its compressed pages, and the positions that its indexer has chosen, or None."""
    swa = call.pool.get_swa_key_buffer_radix(call.layer_id)
    compressed = call.pool.get_extra_key_buffer(call.layer_id) if call.ratio else None
    return swa, compressed, call.core.c4_sparse_raw_indices if call.ratio == 4 else None


def store(call: ChunkCall) -> None:
    """What the host's forward does first: this chunk's keys go into the SWA cache."""
    if call.k is not None:
        call.backend.store_cache(call.layer_id, call.k, call.batch)


def cache_of(backend: Any, make: Callable[[], Any]) -> Any:
    """The backend's own chunk cache, made at the first call."""
    return vars(backend).setdefault(_CACHE, None) or _keep(backend, make())


def _keep(backend: Any, cache: Any) -> Any:
    setattr(backend, _CACHE, cache)
    return cache


def most_queries(device: Any) -> int | None:
    """Queries for which FlashMLA can still make a schedule on this GPU: a block's shared memory holds them all."""
    return gpu.shared_memory(gpu.index_of(device)) // ROW_BYTES if device.type == "cuda" else None


_PREFILL = (
    "self", "q", "layer_id", "compress_ratio", "forward_batch", "token_to_kv_pool", "core_attn_metadata", "attn_sink",
)  # fmt: skip
_FORWARD = ("self", "q", "k", "v", "layer", "forward_batch", "compress_ratio", "save_kv_cache", "attn_sink", "**_")
_DEQUANTIZE = ("quant_k_cache", "page_table_1_flattened")
_COMBINE = (
    "seq_lens", "gather_lens", "compressed_base", "swa_base", "window_size", "compress_ratio", "topk", "out_indices",
    "out_lens",
)  # fmt: skip
_SWA = ("seq_lens", "extend_seq_lens", "req_pool_indices", "req_to_token", "full_to_swa", "swa_window")
_V32 = ("self", "q_all", "kv_cache", "v_head_dim", "page_table_1", "sm_scale")
# entry points that have had other names, or share one
V4_DEQUANTIZE, V32_DEQUANTIZE = "V4 dequantize_k_cache_paged", "V3.2 dequantize_k_cache_paged"
V32_PREFILL, V32_WARMUP, V4_WARMUP = "V3.2 _forward_flashmla_sparse", "V3.2 warmup", "DeepseekV4AttnBackend.warmup"


def _call(module: str, name: str, params: tuple[str, ...], bind: Callable[..., Any], kind: str, **more: Any) -> Target:
    return Target(module, name, params, "call", bind, f"{_HOOK}:declines_{kind}", f"{_HOOK}:serve_{kind}", **more)


def targets(version: str | None) -> tuple[Change, ...]:
    """The entry points of ``version``; every known home of the kernels and of V3.2's when it is unknown."""
    if version is None:
        return tuple(one for v in ("0.5.12", "0.5.15", "0.5.18", "0.5.20", "0.5.21", "0.5.22", "0.5.23")
                     for one in (*_v32(Version(v)), *_v4_kernels(Version(v))))  # fmt: skip
    release = Version(version)
    found = _v32(release)
    if has_no_route(version):
        found += _backport()
    elif release >= Version("0.5.13"):
        found += _v4_kernels(release)
        if release < Version("0.5.21"):
            found += _prefill()
    return tuple(found)


NO_V4 = "the release has no DeepSeek V4"
OVER_PAGES, OWN, OWN_WITH_OURS, OURS = "over pages", "own", "own with our kernels", "ours"


def v4_route(version: str, capability: tuple[int, int], asked: bool) -> str:
    """The route of a prompt that fits it, ``asked`` where the flag is set to on."""
    release = Version(version)
    if release < Version("0.5.12"):
        return NO_V4
    if has_no_route(version):
        return OURS if asked else OVER_PAGES
    if release >= Version("0.5.16") and capability[0] == 12:
        return OVER_PAGES
    if release < Version("0.5.21"):
        return OURS
    return OWN_WITH_OURS if asked else OWN


def is_asked_by_release(version: str) -> bool:
    """Whether the release has V4's route, and takes it for long prompts alone unless its own switch is set."""
    return Version("0.5.13") <= Version(version) < Version("0.5.15")


def has_no_route(version: str | None) -> bool:
    """Whether the release runs V4 without sparse prefill."""
    return version is not None and Version("0.5.12") <= Version(version) < Version("0.5.13")


def _v32(release: Version) -> list[Change]:
    old, name = release < Version("0.5.13"), "dequantize_k_cache_paged"
    owner = "NativeSparseAttnBackend" if old else "DeepseekSparseAttnBackend"
    backend = f"{_SRT}.{'nsa' if old else 'dsa'}_backend"
    length = ("topk_length",) if release >= Version("0.5.17") else ()
    sink = ("attn_sink",) if release >= Version("0.5.20") else ()
    home = f"{_SRT}.nsa" if old else f"{_SRT}.dsa" if release < Version("0.5.16") else f"{_OPS}.dsa"
    if release >= Version("0.5.23"):
        name += "_dsa"
    return [
        _call(backend, f"{owner}._forward_flashmla_sparse", (*_V32, *length, *sink), V32Call, "v32", entry=V32_PREFILL),
        _call(f"{home}.dequant_k_cache", name, (*_DEQUANTIZE, "group_size"), dequantize_v32, "dequantize",
              entry=V32_DEQUANTIZE),
        Edit(backend, f"{owner}.warmup", warm_v32, entry=V32_WARMUP),
    ]  # fmt: skip


def _v4_kernels(release: Version) -> list[Change]:
    home = f"{_SRT}.dsv4" if release < Version("0.5.16") else f"{_OPS}.dsv4"
    utils, name = f"{_SRT}.dsv4.sparse_prefill_utils", "dequantize_k_cache_paged"
    if release >= Version("0.5.23"):
        utils, name = f"{_OPS}.dsv4.sparse_prefill_kernels", f"{name}_dsv4"
    positions = release >= Version("0.5.21")
    layout, query_pos = (("layout",), ("query_pos",)) if positions else ((), ())
    windows = ("swa_indices", "swa_lengths") if release >= Version("0.5.22") else ()
    total = ("total_swa",) if release >= Version("0.5.18") else ()
    return [
        _call(f"{home}.dequant_k_cache", name, (*_DEQUANTIZE, "page_size", "out", *layout), dequantize_v4, "dequantize",
              entry=V4_DEQUANTIZE),
        _call(utils, "combine_topk_swa_indices", ("topk_indices", "query_start_loc", *query_pos, *_COMBINE, *windows),
              CombineCall if positions else combine_call, "combine"),
        _call(utils, "build_swa_token_ids", (*_SWA, *total), SwaCall, "swa"),
        Edit(_BACKEND, V4_WARMUP, warm_v4),
    ]  # fmt: skip


def _prefill() -> list[Change]:
    return [
        _call(_BACKEND, "DeepseekV4AttnBackend._forward_prefill_sparse", _PREFILL, prefill_call, "chunk"),
        Edit(_BACKEND, "DSV4Metadata.copy_", number_metadata),
        Edit(_BACKEND, "DeepseekV4AttnBackend.forward", guard_route),
        _PLAN,
    ]


def _backport() -> list[Change]:
    return [
        _call(_BACKEND, "DeepseekV4AttnBackend.forward", _FORWARD, forward_call, "chunk"),
        Edit(_BACKEND, "DSV4Metadata.copy_", number_metadata),
        Edit(_BACKEND, "DeepseekV4AttnBackend.init_forward_metadata", keep_positions),
        Edit(f"{_SRT}.dsv4.indexer", "topk_transform_512", write_positions),
        _PLAN,
        Edit(_BACKEND, V4_WARMUP, warm_v4),
    ]


def own_is_right(target: Change, version: str | None) -> bool:
    """Whether the release's own kernel is as it should be. V3.2's dequantiser never is: from 0.5.19 its addresses are
    right, but it takes six times as long (docs/performance.md)."""
    since = {
        V4_DEQUANTIZE: "0.5.19", "combine_topk_swa_indices": "0.5.21", "build_swa_token_ids": "0.5.13",
        V4_WARMUP: "0.5.21",
    }.get(target.entry or target.name)  # fmt: skip
    return version is not None and since is not None and Version(version) >= Version(since)


def is_backport(target: Change, version: str | None) -> bool:
    """Whether this is a part of what the release does not have at all."""
    return has_no_route(version) and not target.entry


def _methods(owner: type, expected: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """The class's own methods, once they take what is expected at least, in that order."""
    found = {}
    for name, params in expected.items():
        found[name] = vars(owner)[name]
        taken = tuple(inspect.signature(found[name]).parameters)
        if taken[: len(params)] != params:
            raise TypeError(f"{owner.__qualname__}.{name} takes ({', '.join(taken)}), not ({', '.join(params)}, ...)")
    return found


def number_metadata(module: ModuleType) -> Undo:
    """Metadata that is filled anew gets a new number: by `copy_`, and where a breakable graph is replayed."""
    owner = module.DSV4Metadata
    names = [name for name in ("copy_", "refresh_for_breakable_cuda_graph_replay_") if name in vars(owner)]
    originals = _methods(owner, dict.fromkeys(names, ("self",)))

    def renewing(original: Any) -> Any:
        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            bump(self)
            result = original(self, *args, **kwargs)
            if "sparse_prefill_cache" in vars(self):
                self.sparse_prefill_cache = None  # of the host, which forgets it after a replay to 0.5.14
            return result

        return method

    return set_methods(owner, {name: renewing(original) for name, original in originals.items()})


class _PagedMode(wrapt.ObjectProxy):
    """A prompt's mode, for which the host attends over pages."""

    def is_extend_without_speculative(self) -> bool:
        return False


class _PagedBatch(wrapt.ObjectProxy):
    """A prompt's batch, for which the host attends over pages."""

    @property
    def forward_mode(self) -> Any:
        return _PagedMode(self.__wrapped__.forward_mode)


def asked_once(backend: Any, batch: Any, ratio: int, ask: Callable[[], bool]) -> bool:
    """What the first layer of that ratio was told in this step is all its layers' answer."""
    step = generation_of(backend.forward_metadata), generation_of(batch)
    known = vars(backend).get(_PAGES)
    if known is None or known[0] != step:
        known = step, {}
        setattr(backend, _PAGES, known)
    if ratio not in known[1]:
        known[1][ratio] = ask()
    return known[1][ratio]


def topk(core: Any, ratio: int) -> int | None:
    """Compressed tokens that a query of such a layer attends to; None: all."""
    return core.c4_sparse_page_indices.shape[-1] if ratio == 4 else None


def has_another_route(module: ModuleType, backend: Any) -> bool:
    """Whether this backend's prompts take another route of the release's than the one that ours replaces: TRT-LLM's,
    over pages of another layout (0.5.20), or that with e4m3 queries (0.5.19 and 0.5.20)."""
    if getattr(backend, "trtllm_attn", False):
        return True
    asked = getattr(module, "use_dsv4_q8kv8_sparse_prefill", None)
    return asked is not None and asked(backend.dsv4_prefill_backend)


def guard_route(module: ModuleType) -> Undo:
    """0.5.13 - 0.5.20: ranks of context parallelism, and what is better off there, attend over pages; what pages cannot
    serve does not, even if the release's own number allows it."""
    owner = module.DeepseekV4AttnBackend
    original = _methods(owner, {"forward": _FORWARD[:7]})["forward"]
    prefers_pages, pages_can = _policy("prefers_pages"), _policy("pages_can")
    switch = module.envs.SGLANG_OPT_FLASHMLA_SPARSE_PREFILL

    @functools.wraps(original)
    def forward(
        self: Any, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, compress_ratio: int, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        def call(batch: Any) -> Any:
            return original(self, q, k, v, layer, batch, compress_ratio, *args, **kwargs)

        core = getattr(self.forward_metadata, "core_attn_metadata", None)
        if (
            core is None
            or sglang_deterministic.is_on()  # the route would depend on the prompts beside this one
            or not forward_batch.forward_mode.is_extend_without_speculative()
            or has_another_route(module, self)
        ):
            return call(forward_batch)
        if is_strided(core):
            return call(_PagedBatch(forward_batch))
        if not pages_can(q.shape[0], q.device):
            if switch.get():
                return call(forward_batch)
            with switch.override(True):
                return call(forward_batch)
        answer = asked_once(
            self, forward_batch, compress_ratio,
            lambda: prefers_pages(self, forward_batch, q.shape[-2], compress_ratio, topk(core, compress_ratio)),
        )  # fmt: skip
        return call(_PagedBatch(forward_batch) if answer else forward_batch)

    return set_methods(owner, {"forward": forward})


@dataclass(frozen=True)
class Reads:
    """What prompts of a backend can ask of our kernels."""

    device: Any
    pages: tuple[int, ...] = ()  # tokens of V4's pages; empty: V3.2
    heads: tuple[int, ...] = ()  # of V4's queries


def warm_v4(module: ModuleType) -> Undo:
    """What our route, or the release's with our kernels, reaches is compiled once a backend is built."""
    return warm_once_built(module.DeepseekV4AttnBackend, f"{_HOOK}:warm", functools.partial(v4_reads, module))


def v4_reads(module: ModuleType, backend: Any, runner: Any) -> Reads | None:
    pool = backend.token_to_kv_pool
    if pool.swa_kv_pool.kv_cache_total_dim != 584 or has_another_route(module, backend):
        return None
    ratios = [ratio for ratio in getattr(backend, "present_ratios", (4, 128)) if ratio]
    pages = (pool.swa_kv_pool.page_size, *(pool.page_size // ratio for ratio in ratios))
    return Reads(runner.device, pages, v4_heads(runner))


def warm_v32(module: ModuleType) -> Undo:
    """V3.2's dequantiser is compiled once a backend is built."""
    return warm_once_built(v32_backend(module), f"{_HOOK}:warm", lambda backend, runner: Reads(runner.device))


def keep_positions(module: ModuleType) -> Undo:
    """0.5.12: a prompt that takes our route gets a place for the positions that the indexer chooses."""
    owner = module.DeepseekV4AttnBackend
    original = _methods(owner, {"init_forward_metadata": ("self", "forward_batch")})["init_forward_metadata"]
    declined = _policy("declines_route")

    @functools.wraps(original)
    def init_forward_metadata(self: Any, forward_batch: Any) -> None:
        original(self, forward_batch)
        metadata = self.forward_metadata
        if not isinstance(metadata, module.DSV4Metadata):
            return
        if not forward_batch.forward_mode.is_extend_without_speculative():
            return
        setattr(metadata, _ROUTE, declined(self, forward_batch, metadata.core_attn_metadata.raw_out_loc.shape[0]) or "")
        slots = metadata.core_attn_metadata.c4_sparse_page_indices
        if slots is not None and not getattr(metadata, _ROUTE):
            positions = slots.new_full(slots.shape, -1)
            metadata.core_attn_metadata.c4_sparse_raw_indices = positions
            setattr(slots, _RAW, positions)

    return set_methods(owner, {"init_forward_metadata": init_forward_metadata})


def write_positions(module: ModuleType) -> Undo:
    """0.5.12: the indexer's top-k writes positions beside slots, where somebody has asked for them."""
    names = ("topk_transform_512", "topk_transform_512_v2", "topk_transform_512_pytorch_vectorized")
    before = {name: vars(module)[name] for name in names}
    first = ("scores", "seq_lens", "page_tables", "out_page_indices", "page_size")
    taken = [tuple(inspect.signature(function).parameters) for function in before.values()]
    expected = [(*first, "out_raw_indices"), (*first, "metadata"), (*first, "out_raw_indices")]
    if taken != expected:
        raise TypeError(f"{module.__name__}: {taken} are the parameters of {', '.join(names)}")

    def transform(original: Any) -> Any:
        @functools.wraps(original)
        def topk(
            scores: Any, seq_lens: Any, page_tables: Any, out_page_indices: Any, page_size: int,
            out_raw_indices: Any = None,
        ) -> None:  # fmt: skip
            ours = vars(out_page_indices).get(_RAW)
            told = ours if out_raw_indices is None else out_raw_indices
            original(scores, seq_lens, page_tables, out_page_indices, page_size, told)
            if ours is not None and told is not ours:
                ours.copy_(told)  # somebody else wants them, too

        return topk

    @functools.wraps(before[names[1]])
    def newer(
        scores: Any, seq_lens: Any, page_tables: Any, out_page_indices: Any, page_size: int, metadata: Any
    ) -> None:
        ours = vars(out_page_indices).get(_RAW)
        if ours is None:
            before[names[1]](scores, seq_lens, page_tables, out_page_indices, page_size, metadata)
        else:  # it has no place for positions
            before[names[0]](scores, seq_lens, page_tables, out_page_indices, page_size, ours)

    ours = {names[0]: transform(before[names[0]]), names[1]: newer, names[2]: transform(before[names[2]])}
    return set_methods(module, ours)  # type: ignore[arg-type]


def plan_many_queries(module: ModuleType) -> Undo:
    """To 0.5.20: the indexer's schedule for many queries is made by the release's own kernel, not DeepGEMM's; from
    0.5.13 the release does so itself above a number of its own."""
    owner = module.PagedIndexerMetadata
    original = _methods(owner, {"__post_init__": ("self",)})["__post_init__"]
    switch = module.envs.SGLANG_OPT_USE_JIT_INDEXER_METADATA

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        lens = self.compressed_seq_lens if hasattr(self, "compressed_seq_lens") else self.c4_seq_lens
        most = most_queries(lens.device)
        if most is None or lens.numel() <= most or switch.get():
            original(self)
            return
        with switch.override(True):
            original(self)

    return set_methods(owner, {"__post_init__": __post_init__})


_PLAN = Edit(f"{_SRT}.dsv4.metadata", "PagedIndexerMetadata", plan_many_queries)


def _policy(name: str) -> Callable[..., Any]:
    return getattr(import_module(_HOOK), name)
