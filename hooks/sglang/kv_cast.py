"""SGLang's FA3 and FlashInfer backends over an fp8 MLA cache: mla_patch.kernels.cache.kv_cast casts what a call reads.

Why: the kernels of these backends read 16 bits. So each layer of each target verify, draft extend and prompt with a
prefix casts the layer's whole pool, however little of it the batch names.

The engine's method still stores the keys and attends, with the same rows in the same order, so that its result does not
change by a bit. It reads a workspace instead of the pool. The workspace has one of two forms:

* the pages that the batch's tables name, packed, if these are fewer than the pool's pages;
* else room for the whole pool, as under CUDA graphs with long contexts. Only the named pages are written there, under
  their own numbers.

The workspace comes from torch's allocator at each call and goes back after it. So the layers of a step use the same
memory in turn, and a captured graph has the workspace in its pool, where the engine's copy would be.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from mla_patch.compat import gpu
from mla_patch.compat.sglang import kv_cast as compat
from mla_patch.compat.sglang.kv_cast import CastWarmup, ExtendCall, Fa3Extend, FlashInferExtend
from mla_patch.compat.sglang.release import supported
from mla_patch.compat.types import Change, Edit, Undo
from mla_patch.features import Feature
from mla_patch.hooks.sglang.edits import graphs as sglang_graphs
from mla_patch.hooks.sglang.edits.cast_view import extend
from mla_patch.hooks.sglang.edits.warmup import warm_once_built
from mla_patch.hookspecs import hookimpl


def targets(version: str | None) -> tuple[Change, ...]:
    """Both backends in ``version``; FA3's in every shape when it is unknown."""
    found: list[Change] = []
    for call, warm_up in ((Fa3Extend, warm_fa3), (FlashInferExtend, warm_flashinfer)):
        module, owner, group = call.home.module, call.home.owner, call.home.name
        found += [
            home.target(declines, serve, around=True, shadow_clone=shadow_clone, group=group)
            for home in compat.homes(call, version)
        ]
        found.append(Edit(module, f"{owner}.warmup", warm_up, group=group))
    return tuple(found)


def warm_fa3(module: ModuleType) -> Undo:
    """Have what its calls can reach compiled once a backend is built."""
    return warm_once_built(module.FlashAttentionBackend, warm, compat.warmup_of)


def warm_flashinfer(module: ModuleType) -> Undo:
    """As `warm_fa3`; backends that inherit from it are built by its constructor, too."""
    return warm_once_built(module.FlashInferMLAAttnBackend, warm, compat.warmup_of)


FEATURE = Feature(
    name="kv_cast",
    host=supported(),
    targets=targets,
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
    """Why the engine casts the pool, or None."""
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

    return extend(original, call, cast, places)


def shadow_clone(call: ExtendCall) -> tuple[ExtendCall, None]:
    """For shadow checks: the output is what is returned. Both arms store the same keys, twice."""
    return call, None


def warm(asked: CastWarmup) -> int:
    """Compile what a backend's casts can reach, before it serves; how many kernels that took."""
    import torch

    from mla_patch.kernels.cache import kv_cast

    if not gpu.on_nvidia(torch.empty(0, device=asked.device)):
        return 0
    return sum(kv_cast.warmup(asked.device, asked.dtype, asked.cache_dtype, size) for size in asked.page_sizes)
