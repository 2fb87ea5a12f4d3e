"""What Triton may be asked to compile for MLA decode: for the compile tier, and for a warm-up."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from mla_patch.compat.triton import FEW_TARGETS, TARGETS, CompileCase
from mla_patch.kernels.common.constants import LATENT, WIDTH
from mla_patch.kernels.common.launch import can_launch, warming_up
from mla_patch.kernels.decode.config import DIRECT, E5M2, kinds_on, launch_numbers, merge_config
from mla_patch.kernels.decode.launch import mla_decode, mla_decode_paged
from mla_patch.kernels.decode.triton import _decode_kernel, _merge_kernel

_STRIDES = (
    "q_stride_b", "q_stride_h", "rope_stride_b", "rope_stride_h", "kv_stride", "out_stride_b", "out_stride_h",
)  # fmt: skip


def compile_cases(every: bool = False) -> list[CompileCase]:
    """What the launch tables can ask Triton to compile: all options off and all on, or, for ``every``, the product."""
    switches = (
        list(itertools.product((False, True), repeat=3)) if every else [(False, False, False), (True, True, True)]
    )
    cases = []
    for sm in TARGETS:
        capability = (sm // 10, sm % 10)
        for kind, heads, (capped, xai, sinks), form in itertools.product(
            kinds_on(capability), (16, 128), switches, ("", "paged", "float32")
        ):
            # of what differs only at the ends of the loop, or in few of its instructions, one case will do
            if form and not every and not (heads == 16 and sinks and kind != E5M2 and sm in FEW_TARGETS):
                continue
            # e5m2 has an instruction less than e4m3, and a case without options less than the one with all
            if not every and sm not in FEW_TARGETS and (kind == E5M2 or not sinks):
                continue
            # sm_120 reads e4m3 as sm_90 does and has the launch numbers of sm_86: there the largest cases will do
            if not every and sm == 120 and (kind == E5M2 or not sinks or form):
                continue
            numbers = launch_numbers(heads, kind, capability, form == "float32")
            if heads > 16 and numbers == launch_numbers(16, kind, capability, form == "float32"):
                continue
            del numbers["PER_SM"]
            warps, registers = numbers.pop("num_warps"), numbers.pop("maxnreg", None)
            index = "*i64" if sinks else "*i32"
            pointers = {"q": "*bf16", "kv": "*bf16" if kind == DIRECT else "*i16", "out": "*fp32" if sinks else "*bf16"}
            pointers |= {"indptr": index, "token_ids": index, "partial": "*fp32" if kind == DIRECT else "*fp16"}
            pointers |= {"sinks": "*fp32"} if sinks else {}
            pointers |= {"q": "*fp32"} if form == "float32" else {}
            pointers |= {"q_rope": pointers["q"]}
            scalars = dict.fromkeys(("B", "H", "xai_len", *_STRIDES), "i32")
            scalars |= dict.fromkeys(("sm_scale", "v_scale", "logit_cap"), "fp32")
            options: dict[str, Any] = {
                "KIND": kind,
                "CAPPED": capped,
                "XAI": xai,
                "ROWS": 256,
                "PDL": sm >= 90 and sinks,
                "PAGE_SIZE": 64 if form == "paged" else 0,
            }
            if form == "paged":
                scalars |= {"table_stride": "i32", "page_stride": "i64"}
            else:
                options |= {"table_stride": None, "page_stride": None}
            if sinks:  # with all else that a call may bring
                pointers |= {"lse": "*fp32", "k_scale_at": "*fp32", "v_scale_at": "*fp32"}
                scalars |= {"lse_stride_b": "i32", "lse_stride_h": "i32"}
            else:
                absent = ("sinks", "lse", "k_scale_at", "v_scale_at", "lse_stride_b", "lse_stride_h")
                options |= dict.fromkeys(absent)
            what = f"{('direct', 'e4m3', 'e4m3 bits', 'e5m2')[kind]}, {heads} heads, {capped} {xai} {sinks}"
            cases.append(
                CompileCase(
                    f"decode {what} {form}".rstrip(),
                    _decode_kernel,
                    pointers | scalars,
                    options | numbers,
                    ("kv", "partial", "H", *_STRIDES, *(("page_stride",) if form == "paged" else ())),
                    warps,
                    maxnreg=registers,
                    targets=(sm,),
                    # bounds and pointers that the loop over keys has no use for: stored before it, loaded after it
                    stack=192,
                )
            )
    sizes = [(1, False), (4, False), (16, False), (64, False), (1, True)]
    for (batch, after_sm90), sinks in itertools.product(sizes, (False, True)):
        numbers = merge_config(batch, after_sm90)
        warps = numbers.pop("num_warps")
        pointers = {"out": "*bf16", "partial": "*fp32"}
        scalars = {"programs": "i32", "H": "i32", "v_scale": "fp32", "out_stride_b": "i32", "out_stride_h": "i32"}
        options = {"PARTIALS": 512, "PDL": False}
        if sinks:
            pointers |= {"sinks": "*fp32", "lse": "*fp32", "v_scale_at": "*fp32"}
            scalars |= {"lse_stride_b": "i32", "lse_stride_h": "i32"}
        else:
            options |= dict.fromkeys(("sinks", "lse", "v_scale_at", "lse_stride_b", "lse_stride_h"))
        name = f"merge {numbers} {sinks}"
        targets = TARGETS if every or sinks else FEW_TARGETS
        cases.append(
            CompileCase(name, _merge_kernel, pointers | scalars, options | numbers, num_warps=warps, targets=targets)
        )
    return cases


def warmup(
    device: torch.device | str,
    heads: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    max_batch: int,
    page_size: int = 0,
    index: tuple[torch.dtype, torch.dtype] = (torch.int32, torch.int64),
    parts: bool = False,
) -> int:
    """Compile what `mla_decode` can reach with up to ``max_batch`` requests; how many kernels that took.

    With a ``page_size``, what `mla_decode_paged` can. ``index``: the types of indptr and token_ids, or of lens and
    block_table. ``parts``: of a query in two parts. Real launches over empty requests, so that Triton specialises as
    it will when serving; without sinks, cap and temperature, which MLA models do not have. Keeps no memory. Nothing to
    do on a CPU.

    Raises:
        ValueError: heads or types that `mla_decode` does not take.
    """
    q = torch.zeros(1, heads, WIDTH, dtype=dtype, device=device)
    if not can_launch(q):
        return 0
    out = torch.empty(1, heads, LATENT, dtype=dtype, device=device)
    kv = torch.zeros(1, page_size or 1, WIDTH, dtype=dtype, device=device).to(cache_dtype)
    ids = torch.zeros(1, dtype=index[1], device=device)
    # launch numbers change at a power of two or beside it; all requests share one row, by a stride of 0
    sizes = {size + beside for size in (2**n for n in range(max_batch.bit_length())) for beside in (-1, 0, 1)}
    with warming_up() as compiled:
        for batch in sorted(size for size in sizes | {max_batch} if 0 < size <= max_batch):
            indptr = torch.zeros(batch + 1, dtype=index[0], device=device)
            rows = (batch, -1, -1)
            queries = q.expand(rows)
            query = (queries[..., :LATENT], queries[..., LATENT:]) if parts else queries
            if page_size:
                mla_decode_paged(query, kv, out.expand(rows), ids.expand(batch, 1), indptr, sm_scale=1.0)
            else:
                mla_decode(query, kv, out.expand(rows), indptr, ids, sm_scale=1.0)
    return compiled()
