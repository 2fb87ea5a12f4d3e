"""SGLang's sparse prefill of DeepSeek V3.2 and V4: the whole route where V4 has none, single pieces where it has one.

Why: without it V4 attends over fp8 pages, which is slow for prompts and impossible for many queries at once. Later
releases have it with faults that `compat.sglang_sparse_prefill` lists; V3.2's takes few head counts.

Of a release's own kernels ours take the place of those that are wrong, or slow; what is right stays, unless the flag is
set to on. So does a release without the route: there all of it is ours, and it is taken
when it is asked for. `V4_PROVIDERS` and `V32_PROVIDERS` say who serves a layer, by the first row that applies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from mla_patch.compat import gpu
from mla_patch.compat.gpu import capability_of
from mla_patch.compat.sglang import deterministic as sglang_deterministic
from mla_patch.compat.sglang import flash_mla as sglang_flash_mla
from mla_patch.compat.sglang import sparse_prefill as compat
from mla_patch.compat.sglang.release import supported
from mla_patch.compat.sglang.sparse_prefill import ChunkCall, CombineCall, DequantizeCall, SwaCall, V32Call
from mla_patch.compat.types import Change, Provider, Variable
from mla_patch.features import Feature
from mla_patch.flags import variable
from mla_patch.hookspecs import hookimpl

HOST, OURS, BOTH = "host", "triton", "ours + FlashMLA"
TOO_LARGE = "a workspace larger than MLA_PATCH_SPARSE_PREFILL_WORKSPACE"
FEW = "few enough queries to attend over pages (MLA_PATCH_SPARSE_PREFILL_ROUTE)"


def _says(reason: str) -> Callable[[ChunkCall], bool]:
    return lambda call: declines_chunk(call) == reason


def _built(heads: int, width: int, capability: tuple[int, int] | None) -> bool:
    """Whether FlashMLA has a build for such layers."""
    # rows of indices are padded to 128, so that any topk will do
    return capability in sglang_flash_mla.CHIPS and sglang_flash_mla.prefill_takes(heads, width, 128, capability)


def _flash_mla(call: ChunkCall) -> Callable[..., Any] | None:
    """The release's own flash_mla_sparse_fwd, where FlashMLA has a build for this layer."""
    queries, heads, width = call.q.shape
    if not queries or not _built(heads, width, capability_of(call.q)):
        return None
    return sglang_flash_mla.prefill_wrapper(call.module)


V4_PROVIDERS = (
    *(Provider(HOST, reason, _says(reason)) for reason in (
        compat.DETERMINISTIC, compat.NOT_A_PROMPT, TOO_LARGE, FEW, compat.CAPTURED, compat.HISPARSE, compat.PARALLEL,
        compat.AHEAD, compat.NO_POSITIONS, compat.OTHER_PAGES,
    )),
    Provider(BOTH, "64 or 128 heads on sm_90, sm_100 and sm_103, with a FlashMLA that accepts sinks and lengths",
        lambda call: _flash_mla(call) is not None),
    Provider(OURS, "everything else: any GPU from sm_80, 1 to 128 heads", lambda call: True),
)  # fmt: skip


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


def native(target: Change, version: str | None) -> str | None:
    """Why the release is left as it is, or None; an explicit on is not asked."""
    if compat.is_backport(target, version):
        return "the release has no such route; MLA_PATCH_SPARSE_PREFILL=on adds ours"
    if compat.own_is_right(target, version):
        return "the release's code is correct; MLA_PATCH_SPARSE_PREFILL=on replaces it"
    return None


def _mebibytes(text: str) -> str:
    if not text.strip().isdecimal():
        raise ValueError("expected a number of MiB")
    return text.strip()


def memory() -> int:
    """Bytes of workspaces and metadata that this process holds."""
    module = sys.modules.get("mla_patch.chunk_cache")
    return module.held() if module is not None else 0


def serves(version: str, capability: tuple[int, int], heads: int, asked: bool) -> list[tuple[str, str]]:
    """For `explain`: a kind of prompt, and who attends."""
    attends = "FlashMLA" if _built(heads, 512, capability) else "triton"
    route = compat.v4_route(version, capability, asked)
    v4 = {
        compat.OVER_PAGES: "over pages, by the release",
        compat.OWN: f"the release's route; {attends} attends",
        compat.OWN_WITH_OURS: f"the release's route with our kernels; {attends} attends",
        compat.OURS: f"our route; {attends} attends",
    }.get(route, route)
    if compat.is_asked_by_release(version):
        v4 += "; short prompts over pages unless SGLANG_OPT_FLASHMLA_SPARSE_PREFILL is set"
    v32 = "FlashMLA, called by the release" if _padded(heads, capability) else "triton"
    return [("V4", v4), ("V3.2", f"{v32}; our kernel dequantises the keys")]


FEATURE = Feature(
    name="sparse_prefill",
    host=supported("0.5.5"),
    targets=compat.targets,
    why="sparse prefill of DeepSeek V4 is missing or faulty, and that of V3.2 accepts few head counts",
    upstream="https://github.com/sgl-project/sglang/pull/25418",
    drop_when="the engine's sparse prefill is right for every batch and accepts any number of heads",
    native=native,
    hardware=gpu.not_nvidia,
    variables=(
        Variable("ROUTE", ("auto", "all", "large"), "auto", "which V4 prompts attend over a workspace: "
                 "those that are faster there (`auto`), all, or only those that pages cannot serve (`large`)"),
        Variable("WORKSPACE", (), "4096", "MiB for the V4 workspace; larger prompts attend over pages", _mebibytes),
    ),
    providers=(
        *((row.provider, f"V4: {row.when}") for row in V4_PROVIDERS),
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


def limit() -> int:
    """Bytes that a workspace may have."""
    return int(variable(FEATURE, "WORKSPACE")) << 20


def _too_large(backend: Any, batch: Any) -> bool:
    from mla_patch.chunk_cache import SparsePrefillChunkCache

    # ratio 4 has the most compressed tokens
    return SparsePrefillChunkCache.needed(*compat.host_lens(batch), compat.window(backend), 4) > limit()


def pages_can(queries: int, device: Any) -> bool:
    """Whether FlashMLA can make a schedule for so many queries over pages."""
    most = compat.most_queries(device)
    return most is None or queries <= most


def _few(backend: Any, batch: Any, heads: int, ratio: int, topk: int | None) -> bool:
    from mla_patch.chunk_cache import pages_are_faster

    if variable(FEATURE, "ROUTE") != "auto":
        return False
    return pages_are_faster(*compat.host_lens(batch), compat.window(backend), ratio, topk, heads)


def declines_route(backend: Any, batch: Any, queries: int) -> str | None:
    """Why a prompt attends over pages where the route is all ours, or None. What pages cannot serve is always ours."""
    if sglang_deterministic.is_on():
        return compat.DETERMINISTIC
    if not pages_can(queries, backend.req_to_token.device):
        return None
    if variable(FEATURE, "ROUTE") == "large":
        return FEW
    return TOO_LARGE if _too_large(backend, batch) else None


def prefers_pages(backend: Any, batch: Any, heads: int, ratio: int, topk: int | None) -> bool:
    """Whether a layer of a prompt that pages can serve attends over them, where the route is the release's."""
    if variable(FEATURE, "ROUTE") == "large" or _too_large(backend, batch):
        return True
    return _few(backend, batch, heads, ratio, topk)


def declines_chunk(call: ChunkCall) -> str | None:
    """Why the host serves this layer, or None."""
    reason = compat.problem(call)
    if reason is not None or call.routed is None or not pages_can(call.q.shape[0], call.q.device):
        return reason
    few = compat.asked_once(
        call.backend, call.batch, call.ratio,
        lambda: _few(call.backend, call.batch, call.q.shape[1], call.ratio, compat.topk(call.core, call.ratio)),
    )  # fmt: skip
    return FEW if few else None


def serve_chunk(call: ChunkCall) -> Any:
    from mla_patch.chunk_cache import ChunkInputs, SparsePrefillChunkCache
    from mla_patch.kernels.sparse.prefill import mla_sparse_prefill

    compat.store(call)
    cache = compat.cache_of(call.backend, SparsePrefillChunkCache)
    chunk = cache.chunk(compat.generation(call), lambda: ChunkInputs(**compat.chunk_inputs(call)))
    swa, pages, positions = compat.pages(call)
    return cache.attend(
        call.q, chunk, swa, sm_scale=call.backend.softmax_scale, ratio=call.ratio, pages=pages, topk_indices=positions,
        attn_sink=call.attn_sink, sparse_fwd=_flash_mla(call) or mla_sparse_prefill,
    )  # fmt: skip


def warm(asked: compat.Reads) -> int:
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
        if not _built(heads, 512, capability_of(probe)):
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
