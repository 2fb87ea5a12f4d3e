"""MLA decode for a caller who reads the splits afterwards, as decode context parallelism does.

    attn_logits    [>= B, H, S, 512]  float32, contiguous; every split's own softmax-weighted values, before v_scale
    attn_lse       [>= B, H, S]       float32, contiguous; natural log of the split's sum of exp(s)
    num_kv_splits  [>= B]             int32; how many of the S splits a request is cut into

    len_b = ceil(ceil(L_b / num_kv_splits_b) / 32) * 32; split i of request b has its keys i * len_b to (i + 1) * len_b

Tensors, scores and out are those of `mla_patch.kernels.decode`, whose arithmetic this is; sinks count in out alone. A
split of no keys is left as it was, in both. A number of splits outside 1 to S is taken for the nearest of these.

One program per request, tile of heads and split; a second kernel reads a request's splits in ascending order.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from mla_patch.compat import gpu
from mla_patch.compat.triton import FEW_TARGETS, TARGETS, CompileCase, watch_compiles
from mla_patch.kernels.common.checks import check_device, check_index_list, check_scale
from mla_patch.kernels.common.constants import LATENT, WIDTH
from mla_patch.kernels.common.launch import can_launch, chip_of, on_device_of, warming_up
from mla_patch.kernels.common.reference import attend_ref
from mla_patch.kernels.common.rounding import rounded
from mla_patch.kernels.decode.checks import check_call, check_rows
from mla_patch.kernels.decode.config import DIRECT, E4M3, E5M2, kinds_on, launch_numbers
from mla_patch.kernels.decode.reference import xai_temperature
from mla_patch.kernels.decode.triton import _attend, _store_chunk

_MERGE = {"BLOCK_S": 8, "num_warps": 4}


@triton.jit
def _cut(indptr, num_kv_splits, b, S):
    """Where request ``b`` begins in the token ids, how many keys it has, and how many each of its splits has."""
    first = tl.load(indptr + b).to(tl.int64)
    length = tl.maximum(tl.load(indptr + b + 1).to(tl.int64) - first, 0).to(tl.int32)
    splits = tl.minimum(tl.maximum(tl.load(num_kv_splits + b), 1), S)
    return first, length, ((length + splits - 1) // splits + 31) // 32 * 32


_CHANGING = ["sm_scale", "v_scale", "logit_cap", "xai_len"]
_CALL_ARGS = ["q", "out", "indptr", "token_ids", "sinks", "num_kv_splits"]


@triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_CALL_ARGS)
def _splits_kernel(
    q,
    kv,
    indptr,
    token_ids,
    attn_logits,
    attn_lse,
    num_kv_splits,
    H,
    S,
    sm_scale,
    logit_cap,
    xai_len,
    q_stride_b,
    q_stride_h,
    kv_stride,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    XAI: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    first, length, per_split = _cut(indptr, num_kv_splits, b, S)
    first_key = split * per_split
    if first_key < length:
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (head < H)[:, None]
        source = tl.multiple_of(q + b * q_stride_b + head[:, None].to(tl.int64) * q_stride_h, [16, 16])
        ids = token_ids + first + first_key
        keys = tl.minimum(per_split, length - first_key).to(tl.int32)
        count = (keys + (BLOCK_N - 1)) // BLOCK_N
        m, denominator, a0, a1, a2, a3, b0, b1, b2, b3 = _attend(
            source, source + 512, mask, kv, ids, 0, count, keys, length, sm_scale, logit_cap, xai_len, kv_stride, None,
            KIND, CAPPED, XAI, BLOCK_H, BLOCK_N, STAGES, 0,
        )  # fmt: skip
        factor = (1.0 / denominator)[:, None]
        row = (b * H + head) * S + split
        to_partial = attn_logits + row[:, None] * 512
        _store_chunk(to_partial, a0 * factor, b0 * factor, mask, KIND)
        _store_chunk(to_partial + 128, a1 * factor, b1 * factor, mask, KIND)
        _store_chunk(to_partial + 256, a2 * factor, b2 * factor, mask, KIND)
        _store_chunk(to_partial + 384, a3 * factor, b3 * factor, mask, KIND)
        tl.store(attn_lse + row, (m + tl.log2(denominator)) * 0.6931471805599453, mask=head < H)


@triton.jit(do_not_specialize=["v_scale"], do_not_specialize_on_alignment=_CALL_ARGS)
def _merge_splits_kernel(
    out,
    indptr,
    sinks,
    attn_logits,
    attn_lse,
    num_kv_splits,
    H,
    S,
    v_scale,
    out_stride_b,
    out_stride_h,
    BLOCK_S: tl.constexpr,
):
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    _, length, per_split = _cut(indptr, num_kv_splits, b, S)
    d = tl.arange(0, 512)
    acc = tl.zeros([512], tl.float32)
    if length > 0:
        row = (b * H + h) * S
        count = (length + per_split - 1) // per_split
        top = -float("inf")
        total = 0.0
        for block in range(0, count, BLOCK_S):
            split = block + tl.arange(0, BLOCK_S)
            lse = tl.load(attn_lse + row + split, mask=split < count, other=-float("inf"))
            part = tl.load(
                attn_logits + (row + split)[:, None] * 512 + d[None, :], mask=(split < count)[:, None], other=0.0
            )
            m = tl.maximum(top, tl.max(lse, 0))
            rescale, weight = tl.exp(top - m), tl.exp(lse - m)
            acc = acc * rescale + tl.sum(part * weight[:, None], 0)
            total = total * rescale + tl.sum(weight, 0)
            top = m
        if sinks is not None:
            total += tl.exp(tl.load(sinks + h).to(tl.float32) - top)
        acc = acc * (v_scale / total)
    tl.store(out + b * out_stride_b + h * out_stride_h + d, rounded(acc, out.dtype.element_ty))


def mla_decode_splits(
    q: torch.Tensor,
    kv: torch.Tensor,
    out: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    attn_logits: torch.Tensor,
    attn_lse: torch.Tensor,
    num_kv_splits: torch.Tensor,
    *,
    sm_scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    xai_temperature_len: int = -1,
    max_kv_splits: int | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`mla_decode` that leaves its splits in the caller's tensors; see the module for their layout.

    ``max_kv_splits``, where the caller has it, must be S. Two launches on the current stream, no sync, no allocation
    but for a copy of a ``q`` whose rows do not begin on 16 bytes; the grid is that of shapes, so a captured graph
    follows lengths and ``num_kv_splits``. A request of no rows gets zeros. Returns ``out``.

    Raises:
        ValueError: as `mla_decode`, and scratch of another type, shape or layout.
    """
    check_rows(kv)
    kind = check_call(q, None, kv, out, sinks)
    check_index_list("indptr", indptr, q.shape[0] + 1, q)
    check_index_list("token_ids", token_ids, 0, q)
    _check_scratch(q, attn_logits, attn_lse, num_kv_splits, max_kv_splits)
    check_scale("k_scale", k_scale, q)
    check_scale("v_scale", v_scale, q)
    batch, heads = q.shape[0], q.shape[1]
    if batch == 0:
        return out
    if kind != DIRECT:
        kv = kv.view(torch.int16)
    capability = chip_of(q).capability
    if kind == E4M3:
        kind = kinds_on(capability)[1]
    numbers = dict(config or launch_numbers(heads, kind, capability, q.dtype is torch.float32))
    for name in ("PER_SM", "maxnreg"):  # the grid is the caller's, and ptxas does well by itself
        numbers.pop(name, None)
    splits = attn_lse.shape[2]
    with on_device_of(q):
        q = gpu.ensure_16b_rows(q)
        _splits_kernel[(batch, -(-heads // numbers["BLOCK_H"]), splits)](
            q, kv, indptr, token_ids, attn_logits, attn_lse, num_kv_splits, heads, splits,
            float(sm_scale * k_scale), float(logit_cap), int(xai_temperature_len),
            q.stride(0), q.stride(1), kv.stride(0),
            KIND=kind, CAPPED=logit_cap > 0, XAI=xai_temperature_len > 0, **numbers,
        )  # fmt: skip
        _merge_splits_kernel[(batch, heads)](
            out, indptr, sinks, attn_logits, attn_lse, num_kv_splits, heads, splits, float(v_scale),
            out.stride(0), out.stride(1), **_MERGE,
        )  # fmt: skip
    return out


def mla_decode_splits_ref(
    q: torch.Tensor,
    kv: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    attn_logits: torch.Tensor,
    attn_lse: torch.Tensor,
    num_kv_splits: torch.Tensor,
    *,
    sm_scale: float,
    k_scale: float = 1.0,
    logit_cap: float = 0.0,
    xai_temperature_len: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of both scratch tensors, in float64, given what they held before (they are not changed)."""
    partial, lse = attn_logits.double().clone(), attn_lse.double().clone()
    bounds, max_splits = indptr[: q.shape[0] + 1].tolist(), attn_lse.shape[2]
    for b, (begin, end) in enumerate(itertools.pairwise(bounds)):
        length = end - begin
        if length <= 0:
            continue
        keys = kv.reshape(kv.shape[0], -1)[token_ids[begin:end].long()]
        temperature = xai_temperature(length, xai_temperature_len)
        per_split = -(-length // min(max(int(num_kv_splits[b]), 1), max_splits))
        per_split = -(-per_split // 32) * 32
        for i, start in enumerate(range(0, length, per_split)):
            found = attend_ref(
                q[b], keys[start : start + per_split], sm_scale=sm_scale * k_scale, logit_cap=logit_cap,
                temperature=temperature,
            )  # fmt: skip
            partial[b, :, i], lse[b, :, i] = found.out, found.lse
    return partial, lse


def compile_cases(every: bool = False) -> list[CompileCase]:
    """What the launch tables can ask Triton to compile: all options off and all on, or, for ``every``, the product."""
    switches = list(itertools.product((False, True), repeat=2)) if every else [(False, False), (True, True)]
    cases = []
    for sm in TARGETS:
        capability = (sm // 10, sm % 10)
        for kind, heads, (capped, xai) in itertools.product(kinds_on(capability), (16, 128), switches):
            # it attends as `decode` does, whose cases have every way to read a cache on every chip
            if not every and sm not in FEW_TARGETS and (kind != DIRECT or not capped):
                continue
            if not every and sm != 90 and (not capped or (kind == E5M2 and sm != 86)):
                continue
            numbers = launch_numbers(heads, kind, capability, False)
            if heads > 16 and numbers == launch_numbers(16, kind, capability, False):
                continue
            del numbers["PER_SM"]
            numbers.pop("maxnreg", None)
            warps = numbers.pop("num_warps")
            index = "*i64" if capped else "*i32"
            signature = {"q": "*bf16", "kv": "*bf16" if kind == DIRECT else "*i16", "indptr": index, "token_ids": index}
            signature |= {"attn_logits": "*fp32", "attn_lse": "*fp32", "num_kv_splits": "*i32"}
            signature |= dict.fromkeys(("H", "S", "xai_len", *_STRIDES), "i32")
            signature |= dict.fromkeys(("sm_scale", "logit_cap"), "fp32")
            cases.append(
                CompileCase(
                    f"splits {('direct', 'e4m3', 'e4m3 bits', 'e5m2')[kind]}, {heads} heads, {capped} {xai}",
                    _splits_kernel,
                    signature,
                    {"KIND": kind, "CAPPED": capped, "XAI": xai} | numbers,
                    ("kv", "attn_logits", "attn_lse", "H", *_STRIDES),
                    warps,
                    targets=(sm,),
                )
            )
    for sinks in (False, True):
        signature = {
            "out": "*fp32" if sinks else "*bf16",
            "indptr": "*i32",
            "attn_logits": "*fp32",
            "attn_lse": "*fp32",
        }
        signature |= {"num_kv_splits": "*i32", "v_scale": "fp32"} | ({"sinks": "*fp32"} if sinks else {})
        signature |= dict.fromkeys(("H", "S", "out_stride_b", "out_stride_h"), "i32")
        options: dict[str, Any] = {"BLOCK_S": _MERGE["BLOCK_S"]} | ({} if sinks else {"sinks": None})
        warps = _MERGE["num_warps"]
        cases.append(CompileCase(f"merge {sinks}", _merge_splits_kernel, signature, options, num_warps=warps))
    return cases


_STRIDES = ("q_stride_b", "q_stride_h", "kv_stride")


_VALUES, _LAST_DIMENSIONS = f", {LATENT}", ((), (LATENT,))


def _check_scratch(
    q: torch.Tensor,
    attn_logits: torch.Tensor,
    attn_lse: torch.Tensor,
    num_kv_splits: torch.Tensor,
    max_kv_splits: int | None,
) -> None:
    batch, heads = q.shape[0], q.shape[1]
    for name, tensor, rank, rest in (("attn_lse", attn_lse, 3, ""), ("attn_logits", attn_logits, 4, _VALUES)):
        shape = tensor.shape
        expected = f"[{batch} or more, {heads}, S{rest}]"
        if len(shape) != rank or shape[0] < batch or shape[1] != heads or shape[3:] not in _LAST_DIMENSIONS:
            raise ValueError(f"{name}: shape {tuple(shape)}, expected {expected}")
        if tensor.dtype is not torch.float32 or not tensor.is_contiguous():
            found = f"{tensor.dtype}, strides {tensor.stride()}"
            raise ValueError(f"{name}: {found}, expected torch.float32 and contiguous {expected}")
        check_device(name, tensor, q)
    splits = attn_lse.shape[2]
    if attn_logits.shape[2] != splits:
        raise ValueError(f"attn_logits: {attn_logits.shape[2]} splits, expected {splits} as attn_lse")
    if not 1 <= splits <= 65535:
        raise ValueError(f"attn_lse: {splits} splits, expected 1 to 65535")
    if max_kv_splits is not None and max_kv_splits != splits:
        raise ValueError(f"max_kv_splits: {max_kv_splits}, expected {splits} as attn_lse has")
    if num_kv_splits.dtype is not torch.int32 or num_kv_splits.dim() != 1 or num_kv_splits.shape[0] < batch:
        found = f"{num_kv_splits.dtype}, shape {tuple(num_kv_splits.shape)}"
        raise ValueError(f"num_kv_splits: {found}, expected torch.int32, at least {batch} long")
    if not num_kv_splits.is_contiguous():
        raise ValueError(f"num_kv_splits: stride {num_kv_splits.stride(0)}, expected 1")
    check_device("num_kv_splits", num_kv_splits, q)


watch_compiles(_splits_kernel, _merge_splits_kernel)


def warmup(device: torch.device | str, heads: int, dtype: torch.dtype, cache_dtype: torch.dtype, splits: int) -> int:
    """Compile what `mla_decode_splits` can reach with ``splits`` places in the scratch; how many kernels that took.

    One launch over an empty request, as SGLang calls: int64 token ids, a float32 output, no sinks, cap or temperature.
    The number of requests is no parameter of these kernels. Nothing to do on a CPU.

    Raises:
        ValueError: heads or types that `mla_decode_splits` does not take.
    """
    q = torch.zeros(1, heads, WIDTH, dtype=dtype, device=device)
    if not can_launch(q):
        return 0
    logits = torch.empty(1, heads, splits, LATENT, device=device)
    kv = torch.zeros(1, 1, WIDTH, dtype=dtype, device=device).to(cache_dtype)
    indptr, counts = torch.zeros(2, dtype=torch.int32, device=device), torch.ones(1, dtype=torch.int32, device=device)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    with warming_up() as compiled:
        mla_decode_splits(
            q, kv, logits[:, :, 0].clone(), indptr, ids, logits, logits[..., 0].clone(), counts, sm_scale=1.0
        )
    return compiled()
