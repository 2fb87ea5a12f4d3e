"""Index kernels of sparse prefill, exactly: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_patch.compat.compiles import COMPILES
from mla_patch.compat.triton import interpreted
from mla_patch.kernels.indices import prefill as prefill_indices
from mla_patch.kernels.indices.prefill import (
    build_swa_token_ids,
    build_swa_token_ids_ref,
    combine_config,
    combine_topk_swa_indices,
    combine_topk_swa_indices_ref,
    combined_topk_width,
    swa_config,
    warmup,
)

CPU_SECONDS = 60  # see budget.py

DEVICE = "cpu" if interpreted() else "cuda"
POISON = -77


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def running(values, first=0):
    """Where each begins, and the last ends."""
    return ints([first + sum(values[:i]) for i in range(len(values) + 1)])


class Chunk:
    """A prefill chunk: requests of ``seq`` tokens, the last ``ext`` of them its queries."""

    def __init__(self, seq, ext, window, ratio, topk, *, columns=None, first=0, padding=0, holes=0.3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        gather = [min(s, e + window - 1) for s, e in zip(seq, ext, strict=True)]
        compressed = [s // ratio for s in seq]
        self.queries = sum(ext) + padding
        columns = max(topk, 1) if columns is None else columns
        shape = (self.queries, columns)
        raw = torch.randint(0, 1000, shape, generator=generator, dtype=torch.int32)
        raw[torch.rand(shape, generator=generator) < holes] = -1
        self.args = {
            "topk_indices": raw.to(DEVICE),
            "query_start_loc": running(ext, first),
            "seq_lens": ints(seq),
            "gather_lens": ints(gather),
            "compressed_base": running(compressed)[:-1].clone(),
            "swa_base": running(gather, sum(compressed))[:-1].clone(),
            "window_size": window,
            "compress_ratio": ratio,
            "topk": topk,
        }
        pos = [s - e + i for s, e in zip(seq, ext, strict=True) for i in range(e)] + [0] * padding
        self.query_pos = ints(pos)
        self.padding = padding

    def check(self, query_pos=None, **outputs):
        indices, lens = combine_topk_swa_indices(**self.args, query_pos=query_pos, **outputs)
        want, want_lens = combine_topk_swa_indices_ref(**self.args, query_pos=query_pos)
        assert indices.dtype == lens.dtype == torch.int32
        assert indices.shape == (self.queries, combined_topk_width(self.args["topk"], self.args["window_size"]))
        assert indices.tolist() == want and lens.tolist() == want_lens
        return indices, lens

    def check_both(self):
        """With positions and without: they say the same here."""
        assert torch.equal(self.check()[0], self.check(self.query_pos)[0])


@pytest.mark.parametrize(
    "topk, window, width", [(0, 1, 128), (0, 128, 128), (0, 129, 256), (512, 128, 640), (1024, 128, 1152), (5, 4, 128)]
)
def test_width(topk, window, width):
    assert combined_topk_width(topk, window) == width


def golden():
    ext, seq, gather = [3, 0, 2], [10, 7, 2], [6, 3, 2]
    topk = ints([[1, -1, 9, 9], [0, 1, 9, 9], [1, 0, 9, 9], [9] * 4, [9] * 4])
    swa_base = ints([12, 18, 21])
    return topk, running(ext), ints(seq), ints(gather), ints([0, 4, 8]), swa_base, 4, 4, 4


def test_golden():
    indices, lens = combine_topk_swa_indices(*golden())
    assert lens.tolist() == [6, 6, 6, 1, 2]
    assert [row[:length] for row, length in zip(indices.tolist(), lens.tolist(), strict=True)] == [
        [1, -1, 12, 13, 14, 15],
        [0, 1, 13, 14, 15, 16],
        [1, 0, 14, 15, 16, 17],
        [21],
        [21, 22],
    ]
    assert all((row[length:] == -1).all() for row, length in zip(indices, lens.tolist(), strict=True))


def test_a_hole_stays_a_hole():
    # a base added to it is row 99, which belongs to another request
    one = functools.partial(combine_topk_swa_indices, ints([[1, -1, 0, 9]]), ints([0, 1]), ints([8]), ints([4]))
    indices, lens = one(ints([100]), ints([200]), 4, 4, 4)
    assert indices[0, :6].tolist() == [101, -1, 200, 201, 202, 203] and lens.tolist() == [6]


@pytest.mark.parametrize("ratio", [1, 2, 4, 128])
@pytest.mark.parametrize("at", [-1, 0, 1])
def test_around_the_first_compressed_token(ratio, at):
    seq = [max(ratio + at, 1), 3 * ratio + at, 1]
    Chunk(seq, [1, min(seq[1], 5), 1], 16, ratio, 24, seed=ratio).check_both()


@pytest.mark.parametrize(
    "seq, ext",
    [
        ([5], [5]),  # shorter than the window
        ([16], [1]),
        ([17], [1]),
        ([40, 30, 20], [7, 0, 3]),  # without a query: in the middle
        ([40, 30, 20], [7, 3, 0]),  # at the end
        ([40, 30, 20], [0, 0, 3]),  # at the beginning
        ([40, 30], [0, 0]),
        ([0, 30, 0], [0, 2, 0]),  # padding requests
        ([], []),
    ],
)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("first", [0, 1000])
def test_requests(seq, ext, padding, first):
    Chunk(seq, ext, 16, 4, 8, first=first, padding=padding, seed=len(seq)).check_both()


def test_rows_that_no_request_owns():
    chunk = Chunk([40], [2], 16, 4, 8, padding=2)
    # positions of padding are anything
    indices, lens = chunk.check(ints([38, 39, 7, -5]))
    assert (indices[2:] == -1).all() and lens[2:].tolist() == [0, 0]


def test_fewer_rows_than_queries():
    # a rank's share of a chunk: requests end past it
    chunk = Chunk([40, 30], [6, 6], 16, 4, 8)
    chunk.args["topk_indices"], chunk.queries = chunk.args["topk_indices"][:8], 8
    chunk.check(chunk.query_pos[:8])
    chunk.check()


def test_positions_of_their_own():
    # a rank's strided share: nothing but query_pos knows where its queries are
    chunk = Chunk([40, 30], [3, 2], 16, 4, 8)
    chunk.args["gather_lens"] = ints([40, 30])
    pos = ints([1, 17, 39, 0, 21])
    indices, lens = chunk.check(pos)
    assert lens.tolist() == [2, 20, 24, 1, 21]
    assert not torch.equal(indices, chunk.check()[0])


@pytest.mark.parametrize("holes", [0.0, 1.0])
def test_all_keys_and_none(holes):
    Chunk([90, 30], [4, 2], 16, 4, 8, holes=holes).check_both()


def test_no_compressed_tokens():
    Chunk([90, 30, 3], [4, 2, 3], 16, 1, 0).check_both()


@pytest.mark.parametrize("topk, window", [(7, 3), (100, 28), (100, 29), (512, 128), (1000, 77), (1024, 128)])
def test_any_window_and_width(topk, window):
    Chunk([5000, 90], [3, 2], window, 4, topk, columns=topk + 13).check_both()


def test_more_requests_than_a_block():
    rows = 2 * combine_config()["ROWS"] + 5
    ext = [i % 3 % 2 for i in range(rows)]
    Chunk([5 + i % 11 for i in range(rows)], ext, 4, 4, 4, padding=2).check_both()


def test_outputs_are_written_whole():
    """Buffers of an earlier chunk, whose rows were longer, and which lie apart."""
    chunk = Chunk([9, 30], [2, 2], 16, 4, 8, padding=1)
    room = torch.full((5, 200), POISON, dtype=torch.int32, device=DEVICE)
    indices, lens = room[:, :128], torch.full((5,), POISON, dtype=torch.int32, device=DEVICE)
    got, got_lens = chunk.check(out_indices=indices, out_lens=lens)
    assert got is indices and got_lens is lens
    assert (room[:, 128:] == POISON).all()


def test_strided_indices():
    chunk = Chunk([40, 30], [3, 2], 16, 4, 8, columns=20)
    chunk.args["topk_indices"] = chunk.args["topk_indices"][:, 5:14]
    chunk.check_both()


def test_rows_past_int32_are_holes():
    top = 2**31 - 1
    chunk = Chunk([40], [1], 4, 4, 4, holes=0)
    chunk.args["topk_indices"][:] = ints([0, 7, 8, top])
    chunk.args["compressed_base"], chunk.args["swa_base"] = ints([top - 7]), ints([top - 2])
    indices, lens = chunk.check()
    assert indices[0, :8].tolist() == [top - 7, top, -1, -1, top - 2, top - 1, top, -1] and lens.tolist() == [8]


def test_offsets_past_31_bits():
    """Rows of 2**30 elements, of memory of which little is touched."""
    big = torch.empty(2**31 + 4096, dtype=torch.int32, device=DEVICE)
    chunk = Chunk([40], [3], 4, 4, 4)
    far = big.as_strided((3, 4), (2**30, 1))
    far.copy_(chunk.args["topk_indices"])
    want = chunk.check()[0]
    chunk.args["topk_indices"] = far
    assert torch.equal(chunk.check()[0], want)
    out = big.as_strided((3, 128), (2**30, 1), 1000)
    chunk.check(out_indices=out)


class Windows:
    """Requests whose slots are scattered over a pool; what no request owns is poison."""

    def __init__(self, seq, ext, window, *, kind=torch.int64, seed=0):
        torch.manual_seed(seed)
        rows, width = len(seq) + 2, max([*seq, 1]) + 3
        slots = rows * width
        table = torch.full((rows, width), 2**31 - 1, dtype=torch.int32)
        pool = torch.randperm(rows)[: len(seq)]
        order = torch.randperm(slots, dtype=torch.int32).view(rows, width)
        for row, length in zip(pool.tolist(), seq, strict=True):
            table[row, :length] = order[row, :length]
        mapping = torch.cat([torch.randperm(slots) + 5, torch.tensor([-1])]).to(DEVICE, kind)
        self.args = [ints(seq), ints(ext), pool.to(DEVICE, torch.int32), table.to(DEVICE), mapping, window]
        self.want = build_swa_token_ids_ref(*self.args)

    def check(self, total=None):
        got = build_swa_token_ids(*self.args, total)
        assert all(one.dtype == torch.int32 for one in got)
        ids, first, gather, offsets = (one.tolist() for one in got)
        assert (first, gather, offsets) == self.want[1:]
        extra = (len(self.want[0]) if total is None else total) - len(self.want[0])
        assert ids == (self.want[0] + [-1] * extra)[: len(ids)] and len(ids) == len(self.want[0]) + extra


def test_golden_windows():
    windows = Windows([10, 7, 2], [3, 0, 2], 4)
    assert windows.want[1:] == ([4, 4, 0], [6, 3, 2], [0, 6, 9, 11])
    windows.check(11)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "seq, ext, window",
    [
        ([5], [5], 16),
        ([16], [1], 16),
        ([17], [1], 16),
        ([40, 30, 20], [7, 0, 3], 16),
        ([40, 30, 20], [0, 3, 0], 1),
        ([0, 30, 0], [0, 2, 0], 7),
        ([0], [0], 1),
        ([3000, 1, 700], [2500, 1, 600], 128),
        ([], [], 4),
        ([6 + i % 9 for i in range(260)], [i % 4 for i in range(260)], 4),
    ],
)
def test_windows(seq, ext, window, kind):
    windows = Windows(seq, ext, window, kind=kind)
    windows.check()
    windows.check(len(windows.want[0]))
    windows.check(len(windows.want[0]) + 700)


def test_too_small_a_total_overruns_nothing():
    windows = Windows([40, 30, 20], [7, 9, 3], 16)
    windows.check(0)
    seq, ext, pool, table, mapping, window = windows.args
    for total in (10, 25, 60):  # of 22, 24 and 18
        ids = torch.full((80,), POISON, dtype=torch.int32, device=DEVICE)
        sizes = (torch.empty(4, dtype=torch.int32, device=DEVICE) for _ in range(3))
        numbers = {"BLOCK": 16, "ROWS": 2}
        prefill_indices.triton._swa_kernel[(3, 2)](
            ids, *sizes, seq, ext, pool, table, mapping, 3, total, window, mapping.numel(), table.stride(0), **numbers
        )
        assert ids.tolist() == windows.want[0][:total] + [POISON] * (80 - total)


def test_slots_outside_the_map():
    windows = Windows([4], [4], 4)
    table = windows.args[3]
    table[windows.args[2].long(), :4] = ints([0, -1, windows.args[4].numel(), 2**31 - 1])
    assert build_swa_token_ids(*windows.args)[0].tolist() == [int(windows.args[4][0]), -1, -1, -1]


def test_a_table_past_31_bits():
    big = torch.empty(2**31 + 4096, dtype=torch.int32, device=DEVICE)
    table = big.as_strided((3, 20), (2**30, 1))
    table[2] = torch.arange(20, dtype=torch.int32, device=DEVICE)
    mapping = torch.arange(100, 120, device=DEVICE)
    ids = build_swa_token_ids(ints([20]), ints([3]), ints([2]), table, mapping, 4)[0]
    assert ids.tolist() == list(range(114, 120))


@st.composite
def chunks(draw):
    ext = draw(st.lists(st.integers(0, 6), min_size=0, max_size=7))
    seq = [e + draw(st.integers(0, 60)) for e in ext]
    return {
        "seq": seq,
        "ext": ext,
        "window": draw(st.integers(1, 40)),
        "ratio": draw(st.sampled_from([1, 2, 3, 4, 128])),
        "topk": draw(st.integers(0, 30)),
        "first": draw(st.integers(0, 9)),
        "padding": draw(st.integers(0, 3)),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=60, deadline=None)
@given(chunks())
def test_any_chunk(chunk):
    Chunk(**chunk).check_both()
    Windows(chunk["seq"], chunk["ext"], chunk["window"], seed=chunk["seed"]).check()


def test_window_rows_are_the_keys_that_a_query_sees():
    """Both kernels together, by positions alone: row i of the window's region holds ids[i]."""
    seq, ext, window = [40, 9, 30, 17], [7, 9, 0, 2], 16
    windows = Windows(seq, ext, window)
    ids, first, gather, offsets = build_swa_token_ids(*windows.args)
    none = torch.full((sum(ext), 1), -1, dtype=torch.int32, device=DEVICE)
    zeros = torch.zeros_like(first)
    starts = running(ext)
    indices, lens = combine_topk_swa_indices(
        none, starts, ints(seq), gather, zeros, offsets[:-1], window, 1, 0, query_pos=None
    )
    t = 0
    _, _, pool, table, mapping, _ = windows.args
    for r, (s, e) in enumerate(zip(seq, ext, strict=True)):
        for pos in range(s - e, s):
            sees = table[pool[r].long(), max(0, pos - window + 1) : pos + 1].long()
            assert ids[indices[t, : lens[t]].long()].tolist() == mapping[sees].tolist()
            t += 1


class Recorder:
    """In place of a kernel: keeps the grids and the numbers that it was launched with."""

    def __init__(self):
        self.grids, self.numbers = [], []

    def __getitem__(self, grid):
        return lambda *args, **numbers: self.grids.append(grid) or self.numbers.append(numbers)


def test_launches(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(prefill_indices.launch, "_combine_kernel", recorder)
    monkeypatch.setattr(prefill_indices.launch, "_swa_kernel", recorder)
    chunk = Chunk([], [], 4, 4, 4)
    combine_topk_swa_indices(**chunk.args)
    build_swa_token_ids(*Windows([], [], 4).args)
    assert recorder.grids == []
    combine_topk_swa_indices(**Chunk([9], [3], 4, 4, 4, padding=2).args)
    build_swa_token_ids(*Windows([9, 4], [3, 2], 4).args)
    assert recorder.grids == [(5,), (2, 1)]


@pytest.mark.parametrize(
    "topk, columns, shift, out, fours",
    [
        (20, 20, 0, (256, 0), True),
        (20, 24, 4, (260, 4), True),
        (20, 22, 0, (256, 0), False),
        (20, 24, 1, (256, 0), False),
        (20, 20, 0, (258, 0), False),
        (20, 20, 0, (256, 2), False),
        (18, 20, 0, (256, 0), False),  # more than topk columns are not a query's
        (0, 4, 0, (256, 0), True),
    ],
)
def test_rows_that_begin_anywhere(topk, columns, shift, out, fours, monkeypatch):
    """Fours of a row are read and written at once where all rows begin on 16 bytes."""
    chunk = Chunk([90, 7, 60], [6, 7, 3], 16, 4, topk, columns=columns)
    room = torch.empty(chunk.queries * columns + shift, dtype=torch.int32, device=DEVICE)
    chunk.args["topk_indices"] = room[shift:].view(-1, columns).copy_(chunk.args["topk_indices"])
    stride, at = out
    result = torch.full((chunk.queries * stride + at,), POISON, dtype=torch.int32, device=DEVICE)
    rows = result[at:].view(chunk.queries, stride)
    chunk.check(out_indices=rows[:, :128])
    assert (rows[:, 128:] == POISON).all() and (result[:at] == POISON).all()
    recorder = Recorder()
    monkeypatch.setattr(prefill_indices.launch, "_combine_kernel", recorder)
    combine_topk_swa_indices(**chunk.args, out_indices=rows[:, :128])
    assert recorder.numbers[0]["FOURS"] == fours


def test_launch_numbers():
    assert swa_config(1, 10**6, 132)["ctas"] == 128
    assert swa_config(1, 513, 132)["ctas"] == 2
    assert swa_config(64, 10**6, 132)["ctas"] == 8
    assert swa_config(10**4, 10**6, 132)["ctas"] == swa_config(1, 0, 132)["ctas"] == 1


BAD = [
    ("topk_indices", lambda t: t.long(), r"topk_indices: torch.int64, shape \(5, 8\), .*expected torch.int32"),
    ("topk_indices", lambda t: t[0], r"topk_indices: torch.int32, shape \(8,\)"),
    ("topk_indices", lambda t: t[:, ::2], r"topk_indices: .*last dense"),
    ("topk_indices", lambda t: t[:, :5], r"topk_indices: 5 columns, expected topk = 8 or more"),
    ("query_start_loc", lambda t: t[1:], r"query_start_loc: torch.int32, shape \(2,\), .*expected torch.int32, \[3\]"),
    ("seq_lens", lambda t: t.long(), r"seq_lens: torch.int64"),
    ("gather_lens", lambda t: t[:1], r"gather_lens: .*\[2\]"),
    ("compressed_base", lambda t: t.float(), r"compressed_base: torch.float32"),
    ("swa_base", lambda t: t.to("meta"), r"swa_base: on meta, expected"),
    ("query_pos", lambda t: ints([1, 2]), r"query_pos: .*\[5\], contiguous"),
    ("out_indices", lambda t: ints([[0] * 64] * 5), r"out_indices: .*expected torch.int32, \[5, 128\]"),
    ("out_lens", lambda t: ints([0] * 4), r"out_lens: .*\[5\]"),
    ("window_size", lambda n: 0, "window_size: 0, expected 1 or more"),
    ("compress_ratio", lambda n: 0, "compress_ratio: 0, expected 1 or more"),
    ("topk", lambda n: -1, "topk: -1, expected 0 or more"),
]


@pytest.mark.parametrize("name, spoil, message", BAD)
def test_misuse(name, spoil, message):
    args = Chunk([40, 30], [3, 2], 16, 4, 8).args
    args[name] = spoil(args.get(name))
    with pytest.raises(ValueError, match=message):
        combine_topk_swa_indices(**args)


BAD_WINDOWS = [
    (0, lambda t: t.long(), "seq_lens: torch.int64"),
    (1, lambda t: t[:1], r"extend_lens: .*\[2\]"),
    (2, lambda t: t.to("meta"), "req_pool: on meta"),
    (3, lambda t: t.long(), "req_to_token: torch.int64"),
    (3, lambda t: t.to("meta"), "req_to_token: on meta"),
    (3, lambda t: t.t(), "req_to_token: .*last dense"),
    (4, lambda t: t.float(), "full_to_swa: torch.float32"),
    (4, lambda t: t[::2], "full_to_swa: .*contiguous"),
    (5, lambda n: 0, "swa_window: 0, expected 1 or more"),
    (6, lambda n: -1, r"total_swa: -1, expected 0 to 2\*\*31 - 1"),
    (6, lambda n: 2**31, "total_swa: 2147483648"),
]


@pytest.mark.parametrize("at, spoil, message", BAD_WINDOWS)
def test_misuse_of_windows(at, spoil, message):
    args = [*Windows([9, 4], [3, 2], 4).args, None]
    args[at] = spoil(args[at])
    with pytest.raises(ValueError, match=message):
        build_swa_token_ids(*args)


def test_cpu_tensors_need_the_interpreter(run_python):
    code = """
import torch
from mla_patch.kernels.indices.prefill import build_swa_token_ids, combine_topk_swa_indices
z = torch.zeros(1, dtype=torch.int32)
for call, args in (
    (build_swa_token_ids, (z, z, z, z[None], z, 4)),
    (combine_topk_swa_indices, (z[None], *[z] * 5, 4, 4, 1)),
):
    try:
        call(*args)
    except ValueError as problem:
        print(problem)
"""
    root = str(Path(prefill_indices.__file__).parents[4])
    done = run_python(code, env={"TRITON_INTERPRET": None, "PYTHONPATH": root}, check=True)
    why = "on cpu, expected a CUDA device (or TRITON_INTERPRET=1 at import)\n"
    assert done.stdout == f"seq_lens: {why}topk_indices: {why}"


def test_warmup_launches_both(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(prefill_indices.launch, "_combine_kernel", recorder)
    monkeypatch.setattr(prefill_indices.launch, "_swa_kernel", recorder)
    assert warmup(DEVICE) == 0
    assert recorder.grids == [(1, 1), *[(2,)] * 4]
    assert [numbers["FOURS"] for numbers in recorder.numbers[1:]] == [False, False, True, True]


gpu_only = pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("topk, ratio", [(512, 4), (1024, 4), (1024, 128), (0, 1)])
def test_real_shapes(topk, ratio):
    Chunk([131072, 5000, 0, 700], [1500, 0, 0, 548], 128, ratio, topk, padding=8).check_both()
    Windows([131072, 5000, 0, 700], [8192, 0, 0, 548], 128).check()


@pytest.mark.gpu
@gpu_only
def test_serving_compiles_nothing_new():
    warmup(DEVICE)
    before = COMPILES.total
    for rows, window, topk in [(1, 1, 1), (2, 16, 16), (5, 128, 512), (16, 128, 0)]:
        Chunk([40] * rows, [3] * rows, window, 4, topk, padding=rows % 2).check_both()
        Windows([40] * rows, [3] * rows, window).check()
    assert COMPILES.total == before


@pytest.mark.gpu
@gpu_only
def test_a_graph_follows_its_buffers():
    chunk = Chunk([40, 30], [3, 2], 16, 4, 8)
    outputs = {"out_indices": torch.empty(5, 128, dtype=torch.int32, device=DEVICE)}
    outputs["out_lens"] = torch.empty(5, dtype=torch.int32, device=DEVICE)
    chunk.check(**outputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        combine_topk_swa_indices(**chunk.args, **outputs)
    later = Chunk([90, 17], [1, 4], 16, 4, 8, padding=0, seed=5)
    for name in ("topk_indices", "query_start_loc", "seq_lens", "gather_lens", "compressed_base", "swa_base"):
        chunk.args[name].copy_(later.args[name])
    graph.replay()
    want, want_lens = combine_topk_swa_indices_ref(**later.args)
    assert outputs["out_indices"].tolist() == want and outputs["out_lens"].tolist() == want_lens
