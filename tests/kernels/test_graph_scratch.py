"""Scratch belongs to one call: nothing is kept for another, so captured graphs share none but through their pool."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import test_dense_decode
import test_gpu
import test_sparse_decode
import torch

from mla_patch import chunk_cache as sparse_prefill
from mla_patch.compat import gpu
from mla_patch.compat.triton import interpreted
from mla_patch.kernels.cache.layouts import V4, V32, new_pages
from mla_patch.kernels.cache.quantize import quantize
from mla_patch.kernels.decode import mla_decode
from mla_patch.kernels.decode.splits import mla_decode_splits
from mla_patch.kernels.sparse import dense_decode, mla_sparse_prefill, sparse_decode

CALLS: dict[str, Callable[[], Any]] = {
    **{name: call for name, (_, _, call) in test_gpu.CALLS.items()},
    "dense decode": lambda: test_dense_decode.Case([40, 3]).run(),
    "sparse decode": lambda: test_sparse_decode.Case(V4, batch=1).run(),
}
SCRATCH = {"decode", "pages", "dense decode", "sparse decode"}


@pytest.mark.skipif(not interpreted(), reason="on a GPU, the tests below show it")
@pytest.mark.parametrize("name", CALLS)
def test_nothing_that_a_call_allocates_outlives_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an eager nor a captured one; and each allocates its own, so that none was given what was kept."""
    made: list[weakref.ref[torch.Tensor]] = []

    def watched(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = function(*args, **kwargs)
            made.append(weakref.ref(tensor))
            return tensor

        return allocate

    for allocator in ("empty", "empty_like"):
        monkeypatch.setattr(torch, allocator, watched(getattr(torch, allocator)))
    for captured in (False, True):
        monkeypatch.setattr(gpu, "capturing", lambda captured=captured: captured)
        del made[:]
        CALLS[name]()
        gc.collect()
        assert made or name not in SCRATCH
        assert not [one for one in made if one() is not None]


class Chunk:
    """What the chunk cache keeps for a generation."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs

    def memory(self) -> int:
        return 0


def test_a_chunks_memory_is_one_streams_and_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_prefill, "Chunk", Chunk)
    stream, captured = [7], [False]
    monkeypatch.setattr(gpu, "current_stream", lambda: stream[0])
    monkeypatch.setattr(gpu, "capturing", lambda: captured[0])
    cache, cpu = sparse_prefill.SparsePrefillChunkCache(), torch.device("cpu")
    chunk, workspace = cache.chunk(1, lambda: "inputs"), cache.workspace(5, cpu)
    assert cache.chunk(1, lambda: "others") is chunk
    assert cache.workspace(3, cpu).data_ptr() == workspace.data_ptr()
    held = cache.memory()["workspace"]
    captured[0] = True
    for ask in (lambda: cache.chunk(1, lambda: "inputs"), lambda: cache.workspace(3, cpu)):
        with pytest.raises(ValueError, match="a graph is being captured"):
            ask()
    captured[0], stream[0] = False, 8
    other = cache.workspace(3, cpu)
    assert other.data_ptr() != workspace.data_ptr()  # which the first stream may still be reading
    assert cache.chunk(1, lambda: "others") is not chunk and cache.memory()["workspace"] == held


# --- on a GPU

on_a_gpu = pytest.mark.skipif(
    interpreted() or not torch.cuda.is_available(), reason="needs a GPU and TRITON_INTERPRET=0"
)
LENS = (60000, 3, 900, 20000)  # as in a step: one that all share, some that one program has


def _random(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def _decode(seed: int, heads: int, cache: torch.dtype = torch.bfloat16) -> Callable[[], torch.Tensor]:
    q, kv = _random(seed, len(LENS), heads, 576), _random(seed, sum(LENS), 576).to(cache)
    out = torch.empty(len(LENS), heads, 512, dtype=q.dtype, device="cuda")
    starts = torch.tensor([0, *LENS], device="cuda").cumsum(0).int()
    ids = torch.arange(sum(LENS), device="cuda")
    return lambda: mla_decode(q, kv, out, starts, ids, sm_scale=0.04)


def _splits(seed: int) -> Callable[[], torch.Tensor]:
    q, kv = _random(seed, len(LENS), 16, 576), _random(seed, sum(LENS), 576)
    logits, lse = (torch.empty(len(LENS), 16, 8, *more, device="cuda") for more in ((512,), ()))
    starts = torch.tensor([0, *LENS], device="cuda").cumsum(0).int()
    ids, counts = torch.arange(sum(LENS), device="cuda"), torch.full((len(LENS),), 8, device="cuda").int()
    out = torch.empty(len(LENS), 16, 512, dtype=q.dtype, device="cuda")
    return lambda: mla_decode_splits(q, kv, out, starts, ids, logits, lse, counts, sm_scale=0.04)


def _sparse(seed: int, layout: Any, heads: int) -> Callable[[], torch.Tensor]:
    """Few queries of many keys: they are split."""
    generator = torch.Generator("cuda").manual_seed(seed)
    pages, q, slots = new_pages(layout, 512, 64, "cuda"), _random(seed, 2, 1, heads, layout.width), 512 * 64
    quantize(_random(seed, slots, layout.width, dtype=torch.float32), pages, torch.arange(slots, device="cuda"))
    ids = torch.randint(0, slots, (2, 1, 8192), device="cuda", generator=generator).int()
    return lambda: sparse_decode(q, pages, ids, sm_scale=0.04)[0]


def _sparse_prefill(seed: int) -> Callable[[], torch.Tensor]:
    q, kv = _random(seed, 64, 128, 576), _random(seed, 4096, 1, 576)
    ids = torch.randint(
        0, 4096, (64, 1, 2048), device="cuda", generator=torch.Generator("cuda").manual_seed(seed)
    ).int()
    return lambda: mla_sparse_prefill(q, kv, ids, 0.04)[0]


def _dense(seed: int) -> Callable[[], torch.Tensor]:
    q, pages = _random(seed, 2, 1, 16, 576), _random(seed, 512, 64, 1, 576)
    table = torch.randperm(512, device="cuda").view(2, 256).int()
    lens = torch.tensor([16000, 900], device="cuda", dtype=torch.int32)
    return lambda: dense_decode(q, pages, table, lens, sm_scale=0.04)[0]


MAKES: dict[str, Callable[[int], Callable[[], torch.Tensor]]] = {
    "decode, 16 heads": lambda seed: _decode(seed, 16),
    "decode, 16 heads, e4m3": lambda seed: _decode(seed, 16, torch.float8_e4m3fn),
    "decode, 128 heads": lambda seed: _decode(seed, 128),
    "decode, 128 heads, e4m3": lambda seed: _decode(seed, 128, torch.float8_e4m3fn),
    "splits": _splits,
    "sparse decode, V3.2": lambda seed: _sparse(seed, V32, 16),
    "sparse decode, V4": lambda seed: _sparse(seed, V4, 128),
    "sparse prefill": _sparse_prefill,
    "dense decode": _dense,
}


def _captured(call: Callable[[], torch.Tensor], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = call()
    return graph, result


def _wrong(graphs: list[tuple[torch.cuda.CUDAGraph, torch.Tensor]], wants: list[torch.Tensor]) -> int:
    """How many results of 200 rounds are wrong, where every graph has a stream of its own."""
    streams, wrong = [torch.cuda.Stream() for _ in graphs], 0
    for _ in range(200):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        wrong += sum(not torch.equal(got, want) for (_, got), want in zip(graphs, wants, strict=True))
    return wrong


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("name", MAKES)
def test_graphs_of_one_stream_replayed_on_two(name: str) -> None:
    calls = [MAKES[name](seed) for seed in range(3)]
    wants = [call().clone() for call in calls]
    assert all(want.isfinite().all() and want.any() for want in wants) and not torch.equal(wants[0], wants[1])
    graphs = [_captured(call) for call in calls[:2]]
    assert _wrong(graphs, wants[:2]) == 0
    # one is dropped, another captured in its place, and eager calls go on beside both
    graphs[0] = _captured(calls[2])
    calls[0]()
    assert _wrong(graphs, [wants[2], wants[1]]) == 0


def _reserved() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_stats()["reserved_bytes.all.current"]


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("heads", [16, 128])
def test_what_graphs_hold(heads: int) -> None:
    """One call's scratch for a pool, however many layers and graphs it has; nothing once they are gone."""
    calls = [_decode(seed, heads) for seed in range(3)]
    for call in calls:
        call()
    tiles = -(-heads // 64)
    most = gpu.sm_count(torch.cuda.current_device()) // tiles * 2 * 2 * heads * 513 * 4 + (1 << 20)
    step = 2 << 20
    # torch takes memory in these pieces, and one of 2 MiB for results, which are small
    most = max(-(-most // step) * step, 20 << 20) + step
    before = _reserved()
    pool = torch.cuda.graph_pool_handle()
    graphs = [_captured(lambda: [call() for call in calls * 3][-1], pool)]
    first = _reserved() - before
    assert 0 < first <= most, (first, most)
    graphs += [_captured(call, pool) for call in calls]
    assert _reserved() - before == first
    graphs.clear()
    assert _reserved() == before
