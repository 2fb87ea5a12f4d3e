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
from mla_patch.drive import DTYPES
from mla_patch.kernels import decode
from mla_patch.kernels.indices import kv as kv_indices
from mla_patch.kernels.sparse import decode as sparse_decode
from mla_patch.kernels.sparse import dense as dense_decode
from mla_patch.kernels.sparse import prefill as sparse_prefill

TYPES: dict[str, torch.dtype] = {name: getattr(torch, full) for name, full in DTYPES.items()}
PAGE_SIZES = (32, 64, 128)  # of the hosts' page tables
V4_PAGES, V4_EXTRA = (128,), (64, 2)  # tokens of a page: of the window's cache, of the two that are compressed


def run(
    device: Gpu | None, heads: Iterable[int], dtype: str, caches: Iterable[str], max_batch: int,
    backends: Iterable[str] = ("triton",),
) -> dict[str, Any]:  # fmt: skip
    """Compile for the current device; what was compiled, how long it took, or a note why there is nothing to do."""
    if device is None or interpreted():
        why = "TRITON_INTERPRET is set" if device is not None else "no GPU"
        return {"device": None, "kernels": [], "compiled": 0, "notes": [f"{why}: there is nothing to compile"]}
    rows = [_timed({"kernel": "kv_indices"}, partial(kv_indices.warmup, "cuda", PAGE_SIZES))]
    for backend, count in itertools.product(backends, heads):
        for kernel, cache, warm in _kernels(backend, count, dtype, caches, max_batch):
            rows.append(_timed({"kernel": kernel, "heads": count, "cache": cache}, warm))
    told = f"{device.name} ({device.sm})"
    return {"device": told, "kernels": rows, "compiled": sum(row["compiled"] for row in rows), "notes": []}


def _kernels(
    backend: str, heads: int, dtype: str, caches: Iterable[str], max_batch: int
) -> Iterable[tuple[str, str, Callable[[], int]]]:
    """What one of a host's backends reaches: kernel, cache, and what compiles it."""
    own = TYPES[dtype]
    if backend == "triton":
        return [
            ("decode", cache, partial(decode.warmup, "cuda", heads, own, TYPES[cache], max_batch)) for cache in caches
        ]
    if backend == "flashmla":
        return [
            ("dense_decode", cache, partial(dense_decode.warmup, "cuda", heads, TYPES[cache]))
            for cache in caches
            if cache != "e5m2"  # which it does not take
        ]
    if backend == "dsa":
        sparse = partial(sparse_prefill.warmup, "cuda", heads, 576, own)
        return [
            ("sparse_decode", "V3.2", partial(sparse_decode.warmup, "cuda", heads)),
            ("sparse_prefill", dtype, lambda: sparse(False, False) + sparse(False, True)),
        ]
    return [
        ("sparse_decode", "V4", partial(sparse_decode.warmup, "cuda", heads, V4_PAGES, V4_EXTRA)),
        ("sparse_prefill", dtype, partial(sparse_prefill.warmup, "cuda", heads, 512, own, True)),
    ]


def _timed(row: dict[str, Any], warm: Callable[[], int]) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = warm()
    torch.cuda.synchronize()
    return row | {"compiled": compiled, "seconds": round(time.perf_counter() - start, 2)}
