"""Both index builders against their definitions: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_patch.compat.triton import interpreted
from mla_patch.kernels.indices import kv as kv_indices
from mla_patch.kernels.indices.kv import (
    build_page_table,
    build_token_indices,
    page_table_config,
    page_table_ref,
    token_indices_config,
    token_indices_ref,
)

CPU_SECONDS = 80  # see budget.py

DEVICE = "cpu" if interpreted() else "cuda"
PAGE_SIZES = (1, 16, 32, 64, 128)
POISON = -77
INDEX = (torch.int32, torch.int64)

# The launcher's own numbers, and small ones that give every row several programs and every program several blocks.
SMALL = {"ctas": 3, "BLOCK": 64, "WIDE": 2, "ROWS": 0, "num_warps": 4}
SHARED = {"ctas": 2, "BLOCK": 64, "WIDE": 1, "ROWS": 4, "num_warps": 4}
CONFIGS = [pytest.param(None, id="own"), pytest.param(SMALL, id="small"), pytest.param(SHARED, id="shared")]


def ints(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def slots(rows, width):
    """Any int32 that can be a slot; half of them 2**30 and more."""
    return torch.randint(0, 2**31 - 1, (rows, width), dtype=torch.int32, device=DEVICE)


def poisoned(*shape, dtype=torch.int32):
    return torch.full(shape, POISON, dtype=dtype, device=DEVICE)


def starts(lens, gap=0):
    """indptr for these lengths, with `gap` unowned lanes before every row and after the last."""
    sizes = torch.tensor([gap, *(max(n, 0) + gap for n in lens)])
    return sizes.cumsum(0)[: len(lens)], int(sizes.sum())


def check_page_table(table, pool, lens, out, *, page_size, kv_start=None, **kwargs):
    want = page_table_ref(table, pool, lens, out, kv_start=kv_start, page_size=page_size)
    got = build_page_table(table, pool, lens, out, kv_start=kv_start, page_size=page_size, **kwargs)
    assert got is out
    assert torch.equal(out, want)


def check_token_indices(table, pool, lens, indptr, out, *, kv_start=None, **kwargs):
    want = token_indices_ref(table, pool, lens, indptr, out, kv_start=kv_start)
    got = build_token_indices(table, pool, lens, indptr, out, kv_start=kv_start, **kwargs)
    assert got is out
    assert torch.equal(out, want)


# 4096 is the host's tile; one row of everything around it, a row without length between rows that have one
WIDTH = 9 * 4096 + 100
EDGES = [1, 0, 4095, 4096, 4097, -1, 2 * 4096 - 1, 2 * 4096, 2 * 4096 + 1, -4096, 8 * 4096 + 1, 63, 64, 65, WIDTH]


LARGER = [pytest.param(None, id="own"), pytest.param({**SHARED, "BLOCK": 1024}, id="shared")]


@pytest.mark.parametrize("config", LARGER)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_page_table_edges(page_size, config):
    table, pool = slots(len(EDGES) + 3, WIDTH), torch.randperm(len(EDGES) + 3)[: len(EDGES)].to(DEVICE)
    out = poisoned(len(EDGES), -(-WIDTH // page_size) + 5)
    check_page_table(table, pool, ints(EDGES), out, page_size=page_size, config=config)
    for row, length in enumerate(EDGES):  # spelt out once: whatever the definition says, these stay
        assert (out[row, -(-max(length, 0) // page_size) :] == POISON).all()


@pytest.mark.parametrize("config", LARGER)
def test_token_indices_edges(config):
    table, pool = slots(len(EDGES) + 3, WIDTH), torch.randperm(len(EDGES) + 3)[: len(EDGES)].to(DEVICE)
    indptr, total = starts(EDGES, gap=7)
    out = poisoned(total, dtype=torch.int64)
    check_token_indices(table, pool, ints(EDGES), indptr.to(DEVICE), out, config=config)
    assert int((out == POISON).sum()) == 7 * (len(EDGES) + 1)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 2000])
def test_one_row(length, page_size, config):
    table, lens, pool = slots(3, 2000), ints([length]), ints([1])
    check_page_table(table, pool, lens, poisoned(1, 2000 // page_size + 2), page_size=page_size, config=config)
    if page_size == 1:
        out = poisoned(2010, dtype=torch.int64)
        check_token_indices(table, pool, lens, ints([3]), out, config=config)


@pytest.mark.parametrize("page_size", [2, 8, 256, 4096])
def test_other_powers_of_two_are_served_too(page_size):
    check_page_table(slots(2, 9000), ints([1, 0]), ints([8999, 4097]), poisoned(2, 4502), page_size=page_size)


@pytest.mark.parametrize("ctas, block", list(itertools.product([1, 2, 5, 20], [16, 128, 1024])))
def test_any_grid_gives_the_same(ctas, block):
    lens = [1000, 0, 17, 513]
    table, pool = slots(4, 1000), ints([2, 0, 3, 1])
    indptr, total = starts(lens)
    for wide, scanned in ((1, 0), (4, 0), (1, 2), (2, 4)):
        config = {"ctas": ctas, "BLOCK": block, "WIDE": wide, "ROWS": scanned, "num_warps": 4}
        check_page_table(table, pool, ints(lens), poisoned(4, 70), page_size=16, config=config)
        check_token_indices(table, pool, ints(lens), indptr.to(DEVICE), poisoned(total + 1), config=config)


@pytest.mark.parametrize("given_start", [False, True])
@pytest.mark.parametrize("pool_t, lens_t, indptr_t, start_t, out_t", list(itertools.product(INDEX, repeat=5)))
def test_every_index_type(pool_t, lens_t, indptr_t, start_t, out_t, given_start):
    lens, config = [200, 0, 131], {"ctas": 1, "BLOCK": 64, "WIDE": 1, "ROWS": 2, "num_warps": 4}
    table, pool = slots(4, 600), ints([3, 1, 0], pool_t)
    start = ints([64, 0, 320], start_t) if given_start else None
    indptr, total = starts(lens, gap=1)
    out = poisoned(total, dtype=out_t)
    check_token_indices(
        table, pool, ints(lens, lens_t), indptr.to(DEVICE, indptr_t), out, kv_start=start, config=config
    )
    out = poisoned(3, 14, dtype=out_t)
    check_page_table(table, pool, ints(lens, lens_t), out, kv_start=start, page_size=16, config=config)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_kv_start_reads_from_there(page_size):
    lens, first = [1, 300, 0, 640], [0, 128, 256, 1408]
    table, pool = slots(4, 2048), ints([1, 3, 2, 0])
    out = poisoned(4, 650)
    check_page_table(table, pool, ints(lens), out, kv_start=ints(first), page_size=page_size)
    assert int(out[3, 0]) == int(table[0, 1408]) // page_size


@pytest.mark.parametrize("config", CONFIGS)
def test_out_may_be_part_of_something_larger(config):
    lens, table, pool = ints([100, 333, 0]), slots(3, 400), ints([0, 2, 1])
    buffer = poisoned(6, 64)
    expected = buffer.clone()
    expected[1:4, 8:40] = page_table_ref(table, pool, lens, buffer[1:4, 8:40], page_size=16)
    build_page_table(table, pool, lens, buffer[1:4, 8:40], page_size=16, config=config)  # row stride 64, width 32
    assert torch.equal(buffer, expected)

    flat, indptr = poisoned(600, dtype=torch.int64), ints([0, 100, 433])
    expected = flat.clone()
    expected[9:500] = token_indices_ref(table, pool, lens, indptr, flat[9:500])
    build_token_indices(table, pool, lens, indptr, flat[9:500], config=config)
    assert torch.equal(flat, expected)


def test_the_table_may_be_a_view():
    wide, lens, pool = slots(8, 512), ints([300, 12]), ints([1, 3])
    view = wide[::2, 16:400]  # row stride 1024
    check_page_table(view, pool, lens, poisoned(2, 30), page_size=16)
    check_token_indices(view, pool, lens, ints([0, 300]), poisoned(320))


def test_strides_are_taken_as_passed():
    lens, table, pool = ints([100, 60]), slots(4, 256), ints([3, 1])
    out = poisoned(2, 32)
    build_page_table(table, pool, lens, out, page_size=16, row_stride=128, out_stride=8)
    halves = table.view(8, 128)  # what a row stride of 128 means
    expected = poisoned(64)
    want = page_table_ref(halves, pool, lens, poisoned(2, 8), page_size=16)
    expected[:16] = want.view(-1)
    assert torch.equal(out.view(-1), expected)
    ids, indptr = poisoned(200), ints([0, 100])
    build_token_indices(table, pool, lens, indptr, ids, row_stride=128)
    assert torch.equal(ids, token_indices_ref(halves, pool, lens, indptr, poisoned(200)))


@pytest.mark.parametrize("config", CONFIGS)
def test_buffers_longer_than_the_rows(config):
    # a graph's buffers: what lies past the rows is stale, and would be out of range if it were read
    lens, pool, indptr = ints([70, 5, 10**9, -5]), ints([1, 0, 10**9, 0]), ints([0, 70, 10**9, 0])
    table, out = slots(2, 100), poisoned(4, 9)
    want = page_table_ref(table, pool[:2], lens[:2], out, page_size=16)
    build_page_table(table, pool, lens, out, page_size=16, rows=2, config=config)
    assert torch.equal(out, want)
    ids = poisoned(90)
    want = token_indices_ref(table, pool[:2], lens[:2], indptr, ids)
    build_token_indices(table, pool, lens, indptr, ids, rows=2, config=config)
    assert torch.equal(ids, want)


def test_indptr_in_any_order():
    lens, table, pool = ints([20, 30, 10]), slots(3, 64), ints([0, 1, 2])
    check_token_indices(table, pool, lens, ints([50, 5, 90]), poisoned(120))


class Recorder:
    """In place of a kernel: keeps the grids that it was launched on."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.grids.append(grid)


@pytest.fixture
def launches(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(kv_indices.launch, "_kv_indices_kernel", recorder)
    return recorder.grids


@pytest.mark.parametrize("rows", [0, None])
def test_no_rows_no_launch(launches, rows):
    size = 0 if rows is None else 3
    table, pool, lens = slots(2, 64), ints([0] * size), ints([5] * size)
    build_page_table(table, pool, lens, poisoned(size, 4), rows=rows)
    build_token_indices(table, pool, lens, ints([0] * size), poisoned(9), rows=rows)
    assert launches == []


def test_one_launch_that_does_not_grow_with_any_width(launches):
    lens, pool = ints([5] * 8), ints([0] * 8)
    for width, buffer in [(64, 8), (1 << 20, 8), (64, 5000)]:
        out, table = poisoned(buffer, width // 64), torch.empty(2, width, dtype=torch.int32, device=DEVICE)
        build_page_table(table, pool, lens, out, rows=8)
        build_token_indices(table, pool, lens, lens, poisoned(buffer * 10), rows=8)
    assert len(launches) == 6
    assert len(set(launches[::2])) == len(set(launches[1::2])) == 1


@pytest.mark.parametrize("sms", [1, 66, 132, 188])
def test_grids_are_bounded_by_rows_and_gpu(sms):
    for rows in [*range(1, 600), 4096, 10**6]:
        for config in (token_indices_config(rows, sms), *(page_table_config(rows, p, sms) for p in PAGE_SIZES)):
            assert 1 <= config["ctas"] <= 65535  # a limit of the grid's second axis
            assert config["ctas"] * rows <= max(rows, 8 * sms)


def test_launch_numbers_are_those_that_were_measured():
    ids = {"BLOCK": 1024, "WIDE": 1, "ROWS": 256, "num_warps": 4}
    assert [token_indices_config(rows, 132) for rows in (1, 8, 64, 256, 1024)] == [
        {"ctas": ctas, **ids} for ctas in (128, 66, 8, 2, 1)
    ]
    pages = {"BLOCK": 128, "WIDE": 8, "ROWS": 0, "num_warps": 1}
    assert [page_table_config(rows, 64, 132) for rows in (1, 8, 64, 256, 1024)] == [
        {"ctas": ctas, **pages} for ctas in (32, 32, 16, 2, 1)
    ]
    assert page_table_config(1, 16, 132) == {"ctas": 32, "BLOCK": 512, "WIDE": 2, "ROWS": 0, "num_warps": 4}
    assert page_table_config(3, 1, 132) == token_indices_config(3, 132)


def test_interpreted_programs_are_few_and_wide():
    # the interpreter runs programs one after another, in Python
    assert token_indices_config(64, 1, True)["ctas"] == 1
    assert page_table_config(64, 64, 1, True) == {
        "ctas": 1, "BLOCK": 256, "WIDE": 1, "ROWS": 0, "num_warps": 4,
    }  # fmt: skip


@pytest.mark.parametrize("config", LARGER)
def test_offsets_past_31_bits(config):
    # 8 GiB of address space of which a few pages are touched; every offset below is at 2**31 elements
    big = torch.empty(2**31 + 4096, dtype=torch.int32, device=DEVICE)
    far, width = 2**31, 1000
    table = big.as_strided((3, width), (2**30, 1))
    table[2] = torch.arange(2**30, 2**30 + width, dtype=torch.int32, device=DEVICE)
    pool, lens = ints([2], torch.int32), ints([width], torch.int32)  # 2 * 2**30, of two 32-bit factors
    ids = poisoned(width)
    check_token_indices(table, pool, lens, ints([0]), ids, config=config)
    assert int(ids[-1]) == 2**30 + width - 1
    check_page_table(table, pool, lens, poisoned(1, 16), page_size=64, config=config)

    start = table[:1].as_strided((1, far + width), (far + width, 1))  # one row, its positions past 2**31
    build_token_indices(start, ints([0]), lens, ints([0]), ids.fill_(POISON), kv_start=ints([far]), config=config)
    assert int(ids[0]) == 2**30

    small = slots(1, width)
    build_token_indices(small, ints([0]), lens, ints([far]), big, config=config)
    assert torch.equal(big[far : far + width], small[0])
    rows = big.as_strided((3, 16), (2**30, 1))
    none = ints([0, 0, 1000], torch.int32)
    build_page_table(small, ints([0, 0, 0]), none, rows, page_size=64, config=config)
    assert torch.equal(rows[2], small[0, ::64] // 64)


@st.composite
def batches(draw):
    page_size = draw(st.sampled_from(PAGE_SIZES))
    lens = draw(st.lists(st.integers(-3, 700), min_size=1, max_size=9))
    first = [page_size * draw(st.integers(0, 3)) for _ in lens]
    config = {
        "ctas": draw(st.integers(1, 5)),
        "BLOCK": draw(st.sampled_from([64, 256])),
        "WIDE": draw(st.sampled_from([1, 2])),
        "ROWS": draw(st.sampled_from([0, 2, 4])),
        "num_warps": 4,
    }
    return (
        page_size,
        lens,
        first if draw(st.booleans()) else None,
        draw(st.integers(0, 3)),  # gap between the rows' ids
        draw(st.integers(0, 2)),  # rows past the batch in every buffer
        draw(st.sampled_from([None, config])),
        draw(st.integers(0, 2**31)),
    )


@settings(max_examples=150, deadline=None)
@given(batches())
def test_ids_and_pages_agree(batch):
    """Pages of consecutive slots in any order: token i of a request lies in its page i // page_size."""
    page_size, lens, first, gap, extra, config, seed = batch
    torch.manual_seed(seed)
    rows, pages = len(lens), -(-(700 + 3 * 128) // page_size)
    physical = torch.randperm(2 * rows * pages)[: rows * pages].view(rows, pages, 1)
    table = (physical * page_size + torch.arange(page_size)).view(rows, -1).to(DEVICE, torch.int32)
    pool = torch.cat([torch.randperm(rows), torch.full((extra,), 10**9)]).to(DEVICE)
    padded, start = ints(lens + [10**9] * extra), None if first is None else ints(first + [0] * extra)
    indptr, total = starts(lens, gap)
    ids = poisoned(total + 5, dtype=torch.int64)
    indptr = torch.cat([indptr, torch.zeros(extra, dtype=torch.int64)]).to(DEVICE, torch.int32)
    build_token_indices(table, pool, padded, indptr, ids, kv_start=start, rows=rows, config=config)
    out = poisoned(rows + extra, pages + 1)
    build_page_table(table, pool, padded, out, kv_start=start, page_size=page_size, rows=rows, config=config)

    owned = 0
    for r, length in enumerate(lens):
        length, begin = max(length, 0), int(indptr[r])
        i = torch.arange(length, device=DEVICE)
        assert torch.equal(ids[begin : begin + length], out[r, i // page_size].long() * page_size + i % page_size)
        if length:
            assert int(ids[begin]) == int(table[pool[r], 0 if first is None else first[r]])
        assert (out[r, -(-length // page_size) :] == POISON).all()
        owned += length
    assert int((ids != POISON).sum()) == owned
    assert (out[rows:] == POISON).all()


def good():
    return {
        "req_to_token": slots(4, 128),
        "req_pool": ints([0, 1, 2]),
        "lens": ints([5, 6, 7]),
        "indptr": ints([0, 5, 11, 18], torch.int32),
        "kv_start": ints([0, 0, 0]),
    }


BAD = [
    ("req_to_token", lambda t: t.long(), r"req_to_token: torch.int64, expected torch.int32"),
    ("req_to_token", lambda t: t[0], r"req_to_token: shape \(128,\), expected 2 dimensions"),
    ("req_to_token", lambda t: t[:, ::2], r"req_to_token: stride 2 in the last dimension, expected 1"),
    ("req_pool", lambda t: t.short(), r"req_pool: torch.int16, expected torch.int32 or torch.int64"),
    ("req_pool", lambda t: t[:2], r"req_pool: 2 rows, expected 3 or more"),
    ("lens", lambda t: t.float(), r"lens: torch.float32, expected torch.int32 or torch.int64"),
    ("lens", lambda t: t[:, None], r"lens: shape \(3, 1\), expected 1 dimension$"),
    ("lens", lambda t: t[0], r"lens: shape \(\), expected 1 dimension$"),
    ("lens", lambda t: t.repeat(2)[::2], r"lens: stride 2 in the last dimension, expected 1"),
    ("lens", lambda t: t.to("meta"), r"lens: on meta, expected (cpu|cuda:0) as req_to_token"),
    ("indptr", lambda t: t[:2], r"indptr: 2 rows, expected 3 or more"),
    ("indptr", lambda t: t.double(), r"indptr: torch.float64, expected"),
    ("kv_start", lambda t: t.bool(), r"kv_start: torch.bool, expected"),
    ("kv_start", lambda t: t[1:], r"kv_start: 2 rows, expected 3 or more"),
    ("out", lambda t: t.float(), r"out: torch.float32, expected torch.int32 or torch.int64"),
    ("out", lambda t: t.to("meta"), r"out: on meta, expected"),
    ("rows", lambda n: 4, r"req_pool: 3 rows, expected 4 or more"),
    ("rows", lambda n: -1, r"rows: -1, expected 0 or more"),
    ("row_stride", lambda n: -1, r"row_stride: -1 for 4 rows, expected 128 as the tensor has, or less"),
    ("row_stride", lambda n: 200, r"row_stride: 200 for 4 rows, expected 128"),
]
BAD_TABLE = [
    ("out", lambda t: t[:2], r"out: 2 rows, expected 3 or more"),
    ("out", lambda t: t[0], r"out: shape \(8,\), expected 2 dimensions"),
    ("out", lambda t: t.t(), r"out: stride 8 in the last dimension, expected 1"),
    ("out_stride", lambda n: 13, r"out_stride: 13 for 3 rows, expected 8 as the tensor has, or less"),
    ("page_size", lambda n: 0, r"page_size: 0, expected a power of two from 1 to 4096"),
    ("page_size", lambda n: 48, r"page_size: 48, expected"),
    ("page_size", lambda n: 8192, r"page_size: 8192, expected"),
    ("page_size", lambda n: -64, r"page_size: -64, expected"),
]
BAD_IDS = [
    ("out", lambda t: t[:, None], r"out: shape \(24, 1\), expected 1 dimension$"),
    ("out", lambda t: t[::2], r"out: stride 2 in the last dimension, expected 1"),
]


def call(builder, args):
    names = ("req_to_token", "req_pool", "lens", "indptr", "out")
    if builder is build_page_table:
        names = tuple(name for name in names if name != "indptr")
    return builder(*(args[name] for name in names), **{k: v for k, v in args.items() if k not in (*names, "indptr")})


@pytest.mark.parametrize("name, spoil, message", [*(bad for bad in BAD if bad[0] != "indptr"), *BAD_TABLE])
def test_page_table_misuse(name, spoil, message, launches):
    args = good() | {"out": poisoned(3, 8)}
    args[name] = spoil(args.get(name))
    with pytest.raises(ValueError, match=message):
        call(build_page_table, args)
    assert launches == []


@pytest.mark.parametrize("name, spoil, message", [*BAD, *BAD_IDS])
def test_token_indices_misuse(name, spoil, message, launches):
    args = good() | {"out": poisoned(24)}
    args[name] = spoil(args.get(name))
    with pytest.raises(ValueError, match=message):
        call(build_token_indices, args)
    assert launches == []


def test_good_arguments_are_good():
    call(build_page_table, good() | {"out": poisoned(3, 8)})
    call(build_token_indices, good() | {"out": poisoned(24)})


def test_cpu_tensors_need_the_interpreter(run_python):
    code = """
import torch
from mla_patch.kernels.indices.kv import build_page_table
z = torch.zeros(1, dtype=torch.int32)
try:
    build_page_table(z[None], z, z, z[None])
except ValueError as problem:
    print(problem)
"""
    root = str(Path(kv_indices.__file__).parents[4])
    done = run_python(code, env={"TRITON_INTERPRET": None, "PYTHONPATH": root}, check=True)
    assert done.stdout == "req_to_token: on cpu, expected a CUDA device (or TRITON_INTERPRET=1 at import)\n"


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
@pytest.mark.parametrize("rows, longest", [(1, 131072), (8, 131072), (64, 16384), (256, 4096), (3, 163840)])
def test_real_shapes(rows, longest):
    torch.manual_seed(rows)
    table, pool = slots(rows + 5, 163840), torch.randperm(rows + 5)[:rows].to(DEVICE)
    lens = torch.randint(1, longest + 1, (rows,))
    lens[0] = longest
    indptr, total = starts(lens.tolist(), gap=3)
    check_token_indices(table, pool, lens.to(DEVICE), indptr.to(DEVICE), poisoned(total, dtype=torch.int64))
    for page_size in PAGE_SIZES:
        out = poisoned(rows, -(-longest // page_size) + 2)
        check_page_table(table, pool, lens.to(DEVICE), out, page_size=page_size)


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
def test_a_graph_follows_its_buffers():
    table, pool, lens = slots(16, 4096), ints(range(8)), ints([1] * 8)
    indptr, out, ids = ints(range(8)), poisoned(8, 65), poisoned(8 * 4096)
    build_page_table(table, pool, lens, out)  # compiles, which a capture may not
    build_token_indices(table, pool, lens, indptr, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        build_page_table(table, pool, lens, out)
        build_token_indices(table, pool, lens, indptr, ids)
    for _ in range(3):
        pool.copy_(torch.randperm(16)[:8])
        lens.copy_(torch.randint(0, 4097, (8,)))
        indptr.copy_(lens.cumsum(0) - lens)
        want = page_table_ref(table, pool, lens, out.fill_(POISON))
        want_ids = token_indices_ref(table, pool, lens, indptr, ids.fill_(POISON))
        graph.replay()
        assert torch.equal(out, want) and torch.equal(ids, want_ids)


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
def test_serving_compiles_nothing_new():
    caches = getattr(kv_indices.triton._kv_indices_kernel, "device_caches", None)
    if caches is None:
        pytest.skip("this Triton keeps its compiled kernels elsewhere")

    def serve(rows, width, shift):
        table, lens = slots(rows + 1, width), ints([width // 2] * (rows + shift))[shift:]
        build_page_table(table, lens * 0, lens, poisoned(rows, width // 64 + 1 + shift))
        build_token_indices(table, lens * 0, lens, lens * 0, poisoned(shift + width)[shift:])

    serve(8, 4096, 0)
    before = sum(len(cache[0]) for cache in caches.values())
    for rows, width, shift in [(1, 4097, 1), (2, 4096, 1), (16, 64, 0), (3, 1000, 3), (1, 1, 0)]:
        serve(rows, width, shift)
    assert sum(len(cache[0]) for cache in caches.values()) == before
