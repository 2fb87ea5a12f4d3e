"""What prompts of a V4 or V3.2 backend can ask of our kernels, so that it is compiled once the backend is built."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mla_patch.compat.sglang.flash_mla import v4_heads, v32_backend
from mla_patch.compat.sglang.v4_chunk import has_another_route
from mla_patch.compat.types import Undo
from mla_patch.hooks.sglang.edits.warmup import warm_once_built

Warm = Callable[["WarmupShapes"], int]  # -> how many kernels were compiled


@dataclass(frozen=True)
class WarmupShapes:
    """The shapes in which prompts of one backend can reach our kernels."""

    device: Any
    pages: tuple[int, ...] = ()  # tokens of V4's pages; empty: V3.2
    heads: tuple[int, ...] = ()  # of V4's queries


def warm_v4(warm: Warm, module: ModuleType) -> Undo:
    """What our route, or the release's with our kernels, reaches is compiled once a backend is built."""
    return warm_once_built(module.DeepseekV4AttnBackend, warm, functools.partial(v4_shapes, module))


def v4_shapes(module: ModuleType, backend: Any, runner: Any) -> WarmupShapes | None:
    """Pages and heads of a V4 backend; None where its prompts take another route."""
    pool = backend.token_to_kv_pool
    if pool.swa_kv_pool.kv_cache_total_dim != 584 or has_another_route(module, backend):
        return None
    ratios = [ratio for ratio in getattr(backend, "present_ratios", (4, 128)) if ratio]
    pages = (pool.swa_kv_pool.page_size, *(pool.page_size // ratio for ratio in ratios))
    return WarmupShapes(runner.device, pages, v4_heads(runner))


def warm_v32(warm: Warm, module: ModuleType) -> Undo:
    """V3.2's dequantiser is compiled once a backend is built."""
    return warm_once_built(v32_backend(module), warm, lambda backend, runner: WarmupShapes(runner.device))
