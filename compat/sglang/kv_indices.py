"""SGLang: where its two KV-index builders are and how they are called, per release.

They are Triton kernels, launched as ``kernel[grid](...)``:

    to 0.5.12.post1   srt.layers.attention.utils                      grid (rows,)
    0.5.13 - 0.5.15   srt.layers.attention.triton_ops.kv_indices      page table: grid (rows, blocks)
    0.5.16 - 0.5.22   kernels.ops.kvcache.kv_indices
    from 0.5.23       kernels.ops.attention.kv_indices

    create_flashmla_kv_indices_triton (page table): seven parameters, then
        0.5.1 - 0.5.3     NUM_PAGE_PER_BLOCK=64, PAGED_SIZE=64
        0.5.4 - 0.5.16    PAGED_SIZE=64
        0.5.17 - 0.5.18   PAGED_SIZE=64, v2p_ptr=None, PAGE_MULT=1
        from 0.5.19       PAGED_SIZE=64
    create_flashinfer_kv_indices_triton (flat token ids): seven parameters, then
        0.5.1             PAGE_SIZE=1
        0.5.2 - 0.5.18    nothing
        0.5.19            ENTRY_PAGE_SIZE=1
        0.5.20 - 0.5.21   ENTRY_PAGE_SIZE=1, TOKEN_BLOCK_PARALLEL=False
        from 0.5.22       ENTRY_PAGE_SIZE=1, TOKEN_BLOCK_PARALLEL=False, token_mapping=None
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mla_patch.compat.eras import Eras, era_of
from mla_patch.compat.types import Home


class PageTableCall:
    """One launch of the page-table builder, of any release. Shapes: ``mla_patch/kernels/indices/kv.py``."""

    __slots__ = (
        "extra", "grid", "kv_start", "lens", "out", "out_stride", "page_size", "req_pool", "req_to_token", "row_stride",
    )  # fmt: skip
    tensors, numbers = ("req_to_token", "req_pool", "lens", "out"), ("row_stride", "out_stride", "page_size")
    optional = ("kv_start",)

    def __init__(
        self,
        grid: Any,
        req_to_token: Any,
        req_pool: Any,
        lens: Any,
        kv_start: Any,
        out: Any,
        row_stride: Any,
        out_stride: Any,
        page_size: Any,
        extra: str | None,
    ) -> None:
        self.grid = grid
        self.req_to_token = req_to_token  # [max requests, max context], int32
        self.req_pool = req_pool
        self.lens = lens
        self.kv_start = kv_start
        self.out = out
        self.row_stride = row_stride
        self.out_stride = out_stride
        self.page_size = page_size
        self.extra = extra  # a parameter of this release that holds something else than its default


class TokenIndicesCall:
    """One launch of the token-id builder, of any release."""

    __slots__ = ("extra", "grid", "indptr", "kv_start", "lens", "out", "req_pool", "req_to_token", "row_stride")
    tensors, numbers = ("req_to_token", "req_pool", "lens", "indptr", "out"), ("row_stride",)
    optional = ("kv_start",)

    def __init__(
        self,
        grid: Any,
        req_to_token: Any,
        req_pool: Any,
        lens: Any,
        indptr: Any,
        kv_start: Any,
        out: Any,
        row_stride: Any,
        extra: str | None,
    ) -> None:
        self.grid = grid
        self.req_to_token = req_to_token
        self.req_pool = req_pool
        self.lens = lens
        self.indptr = indptr
        self.kv_start = kv_start
        self.out = out
        self.row_stride = row_stride
        self.extra = extra


# The parameters below carry the engine's names, since a caller may pass any of them by name.


def page_table_call(
    grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride, kv_indices_ptr_stride, PAGED_SIZE=64,
):  # fmt: skip
    return PageTableCall(
        grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
        req_to_token_ptr_stride, kv_indices_ptr_stride, PAGED_SIZE, None,
    )  # fmt: skip


def page_table_call_051(
    grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride, kv_indices_ptr_stride, NUM_PAGE_PER_BLOCK=64, PAGED_SIZE=64,
):  # fmt: skip
    return PageTableCall(
        grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
        req_to_token_ptr_stride, kv_indices_ptr_stride, PAGED_SIZE,
        None if NUM_PAGE_PER_BLOCK == 64 else "NUM_PAGE_PER_BLOCK",
    )  # fmt: skip


def page_table_call_0517(
    grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride, kv_indices_ptr_stride, PAGED_SIZE=64, v2p_ptr=None, PAGE_MULT=1,
):  # fmt: skip
    extra = "v2p_ptr" if v2p_ptr is not None else "PAGE_MULT" if PAGE_MULT != 1 else None
    return PageTableCall(
        grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
        req_to_token_ptr_stride, kv_indices_ptr_stride, PAGED_SIZE, extra,
    )  # fmt: skip


def token_indices_call(
    grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_indptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride,
):  # fmt: skip
    return TokenIndicesCall(
        grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_indptr, kv_start_idx, kv_indices_ptr,
        req_to_token_ptr_stride, None,
    )  # fmt: skip


def token_indices_call_051(
    grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_indptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride, PAGE_SIZE=1,
):  # fmt: skip
    return TokenIndicesCall(
        grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_indptr, kv_start_idx, kv_indices_ptr,
        req_to_token_ptr_stride, None if PAGE_SIZE == 1 else "PAGE_SIZE",
    )  # fmt: skip


def token_indices_call_0519(
    grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_indptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride, ENTRY_PAGE_SIZE=1, TOKEN_BLOCK_PARALLEL=False, token_mapping=None,
):  # fmt: skip
    # TOKEN_BLOCK_PARALLEL only says how the engine's kernel divides its work: our kernel divides it anyway
    extra = "ENTRY_PAGE_SIZE" if ENTRY_PAGE_SIZE != 1 else "token_mapping" if token_mapping is not None else None
    return TokenIndicesCall(
        grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_indptr, kv_start_idx, kv_indices_ptr,
        req_to_token_ptr_stride, extra,
    )  # fmt: skip


PAGE_TABLE_PARAMS = (
    "req_to_token_ptr", "req_pool_indices_ptr", "page_kernel_lens_ptr", "kv_start_idx", "kv_indices_ptr",
    "req_to_token_ptr_stride", "kv_indices_ptr_stride",
)  # fmt: skip
TOKEN_INDICES_PARAMS = (
    "req_to_token_ptr", "req_pool_indices_ptr", "page_kernel_lens_ptr", "kv_indptr", "kv_start_idx", "kv_indices_ptr",
    "req_to_token_ptr_stride",
)  # fmt: skip

Builder = tuple[tuple[str, ...], Callable[..., Any]]  # (its last parameters, what makes the call object)
_MODULES: Eras[str] = (
    ("0.5.23", "sglang.kernels.ops.attention.kv_indices"),
    ("0.5.16", "sglang.kernels.ops.kvcache.kv_indices"),
    ("0.5.13", "sglang.srt.layers.attention.triton_ops.kv_indices"),
    ("0.5.1", "sglang.srt.layers.attention.utils"),
)
_PAGE_TABLE: Eras[Builder] = (
    ("0.5.19", (("PAGED_SIZE",), page_table_call)),
    ("0.5.17", (("PAGED_SIZE", "v2p_ptr", "PAGE_MULT"), page_table_call_0517)),
    ("0.5.4", (("PAGED_SIZE",), page_table_call)),
    ("0.5.1", (("NUM_PAGE_PER_BLOCK", "PAGED_SIZE"), page_table_call_051)),
)
_TOKEN_INDICES: Eras[Builder] = (
    ("0.5.22", (("ENTRY_PAGE_SIZE", "TOKEN_BLOCK_PARALLEL", "token_mapping"), token_indices_call_0519)),
    ("0.5.20", (("ENTRY_PAGE_SIZE", "TOKEN_BLOCK_PARALLEL"), token_indices_call_0519)),
    ("0.5.19", (("ENTRY_PAGE_SIZE",), token_indices_call_0519)),
    ("0.5.2", ((), token_indices_call)),
    ("0.5.1", (("PAGE_SIZE",), token_indices_call_051)),
)


def _builders(name: str, first: tuple[str, ...], eras: Eras[Builder], version: str | None) -> list[Home]:
    return [
        Home(module, name, first + rest, "kernel", bind)
        for module in era_of(_MODULES, version)
        for rest, bind in era_of(eras, version)
    ]


def page_table(version: str | None) -> list[Home]:
    """The page-table builder of ``version``; every known home and parameter list when it is unknown."""
    return _builders("create_flashmla_kv_indices_triton", PAGE_TABLE_PARAMS, _PAGE_TABLE, version)


def token_indices(version: str | None) -> list[Home]:
    """The token-id builder of ``version``; every known home and parameter list when it is unknown."""
    return _builders("create_flashinfer_kv_indices_triton", TOKEN_INDICES_PARAMS, _TOKEN_INDICES, version)
