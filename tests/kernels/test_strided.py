"""Every tensor of every launcher, as a view with gaps: it is read and written right, or refused by its name.

What lies in the gaps is NaN or a number that names nothing, so that a kernel that took the view for packed would show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_far_apart import same

from mla_patch.compat.triton import interpreted
from mla_patch.flash_mla import FlashMLASchedMeta, flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata
from mla_patch.kernels.cache.dequantize import dequantize, dequantize_k_cache_paged
from mla_patch.kernels.cache.kv_cast import cast_pages
from mla_patch.kernels.cache.layouts import V4, V32, Layout, new_pages
from mla_patch.kernels.cache.quantize import quantize
from mla_patch.kernels.decode import mla_decode, mla_decode_paged
from mla_patch.kernels.decode.splits import mla_decode_splits
from mla_patch.kernels.indices.kv import build_page_table, build_token_indices
from mla_patch.kernels.indices.prefill import build_swa_token_ids, combine_topk_swa_indices
from mla_patch.kernels.sparse import dense_decode, mla_sparse_prefill, sparse_decode

CPU_SECONDS = 60  # see budget.py

DEVICE = "cpu" if interpreted() else "cuda"
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn

Args = dict[str, torch.Tensor]
Case = tuple[Callable[..., Any], Args]


def with_gaps(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The same values, two steps apart in ``dim``."""
    shape = list(tensor.shape)
    shape[dim] *= 2
    if tensor.dtype in (torch.int32, torch.int64):
        wide = torch.full(shape, 2**30 + 1, dtype=tensor.dtype, device=DEVICE)
    elif tensor.dtype is torch.float32 or tensor.dtype is BF16:
        wide = torch.full(shape, torch.nan, dtype=tensor.dtype, device=DEVICE)
    else:
        wide = torch.full(shape, 0x7F, dtype=torch.uint8, device=DEVICE).view(tensor.dtype)
    view = wide[(slice(None),) * dim + (slice(None, None, 2),)]
    return view.copy_(tensor)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def floats(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def cache(layout: Layout) -> torch.Tensor:
    stored = new_pages(layout, 3, 2, DEVICE)
    return quantize(floats(6, layout.width), stored, torch.arange(6, device=DEVICE))


def decoding() -> Case:
    args = {"q": floats(2, 3, 576), "kv": floats(4, 576), "out": floats(2, 3, 512), "sinks": floats(3)}
    args |= {"indptr": ints(0, 2, 5), "token_ids": ints(3, 1, 0, 2, 3)}
    return lambda **a: mla_decode(**a, sm_scale=0.05), args


def paging() -> Case:
    args = {"q": floats(2, 3, 576), "kv": floats(4, 2, 576).to(E4M3), "out": floats(2, 3, 512)}
    args |= {"sinks": floats(3), "block_table": ints(3, 1, 0, 2).view(2, 2), "lens": ints(3, 4)}
    return lambda **a: mla_decode_paged(**a, sm_scale=0.05), args


def splitting() -> Case:
    _, args = decoding()
    args |= {"attn_logits": floats(2, 3, 2, 512, dtype=torch.float32), "num_kv_splits": ints(1, 2)}
    args |= {"attn_lse": floats(2, 3, 2, dtype=torch.float32)}

    def run(**a: Any) -> Any:
        return mla_decode_splits(**a, sm_scale=0.05), a["attn_logits"], a["attn_lse"]

    return run, args


def dense(e4m3: bool) -> Case:
    args = {"q": floats(2, 3, 3, 576), "k_cache": floats(4, 2, 1, 576), "block_table": ints(3, 1, 0, 2).view(2, 2)}
    args |= {"cache_seqlens": ints(3, 4)}
    if e4m3:
        args |= {name: args[name].to(E4M3) for name in ("q", "k_cache")}
        args |= {name: torch.full((1,), 0.5, device=DEVICE) for name in ("descale_q", "descale_k")}
    return lambda **a: dense_decode(**a, sm_scale=0.05), args


def sparse(layout: Layout) -> Case:
    args = {"q": floats(2, 2, 3, layout.width), "k_cache": cache(layout), "indices": ints(*[5, 0, 3] * 4).view(2, 2, 3)}
    args |= {"attn_sink": floats(3), "topk_length": ints(2, 3), "extra_k_cache": cache(layout)}
    args |= {"extra_indices": ints(*[1, 4] * 4).view(2, 2, 2), "extra_topk_length": ints(1, 2)}
    return lambda **a: sparse_decode(**a, sm_scale=0.05), args


def prefilling() -> Case:
    args = {"q": floats(2, 3, 576), "kv": floats(6, 1, 576), "indices": ints(5, 0, 3, 1, 2, 4).view(2, 1, 3)}
    args |= {"attn_sink": floats(3), "topk_length": ints(2, 3), "out": floats(2, 3, 512)}
    return lambda **a: mla_sparse_prefill(sm_scale=0.05, **a), args


def building(token_ids: bool) -> Case:
    args = {"req_to_token": torch.arange(36, device=DEVICE).int().view(3, 12), "req_pool": ints(2, 0)}
    args |= {"lens": ints(3, 5), "kv_start": ints(1, 2)}
    if token_ids:
        return build_token_indices, args | {"indptr": ints(0, 3), "out": ints(*range(8)).long()}
    return lambda **a: build_page_table(**a, page_size=2), args | {"out": ints(*range(8)).view(2, 4)}


def windows() -> Case:
    args = {"seq_lens": ints(8, 5), "extend_lens": ints(4, 5), "req_pool": ints(2, 0)}
    args |= {"req_to_token": torch.arange(24, device=DEVICE).int().view(3, 8)}
    args |= {"full_to_swa": torch.arange(24, device=DEVICE).flip(0).contiguous()}
    return lambda **a: build_swa_token_ids(**a, swa_window=3), args


def combining() -> Case:
    args = {"topk_indices": ints(0, 2, 1, 3, 4, 0, 2, 1).view(2, 4), "query_start_loc": ints(0, 1, 2)}
    args |= {"seq_lens": ints(20, 30), "gather_lens": ints(4, 4), "compressed_base": ints(0, 5)}
    args |= {"swa_base": ints(10, 14), "query_pos": ints(19, 29), "out_lens": ints(0, 0)}
    args |= {"out_indices": torch.zeros(2, 128, dtype=torch.int32, device=DEVICE)}
    return lambda **a: combine_topk_swa_indices(**a, window_size=4, compress_ratio=4, topk=4), args


def reading(layout: Layout) -> Case:
    args = {"cache": cache(layout), "slots": ints(5, 0, 3), "out": floats(3, layout.width)}
    return dequantize, args


def reading_a_pool() -> Case:
    args = {"cache": cache(V32).view(3, 2, 656), "slots": ints(5, 0, 3), "out": floats(3, 1, 576)}
    return dequantize_k_cache_paged, args


def storing(layout: Layout) -> Case:
    args = {"x": floats(3, layout.width), "cache": cache(layout), "slots": ints(5, 0, 3)}
    return lambda **a: dequantize(quantize(**a), ints(*range(6))), args


def casting() -> Case:
    args = {"cache": floats(6, 576).to(torch.float8_e4m3fn), "table": ints(2, 0, 1, 1).view(2, 2), "lens": ints(4, 1)}
    args |= {"out": floats(8, 576), "places": ints(0, 0, 0, 0).view(2, 2)}

    def run(**a: Any) -> Any:
        cast_pages(**a, page_size=2)
        return a["out"], a["places"]

    return run, args


def flash_mla_sparse() -> Case:
    _, args = sparse(V4)
    args["extra_indices_in_kvcache"] = args.pop("extra_indices")

    def run(q: torch.Tensor, k_cache: torch.Tensor, **a: Any) -> Any:
        meta = FlashMLASchedMeta()
        return flash_mla_with_kvcache(q, k_cache, None, None, 512, meta, is_fp8_kvcache=True, **a)

    return run, args


def flash_mla_dense() -> Case:
    _, args = dense(True)
    lens = ints(3, 4)
    args |= dict(zip(("tile_scheduler_metadata", "num_splits"), get_mla_metadata(lens, 9, 1), strict=True))
    return lambda **a: flash_mla_with_kvcache(head_dim_v=512, **a), args


def flash_mla_prefill() -> Case:
    _, args = prefilling()
    return lambda **a: flash_mla_sparse_fwd(sm_scale=0.05, **a), args


CASES: dict[str, Callable[[], Case]] = {
    "mla_decode": decoding,
    "mla_decode_paged": paging,
    "mla_decode_splits": splitting,
    "dense_decode": lambda: dense(False),
    "dense_decode e4m3": lambda: dense(True),
    "sparse_decode V3.2": lambda: sparse(V32),
    "sparse_decode V4": lambda: sparse(V4),
    "mla_sparse_prefill": prefilling,
    "build_page_table": lambda: building(False),
    "build_token_indices": lambda: building(True),
    "build_swa_token_ids": windows,
    "combine_topk_swa_indices": combining,
    "dequantize V3.2": lambda: reading(V32),
    "dequantize V4": lambda: reading(V4),
    "dequantize_k_cache_paged": reading_a_pool,
    "quantize V3.2": lambda: storing(V32),
    "quantize V4": lambda: storing(V4),
    "cast_pages": casting,
    "flash_mla_with_kvcache sparse": flash_mla_sparse,
    "flash_mla_with_kvcache dense": flash_mla_dense,
    "flash_mla_sparse_fwd": flash_mla_prefill,
}


def copied(result: Any) -> list[torch.Tensor]:
    return [one.clone() for one in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("name", CASES)
def test_views_with_gaps(name: str) -> None:
    torch.manual_seed(0)
    call, args = CASES[name]()

    def fresh() -> Args:
        return {key: tensor.clone() for key, tensor in args.items()}

    want = copied(call(**fresh()))
    refused = set()
    for key, tensor in args.items():
        for dim in range(tensor.dim()):
            if tensor.shape[dim] == 1 and tensor.dim() > 1:
                continue  # its step means nothing
            try:
                got = copied(call(**fresh() | {key: with_gaps(tensor, dim)}))
            except ValueError as refusal:
                assert str(refusal).startswith(f"{key}: "), (key, dim, refusal)
                refused.add((key, dim))
                continue
            for one, other in zip(got, want, strict=True):
                assert same(one, other) and not one.isnan().any(), (key, dim)
    assert refused  # something has to be packed for every launcher
