"""Cast the rows of an 8-bit latent cache that a batch's page tables name to 16 bits, and no other row.

    cache     [N, 576] or [N, 1, 576]     float8_e4m3fn or float8_e5m2; rows may lie apart
    table     [B, W]                      int32; page p holds rows p * ps to p * ps + ps - 1 of the cache
    lens      [B] int32 or int64, or None tokens of each request; None: every column of its row counts
    out       [M, 576] or [M, 1, 576]     bfloat16 or float16
    places    [B, W] int32, or None       the table by which a kernel finds these pages in ``out``

A row is stored without a scale, so the cast is exact: what ``cache.to(out.dtype)`` holds in that row. Whole pages are
cast, because an attention kernel may load a page whole.

Without ``places`` a row keeps its number: ``out`` has a row for each row of the cache, and the rows that nobody names
are not touched. With ``places`` column c of request b becomes page ``first + b * W + c`` of ``out``, so that ``out``
needs B * W pages. Those numbers depend on no tensor's values, so nothing is counted and a captured graph stays right.

Neither the columns past a request's pages nor a page outside the cache is read, and nothing is written for them but
the number of such a page.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mla_patch.compat.triton import TARGETS, CompileCase, watch_compiles
from mla_patch.kernels.common.checks import INDEX_TYPES, check_can_launch, check_device, describe
from mla_patch.kernels.common.constants import WIDTH
from mla_patch.kernels.common.e4m3 import e4m3_to_f32
from mla_patch.kernels.common.launch import INTERPRETED, can_launch, chip_of, on_device_of, warming_up
from mla_patch.kernels.common.rounding import rounded

_PLAIN = tl.constexpr(INTERPRETED)
# how a byte becomes a number; E4M3_BITS where the chip has no conversion
E4M3, E4M3_BITS, E5M2 = 0, 1, 2
_KINDS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
_SIXTEEN = (torch.bfloat16, torch.float16)


def cast_config() -> dict[str, int]:
    """Launch numbers: ROWS at a time. PROGRAMS of them fill a large GPU once, and a request has MIN_PROGRAMS of its
    own where there are many requests, so that one long request among them is not left to one program."""
    return {"ROWS": 16, "PROGRAMS": 2048, "MIN_PROGRAMS": 64, "num_warps": 4}


@triton.jit
def _value(byte, KIND: tl.constexpr):
    """8-bit codes -> float32, exact; NaN stays NaN."""
    if KIND == 2:  # e5m2 is the upper half of a float16
        value = (byte.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == 1 or _PLAIN:
        value = e4m3_to_f32(byte.to(tl.int32))
    else:
        value = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return value


_CHANGING = ["width", "slots", "table_s", "first"]
_CALL_ARGS = ["table", "lens", "places"]


@triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_CALL_ARGS)
def _cast_kernel(
    out, cache, table, lens, places, width, slots, table_s, first, cache_s, out_s,
    PAGE: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Every so many rows of request program_id(1). ``cache`` is bytes."""
    b = tl.program_id(1).to(tl.int64)
    pages = width
    if lens is not None:
        # the bound comes first: a length of 64 bits may be any number
        tokens = tl.minimum(tl.maximum(tl.load(lens + b), 0), width.to(tl.int64) * PAGE)
        pages = ((tokens + PAGE - 1) // PAGE).to(tl.int32)
    rows = pages.to(tl.int64) * PAGE
    lane = tl.arange(0, ROWS)
    d = tl.arange(0, 512)[None, :]
    r = 512 + tl.arange(0, 64)[None, :]
    step = tl.num_programs(0).to(tl.int64) * ROWS
    begin = tl.program_id(0).to(tl.int64) * ROWS
    while begin < rows:
        row = begin + lane
        column = row // PAGE
        at = row % PAGE
        page = tl.load(table + b * table_s + column, mask=row < rows, other=-1).to(tl.int64)
        slot = page * PAGE + at
        known = (page >= 0) & (slot < slots)
        slot = tl.where(known, slot, 0)
        to = slot
        if places is not None:
            place = first + b * width + column
            tl.store(places + b * width + column, place.to(tl.int32), mask=(row < rows) & (at == 0))
            to = place * PAGE + at
        source = cache + (slot * cache_s)[:, None]
        target = out + (to * out_s)[:, None]
        mask = known[:, None]
        latent = tl.load(source + d, mask=mask, other=0)
        rope = tl.load(source + r, mask=mask, other=0)
        tl.store(target + d, rounded(_value(latent, KIND), out.dtype.element_ty), mask=mask)
        tl.store(target + r, rounded(_value(rope, KIND), out.dtype.element_ty), mask=mask)
        begin += step


def cast_pages(
    cache: torch.Tensor,
    table: torch.Tensor,
    lens: torch.Tensor | None,
    out: torch.Tensor,
    *,
    page_size: int,
    places: torch.Tensor | None = None,
    first: int = 0,
    config: dict[str, int] | None = None,
) -> None:
    """Cast the pages that ``table`` names into ``out``; see the module.

    One launch on the current stream, without sync; none where the table is empty. It allocates nothing, so it can be
    captured in a CUDA graph. ``first`` is the first page of ``out`` that ``places`` may name. ``config`` replaces
    `cast_config`'s numbers.

    Raises:
        ValueError: a tensor's type, shape, layout or device, or an ``out`` that is too small.
    """
    check_can_launch("cache", cache)
    kind = _KINDS.get(cache.dtype)
    if kind is None:
        raise ValueError(f"cache: {cache.dtype}, expected torch.float8_e4m3fn or torch.float8_e5m2")
    if out.dtype not in _SIXTEEN:
        raise ValueError(f"out: {out.dtype}, expected torch.bfloat16 or torch.float16")
    for name, rows in (("cache", cache), ("out", out)):
        if rows.shape[1:] not in ((1, WIDTH), (WIDTH,)) or rows.stride(-1) != 1:
            expected = f"[rows, 1, {WIDTH}] or [rows, {WIDTH}], rows contiguous"
            raise ValueError(f"{name}: {describe(rows)}, expected {expected}")
    if table.dtype is not torch.int32 or table.dim() != 2 or (table.shape[1] > 1 and table.stride(1) != 1):
        raise ValueError(f"table: {describe(table)}, expected torch.int32, [B, W], the last contiguous")
    batch, width = table.shape
    if lens is not None and (lens.dtype not in INDEX_TYPES or lens.shape != (batch,) or not lens.is_contiguous()):
        raise ValueError(f"lens: {describe(lens)}, expected int32 or int64, [{batch}], contiguous")
    if page_size < 1 or cache.shape[0] % page_size:
        raise ValueError(f"page_size: {page_size}, expected a divisor of the cache's {cache.shape[0]} rows")
    if first < 0:
        raise ValueError(f"first: {first}, expected 0 or more")
    if places is not None and (
        places.dtype is not torch.int32 or places.shape != table.shape or not places.is_contiguous()
    ):
        raise ValueError(f"places: {describe(places)}, expected torch.int32, {list(table.shape)}, contiguous")
    needed = cache.shape[0] if places is None else (first + batch * width) * page_size
    if out.shape[0] < needed:
        raise ValueError(f"out: {out.shape[0]} rows, expected at least {needed}")
    if first + batch * width >= 2**31:
        raise ValueError(f"table: {batch} x {width} pages from {first} on, expected less than 2**31: places are int32")
    for name, tensor in (("table", table), ("lens", lens), ("out", out), ("places", places)):
        if tensor is not None:
            check_device(name, tensor, cache, "cache")
    if not table.numel():
        return
    numbers = dict(config or cast_config())
    programs, min_programs = numbers.pop("PROGRAMS"), numbers.pop("MIN_PROGRAMS")
    blocks = -(-width * page_size // numbers["ROWS"])
    if kind == E4M3 and chip_of(cache).capability < (8, 9):
        kind = E4M3_BITS
    with on_device_of(cache):
        _cast_kernel[(min(blocks, max(min_programs, programs // batch)), batch)](
            out, cache.view(torch.uint8), table, lens, places, width, cache.shape[0], table.stride(0), first,
            cache.stride(0), out.stride(0), PAGE=page_size, KIND=kind, **numbers,
        )  # fmt: skip


def cast_pages_ref(
    cache: torch.Tensor,
    table: torch.Tensor,
    lens: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    page_size: int,
    places: bool = False,
    first: int = 0,
) -> tuple[dict[int, torch.Tensor], dict[tuple[int, int], int]]:
    """The definition, token by token: the rows of ``out`` that are written, and the places, both by number."""
    rows: dict[int, torch.Tensor] = {}
    named: dict[tuple[int, int], int] = {}
    width = table.shape[1]
    for b, pages in enumerate(table.tolist()):
        tokens = width * page_size if lens is None else min(max(int(lens[b]), 0), width * page_size)
        for c, page in enumerate(pages[: -(-tokens // page_size)]):
            to = page
            if places:
                to = named[b, c] = first + b * width + c
            for at in range(page_size):
                slot = page * page_size + at
                if 0 <= slot < cache.shape[0]:
                    rows[to * page_size + at] = cache[slot].view(WIDTH).to(dtype)
    return rows, named


def compile_cases(every: bool = False) -> list[CompileCase]:
    """Both 8-bit types and both numberings; other page sizes and types of lengths differ by a constant or a load."""
    numbers = cast_config()
    rows, warps = {"ROWS": numbers["ROWS"]}, numbers["num_warps"]
    cases = []
    for sm in TARGETS:
        e4m3 = E4M3 if sm >= 89 else E4M3_BITS
        kinds = ((e4m3, "*bf16"), (e4m3, "*fp16"), (E5M2, "*bf16")) if every else ((e4m3, "*bf16"), (E5M2, "*fp16"))
        for (kind, out), (page, lens, places) in ((k, v) for k in kinds for v in ((1, "", True), (64, "*i32", False))):
            signature = {"out": out, "cache": "*u8", "table": "*i32"} | dict.fromkeys((*_CHANGING, "cache_s"), "i32")
            signature |= {"out_s": "i32"} | ({"lens": lens} if lens else {}) | ({"places": "*i32"} if places else {})
            constants: dict[str, int | None] = {**rows, "PAGE": page, "KIND": kind}
            constants |= ({} if lens else {"lens": None}) | ({} if places else {"places": None})
            name = f"kv_cast {kind} {out} page {page}{' places' if places else ''}"
            divisible = ("out", "cache", "cache_s", "out_s")
            cases.append(
                CompileCase(name, _cast_kernel, signature, constants, divisible, num_warps=warps, targets=(sm,))
            )
    return cases


def warmup(device: torch.device | str, dtype: torch.dtype, cache_dtype: torch.dtype, page_size: int) -> int:
    """Compile what casts of such a cache can reach; how many kernels that took. Real launches over one page, with both
    numberings, with int32 lengths and without. Nothing to do on a CPU."""
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    if not can_launch(table):
        return 0
    cache = torch.zeros(page_size, WIDTH, dtype=torch.uint8, device=device).view(cache_dtype)
    out = torch.empty(page_size, WIDTH, dtype=dtype, device=device)
    with warming_up() as compiled:
        for lens in (None, table[0]):
            for places in (None, torch.empty_like(table)):
                cast_pages(cache, table, lens, out, page_size=page_size, places=places)
    return compiled()


watch_compiles(_cast_kernel)
