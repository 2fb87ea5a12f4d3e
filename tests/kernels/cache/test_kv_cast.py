"""Rows of an 8-bit cache in 16 bits, exactly: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import pytest
import torch

from mla_patch.compat.triton import interpreted
from mla_patch.kernels.cache.kv_cast import cast_config, cast_pages, cast_pages_ref
from mla_patch.kernels.common.constants import WIDTH

DEVICE = "cpu" if interpreted() else "cuda"
EIGHT = [torch.float8_e4m3fn, torch.float8_e5m2]
POISON = -12345  # what a 16-bit row holds that is not written: bits of a finite number


def cache_of(rows, dtype=torch.float8_e4m3fn, stride=WIDTH):
    """Rows of random bytes, so NaN and infinity among them, in a buffer whose other bytes are NaN."""
    raw = torch.full((rows, stride), 0x7F, dtype=torch.uint8)
    raw[:, :WIDTH] = torch.randint(0, 256, (rows, WIDTH), dtype=torch.uint8)
    return raw.to(DEVICE).view(dtype)[:, None, :WIDTH]


def ints(rows, dtype=torch.int32):
    return torch.tensor(rows, dtype=dtype, device=DEVICE)


def poisoned(rows, dtype):
    return torch.full((rows, 1, WIDTH), POISON, dtype=torch.int16, device=DEVICE).view(dtype)


def check(cache, table, lens, *, page_size, dtype=torch.bfloat16, compact=False, first=0, config=None):
    """Every row and place that the definition names, and not one bit beside them."""
    pages = first + table.numel()
    out = poisoned((pages + 1) * page_size if compact else len(cache), dtype)
    places = torch.full_like(table, -7, memory_format=torch.contiguous_format) if compact else None
    cast_pages(cache, table, lens, out, page_size=page_size, places=places, first=first, config=config)
    rows, named = cast_pages_ref(cache, table, lens, dtype, page_size=page_size, places=compact, first=first)
    want = poisoned(len(out), dtype)
    for row, values in rows.items():
        want[row, 0] = values
    # NaN has several codes
    left, right = (torch.where(x.isnan(), float("nan"), x).view(torch.int16) for x in (out, want))
    assert torch.equal(left, right)
    if places is not None:
        found = {(b, c): places[b, c].item() for b in range(len(table)) for c in range(table.shape[1])}
        assert found == dict.fromkeys(found, -7) | named
    return out, places


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("eight", EIGHT, ids=str)
def test_every_code_is_what_torch_makes_of_it(eight, dtype):
    codes = torch.arange(2 * WIDTH).remainder(256).to(torch.uint8).to(DEVICE)
    cache = codes.view(2, 1, WIDTH).view(eight)
    assert len(cache.view(torch.uint8).unique()) == 256
    out, _ = check(cache, ints([[0, 1]]), None, page_size=1, dtype=dtype)
    torch.testing.assert_close(out, cache.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("compact", [False, True], ids=["own numbers", "places"])
@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_tables_with_lengths(page_size, compact):
    """A long request, one that ends inside a page, one that fills its table, one of a token, and two of nothing."""
    cache = cache_of(40 * page_size, stride=640)
    table = torch.randperm(40)[:30].int().view(6, 5).to(DEVICE)
    lens = ints([4 * page_size, 2 * page_size + 1, 5 * page_size, 1, 0, -9])
    check(cache, table, lens, page_size=page_size, compact=compact, first=3 if compact else 0)


@pytest.mark.parametrize("compact", [False, True], ids=["own numbers", "places"])
def test_a_list_of_slots_without_lengths(compact):
    slots = ints([[7, 3, 3, 0, 39, -1, 40, -(2**31), 2**31 - 1, 12]])  # twice, and four times nowhere
    out, places = check(cache_of(40), slots, None, page_size=1, compact=compact)
    if places is not None:
        assert places.tolist() == [list(range(10))]
        assert (out[[5, 6, 7, 8]].view(torch.int16) == POISON).all()


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_lengths_beyond_the_table(kind):
    lens = ints([2**31 - 1, 2 if kind is torch.int32 else 2**40], kind)
    check(cache_of(16), torch.randperm(16)[:8].int().view(2, 4).to(DEVICE), lens, page_size=1, compact=True)


@pytest.mark.parametrize("programs, least, rows", [(1, 1, 2), (7, 2, 16), (64, 64, 8)])
def test_any_number_of_programs(programs, least, rows):
    config = {"ROWS": rows, "PROGRAMS": programs, "MIN_PROGRAMS": least, "num_warps": 1}
    table = torch.randperm(64)[:42].int().view(3, 14).to(DEVICE)
    check(cache_of(128), table, ints([28, 5, 17]), page_size=2, config=config)
    check(cache_of(128), table, ints([28, 5, 17]), page_size=2, compact=True, config=config)


def test_views_of_tables():
    """As engines have them: a row of a wider table, and one column of it, whose only stride is the row's."""
    wide = torch.randperm(60).int().view(4, 15).to(DEVICE)
    check(cache_of(60), wide[1:3, 2:9], ints([7, 3]), page_size=1, compact=True)
    check(cache_of(60), wide[:, :1], ints([1, 1, 0, 1]), page_size=1)


def test_nothing_to_do_launches_nothing():
    for batch, width in ((0, 4), (3, 0)):
        check(cache_of(8), torch.empty(batch, width, dtype=torch.int32, device=DEVICE), None, page_size=1)


BAD = [
    ({"cache": lambda: cache_of(8).view(torch.uint8)}, "cache: torch.uint8"),
    ({"cache": lambda: cache_of(8)[..., :512]}, "cache: "),
    ({"cache": lambda: cache_of(8).expand(8, 2, WIDTH)}, "cache: "),
    ({"out": lambda: poisoned(8, torch.int16)}, "out: torch.int16"),
    ({"out": lambda: poisoned(7, torch.bfloat16)}, "out: 7 rows, expected at least 8"),
    ({"table": lambda: ints([[1]], torch.int64)}, "table: "),
    ({"table": lambda: ints([1])}, "table: "),
    ({"table": lambda: ints([[0, 1], [2, 3]]).T}, "table: "),
    ({"lens": lambda: ints([1, 1])}, "lens: "),
    ({"lens": lambda: ints([1.0], torch.float32)}, "lens: "),
    ({"page_size": lambda: 3}, "page_size: 3"),
    ({"page_size": lambda: 0}, "page_size: 0"),
    ({"first": lambda: -1}, "first: -1"),
    ({"places": lambda: ints([[0, 0]])}, "places: "),
    ({"places": lambda: ints([[0]], torch.int64)}, "places: "),
    ({"places": lambda: ints([[0]]), "first": lambda: 8}, "out: 8 rows, expected at least 9"),
    ({"first": lambda: 2**31 - 1}, "table: 1 x 1 pages from 2147483647"),
]


@pytest.mark.parametrize("wrong, text", BAD, ids=[text.rstrip(": ") + str(at) for at, (_, text) in enumerate(BAD)])
def test_misuse_is_named(wrong, text):
    call = {"cache": cache_of(8), "table": ints([[1]]), "lens": ints([1]), "out": poisoned(8, torch.bfloat16)}
    call |= {"page_size": 1} | {name: make() for name, make in wrong.items()}
    before = call["out"].clone()
    with pytest.raises(ValueError, match="^" + text):
        cast_pages(**call)
    assert torch.equal(call["out"].view(torch.int16), before.view(torch.int16))


def test_launch_numbers():
    assert cast_config() == {"ROWS": 16, "PROGRAMS": 2048, "MIN_PROGRAMS": 64, "num_warps": 4}


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
def test_a_captured_cast_follows_its_tensors():
    """Captured at lengths of 1, replayed at others and with another table."""
    cache, table, lens = cache_of(4096), torch.zeros(3, 1000, dtype=torch.int32, device=DEVICE), ints([1, 1, 1])
    out, places = poisoned(3000, torch.bfloat16), torch.full_like(table, -7)
    cast_pages(cache, table, lens, out, page_size=1, places=places)  # compiled before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cast_pages(cache, table, lens, out, page_size=1, places=places)
    table.copy_(torch.randperm(4096)[:3000].view(3, 1000))
    lens.copy_(torch.tensor([1000, 0, 321]))
    out.view(torch.int16).fill_(POISON)
    graph.replay()
    for b, length in enumerate([1000, 0, 321]):
        want = cache[table[b, :length].long()].to(torch.bfloat16)
        got = out[b * 1000 : b * 1000 + length]
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert (out[b * 1000 + length : (b + 1) * 1000].view(torch.int16) == POISON).all()
