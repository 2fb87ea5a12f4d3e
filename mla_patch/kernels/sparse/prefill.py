"""Sparse MLA prefill: every query attends to the rows of a 16-bit workspace that its own list of indices names.

    q               [Sq, H, 576 or 512]    bfloat16 or float16; strides free but for the last dimension; 1 to 128 heads
    kv              [Skv, 1, same width]    dtype of q; rows may lie apart
    indices         [Sq, 1, topk]    int32, rows of kv in any order, repeats count again; outside [0, Skv) is no key
    topk_length     [Sq]    int32, int64 or None: only the first so many indices of a query count
    attn_sink       [H]    float or None
    out             [Sq, H, 512]    dtype of q
    max_logits      [Sq, H]    float32, max_j s_j
    lse             [Sq, H]    float32, log sum_j exp(s_j)

    s_j = sm_scale * q . kv_j        out = sum_j exp(s_j) kv_j[:512] / (sum_j exp(s_j) + exp(sink))

Both statistics leave the sink out, and are natural, or times log2(e). A query without a key has out 0, max_logits -inf
and lse +inf, whatever the sink.

One program per query and tile of heads; keys are gathered a tile at a time. On sm_90 more than 16 heads are
`mla_patch.kernels.sparse.sm90`'s.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl

from mla_patch.compat import gpu
from mla_patch.compat.compiles import COMPILES
from mla_patch.compat.triton import TARGETS, CompileCase, interpreted, watch_compiles
from mla_patch.kernels.cache.dequantize import operand, rounded
from mla_patch.kernels.sparse.decode import LN2, is_wide, launch_wide

_INTERPRETED = interpreted()


def sparse_prefill_config(heads: int, capability: tuple[int, int], interpret: bool = False) -> dict[str, int]:
    """Launch numbers by architecture and heads."""
    if interpret:
        return {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 1, "num_warps": 4}
    # 64 heads are a whole tile of the tensor cores, and each key is gathered once for all of them
    if capability[0] == 9 and heads > 16:
        return {"BLOCK_H": 64, "BLOCK_N": 64, "STAGES": 2, "num_warps": 8}
    if capability[0] == 10 and heads > 16:
        return {"BLOCK_H": 64, "BLOCK_N": 32, "STAGES": 3, "num_warps": 8}
    # a gather follows its indices, so that five stages are two tiles of keys
    if capability == (8, 0) and heads > 16:
        return {"BLOCK_H": 64, "BLOCK_N": 32, "STAGES": 5, "num_warps": 8}
    return {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 5, "num_warps": 4}


_CHANGING = ["topk", "rows", "sm_scale", "unit", "ids_s"]
_CALL_ARGS = ["ids", "lens", "sinks", "max_logits", "lse"]


@triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_CALL_ARGS)
def _sparse_prefill_kernel(
    q,
    kv,
    ids,
    lens,
    sinks,
    out,
    max_logits,
    lse,
    H,
    topk,
    rows,
    sm_scale,
    unit,
    q_s,
    q_h,
    kv_s,
    ids_s,
    out_s,
    out_h,
    ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One query, BLOCK_H of its heads. ``unit`` is what a base-2 logarithm of the statistics is multiplied by."""
    tiles = (H + BLOCK_H - 1) // BLOCK_H
    s = (tl.program_id(0) // tiles).to(tl.int64)
    head = tl.program_id(0) % tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = head < H
    mask = is_head[:, None]
    d = tl.arange(0, 512)[None, :]
    r = tl.arange(0, 64)[None, :]
    keys = topk
    if lens is not None:
        keys = tl.minimum(tl.maximum(tl.load(lens + s), 0), topk).to(tl.int32)
    source = q + s * q_s + head[:, None].to(tl.int64) * q_h
    nope = operand(tl.load(source + d, mask=mask, other=0.0))
    rope = nope
    if ROPE:
        rope = operand(tl.load(source + 512 + r, mask=mask, other=0.0))
    scale = sm_scale * 1.4426950408889634  # exp2 is what the chip has
    m = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, 512], tl.float32)
    n = tl.arange(0, BLOCK_N)
    own = ids + s * ids_s
    for i in tl.range(0, (keys + BLOCK_N - 1) // BLOCK_N, num_stages=STAGES):
        j = i * BLOCK_N + n
        row = tl.load(own + j, mask=j < keys, other=-1)
        known = (row >= 0) & (row < rows)
        # masked, not clamped: an unknown index has no row, and 0 times a stranger's NaN is NaN
        at = kv + tl.where(known, row, 0).to(tl.int64)[:, None] * kv_s
        k = operand(tl.load(at + d, mask=known[:, None], other=0.0))
        score = tl.dot(nope, k.T)
        if ROPE:
            score = tl.dot(rope, operand(tl.load(at + 512 + r, mask=known[:, None], other=0.0)).T, score)
        score = tl.where(known[None, :], score * scale, -float("inf"))
        top = tl.maximum(m, tl.max(score, 1))
        base = tl.where(top == -float("inf"), 0.0, top)  # no key so far: -inf - -inf would be NaN
        keep = tl.exp2(m - base)
        weight = tl.exp2(score - base[:, None])
        m = top
        total = total * keep + tl.sum(weight, 1)
        acc = tl.dot(weight.to(k.dtype), k, acc * keep[:, None])
    lonely = total == 0.0
    base = tl.where(m == -float("inf"), 0.0, m)
    whole = total
    if sinks is not None:
        sink = tl.load(sinks + head, mask=is_head, other=0.0).to(tl.float32)
        whole += tl.exp2(sink * 1.4426950408889634 - base)
    factor = 1.0 / tl.where(lonely, 1.0, whole)
    log = tl.where(lonely, float("inf"), base + tl.log2(tl.where(lonely, 1.0, total)))
    tl.store(max_logits + s * H + head, m * unit, mask=is_head)
    tl.store(lse + s * H + head, log * unit, mask=is_head)
    to = out + s * out_s + head[:, None].to(tl.int64) * out_h
    tl.store(to + d, rounded(acc * factor[:, None], out.dtype.element_ty), mask=mask)


def mla_sparse_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_log2: bool = False,
    *,
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend from every query to the rows that its indices name; see the module. Returns ``out, max_logits, lse``.

    ``return_log2`` gives both statistics to the base 2. No queries launch nothing. Without sync; the results come from
    torch's allocator at every call (but for an ``out`` that is given), so a captured graph has them in its pool.
    ``config`` replaces `sparse_prefill_config`'s numbers.

    Raises:
        ValueError: a tensor's shape, type, device or layout. Values in tensors are not looked at.
    """
    _check(q, kv, indices, d_v, attn_sink, topk_length, out)
    if gpu.elsewhere(q):
        with torch.cuda.device(q.device):
            return mla_sparse_prefill(
                q, kv, indices, sm_scale, d_v, attn_sink, topk_length, out, return_log2, config=config
            )
    queries, heads, width = q.shape
    if out is None:
        out = torch.empty(queries, heads, 512, dtype=q.dtype, device=q.device)
    max_logits = torch.empty(queries, heads, dtype=torch.float32, device=q.device)
    lse = torch.empty_like(max_logits)
    if queries == 0:
        return out, max_logits, lse
    capability = (0, 0) if _INTERPRETED else gpu.capability(q.device.index)
    log_unit = 1.0 if return_log2 else LN2
    # rows are copied 16 bytes at a time, and Triton wants to know of 16 elements
    aligned = kv.stride(0) % 16 == 0 and kv.data_ptr() % 16 == 0
    if aligned and config is None and is_wide(q, out, sm_scale, capability):
        launch_wide(
            gpu.realigned(q)[:, None], kv, kv.stride(0), 0, kv.shape[0], indices, topk_length, out, lse[..., None],
            max_logits, lse, lse, 1, sm_scale=sm_scale, log_unit=log_unit, sinks=attn_sink,
        )  # fmt: skip
        return out, max_logits, lse
    numbers = config or sparse_prefill_config(heads, capability, _INTERPRETED)
    _sparse_prefill_kernel[(queries * -(-heads // numbers["BLOCK_H"]),)](
        q, kv, indices, topk_length, attn_sink, out, max_logits, lse, heads, indices.shape[2], kv.shape[0],
        float(sm_scale), log_unit, q.stride(0), q.stride(1), kv.stride(0), indices.stride(0),
        out.stride(0), out.stride(1), ROPE=width == 576, **numbers,
    )  # fmt: skip
    return out, max_logits, lse


def mla_sparse_prefill_ref(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    return_log2: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition, in float64: out [Sq, H, 512], max_logits and lse [Sq, H]."""
    queries, heads = q.shape[:2]
    out = torch.zeros(queries, heads, d_v, dtype=torch.float64, device=q.device)
    max_logits = torch.full((queries, heads), -math.inf, dtype=torch.float64, device=q.device)
    lse = torch.full((queries, heads), math.inf, dtype=torch.float64, device=q.device)
    for s in range(queries):
        ids = indices[s, 0, : max(0, int(topk_length[s])) if topk_length is not None else None].long()
        keys = kv[ids[(ids >= 0) & (ids < kv.shape[0])], 0].double()
        if len(keys):
            scores = q[s].double() @ keys.T * sm_scale
            max_logits[s] = scores.amax(-1)
            lse[s] = total = scores.logsumexp(-1)
            if attn_sink is not None:
                total = torch.logaddexp(total, attn_sink.double())
            out[s] = torch.exp(scores - total[:, None]) @ keys[:, :d_v]
    unit = math.log2(math.e) if return_log2 else 1.0
    return out, max_logits * unit, lse * unit


def _check(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    _check_q(q)
    queries, heads, width = q.shape
    if kv.dim() != 3 or kv.shape[1:] != (1, width) or (kv.stride(2) != 1 and kv.numel()):
        raise ValueError(f"kv: {_shape(kv)}, expected [Skv, 1, {width}], the last contiguous")
    if kv.dtype is not q.dtype:
        raise ValueError(f"kv: {kv.dtype}, expected {q.dtype} as q")
    if kv.shape[0] >= 2**31:
        raise ValueError(f"kv: {kv.shape[0]} rows, expected less than 2**31, which is all that int32 indices name")
    if indices.dtype is not torch.int32 or indices.dim() != 3 or indices.shape[:2] != (queries, 1):
        found = f"{indices.dtype}, shape {tuple(indices.shape)}"
        raise ValueError(f"indices: {found}, expected torch.int32, [{queries}, 1, topk]")
    if indices.shape[2] > 1 and indices.stride(2) != 1:
        raise ValueError(f"indices: stride {indices.stride(2)} in the last dimension, expected 1")
    if d_v != 512:
        raise ValueError(f"d_v: {d_v}, expected 512")
    if attn_sink is not None and (
        attn_sink.shape != (heads,) or not attn_sink.is_floating_point() or not attn_sink.is_contiguous()
    ):
        found = f"{attn_sink.dtype}, {_shape(attn_sink)}"
        raise ValueError(f"attn_sink: {found}, expected a float for each of {heads} heads, contiguous")
    if topk_length is not None and (
        topk_length.dtype not in (torch.int32, torch.int64)
        or topk_length.shape != (queries,)
        or not topk_length.is_contiguous()
    ):
        found = f"{topk_length.dtype}, {_shape(topk_length)}"
        raise ValueError(f"topk_length: {found}, expected int32 or int64, [{queries}], contiguous")
    if out is not None:
        _check_out(out, q, q.dtype)
    others = {"kv": kv, "indices": indices, "attn_sink": attn_sink, "topk_length": topk_length}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {q.device} as q")


def _check_q(q: torch.Tensor) -> None:
    if not q.is_cuda and not _INTERPRETED:
        raise ValueError(f"q: on {q.device}, expected a CUDA device (or TRITON_INTERPRET=1 at import)")
    if q.dim() != 3 or q.shape[2] not in (576, 512) or (q.stride(2) != 1 and q.numel()):
        raise ValueError(f"q: {_shape(q)}, expected [Sq, H, 576 or 512], the last contiguous")
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"q: {q.dtype}, expected torch.bfloat16 or torch.float16")
    if not 1 <= q.shape[1] <= 128:
        raise ValueError(f"q: {q.shape[1]} heads, expected 1 to 128")


def _check_out(out: torch.Tensor, q: torch.Tensor, dtype: torch.dtype) -> None:
    queries, heads, _ = q.shape
    if out.shape != (queries, heads, 512) or (out.stride(2) != 1 and out.numel()):
        raise ValueError(f"out: {_shape(out)}, expected [{queries}, {heads}, 512], the last contiguous")
    if out.dtype is not dtype:
        raise ValueError(f"out: {out.dtype}, expected {dtype}")
    if out.device != q.device:
        raise ValueError(f"out: on {out.device}, expected {q.device} as q")


def _shape(tensor: torch.Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"


def compile_cases(every: bool = False) -> list[CompileCase]:
    """Both widths and tiles of heads, with sink and lengths both absent and both given; every: float16, too."""
    cases = []
    kinds = ("bf16", "fp16") if every else ("bf16",)
    for sm, heads, rope, full, kind in itertools.product(TARGETS, (16, 64), (False, True), (False, True), kinds):
        numbers = sparse_prefill_config(heads, (sm // 10, sm % 10))
        if heads > 16 and numbers == sparse_prefill_config(16, (sm // 10, sm % 10)):
            continue
        warps = numbers.pop("num_warps")
        signature = {"q": f"*{kind}", "kv": f"*{kind}", "out": f"*{kind}", "ids": "*i32"}
        signature |= {"max_logits": "*fp32", "lse": "*fp32", "sm_scale": "fp32", "unit": "fp32"}
        signature |= dict.fromkeys(("H", "topk", "rows", "q_s", "q_h", "kv_s", "ids_s", "out_s", "out_h"), "i32")
        options: dict[str, Any] = {"ROPE": rope, **numbers}
        if full:
            signature |= {"lens": "*i32", "sinks": "*fp32"}
        else:
            options |= {"lens": None, "sinks": None}
        divisible = ("q", "kv", "out", "q_s", "q_h", "kv_s", "out_s", "out_h")
        name = f"sparse_prefill {576 if rope else 512} {kind}, {heads} heads, {full}"
        # addresses of 64 gathered rows beside an accumulator of 64 x 512, in 8 warps
        stack = {90: 400, 100: 100}.get(sm, 0) if heads > 16 else 0
        cases.append(
            CompileCase(name, _sparse_prefill_kernel, signature, options, divisible, warps, targets=(sm,), stack=stack)
        )
    return cases


def warmup(
    device: torch.device | str, heads: int, width: int = 576, dtype: torch.dtype = torch.bfloat16, more: bool = False,
    lengths: bool = False,
) -> int:  # fmt: skip
    """Compile what `mla_sparse_prefill` can reach for queries of this shape and type, ``more``: with sink and int32
    lengths, ``lengths``: with these alone; how many kernels that took. Queries, rows, topk and base change nothing.

    A real launch over one key. Nothing to do on a CPU.
    """
    q = torch.zeros(1, heads, width, dtype=dtype, device=device)
    if not q.is_cuda and not _INTERPRETED:
        return 0
    before = COMPILES.total
    ids = torch.zeros(1, 1, 1, dtype=torch.int32, device=device)
    sink = torch.zeros(heads, device=device) if more else None
    lens = torch.ones(1, dtype=torch.int32, device=device) if more or lengths else None
    with COMPILES.warming():
        mla_sparse_prefill(q, q[:, :1], ids, 1.0, attn_sink=sink, topk_length=lens)
    return COMPILES.total - before


watch_compiles(_sparse_prefill_kernel)
