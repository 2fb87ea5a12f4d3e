"""Dense decode by block table, with its log-sum-exp: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from scratch import TESTS, clean_env
from test_sparse_decode import as_flash_mla_checks

from mla_patch.compat.triton import interpreted
from mla_patch.kernels.sparse import dense_decode, dense_decode_ref, launch

CPU_SECONDS = 70  # see budget.py

DEVICE = "cpu" if interpreted() else "cuda"
E4M3 = torch.float8_e4m3fn
HALF = torch.bfloat16


class Case:
    """Pages in any order; what no request owns is NaN, and so are the tables past their ends."""

    def __init__(self, lens, heads=3, queries=1, page=16, width=576, dtype=HALF):
        counts = [-(-n // page) for n in lens]
        pages = sum(counts) + 2
        order = torch.randperm(pages).tolist()
        kv = torch.full((pages, page, 1, width), math.nan)
        self.table = torch.full((len(lens), max(counts) + 2), 2147480000, dtype=torch.int32)
        for b, (length, count) in enumerate(zip(lens, counts, strict=True)):
            mine = [order.pop() for _ in range(count)]
            self.table[b, :count] = torch.tensor(mine, dtype=torch.int32)
            for i, at in enumerate(mine):
                rows = min(page, length - i * page)
                kv[at, :rows] = torch.randn(rows, 1, width)
        self.table, self.kv = self.table.to(DEVICE), kv.to(dtype).to(DEVICE)
        self.q = torch.randn(len(lens), queries, heads, width).to(dtype).to(DEVICE)
        self.lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
        self.options = {"sm_scale": width**-0.5}

    def run(self, **options):
        return dense_decode(self.q, self.kv, self.table, self.lens, **self.options, **options)

    def check(self, **options):
        out, lse = self.run(**options)
        options.pop("config", None)
        want, want_lse = dense_decode_ref(self.q, self.kv, self.table, self.lens, **self.options, **options)
        torch.testing.assert_close(lse.double(), want_lse, rtol=8 / 65536, atol=1e-3)
        assert torch.isfinite(out).all() and (out.double() - want).norm() <= 4e-3 * want.norm()
        return out, lse


@pytest.mark.parametrize("dtype, width", [(HALF, 576), (HALF, 512), (E4M3, 576)], ids=str)
@pytest.mark.parametrize("queries, causal", [(1, True), (3, True), (2, False)])
def test_lengths(dtype, width, queries, causal):
    case = Case([70, 0, 1, 2, 33], 3, queries, 16, width, dtype)
    options = {}
    if dtype is E4M3:
        options = {"descale_q": torch.tensor([0.5], device=DEVICE), "descale_k": torch.tensor([3.0], device=DEVICE)}
    out, lse = case.check(causal=causal, **options)
    assert out.dtype == (torch.bfloat16 if dtype is E4M3 else dtype)
    assert (out[1] == 0).all() and (lse[1] == math.inf).all()
    if causal and queries == 3:  # of a request with one key, only the last query sees it
        assert (out[2, :2] == 0).all() and (lse[2, :, :2] == math.inf).all() and torch.isfinite(lse[2, :, 2]).all()


@pytest.mark.parametrize("page", [1, 24, 64])
@pytest.mark.parametrize("splits", [1, 5])
def test_pages_and_splits(page, splits, monkeypatch):
    monkeypatch.setattr(launch, "split_count", lambda tiles, blocks, slots: splits)
    for dtype in (HALF, E4M3):
        case = Case([150, 3], 20, 2, page, dtype=dtype)
        case.options |= {"descale_q": torch.ones(1, device=DEVICE), "descale_k": torch.full((1,), 2.0, device=DEVICE)}
        case.check(causal=True)


@pytest.mark.parametrize("width", [576, 512])
@pytest.mark.parametrize("queries", [1, 2])
def test_the_bounds_of_flash_mla(width, queries):
    """Over values as its tests draw them, against exact ones."""
    case = Case([1, 2, 64, 0, 150], 4, queries, 64, width)
    case.q, case.kv = (case.q / 10).clamp(-1, 1), (case.kv / 10).clamp(-1, 1)
    want = dense_decode_ref(case.q, case.kv, case.table, case.lens, **case.options, causal=True)
    as_flash_mla_checks(*case.run(causal=True), *want, absolute=8e-4)


@pytest.mark.parametrize("dtype", [HALF, E4M3], ids=str)
def test_a_head_is_no_others(dtype):
    case = Case([40, 3], 5, dtype=dtype)
    want, want_lse = case.run()
    case.q = case.q.float()
    case.q[:, :, 2] = math.nan
    case.q[0, :, 4, ::2] = math.nan if dtype is E4M3 else math.inf
    case.q = case.q.to(dtype)
    out, lse = case.run()
    kept = [0, 1, 3]
    assert torch.equal(out[:, :, kept], want[:, :, kept]) and torch.equal(lse[:, kept], want_lse[:, kept])


@pytest.mark.parametrize("dtype", [HALF, E4M3], ids=str)
@pytest.mark.parametrize("nowhere", [-1, -(2**31), "end", 2**31 - 1])
def test_a_page_that_is_none_has_no_keys(dtype, nowhere):
    """Within a length, too: as without the page. What lies past the last page are keys like any others."""
    case = Case([47, 20], page=16, dtype=dtype)
    pages = len(case.kv)
    case.kv = torch.cat([case.kv, torch.ones_like(case.kv)])[:pages]
    gone = case.table[0, 1].item()
    case.table[0, 1] = pages if nowhere == "end" else nowhere
    out, lse = case.run()
    assert torch.isfinite(out).all()
    case.table[0, 1:3] = torch.tensor([case.table[0, 2], gone])
    case.lens[0] -= 16
    want, want_lse = dense_decode_ref(case.q, case.kv, case.table, case.lens, **case.options)
    torch.testing.assert_close(lse.double(), want_lse, rtol=8 / 65536, atol=1e-3)
    assert (out.double() - want).norm() <= 4e-3 * want.norm()


def test_strided():
    case = Case([40, 17])
    want, want_lse = case.run()
    wide = torch.zeros(*case.kv.shape[:3], 640, dtype=HALF, device=DEVICE)
    wide[..., :576] = case.kv
    case.kv, case.lens = wide[..., :576], case.lens.long()
    out, lse = case.run()
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("q", lambda x: x.float(), "q: torch.float32, expected"),
        ("k_cache", lambda x: x.float(), "k_cache: torch.float32, expected torch.float16 as q"),
        ("k_cache", lambda x: x[..., :512], r"k_cache: shape .*, expected \[pages, page size, 1, 576\]"),
        ("block_table", lambda x: x.long(), "block_table: torch.int64"),
        ("block_table", lambda x: x.repeat(1, 2)[:, ::2], "block_table: stride 2"),
        ("cache_seqlens", lambda x: x.float(), r"cache_seqlens: torch.float32, .*expected int32 or int64, \[2\]"),
        ("descale_q", lambda x: torch.ones(1), "descale_k: None, expected both"),
    ],
)
def test_misuse(name, spoil, message):
    case = Case([40, 17], dtype=torch.float16)
    args = {"q": case.q, "k_cache": case.kv, "block_table": case.table, "cache_seqlens": case.lens, **case.options}
    args[name] = spoil(args.get(name))
    with pytest.raises(ValueError, match=message):
        dense_decode(**args)


SERVE = """
import sys
sys.path.insert(0, TESTS)
import fake_chip
import torch
from mla_patch.compat.compiles import COMPILES
from mla_patch.kernels.sparse import dense as module
fake_chip.install()
COMPILES.has_served = lambda: True

def serve(heads, dtype, batch, queries, pages, page=64):
    q = torch.empty(batch, queries, heads, 576, dtype=dtype)
    cache = torch.zeros(7, page, 1, 576).to(dtype)
    scale = torch.ones(2)[1:] if dtype is torch.float8_e4m3fn else None
    table, lens = torch.zeros(batch, pages + 3).int()[:, 3:], torch.ones(batch).int()
    module.dense_decode(q, cache, table, lens, sm_scale=0.1, causal=True, descale_q=scale, descale_k=scale)

for fake_chip.SM in (80, 90, 120):
    for heads in (16, 20, 128):
        for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
            COMPILES.reset()
            warmed = module.warmup("cpu", heads, dtype)
            for batch in (1, 2, 3, 16, 33, 100, 264):
                for queries, pages in ((1, 1), (1, 16), (4, 5), (1, 640)):
                    serve(heads, dtype, batch, queries, pages)
            print(fake_chip.SM, heads, warmed == COMPILES.before, COMPILES.serving)
serve(20, torch.bfloat16, 3, 1, 5, page=32)
print("unforeseen", COMPILES.serving > 0)
"""


def test_nothing_compiles_after_a_warm_up():
    code = SERVE.replace("TESTS", repr(str(TESTS)))
    env = clean_env({"TRITON_INTERPRET": "0"})
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *rows, unforeseen = done.stdout.splitlines()
    assert len(rows) == 27 and all(row.endswith("True 0") for row in rows), rows
    assert unforeseen == "unforeseen True"


def test_a_warm_up_has_nothing_to_do_on_a_cpu():
    code = "import torch; from mla_patch.kernels.sparse.dense import warmup; print(warmup('cpu', 16, torch.float16))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean_env({"TRITON_INTERPRET": "0"}), capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, E4M3], ids=str)
@pytest.mark.parametrize("heads", [16, 20, 128])
def test_real_shapes(heads, dtype):
    Case([9000, 1, 0, 64, 4097], heads, 2, 64, dtype=dtype).check(causal=True)
