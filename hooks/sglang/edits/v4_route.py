"""Edits that send each layer of a DeepSeek V4 prompt where `v4_policy` says, per release.

0.5.12             `allocate_topk_positions`, `record_topk_positions`: our route needs what the indexer has chosen
0.5.13 - 0.5.20    `route_prompts`: the engine is kept from its own route, or made to take it
0.5.12 - 0.5.20    `number_metadata`, `plan_many_queries`
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

import wrapt

from mla_patch.compat.generations import bump
from mla_patch.compat.sglang import v4_chunk
from mla_patch.compat.sglang.v4_chunk import Prompt
from mla_patch.compat.types import Undo
from mla_patch.hooks.editing import checked_method, set_methods
from mla_patch.hooks.sglang.edits import v4_policy
from mla_patch.hooks.sglang.edits.v4_policy import Route

_POSITIONS = "_mla_patch_raw_indices"  # on the tensor of slots that the indexer fills: where it puts its positions


def number_metadata(module: ModuleType) -> Undo:
    """Metadata that is filled anew gets a new number: by `copy_`, and where a breakable graph is replayed."""
    owner = module.DSV4Metadata
    names = [name for name in ("copy_", "refresh_for_breakable_cuda_graph_replay_") if name in vars(owner)]
    originals = {name: checked_method(owner, name) for name in names}

    def renewing(original: Any) -> Any:
        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            bump(self)
            result = original(self, *args, **kwargs)
            if "sparse_prefill_cache" in vars(self):
                self.sparse_prefill_cache = None  # of the engine, which up to 0.5.14 keeps it over a replay
            return result

        return method

    return set_methods(owner, {name: renewing(original) for name, original in originals.items()})


class _PagedMode(wrapt.ObjectProxy):
    """A prompt's mode, for which the engine attends over pages."""

    def is_extend_without_speculative(self) -> bool:
        return False


class _PagedBatch(wrapt.ObjectProxy):
    """A prompt's batch, for which the engine attends over pages."""

    @property
    def forward_mode(self) -> Any:
        return _PagedMode(self.__wrapped__.forward_mode)


def route_prompts(module: ModuleType) -> Undo:
    """0.5.13 - 0.5.20: some layers attend over pages, and what pages cannot serve does not, even if the release's own
    number allows it."""
    owner = module.DeepseekV4AttnBackend
    original = checked_method(owner, "forward", *v4_chunk.FORWARD[1:7])
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
            or not forward_batch.forward_mode.is_extend_without_speculative()
            or v4_chunk.has_another_route(module, self)
        ):
            return call(forward_batch)
        prompt = Prompt(self, forward_batch, core, q.shape[0], q.device, q.shape[-2], compress_ratio)
        route = v4_policy.route(prompt, v4_policy.OF_LAYER)
        if route in v4_policy.OVER_PAGES:
            return call(_PagedBatch(forward_batch))
        if (
            route is Route.DETERMINISTIC
            or v4_policy.paged_route_supports(prompt.queries, prompt.device)
            or switch.get()
        ):
            return call(forward_batch)
        with switch.override(True):
            return call(forward_batch)

    return set_methods(owner, {"forward": forward})


def allocate_topk_positions(module: ModuleType) -> Undo:
    """0.5.12: a prompt that takes our route gets a place for the positions that the indexer chooses."""
    owner = module.DeepseekV4AttnBackend
    original = checked_method(owner, "init_forward_metadata", "forward_batch")

    @functools.wraps(original)
    def init_forward_metadata(self: Any, forward_batch: Any) -> None:
        original(self, forward_batch)
        metadata = self.forward_metadata
        if not isinstance(metadata, module.DSV4Metadata):
            return
        if not forward_batch.forward_mode.is_extend_without_speculative():
            return
        core = metadata.core_attn_metadata
        prompt = Prompt(self, forward_batch, core, core.raw_out_loc.shape[0], core.raw_out_loc.device)
        over_workspace = v4_policy.settle_step(metadata, v4_policy.route(prompt, v4_policy.OF_STEP))
        slots = core.c4_sparse_page_indices
        if slots is not None and over_workspace:
            positions = slots.new_full(slots.shape, -1)
            core.c4_sparse_raw_indices = positions
            setattr(slots, _POSITIONS, positions)

    return set_methods(owner, {"init_forward_metadata": init_forward_metadata})


def record_topk_positions(module: ModuleType) -> Undo:
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
            ours = vars(out_page_indices).get(_POSITIONS)
            positions = ours if out_raw_indices is None else out_raw_indices
            original(scores, seq_lens, page_tables, out_page_indices, page_size, positions)
            if ours is not None and positions is not ours:
                ours.copy_(positions)  # somebody else wants them, too

        return topk

    @functools.wraps(before[names[1]])
    def newer(
        scores: Any, seq_lens: Any, page_tables: Any, out_page_indices: Any, page_size: int, metadata: Any
    ) -> None:
        ours = vars(out_page_indices).get(_POSITIONS)
        if ours is None:
            before[names[1]](scores, seq_lens, page_tables, out_page_indices, page_size, metadata)
        else:  # it has no place for positions
            before[names[0]](scores, seq_lens, page_tables, out_page_indices, page_size, ours)

    replaced = {names[0]: transform(before[names[0]]), names[1]: newer, names[2]: transform(before[names[2]])}
    return set_methods(module, replaced)  # type: ignore[arg-type]


def plan_many_queries(module: ModuleType) -> Undo:
    """Up to and including 0.5.20: the indexer's schedule for many queries is made by the release's own kernel, not by
    DeepGEMM's; from 0.5.13 the release does so itself above a number of its own."""
    owner = module.PagedIndexerMetadata
    original = checked_method(owner, "__post_init__")
    switch = module.envs.SGLANG_OPT_USE_JIT_INDEXER_METADATA

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        lens = self.compressed_seq_lens if hasattr(self, "compressed_seq_lens") else self.c4_seq_lens
        most = v4_chunk.most_queries(lens.device)
        if most is None or lens.numel() <= most or switch.get():
            original(self)
            return
        with switch.override(True):
            original(self)

    return set_methods(owner, {"__post_init__": __post_init__})
