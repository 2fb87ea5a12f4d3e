"""Sparse prefill of one chunk over fp8 pages. What all layers share is built once, for the first layer that needs it.

A layer dequantises its keys into a bfloat16 workspace: first the compressed tokens of each request, one request after
the other, then each request's window of the sliding-window (SWA) cache. `mla_patch.kernels.indices.prefill` has the
arithmetic. The queries then attend to the rows that their indices name. Three things depend on the chunk alone: which
slots are read, where each request begins, and the indices of layers that attend to all compressed tokens.

    cache = SparsePrefillChunkCache()                        one for all layers of a model, on one stream
    chunk = cache.chunk(generation, inputs)                  inputs() is called if the generation is new
    out = cache.attend(q, chunk, swa_pages, sm_scale=..., ratio=4, pages=c4_pages, topk_indices=raw)

A generation is any value that compares equal as long as the lengths, tables and cache behind the inputs stay the same;
`mla_patch.compat.generations` numbers objects for this purpose. The workspace holds what one call reads, and nothing
from call to call. The chunk and the workspace belong to the stream that they were made on. A call on another stream
makes its own, and a captured graph may use neither.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mla_patch.compat import gpu
from mla_patch.kernels.cache.dequantize import dequantize_k_cache_paged
from mla_patch.kernels.common.checks import describe
from mla_patch.kernels.common.constants import LATENT
from mla_patch.kernels.indices.prefill import build_swa_token_ids, combine_topk_swa_indices, combined_topk_width
from mla_patch.kernels.sparse.prefill import mla_sparse_prefill

WIDTH = LATENT  # values of a workspace row: V4's keys, rotary values included
ROW_BYTES = WIDTH * 2
_STEP = 16384  # the workspace grows by this many rows: contexts grow with every chunk

_caches: weakref.WeakSet[SparsePrefillChunkCache] = weakref.WeakSet()


def held() -> int:
    """How many bytes all caches of this process hold now: their workspaces, and the metadata of their chunks."""
    return sum(sum(cache.memory().values()) for cache in list(_caches))


@dataclass(frozen=True)
class ChunkInputs:
    """One chunk of R requests, as an engine has it. Tensors are int32, and ``full_to_swa`` may be int64.

        seq_lens, extend_lens  [R]          tokens of a request, and how many of them are this chunk's queries
        seq_lens_cpu, extend_lens_cpu       the same numbers on the CPU, which set the sizes of what is built
        req_pool               [R]          the row of req_to_token that belongs to a request
        req_to_token           [rows, P]    the slot of (row, position)
        full_to_swa            [slots]      maps slots to slots of the SWA cache
        page_table             [>= queries, blocks]    pages of ``page_size`` tokens, a row for each query
        queries                             rows of q, including padding behind the last request's
        window                              how many tokens a query sees uncompressed, including itself
        swa_page_size                       tokens of a page of the SWA cache

    A page holds ``page_size // ratio`` compressed tokens. A request without queries gets no compressed rows.
    """

    seq_lens: torch.Tensor
    extend_lens: torch.Tensor
    seq_lens_cpu: Sequence[int]
    extend_lens_cpu: Sequence[int]
    req_pool: torch.Tensor
    req_to_token: torch.Tensor
    full_to_swa: torch.Tensor
    page_table: torch.Tensor
    queries: int
    window: int
    page_size: int
    swa_page_size: int

    def check(self) -> None:
        """Raises ValueError for lengths, sizes or a page table that disagree; the launchers check the rest."""
        rows = len(self.seq_lens_cpu)
        for name in ("seq_lens", "extend_lens", "req_pool"):
            found = tuple(getattr(self, name).shape)
            if found != (rows,):
                raise ValueError(f"{name}: shape {found}, expected ({rows},): the requests of seq_lens_cpu")
        if len(self.extend_lens_cpu) != rows:
            raise ValueError(f"extend_lens_cpu: {len(self.extend_lens_cpu)} requests, expected {rows} as seq_lens_cpu")
        for request, (seq, new) in enumerate(zip(self.seq_lens_cpu, self.extend_lens_cpu, strict=True)):
            if not 0 <= new <= seq:
                raise ValueError(f"extend_lens_cpu: {new} of request {request}, expected 0 to its {seq} tokens")
        for name in ("window", "page_size", "swa_page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected 1 or more")
        extend = sum(self.extend_lens_cpu)
        if extend > self.queries:
            raise ValueError(f"queries: {self.queries}, expected {extend} or more, the sum of extend_lens_cpu")
        table = self.page_table
        if table.dim() != 2 or table.dtype != torch.int32:
            raise ValueError(
                f"page_table: {table.dtype}, shape {tuple(table.shape)}, expected int32, [queries, blocks]"
            )
        blocks = -(-max(self.seq_lens_cpu, default=0) // self.page_size)
        if table.shape[0] < extend or table.shape[1] < blocks:
            raise ValueError(f"page_table: shape {tuple(table.shape)}, expected [>= {extend}, >= {blocks}]")


@dataclass(frozen=True)
class LayerIndices:
    """What one layer reads and attends to: ``slots`` of its compressed cache, then the chunk's of the SWA cache."""

    slots: torch.Tensor  # [compressed rows] int32
    indices: torch.Tensor  # [queries, width] int32, rows of the workspace, -1 for no key
    lens: torch.Tensor  # [queries] int32


@dataclass
class _Region:
    """Where the requests' compressed tokens of one ratio lie in the workspace, and the indices of its last layer."""

    slots: torch.Tensor  # [compressed rows] int32
    compressed_base: torch.Tensor  # [R] int32, a request's first compressed row
    swa_base: torch.Tensor  # [R] int32, the first row of its window
    longest: int  # compressed tokens of the longest request
    indices: torch.Tensor | None = None
    lens: torch.Tensor | None = None
    is_all: bool = False  # the indices name all compressed tokens, so that they are the same for every layer


def compressed_lens(seq_lens: Sequence[int], extend_lens: Sequence[int], ratio: int) -> list[int]:
    """How many compressed tokens of each request a chunk reads; 0 for a request without queries."""
    return [seq // ratio if extend > 0 else 0 for seq, extend in zip(seq_lens, extend_lens, strict=True)]


def workspace_rows(seq_lens: Sequence[int], extend_lens: Sequence[int], window: int, ratio: int) -> int:
    """How many workspace rows a layer of this ratio needs, from lengths alone. Ratio 0: no compressed tokens."""
    pairs = zip(seq_lens, extend_lens, strict=True)
    rows = sum(max(min(seq, max(extend, 0) + window - 1), 0) for seq, extend in pairs)
    return rows + (sum(compressed_lens(seq_lens, extend_lens, ratio)) if ratio else 0)


# Nanoseconds on an H200, fitted to the table in docs/performance.md.
_LAUNCHES_NS = 2000  # the launches that fill a workspace
_ROW_NS = 0.44  # a row of the workspace
_KEY_NS = 0.2  # a key of one query and 64 heads
_PAGED_KEY_NS = 0.2  # how much more it costs over pages
_SERIAL_KEY_NS = 32  # a key in one program, which takes a query's keys one after the other


def pages_are_faster(
    seq_lens: Sequence[int], extend_lens: Sequence[int], window: int, ratio: int, topk: int | None, heads: int
) -> bool:
    """Whether a layer is faster over fp8 pages than over a workspace, from lengths alone: with few queries and long
    contexts.

    The cost of a workspace grows with the context, and one program takes a query's keys one after the other. Over pages
    every key costs more, but decode splits a query's keys. ``topk``: how many compressed tokens a query attends to, or
    None for all.
    """
    pairs = max_keys = 0  # (query, key) pairs; keys of one query
    for seq, extend in zip(seq_lens, extend_lens, strict=True):
        if extend > 0:
            known = seq // ratio if ratio else 0
            keys = min(window, seq) + (known if topk is None else min(topk, known))
            pairs, max_keys = pairs + extend * keys, max(max_keys, keys)
    tiles = -(-heads // 64)
    rows = workspace_rows(seq_lens, extend_lens, window, ratio)
    workspace_ns = _LAUNCHES_NS + _ROW_NS * rows + max(_KEY_NS * tiles * pairs, _SERIAL_KEY_NS * max_keys)
    return (_KEY_NS * tiles + _PAGED_KEY_NS) * pairs < workspace_ns


class Chunk:
    """The metadata of one chunk, each part made when the first layer needs it.

    It never waits for the device, and reads no value of a tensor.
    """

    def __init__(self, inputs: ChunkInputs) -> None:
        inputs.check()
        self.inputs = inputs
        device, rows = inputs.seq_lens.device, len(inputs.seq_lens_cpu)
        self.query_start_loc = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self.query_start_loc[1:] = inputs.extend_lens.cumsum(0)
        total = workspace_rows(inputs.seq_lens_cpu, inputs.extend_lens_cpu, inputs.window, 0)
        self.swa_slots, _, self.gather_lens, self.swa_offsets = build_swa_token_ids(
            inputs.seq_lens, inputs.extend_lens, inputs.req_pool, inputs.req_to_token, inputs.full_to_swa,
            inputs.window, total,
        )  # fmt: skip
        self.regions: dict[int, _Region] = {}

    def layer(self, ratio: int = 0, topk_indices: torch.Tensor | None = None) -> LayerIndices:
        """What a layer attends to: its window, and the compressed tokens that ``topk_indices`` names, or all of them.

        ``topk_indices`` [>= queries, topk] int32 names compressed tokens of the query's own request; -1 names none. The
        result is valid until the next call with the same ratio.

        Raises:
            ValueError: the ratio does not divide a page, or there are indices without a ratio, or too few of them.
        """
        region = self.regions.get(ratio) or self._region(ratio)
        if topk_indices is not None or not region.is_all:
            self._combine(region, ratio, topk_indices)
        assert region.indices is not None and region.lens is not None
        return LayerIndices(region.slots, region.indices, region.lens)

    def memory(self) -> int:
        """How many bytes the metadata made so far hold."""
        tensors = [self.query_start_loc, self.swa_slots, self.gather_lens, self.swa_offsets]
        for region in list(self.regions.values()):  # a report is written by another thread
            tensors += [region.slots, region.compressed_base, region.swa_base]
            tensors += [tensor for tensor in (region.indices, region.lens) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _region(self, ratio: int) -> _Region:
        given, device = self.inputs, self.inputs.seq_lens.device
        if ratio and (ratio < 0 or given.page_size % ratio):
            raise ValueError(f"ratio: {ratio}, expected a divisor of page_size = {given.page_size}, or 0")
        known = compressed_lens(given.seq_lens_cpu, given.extend_lens_cpu, ratio) if ratio else []
        total = sum(known)
        if total + self.swa_slots.numel() >= 2**31:
            raise ValueError(f"seq_lens_cpu: {total + self.swa_slots.numel()} workspace rows, expected below 2**31")
        if total == 0:
            none = torch.zeros_like(given.seq_lens)
            region = _Region(none[:0], none, self.swa_offsets[:-1].contiguous(), 0)
        else:
            lens = torch.where(given.extend_lens > 0, given.seq_lens // ratio, 0)
            base = (lens.cumsum(0) - lens).to(torch.int32)
            rows = torch.arange(len(known), device=device)
            row = torch.repeat_interleave(rows, lens, output_size=total)
            token = torch.arange(total, device=device) - base[row]
            first = self.query_start_loc[:-1].long()[row]  # any query of a request: all have the same pages
            size = given.page_size // ratio
            pages = given.page_table[first, token // size].long()
            slots = (pages * size + token % size).to(torch.int32)
            region = _Region(slots, base, (self.swa_offsets[:-1] + total).to(torch.int32), max(known))
        self.regions[ratio] = region
        return region

    def _combine(self, region: _Region, ratio: int, topk_indices: torch.Tensor | None) -> None:
        given = self.inputs
        region.is_all = topk_indices is None
        if topk_indices is None:
            topk = region.longest
            # all tokens in their order: one row for all queries
            order = torch.arange(max(topk, 1), dtype=torch.int32, device=given.seq_lens.device)
            topk_indices = order[None].expand(given.queries, -1)
        else:
            topk = topk_indices.shape[-1]
            if not ratio:
                raise ValueError("topk_indices: given, expected None for ratio 0")
            if topk_indices.dim() != 2 or topk_indices.shape[0] < given.queries:
                found = tuple(topk_indices.shape)
                raise ValueError(f"topk_indices: shape {found}, expected [>= {given.queries}, topk]")
            topk_indices = topk_indices[: given.queries]
        width = combined_topk_width(topk, given.window)
        kept = region.indices is not None and region.indices.shape[1] == width
        region.indices, region.lens = combine_topk_swa_indices(
            topk_indices, self.query_start_loc, given.seq_lens, self.gather_lens, region.compressed_base,
            region.swa_base, given.window, ratio or 1, topk,
            out_indices=region.indices if kept else None, out_lens=region.lens if kept else None,
        )  # fmt: skip


class SparsePrefillChunkCache:
    """The current chunk and the workspace, for all layers of one model; see the module.

    ``limit`` bounds the workspace, in bytes. `attend` refuses a layer that needs more, and `needed` tells beforehand.
    The workspace grows in steps to what the largest chunk so far needed. It is freed before it grows. `memory` reports
    the size of both.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._generation: Hashable = None
        self._chunk: Chunk | None = None
        self._workspace: torch.Tensor | None = None
        self._stream = 0
        _caches.add(self)

    def chunk(self, generation: Hashable, inputs: Callable[[], ChunkInputs]) -> Chunk:
        """The chunk of this generation: the current one, or a new one.

        Raises:
            ValueError: a graph is being captured.
        """
        self._follow_stream()
        if self._chunk is None or generation != self._generation:
            self._chunk = None  # frees its memory for the new one
            self._chunk = Chunk(inputs())
            self._generation = generation
        return self._chunk

    def forget(self) -> None:
        """Drop the chunk and the workspace."""
        self._generation = self._chunk = self._workspace = None

    def _follow_stream(self) -> None:
        """Drop the chunk and the workspace if the stream is another one, which may still be reading them.

        Their memory goes back to the allocator's pool of that stream.
        """
        if gpu.capturing():
            raise ValueError(
                "generation: a graph is being captured, and a chunk's sizes and workspace are not a graph's"
            )
        stream = gpu.current_stream()
        if stream != self._stream:
            self.forget()
            self._stream = stream

    def memory(self) -> dict[str, int]:
        """How many bytes it holds now, by kind."""
        workspace = self._workspace.numel() * 2 if self._workspace is not None else 0
        return {"workspace": workspace, "metadata": self._chunk.memory() if self._chunk is not None else 0}

    @staticmethod
    def needed(seq_lens: Sequence[int], extend_lens: Sequence[int], window: int, ratio: int) -> int:
        """How many bytes of workspace a layer of this ratio needs, from lengths alone."""
        return workspace_rows(seq_lens, extend_lens, window, ratio) * ROW_BYTES

    def workspace(self, rows: int, device: torch.device) -> torch.Tensor:
        """[rows, 1, 512] bfloat16, the same memory for every layer.

        Raises:
            ValueError: it needs more than ``limit``, or a graph is being captured.
        """
        self._follow_stream()
        if self.limit is not None and rows * ROW_BYTES > self.limit:
            raise ValueError(f"workspace: {rows * ROW_BYTES} bytes, expected at most limit = {self.limit}")
        kept = self._workspace
        if kept is None or kept.device != device or kept.shape[0] < rows:
            kept = self._workspace = None
            size = max(-(-rows // _STEP) * _STEP, 1)
            if self.limit is not None:
                size = max(rows, 1, min(size, self.limit // ROW_BYTES))
            kept = self._workspace = torch.empty(size, 1, WIDTH, dtype=torch.bfloat16, device=device)
        return kept[:rows]

    def attend(
        self,
        q: torch.Tensor,
        chunk: Chunk,
        swa_pages: torch.Tensor,
        *,
        sm_scale: float,
        ratio: int = 0,
        pages: torch.Tensor | None = None,
        topk_indices: torch.Tensor | None = None,
        attn_sink: torch.Tensor | None = None,
        sparse_fwd: Callable[..., Any] = mla_sparse_prefill,
    ) -> torch.Tensor:
        """One layer's attention: [queries, H, 512] in q's type.

            q             [queries, H, 512]      bfloat16
            swa_pages     [pages, bytes]         pages of `layouts.V4`, ``swa_page_size`` tokens each
            pages         [pages, bytes]         the compressed cache, ``page_size // ratio`` tokens a page; ratio > 0
            topk_indices  [>= queries, topk]     see `Chunk.layer`; None: every compressed token
            attn_sink     [H]                    float32 or None

        ``sparse_fwd`` is called as FlashMLA's `flash_mla_sparse_fwd` and returns its three results. A graph cannot
        capture this, because sizes follow the chunk.

        Raises:
            ValueError: the workspace would exceed the limit, q has another number of queries, pages and ratio do not go
                together, or a launcher refuses its arguments.
        """
        given = chunk.inputs
        if q.dim() != 3 or q.shape[::2] != (given.queries, WIDTH) or q.dtype is not torch.bfloat16:
            raise ValueError(f"q: {describe(q)}, expected torch.bfloat16, [{given.queries}, H, {WIDTH}]")
        if (pages is not None) != (ratio > 0):
            found = "None" if pages is None else "given"
            raise ValueError(f"pages: {found} beside ratio {ratio}, expected pages for a ratio above 0 and None for 0")
        if given.queries == 0:
            return q.new_empty(q.shape[0], q.shape[1], WIDTH)
        layer = chunk.layer(ratio, topk_indices)
        compressed = layer.slots.numel()
        rows = compressed + chunk.swa_slots.numel()
        kv = self.workspace(max(rows, 1), q.device)
        if pages is not None:
            _dequantize("pages", pages, layer.slots, given.page_size // ratio, kv[:compressed])
        _dequantize("swa_pages", swa_pages, chunk.swa_slots, given.swa_page_size, kv[compressed:rows])
        return sparse_fwd(q, kv, layer.indices[:, None], sm_scale, WIDTH, attn_sink, layer.lens)[0]


def _dequantize(name: str, pages: torch.Tensor, slots: torch.Tensor, size: int, out: torch.Tensor) -> None:
    """`dequantize_k_cache_paged`, with errors that begin with our caller's name of the pages."""
    try:
        dequantize_k_cache_paged(pages, slots, size, out)
    except ValueError as problem:
        raise ValueError(f"{name}: {problem}") from None
