"""Launchers of MLA decode. The first call of a kind is checked and planned; `remembered` has what later ones need."""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

import torch

from mla_patch.compat import gpu
from mla_patch.compat.triton import HAS_GLUON, Relaunch
from mla_patch.kernels.common.checks import check_scale
from mla_patch.kernels.common.launch import chip_of
from mla_patch.kernels.decode.checks import check
from mla_patch.kernels.decode.config import DIRECT, E4M3, SM90_MIN_HEADS, kinds_on, launch_plan
from mla_patch.kernels.decode.remembered import KNOWN, Launches, remember, scratch_size
from mla_patch.kernels.decode.triton import _decode_kernel, _merge_kernel

Query: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def mla_decode(
    q: Query,
    kv: torch.Tensor,
    out: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    sm_scale: float,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    xai_temperature_len: int = -1,
    lse: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """Attend from every request's query to its cached rows; see the package for shapes and the formula.

    ``q``, ``kv``, ``out`` and ``lse`` may be strided, the first three not in their last dimension. A request of no rows
    gets zeros, and -inf in ``lse``; no requests launch nothing. Two launches on the current stream, no sync; the
    scratch (9 MB at 16 heads, whatever the lengths) comes from torch's allocator at every call, so a captured graph has
    it in its pool, once for all of its calls; rows of ``q`` or ``out`` that do not begin on 16 bytes are copied. Equal
    inputs, equal outputs, with ``lse`` and without. ``config`` replaces the launch numbers of `decode_config`. Returns
    ``out``.

    Raises:
        ValueError: a tensor's shape, type, device or layout, or a scale that is not finite and positive. Values in
            tensors are not looked at.
    """
    options = (k_scale, v_scale, sinks, lse, sm_scale, logit_cap, xai_temperature_len, config)
    return _decode(q, kv, out, indptr, token_ids, False, *options)


def mla_decode_paged(
    q: Query,
    kv: torch.Tensor,
    out: torch.Tensor,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    *,
    sm_scale: float,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    xai_temperature_len: int = -1,
    lse: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`mla_decode` by pages: request b owns the first ``lens[b]`` rows of the pages in ``block_table[b]``.

        kv           [pages, page_size, 576] (or [pages, page_size, 1, 576]), any page size; pages may lie apart
        block_table  [>= B, pages], int32 or int64; rows may lie apart. A view of its first columns will do, as long as
                     the memory behind it goes on with the request's other pages
        lens         [>= B], int32 or int64

    What the table holds past a request's pages is not read. All else is as there; Triton compiles page sizes apart.
    """
    options = (k_scale, v_scale, sinks, lse, sm_scale, logit_cap, xai_temperature_len, config)
    return _decode(q, kv, out, lens, block_table, True, *options)


def _decode(
    query: Query,
    kv: torch.Tensor,
    out: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    paged: bool,
    k_scale: float | torch.Tensor,
    v_scale: float | torch.Tensor,
    sinks: torch.Tensor | None,
    lse: torch.Tensor | None,
    sm_scale: float,
    logit_cap: float,
    xai_temperature_len: int,
    config: dict[str, int] | None,
) -> torch.Tensor:
    """Launch; where ``paged``, ``indptr`` holds lengths and ``token_ids`` is the block table.

    Every layer of every step makes the same call but for addresses, so what was found out about the first is kept. The
    key has all that checks look at and that Triton compiles apart, but for what changes from step to step.
    """
    q, rope = query if isinstance(query, tuple) else (query, None)
    # not `on_device_of`: this is on the way of every call, and an empty context takes time, too
    if gpu.on_other_device(q):
        with torch.cuda.device(q.device):
            return _decode(
                query, kv, out, indptr, token_ids, paged, k_scale, v_scale, sinks, lse, sm_scale, logit_cap,
                xai_temperature_len, config,
            )  # fmt: skip
    batch = q.shape[0]
    key = (
        q.shape, q.stride(), q.dtype, q.device, kv.shape, kv.stride(), kv.dtype, kv.device,
        out.shape, out.stride(), out.dtype, out.device, indptr.shape, indptr.stride(), indptr.dtype, indptr.device,
        token_ids.dtype, token_ids.device, paged, _scale_key(k_scale), _scale_key(v_scale),
        # a number may come as a tensor, which is equal to itself alone
        bool(sm_scale > 0), bool(logit_cap > 0), bool(xai_temperature_len > 0),
        rope if rope is None else (rope.shape, rope.stride(), rope.dtype, rope.device),
        sinks if sinks is None else (sinks.shape, sinks.stride(), sinks.dtype, sinks.device),
        lse if lse is None else (lse.shape, lse.stride(), lse.dtype, lse.device),
    )  # fmt: skip
    launches = KNOWN.get(key)
    if (
        launches is None
        or config is not None
        or not _lists_fit(token_ids, paged, batch)
        or (q.data_ptr() | kv.data_ptr() | out.data_ptr()) % 16
        or (rope is not None and rope.data_ptr() % 16)
    ):
        return _first_launch(
            q, rope, kv, out, indptr, token_ids, paged, k_scale, v_scale, sinks, lse, sm_scale, logit_cap,
            xai_temperature_len, config, key,
        )  # fmt: skip
    launches.launch(
        q, rope, kv, out, indptr, token_ids, sinks, lse, k_scale, v_scale, batch, token_ids.stride(0), sm_scale,
        float(logit_cap), int(xai_temperature_len),
    )  # fmt: skip
    return out


def _first_launch(
    q: torch.Tensor,
    rope: torch.Tensor | None,
    kv: torch.Tensor,
    out: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    paged: bool,
    k_scale: float | torch.Tensor,
    v_scale: float | torch.Tensor,
    sinks: torch.Tensor | None,
    lse: torch.Tensor | None,
    sm_scale: float,
    logit_cap: float,
    xai_temperature_len: int,
    config: dict[str, int] | None,
    key: Any,
) -> torch.Tensor:
    """`_decode` of a call whose like has not been before, or that needs copies first."""
    rows = kv[:, :, 0] if paged and kv.dim() == 4 and kv.shape[2] == 1 else kv
    kind = check(q, rope, rows, out, indptr, token_ids, paged, sinks, lse)
    check_scale("k_scale", k_scale, q)
    check_scale("v_scale", v_scale, q)
    options = (paged, k_scale, v_scale, sinks, lse, sm_scale, logit_cap, xai_temperature_len, config)
    batch, heads = q.shape[0], q.shape[1]
    if batch == 0:
        return out
    if not gpu.has_16b_rows(q) or (rope is not None and not gpu.has_16b_rows(rope)):
        q = gpu.ensure_16b_rows(q)
        return _decode(q if rope is None else (q, gpu.ensure_16b_rows(rope)), kv, out, indptr, token_ids, *options)
    if not gpu.has_16b_rows(out):
        aligned = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        return out.copy_(_decode(q if rope is None else (q, rope), kv, aligned, indptr, token_ids, *options))
    # without pages these two are no parameters at all
    page_stride, row_stride = None, rows.stride(0)
    if paged:
        page_stride, row_stride = rows.stride(0), rows.stride(1)
    chip = chip_of(q)
    kernel, sm90_key, seen_as = _decode_kernel, None, None
    may_sm90 = config is None and chip.capability == (9, 0) and heads >= SM90_MIN_HEADS and sm_scale > 0
    if may_sm90 and _takes_sm90(q, kv, row_stride, page_stride):
        kernel, sm90_key = _sm90_kernel()
    if kind != DIRECT:  # seen as wider integers, and strides with it
        if kind == E4M3:
            kind = kinds_on(chip.capability)[1]
        width, seen_as = (2, torch.int16) if sm90_key is None else (4, torch.int32)
        row_stride, page_stride = row_stride // width, page_stride and page_stride // width
    work = (heads, batch, kind, q.dtype is torch.float32, *chip, sm90_key)
    plan = launch_plan(work, (logit_cap > 0, xai_temperature_len > 0, rows.shape[1] if paged else 0), config)
    launches = Launches(
        Relaunch(kernel, plan.grid, plan.numbers),
        Relaunch(_merge_kernel, plan.merge_grid, plan.merge_numbers),
        plan.programs,
        heads,
        scratch_size(plan.programs, heads, batch, kind),
        seen_as,
        isinstance(k_scale, torch.Tensor),
        isinstance(v_scale, torch.Tensor),
        (*q.stride()[:2], *(q if rope is None else rope).stride()[:2]),
        row_stride,
        page_stride,
        out.stride()[:2],
        (None, None) if lse is None else lse.stride(),
    )
    launches.launch(
        q, rope, kv, out, indptr, token_ids, sinks, lse, k_scale, v_scale, batch, token_ids.stride(0), sm_scale,
        float(logit_cap), int(xai_temperature_len),
    )  # fmt: skip
    if config is None and kv.data_ptr() % 16 == 0:
        remember(key, launches)
    return out


def _scale_key(scale: float | torch.Tensor) -> Any:
    """What a scale is, for a key: True is a number that is right."""
    if isinstance(scale, torch.Tensor):
        return scale.shape, scale.dtype, scale.device
    return 0 < scale < math.inf  # false of NaN, too


def _lists_fit(token_ids: torch.Tensor, paged: bool, batch: int) -> bool:
    """Whether a list of ids or a block table is right, in what no key can hold since it changes from step to step."""
    if paged:
        if token_ids.dim() != 2 or not 0 <= token_ids.stride(0) < 2**31:
            return False
        rows, columns = token_ids.shape
        return rows >= batch and (columns <= 1 or token_ids.stride(1) == 1)
    return token_ids.dim() == 1 and token_ids.is_contiguous()


def _takes_sm90(q: torch.Tensor, kv: torch.Tensor, row_stride: int, page_stride: int | None) -> bool:
    """Whether decode_sm90 takes these: rows that can be copied 16 bytes at a time, and no float32."""
    multiple = 64 if kv.element_size() == 1 else 16  # Triton wants to know of 16 elements, in int32 for an 8-bit cache
    aligned = not (row_stride % multiple or (page_stride or 0) % multiple or kv.data_ptr() % 16)
    return aligned and HAS_GLUON and q.dtype is not torch.float32


@functools.cache
def _sm90_kernel() -> tuple[Any, int]:
    """The kernel and its KEY; imported late, since not every Triton has Gluon."""
    from mla_patch.kernels.decode.sm90 import decode_sm90
    from mla_patch.kernels.sm90 import layouts as sm90

    return decode_sm90, sm90.KEY
