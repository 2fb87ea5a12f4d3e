"""Where a layer of a DeepSeek V4 prompt attends: the one place that decides it.

    route(call)               a layer that our route could serve
    route(prompt, OF_STEP)    all layers of a step, before the engine plans it (0.5.12)
    route(prompt, OF_LAYER)   a layer, before the engine takes its own route (0.5.13 - 0.5.20)

A `Route` is one row of the table that `mla-patch explain sparse_prefill` and docs/sparse-prefill.md print, and its text
is the reason in a report. The first row that applies decides. The shorter lists hold the rows that can be known by
then, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from mla_patch.compat import gpu
from mla_patch.compat.generations import generation_of
from mla_patch.compat.gpu import capability_of
from mla_patch.compat.sglang import deterministic as sglang_deterministic
from mla_patch.compat.sglang import flash_mla as sglang_flash_mla
from mla_patch.compat.sglang import v4_chunk
from mla_patch.compat.sglang.v4_chunk import ChunkCall, Prompt
from mla_patch.compat.types import Variable
from mla_patch.flags import value

FLAG = "MLA_PATCH_SPARSE_PREFILL"  # the feature's


def _mebibytes(text: str) -> str:
    if not text.strip().isdecimal():
        raise ValueError("expected a number of MiB")
    return text.strip()


ROUTE = Variable(
    "ROUTE", ("auto", "all", "large"), "auto", "which V4 prompts attend over a workspace: "
    "those that are faster there (`auto`), all, or only those that pages cannot serve (`large`)",
)  # fmt: skip
WORKSPACE = Variable(
    "WORKSPACE", (), "4096", "MiB for the V4 workspace; larger prompts attend over pages", _mebibytes
)  # fmt: skip


class Route(Enum):
    """Where a layer attends, and why; the rows of the table, in order."""

    # the engine attends
    DETERMINISTIC = sglang_deterministic.REASON
    NOT_A_PROMPT = "not a prompt: decode, verify or draft"
    CAPTURED = "graph capture: the graph would keep the sizes of this chunk"
    HISPARSE = "HiSparse manages its own slots"
    PARALLEL = "context parallelism: this rank has every n-th query"
    AHEAD = "the release built the metadata of this chunk in advance"
    NO_POSITIONS = "the indexer kept no positions"
    OTHER_PAGES = "pages in another layout"
    # by lengths, which are asked last: where the scheduler does not have them, the device is waited for
    TOO_LARGE = "a workspace larger than MLA_PATCH_SPARSE_PREFILL_WORKSPACE"
    FEW = "few enough queries to attend over pages (MLA_PATCH_SPARSE_PREFILL_ROUTE)"
    # over a workspace that our kernels fill
    FLASH_MLA = "64 or 128 heads on sm_90, sm_100 and sm_103, with a FlashMLA that accepts sinks and lengths"
    TRITON = "everything else: any GPU from sm_80, 1 to 128 heads"

    @property
    def provider(self) -> str:
        """Who attends, as the table names it."""
        return {Route.FLASH_MLA: "ours + FlashMLA", Route.TRITON: "triton"}.get(self, "host")


def route(prompt: Prompt, among: tuple[Route, ...] = tuple(Route)) -> Route:
    """The first of ``among`` that applies; the last row always does."""
    for one in among:
        if _APPLIES[one](prompt):
            return one
    return among[-1]


OF_STEP = (Route.DETERMINISTIC, Route.TOO_LARGE, Route.FEW, Route.TRITON)
OF_LAYER = (Route.DETERMINISTIC, Route.PARALLEL, Route.TOO_LARGE, Route.FEW, Route.TRITON)
# whose kernel attends over a workspace is looked up once, when the layer is served
OF_CALL = tuple(one for one in Route if one is not Route.FLASH_MLA)
OVER_PAGES = (Route.PARALLEL, Route.TOO_LARGE, Route.FEW)  # where the engine is kept from its own route


def declines(call: ChunkCall) -> str | None:
    """Why the engine serves this layer, or None."""
    found = route(call, OF_CALL)
    return found.value if found.provider == "host" else None


_STEP = "_mla_patch_sparse_prefill"  # on a step's metadata (0.5.12): its route, or None: over a workspace
_LAYERS = "_mla_patch_pages"  # on a backend: a step, and the routes of its kinds of layers by their lengths


def settle_step(metadata: Any, found: Route) -> bool:
    """Keep the route of a step (0.5.12), for its layers; whether it is over a workspace."""
    over_workspace = found.provider != "host"
    setattr(metadata, _STEP, None if over_workspace else found)
    return over_workspace


def _settled(prompt: Prompt) -> Route | None:
    """What was kept of the step of a layer of 0.5.12; `Route.NOT_A_PROMPT` where nothing was."""
    if not isinstance(prompt, ChunkCall) or prompt.is_routed:
        return None
    return vars(prompt.backend.forward_metadata).get(_STEP, Route.NOT_A_PROMPT)


def paged_route_supports(queries: int, device: Any) -> bool:
    """Whether FlashMLA can make a schedule for so many queries over pages."""
    most = v4_chunk.most_queries(device)
    return most is None or queries <= most


def by_lengths(prompt: Prompt) -> Route | None:
    """`TOO_LARGE`, `FEW` or None. What pages cannot serve is always over a workspace."""
    if isinstance(prompt, ChunkCall) and prompt.is_routed:
        return None  # lengths were asked before the engine took its route
    settled = _settled(prompt)
    if settled is not None:
        return settled
    if not paged_route_supports(prompt.queries, prompt.device):
        return None
    if prompt.ratio is None:
        return ask_lengths(prompt)
    return _asked_once(prompt, ask_lengths)


def _asked_once(prompt: Prompt, ask: Callable[[Prompt], Route | None]) -> Route | None:
    """What the first layer of that ratio was told in this step is all its layers' answer."""
    backend = prompt.backend
    step = generation_of(backend.forward_metadata), generation_of(prompt.batch)
    known = vars(backend).get(_LAYERS)
    if known is None or known[0] != step:
        known = step, {}
        setattr(backend, _LAYERS, known)
    if prompt.ratio not in known[1]:
        known[1][prompt.ratio] = ask(prompt)
    return known[1][prompt.ratio]


def ask_lengths(prompt: Prompt) -> Route | None:
    """What the variables make of the lengths of all requests of a step."""
    from mla_patch.chunk_cache import SparsePrefillChunkCache, pages_are_faster

    wanted = value(FLAG, ROUTE)
    settled = isinstance(prompt, ChunkCall)  # a layer of 0.5.12: variables and bound were asked of its step
    if settled and wanted != "auto":
        return None
    if wanted == "large":
        return Route.FEW
    if gpu.capturing() and not v4_chunk.has_host_lens(prompt.batch):
        return None  # to ask the device would end the capture
    lens, window = v4_chunk.host_lens(prompt.batch), v4_chunk.window(prompt.backend)
    # ratio 4 has the most compressed tokens
    if not settled and SparsePrefillChunkCache.needed(*lens, window, 4) > workspace_limit():
        return Route.TOO_LARGE
    if wanted != "auto" or prompt.ratio is None or prompt.heads is None:
        return None
    topk = v4_chunk.topk(prompt.core, prompt.ratio)
    return Route.FEW if pages_are_faster(*lens, window, prompt.ratio, topk, prompt.heads) else None


def workspace_limit() -> int:
    """Bytes that a workspace may have."""
    return int(value(FLAG, WORKSPACE)) << 20


def flash_mla_has_build(heads: int, width: int, capability: tuple[int, int] | None) -> bool:
    """Whether FlashMLA has a build of its sparse prefill for such layers."""
    # rows of indices are padded to 128, so that any topk will do
    return capability in sglang_flash_mla.CHIPS and sglang_flash_mla.prefill_takes(heads, width, 128, capability)


def flash_mla(call: ChunkCall) -> Callable[..., Any] | None:
    """The release's own flash_mla_sparse_fwd, where FlashMLA has a build for this layer."""
    queries, heads, width = call.q.shape
    if not queries or not flash_mla_has_build(heads, width, capability_of(call.q)):
        return None
    return sglang_flash_mla.prefill_wrapper(call.module)


_APPLIES: dict[Route, Callable[[Any], bool]] = {
    # the choice by lengths depends on the other prompts of the step
    Route.DETERMINISTIC: lambda prompt: sglang_deterministic.is_on() or _settled(prompt) is Route.DETERMINISTIC,
    Route.NOT_A_PROMPT: lambda prompt: _settled(prompt) is Route.NOT_A_PROMPT,
    Route.TOO_LARGE: lambda prompt: by_lengths(prompt) is Route.TOO_LARGE,
    Route.FEW: lambda prompt: by_lengths(prompt) is Route.FEW,
    Route.CAPTURED: lambda call: gpu.capturing(),
    Route.HISPARSE: v4_chunk.has_hisparse,
    Route.PARALLEL: lambda prompt: v4_chunk.is_strided(prompt.core),
    Route.AHEAD: v4_chunk.is_built_ahead,
    Route.NO_POSITIONS: v4_chunk.lacks_positions,
    Route.OTHER_PAGES: lambda call: not v4_chunk.has_known_pages(call),
    Route.FLASH_MLA: lambda call: flash_mla(call) is not None,
    Route.TRITON: lambda prompt: True,
}
