"""Sparse prefill against its definition: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from scratch import TESTS, clean_env
from test_decode import odd

from mla_patch.compat.triton import interpreted
from mla_patch.kernels.sparse import mla_sparse_prefill, mla_sparse_prefill_ref
from mla_patch.kernels.sparse.config import sparse_prefill_config

CPU_SECONDS = 200  # see budget.py

DEVICE = "cpu" if interpreted() else "cuda"
WIDTHS = pytest.mark.parametrize("width", [576, 512])
MORE = pytest.mark.parametrize("more", [0] if interpreted() else [0, 37])  # heads: on sm_90 another kernel's


class Case:
    """Queries over a workspace of which ``used`` rows, in no order, are written; all other rows are NaN."""

    def __init__(self, width=576, queries=3, heads=3, topk=70, rows=50, used=40, holes=0.0, dtype=torch.float16):
        self.q = (torch.randn(queries, heads, width) / 4).to(dtype).to(DEVICE)
        self.kv = torch.full((rows, 1, width), math.nan, dtype=dtype, device=DEVICE)
        self.written = torch.randperm(rows)[:used].int().to(DEVICE)
        self.kv[self.written.long()] = torch.randn(used, 1, width).to(dtype).to(DEVICE)
        ids = self.written[torch.randint(0, used, (queries, 1, topk)).to(DEVICE)]
        nowhere = torch.tensor([-1, -(2**31), rows, 2**31 - 1, -7], dtype=torch.int32, device=DEVICE)
        gone = (torch.rand(queries, 1, topk) < holes).to(DEVICE)
        self.indices = torch.where(gone, nowhere[torch.randint(0, 5, gone.shape).to(DEVICE)], ids).contiguous()

    def run(self, **options):
        return mla_sparse_prefill(self.q, self.kv, self.indices, self.q.shape[-1] ** -0.5, **options)

    def want(self, **options):
        return mla_sparse_prefill_ref(self.q, self.kv, self.indices, self.q.shape[-1] ** -0.5, **options)

    def check(self, **options):
        got = self.run(**options)
        options.pop("config", None)
        compare(got, self.want(**options), self.q.dtype)
        return got


def compare(got, want, dtype):
    # infinities in the same places. Scores are float32 sums of exact products; weights and results are rounded to the
    # type, each by half an eps at most
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=2 / 65536, atol=1e-5)
    out = got[0]
    assert out.dtype == dtype and torch.isfinite(out).all()
    for s in range(len(out)):
        assert (out[s].double() - want[0][s]).norm() <= torch.finfo(dtype).eps * want[0][s].norm(), f"query {s}"


@WIDTHS
@pytest.mark.parametrize("heads", [1, 16, 17, 128])
def test_heads(width, heads):
    Case(width, queries=2, heads=heads, topk=40).check()


@WIDTHS
def test_bfloat16(width):
    Case(width, holes=0.2, dtype=torch.bfloat16).check(attn_sink=torch.randn(3, device=DEVICE))


@WIDTHS
@pytest.mark.parametrize("topk, holes", [(0, 0.0), (1, 0.0), (31, 0.5), (32, 0.0), (33, 0.5), (64, 1.0), (200, 0.3)])
def test_indices(width, topk, holes):
    Case(width, topk=topk, holes=holes).check()


@WIDTHS
@MORE
def test_a_hole_is_no_neighbour(width, more):
    """All keys of a query at the end of its list, behind holes of every kind; row 0 is NaN, and -1 is not row 0."""
    case = Case(width, heads=3 + more, topk=100)
    case.kv[0] = math.nan
    case.written = case.written[case.written > 0]
    case.indices[:, 0] = case.written[0]
    case.indices[0, 0, :-1] = torch.tensor([-1, 2**31 - 1, 50], dtype=torch.int32, device=DEVICE).repeat(33)
    case.indices[1] = -1
    for sink in (None, torch.tensor([0.5, math.inf, -math.inf] + [1.0] * more, device=DEVICE)):
        out, most, lse = case.check(attn_sink=sink)
        assert (out[1] == 0).all() and (most[1] == -math.inf).all() and (lse[1] == math.inf).all()


@WIDTHS
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@MORE
def test_lengths(width, kind, more):
    case = Case(width, queries=6, heads=3 + more, topk=80)
    lens = torch.tensor([0, 80, 33, -5, 1000, 32], device=DEVICE).to(kind)
    if kind is torch.int64:
        lens[4] = 2**32 + 1  # a cut to 32 bits would make it 1
    nan = next(row for row in range(50) if row not in case.written.tolist())
    beyond = torch.arange(80, device=DEVICE) >= lens[:, None, None]
    case.indices[beyond] = nan  # what lies past a length may be anything
    out, _, lse = case.check(topk_length=lens)
    assert (out[[0, 3]] == 0).all() and (lse[[0, 3]] == math.inf).all() and torch.isfinite(lse[[1, 2, 4, 5]]).all()


@WIDTHS
@MORE
def test_sinks(width, more):
    case = Case(width, heads=4 + more)
    plain = case.run()
    sinks = torch.tensor([math.inf, -math.inf, 1.5, 300.0] + [-2.0] * more, device=DEVICE)
    out, most, lse = case.check(attn_sink=sinks)
    assert (out[:, 0] == 0).all() and torch.equal(out[:, 1], plain[0][:, 1])
    assert not torch.equal(out[:, 2], plain[0][:, 2])
    assert torch.equal(most, plain[1]) and torch.equal(lse, plain[2])


@WIDTHS
@MORE
def test_the_base_of_the_statistics(width, more):
    case = Case(width, heads=3 + more)
    case.indices[1] = -1
    out, most, lse = case.check(return_log2=True)
    natural = case.run()
    assert torch.equal(out, natural[0]) and (lse[1] == math.inf).all() and (most[1] == -math.inf).all()
    torch.testing.assert_close(most[0], natural[1][0] * math.log2(math.e))
    torch.testing.assert_close(lse[0], natural[2][0] * math.log2(math.e))


@WIDTHS
@MORE
def test_one_key_is_its_value(width, more):
    case = Case(width, heads=3 + more, topk=1)
    out, most, lse = case.run()
    assert torch.equal(out, case.kv[case.indices[:, 0, 0].long(), :, :512].expand(-1, 3 + more, -1))
    torch.testing.assert_close(most, lse)


@WIDTHS
@MORE
def test_scores_that_are_far_apart(width, more):
    case = Case(width, heads=3 + more, topk=128)
    for gain in (8, 64):
        case.q = (torch.randn(3, 3 + more, width) * gain).half().to(DEVICE)
        case.check()


@WIDTHS
@MORE
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_heads_know_nothing_of_one_another(width, bad, more):
    case = Case(width, heads=5 + more)
    clean = case.run()
    case.q[:, 2] = bad
    others = [head for head in range(5 + more) if head != 2]
    got = case.run()
    for mine, theirs in zip(got, clean, strict=True):
        assert torch.equal(mine[:, others], theirs[:, others])
    assert torch.isnan(got[0][:, 2]).any()


@MORE
def test_a_nan_that_is_asked_for_is_not_hidden(more):
    case = Case(heads=3 + more, topk=40)
    case.indices[0, 0, 7] = next(row for row in range(50) if row not in case.written.tolist())
    out, _, _ = case.run()
    assert torch.isnan(out[0]).all() and torch.isfinite(out[1:]).all()


@WIDTHS
def test_strided_and_read_only(width):
    case = Case(width, queries=4, topk=40, holes=0.2)
    want = case.run()
    wide = torch.randn(8, 6, 640, device=DEVICE).half()
    rows = torch.full((50, 2, 704), math.nan, device=DEVICE).half()
    ids = torch.full((4, 2, 64), 3, dtype=torch.int32, device=DEVICE)
    ids[:, :1, :40] = case.indices
    case.q = wide[::2, 1:4, :width].copy_(case.q)
    case.kv = rows[:, 1:, :width].copy_(case.kv)
    case.indices = ids[:, :1, :40]
    before = [case.q.clone(), case.kv.clone(), case.indices.clone()]
    place = torch.full((4, 5, 1024), -7.0, device=DEVICE).half()
    out = place[:, 1:4, :512]
    got = case.run(out=out)
    assert got[0] is out and all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))
    assert (place[:, [0, 4]] == -7).all() and (place[..., 512:] == -7).all()
    for now, then in zip((case.q, case.kv, case.indices), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


@WIDTHS
@pytest.mark.parametrize("heads", [3, 40])
def test_rows_at_odd_addresses(width, heads):
    """Given elsewhere they would be stored by another kernel, whose rounding may differ."""
    case = Case(width, heads=heads, topk=40)
    want = case.check()
    case.q = odd(case.q)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(case.run(), want, strict=True))
    out = odd(want[0])
    got = case.run(out=out)
    compare(got, case.want(), case.q.dtype)
    assert got[0] is out and (out._base[[0, -1]] == -7).all()


@MORE
def test_nothing_to_do(more):
    case = Case(heads=3 + more, topk=8)
    out, most, lse = mla_sparse_prefill(case.q[:0], case.kv, case.indices[:0], 1.0)
    assert out.shape == (0, 3 + more, 512) and most.shape == lse.shape == (0, 3 + more)
    for kv, ids in ((case.kv[:0], case.indices), (case.kv, case.indices[..., :0])):
        out, most, lse = mla_sparse_prefill(case.q, kv, ids, 1.0)
        assert (out == 0).all() and (most == -math.inf).all() and (lse == math.inf).all()


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("q", lambda x: x[0], r"q: shape \(3, 576\), strides .*, expected \[Sq, H, 576 or 512\]"),
        ("q", lambda x: x.transpose(1, 2), r"q: shape \(3, 576, 3\)"),
        ("q", lambda x: x[..., :512], r"kv: shape \(50, 1, 576\), .* expected \[Skv, 1, 512\]"),
        ("q", lambda x: x.float(), "q: torch.float32, expected torch.bfloat16 or torch.float16"),
        ("q", lambda x: x.repeat(1, 43, 1), "q: 129 heads, expected 1 to 128"),
        ("q", lambda x: x[:, :0], "q: 0 heads, expected 1 to 128"),
        ("kv", lambda x: x[:, 0], r"kv: shape \(50, 576\)"),
        ("kv", lambda x: x.repeat(1, 2, 1), r"kv: shape \(50, 2, 576\)"),
        ("kv", lambda x: x.bfloat16(), "kv: torch.bfloat16, expected torch.float16 as q"),
        ("kv", lambda x: x[:1].expand(2**31, 1, 576), r"kv: 2147483648 rows, expected less than 2\*\*31"),
        ("indices", lambda x: x.long(), r"indices: torch.int64, .* expected torch.int32, \[3, 1, topk\]"),
        ("indices", lambda x: x[:, 0], r"indices: torch.int32, shape \(3, 8\)"),
        ("indices", lambda x: x.repeat(1, 1, 2)[..., ::2], "indices: stride 2 in the last dimension, expected 1"),
        ("d_v", lambda x: 128, "d_v: 128, expected 512"),
        ("attn_sink", lambda x: torch.zeros(4, device=DEVICE), r"attn_sink: .*\(4,\).* a float for each of 3 heads"),
        ("attn_sink", lambda x: torch.zeros(3, device=DEVICE).int(), "attn_sink: torch.int32"),
        ("topk_length", lambda x: torch.zeros(4, device=DEVICE).int(), r"topk_length: .*\(4,\).*, \[3\]"),
        ("topk_length", lambda x: torch.zeros(3, device=DEVICE), "topk_length: torch.float32"),
        ("out", lambda x: torch.zeros(3, 3, 576, device=DEVICE).half(), r"out: .* expected \[3, 3, 512\]"),
        ("out", lambda x: torch.zeros(3, 3, 512, device=DEVICE), "out: torch.float32, expected torch.float16"),
        ("kv", lambda x: x.to("meta"), "kv: on meta, expected"),
        ("topk_length", lambda x: torch.zeros(3, device="meta").int(), "topk_length: on meta"),
    ],
)
def test_misuse(name, spoil, message):
    case = Case(topk=8)
    args = {"q": case.q, "kv": case.kv, "indices": case.indices, "sm_scale": 1.0}
    args[name] = spoil(args.get(name))
    with pytest.raises(ValueError, match=message):
        mla_sparse_prefill(**args)


def test_launch_numbers():
    assert sparse_prefill_config(128, (9, 0))["BLOCK_H"] == 64 and sparse_prefill_config(16, (9, 0))["BLOCK_H"] == 16
    # 64 queries of 576 values beside their keys are more than 99 KiB
    assert all(sparse_prefill_config(128, chip)["BLOCK_H"] == 16 for chip in ((8, 6), (8, 9), (12, 0)))


SERVE = """
import sys
sys.path.insert(0, TESTS)
import fake_chip
import torch
from mla_patch.compat.compiles import COMPILES
from mla_patch.kernels.sparse.prefill import mla_sparse_prefill, warmup
fake_chip.install()
COMPILES.has_served = lambda: True

def serve(heads, width, queries, rows, topk, more, log2, part=64):
    q, kv = (torch.zeros(n, h, width, dtype=torch.bfloat16) for n, h in ((queries, heads), (rows, 1)))
    ids = torch.zeros(queries, 1, topk + part).int()[..., part:]
    options = {"topk_length": torch.ones(queries).int()} if more else {}
    options |= {"attn_sink": torch.zeros(heads)} if more is True else {}
    mla_sparse_prefill(q, kv, ids, 0.1, return_log2=log2, **options)

for fake_chip.SM in (80, 90, 120):
    of_v32 = (1, 576, False), (64, 576, False), (64, 576, "lengths")
    for heads, width, more in (*of_v32, (20, 512, True), (128, 512, True)):
        COMPILES.reset()
        warmed = warmup("cpu", heads, width, with_sinks=more is True, with_lengths=more == "lengths")
        for queries in (1, 2, 16, 33, 4096):
            for rows in (1, 16, 1000):
                for topk in (1, 16, 640, 2047):
                    serve(heads, width, queries, rows, topk, more, queries > 2, queries % 2)
        print(fake_chip.SM, heads, 0 < warmed == COMPILES.before, COMPILES.serving)
serve(128, 576, 3, 64, 256, True, False)
print("unforeseen", COMPILES.serving > 0)
"""


def test_nothing_compiles_after_a_warm_up():
    code = SERVE.replace("TESTS", repr(str(TESTS)))
    env = clean_env({"TRITON_INTERPRET": "0"})
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *rows, unforeseen = done.stdout.splitlines()
    assert len(rows) == 15 and all(row.endswith("True 0") for row in rows), rows
    assert unforeseen == "unforeseen True"


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")


@gpu
@needs_gpu
@WIDTHS
@pytest.mark.parametrize("heads", [16, 20, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_shapes(width, heads, dtype):
    case = Case(width, 130, heads, 2048, 9000, 8000, 0.02, dtype)
    lens = torch.randint(0, 2049, (130,), device=DEVICE).int()
    case.check()
    case.check(attn_sink=torch.randn(heads, device=DEVICE), topk_length=lens, return_log2=True)


@gpu
@needs_gpu
@pytest.mark.parametrize("chip", [(8, 0), (8, 6)], ids=str)
def test_the_numbers_of_other_chips(chip):
    Case(576, 30, 70, 640, 900, 800, 0.1, torch.bfloat16).check(config=sparse_prefill_config(70, chip))


@gpu
@needs_gpu
@WIDTHS
def test_a_graph_follows_its_lengths(width):
    case = Case(width, 9, 64, 512, 2100, 2000, 0.1, torch.bfloat16)
    lens = torch.ones(9, dtype=torch.int32, device=DEVICE)
    case.run(topk_length=lens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.run(topk_length=lens)
    for _ in range(3):
        lens.copy_(torch.randint(0, 513, (9,)))
        graph.replay()
        compare(got, case.want(topk_length=lens), torch.bfloat16)


@pytest.mark.xdist_group("much memory")
@gpu
@needs_gpu
@WIDTHS
@pytest.mark.parametrize("heads", [16, 40])
def test_a_workspace_beyond_31_bits(width, heads):
    """The last rows of 5 GB: an offset in elements past 2**31."""
    rows = 5 * 2**30 // (2 * width)
    case = Case(width, 5, heads, 64, 90, 90, 0.0, torch.bfloat16)
    small, shift = case.kv, rows - 90
    case.kv = torch.empty(rows, 1, width, dtype=torch.bfloat16, device=DEVICE)
    case.kv[shift:] = small
    case.indices += shift
    case.check()


@pytest.mark.xdist_group("much memory")
@gpu
@needs_gpu
@pytest.mark.parametrize("heads", [16, 128])
def test_queries_and_results_beyond_31_bits(heads):
    """The last of so many queries, which all but these have no key."""
    queries = 2**31 // (heads * 512) + 9
    case = Case(512, 5, heads, 64, dtype=torch.bfloat16)
    want = case.want()
    q = torch.zeros(queries, heads, 512, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.full((queries, 1, 64), -1, dtype=torch.int32, device=DEVICE)
    q[-5:], ids[-5:] = case.q, case.indices
    got = mla_sparse_prefill(q, case.kv, ids, 512**-0.5)
    compare([part[-5:] for part in got], want, torch.bfloat16)
    assert (got[0][:-5] == 0).all()
