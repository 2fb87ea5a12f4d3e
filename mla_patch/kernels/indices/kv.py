"""KV indices for paged attention: each request's row of a wide slot table becomes pages, or flat token ids.

    req_to_token  [R, W]     int32         physical token slot of (request row, position)
    req_pool      [>= rows]  int32, int64  which row of req_to_token a request owns
    lens          [>= rows]  int32, int64  tokens of the request; zero or less writes nothing
    kv_start      [>= rows]  int32, int64  first position, or None for 0
    indptr        [>= rows]  int32, int64  where the request's ids start (need not be the cumsum of lens)
    out           page table: [>= rows, W'] int32, int64;  token ids: flat int32, int64

    page table    out[r, j] = req_to_token[req_pool[r], kv_start[r] + j * page_size] // page_size
                  for 0 <= j < cdiv(lens[r], page_size)
    token ids     out[indptr[r] + j] = req_to_token[req_pool[r], kv_start[r] + j]
                  for 0 <= j < lens[r]

Nothing else is written. Both are one gather of `entries`, one per page or one per token, BLOCK at a time. Lengths are
known only on the device, so the grid is sized from the row count and the GPU, never from a tensor's width. What of a
long row is left over when every program has copied one block is shared out: among the row's own programs (page tables,
which are short), or among all of them (token ids, where one long request beside many short ones would otherwise keep a
few programs busy and the rest idle).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl

from mla_patch.compat import gpu
from mla_patch.compat.compiles import COMPILES
from mla_patch.compat.triton import CompileCase, interpreted, watch_compiles

_INTERPRETED = interpreted()  # asked here, because decoration is when Triton decides


def token_indices_config(rows: int, sms: int, interpret: bool = False) -> dict[str, int]:
    """Launch numbers of `build_token_indices`; ``sms`` multiprocessors. Nothing here knows the table's width."""
    if interpret:  # programs run one after another in Python: as few, and as wide, as will do
        return {"ctas": 1, "BLOCK": 16384, "WIDE": 1, "ROWS": 0, "num_warps": 4}
    return {"ctas": max(1, min(4 * sms // rows, 128)), "BLOCK": 1024, "WIDE": 1, "ROWS": 256, "num_warps": 4}


def page_table_config(rows: int, page_size: int, sms: int, interpret: bool = False) -> dict[str, int]:
    """Launch numbers of `build_page_table`."""
    if page_size == 1:
        return token_indices_config(rows, sms, interpret)
    if interpret:
        return {"ctas": 1, "BLOCK": 16384 // page_size, "WIDE": 1, "ROWS": 0, "num_warps": 4}
    # small pages make more entries: a block stays at about 8192 tokens of context
    block = min(max(8192 // page_size, 128), 1024)
    # few rows may be uneven, and idle programs cost less than a long row's loop; many rows fill the GPU by themselves
    ctas = max(1, min((8 if rows <= 64 else 4) * sms // rows, 32))
    return {"ctas": ctas, "BLOCK": block, "WIDE": 1024 // block, "ROWS": 0, "num_warps": max(block // 128, 1)}


@triton.jit
def _row(
    req_to_token,
    req_pool_indices,
    lens,
    kv_indptr,
    kv_start_idx,
    out,
    row,
    req_to_token_stride,
    out_stride,
    PAGE_SIZE: tl.constexpr,
):
    """How many entries a row has, where its first slot is, where its first entry goes."""
    entries = (tl.load(lens + row).to(tl.int64) + (PAGE_SIZE - 1)) // PAGE_SIZE
    source = req_to_token + tl.load(req_pool_indices + row).to(tl.int64) * req_to_token_stride
    if kv_start_idx is not None:
        source += tl.load(kv_start_idx + row).to(tl.int64)
    if kv_indptr is not None:
        target = out + tl.load(kv_indptr + row).to(tl.int64)
    else:
        target = out + row * out_stride
    return entries, source, target


@triton.jit
def _copy_block(source, out, first, entries, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Entries [first, first + BLOCK) of one row; 64-bit once per block, 32-bit per lane."""
    lane = tl.arange(0, BLOCK)
    mask = lane < tl.maximum(tl.minimum(entries - first, BLOCK), 0).to(tl.int32)
    slot = tl.load(source + first * PAGE_SIZE + lane * PAGE_SIZE, mask=mask)
    tl.store(out + first + lane, (slot // PAGE_SIZE).to(out.dtype.element_ty), mask=mask)


# Nothing is specialised: widths, row counts and alignments change from call to call, and one compile while
# serving costs more than all of them could gain (the loads are one slot per lane either way).
_CALL_ARGS = ["req_to_token", "req_pool_indices", "lens", "kv_indptr", "kv_start_idx", "out"]


@triton.jit(do_not_specialize=["rows", "req_to_token_stride", "out_stride"], do_not_specialize_on_alignment=_CALL_ARGS)
def _kv_indices_kernel(
    req_to_token,
    req_pool_indices,
    lens,
    kv_indptr,
    kv_start_idx,
    out,
    rows,
    req_to_token_stride,
    out_stride,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(1)  # per row
    # These loads do not wait for each other. The first block is not inside a loop: behind a loop's branch, the
    # assembler would hold back every load but the length, and the chain would be one memory latency longer.
    if ROWS > 0:
        lane = tl.arange(0, ROWS)
        lengths = tl.load(lens + lane, mask=lane < rows, other=0)
    entries, source, target = _row(
        req_to_token, req_pool_indices, lens, kv_indptr, kv_start_idx, out,
        row, req_to_token_stride, out_stride, PAGE_SIZE,
    )  # fmt: skip
    _copy_block(source, target, tl.program_id(1).to(tl.int64) * BLOCK, entries, PAGE_SIZE, BLOCK)
    direct = programs * BLOCK  # entries of every row that are done now
    if ROWS == 0:
        first = direct.to(tl.int64) + tl.program_id(1).to(tl.int64) * (BLOCK * WIDE)
        while first < entries:
            _copy_block(source, target, first, entries, PAGE_SIZE, BLOCK * WIDE)
            first += programs.to(tl.int64) * (BLOCK * WIDE)
    else:
        # What is left of all rows, in chunks, is one line of work; a program finds the rows of its chunks by itself.
        chunk = (row * programs).to(tl.int32) + tl.program_id(1)
        top = 0
        before = 0  # chunks in the rows above `top`
        while top < rows:
            if top > 0:
                lengths = tl.load(lens + top + lane, mask=top + lane < rows, other=0)
            left = ((tl.maximum(lengths, 0) + (PAGE_SIZE - 1)) // PAGE_SIZE).to(tl.int32) - direct
            chunks = (tl.maximum(left, 0) + (BLOCK * WIDE - 1)) // (BLOCK * WIDE)
            after = before + tl.sum(chunks, 0)
            if chunk < after:
                begins = before + tl.cumsum(chunks, 0) - chunks
                while chunk < after:
                    # one row holds this chunk; its number and its first chunk travel in one reduction
                    holds = (begins <= chunk) & (chunk < begins + chunks)
                    packed = tl.sum(tl.where(holds, (lane.to(tl.int64) << 32) + begins, 0), 0)
                    entries, source, target = _row(
                        req_to_token, req_pool_indices, lens, kv_indptr, kv_start_idx, out,
                        top + (packed >> 32), req_to_token_stride, out_stride, PAGE_SIZE,
                    )  # fmt: skip
                    first = direct + (chunk - (packed & 0x7FFFFFFF)) * (BLOCK * WIDE)
                    _copy_block(source, target, first, entries, PAGE_SIZE, BLOCK * WIDE)
                    chunk += programs * rows
            before = after
            top += ROWS


def build_page_table(
    req_to_token: torch.Tensor,
    req_pool: torch.Tensor,
    lens: torch.Tensor,
    out: torch.Tensor,
    *,
    kv_start: torch.Tensor | None = None,
    page_size: int = 64,
    rows: int | None = None,
    row_stride: int | None = None,
    out_stride: int | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """Write the physical page of every page of the first ``rows`` requests into ``out``; see the module for shapes.

    ``rows`` defaults to ``len(lens)``; the index tensors and ``out`` may be longer, as a graph's buffers are. The
    strides (elements from row to row of ``req_to_token`` and ``out``) default to the tensors' own. ``page_size`` is a
    power of two up to 4096. Entries past a request's last page, and rows of no length, keep what they held.
    One launch on the current stream, no allocation, no sync: it can be captured in a CUDA graph. ``config`` replaces
    the launch numbers of `page_table_config`. Returns ``out``.

    Raises:
        ValueError: a tensor's type, device, rank or layout, more rows than a tensor holds, a page size or a stride
            out of range. Values in tensors are not looked at.
    """
    if page_size < 1 or page_size > 4096 or page_size & (page_size - 1):
        raise ValueError(f"page_size: {page_size}, expected a power of two from 1 to 4096")
    rows = _check(req_to_token, req_pool, lens, None, kv_start, out, rows)
    row_stride = _stride("row_stride", row_stride, req_to_token)
    out_stride = _stride("out_stride", out_stride, out, rows)
    if rows == 0:
        return out
    if config is None:
        config = page_table_config(rows, page_size, _sms(out), _INTERPRETED)
    _launch(config, rows, req_to_token, req_pool, lens, None, kv_start, out, row_stride, out_stride, page_size)
    return out


def build_token_indices(
    req_to_token: torch.Tensor,
    req_pool: torch.Tensor,
    lens: torch.Tensor,
    indptr: torch.Tensor,
    out: torch.Tensor,
    *,
    kv_start: torch.Tensor | None = None,
    rows: int | None = None,
    row_stride: int | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """Write the physical slot of every token of the first ``rows`` requests into ``out``, request r at ``indptr[r]``.

    As `build_page_table` otherwise: ``rows``, ``row_stride``, graph capture, errors. ``config`` replaces the launch
    numbers of `token_indices_config`.
    """
    rows = _check(req_to_token, req_pool, lens, indptr, kv_start, out, rows)
    row_stride = _stride("row_stride", row_stride, req_to_token)
    if rows == 0:
        return out
    if config is None:
        config = token_indices_config(rows, _sms(out), _INTERPRETED)
    _launch(config, rows, req_to_token, req_pool, lens, indptr, kv_start, out, row_stride, 0, 1)
    return out


def page_table_ref(
    req_to_token: torch.Tensor,
    req_pool: torch.Tensor,
    lens: torch.Tensor,
    out: torch.Tensor,
    *,
    kv_start: torch.Tensor | None = None,
    page_size: int = 64,
) -> torch.Tensor:
    """The definition: what `build_page_table` must leave, given what ``out`` held before (it is not changed)."""
    want = out.clone()
    for r, length in enumerate(lens.tolist()):
        start = 0 if kv_start is None else int(kv_start[r])
        slots = req_to_token[int(req_pool[r]), start : start + max(length, 0) : page_size]
        want[r, : slots.numel()] = torch.div(slots, page_size, rounding_mode="trunc").to(out.dtype)
    return want


def token_indices_ref(
    req_to_token: torch.Tensor,
    req_pool: torch.Tensor,
    lens: torch.Tensor,
    indptr: torch.Tensor,
    out: torch.Tensor,
    *,
    kv_start: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition: what `build_token_indices` must leave, given what ``out`` held before (it is not changed)."""
    want = out.clone()
    for r, length in enumerate(lens.tolist()):
        start = 0 if kv_start is None else int(kv_start[r])
        begin, count = int(indptr[r]), max(length, 0)
        want[begin : begin + count] = req_to_token[int(req_pool[r]), start : start + count].to(out.dtype)
    return want


def compile_cases(every: bool = False) -> list[CompileCase]:
    """What the launch tables can ask Triton to compile: all options off and all on, or, for ``every``, the product."""
    types = ("*i32", "*i64")
    off, on = ("*i32", "*i32", "*i32", "*i32", None), ("*i64", "*i64", "*i64", "*i64", "*i64")
    options = itertools.product(types, types, types, types, (None, *types)) if every else (off, on)
    cases = []
    for (pool, lens, indptr, out, start), page_size in itertools.product(options, (0, 1, 16, 32, 64, 128)):
        token_ids = page_size == 0
        if not token_ids and every and indptr == "*i64":
            continue  # a page table has no indptr: once is enough
        for numbers in _launch_numbers(page_size):
            signature = {
                "req_to_token": "*i32",
                "req_pool_indices": pool,
                "lens": lens,
                "out": out,
                "rows": "i32",
                "req_to_token_stride": "i32",
                "out_stride": "i32",
            }
            constexprs: dict[str, Any] = {"PAGE_SIZE": max(page_size, 1)}
            constexprs |= {name: numbers[name] for name in ("BLOCK", "WIDE", "ROWS")}
            for name, pointer in (("kv_indptr", indptr if token_ids else None), ("kv_start_idx", start)):
                if pointer is None:
                    constexprs[name] = None
                else:
                    signature[name] = pointer
            what = "token_indices" if token_ids else f"page_table {page_size}"
            chosen = " ".join((pool, lens, indptr if token_ids else "", out, start or "None"))
            cases.append(
                CompileCase(
                    f"{what} {numbers} {chosen}",
                    _kv_indices_kernel,
                    signature,
                    constexprs,
                    num_warps=numbers["num_warps"],
                )
            )
    return cases


def _launch_numbers(page_size: int) -> list[dict[str, int]]:
    """The launch tables' distinct entries, over batch sizes and GPUs, as far as Triton compiles them apart."""
    entries = []
    for rows, sms in itertools.product((1, 2, 8, 64, 256, 1024, 8192), (66, 132, 188)):
        config = page_table_config(rows, page_size, sms) if page_size else token_indices_config(rows, sms)
        numbers = {name: value for name, value in config.items() if name != "ctas"}
        if numbers not in entries:
            entries.append(numbers)
    return entries


_INT32 = (torch.int32,)
_INDEX = (torch.int32, torch.int64)


def _check(
    req_to_token: torch.Tensor,
    req_pool: torch.Tensor,
    lens: torch.Tensor,
    indptr: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    out: torch.Tensor,
    rows: int | None,
) -> int:
    """How many rows to build, or ValueError. On the hot path of every decode step: reads metadata, each item once."""
    device = req_to_token.device
    if device.type != "cuda" and not _INTERPRETED:
        raise ValueError(f"req_to_token: on {device}, expected a CUDA device (or TRITON_INTERPRET=1 at import)")
    if rows is None:
        rows = lens.numel()
    elif rows < 0:
        raise ValueError(f"rows: {rows}, expected 0 or more")
    _check_tensor("req_to_token", req_to_token, _INT32, 2, 0, device)
    _check_tensor("req_pool", req_pool, _INDEX, 1, rows, device)
    _check_tensor("lens", lens, _INDEX, 1, rows, device)
    if kv_start is not None:
        _check_tensor("kv_start", kv_start, _INDEX, 1, rows, device)
    if indptr is not None:
        _check_tensor("indptr", indptr, _INDEX, 1, rows, device)
        _check_tensor("out", out, _INDEX, 1, 0, device)
    else:
        _check_tensor("out", out, _INDEX, 2, rows, device)
    return rows


def _check_tensor(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], rank: int, rows: int, device: torch.device
) -> None:
    shape = tensor.shape
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if len(shape) != rank:
        raise ValueError(f"{name}: shape {tuple(shape)}, expected {rank} dimension{'s' * (rank > 1)}")
    if shape[0] < rows:
        raise ValueError(f"{name}: {shape[0]} rows, expected {rows} or more")
    # a dimension of one may have any stride; `is_contiguous` is the cheapest of the three to ask
    if not tensor.is_contiguous() and tensor.stride(-1) != 1 and shape[-1] > 1:
        raise ValueError(f"{name}: stride {tensor.stride(-1)} in the last dimension, expected 1")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, expected {device} as req_to_token")


def _stride(name: str, stride: int | None, tensor: torch.Tensor, rows: int | None = None) -> int:
    """A row stride as the host passed it; one that is not the tensor's own must still keep all rows in its memory."""
    own = tensor.stride(0)
    if stride is None or stride == own:
        return own
    last = (tensor.shape[0] if rows is None else rows) - 1
    room = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    if stride < 0 or last * stride >= max(room, 1):
        raise ValueError(f"{name}: {stride} for {last + 1} rows, expected {own} as the tensor has, or less")
    return stride


def _sms(tensor: torch.Tensor) -> int:
    return 1 if _INTERPRETED else gpu.sm_count(tensor.device.index)


def _launch(
    config: dict[str, int],
    rows: int,
    req_to_token: torch.Tensor,
    req_pool: torch.Tensor,
    lens: torch.Tensor,
    indptr: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    out: torch.Tensor,
    row_stride: int,
    out_stride: int,
    page_size: int,
) -> None:
    if gpu.elsewhere(out):
        with torch.cuda.device(out.device):
            _launch(
                config, rows, req_to_token, req_pool, lens, indptr, kv_start, out, row_stride, out_stride, page_size
            )
        return
    numbers = {name: value for name, value in config.items() if name != "ctas"}
    args = (req_to_token, req_pool, lens, indptr, kv_start, out, rows, row_stride, out_stride)
    _kv_indices_kernel[(rows, config["ctas"])](*args, PAGE_SIZE=page_size, **numbers)


watch_compiles(_kv_indices_kernel)


def warmup(device: torch.device | str, page_sizes: Iterable[int] = (64,)) -> int:
    """Compile what an engine's backends reach of both builders; how many kernels that took.

    Real launches over two empty requests, so that Triton specialises as it will when serving: index tensors of either
    type, int32 page tables of ``page_sizes`` tokens, int64 token ids. Nothing to do on a CPU.
    """
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    if not table.is_cuda and not _INTERPRETED:
        return 0
    before = COMPILES.total
    indptr, ids = (torch.zeros(2, dtype=kind, device=device) for kind in _INDEX)
    pages = torch.zeros(2, 1, dtype=torch.int32, device=device)
    with COMPILES.warming():
        for pool, lens in itertools.product(_INDEX, repeat=2):
            rows, none = (torch.zeros(2, dtype=kind, device=device) for kind in (pool, lens))
            build_token_indices(table, rows, none, indptr, ids)
            for page_size in page_sizes:
                build_page_table(table, rows, none, pages, page_size=page_size)
    return COMPILES.total - before
