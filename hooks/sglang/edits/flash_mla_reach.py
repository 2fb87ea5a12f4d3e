"""What a backend can ask of FlashMLA's wrappers, so that our kernels are compiled once it is built."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from mla_patch.compat import gpu
from mla_patch.compat.sglang.flash_mla import PACKAGE, Build, KvCacheCall, PrefillCall, v4_heads, v32_backend
from mla_patch.compat.types import Undo
from mla_patch.hooks.sglang.edits.flash_mla_package import knows_sched_meta
from mla_patch.hooks.sglang.edits.warmup import warm_once_built

Warm = Callable[[Any], int]  # (calls) -> how many kernels were compiled


def warm_dense(home: str, warm: Warm, module: ModuleType) -> Undo:
    return warm_once_built(module.FlashMLABackend, warm, partial(dense_calls, home))


def warm_v32(home: str, warm: Warm, module: ModuleType) -> Undo:
    return warm_once_built(v32_backend(module), warm, partial(v32_calls, home))


def warm_v4(home: str, warm: Warm, module: ModuleType) -> Undo:
    return warm_once_built(module.DeepseekV4AttnBackend, warm, partial(v4_calls, home))


def _build(home: str) -> Build:
    """The FlashMLA that a backend will call: most import it at their first call, so it may not be loaded yet."""
    import_module(home)
    return Build(home, knows_sched_meta(Build(home, False)))


def dense_calls(home: str, backend: Any, runner: Any) -> list[KvCacheCall]:
    """What a FlashMLABackend can ask, over one page."""
    import torch

    if (backend.kv_lora_rank, backend.qk_rope_head_dim) != (512, 64):
        return []
    e4m3 = torch.float8_e4m3fn
    dtype = e4m3 if backend.data_type is e4m3 else backend.q_data_type
    q = torch.zeros(1, 1, backend.num_q_heads, 576, device=runner.device).to(dtype)
    cache = torch.zeros(1, 64, 1, 576, device=runner.device).to(dtype)
    scale = torch.ones(1, device=runner.device) if dtype is e4m3 else None
    return [KvCacheCall(_build(home), q, cache, None, None, 512, None, descale_q=scale, descale_k=scale)]


def v32_calls(home: str, backend: Any, runner: Any) -> list[KvCacheCall | PrefillCall]:
    """What V3.2's backend can ask, over one token."""
    import torch

    names = ("nsa_prefill_impl", "nsa_decode_impl", "dsa_prefill_impl", "dsa_decode_impl")
    chosen = {getattr(backend, name, None) for name in names}
    scope = vars(sys.modules[type(backend).__module__])
    chosen |= {scope.get("NSA_PREFILL_IMPL"), scope.get("NSA_DECODE_IMPL")}
    sparse = bool(chosen & {"flashmla_decode", "flashmla_kv", "flashmla_auto"})
    prefill = bool(chosen & {"flashmla_prefill", "flashmla_sparse", "flashmla_auto"}) and home != PACKAGE
    # from 0.5.22 there are models without rope, whose caches are the host's
    if not (sparse or prefill) or getattr(backend, "qk_rope_head_dim", 64) != 64:
        return []
    build, device = _build(home), runner.device
    topk = backend.dsa_index_topk if hasattr(backend, "dsa_index_topk") else backend.nsa_index_topk
    ids = torch.zeros(1, 1, topk, dtype=torch.int32, device=device)
    calls: list[KvCacheCall | PrefillCall] = []
    if sparse:
        heads = getattr(backend, "flashmla_kv_num_q_heads", backend.num_q_heads)
        q = torch.zeros(1, 1, heads, 576, dtype=torch.bfloat16, device=device)
        cache = torch.zeros(1, 64, 1, 656, dtype=torch.uint8, device=device)
        calls.append(KvCacheCall(build, q, cache, None, None, 512, None, is_fp8_kvcache=True, indices=ids))
    if prefill:
        heads, least = backend.num_q_heads, 128 if getattr(backend, "device_sm_major", 0) >= 10 else 64
        if hasattr(backend, "device_sm_major") and heads % least:
            heads = least
        q = torch.zeros(1, heads, 576, dtype=torch.bfloat16, device=device)
        calls.append(PrefillCall(build, q, q[:, :1], ids, 1.0))
        if build.newer:  # later releases over it pass lengths with prompts that have a prefix
            lens = torch.ones(1, dtype=torch.int32, device=device)
            calls.append(PrefillCall(build, q, q[:, :1], ids, 1.0, topk_length=lens))
    return calls


def v4_calls(home: str, backend: Any, runner: Any) -> list[KvCacheCall | PrefillCall]:
    """What DeepSeek V4's backend can ask, over one token."""
    import torch

    pool, device = backend.token_to_kv_pool, runner.device
    place = torch.ones(1, dtype=torch.int32, device=device)
    # on sm_120 the release has kernels of its own from 0.5.13
    own = home != PACKAGE and place.is_cuda and gpu.capability(place.device.index)[0] == 12
    if own or getattr(backend, "trtllm_attn", False) or pool.swa_kv_pool.kv_cache_total_dim != 584:
        return []
    build = _build(home)

    def cache(size: int) -> Any:
        return torch.zeros(1, size, 1, 584, dtype=torch.uint8, device=device)

    ids = torch.zeros(1, 1, 128, dtype=torch.int32, device=device)
    ratios = [ratio for ratio in getattr(backend, "present_ratios", (4, 128)) if ratio in (4, 128)]
    calls: list[KvCacheCall | PrefillCall] = []
    for heads in v4_heads(runner):
        q = torch.zeros(1, 1, heads, 512, dtype=torch.bfloat16, device=device)
        sink = torch.zeros(heads, device=device)
        for ratio in (None, *ratios):
            given: dict[str, Any] = {}
            if ratio is not None:
                given["extra_k_cache"] = cache(pool.page_size // ratio)
                given |= {"extra_indices_in_kvcache": ids, "extra_topk_length": place}
            given |= {"is_fp8_kvcache": True, "indices": ids, "attn_sink": sink, "topk_length": place}
            calls.append(KvCacheCall(build, q, cache(pool.swa_kv_pool.page_size), None, None, 512, None, **given))
        if hasattr(backend, "_forward_prefill_sparse"):
            calls.append(PrefillCall(build, q[0], q[0, :, :1], ids, 1.0, attn_sink=sink, topk_length=place))
    return calls
