"""FlashMLA's wrappers as SGLang calls them, served by mla_patch.flash_mla where no CUDA build can.

Why: code for the newer API (`FlashMLASchedMeta`, sinks, a second cache, lengths) fails on the kernels that releases to
0.5.12 pin, and FlashMLA has no build for most GPUs, head counts and page sizes.

`flash_mla_providers` says who serves a call. The engine's CUDA operators keep what they can serve, in every release.
Metadata follow calls: whatever keeps the engine from making tensors keeps it from serving what they are for. There are
two exceptions: metadata do not tell the formats of the table's first row, and after the breaker a call goes to the
engine even if our code made its metadata.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mla_patch.compat import gpu
from mla_patch.compat.eras import era_of, value_at
from mla_patch.compat.sglang import deterministic as sglang_deterministic
from mla_patch.compat.sglang import flash_mla as sglang_flash_mla
from mla_patch.compat.sglang.flash_mla import KvCacheCall, MetadataCall, PrefillCall
from mla_patch.compat.sglang.release import supported
from mla_patch.compat.types import Change, Edit, Home, Target, Undo
from mla_patch.features import CallRejected, Feature
from mla_patch.hooks.sglang import flash_mla_providers as providers
from mla_patch.hooks.sglang.edits.flash_mla_package import (
    add_sched_meta,
    install_flash_mla_shim,
    knows_sched_meta,
    new_sched_meta,
)
from mla_patch.hooks.sglang.edits.flash_mla_reach import warm_dense, warm_v4, warm_v32
from mla_patch.hookspecs import hookimpl

_KINDS = {"get_mla_metadata": "metadata", "flash_mla_with_kvcache": "kvcache", "flash_mla_sparse_fwd": "prefill"}


def targets(version: str | None) -> tuple[Change, ...]:
    """The wrappers of ``version`` and the backends around them; every known home when it is unknown."""
    found: list[Change] = []
    for place in era_of(sglang_flash_mla.HOMES, version):
        found += map(_target, sglang_flash_mla.wrapper_homes(place, version))
        if place == sglang_flash_mla.SGL_KERNEL:
            found.append(Edit(place, "FlashMLASchedMeta", add_sched_meta))
    if sglang_flash_mla.v4_is_apart(version):
        if sglang_flash_mla.has_package():
            found += map(_target, sglang_flash_mla.v4_wrapper_homes())
        else:
            found.append(Edit(sglang_flash_mla.V4_BACKEND, "flash_mla", install_flash_mla_shim, counts_calls=True))
    return (*found, *_warm_ups(version))


def _target(home: Home) -> Target:
    kind = _KINDS[home.name.rpartition(".")[2]]
    return home.target(f"{__name__}:declines_{kind}", f"{__name__}:serve_{kind}")


def _warm_ups(version: str | None) -> list[Edit]:
    """What has our kernels compiled once a backend is built."""

    def edit(module: str, name: str, change: Callable[..., Undo], home: str) -> Edit:
        # by its own name in reports
        return Edit(module, f"{name}.warmup", functools.update_wrapper(functools.partial(change, home, warm), change))

    home = value_at(sglang_flash_mla.HOMES, version)
    found = [edit(sglang_flash_mla.DENSE_BACKEND, "FlashMLABackend", warm_dense, home)]
    # alternatives where the release is unknown
    found += [edit(module, "SparseAttnBackend", warm_v32, home) for module in sglang_flash_mla.v32_modules(version)]
    if sglang_flash_mla.has_v4(version):
        v4 = sglang_flash_mla.v4_home(version)
        found.append(edit(sglang_flash_mla.V4_BACKEND, "DeepseekV4AttnBackend", warm_v4, v4))
    return found


FEATURE = Feature(
    name="sched_meta",
    host=supported("0.5.3"),
    targets=targets,
    why="older FlashMLA packages lack the newer API, and FlashMLA has no build for many GPUs and shapes",
    upstream="https://github.com/sgl-project/sglang/pull/26132",
    drop_when="FlashMLA serves every GPU, head count and page size that the engine runs with",
    hardware=gpu.not_nvidia,
    providers=tuple((row.provider, row.when) for row in (*providers.PROVIDERS, *providers.PREFILL_PROVIDERS)),
    promises="deterministic inference: the promise holds for the calls that our kernels serve. Our decode then does "
    "not split the keys of a query, which is slower for few requests with long contexts. Our sparse prefill never "
    "splits them. FlashMLA's decode does not keep the promise, and the engine refuses FlashMLA as --attention-backend",
)


@hookimpl
def mla_patch_features() -> list[Feature]:
    return [FEATURE]


def declines_kvcache(call: KvCacheCall) -> str | None:
    """Why this call goes to the host, or None. What ours cannot take is the launchers' to refuse."""
    return providers.kept_by_host(providers.PROVIDERS, call)


def _final(serve: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """No row gives ours a call that FlashMLA could serve, so what ours refuses is told the caller."""

    @functools.wraps(serve)
    def answer(call: Any) -> Any:
        try:
            return serve(call)
        except ValueError as refusal:
            tensor = call.cache_seqlens if isinstance(call, MetadataCall) else call.q
            if hasattr(tensor, "is_cuda") and providers.capability_of(tensor) is None:
                raise  # another kind of device, for which the host may have an operator
            raise CallRejected(refusal) from refusal

    return answer


@_final
def serve_kvcache(call: KvCacheCall) -> Any:
    from mla_patch.flash_mla import flash_mla_with_kvcache

    return flash_mla_with_kvcache(
        call.q, call.k_cache, call.block_table, call.cache_seqlens, call.head_dim_v, call.metadata, call.num_splits,
        call.softmax_scale, call.causal, call.descale_q, call.descale_k, call.is_fp8_kvcache, call.indices,
        call.attn_sink, call.extra_k_cache, call.extra_indices, call.topk_length, call.extra_topk_length,
        enable_batch_invariant=sglang_deterministic.is_on(),
    )  # fmt: skip


def declines_prefill(call: PrefillCall) -> str | None:
    """Why this call goes to the host, or None."""
    return providers.kept_by_host(providers.PREFILL_PROVIDERS, call)


@_final
def serve_prefill(call: PrefillCall) -> Any:
    from mla_patch.flash_mla import flash_mla_sparse_fwd

    return flash_mla_sparse_fwd(
        call.q, call.kv, call.indices, call.sm_scale, call.d_v, call.attn_sink, call.topk_length,
        use_legacy=call.use_legacy,
    )  # fmt: skip


def declines_metadata(call: MetadataCall) -> str | None:
    """Why the host makes this metadata, or None."""
    if call.cache_seqlens is None:
        # without operators its wrapper raises, though it has the class
        own = knows_sched_meta(call.build) and call.build.has(True)
        return "the engine has its own FlashMLASchedMeta" if own else None
    if providers.dims(call.cache_seqlens) != 1:
        return None
    capability = providers.capability_of(call.cache_seqlens)
    if (
        not call.build.has(False)
        or capability not in sglang_flash_mla.CHIPS
        or (call.topk is None and capability != (9, 0))
        or 0 in (call.cache_seqlens.shape[0], call.tokens)
    ):
        return None
    if call.topk is not None and (call.topk % 64 or not call.topk or call.heads not in (None, 64, 128)):
        return None
    return "every other call: the engine's CUDA operator serves it"


@_final
def serve_metadata(call: MetadataCall) -> Any:
    from mla_patch.flash_mla import get_mla_metadata

    if call.cache_seqlens is None:
        return new_sched_meta(call.build), None
    return get_mla_metadata(call.cache_seqlens, call.tokens, call.kv_heads, call.heads, call.is_fp8_kvcache, call.topk)


def warm(calls: list[KvCacheCall | PrefillCall]) -> int:
    """Compile what those of a backend's calls reach that ours serve, before graphs are captured; how many kernels."""
    from mla_patch.kernels.sparse import decode as sparse_decode
    from mla_patch.kernels.sparse import dense as dense_decode
    from mla_patch.kernels.sparse import prefill as sparse_prefill

    compiled = 0
    for call in calls:
        q, device = call.q, call.q.device
        if not gpu.on_nvidia(q):
            continue
        if isinstance(call, PrefillCall):
            if declines_prefill(call) is None:
                more, lengths = call.attn_sink is not None, call.topk_length is not None
                compiled += sparse_prefill.warmup(device, q.shape[1], q.shape[2], q.dtype, more, lengths)
        elif declines_kvcache(call) is not None:
            continue
        elif call.indices is None:
            compiled += dense_decode.warmup(device, q.shape[2], q.dtype, call.k_cache.shape[1])
        elif call.k_cache.shape[-1] == 656:
            compiled += sparse_decode.warmup(device, q.shape[2])
        else:
            extra = () if call.extra_k_cache is None else (call.extra_k_cache.shape[1],)
            compiled += sparse_decode.warmup(device, q.shape[2], (call.k_cache.shape[1],), extra)
    return compiled
