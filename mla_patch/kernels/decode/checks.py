"""What MLA decode takes: checks of a call's arguments, which read metadata only, never the values of tensors."""

from __future__ import annotations

import torch

from mla_patch.kernels.common.checks import (
    FLOAT_TYPES,
    INDEX_TYPES,
    check_can_launch,
    check_device,
    check_index_list,
    check_sinks,
    describe,
)
from mla_patch.kernels.common.constants import LATENT, ROPE, WIDTH
from mla_patch.kernels.decode.config import DIRECT, EIGHT_BIT_KINDS

MAX_HEADS = 128
_ROW_SHAPES = ((1, WIDTH), (WIDTH,))


def check(
    q: torch.Tensor,
    rope: torch.Tensor | None,
    kv: torch.Tensor,
    out: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    paged: bool,
    sinks: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> int:
    """How the cache is read, a KIND. Where ``paged``, ``indptr`` holds lengths and ``token_ids`` is the block table.

    Raises:
        ValueError: a tensor's shape, type, device or layout.
    """
    if paged:
        if kv.dim() != 3 or kv.shape[1] < 1 or kv.shape[2] != WIDTH or kv.stride(2) != 1:
            found = f"shape {tuple(kv.shape)}, strides {kv.stride()}"
            raise ValueError(f"kv: {found}, expected [pages, page_size, {WIDTH}] or [pages, page_size, 1, {WIDTH}]")
    else:
        check_rows(kv)
    kind = check_call(q, rope, kv, out, sinks)
    batch, heads = q.shape[:2]
    if lse is not None:
        if lse.shape != (batch, heads) or lse.dtype not in (torch.float32, q.dtype):
            raise ValueError(f"lse: {describe(lse)}, expected torch.float32 or {q.dtype} as q, {[batch, heads]}")
        check_device("lse", lse, q)
    if not paged:
        check_index_list("indptr", indptr, batch + 1, q)
        check_index_list("token_ids", token_ids, 0, q)
        return kind
    check_index_list("lens", indptr, batch, q)
    if token_ids.dtype not in INDEX_TYPES or token_ids.dim() != 2 or token_ids.shape[0] < batch:
        found = f"{token_ids.dtype}, shape {tuple(token_ids.shape)}"
        raise ValueError(f"block_table: {found}, expected int32 or int64, [{batch} or more, pages]")
    if token_ids.stride(1) != 1 and token_ids.shape[1] > 1:
        raise ValueError(f"block_table: stride {token_ids.stride(1)} in the last dimension, expected 1")
    check_device("block_table", token_ids, q)
    return kind


def check_rows(kv: torch.Tensor) -> None:
    """A cache by rows."""
    if kv.shape[1:] not in _ROW_SHAPES or kv.stride(-1) != 1:
        found = f"shape {tuple(kv.shape)}, strides {kv.stride()}"
        raise ValueError(f"kv: {found}, expected [N, 1, {WIDTH}] or [N, {WIDTH}]")


def check_call(
    q: torch.Tensor, rope: torch.Tensor | None, kv: torch.Tensor, out: torch.Tensor, sinks: torch.Tensor | None
) -> int:
    """How the cache is read, a KIND, from all but the cache's shape and the lists; ValueError as `check`."""
    check_can_launch("q", q)
    q_type, shape, kv_type = q.dtype, q.shape, kv.dtype
    if q_type not in FLOAT_TYPES:
        raise ValueError(f"q: {q_type}, expected torch.bfloat16, torch.float16 or torch.float32")
    width = WIDTH if rope is None else LATENT
    if len(shape) != 3 or shape[2] != width or q.stride(2) != 1:
        expected = f"[B, H, {width}]{'' if rope is None else ' beside a rope of its own'}, the last contiguous"
        raise ValueError(f"q: shape {tuple(shape)}, strides {q.stride()}, expected {expected}")
    batch, heads, _ = shape
    if not 1 <= heads <= MAX_HEADS:
        raise ValueError(f"q: {heads} heads, expected 1 to {MAX_HEADS}")
    if rope is not None:
        if rope.shape != (batch, heads, ROPE) or rope.dtype is not q_type or rope.stride(2) != 1:
            expected = f"{q_type} as q, {[batch, heads, ROPE]}, the last contiguous"
            raise ValueError(f"q's rope: {describe(rope)}, expected {expected}")
        check_device("q's rope", rope, q)
    kind = EIGHT_BIT_KINDS.get(kv_type, DIRECT)
    if kind != DIRECT:
        if kv.stride(0) % 2 or kv.stride(-2) % 2 or kv.storage_offset() % 2:
            found = f"strides {kv.stride()}, offset {kv.storage_offset()}"
            raise ValueError(f"kv: {found}, expected even numbers: 8-bit values are read two at a time")
    elif kv_type not in FLOAT_TYPES[:2] or (kv_type is not q_type and q_type is not torch.float32):
        same = "torch.bfloat16, torch.float16" if q_type is torch.float32 else f"{q_type} as q"
        raise ValueError(f"kv: {kv_type}, expected {same}, torch.float8_e4m3fn or torch.float8_e5m2")
    if out.shape != (batch, heads, LATENT) or out.stride(2) != 1:
        raise ValueError(f"out: shape {tuple(out.shape)}, strides {out.stride()}, expected {[batch, heads, LATENT]}")
    if out.dtype not in FLOAT_TYPES:
        raise ValueError(f"out: {out.dtype}, expected torch.bfloat16, torch.float16 or torch.float32")
    check_sinks("sinks", sinks, heads, q)
    check_device("kv", kv, q)
    check_device("out", out, q)
    return kind
