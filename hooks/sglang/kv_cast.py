"""SGLang's FA3 and FlashInfer backends over an fp8 MLA cache: mla_patch.kernels.cache.kv_cast casts what a call reads.

Why: their kernels read 16 bits, so each layer of each target verify, draft extend and prompt with a prefix casts the
whole pool of that layer, however little the batch names.

The host's own method still stores the keys and attends, with the same rows in the same order, so its result does not
change by a bit. It reads a workspace: the pages that the batch's tables name, packed, where they are fewer than the
pool's; else, as under CUDA graphs with long contexts, room for the pool, of which the named pages alone are written,
under their own numbers. The workspace comes from torch's allocator at each call and goes back after it, so the layers
of a step take turns in the same memory, and a captured graph has it in its pool, where the host's own copy would be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mla_patch.compat import gpu
from mla_patch.compat.sglang import kv_cast as compat
from mla_patch.compat.sglang.kv_cast import Casts, ExtendCall
from mla_patch.features import Feature
from mla_patch.hooks.sglang.edits import graphs as sglang_graphs
from mla_patch.hookspecs import hookimpl

FEATURE = Feature(
    name="kv_cast",
    host="sglang>=0.5.1,<0.5.24",
    targets=compat.targets,
    why="FA3 and FlashInfer read a 16-bit cache, so the engine casts a layer's whole fp8 pool for each call",
    upstream="https://github.com/sgl-project/sglang/issues/35291",
    drop_when="the engine casts only what a batch names, or its kernels read fp8",
    hardware=gpu.not_nvidia,
    steps=sglang_graphs.step_targets,
    promises="deterministic inference: the promise holds: the cast is exact, and the engine's attention kernel reads "
    "the same rows in the same order",
)


@hookimpl
def mla_patch_features() -> list[Feature]:
    return [FEATURE]


def declines(call: ExtendCall) -> str | None:
    """Why the host casts the pool itself, or None."""
    return compat.problem(call)


def serve(original: Callable[..., Any], call: ExtendCall) -> Any:
    import torch

    from mla_patch.kernels.cache.kv_cast import cast_pages
    from mla_patch.kernels.common.constants import WIDTH

    tables = call.tables()
    dtype, named = call.q.dtype, sum(table.ids.numel() * table.page_size for table in tables)
    packs = named < compat.read(call).shape[0]
    places = [torch.empty(t.ids.shape, dtype=torch.int32, device=t.ids.device) for t in tables] if packs else None

    def cast(cache: Any) -> Any:
        rows = named if packs else cache.shape[0]
        out = torch.empty(rows, 1, WIDTH, dtype=dtype, device=cache.device)
        first = 0
        for at, (ids, lens, page_size) in enumerate(tables):
            place = None if places is None else places[at]
            cast_pages(cache, ids, lens, out, page_size=page_size, places=place, first=first)
            first += ids.numel() if packs else 0
        return out

    return compat.extend(original, call, cast, places)


def warm(asked: Casts) -> int:
    """Compile what a backend's casts can reach, before it serves; how many kernels that took."""
    import torch

    from mla_patch.kernels.cache import kv_cast

    if not gpu.on_nvidia(torch.empty(0, device=asked.device)):
        return 0
    return sum(kv_cast.warmup(asked.device, asked.dtype, asked.cache_dtype, size) for size in asked.page_sizes)
