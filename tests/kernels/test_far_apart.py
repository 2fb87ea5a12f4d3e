"""Addresses are 64-bit: every tensor that a launcher takes may have its rows so far apart that 32 bits do not reach.

Each case runs with its tensors as torch makes them and with one of them spread out: from the third row on they lie more
than 2**31 elements, as the kernel counts them, behind the first, while one step is less, so that only a 64-bit product
finds them. Nobody touches the memory in between, nor as much before the first row, where an address would land that was
computed in 32 bits; it holds zeros. The results must be equal bit for bit.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from mla_patch.compat.triton import interpreted
from mla_patch.kernels.cache.dequantize import dequantize
from mla_patch.kernels.cache.kv_cast import cast_pages
from mla_patch.kernels.cache.layouts import V4, V32, Layout, new_pages
from mla_patch.kernels.cache.quantize import quantize
from mla_patch.kernels.decode import mla_decode, mla_decode_paged
from mla_patch.kernels.decode.splits import mla_decode_splits
from mla_patch.kernels.indices.kv import build_page_table, build_token_indices
from mla_patch.kernels.indices.prefill import build_swa_token_ids, combine_topk_swa_indices
from mla_patch.kernels.sparse import decode as module
from mla_patch.kernels.sparse import dense_decode, mla_sparse_prefill
from mla_patch.kernels.sparse import sparse_decode as sparse

pytestmark = pytest.mark.xdist_group("much memory")  # one worker, since a GPU holds few of these tensors at once

DEVICE = "cpu" if interpreted() else "cuda"
HALF = torch.bfloat16
E4M3 = torch.float8_e4m3fn
WIDE = 20  # heads that the Gluon kernels take on sm_90

Args = dict[str, torch.Tensor]


def room(size: int, dtype: torch.dtype) -> torch.Tensor:
    """``size`` zeros; on the CPU only the pages that somebody writes are ever there."""
    if DEVICE == "cuda":
        return torch.zeros(size, dtype=dtype, device=DEVICE)
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags=kind), dtype=torch.uint8).view(dtype)


def far(tensor: torch.Tensor, dim: int, unit: int) -> torch.Tensor:
    """The same values in rows of ``dim`` that are far apart; the kernel counts in ``unit`` elements of the tensor."""
    last = tensor.shape[dim] - 1
    assert last >= 2, "with two rows the step itself would need 64 bits"
    inner = tensor.untyped_storage().nbytes() // tensor.element_size()
    step = 2**30 * unit + -(-inner // 576) * 576
    before = 2**31 * unit
    stride = list(tensor.stride())
    stride[dim] = step
    spread = room(before + last * step + 2 * inner, tensor.dtype).as_strided(tensor.shape, stride, before)
    return spread.copy_(tensor)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def some(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def decoding(cache: torch.dtype, heads: int) -> tuple[Args, Callable[[Args], Any]]:
    """Of the requests that lie far, one program has the first, several share the next, which the merge writes, and the
    last is without a key: three branches of their own."""
    args = {"q": some(5, heads, 576), "kv": some(3, 576, dtype=torch.float32).to(cache)}
    args |= {"out": some(5, heads, 512)}
    shared = 72 if interpreted() else 12000
    ids = ints(*[2, 0, 1] * (shared // 3 + 2))

    def call(a: Args) -> Any:
        indptr = ints(0, 3, 3, 6, 6 + shared, 6 + shared)
        return mla_decode(a["q"], a["kv"], a["out"], indptr, ids, sm_scale=0.04)

    return args, call


def splitting(cache: torch.dtype, heads: int) -> tuple[Args, Callable[[Args], Any]]:
    args = {"q": some(3, heads, 576), "kv": some(3, 576, dtype=torch.float32).to(cache)}
    args |= {"out": some(3, heads, 512)}

    def call(a: Args) -> Any:
        logits = torch.zeros(3, heads, 2, 512, device=DEVICE)
        lse = torch.zeros(3, heads, 2, device=DEVICE)
        counts = ints(2, 1, 2)
        mla_decode_splits(
            a["q"], a["kv"], a["out"], ints(0, 3, 3, 43), ints(*[2, 0, 1] * 15), logits, lse, counts, sm_scale=0.04
        )
        return a["out"], logits, lse

    return args, call


def paging(cache: torch.dtype, heads: int) -> tuple[Args, Callable[[Args], Any]]:
    args = {"q": some(3, heads, 576), "kv": some(3, 3, 576, dtype=torch.float32).to(cache)}
    args |= {"out": some(3, heads, 512), "block_table": ints(2, 0, 1, 1, 2, 0).view(3, 2)}

    def call(a: Args) -> Any:
        return mla_decode_paged(a["q"], a["kv"], a["out"], a["block_table"], ints(6, 0, 3), sm_scale=0.04)

    return args, call


def dense(cache: torch.dtype, heads: int) -> tuple[Args, Callable[[Args], Any]]:
    args = {"q": some(3, 3, heads, 576).to(cache), "k_cache": some(3, 3, 1, 576).to(cache)}
    args |= {"block_table": ints(2, 0, 1, 1, 2, 0).view(3, 2)}
    scale = torch.ones(1, device=DEVICE) if cache is E4M3 else None

    def call(a: Args) -> Any:
        lens = ints(6, 3, 6)
        return dense_decode(
            a["q"], a["k_cache"], a["block_table"], lens, sm_scale=0.04, causal=True, descale_q=scale, descale_k=scale
        )

    return args, call


def pages(layout: Layout, count: int, size: int) -> torch.Tensor:
    """A cache of random tokens that every slot names."""
    cache = new_pages(layout, count, size, DEVICE)
    return quantize(some(count * size, layout.width), cache, torch.arange(count * size, device=DEVICE))


def slots(*shape: int, end: int) -> torch.Tensor:
    """Slots that all of a cache's ``end`` are among."""
    count = torch.Size(shape).numel()
    return torch.arange(count, device=DEVICE).mul_(7).remainder_(end).int().view(shape)


def attending(layout: Layout, heads: int, batch: int, queries: int) -> tuple[Args, Callable[[Args], Any]]:
    """Sparse decode over two caches."""
    args = {"q": some(batch, queries, heads, layout.width, dtype=torch.bfloat16), "k_cache": pages(layout, 3, 2)}
    args |= {"indices": slots(batch, queries, 9, end=6), "extra_k_cache": pages(layout, 3, 4)}
    args |= {"extra_indices": slots(batch, queries, 9, end=12)}

    def call(a: Args) -> Any:
        extra = {name: a[name] for name in ("extra_k_cache", "extra_indices")}
        return sparse(a["q"], a["k_cache"], a["indices"], sm_scale=0.04, **extra)

    return args, call


def prefilling(heads: int) -> tuple[Args, Callable[[Args], Any]]:
    args = {"q": some(3, heads, 576), "kv": some(3, 1, 576), "indices": slots(3, 1, 9, end=3)}
    args |= {"out": some(3, heads, 512)}

    def call(a: Args) -> Any:
        return mla_sparse_prefill(a["q"], a["kv"], a["indices"], 0.04, out=a["out"])

    return args, call


def reading(layout: Layout) -> tuple[Args, Callable[[Args], Any]]:
    args = {"cache": pages(layout, 3, 2), "out": some(6, layout.width, dtype=torch.bfloat16)}
    return args, lambda a: dequantize(a["cache"], ints(5, 0, 3, 2, 4, 1), a["out"])


def storing(layout: Layout) -> tuple[Args, Callable[[Args], Any]]:
    args = {"x": some(6, layout.width), "cache": pages(layout, 3, 2)}

    def call(a: Args) -> Any:
        return dequantize(quantize(a["x"], a["cache"], ints(5, 0, 3, 2, 4, 1)), ints(0, 1, 2, 3, 4, 5))

    return args, call


def page_table(size: int) -> tuple[Args, Callable[[Args], Any]]:
    args = {"req_to_token": torch.arange(3 * 8, device=DEVICE).int().view(3, 8), "out": ints(*range(12)).view(3, 4)}

    def call(a: Args) -> Any:
        return build_page_table(a["req_to_token"], ints(2, 0, 1), ints(3, 0, 4), a["out"], page_size=size)

    return args, call


def token_ids() -> tuple[Args, Callable[[Args], Any]]:
    args = {"req_to_token": torch.arange(3 * 2100, device=DEVICE).int().view(3, 2100)}

    def call(a: Args) -> Any:
        # the second request goes past the first block, whose rest other programs share out
        out = torch.zeros(2106, dtype=torch.int64, device=DEVICE)
        config = {"ctas": 1, "BLOCK": 1024, "WIDE": 1, "ROWS": 256, "num_warps": 4}
        return build_token_indices(
            a["req_to_token"], ints(2, 1, 0), ints(2, 2100, 3), ints(0, 2, 2102), out, config=config
        )

    return args, call


def windows() -> tuple[Args, Callable[[Args], Any]]:
    args = {"req_to_token": torch.arange(3 * 8, device=DEVICE).int().view(3, 8)}
    to_swa = torch.arange(24, device=DEVICE).flip(0)

    def call(a: Args) -> Any:
        return build_swa_token_ids(ints(8, 3, 5), ints(4, 1, 5), ints(2, 0, 1), a["req_to_token"], to_swa, 3)

    return args, call


def combining() -> tuple[Args, Callable[[Args], Any]]:
    args = {"topk_indices": slots(3, 4, end=4), "out_indices": torch.zeros(3, 128, dtype=torch.int32, device=DEVICE)}

    def call(a: Args) -> Any:
        numbers = [ints(0, 3), ints(40), ints(6), ints(0), ints(10)]
        return combine_topk_swa_indices(a["topk_indices"], *numbers, 4, 4, 4, out_indices=a["out_indices"])

    return args, call


def casting(compact: bool) -> tuple[Args, Callable[[Args], Any]]:
    args = {"cache": some(3, 576, dtype=torch.float32).to(E4M3), "out": some(3, 576), "table": ints(2, 0, 1).view(3, 1)}

    def call(a: Args) -> Any:
        places = ints(0, 0, 0).view(3, 1) if compact else None
        cast_pages(a["cache"], a["table"], ints(1, 1, 1), a["out"], page_size=1, places=places)
        return a["out"]

    return args, call


HEADS = (3,) if interpreted() else (3, WIDE)
WIDTHS = {layout.name: layout for layout in (V32, V4)}

# what builds a case, and the dimensions of its tensors that may be spread out
CASES: dict[str, tuple[Callable[[], tuple[Args, Callable[[Args], Any]]], dict[str, tuple[int, ...]]]] = {
    "token ids": (token_ids, {"req_to_token": (0,)}),
    "windows": (windows, {"req_to_token": (0,)}),
    "combined": (combining, {"topk_indices": (0,), "out_indices": (0,)}),
}
CASES |= {
    f"cast pages{name}": (lambda compact=compact: casting(compact), {"cache": (0,), "out": (0,), "table": (0,)})
    for name, compact in (("", False), (" to places", True))
}
CASES |= {
    f"page table {size}": (lambda size=size: page_table(size), {"req_to_token": (0,), "out": (0,)}) for size in (1, 2)
}
for _heads in HEADS:
    for _cache, _name in ((HALF, "16 bits"), (E4M3, "8 bits")):
        rows = {"q": (0, 1), "kv": (0,), "out": (0, 1)}
        by_page = rows | {"kv": (0, 1), "block_table": (0,)}
        by_query = {"q": (0, 1, 2), "k_cache": (0, 1), "block_table": (0,)}
        if _cache is E4M3:
            del by_query["q"]  # which is copied as float16 first
        CASES |= {
            f"decode {_name}, {_heads} heads": (lambda c=_cache, h=_heads: decoding(c, h), rows),
            f"decode by pages {_name}, {_heads} heads": (lambda c=_cache, h=_heads: paging(c, h), by_page),
            f"splits {_name}, {_heads} heads": (lambda c=_cache, h=_heads: splitting(c, h), rows),
            f"dense {_name}, {_heads} heads": (lambda c=_cache, h=_heads: dense(c, h), by_query),
        }
    by_row = {"q": (0, 1), "kv": (0,), "indices": (0,), "out": (0, 1)}
    CASES[f"sparse prefill, {_heads} heads"] = (lambda h=_heads: prefilling(h), by_row)
    for _name, _layout in WIDTHS.items():
        lists = {"q": (0, 2), "k_cache": (0,), "indices": (0,), "extra_k_cache": (0,), "extra_indices": (0,)}
        CASES |= {
            f"sparse decode {_name}, {_heads} heads": (lambda n=_layout, h=_heads: attending(n, h, 3, 1), lists),
            f"sparse decode {_name}, {_heads} heads, three queries": (
                lambda n=_layout, h=_heads: attending(n, h, 1, 3),
                {"q": (1,), "indices": (1,), "extra_indices": (1,)},
            ),
        }
for _name, _layout in WIDTHS.items():
    CASES |= {
        f"dequantize {_name}": (lambda n=_layout: reading(n), {"cache": (0,), "out": (0,)}),
        f"quantize {_name}": (lambda n=_layout: storing(n), {"x": (0,), "cache": (0,)}),
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit; on a GPU other strides are other machine code, which may round otherwise."""
    return torch.equal(one, other) if DEVICE == "cpu" else torch.allclose(one, other, rtol=1e-2, atol=1e-2)


def flat(result: Any) -> list[torch.Tensor]:
    return [one.clone() for one in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_may_reach_past_31_bits(name):
    build, dims = CASES[name]
    torch.manual_seed(0)
    args, call = build()

    def fresh() -> Args:
        return {key: tensor.clone() for key, tensor in args.items()}  # outputs hold noise, not an earlier result

    want = flat(call(fresh()))
    for key, spread in dims.items():
        for dim in spread:
            # 8-bit values are read two at a time, on sm_90 four at a time; where they are addressed by bytes, a step
            # of two is as good
            unit = 1 if args[key].element_size() > 1 else 4 if f"{WIDE} heads" in name else 2
            try:
                got = flat(call(fresh() | {key: far(args[key], dim, unit)}))
            except Exception as problem:
                raise AssertionError(f"{name}, {key} spread in dimension {dim}") from problem
            for one, other in zip(got, want, strict=True):
                assert same(one, other), f"{key} spread in dimension {dim}"


class LastPrograms:
    """A kernel of whose grid only the last ``count`` programs run."""

    def __init__(self, kernel: Any, count: int) -> None:
        self.kernel, self.count = kernel, count

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        from triton.runtime.interpreter import interpreter_builder

        (programs,) = grid

        def launch(*args: Any, **numbers: Any) -> None:
            dims, place = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx
            shifts = {
                "set_grid_dim": lambda x, y, z: dims(programs, y, z),
                "set_grid_idx": lambda x, y, z: place(x + programs - self.count, y, z),
            }
            with mock.patch.multiple(interpreter_builder, **shifts):
                self.kernel[(self.count,)](*args, **numbers)

        return launch


@pytest.mark.skipif(not interpreted(), reason="on a GPU, test_sparse_prefill runs all programs")
def test_so_many_queries_that_their_results_reach_past_31_bits(monkeypatch):
    """Results are contiguous, so that only their number takes the last one there."""
    heads, queries = 128, 2**31 // (128 * 512) + 2
    for name, each in (("sparse_kernel", heads // 16), ("sparse_query_kernel", heads // 4)):
        monkeypatch.setattr(module, name, LastPrograms(getattr(module, name), each))
    cache, ids = pages(V4, 3, 2), slots(1, 1, 9, end=6)
    q = some(1, 1, heads, 512, dtype=torch.bfloat16)

    def call(count: int) -> list[torch.Tensor]:
        out, lse = sparse(q.expand(1, count, -1, -1), cache, ids.expand(1, count, 9), sm_scale=0.04)
        return [out[0, -1], lse[0, :, -1]]

    assert queries * heads * 512 > 2**31
    for one, other in zip(call(queries), call(1), strict=True):
        assert torch.equal(one, other) and one.any()
