"""SGLang's sparse prefill of DeepSeek V3.2 and V4: the whole route where V4 has none, single pieces where it has one.

Why: without it V4 attends over fp8 pages, which is slow for prompts and impossible for many queries at once. Later
releases have it with faults that `compat.sglang.sparse_prefill` lists. Sparse prefill of V3.2 accepts few head counts.

By default our kernels replace those of a release that are wrong or slow. The flag set to on also replaces those that
are right, and adds the whole route to a release without it. `edits.v4_policy.Route` and `V32_PROVIDERS` say who serves
a layer: the first row that applies.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from mla_patch.compat import gpu
from mla_patch.compat.eras import era_of, value_at
from mla_patch.compat.gpu import capability_of
from mla_patch.compat.sglang import flash_mla as sglang_flash_mla
from mla_patch.compat.sglang import sparse_prefill as compat
from mla_patch.compat.sglang import v4_chunk
from mla_patch.compat.sglang.release import supported
from mla_patch.compat.sglang.sparse_prefill import V4, CombineCall, DequantizeCall, SwaCall, V32Call
from mla_patch.compat.sglang.v4_chunk import ChunkCall
from mla_patch.compat.types import Change, Edit, Provider, Undo
from mla_patch.features import Feature
from mla_patch.hooks.sglang.edits import v4_policy, v4_reach, v4_route
from mla_patch.hooks.sglang.edits.v4_policy import Route, flash_mla_has_build
from mla_patch.hooks.sglang.edits.v4_reach import WarmupShapes
from mla_patch.hookspecs import hookimpl

HOST, OURS = "host", "triton"


def targets(version: str | None) -> tuple[Change, ...]:
    """The entry points of ``version``; every known home of the kernels and of V3.2's when it is unknown."""
    found = _v32(version)
    prompts = compat.v4_prompts(version)
    if prompts is V4.NO_ROUTE:
        found += _backport()
    elif prompts is not V4.NO_MODEL:
        found += _v4_kernels(version)
        if prompts is V4.FAULTY_ROUTE:
            found += _route()
    return tuple(found)


def _v32(version: str | None) -> list[Change]:
    attention = [home.target(declines_v32, serve_v32) for home in era_of(compat.V32_ATTENTION_HOMES, version)]
    homes = era_of(compat.V32_DEQUANTIZE_HOMES, version)
    return [
        *attention,
        *(home.target(declines_dequantize, serve_dequantize) for home in homes),
        *(
            Edit(module, f"{owner}.warmup", _with_warm(v4_reach.warm_v32), entry=compat.V32_WARMUP)
            for module, owner in era_of(compat.V32_BACKEND, version)
        ),
    ]


def _v4_kernels(version: str | None) -> list[Change]:
    pieces = (
        (compat.V4_DEQUANTIZE_HOMES, declines_dequantize, serve_dequantize),
        (compat.COMBINE_HOMES, declines_combine, serve_combine),
        (compat.SWA_HOMES, declines_swa, serve_swa),
    )
    return [
        *(home.target(declines, serve) for eras, declines, serve in pieces for home in era_of(eras, version)),
        Edit(v4_chunk.BACKEND, compat.V4_WARMUP, _with_warm(v4_reach.warm_v4)),
    ]


def _route() -> list[Change]:
    """0.5.13 - 0.5.20."""
    return [
        compat.PREFILL_HOME.target(v4_policy.declines, serve_chunk),
        Edit(v4_chunk.BACKEND, "DSV4Metadata.copy_", v4_route.number_metadata),
        Edit(v4_chunk.BACKEND, "DeepseekV4AttnBackend.forward", v4_route.route_prompts),
        _PLAN,
    ]


def _backport() -> list[Change]:
    """0.5.12."""
    return [
        compat.FORWARD_HOME.target(v4_policy.declines, serve_chunk),
        Edit(v4_chunk.BACKEND, "DSV4Metadata.copy_", v4_route.number_metadata),
        Edit(v4_chunk.BACKEND, "DeepseekV4AttnBackend.init_forward_metadata", v4_route.allocate_topk_positions),
        Edit(compat.INDEXER, "topk_transform_512", v4_route.record_topk_positions),
        _PLAN,
        Edit(v4_chunk.BACKEND, compat.V4_WARMUP, _with_warm(v4_reach.warm_v4)),
    ]


def _with_warm(change: Callable[..., Undo]) -> Callable[..., Undo]:
    """An edit of `v4_reach`, under its own name in reports."""
    return functools.update_wrapper(functools.partial(change, warm), change)


_PLAN = Edit(compat.PAGED_METADATA, "PagedIndexerMetadata", v4_route.plan_many_queries)


def _padded(heads: int, capability: tuple[int, int] | None) -> bool:
    """Whether the release can give FlashMLA V3.2's heads."""
    return capability in sglang_flash_mla.CHIPS and compat.pads(heads, capability)


V32_PROVIDERS = (
    Provider(
        HOST,
        "64 or 128 heads, or a number that the release pads to them, on sm_90, sm_100 and sm_103",
        lambda call: _padded(call.q.shape[1], capability_of(call.q)),
    ),
    Provider(OURS, "other head counts and other GPUs", lambda call: True),
)


def is_backport(target: Change, version: str | None) -> bool:
    """Whether this is a part of what the release does not have at all."""
    return version is not None and compat.v4_prompts(version) is V4.NO_ROUTE and not target.entry


def native(target: Change, version: str | None) -> str | None:
    """Why the release is left as it is, or None; an explicit on is not asked."""
    entry = target.entry or target.name
    if is_backport(target, version):
        return "the release has no such route; MLA_PATCH_SPARSE_PREFILL=on adds ours"
    if compat.own_is_right(entry, version):
        return "the release's code is correct; MLA_PATCH_SPARSE_PREFILL=on replaces it"
    return None


def memory() -> int:
    """Bytes of workspaces and metadata that this process holds."""
    module = sys.modules.get("mla_patch.chunk_cache")
    return module.held() if module is not None else 0


def _v4_prompts(version: str, capability: tuple[int, int], asked: bool) -> str:
    """The route of a V4 prompt that fits it, ``asked`` where the flag is set to on; {} attends."""
    over_pages = "over pages, by the release"
    prompts = compat.v4_prompts(version)
    if prompts is V4.NO_MODEL:
        return prompts.value
    if prompts is V4.NO_ROUTE:
        return "our route; {} attends" if asked else over_pages
    if value_at(compat.SM120_OVER_PAGES, version) and capability[0] == 12:
        return over_pages
    if prompts is V4.FAULTY_ROUTE:
        return "our route; {} attends"
    return f"the release's route{' with our kernels' if asked else ''}; {{}} attends"


def serves(version: str, capability: tuple[int, int], heads: int, asked: bool) -> list[tuple[str, str]]:
    """For `explain`: a kind of prompt, and who attends."""
    v4 = _v4_prompts(version, capability, asked)
    v4 = v4.format("FlashMLA" if flash_mla_has_build(heads, 512, capability) else "triton")
    if value_at(compat.ASKED_BY_RELEASE, version):
        v4 += "; short prompts over pages unless SGLANG_OPT_FLASHMLA_SPARSE_PREFILL is set"
    v32 = "FlashMLA, called by the release" if _padded(heads, capability) else "triton"
    return [("V4", v4), ("V3.2", f"{v32}; our kernel dequantises the keys")]


FEATURE = Feature(
    name="sparse_prefill",
    host=supported("0.5.5"),
    targets=targets,
    why="sparse prefill of DeepSeek V4 is missing or faulty, and that of V3.2 accepts few head counts",
    upstream="https://github.com/sgl-project/sglang/pull/25418",
    drop_when="the engine's sparse prefill is right for every batch and accepts any number of heads",
    native=native,
    hardware=gpu.not_nvidia,
    variables=(v4_policy.ROUTE, v4_policy.WORKSPACE),
    providers=(
        *((row.provider, f"V4: {row.value}") for row in Route),
        *((row.provider, f"V3.2: {row.when}") for row in V32_PROVIDERS),
    ),
    serves=serves,
    promises="deterministic inference: the promise holds for V3.2's attention and for dequantised keys. The engine "
    "serves V4's prompts, because our choice of a route depends on all prompts of a step. No reviewed release accepts "
    "V4 in this mode",
    memory=memory,
)  # fmt: skip


@hookimpl
def mla_patch_features() -> list[Feature]:
    return [FEATURE]


def serve_chunk(call: ChunkCall) -> Any:
    """One layer of a V4 prompt, over the workspace of its backend's chunk."""
    from mla_patch.chunk_cache import ChunkInputs, SparsePrefillChunkCache
    from mla_patch.kernels.sparse.prefill import mla_sparse_prefill

    view = v4_chunk.view(call)
    view.store()
    cache = _cache_of(view.backend, SparsePrefillChunkCache)
    chunk = cache.chunk(view.generation, lambda: ChunkInputs(**view.inputs()))
    return cache.attend(
        view.q, chunk, view.swa_pages, sm_scale=view.sm_scale, ratio=view.ratio, pages=view.pages,
        topk_indices=view.positions, attn_sink=view.attn_sink,
        sparse_fwd=v4_policy.flash_mla(call) or mla_sparse_prefill,
    )  # fmt: skip


_CACHE = "_mla_patch_chunk_cache"  # on a backend


def _cache_of(backend: Any, make: Callable[[], Any]) -> Any:
    """The backend's own chunk cache, made at the first call."""
    cache = vars(backend).get(_CACHE)
    if cache is None:
        cache = make()
        setattr(backend, _CACHE, cache)
    return cache


def warm(asked: WarmupShapes) -> int:
    """Compile what a backend's prompts reach of ours, before it serves; how many kernels."""
    import torch

    from mla_patch.kernels.cache import dequantize
    from mla_patch.kernels.indices import prefill as prefill_indices
    from mla_patch.kernels.sparse import prefill as sparse_prefill

    probe = torch.empty(0, device=asked.device)
    if not gpu.on_nvidia(probe):
        return 0
    compiled = dequantize.warmup(asked.device, asked.pages)
    if asked.pages:
        compiled += prefill_indices.warmup(asked.device)
    for heads in asked.heads:
        if not flash_mla_has_build(heads, 512, capability_of(probe)):
            compiled += sparse_prefill.warmup(asked.device, heads, 512, torch.bfloat16, True)
    return compiled


def declines_v32(call: V32Call) -> str | None:
    """Why the host serves this call, or None."""
    row = next(row for row in V32_PROVIDERS if row.applies(call))
    return row.when if row.provider == HOST else None


def serve_v32(call: V32Call) -> Any:
    from mla_patch.kernels.sparse.prefill import mla_sparse_prefill

    indices = call.indices[:, None]
    return mla_sparse_prefill(
        call.q, call.kv, indices, call.sm_scale, call.d_v, call.attn_sink, call.topk_length
    )[0]  # fmt: skip


def declines_dequantize(call: DequantizeCall) -> str | None:
    """Why the host serves this call, or None."""
    if call.layout is not None and call.layout != "v4":  # an enumeration of strings
        return f"layout {getattr(call.layout, 'value', call.layout)}"
    return None if call.tile == 128 else f"a scale for {call.tile} values, not 128"


def serve_dequantize(call: DequantizeCall) -> Any:
    from mla_patch.kernels.cache.dequantize import dequantize_k_cache_paged

    return dequantize_k_cache_paged(call.cache, call.slots, call.page_size, call.out)


def declines_combine(call: CombineCall) -> str | None:
    """Why the host serves this call, or None."""
    return None if call.swa_indices is None else "a separate window for each query"


def serve_combine(call: CombineCall) -> Any:
    from mla_patch.kernels.indices.prefill import combine_topk_swa_indices

    return combine_topk_swa_indices(
        call.topk_indices, call.query_start_loc, call.seq_lens, call.gather_lens, call.compressed_base, call.swa_base,
        call.window_size, call.compress_ratio, call.topk, query_pos=call.query_pos, out_indices=call.out_indices,
        out_lens=call.out_lens,
    )  # fmt: skip


def declines_swa(call: SwaCall) -> None:
    """All of them are ours to serve."""


def serve_swa(call: SwaCall) -> Any:
    from mla_patch.kernels.indices.prefill import build_swa_token_ids

    return build_swa_token_ids(
        call.seq_lens, call.extend_seq_lens, call.req_pool_indices, call.req_to_token, call.full_to_swa,
        call.swa_window, call.total_swa,
    )  # fmt: skip
