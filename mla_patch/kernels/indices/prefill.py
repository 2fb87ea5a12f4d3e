"""Indices of sparse prefill, SGLang's for DeepSeek V4: which rows of the workspace each query attends to.

The workspace holds a chunk's keys, dequantised: the compressed tokens of all R requests, then their sliding window
(SWA). Each request has a region of both, and a query at position p sees its W last tokens, itself among them. All
tensors are int32, except where another type is named.

    seq_lens, extend_lens  [R]         tokens of a request, and how many of them are this chunk's queries
    req_pool               [R]         which row of req_to_token a request owns
    req_to_token           [rows, P]   physical slot of (row, position)
    full_to_swa            [slots]     int64 or int32, from slots to slots of the SWA cache
    query_start_loc        [R + 1]     first query of each request; may begin at any number
    query_pos              [T]         position of each query, or None: the last tokens of its request, in order
    topk_indices           [T, K]      compressed tokens of the query's own request, numbered from 0; -1 is a hole
    compressed_base        [R]         where a request's compressed tokens begin
    swa_base               [R]         where its window begins

    windows     gather_r = min(seq_r, extend_r + W - 1)     first_r = seq_r - gather_r    offset = running sum of gather
                ids[offset_r + i] = full_to_swa[req_to_token[req_pool_r, first_r + i]]    for 0 <= i < gather_r
    combined    n = min((p + 1) // ratio, topk) compressed tokens, then m = min(p + 1, W) of the window, one after the
                other; -1 to the row's end; length n + m
                row[j] = compressed_base_r + topk_indices[t, j], or -1 if that is a hole          for j < n
                row[n + i] = swa_base_r + p - m + 1 + i - (seq_r - gather_r)                      for i < m

A hole stays a hole and counts in the length: a base added to -1 would name a row of another request. So is a row that
int32 cannot name. A query that no request owns (padding) has a row of -1 and length 0.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from mla_patch.compat import gpu
from mla_patch.compat.compiles import COMPILES
from mla_patch.compat.triton import CompileCase, interpreted, watch_compiles
from mla_patch.kernels.cache.layouts import told

_INTERPRETED = interpreted()


def swa_config(rows: int, total: int, sms: int) -> dict[str, int]:
    """Launch numbers of `build_swa_token_ids`; ``sms`` multiprocessors."""
    return {"ctas": max(1, min(4 * sms // rows, -(-total // 512), 128)), "BLOCK": 512, "ROWS": 256, "num_warps": 4}


def combine_config() -> dict[str, int]:
    """Launch numbers of `combine_topk_swa_indices`: a warp for each query, so that thousands are there at once."""
    return {"BLOCK": 256, "ROWS": 256, "num_warps": 1}


@triton.jit
def _gathered(seq_lens, extend_lens, row, mask, window):
    """Tokens in the windows of a request's queries, together."""
    seq = tl.load(seq_lens + row, mask=mask, other=0)
    extend = tl.load(extend_lens + row, mask=mask, other=0)
    return tl.maximum(tl.minimum(seq, tl.maximum(extend, 0) + window - 1), 0)


_SWA_ARGS = ["ids", "first", "gather", "offsets", "seq_lens", "extend_lens", "req_pool", "req_to_token", "full_to_swa"]


@triton.jit(
    do_not_specialize=["rows", "total", "window", "slots_end", "stride"], do_not_specialize_on_alignment=_SWA_ARGS
)
def _swa_kernel(
    ids,
    first,
    gather,
    offsets,
    seq_lens,
    extend_lens,
    req_pool,
    req_to_token,
    full_to_swa,
    rows,
    total,
    window,
    slots_end,
    stride,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A share of one request's window. Every program adds up the requests before it: a scan would be a launch more."""
    row = tl.program_id(0)
    lane = tl.arange(0, ROWS)
    begin = 0
    top = 0
    while top < row:
        begin += tl.sum(_gathered(seq_lens, extend_lens, top + lane, top + lane < row, window), 0)
        top += ROWS
    count = _gathered(seq_lens, extend_lens, row, row < rows, window)
    start = tl.load(seq_lens + row) - count
    if tl.program_id(1) == 0:
        tl.store(first + row, start)
        tl.store(gather + row, count)
        tl.store(offsets + row, begin)
        if row == rows - 1:
            tl.store(offsets + rows, begin + count)
    # ids may be longer than what is gathered: the last request also writes the rest
    span = tl.where(row == rows - 1, total - begin, tl.minimum(count, total - begin))
    source = req_to_token + tl.load(req_pool + row).to(tl.int64) * stride + start
    done = tl.program_id(1).to(tl.int64) * BLOCK
    while done < span:
        i = done + tl.arange(0, BLOCK)
        slot = tl.load(source + i, mask=(i < span) & (i < count), other=-1)
        known = (slot >= 0) & (slot < slots_end)
        swa = tl.load(full_to_swa + slot, mask=known, other=-1)
        tl.store(ids + (begin + i), swa.to(tl.int32), mask=i < span)
        done += tl.num_programs(1) * BLOCK


_COMBINE_ARGS = ["out", "lens", "topk_indices", "query_start_loc", "query_pos", "seq_lens", "gather_lens"]
_COMBINE_ARGS += ["compressed_base", "swa_base"]


@triton.jit(
    do_not_specialize=["rows", "window", "ratio", "topk", "width", "topk_stride", "out_stride"],
    do_not_specialize_on_alignment=_COMBINE_ARGS,
)
def _combine_kernel(
    out,
    lens,
    topk_indices,
    query_start_loc,
    query_pos,
    seq_lens,
    gather_lens,
    compressed_base,
    swa_base,
    rows,
    window,
    ratio,
    topk,
    width,
    topk_stride,
    out_stride,
    FOURS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One query. Its request is the first that ends past it, which passes over requests without one.

    FOURS: rows begin on 16 bytes and ``topk`` is a multiple of 4, so that four columns move at once.
    """
    t = tl.program_id(0).to(tl.int64)
    at = t + tl.load(query_start_loc)
    lane = tl.arange(0, ROWS)
    row = 0
    top = 0
    while top < rows:
        mask = top + lane < rows
        ends = tl.load(query_start_loc + 1 + top + lane, mask=mask, other=0)
        row += tl.sum((mask & (ends <= at)).to(tl.int32), 0)
        top += ROWS
    owned = row < rows
    seq = tl.load(seq_lens + row, mask=owned, other=0).to(tl.int64)
    if query_pos is not None:
        pos = tl.load(query_pos + t, mask=owned, other=-1).to(tl.int64)
    else:
        pos = seq - tl.load(query_start_loc + 1 + row, mask=owned, other=0) + at
    seen = tl.where(owned, tl.maximum(pos + 1, 0), 0)
    compressed = tl.minimum(seen // ratio, topk).to(tl.int32)
    recent = tl.minimum(seen, window).to(tl.int32)
    total = compressed + recent
    tl.store(lens + t, total)
    base = tl.load(compressed_base + row, mask=owned, other=0)
    # what is added to a column of the window's part
    shift = tl.load(swa_base + row, mask=owned, other=0) + (pos - recent + 1) - compressed
    shift -= seq - tl.load(gather_lens + row, mask=owned, other=0)
    # up to where sums are int32: decided here, as 64 bits for every column cost more time than memory does
    most = 2147483647 - tl.maximum(base, 0)
    last = tl.minimum(total, 2147483648 - shift).to(tl.int32)
    shift = shift.to(tl.int32)
    source = topk_indices + t * topk_stride
    to = out + t * out_stride
    readable = compressed
    if FOURS:
        source, to = tl.multiple_of(source, 16), tl.multiple_of(to, 16)
        readable = (compressed + 3) // 4 * 4
    end = width // 128 * 128  # what it is; said so, fours are stored at once
    for begin in range(0, width, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        v = tl.load(source + j, mask=j < readable, other=-1)
        found = tl.where((j < compressed) & (v >= 0) & (v <= most), v + base, -1)
        found = tl.where((j >= compressed) & (j < last), j + shift, found)
        tl.store(to + j, found, mask=j < end)


def combined_topk_width(topk: int, window_size: int) -> int:
    """Columns of a combined row: its most keys, to the next multiple of 128."""
    return -(-(topk + window_size) // 128) * 128


def build_swa_token_ids(
    seq_lens: torch.Tensor,
    extend_lens: torch.Tensor,
    req_pool: torch.Tensor,
    req_to_token: torch.Tensor,
    full_to_swa: torch.Tensor,
    swa_window: int,
    total_swa: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots of the SWA cache in every request's window: (ids [total], first [R], gather [R], offsets [R + 1]), int32.

    ``total_swa`` is the sum of ``gather``, or more, and then the rest of ids is -1. Without it the device is asked,
    which waits for it and cannot be captured. -1 also where req_to_token names no entry of ``full_to_swa``. One launch,
    none for no request.

    Raises:
        ValueError: a tensor's type, shape, layout or device, a window below 1, a total below 0 or past int32.
    """
    device, rows = seq_lens.device, seq_lens.numel()
    _check_device(seq_lens)
    for name, tensor in (("seq_lens", seq_lens), ("extend_lens", extend_lens), ("req_pool", req_pool)):
        _check_vector(name, tensor, rows, device)
    if req_to_token.dtype != torch.int32 or req_to_token.dim() != 2 or not _last_contiguous(req_to_token):
        raise ValueError(f"req_to_token: {told(req_to_token)}, expected torch.int32, [rows, positions], last dense")
    if full_to_swa.dtype not in (torch.int32, torch.int64) or full_to_swa.dim() != 1 or not full_to_swa.is_contiguous():
        raise ValueError(f"full_to_swa: {told(full_to_swa)}, expected torch.int64 or torch.int32, [slots], contiguous")
    for name, tensor in (("req_to_token", req_to_token), ("full_to_swa", full_to_swa)):
        if tensor.device != device:
            raise ValueError(f"{name}: on {tensor.device}, expected {device} as seq_lens")
    if swa_window < 1:
        raise ValueError(f"swa_window: {swa_window}, expected 1 or more")
    if total_swa is None:
        reach = extend_lens.clamp(min=0) + (swa_window - 1)
        total_swa = int(torch.minimum(seq_lens, reach).clamp(min=0).sum())
    if not 0 <= total_swa < 2**31:
        raise ValueError(f"total_swa: {total_swa}, expected 0 to 2**31 - 1, as offsets are int32")
    if gpu.elsewhere(seq_lens):
        with torch.cuda.device(device):
            return build_swa_token_ids(
                seq_lens, extend_lens, req_pool, req_to_token, full_to_swa, swa_window, total_swa
            )
    if rows == 0:
        none = torch.empty(0, dtype=torch.int32, device=device)
        ids = torch.full((total_swa,), -1, dtype=torch.int32, device=device)
        return ids, none, none.clone(), torch.zeros(1, dtype=torch.int32, device=device)
    sizes = (total_swa, rows, rows, rows + 1)
    ids, first, gather, offsets = (torch.empty(size, dtype=torch.int32, device=device) for size in sizes)
    config = swa_config(rows, total_swa, 1 if _INTERPRETED else gpu.sm_count(device.index))
    numbers = {name: value for name, value in config.items() if name != "ctas"}
    _swa_kernel[(rows, config["ctas"])](
        ids, first, gather, offsets, seq_lens, extend_lens, req_pool, req_to_token, full_to_swa,
        rows, total_swa, swa_window, full_to_swa.numel(), req_to_token.stride(0), **numbers,
    )  # fmt: skip
    return ids, first, gather, offsets


def combine_topk_swa_indices(
    topk_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    gather_lens: torch.Tensor,
    compressed_base: torch.Tensor,
    swa_base: torch.Tensor,
    window_size: int,
    compress_ratio: int,
    topk: int,
    *,
    query_pos: torch.Tensor | None = None,
    out_indices: torch.Tensor | None = None,
    out_lens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the workspace that each query attends to: indices [T, `combined_topk_width`] and lengths [T], int32.

    Whole rows are written, whatever ``out_indices`` held. Layers without compressed tokens pass ``topk`` 0 and ratio 1.
    One launch, none for no query; given both outputs it allocates nothing. It can be captured in a CUDA graph.

    Raises:
        ValueError: a tensor's type, shape, layout or device, fewer than ``topk`` columns, a number out of range.
    """
    device = topk_indices.device
    _check_device(topk_indices, "topk_indices")
    if topk_indices.dtype != torch.int32 or topk_indices.dim() != 2 or not _last_contiguous(topk_indices):
        raise ValueError(f"topk_indices: {told(topk_indices)}, expected torch.int32, [queries, topk], last dense")
    for name, number, least in (
        ("window_size", window_size, 1),
        ("compress_ratio", compress_ratio, 1),
        ("topk", topk, 0),
    ):
        if number < least:
            raise ValueError(f"{name}: {number}, expected {least} or more")
    queries, columns = topk_indices.shape
    if columns < topk:
        raise ValueError(f"topk_indices: {columns} columns, expected topk = {topk} or more")
    rows, width = seq_lens.numel(), combined_topk_width(topk, window_size)
    _check_vector("query_start_loc", query_start_loc, rows + 1, device)
    _check_vector("seq_lens", seq_lens, rows, device)
    _check_vector("gather_lens", gather_lens, rows, device)
    _check_vector("compressed_base", compressed_base, rows, device)
    _check_vector("swa_base", swa_base, rows, device)
    if query_pos is not None:
        _check_vector("query_pos", query_pos, queries, device)
    if out_indices is None:
        out_indices = torch.empty(queries, width, dtype=torch.int32, device=device)
    elif out_indices.dtype != torch.int32 or out_indices.shape != (queries, width) or not _last_contiguous(out_indices):
        raise ValueError(f"out_indices: {told(out_indices)}, expected torch.int32, [{queries}, {width}], last dense")
    elif out_indices.device != device:
        raise ValueError(f"out_indices: on {out_indices.device}, expected {device}")
    if out_lens is None:
        out_lens = torch.empty(queries, dtype=torch.int32, device=device)
    _check_vector("out_lens", out_lens, queries, device)
    if gpu.elsewhere(topk_indices):
        with torch.cuda.device(device):
            return combine_topk_swa_indices(
                topk_indices, query_start_loc, seq_lens, gather_lens, compressed_base, swa_base,
                window_size, compress_ratio, topk, query_pos=query_pos, out_indices=out_indices, out_lens=out_lens,
            )  # fmt: skip
    if queries:
        fours = topk % 4 == 0 and gpu.aligned(topk_indices) and gpu.aligned(out_indices)
        _combine_kernel[(queries,)](
            out_indices, out_lens, topk_indices, query_start_loc, query_pos, seq_lens, gather_lens,
            compressed_base, swa_base, rows, window_size, compress_ratio, topk, width,
            topk_indices.stride(0), out_indices.stride(0), FOURS=fours, **combine_config(),
        )  # fmt: skip
    return out_indices, out_lens


def build_swa_token_ids_ref(
    seq_lens: torch.Tensor,
    extend_lens: torch.Tensor,
    req_pool: torch.Tensor,
    req_to_token: torch.Tensor,
    full_to_swa: torch.Tensor,
    swa_window: int,
) -> tuple[list[int], list[int], list[int], list[int]]:
    """The definition of `build_swa_token_ids`, for slots that ``full_to_swa`` has."""
    ids, first, gather, offsets = [], [], [], [0]
    for seq, extend, row in zip(seq_lens.tolist(), extend_lens.tolist(), req_pool.tolist(), strict=True):
        gather.append(min(seq, extend + swa_window - 1))
        first.append(seq - gather[-1])
        offsets.append(offsets[-1] + gather[-1])
        ids += [int(full_to_swa[int(req_to_token[row, position])]) for position in range(first[-1], seq)]
    return ids, first, gather, offsets


def combine_topk_swa_indices_ref(
    topk_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    gather_lens: torch.Tensor,
    compressed_base: torch.Tensor,
    swa_base: torch.Tensor,
    window_size: int,
    compress_ratio: int,
    topk: int,
    query_pos: torch.Tensor | None = None,
) -> tuple[list[list[int]], list[int]]:
    """The definition of `combine_topk_swa_indices`, query by query."""
    width = combined_topk_width(topk, window_size)
    queries = len(topk_indices)
    indices, lens = [[-1] * width for _ in range(queries)], [0] * queries
    starts = [start - int(query_start_loc[0]) for start in query_start_loc.tolist()]
    numbers = (tensor.tolist() for tensor in (seq_lens, gather_lens, compressed_base, swa_base))
    for r, (seq, gather, base, swa) in enumerate(zip(*numbers, strict=True)):
        for t in range(starts[r], min(starts[r + 1], queries)):
            pos = seq - (starts[r + 1] - t) if query_pos is None else int(query_pos[t])
            compressed, recent = min((pos + 1) // compress_ratio, topk), min(pos + 1, window_size)
            row = [v + base if v >= 0 else -1 for v in topk_indices[t, :compressed].tolist()]
            row += [swa + pos - recent + 1 - (seq - gather) + i for i in range(recent)]
            indices[t][: len(row)] = [found if found < 2**31 else -1 for found in row]
            lens[t] = compressed + recent
    return indices, lens


def compile_cases(every: bool = False) -> list[CompileCase]:
    """Both kernels, with and without positions and 16 bytes at a time, with either type of the slot map."""
    cases = []
    numbers = swa_config(1, 1, 1)
    for kind in ("*i32", "*i64"):
        signature = dict.fromkeys(_SWA_ARGS, "*i32") | {"full_to_swa": kind}
        signature |= dict.fromkeys(("rows", "total", "window", "slots_end", "stride"), "i32")
        constants = {"BLOCK": numbers["BLOCK"], "ROWS": numbers["ROWS"]}
        cases.append(
            CompileCase(f"swa_token_ids {kind}", _swa_kernel, signature, constants, num_warps=numbers["num_warps"])
        )
    numbers = combine_config()
    for positions, fours in itertools.product((False, True), repeat=2):
        signature = dict.fromkeys(_COMBINE_ARGS, "*i32")
        ints = ("rows", "window", "ratio", "topk", "width", "topk_stride", "out_stride")
        signature |= dict.fromkeys(ints, "i32")
        constants = {"FOURS": fours, "BLOCK": numbers["BLOCK"], "ROWS": numbers["ROWS"]}
        if not positions:
            del signature["query_pos"]
            constants["query_pos"] = None  # type: ignore[assignment]
        name = f"combine_topk_swa {'query_pos' if positions else 'no query_pos'}{', 16 bytes' if fours else ''}"
        cases.append(CompileCase(name, _combine_kernel, signature, constants, num_warps=numbers["num_warps"]))
    return cases


def _last_contiguous(tensor: torch.Tensor) -> bool:
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


def _check_device(tensor: torch.Tensor, name: str = "seq_lens") -> None:
    if not tensor.is_cuda and not _INTERPRETED:
        raise ValueError(f"{name}: on {tensor.device}, expected a CUDA device (or TRITON_INTERPRET=1 at import)")


def _check_vector(name: str, tensor: torch.Tensor, size: int, device: torch.device) -> None:
    if tensor.dtype != torch.int32 or tensor.shape != (size,) or not tensor.is_contiguous():
        raise ValueError(f"{name}: {told(tensor)}, expected torch.int32, [{size}], contiguous")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, expected {device}")


watch_compiles(_swa_kernel, _combine_kernel)


def warmup(device: torch.device | str) -> int:
    """Compile what a prefill reaches of both kernels, by real launches over nothing; how many kernels that took."""
    none = torch.zeros(2, dtype=torch.int32, device=device)
    if not none.is_cuda and not _INTERPRETED:
        return 0
    before = COMPILES.total
    table, one = none[:, None], none[:1]
    fours = torch.zeros(2, 4, dtype=torch.int32, device=device)
    with COMPILES.warming():
        build_swa_token_ids(one, one, one, table, none.long(), 1, 0)
        for ids, positions in itertools.product((table, fours), (None, none)):
            combine_topk_swa_indices(ids, none, one, one, one, one, 1, 1, 0, query_pos=positions)
    return COMPILES.total - before
