"""What Triton may be asked to compile for sparse prefill's indices: for the compile tier, and for a warm-up."""

from __future__ import annotations

import itertools

import torch

from mla_patch.compat.triton import CompileCase
from mla_patch.kernels.common.launch import can_launch, warming_up
from mla_patch.kernels.indices.prefill.config import combine_config, swa_config
from mla_patch.kernels.indices.prefill.launch import build_swa_token_ids, combine_topk_swa_indices
from mla_patch.kernels.indices.prefill.triton import _COMBINE_ARGS, _SWA_ARGS, _combine_kernel, _swa_kernel


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


def warmup(device: torch.device | str) -> int:
    """Compile what a prefill reaches of both kernels, by real launches over nothing; how many kernels that took."""
    none = torch.zeros(2, dtype=torch.int32, device=device)
    if not can_launch(none):
        return 0
    table, one = none[:, None], none[:1]
    fours = torch.zeros(2, 4, dtype=torch.int32, device=device)
    with warming_up() as compiled:
        build_swa_token_ids(one, one, one, table, none.long(), 1, 0)
        for ids, positions in itertools.product((table, fours), (None, none)):
            combine_topk_swa_indices(ids, none, one, one, one, one, 1, 1, 0, query_pos=positions)
    return compiled()
