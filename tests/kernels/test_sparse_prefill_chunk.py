"""Sparse prefill's chunk cache, through its kernels: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scratch import ROOT, clean_env

from mla_patch import chunk_cache as sparse_prefill
from mla_patch.chunk_cache import (
    ChunkInputs,
    SparsePrefillChunkCache,
    compressed_lens,
    pages_are_faster,
    workspace_rows,
)
from mla_patch.compat.generations import bump, generation_of
from mla_patch.compat.triton import interpreted
from mla_patch.kernels.cache.dequantize import dequantize_k_cache_paged_ref
from mla_patch.kernels.cache.layouts import V4
from mla_patch.kernels.indices.prefill import combine_topk_swa_indices_ref

CPU_SECONDS = 110  # see budget.py

DEVICE = "cpu" if interpreted() else "cuda"
PAGE, WINDOW, TOPK, HEADS = 8, 5, 3, 3
RATIOS = (0, 4, 8, 4, 0)  # layers: one window alone, the indexer's choice, every compressed token, and again
SCALE = 0.06


def pool(slots: int, page: int, generator: torch.Generator) -> torch.Tensor:
    """V4 pages as an engine's pool has them, [pages, bytes]: random tokens, values of about 1."""
    pages = -(-slots // page)
    cache = torch.zeros(pages, V4.page_bytes(page), dtype=torch.uint8)
    tokens = cache[:, : page * 576].view(pages, page, 576)
    values = torch.randn(pages, page, 448, generator=generator) * 64
    tokens[:, :, :448] = values.to(torch.float8_e4m3fn).view(torch.uint8)
    tokens[:, :, 448:] = torch.randn(pages, page, 64, generator=generator).bfloat16().view(torch.uint8)
    scales = torch.randint(120, 123, (pages, page * 8), generator=generator)
    cache[:, page * 576 : page * 584] = scales.to(torch.uint8)
    return cache.to(DEVICE)


class Model:
    """Requests and the caches of every layer, filled to the end: what comes later must not be looked at."""

    def __init__(self, lens: list[int], seed: int = 0) -> None:
        rng = self.rng = torch.Generator().manual_seed(seed)
        self.lens, count, blocks = lens, len(lens), -(-max(lens) // PAGE) + 1
        self.pages = torch.randperm(count * blocks, generator=rng).view(count, blocks)
        self.req_to_token = (self.pages[:, :, None] * PAGE + torch.arange(PAGE)).view(count, -1).int().to(DEVICE)
        slots = count * blocks * PAGE
        self.full_to_swa = torch.randperm(slots, generator=rng).to(DEVICE)
        self.swa = [pool(slots, 4, rng) for _ in RATIOS]
        self.compressed = [pool(slots // ratio, PAGE // ratio, rng) if ratio else None for ratio in RATIOS]
        self.q = [[torch.randn(n, HEADS, 512, generator=rng).to(DEVICE).bfloat16() for n in lens] for _ in RATIOS]
        self.sink = torch.randn(HEADS, generator=rng).to(DEVICE)
        # of each layer, request and position: compressed tokens that lie behind it, holes among them
        self.raw = [[self._choose(n, ratio) for n in lens] for ratio in RATIOS]

    def _choose(self, length: int, ratio: int) -> torch.Tensor:
        rows = torch.full((length, TOPK), -1, dtype=torch.int32)
        for p in range(length if ratio else 0):
            known = torch.randperm((p + 1) // ratio, generator=self.rng)[:TOPK]
            rows[p, : len(known)] = known.int()
            if p % 5 == 4:
                rows[p, 0] = -1
        return rows.to(DEVICE)

    def inputs(self, seq: list[int], ext: list[int], padding: int = 0, **more) -> ChunkInputs:
        ints = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (seq, ext, range(len(seq)))]
        row = [r for r, n in enumerate(ext) for _ in range(n)] + [0] * padding
        table = self.pages[torch.tensor(row, dtype=torch.int64)].int().to(DEVICE)
        given = ChunkInputs(
            ints[0], ints[1], seq, ext, ints[2], self.req_to_token, self.full_to_swa, table, len(row), WINDOW, PAGE, 4
        )
        return replace(given, **more)

    def rows(self, per_request: list[torch.Tensor], seq: list[int], ext: list[int], padding: int) -> torch.Tensor:
        """What of every request's positions is this chunk's, then padding that nobody may look at."""
        parts = [x[s - e : s] for x, s, e in zip(per_request, seq, ext, strict=True)]
        blank = torch.full((padding, *parts[0].shape[1:]), 7, dtype=parts[0].dtype, device=DEVICE)
        return torch.cat([*parts, blank])

    def run(self, cache: SparsePrefillChunkCache, chunk, layer: int, padding: int = 0) -> torch.Tensor:
        seq, ext, ratio = chunk.inputs.seq_lens_cpu, chunk.inputs.extend_lens_cpu, RATIOS[layer]
        raw = self.rows(self.raw[layer], seq, ext, padding) if ratio == 4 else None
        q = self.rows(self.q[layer], seq, ext, padding)
        return cache.attend(
            q, chunk, self.swa[layer], sm_scale=SCALE, ratio=ratio, pages=self.compressed[layer], topk_indices=raw,
            attn_sink=self.sink,
        )  # fmt: skip

    def expected(self, layer: int, request: int) -> torch.Tensor:
        """The definition: every position of one request at once, in float64, from the pages themselves."""
        ratio, length = RATIOS[layer], self.lens[request]
        slots = self.req_to_token[request, :length].long()
        window = dequantize_k_cache_paged_ref(self.swa[layer], self.full_to_swa[slots], 4)[:, 0].double()
        out = []
        if ratio:
            tokens = torch.arange(length // ratio)
            size = PAGE // ratio
            at = self.pages[request][tokens // size] * size + tokens % size
            compressed = dequantize_k_cache_paged_ref(self.compressed[layer], at, size)[:, 0].double()
        for p in range(length):
            keys = window[max(0, p - WINDOW + 1) : p + 1]
            if ratio == 8:
                keys = torch.cat([compressed[: (p + 1) // ratio], keys])
            elif ratio:
                chosen = self.raw[layer][request][p, : min((p + 1) // ratio, TOPK)].cpu()
                keys = torch.cat([compressed[chosen[chosen >= 0].long()], keys])
            scores = self.q[layer][request][p].cpu().double() @ keys.T * SCALE
            weights = torch.cat([scores, self.sink.cpu().double()[:, None]], 1).softmax(1)[:, :-1]
            out.append(weights @ keys)
        return torch.stack(out)


def assert_near(out: torch.Tensor, expected: torch.Tensor) -> None:
    # 16-bit keys and weights, and a rounded result
    torch.testing.assert_close(out.cpu().double(), expected, rtol=2**-7, atol=2**-6)


CHUNKS = [  # (tokens so far, of which are this chunk's): a request that ends, one that waits, one that comes last
    ([9, 6, 0, 17], [9, 6, 0, 17]),
    ([21, 6, 4, 17], [12, 0, 4, 0]),
    ([30, 19, 4, 33], [9, 13, 0, 16]),
]


def test_three_chunks_equal_one_shot_attention() -> None:
    """The first chunk without padding, the others with three rows of it."""
    model = Model([30, 19, 4, 33])
    expected = [[model.expected(layer, r) for r in range(4)] for layer in range(len(RATIOS))]
    cache = SparsePrefillChunkCache()
    for number, ((seq, ext), padding) in enumerate(zip(CHUNKS, (0, 3, 3), strict=True)):
        built = []
        for layer in range(len(RATIOS)):
            chunk = cache.chunk(number, lambda: built.append(1) or model.inputs(seq, ext, padding))  # noqa: B023
            out = model.run(cache, chunk, layer, padding)
            want = [expected[layer][r][s - e : s] for r, (s, e) in enumerate(zip(seq, ext, strict=True))]
            assert_near(out[: sum(ext)], torch.cat(want))
            assert not out[sum(ext) :].any()  # padding sees no key
        assert len(built) == 1


def test_metadata_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    combine = sparse_prefill.combine_topk_swa_indices
    monkeypatch.setattr(
        sparse_prefill, "combine_topk_swa_indices", lambda *args, **kw: made.append(args[7]) or combine(*args, **kw)
    )
    model, cache = Model([12, 20]), SparsePrefillChunkCache()
    chunk = cache.chunk(1, lambda: model.inputs([12, 20], [12, 5]))
    zeros = torch.zeros(17, 3, dtype=torch.int32, device=DEVICE)
    first = [chunk.layer(ratio, zeros if ratio == 4 else None) for ratio in (0, 4, 8)]
    again = [chunk.layer(ratio, zeros + 1 if ratio == 4 else None) for ratio in (0, 4, 8)]
    assert made == [1, 4, 8, 4]  # what the indexer chose is a layer's own
    for one, two in zip(first, again, strict=True):
        assert one.indices.data_ptr() == two.indices.data_ptr() and one.slots.data_ptr() == two.slots.data_ptr()


@pytest.mark.parametrize("topk", [3, 125, 1000])
def test_indices_are_the_definitions(topk: int) -> None:
    model = Model([24, 31, 9])
    seq, ext = [24, 31, 9], [7, 0, 9]
    given = model.inputs(seq, ext, padding=2)
    raw = torch.randint(-1, 7, (given.queries, topk), dtype=torch.int32, device=DEVICE)
    cache = SparsePrefillChunkCache()
    layer = cache.chunk(0, lambda: given).layer(4, raw)
    known = compressed_lens(seq, ext, 4)
    assert known == [6, 0, 2]
    gather = [min(s, e + WINDOW - 1) for s, e in zip(seq, ext, strict=True)]
    start = [0, 7, 7, 16]
    base = [0, 6, 6]
    swa = [8, 8 + gather[0], 8 + gather[0] + gather[1]]
    lists = (start, seq, gather, base, swa)
    want = combine_topk_swa_indices_ref(raw.cpu(), *(torch.tensor(x) for x in lists), WINDOW, 4, topk)
    assert (layer.indices.tolist(), layer.lens.tolist()) == want
    rows = [model.pages[r][t // 2] * 2 + t % 2 for r, n in enumerate(known) for t in range(n)]
    assert layer.slots.tolist() == [int(row) for row in rows]


def test_only_live_lengths_are_gathered() -> None:
    model = Model([30, 19, 4, 33])
    wide = torch.full((9, 4096), -7, dtype=torch.int32, device=DEVICE)  # a table as wide as a captured graph's
    given = model.inputs([30, 19, 4, 33], [9, 0, 0, 0])
    wide[:, :5] = given.page_table[:, :5]
    cache = SparsePrefillChunkCache()
    chunk = cache.chunk(0, lambda: replace(given, page_table=wide))
    assert chunk.layer(4, torch.zeros(9, 3, dtype=torch.int32, device=DEVICE)).slots.numel() == 30 // 4
    assert workspace_rows([30, 19, 4, 33], [9, 0, 0, 0], WINDOW, 4) == 7 + 13 + 4 + 4 + 4
    assert cache.needed([30, 19, 4, 33], [9, 0, 0, 0], WINDOW, 4) == 32 * 1024


def test_a_new_generation_builds_anew() -> None:
    """New lengths in the same tensors, which is what copy_ and a replayed graph make."""
    model, cache = Model([30, 19, 4, 33]), SparsePrefillChunkCache()
    metadata, kv = SimpleNamespace(), SimpleNamespace()
    given = model.inputs(*CHUNKS[0])

    def generation():
        return generation_of(metadata), generation_of(kv)

    first = cache.chunk(generation(), lambda: given)
    assert cache.chunk(generation(), lambda: given) is first
    given.seq_lens.copy_(torch.tensor(CHUNKS[1][0]))
    given.extend_lens.copy_(torch.tensor(CHUNKS[1][1]))
    bump(metadata)
    second = cache.chunk(generation(), lambda: model.inputs(*CHUNKS[1]))
    assert second is not first and second.swa_slots.numel() != first.swa_slots.numel()
    bump(kv)
    assert cache.chunk(generation(), lambda: given) is not second
    assert generation_of(SimpleNamespace()) not in (generation_of(metadata), generation_of(kv))


def test_a_number_is_never_used_twice() -> None:
    seen = set()
    for _ in range(50):  # whose addresses repeat
        seen.add(generation_of(SimpleNamespace()))
    assert len(seen) == 50


def test_a_failed_chunk_is_not_kept() -> None:
    model, cache = Model([9]), SparsePrefillChunkCache()
    with pytest.raises(ValueError, match="queries"):
        cache.chunk(1, lambda: model.inputs([9], [9], queries=8))
    assert cache.chunk(1, lambda: model.inputs([9], [9])).inputs.queries == 9


def test_memory_is_bounded_and_reported() -> None:
    gc.collect()
    before = sparse_prefill.held()
    cache = SparsePrefillChunkCache(limit=100 * 1024)
    assert cache.memory() == {"workspace": 0, "metadata": 0}
    assert cache.workspace(60, torch.device(DEVICE)).shape == (60, 1, 512)
    assert cache.memory()["workspace"] == 100 * 1024  # a step, cut at the limit
    kept = cache.workspace(100, torch.device(DEVICE)).data_ptr()
    assert cache.workspace(1, torch.device(DEVICE)).data_ptr() == kept
    with pytest.raises(ValueError, match=r"workspace: 103424 bytes, expected at most limit = 102400"):
        cache.workspace(101, torch.device(DEVICE))
    model = Model([30, 19, 4, 33])
    chunk = cache.chunk(0, lambda: model.inputs(*CHUNKS[0]))
    small = cache.memory()["metadata"]
    chunk.layer(8)
    layer = chunk.regions[8]
    made = (layer.slots, layer.compressed_base, layer.swa_base, layer.indices, layer.lens)
    assert cache.memory()["metadata"] == small + sum(one.numel() * 4 for one in made)
    assert sparse_prefill.held() == before + sum(cache.memory().values())
    cache.forget()
    assert sparse_prefill.held() == before
    free = SparsePrefillChunkCache()
    free.workspace(1, torch.device(DEVICE))
    assert free.memory()["workspace"] == 16384 * 1024
    del free
    gc.collect()
    assert sparse_prefill.held() == before


def test_a_layer_beyond_the_limit_is_refused_before_a_launch() -> None:
    model, cache = Model([30]), SparsePrefillChunkCache(limit=20 * 1024)
    chunk = cache.chunk(0, lambda: model.inputs([30], [30]))
    with pytest.raises(ValueError, match="limit"):
        model.run(cache, chunk, 0)


def test_nothing_to_do() -> None:
    model, cache = Model([9, 12]), SparsePrefillChunkCache()
    chunk = cache.chunk(0, lambda: model.inputs([9, 12], [0, 0]))
    for layer in range(3):
        assert model.run(cache, chunk, layer).shape == (0, HEADS, 512)
    padded = cache.chunk(1, lambda: model.inputs([9, 12], [0, 0], padding=2))
    for layer in range(3):
        assert not model.run(cache, padded, layer, 2).any()


def test_whoever_attends_gets_flash_mlas_arguments() -> None:
    model, cache = Model([12]), SparsePrefillChunkCache()
    chunk = cache.chunk(0, lambda: model.inputs([12], [12]))
    seen = {}

    def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
        seen.update(locals())
        return q + 1, None, None

    q = model.q[0][0]
    out = cache.attend(q, chunk, model.swa[0], sm_scale=SCALE, attn_sink=model.sink, sparse_fwd=flash_mla_sparse_fwd)
    assert torch.equal(out, q + 1)
    assert seen["kv"].shape == (12, 1, 512) and seen["indices"].shape == (12, 1, 128) and seen["d_v"] == 512
    assert seen["topk_length"].tolist() == [1, 2, 3, 4, *[5] * 8] and seen["attn_sink"] is model.sink


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extend_lens_cpu": [9]}, "extend_lens_cpu: 1 requests, expected 2"),
        ({"seq_lens": torch.zeros(3, dtype=torch.int32)}, r"seq_lens: shape \(3,\), expected \(2,\)"),
        ({"seq_lens": torch.tensor(9, dtype=torch.int32)}, r"seq_lens: shape \(\), expected \(2,\)"),
        ({"extend_lens_cpu": [9, 13]}, "extend_lens_cpu: 13 of request 1, expected 0 to its 12 tokens"),
        ({"extend_lens_cpu": [-1, 4]}, "extend_lens_cpu: -1 of request 0, expected 0 to its 9 tokens"),
        ({"queries": 12}, "queries: 12, expected 13 or more"),
        ({"window": 0}, "window: 0, expected 1 or more"),
        ({"page_table": torch.zeros(13, 2)}, "page_table: torch.float32"),
        ({"page_table": torch.zeros(13, 1, dtype=torch.int32)}, r"shape \(13, 1\), expected \[>= 13, >= 2\]"),
        ({"page_table": torch.zeros(12, 2, dtype=torch.int32)}, r"page_table: shape \(12, 2\)"),
        ({"req_to_token": torch.zeros(2, 9)}, "req_to_token: torch.float32"),
    ],
)  # fmt: skip
def test_bad_inputs_are_refused(change: dict, message: str) -> None:
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        SparsePrefillChunkCache().chunk(0, lambda: Model([9, 12]).inputs([9, 12], [9, 4], **change))


def test_bad_layers_are_refused() -> None:
    model, cache = Model([9]), SparsePrefillChunkCache()
    chunk = cache.chunk(0, lambda: model.inputs([9], [9]))
    raw = torch.zeros(9, 3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="ratio: 3, expected a divisor of page_size = 8"):
        chunk.layer(3)
    with pytest.raises(ValueError, match="topk_indices: given, expected None for ratio 0"):
        chunk.layer(0, raw)
    with pytest.raises(ValueError, match=r"topk_indices: shape \(8, 3\), expected \[>= 9, topk\]"):
        chunk.layer(4, raw[:8])
    q, swa = model.q[0][0], model.swa[0]
    for bad, found in ((q[:8], r"bfloat16, shape \(8"), (q.half(), "float16, shape"), (q[..., :448], ", 448")):
        with pytest.raises(ValueError, match=rf"q: .*{found}.* expected torch.bfloat16, \[9, H, 512\]"):
            cache.attend(bad, chunk, swa, sm_scale=1.0)
    with pytest.raises(ValueError, match=r"^swa_pages: "):
        cache.attend(q, chunk, swa[:, :100], sm_scale=1.0)
    with pytest.raises(ValueError, match=r"^pages: "):
        cache.attend(q, chunk, swa, sm_scale=1.0, ratio=4, pages=swa[:, :9], topk_indices=raw)
    with pytest.raises(ValueError, match="pages: None beside ratio 4"):
        cache.attend(model.q[0][0], chunk, model.swa[0], sm_scale=1.0, ratio=4, topk_indices=raw)


def test_more_rows_than_an_index_names() -> None:
    """Of requests that share their pages: lengths alone make it so."""
    model = Model([9])
    inputs = model.inputs([9], [9])
    chunk = SparsePrefillChunkCache().chunk(0, lambda: inputs)
    chunk.inputs = replace(inputs, seq_lens_cpu=[2**33])
    with pytest.raises(ValueError, match=r"seq_lens_cpu: \d+ workspace rows, expected below 2\*\*31"):
        chunk.layer(4)


@pytest.mark.parametrize(
    "heads, ratio, context, queries, faster",
    # as measured on an H200, FlashMLA on both sides, or our kernels for 16 heads; a window of 128
    [
        (64, 4, 8192, 16, True), (64, 4, 8192, 256, False), (64, 4, 8192, 1024, False), (64, 4, 131072, 64, True),
        (64, 4, 131072, 1024, False), (64, 4, 1048576, 256, True), (64, 128, 131072, 16, True),
        (64, 128, 131072, 256, False), (64, 128, 1048576, 16, True), (64, 128, 1048576, 256, False),
        (128, 4, 8192, 16, True), (128, 4, 8192, 256, False), (128, 4, 131072, 64, True),
        (128, 128, 131072, 256, False), (16, 4, 131072, 64, True), (16, 4, 131072, 256, False),
        (16, 128, 131072, 64, True), (16, 128, 1048576, 1024, False),
    ],
)  # fmt: skip
def test_few_queries_of_long_contexts_are_faster_over_pages(heads, ratio, context, queries, faster):
    topk = 512 if ratio == 4 else None
    assert pages_are_faster([context], [queries], 128, ratio, topk, heads) == faster
    assert pages_are_faster([0, context, 0], [0, queries, 0], 128, ratio, topk, heads) == faster


def test_many_requests_of_few_queries_each_have_all_their_contexts_read_back():
    assert pages_are_faster([1048576] * 64, [64] * 64, 128, 4, 512, 64)
    assert not pages_are_faster([8192] * 64, [64] * 64, 128, 4, 512, 64)


def test_a_layer_of_the_window_alone_and_a_chunk_without_queries():
    assert pages_are_faster([131072], [16], 128, 0, None, 64)
    assert not pages_are_faster([131072], [2048], 128, 0, None, 64)
    assert pages_are_faster([5], [0], 128, 4, 512, 64)


SERVE = """
import sys
sys.path.insert(0, TESTS)
import fake_chip
import torch
from mla_patch.compat.compiles import COMPILES
from mla_patch.hooks.sglang.edits.v4_reach import WarmupShapes
from mla_patch.hooks.sglang.sparse_prefill import warm
from mla_patch.kernels.cache.layouts import V4
from mla_patch.chunk_cache import ChunkInputs, SparsePrefillChunkCache
fake_chip.install()
COMPILES.has_served = lambda: True

def serve(heads, seq, extend):
    ints = lambda values: torch.tensor(values, dtype=torch.int32)
    queries = sum(extend)
    inputs = ChunkInputs(
        seq_lens=ints(seq), extend_lens=ints(extend), seq_lens_cpu=seq, extend_lens_cpu=extend,
        req_pool=ints(range(len(seq))), req_to_token=torch.zeros(len(seq), 4096).int(),
        full_to_swa=torch.zeros(4096).long(), page_table=torch.zeros(queries, 16).int(), queries=queries, window=128,
        page_size=256, swa_page_size=128,
    )
    cache = SparsePrefillChunkCache()
    chunk = cache.chunk((1,), lambda: inputs)
    q, sink = torch.zeros(queries, heads, 512, dtype=torch.bfloat16), torch.zeros(heads)
    for ratio in (0, 4, 128):
        more = {}
        if ratio:
            more["pages"] = torch.zeros(16, V4.page_bytes(256 // ratio), dtype=torch.uint8)
        if ratio == 4:
            more["topk_indices"] = torch.zeros(queries, 512).int()
        swa = torch.zeros(32, V4.page_bytes(128), dtype=torch.uint8)
        cache.attend(q, chunk, swa, sm_scale=0.1, ratio=ratio, attn_sink=sink, **more)

for fake_chip.SM in (80, 90, 120):
    COMPILES.reset()
    warmed = warm(WarmupShapes("cpu", (128, 64, 2), (20,)))
    for seq, extend in (([1], [1]), ([700, 16, 128], [300, 1, 64]), ([4000, 4000], [0, 3]), ([160] * 16, [16] * 16)):
        serve(20, seq, extend)
    print(fake_chip.SM, 0 < warmed == COMPILES.before, COMPILES.serving)
serve(16, [9], [9])
print("unforeseen", COMPILES.serving > 0)
"""


def test_nothing_compiles_after_a_warm_up():
    """What the hook has compiled when a backend is built is all that its prompts reach."""
    code = SERVE.replace("TESTS", repr(str(ROOT / "tests")))
    command = [sys.executable, "-W", "ignore", "-c", code]
    env = clean_env({"TRITON_INTERPRET": "0"})
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["80 True 0", "90 True 0", "120 True 0", "unforeseen True"]
