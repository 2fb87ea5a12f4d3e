"""SGLang's two KV-index builders, served by mla_patch.kernels.indices.kv.

Why: the engine's kernels walk the context of a request in one program: both up to and including 0.5.12.post1, the
token-id builder by default in all releases. One long request then keeps the whole step waiting. Our kernels are
parallel over context and batch, and correct for any grid and for tables beyond 2**31 bytes.
"""

from __future__ import annotations

import copy
from typing import Any

from mla_patch.compat.sglang import kv_indices as sglang_kv_indices
from mla_patch.compat.sglang.kv_indices import PageTableCall, TokenIndicesCall
from mla_patch.compat.sglang.release import supported
from mla_patch.compat.types import Target
from mla_patch.features import Feature
from mla_patch.hooks.sglang.edits import graphs as sglang_graphs
from mla_patch.hookspecs import hookimpl


def targets(version: str | None) -> tuple[Target, ...]:
    """The two builders of ``version``; every known home and parameter list when it is unknown."""
    builders = (
        (sglang_kv_indices.page_table, serve_page_table),
        (sglang_kv_indices.token_indices, serve_token_indices),
    )
    return tuple(
        home.target(declines, serve, shadow_clone=shadow_clone) for homes, serve in builders for home in homes(version)
    )


FEATURE = Feature(
    name="kv_indices",
    host=supported(),
    targets=targets,
    why="the engine builds the KV indices of a request in one program, however long its context is",
    upstream="https://github.com/sgl-project/sglang/pull/27320",
    drop_when="the engine's builders are parallel over context and batch for every caller",
    steps=sglang_graphs.step_targets,
    promises="deterministic inference: the promise holds, also during an experiment: our kernel writes the same "
    "integer indices as the engine's kernel",
)


@hookimpl
def mla_patch_features() -> list[Feature]:
    return [FEATURE]


def declines(call: PageTableCall | TokenIndicesCall) -> str | None:
    """Why this launch goes to the engine, or None. The launcher refuses shapes and dtypes that it cannot take."""
    if call.extra is not None:
        return call.extra
    if type(call.grid) is not tuple:
        return "callable grid" if callable(call.grid) else "grid is not a tuple"
    return None


def serve_page_table(call: PageTableCall) -> None:
    from mla_patch.kernels.indices.kv import build_page_table

    build_page_table(
        call.req_to_token,
        call.req_pool,
        call.lens,
        call.out,
        kv_start=call.kv_start,
        page_size=call.page_size,
        rows=call.grid[0],
        row_stride=call.row_stride,
        out_stride=call.out_stride,
    )


def serve_token_indices(call: TokenIndicesCall) -> None:
    from mla_patch.kernels.indices.kv import build_token_indices

    build_token_indices(
        call.req_to_token,
        call.req_pool,
        call.lens,
        call.indptr,
        call.out,
        kv_start=call.kv_start,
        rows=call.grid[0],
        row_stride=call.row_stride,
    )


_SHADOWED = 1 << 22  # entries: a larger index table is too much to copy and compare


def shadow_clone(call: PageTableCall | TokenIndicesCall) -> tuple[Any, list[tuple[Any, Any]]]:
    """For shadow checks: the launch of a builder with a table of its own."""
    if call.out.numel() > _SHADOWED:
        raise ValueError(f"no shadow check: {call.out.numel()} entries, at most {_SHADOWED}")
    if not call.out.is_contiguous():  # the launch says its stride
        raise ValueError("no shadow check: a table that is not contiguous")
    clone = copy.copy(call)
    clone.out = call.out.clone()
    return clone, [(call.out, clone.out)]
