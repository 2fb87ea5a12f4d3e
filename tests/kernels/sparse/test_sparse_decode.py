"""Sparse fp8 decode against its definition: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from unittest import mock

import pytest
import torch
from scratch import TESTS, clean_env
from test_decode import odd

from mla_patch.compat.triton import interpreted
from mla_patch.kernels.cache.dequantize import dequantize_ref
from mla_patch.kernels.cache.layouts import V4, V32, new_pages
from mla_patch.kernels.cache.quantize import quantize
from mla_patch.kernels.sparse import decode as module
from mla_patch.kernels.sparse import launch, reference, sparse_decode, sparse_decode_ref
from mla_patch.kernels.sparse.config import SM90_MIN_HEADS, sparse_config, split_count

CPU_SECONDS = 220  # see budget.py

DEVICE = "cpu" if interpreted() else "cuda"
LAYOUTS = pytest.mark.parametrize("layout", [V32, V4], ids=lambda layout: layout.name)


def make_cache(layout, pages, page_size, used, gain=1.0):
    """Pages of which ``used`` tokens are stored; all other bytes are NaN, in values, scales and rope."""
    cache = new_pages(layout, pages, page_size, DEVICE)
    cache.as_strided((cache.untyped_storage().nbytes(),), (1,)).fill_(0xFF)
    slots = torch.randperm(pages * page_size)[:used].to(DEVICE)
    x = torch.randn(used, layout.width) * torch.exp2(torch.randn(used, 1) * gain)
    quantize(x.to(DEVICE), cache, slots)
    return cache, slots.int()


class Case:
    """Queries over a cache whose unstored slots are NaN; ``holes`` of the indices name no slot."""

    def __init__(self, layout, batch=2, queries=1, heads=3, topk=70, page_size=16, holes=0.0, extra=None, used=40):
        self.layout = layout
        self.q = (torch.randn(batch, queries, heads, layout.width) / 4).bfloat16().to(DEVICE)
        self.cache, self.slots = make_cache(layout, -(-(used + 9) // page_size), page_size, used)
        self.indices = self.pick(self.slots, (batch, queries, topk), holes, self.cache)
        self.options = {"sm_scale": layout.width**-0.5}
        if extra is not None:
            size, count = extra
            cache, slots = make_cache(layout, -(-(used + 9) // size), size, used)
            ids = self.pick(slots, (batch, queries, count), holes, cache)
            self.options |= {"extra_k_cache": cache, "extra_indices": ids}

    @staticmethod
    def pick(slots, shape, holes, cache):
        ids = slots[torch.randint(0, len(slots), shape).to(DEVICE)]
        end = cache.shape[0] * cache.shape[1]
        nowhere = torch.tensor([-1, -(2**31), end, 2**31 - 1, -1], device=DEVICE, dtype=torch.int32)
        gone = torch.rand(shape) < holes
        return torch.where(gone.to(DEVICE), nowhere[torch.randint(0, 5, shape).to(DEVICE)], ids).contiguous()

    def run(self, **options):
        return sparse_decode(self.q, self.cache, self.indices, **self.options, **options)

    def check(self, tolerance=4e-3, **options):
        out, lse = self.run(**options)
        options.pop("config", None)
        with keys_as_multiplied(self.layout, self.q):
            want, want_lse = sparse_decode_ref(self.q, self.cache, self.indices, **self.options, **options)
        compare(out, lse, want, want_lse, tolerance)
        return out, lse


def wide(q):
    return q.shape[-2] >= SM90_MIN_HEADS and q.is_cuda and module.gpu.capability(q.device.index) == (9, 0)


def keys_as_multiplied(layout, q):
    """sparse_sm90 rounds V3.2's keys to bfloat16, as FlashMLA does: how far that takes a sharp softmax is not its
    fault, so its definition has them rounded, too."""
    if layout is V4 or not wide(q):
        return contextlib.nullcontext()
    return mock.patch.object(reference, "dequantize_ref", lambda *args: dequantize_ref(*args).bfloat16().double())


def compare(out, lse, want, want_lse, tolerance=4e-3):
    # infinities in the same places; the rest within the rounding of 16-bit weights and of a bfloat16 result. V3.2's
    # values are rounded to float16, whose 2**-12 of a score of 1 shows in the log-sum-exp: a score's parts are up to 8
    # times as large, and cancel
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), want_lse, rtol=8 / 65536, atol=32 * 2**-12)
    assert torch.isfinite(out).all()
    for b in range(len(want)):
        assert (out[b].double() - want[b]).norm() <= tolerance * want[b].norm(), f"request {b}"


def as_flash_mla_checks(out, lse, want, want_lse, absolute=1e-3):
    """FlashMLA's own bounds, one of which each element must keep: by numbers, and of out as a whole by its cosine."""
    for got, exact, atol, rtol in ((out, want, absolute, 2.01 / 128), (lse, want_lse, 1e-6, 8.01 / 65536)):
        got = got.double()
        assert torch.equal(got.isinf(), exact.isinf()) and not got.isnan().any()
        off = torch.where(exact.isinf(), 0.0, (got - exact).abs())
        assert ((off <= atol) | (off <= rtol * exact.abs())).all(), off.max()
    assert 1 - 2 * (out.double() * want).sum() / (out.double() ** 2 + want**2).sum() <= 5e-6


# every two of them together
@pytest.mark.parametrize(
    ("layout", "topk", "more"),
    [(V32, 1, True), (V32, 2, False), (V32, 64, True), (V4, 1, False), (V4, 2, True), (V4, 64, False)],
    ids=["V3.2-1-more", "V3.2-2", "V3.2-64-more", "V4-1", "V4-2-more", "V4-64"],
)
def test_the_bounds_of_flash_mla(layout, topk, more):
    """Over values as its tests draw them, against exact ones. Scales are powers of two there: others are rounded."""
    cache = new_pages(layout, 4, 64, DEVICE)
    x = (torch.randn(256, layout.width) / 10).clamp(-0.8, 0.8)
    x[:, : layout.nope : layout.tile] = 448 * 2**-9
    quantize(x.to(DEVICE), cache, torch.arange(256, device=DEVICE))
    q = (torch.randn(2, 2, 4, layout.width) / 10).clamp(-1, 1).bfloat16().to(DEVICE)
    ids = torch.randint(-1, 256, (2, 2, topk), device=DEVICE).int()
    ids[0, 0, 0] = -1
    options = {"sm_scale": layout.width**-0.5}
    if more:
        options |= {"attn_sink": torch.randn(4, device=DEVICE), "extra_k_cache": cache, "extra_indices": ids.flip(-1)}
        options |= {"topk_length": torch.tensor([1, topk - 1], device=DEVICE).int()}
    as_flash_mla_checks(*sparse_decode(q, cache, ids, **options), *sparse_decode_ref(q, cache, ids, **options))


@LAYOUTS
@pytest.mark.parametrize("heads", [1, 17, 128])
def test_heads(layout, heads):
    Case(layout, batch=1, heads=heads, topk=40).check()


@LAYOUTS
@pytest.mark.parametrize("page_size", [1, 61, 64])
def test_page_sizes(layout, page_size):
    case = Case(layout, page_size=page_size, holes=0.2, used=130, extra=(2, 33))
    assert case.cache.shape[1] == page_size
    case.check()


@LAYOUTS
@pytest.mark.parametrize("topk, holes", [(0, 0.0), (1, 0.0), (31, 0.5), (32, 0.0), (33, 0.5), (64, 1.0), (200, 0.3)])
def test_indices(layout, topk, holes):
    Case(layout, topk=topk, holes=holes).check()


@LAYOUTS
def test_a_hole_is_no_neighbour(layout):
    """All of a request's keys at the very end of its list, behind holes of every kind."""
    case = Case(layout, topk=100)
    case.indices[0, 0, :-1] = torch.tensor([-1, 2**31 - 1, -7], dtype=torch.int32, device=DEVICE).repeat(33)
    case.indices[1] = -1
    out, lse = case.check()
    assert (out[1] == 0).all() and (lse[1] == math.inf).all()


@LAYOUTS
@pytest.mark.parametrize("queries", [1, 3])
def test_lengths_and_extra_cache(layout, queries):
    case = Case(layout, batch=5, queries=queries, topk=80, extra=(2, 70))
    lens = torch.tensor([0, 80, 33, 0, 1000], dtype=torch.int32, device=DEVICE)
    extra = torch.tensor([70, 0, 31, 0, -5], dtype=torch.int32, device=DEVICE)
    # what lies beyond a length may be anything
    for ids, most in ((case.indices, lens), (case.options["extra_indices"], extra)):
        ids[torch.arange(ids.shape[-1], device=DEVICE).expand(ids.shape) >= most[:, None, None]] = 3
    out, lse = case.check(topk_length=lens, extra_topk_length=extra.long(), attn_sink=torch.randn(3, device=DEVICE))
    assert (out[3] == 0).all() and (lse[3] == math.inf).all()
    assert lse.shape == (5, 3, queries) and lse.transpose(1, 2).is_contiguous()


@LAYOUTS
@pytest.mark.parametrize("splits", [1, 8])
def test_any_cut_of_the_work(layout, splits, monkeypatch):
    monkeypatch.setattr(launch, "split_count", lambda tiles, blocks, slots: splits)
    case = Case(layout, batch=3, topk=130, holes=0.3, extra=(16, 70))
    lens = torch.tensor([130, 5, 0], dtype=torch.int32, device=DEVICE)
    extra = torch.tensor([1, 64, 0], dtype=torch.int32, device=DEVICE)
    sinks = torch.tensor([0.5, math.inf, -math.inf], device=DEVICE)
    out, lse = case.check(topk_length=lens, extra_topk_length=extra, attn_sink=sinks)
    assert (out[:, :, 1] == 0).all() and torch.isfinite(lse[:2]).all()
    plain, same = case.run(topk_length=lens, extra_topk_length=extra)
    assert torch.equal(plain[:, :, 2], out[:, :, 2]) and torch.equal(same, lse)


@LAYOUTS
def test_scores_that_are_far_apart(layout):
    """Peaked softmax, scales of tokens and of tiles that differ by much, a token of zeros among them."""
    case = Case(layout, batch=1, topk=128, used=120)
    x = torch.randn(120, layout.width) * torch.exp2(torch.randint(-12, 3, (120, 1)).float())
    x[:, : layout.tile] *= torch.exp2(torch.randint(-8, 8, (120, 1)).float())
    x[5, : layout.nope] = 0
    x[6] = 0
    quantize(x.to(DEVICE), case.cache, case.slots)
    case.indices[0, 0, :120] = case.slots
    for gain in (1, 8, 64):
        case.q = (torch.randn(1, 1, 3, layout.width) * gain / 4).bfloat16().to(DEVICE)
        case.check()
    case.indices[0, 0] = case.slots[6]
    out, lse = case.run()
    assert (out == 0).all()
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(128)))


@LAYOUTS
@pytest.mark.parametrize("heads", [3, 40])
def test_queries_at_odd_addresses(layout, heads):
    case = Case(layout, heads=heads, topk=40)
    want, want_lse = case.run()
    case.q = odd(case.q)
    out, lse = case.run()
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


@LAYOUTS
def test_one_key_is_its_value(layout):
    case = Case(layout, batch=4, topk=1)
    out, _ = case.run()
    want, _ = sparse_decode_ref(case.q, case.cache, case.indices, **case.options)
    # V4's values are exact; V3.2's scales are not powers of two, and one rounding to float16 comes before bfloat16's
    torch.testing.assert_close(out, want.bfloat16(), rtol=0.0 if layout is V4 else 2**-7, atol=0.0)


@LAYOUTS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_heads_know_nothing_of_one_another(layout, bad):
    case = Case(layout, heads=5, topk=40)
    clean, clean_lse = case.run()
    case.q[:, :, 2] = bad
    out, lse = case.run()
    others = [0, 1, 3, 4]
    assert torch.equal(out[:, :, others], clean[:, :, others]) and torch.equal(lse[:, others], clean_lse[:, others])
    assert torch.isnan(out[:, :, 2]).any()


@LAYOUTS
def test_a_nan_that_is_asked_for_is_not_hidden(layout):
    case = Case(layout, topk=40)
    free = set(range(case.cache.shape[0] * case.cache.shape[1])) - set(case.slots.tolist())
    case.indices[0, 0, 7] = min(free)
    out, _ = case.run()
    assert torch.isnan(out[0]).all() and torch.isfinite(out[1]).all()


@LAYOUTS
def test_strided_and_read_only(layout):
    case = Case(layout, batch=3, queries=2, topk=40)
    want, want_lse = case.run()
    wide = torch.randn(3, 4, 6, 640, device=DEVICE).bfloat16()
    view = wide[:, ::2, 1:4, : layout.width].copy_(case.q)
    ids = torch.full((3, 2, 64), -9, dtype=torch.int32, device=DEVICE)
    ids[..., :40] = case.indices
    case.q, case.indices = view, ids[..., :40]
    before = case.cache.clone()
    out, lse = case.run()
    assert torch.equal(out, want) and torch.equal(lse, want_lse) and torch.equal(case.cache, before)
    case.cache = case.cache.view(torch.float8_e4m3fn)
    assert torch.equal(case.run()[0], want)


@LAYOUTS
def test_nothing_to_do(layout):
    case = Case(layout, topk=8)
    for q, ids in ((case.q[:0], case.indices[:0]), (case.q[:, :0], case.indices[:, :0])):
        out, lse = sparse_decode(q, case.cache, ids, **case.options)
        assert out.shape == (*q.shape[:3], 512) and lse.shape == (q.shape[0], 3, q.shape[1])
    empty = new_pages(layout, 0, 4, DEVICE)
    out, lse = sparse_decode(case.q, empty, case.indices, **case.options)
    assert (out == 0).all() and (lse == math.inf).all()


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("q", lambda x: x[0], r"q: shape \(1, 3, 576\), strides .*, expected \[B, Sq, H, 576 or 512\]"),
        ("q", lambda x: x[..., :512], "q: 512 wide beside 656 bytes a token, expected 576"),
        ("q", lambda x: x.half(), "q: torch.float16, expected torch.bfloat16"),
        ("q", lambda x: x.repeat(1, 1, 43, 1), "q: 129 heads, expected 1 to 128"),
        ("k_cache", lambda x: x.bfloat16(), r"k_cache: torch.bfloat16, shape .*, expected"),
        ("indices", lambda x: x.long(), r"indices: torch.int64, .* expected torch.int32, \[2, 1, topk\]"),
        ("indices", lambda x: x[:1], r"indices: .*shape \(1, 1, 8\)"),
        ("indices", lambda x: x.repeat(1, 1, 2)[..., ::2], "indices: stride 2 in the last dimension, expected 1"),
        ("attn_sink", lambda x: torch.zeros(4, device=DEVICE), r"attn_sink: .*, expected a float for each of 3 heads"),
        ("topk_length", lambda x: torch.zeros(3, device=DEVICE).int(), r"topk_length: .*\(3,\), .*expected .* \[2\]"),
        ("extra_k_cache", lambda x: new_pages(V32, 1, 4, DEVICE), "extra_indices: None, expected a tensor"),
        ("extra_indices", lambda x: torch.zeros(2, 1, 4, device=DEVICE).int(), "extra_k_cache: None"),
        ("extra_topk_length", lambda x: torch.zeros(2, device=DEVICE).int(), "extra_topk_length: given"),
    ],
)
def test_misuse(name, spoil, message):
    case = Case(V32, topk=8)
    args = {"q": case.q, "k_cache": case.cache, "indices": case.indices, **case.options}
    args[name] = spoil(args.get(name))
    with pytest.raises(ValueError, match=message):
        sparse_decode(**args)


def test_an_extra_cache_of_another_layout_is_refused():
    case = Case(V32, topk=8)
    extra = {"extra_k_cache": new_pages(V4, 1, 4, DEVICE), "extra_indices": case.indices}
    with pytest.raises(ValueError, match="extra_k_cache: 584 bytes a token, expected 656"):
        case.run(**extra)


def test_how_work_is_shared():
    assert split_count(128, 64, 132) == 1  # a program for every multiprocessor
    assert split_count(64, 64, 132) == 2
    assert split_count(1, 64, 132) > 8
    assert split_count(1000, 64, 132) == 1 and split_count(4, 0, 132) == 1 and split_count(1, 1, 132) == 1
    assert sparse_config(64, (9, 0))["BLOCK_H"] == 64 and sparse_config(16, (9, 0))["BLOCK_H"] == 16


SERVE = """
import sys
sys.path.insert(0, TESTS)
import fake_chip
import torch
from mla_patch.compat.compiles import COMPILES
from mla_patch.kernels.sparse import decode as module
from mla_patch.kernels.cache.dequantize import dequantize_ref
from mla_patch.kernels.cache.layouts import V4, V32, new_pages
fake_chip.install()
COMPILES.has_served = lambda: True

def serve(layout, heads, batch, topk, page, extra):
    q = torch.zeros(1, dtype=torch.bfloat16).expand(batch * heads * layout.width).clone()
    ids, lens = torch.zeros(batch, 1, topk).int(), torch.ones(batch).int()
    options = {} if layout is V32 else {"attn_sink": torch.zeros(heads), "topk_length": lens}
    if extra:
        options |= {"extra_k_cache": new_pages(layout, 3, extra), "extra_indices": ids[..., :64].contiguous()}
        options |= {"extra_topk_length": lens}
    q = q.view(batch, 1, heads, layout.width)
    module.sparse_decode(q, new_pages(layout, 3, page), ids, sm_scale=0.1, **options)

for fake_chip.SM in (80, 90, 120):
    for heads in (16, 64, 128):
        for layout, pages, extra in ((V32, (), ()), (V4, (256,), (64, 2))):
            COMPILES.reset()
            warmed = module.warmup("cpu", heads, pages, extra)
            for batch in (1, 2, 3, 7, 16, 33, 64, 100, 264):
                for topk in (64, 128, 2048):
                    for second in (0, *extra):
                        serve(layout, heads, batch, topk, *(pages or (64,)), second)
            print(fake_chip.SM, heads, layout.name, 0 < warmed == COMPILES.before, COMPILES.serving)
serve(V4, 20, 3, 64, 256, 0)
print("unforeseen", COMPILES.serving > 0)
"""


def test_nothing_compiles_after_a_warm_up():
    tests = TESTS
    code = SERVE.replace("TESTS", repr(str(tests)))
    env = clean_env({"TRITON_INTERPRET": "0"})
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *rows, unforeseen = done.stdout.splitlines()
    # one tile of heads on sm_80 and sm_120, two on sm_90, each of both layouts; 128 heads are tiles of 64
    assert len(rows) == 18 and not [row for row in rows if not row.endswith(" 0")], rows
    assert sum("True 0" in row for row in rows) == 8 and unforeseen == "unforeseen True"


class Launches:
    """A kernel that notes what it was launched with."""

    def __init__(self, seen, name):
        self.seen, self.name = seen, name

    def __getitem__(self, grid):
        return lambda *args, **numbers: self.seen.append((self.name, grid, args, numbers))


@pytest.mark.parametrize(
    "heads, change, name, grid",
    [
        (17, "", "wide", 4),
        (16, "", "own", 4),
        (128, "", "wide", 8),
        (128, "scale", "own", 8),
        (128, "sm_100", "own", 8),
        (128, "no Gluon", "own", 8),
        (128, "config", "own", 32),
        (128, "odd q", "wide", 8),
        (16, "odd q", "own", 4),
    ],
)
@LAYOUTS
def test_which_kernel_has_a_call(layout, heads, change, name, grid, monkeypatch):
    """sparse_sm90 takes more heads than 16, the portable one the others."""
    seen = []
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr("mla_patch.kernels.common.launch.INTERPRETED", False)
    monkeypatch.setattr(launch, "_sm90_kernel", lambda: (Launches(seen, "wide"), 5))
    for own in ("sparse_query_kernel", "sparse_kernel"):
        monkeypatch.setattr(module, own, Launches(seen, own))
    monkeypatch.setattr(launch, "sparse_merge_kernel", Launches(seen, "sparse_merge_kernel"))
    monkeypatch.setattr(launch, "HAS_GLUON", change != "no Gluon")
    monkeypatch.setattr(module.gpu, "on_other_device", lambda q: False)
    monkeypatch.setattr(module.gpu, "capability", lambda index: (10, 0) if change == "sm_100" else (9, 0))
    monkeypatch.setattr(module.gpu, "sm_count", lambda index: 4)
    monkeypatch.setattr(launch, "split_count", lambda *sizes: 2)
    monkeypatch.setattr(module, "check_q", lambda q: None)
    cache = new_pages(layout, 3, 16, "cpu")
    q = torch.zeros(2, 1, heads, layout.width, dtype=torch.bfloat16)
    q = odd(q) if change == "odd q" else q
    config = {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 1, "PER_SM": 1, "num_warps": 4} if change == "config" else None
    ids = torch.zeros(2, 1, 40, dtype=torch.int32)
    sparse_decode(q, cache, ids, sm_scale=-1.0 if change == "scale" else 1.0, config=config)
    kernels = [kernel for kernel, *_ in seen]
    assert kernels[-1] == "sparse_merge_kernel"
    assert kernels[:-1] == (["wide"] if name == "wide" else ["sparse_query_kernel", "sparse_kernel"])
    assert seen[0][2][0].data_ptr() % 16 == 0  # both kernels rely on it
    _, launched, args, numbers = seen[-2]
    assert launched == (grid,) and numbers["MERGE"]
    if name == "wide":
        assert args[1].dtype == torch.int32 and numbers["KEY"] == 5 and numbers["WIDTH"] == layout.width
        assert numbers["PAGE"] == (1 if layout is V32 else 16)
        assert args[25] * 16 == (656 if layout is V32 else layout.page_bytes(16))


def tokens_of_two_scales(layout, apart):
    """Two tokens whose first tile's scale is 2**apart of the others', with every finite e4m3 code in each tile."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.where(codes & 0x7F == 0x7F, 0x30, codes)
    values = torch.stack([codes.repeat(2), codes.flip(0).repeat(2)])[:, : layout.nope]
    cache = new_pages(layout, 1, 2, DEVICE)
    raw = cache.as_strided((2 * layout.bytes,), (1,))
    for token in range(2):
        if layout is V32:
            scales = torch.tensor([1.0, *[2.0**-apart * (1 + token / 3)] * 3])
            row = torch.cat([values[token], scales.view(torch.uint8)])
            raw[token * 656 : token * 656 + 528] = row.to(DEVICE)
        else:
            raw[token * 576 : token * 576 + 448] = values[token].to(DEVICE)
            at = 2 * 576 + token * 8
            raw[at : at + 7] = torch.tensor([127, *[127 - apart] * 6], dtype=torch.uint8, device=DEVICE)
    return cache


@LAYOUTS
@pytest.mark.parametrize("apart", [0, 15, 16, 22, 26, 40])
def test_scales_that_lie_far_apart_in_a_token(layout, apart):
    """What the module says of them: of a query with one key, the result is that key's value."""
    cache = tokens_of_two_scales(layout, apart)
    q = torch.zeros(1, 2, 3, layout.width, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.tensor([[[0], [1]]], dtype=torch.int32, device=DEVICE)
    out, _ = sparse_decode(q, cache, ids, sm_scale=1.0)
    want = dequantize_ref(cache, ids.flatten().long())[:, None, :512].expand(2, 3, 512)
    got = out[0].double()
    exact = want.bfloat16().double()
    powers = slice(None) if layout is V4 else slice(0, 1)  # V3.2's second token has other scales
    if apart <= 15:
        assert torch.equal(got[powers], exact[powers])
    elif apart == 16:
        assert not torch.equal(got[powers], exact[powers])  # where the bound begins
    # the token's largest scale is 1; the rest is bfloat16's rounding of the result
    bound = 448 * 2.0**-25 + (2.0**-12 + 2.0**-8) * want.abs()
    assert ((got - want).abs() <= bound).all()
    if apart == 40:
        assert (got[..., layout.tile : layout.nope] == 0).all()  # all of the small tiles


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")


@gpu
@needs_gpu
@pytest.mark.parametrize("heads", [16, 20, 64, 128])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_real_shapes(batch, heads):
    Case(V32, batch, 1, heads, 2048, 64, 0.02, used=9000).check()
    Case(V4, batch, 1, heads, 128, 256, 0.02, extra=(64, 512), used=9000).check(
        attn_sink=torch.randn(heads, device=DEVICE)
    )


@gpu
@needs_gpu
@LAYOUTS
def test_a_graph_follows_its_lengths(layout):
    """Captured with one key each and replayed with other lengths."""
    case = Case(layout, 9, 1, 64, 512, 64, extra=(64, 128), used=2000)
    lens = {name: torch.ones(9, dtype=torch.int32, device=DEVICE) for name in ("topk_length", "extra_topk_length")}
    case.run(**lens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = case.run(**lens)
    for _ in range(3):
        lens["topk_length"].copy_(torch.randint(0, 513, (9,)))
        lens["extra_topk_length"].copy_(torch.randint(0, 129, (9,)))
        graph.replay()
        with keys_as_multiplied(layout, case.q):
            want = sparse_decode_ref(case.q, case.cache, case.indices, **case.options, **lens)
        compare(out, lse, *want)


@gpu
@needs_gpu
@LAYOUTS
def test_the_conversion_without_the_instruction(layout, monkeypatch):
    """What sm_80 and sm_86 run."""
    monkeypatch.setattr(module.gpu, "capability", lambda index: (8, 0))
    Case(layout, 3, 2, 20, 200, 64, 0.1, extra=(2, 70)).check()


@pytest.mark.xdist_group("much memory")
@gpu
@needs_gpu
@LAYOUTS
@pytest.mark.parametrize("heads", [16, 64])
def test_a_pool_beyond_31_bits(layout, heads):
    """The last pages of 9 GB, which are counted in 16 bits, and above 16 heads, on sm_90, in 32."""
    pages = 9 * 2**30 // layout.page_bytes(64)
    case = Case(layout, 2, 1, heads, 64, 64)
    cache = new_pages(layout, pages, 64, DEVICE)
    slots = torch.arange(pages * 64 - 90, pages * 64, device=DEVICE)
    quantize(torch.randn(90, layout.width, device=DEVICE), cache, slots)
    case.cache, case.indices = cache, slots.int()[torch.randint(0, 90, (2, 1, 64), device=DEVICE)]
    case.check()
