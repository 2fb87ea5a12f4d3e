"""Who serves a FlashMLA call of SGLang: two tables, of which the first row that applies decides.

`PROVIDERS` is of decode, `PREFILL_PROVIDERS` of sparse prefill. `mla-patch explain sched_meta` and docs/flash-mla.md
print both.
"""

from __future__ import annotations

from typing import Any

from mla_patch.compat.gpu import capability_of as capability_of
from mla_patch.compat.sglang import flash_mla as sglang_flash_mla
from mla_patch.compat.sglang.flash_mla import KvCacheCall, PrefillCall
from mla_patch.compat.types import Provider

HOST, OURS = "host", "triton"
Rows = tuple[Provider, ...]


def dims(tensor: Any) -> int:
    """Dimensions of a tensor; -1 of what is none."""
    return len(tensor.shape) if hasattr(tensor, "is_cuda") else -1


def _odd(call: KvCacheCall) -> bool:
    """Whether the rows below would not find what they look at."""
    ids = [one for one in (call.indices, call.extra_indices) if one is not None]
    return dims(call.q) != 4 or dims(call.k_cache) != 4 or any(dims(one) != 3 for one in ids)


def _unknown_format(call: KvCacheCall) -> bool:
    known = {None: (656, 584), "V32": (656,)}.get(call.kv_format)
    if known is None or not call.use_legacy:
        return True
    return call.indices is not None and dims(call.k_cache) == 4 and call.k_cache.shape[-1] not in known


def _newer(call: KvCacheCall) -> bool:
    """Whether a call needs the newer API."""
    return (
        hasattr(call.metadata, "have_initialized")
        or call.attn_sink is not None
        or call.extra_k_cache is not None
        or call.topk_length is not None
        or call.extra_topk_length is not None
    )


def _no_build(call: KvCacheCall) -> bool:
    return not call.build.has(_newer(call))


def _other_chip(call: KvCacheCall | PrefillCall) -> bool:
    return capability_of(call.q) not in sglang_flash_mla.CHIPS


def _other_sparse(call: KvCacheCall) -> bool:
    if call.indices is None:
        return False
    counts = [call.indices.shape[-1]]
    if call.extra_indices is not None:
        counts.append(call.extra_indices.shape[-1])
    return call.q.shape[2] not in (64, 128) or any(count % 64 or not count for count in counts)


def _v32_with_more(call: KvCacheCall) -> bool:
    more = call.topk_length is not None or call.extra_k_cache is not None
    return call.indices is not None and call.k_cache.shape[-1] == 656 and more


def _other_dense(call: KvCacheCall) -> bool:
    return call.indices is None and (capability_of(call.q) != (9, 0) or call.k_cache.shape[1] != 64)


def _dense_e4m3(call: KvCacheCall) -> bool:
    # the newer operator, which the wrapper gives no descales, takes 16 bits alone, the older one not without them
    lacks = _newer(call) or call.descale_q is None or call.descale_k is None
    return call.indices is None and call.q.element_size() == 1 and lacks


def _dense_width(call: KvCacheCall) -> bool:
    if call.indices is not None or call.q.shape[-1] == 576:
        return False
    return call.q.element_size() == 1 or call.q.shape[-1] not in sglang_flash_mla.dense_widths(call.build.module)


def _descales(call: KvCacheCall) -> bool:
    if call.descale_q is None and call.descale_k is None:
        return False
    refused = call.indices is None and call.q.element_size() > 1 and not call.build.ignores_descales
    return refused or not call.build.descales


PROVIDERS: Rows = (
    Provider(HOST, "cache that our kernels cannot read: kv_format not V32, use_legacy=False, 528 or 288 bytes per row",
        _unknown_format),
    Provider(OURS, "invalid shape: q or the cache is not 4-D, or indices are not 3-D", _odd),
    Provider(OURS, "FlashMLASchedMeta, sink, second cache or lengths, which the release's wrapper does not accept",
        lambda call: _newer(call) and not call.build.newer),
    Provider(OURS, "descales, which the release's wrapper or, in 16 bits, sgl-flash-mla does not accept", _descales),
    Provider(OURS, "no CUDA operator of FlashMLA is loaded", _no_build),
    Provider(OURS, "GPU other than sm_90, sm_100 and sm_103", _other_chip),
    Provider(OURS, "empty batch or no queries", lambda call: 0 in call.q.shape[:2]),
    Provider(OURS, "sparse: heads other than 64 or 128, or topk that is 0 or not a multiple of 64", _other_sparse),
    Provider(OURS, "sparse, 656 bytes: lengths or a second cache", _v32_with_more),
    Provider(OURS, "dense: GPU other than sm_90, or page size other than 64", _other_dense),
    Provider(OURS, "dense: width other than 576 (or 512 in 16 bits, where the operator accepts it)", _dense_width),
    Provider(OURS, "dense, e4m3: FlashMLASchedMeta or no descales", _dense_e4m3),
    Provider(HOST, "every other call: the engine's CUDA operator serves it", lambda call: True),
)  # fmt: skip


def _other_prefill(call: PrefillCall) -> bool:
    heads, width = call.q.shape[-2:]
    return not sglang_flash_mla.prefill_takes(heads, width, call.indices.shape[-1], capability_of(call.q))


def _other_type(call: PrefillCall) -> bool:
    import torch

    return any(getattr(one, "dtype", None) is not torch.bfloat16 for one in (call.q, call.kv))


def _more_than_the_operator(call: PrefillCall) -> bool:
    more = call.attn_sink is not None or call.topk_length is not None
    return more and (not call.build.newer or sglang_flash_mla.prefill_arity(call.build.module) < 7)


PREFILL_PROVIDERS: Rows = (
    Provider(OURS, "sparse prefill: invalid shape: q or indices are not 3-D",
        lambda call: dims(call.q) != 3 or dims(call.indices) != 3),
    Provider(OURS, "sparse prefill: no CUDA operator of FlashMLA is loaded",
        lambda call: not sglang_flash_mla.prefill_arity(call.build.module)),
    Provider(OURS, "sparse prefill: sink or lengths, which the operator does not accept", _more_than_the_operator),
    Provider(OURS, "sparse prefill: GPU other than sm_90, sm_100 and sm_103", _other_chip),
    Provider(OURS, "sparse prefill: dtype other than bfloat16", _other_type),
    Provider(OURS, "sparse prefill: no queries", lambda call: call.q.shape[0] == 0),
    Provider(OURS,
        "sparse prefill: heads other than 64 or 128, or topk that is 0 or not a multiple of 128 (sm_100: at times 64)",
        _other_prefill),
    Provider(HOST, "sparse prefill: every other call: the engine's CUDA operator serves it", lambda call: True),
)  # fmt: skip


def kept_by_host(rows: Rows, call: KvCacheCall | PrefillCall) -> str | None:
    """Why this call goes to the host, or None."""
    row = next(row for row in rows if row.applies(call))
    return row.when if row.provider == HOST else None
