"""Compiles ahead, into Triton's cache on disk, what an engine on this machine can reach: ``mla-patch warmup``."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from mla_patch.compat.triton import interpreted
from mla_patch.compat.types import Gpu
from mla_patch.kernels import decode, kv_indices

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
PAGE_SIZES = (32, 64, 128)  # of the hosts' page tables


def run(device: Gpu | None, heads: Iterable[int], dtype: str, caches: Iterable[str], max_batch: int) -> dict[str, Any]:
    """Compile for the current device; what was compiled, how long it took, or a note why there is nothing to do."""
    if device is None or interpreted():
        why = "TRITON_INTERPRET is set" if device is not None else "no GPU"
        return {"device": None, "kernels": [], "compiled": 0, "notes": [f"{why}: there is nothing to compile"]}
    rows = [_timed({"kernel": "kv_indices"}, partial(kv_indices.warmup, "cuda", PAGE_SIZES))]
    for count, cache in itertools.product(heads, caches):
        warm = partial(decode.warmup, "cuda", count, TYPES[dtype], TYPES[cache], max_batch)
        rows.append(_timed({"kernel": "decode", "heads": count, "cache": cache}, warm))
    told = f"{device.name} ({device.sm})"
    return {"device": told, "kernels": rows, "compiled": sum(row["compiled"] for row in rows), "notes": []}


def _timed(row: dict[str, Any], warm: Callable[[], int]) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = warm()
    torch.cuda.synchronize()
    return row | {"compiled": compiled, "seconds": round(time.perf_counter() - start, 2)}
