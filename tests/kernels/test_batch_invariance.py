"""Is a query's result the same, bit for bit, whatever other queries there are?

In Triton's interpreter, or on a GPU with TRITON_INTERPRET=0. Where that takes an option, the kernel is asked without
it, too: a case that cannot show a difference fails.
"""

from __future__ import annotations

import pytest
import torch
from test_dense_decode import E4M3, HALF
from test_dense_decode import Case as Dense
from test_sparse_decode import Case as Sparse
from test_sparse_prefill import Case as Prefill

from mla_patch.compat.triton import interpreted
from mla_patch.flash_mla import flash_mla_with_kvcache, get_mla_metadata
from mla_patch.kernels.cache.dequantize import dequantize
from mla_patch.kernels.cache.layouts import V4, V32

DEVICE = "cpu" if interpreted() else "cuda"
# on sm_90 more than 16 heads are another kernel's; more keys and queries than a GPU takes at once
HEADS, KEYS, OTHERS = ([16], 130, 3) if interpreted() else ([16, 64, 128], 4096, 300)
heads_ = pytest.mark.parametrize("heads", HEADS)


def equal(alone, beside) -> bool:
    """All bits of the first query's results; NaN is what the interpreter's bfloat16 may give."""
    return all(torch.equal(a[:1].nan_to_num(7.0), b[:1].nan_to_num(7.0)) for a, b in zip(alone, beside, strict=True))


@heads_
@pytest.mark.parametrize("layout", [V32, V4], ids=lambda layout: layout.name)
def test_sparse_decode(layout, heads):
    """With two caches, lengths and sinks."""
    case = Sparse(layout, OTHERS, 1, heads, KEYS, extra=(8, 64))
    options = {"softmax_scale": case.options["sm_scale"], "extra_k_cache": case.options["extra_k_cache"]}
    options |= {"attn_sink": torch.randn(heads, device=DEVICE), "head_dim_v": 512, "is_fp8_kvcache": True}

    def run(count, invariant):
        return flash_mla_with_kvcache(
            case.q[:count], case.cache, None, None, tile_scheduler_metadata=get_mla_metadata()[0],
            indices=case.indices[:count], extra_indices_in_kvcache=case.options["extra_indices"][:count],
            topk_length=torch.full((count,), KEYS - 3, dtype=torch.int32, device=DEVICE),
            enable_batch_invariant=invariant, **options,
        )  # fmt: skip

    assert equal(run(1, True), run(OTHERS, True))
    assert not equal(run(1, False), run(OTHERS, False))


@heads_
@pytest.mark.parametrize("dtype", [HALF, E4M3], ids=["16 bits", "e4m3"])
def test_dense_decode(dtype, heads):
    """The others are longer, too, so that the engine's table is wider."""
    case = Dense([KEYS, *[2 * KEYS] * (2 if interpreted() else 16)], heads, dtype=dtype)
    scales = {}
    if dtype is E4M3:
        scales = {"descale_q": torch.ones(1, device=DEVICE), "descale_k": torch.ones(1, device=DEVICE)}

    def run(count, invariant):
        table = case.table[:count, : -(-KEYS // 16) if count == 1 else None].contiguous()
        return flash_mla_with_kvcache(
            case.q[:count], case.kv, table, case.lens[:count], 512, get_mla_metadata()[0], causal=True,
            softmax_scale=case.options["sm_scale"], enable_batch_invariant=invariant, **scales,
        )  # fmt: skip

    count = len(case.lens)
    assert equal(run(1, True), run(count, True))
    assert not equal(run(1, False), run(count, False))


@heads_
@pytest.mark.parametrize("width", [576, 512])
def test_sparse_prefill(width, heads):
    """Of a workspace; how it has been divided among requests is in the indices."""
    dtype = torch.float16 if interpreted() else torch.bfloat16
    case = Prefill(width, OTHERS, heads, KEYS, dtype=dtype)
    beside = case.run()
    case.q, case.indices = case.q[:1], case.indices[:1]
    assert equal(case.run(), beside)


def test_keys_that_are_read_back():
    case = Sparse(V32, OTHERS, topk=5)
    alone, beside = (dequantize(case.cache, case.indices[:n].flatten().contiguous()) for n in (1, OTHERS))
    assert torch.equal(alone.view(torch.int16), beside[: len(alone)].view(torch.int16))
