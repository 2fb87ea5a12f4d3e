"""What the launch tables of the sparse family can ask Triton to compile; `tests/compile_matrix.py` compiles it.

`mla_patch.kernels.sparse.sm90` has the cases of its own kernel.
"""

from __future__ import annotations

import itertools
from typing import Any

from mla_patch.compat.triton import FEW_TARGETS, TARGETS, CompileCase
from mla_patch.kernels.common.constants import LATENT, WIDTH
from mla_patch.kernels.sparse.config import MERGE, sparse_config, sparse_prefill_config
from mla_patch.kernels.sparse.triton import (
    dense_kernel,
    sparse_kernel,
    sparse_merge_kernel,
    sparse_prefill_kernel,
    sparse_query_kernel,
)

_RESULTS = {"out": "*bf16", "lse": "*fp32", "partial": "*fp32", "partial_lse": "*fp32"}
_RESULTS_ALIGNED = ("out", "lse", "partial", "partial_lse")


def compile_cases(every: bool = False) -> list[CompileCase]:
    """All Triton kernels of the family, with all options off and all on, or, with ``every``, their product.

    Page sizes differ by a constant alone.
    """
    cases = [case for sm, heads, full in _forms(every) for case in _decodes(sm, heads, full)]
    return [*cases, *_query_and_merge(), *_prefills(every)]


def _forms(every: bool) -> list[tuple[int, int, bool]]:
    """Chips, heads, and whether all options are on, of the decode kernels; off, on `FEW_TARGETS` alone."""
    forms = []
    for sm, heads, full in itertools.product(TARGETS, (16, 64), (False, True)):
        if not every and not full and sm not in FEW_TARGETS:
            continue
        chip = (sm // 10, sm % 10)
        same = heads > 16 and sparse_config(heads, chip) == sparse_config(16, chip)
        if not same and (heads == 16 or full or every):
            forms.append((sm, heads, full))
    return forms


def _decodes(sm: int, heads: int, full: bool) -> list[CompileCase]:
    """`dense_kernel` over 16-bit values and e4m3, `sparse_kernel` over V3.2 and V4."""
    numbers = sparse_config(heads, (sm // 10, sm % 10))
    del numbers["PER_SM"]
    warps = numbers.pop("num_warps")
    # addresses of the tensor cores' operands, which the loop over keys has no registers for
    stack = 1100 if heads > 16 else 192
    shared: dict[str, Any] = {"PAGE": 64, "BITS": sm < 89, "MERGE": full, **numbers}
    form = f"{heads} heads, {full}"
    cases = []
    for e4m3 in (False, True):
        signature = _RESULTS | {"q": "*fp16" if e4m3 else "*bf16", "values": "*i16" if e4m3 else "*bf16"}
        signature |= {"table": "*i32", "lens": "*i32", "sm_scale": "fp32"}
        signature |= dict.fromkeys(("H", "Sq", "max_keys", "pages", "causal", "splits", "q_b", "q_s", "q_h"), "i32")
        signature |= dict.fromkeys(("page_stride", "row_stride", "table_b", "lse_b", "lse_h", "lse_s"), "i32")
        scaled = full and e4m3
        signature |= {"descale_q": "*fp32", "descale_k": "*fp32"} if scaled else {}
        options = {"E4M3": e4m3, "ROPE": True, **shared} | ({} if scaled else {"descale_q": None, "descale_k": None})
        strides = ("q_b", "q_s", "q_h", "page_stride", "row_stride")
        divisible: tuple[str, ...] = ("q", "values", *strides, *_RESULTS_ALIGNED)
        name = f"dense_decode{' e4m3' if e4m3 else ''}, {form}"
        cases.append(CompileCase(name, dense_kernel, signature, options, divisible, warps, targets=(sm,), stack=stack))
    for v4 in (False, True):
        scales = "*i64" if v4 else "*fp32"
        signature = _RESULTS | {"q": "*bf16", "q_f16": "*fp16", "q_scales": "*fp32", "values": "*i16"}
        signature |= {"rope": "*bf16", "scales": scales, "indices": "*i32", "sm_scale": "fp32"}
        signature |= dict.fromkeys(("H", "Sq", "topk", "extra_topk", "slots", "extra_slots", "splits"), "i32")
        signature |= dict.fromkeys(("q_b", "q_s", "q_h", "page_stride", "extra_page_stride"), "i32")
        signature |= dict.fromkeys(("indices_b", "indices_s", "extra_indices_b", "extra_indices_s"), "i32")
        signature |= dict.fromkeys(("lse_b", "lse_h", "lse_s"), "i32")
        given = {"lens": "*i32", "sinks": "*fp32", "extra_values": "*i16", "extra_rope": "*bf16"}
        given |= {"extra_scales": scales, "extra_indices": "*i32", "extra_lens": "*i32"}
        options = {"V4": v4, "EXTRA_PAGE": 2 if full else 0, **shared} | ({} if full else dict.fromkeys(given))
        divisible = ("q", "values", "rope", "scales", "q_f16", "q_scales", "q_b", "q_s", "q_h", "page_stride")
        divisible += (*_RESULTS_ALIGNED, *(("extra_values", "extra_rope", "extra_scales") if full else ()))
        name = f"sparse_decode {'V4' if v4 else 'V3.2'}, {form}"
        signature |= given if full else {}
        cases.append(CompileCase(name, sparse_kernel, signature, options, divisible, warps, targets=(sm,), stack=stack))
    return cases


def _query_and_merge() -> list[CompileCase]:
    query = {"q": "*bf16", "q_f16": "*fp16", "q_scales": "*fp32"}
    query |= dict.fromkeys(("H", "Sq", "q_b", "q_s", "q_h"), "i32")
    query_options = {"NOPE": 448, "BLOCK_H": 4}
    merge = _RESULTS | {"sinks": "*fp32", "descale_k": "*fp32"}
    merge |= dict.fromkeys(("H", "Sq", "splits", "lse_b", "lse_h", "lse_s"), "i32")
    merge_options = {name: value for name, value in MERGE.items() if name != "num_warps"}
    return [
        CompileCase("sparse_decode query", sparse_query_kernel, query, query_options, ("q_f16", "q_scales", "q_h")),
        CompileCase("sparse_decode merge", sparse_merge_kernel, merge, merge_options, _RESULTS_ALIGNED),
    ]


def _prefills(every: bool) -> list[CompileCase]:
    """Both widths and tiles of heads, with sink and lengths both absent and both given; every: float16, too."""
    cases = []
    kinds = ("bf16", "fp16") if every else ("bf16",)
    for sm, heads, rope, full, kind in itertools.product(TARGETS, (16, 64), (False, True), (False, True), kinds):
        if not every and not full and sm not in FEW_TARGETS:
            continue
        numbers = sparse_prefill_config(heads, (sm // 10, sm % 10))
        if heads > 16 and numbers == sparse_prefill_config(16, (sm // 10, sm % 10)):
            continue
        warps = numbers.pop("num_warps")
        signature = {"q": f"*{kind}", "kv": f"*{kind}", "out": f"*{kind}", "indices": "*i32"}
        signature |= {"max_logits": "*fp32", "lse": "*fp32", "sm_scale": "fp32", "log_unit": "fp32"}
        signature |= dict.fromkeys(("H", "topk", "rows", "q_s", "q_h", "kv_s", "indices_s", "out_s", "out_h"), "i32")
        options: dict[str, Any] = {"ROPE": rope, **numbers}
        if full:
            signature |= {"lens": "*i32", "sinks": "*fp32"}
        else:
            options |= {"lens": None, "sinks": None}
        divisible = ("q", "kv", "out", "q_s", "q_h", "kv_s", "out_s", "out_h")
        name = f"sparse_prefill {WIDTH if rope else LATENT} {kind}, {heads} heads, {full}"
        # addresses of 64 gathered rows beside an accumulator of 64 x 512, in 8 warps
        stack = {90: 400, 100: 100}.get(sm, 0) if heads > 16 else 0
        cases.append(
            CompileCase(name, sparse_prefill_kernel, signature, options, divisible, warps, targets=(sm,), stack=stack)
        )
    return cases
