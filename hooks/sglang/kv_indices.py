"""SGLang's two KV-index builders, served by mla_patch.kernels.indices.kv.

Why: the host's kernels walk one request's context in one program (all releases to 0.5.12.post1, the
token ids by default to this day), so that one long request keeps the whole step waiting. Ours are
parallel over context and batch alike, and correct for any grid and for tables beyond 2**31 bytes.
"""

from __future__ import annotations

from mla_patch.compat.sglang import decode as sglang
from mla_patch.compat.sglang.decode import PageTableCall, TokenIndicesCall
from mla_patch.features import Feature
from mla_patch.hooks.sglang.edits import graphs as sglang_graphs
from mla_patch.hookspecs import hookimpl

FEATURE = Feature(
    name="kv_indices",
    host="sglang>=0.5.1,<0.5.24",
    targets=sglang.kv_indices_targets,
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
    """Why this launch goes to the host, or None. Shapes and dtypes are the launcher's to refuse."""
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
