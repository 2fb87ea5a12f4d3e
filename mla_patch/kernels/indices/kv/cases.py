"""What Triton may be asked to compile for the KV-index builders: for the compile tier, and for a warm-up."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from mla_patch.compat.triton import FEW_TARGETS, TARGETS, CompileCase
from mla_patch.kernels.common.checks import INDEX_TYPES
from mla_patch.kernels.common.launch import can_launch, warming_up
from mla_patch.kernels.indices.kv.config import page_table_config, token_indices_config
from mla_patch.kernels.indices.kv.launch import build_page_table, build_token_indices
from mla_patch.kernels.indices.kv.triton import _kv_indices_kernel


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
                    targets=TARGETS if every or (pool, lens, indptr, out, start) == on else FEW_TARGETS,
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


def warmup(device: torch.device | str, page_sizes: Iterable[int] = (64,)) -> int:
    """Compile what an engine's backends reach of both builders; how many kernels that took.

    Real launches over two empty requests, so that Triton specialises as it will when serving: index tensors of either
    type, int32 page tables of ``page_sizes`` tokens, int64 token ids. Nothing to do on a CPU.
    """
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    if not can_launch(table):
        return 0
    indptr, ids = (torch.zeros(2, dtype=kind, device=device) for kind in INDEX_TYPES)
    pages = torch.zeros(2, 1, dtype=torch.int32, device=device)
    with warming_up() as compiled:
        for pool, lens in itertools.product(INDEX_TYPES, repeat=2):
            rows, none = (torch.zeros(2, dtype=kind, device=device) for kind in (pool, lens))
            build_token_indices(table, rows, none, indptr, ids)
            for page_size in page_sizes:
                build_page_table(table, rows, none, pages, page_size=page_size)
    return compiled()
