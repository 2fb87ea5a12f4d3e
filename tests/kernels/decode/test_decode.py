"""MLA decode against its definition: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_patch.compat import gpu
from mla_patch.compat.triton import interpreted
from mla_patch.kernels.common import launch as common_launch
from mla_patch.kernels.decode import config as numbers_module
from mla_patch.kernels.decode import (
    decode_config,
    merge_config,
    mla_decode,
    mla_decode_paged,
    mla_decode_ref,
    remembered,
)
from mla_patch.kernels.decode import launch as launch_module

CPU_SECONDS = 320  # see budget.py

DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = [torch.float16, torch.bfloat16]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALE = 576**-0.5


class Case:
    """A batch over a cache whose unowned rows are NaN, as unwritten slots of a pool may be."""

    def __init__(self, lens, heads, dtype=DTYPES[0], cache=None, index=torch.int64, gain=1.0, spare=7):
        rows = sum(max(n, 0) for n in lens)
        self.lens = lens
        self.q = (torch.randn(len(lens), heads, 576) * gain).to(DEVICE, dtype)
        kv = torch.full((rows + spare, 1, 576), math.nan)
        slots = torch.randperm(rows + spare)[:rows]
        kv[slots] = torch.randn(rows, 1, 576)
        self.kv = kv.to(cache or dtype).to(DEVICE)
        self.ids = slots.to(DEVICE, index)
        self.indptr = torch.tensor([0, *lens]).cumsum(0).to(DEVICE, torch.int32)
        self.out = torch.full((len(lens), heads, 512), math.nan, dtype=dtype, device=DEVICE)

    def run(self, **options):
        got = mla_decode(self.q, self.kv, self.out, self.indptr, self.ids, sm_scale=SCALE, **options)
        assert got is self.out
        return got

    def check(self, **options):
        got = self.run(**options).double()
        options.pop("config", None)
        options.pop("lse", None)
        want = mla_decode_ref(self.q, self.kv, self.indptr, self.ids, sm_scale=SCALE, **options)
        assert torch.isfinite(got).all()
        for b, length in enumerate(self.lens):
            if length <= 0:
                assert (got[b] == 0).all()
            else:
                # q and the probabilities are 16-bit: bfloat16's 2**-9 of each, and the rounding of the output
                assert (got[b] - want[b]).norm() <= 4e-3 * want[b].norm(), f"request {b} of {length}"


def test_caches_and_types():
    for dtype in DTYPES:
        for cache in (None, E4M3, E5M2):
            Case([70, 1, 0, 33], 3, dtype, cache).check()


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 17, 20, 32, 40, 64, 128])
def test_heads(heads):
    Case([37, 5], heads, cache=E4M3 if heads % 2 else None).check()


@pytest.mark.parametrize("cache", [None, E4M3], ids=str)
@pytest.mark.parametrize(
    "lens",
    [[1], [31], [32], [33], [200], [0], [0, 0], [0, 64, 0], [1, 1, 1], [300, 2, 1, 0, 40], [5] * 40, [1, 700]],
    ids=str,
)
def test_lengths(lens, cache):
    Case(lens, 2, cache=cache).check()


def test_bounds_that_run_backwards_own_nothing():
    case = Case([5, 9], 2)
    case.indptr = torch.tensor([5, 2, 11], dtype=torch.int32, device=DEVICE)
    got = case.run().double()
    want = mla_decode_ref(case.q, case.kv, case.indptr, case.ids, sm_scale=SCALE)
    assert (got[0] == 0).all() and (got - want).norm() <= 4e-3 * want.norm()


@pytest.mark.parametrize("programs", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("lens", [[500], [96, 64, 32], [3, 400, 3], [32] * 9, [250, 0, 250, 1]], ids=str)
def test_any_cut_of_the_work(programs, lens):
    """Requests that one program has, that two share, that many share, that begin where a piece begins."""
    config = {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 1, "PER_SM": programs, "num_warps": 4}
    Case(lens, 3, cache=E4M3).check(config=config, sinks=torch.randn(3, device=DEVICE))


@pytest.mark.parametrize("merge", [merge_config(1), merge_config(4), merge_config(16), merge_config(64)], ids=str)
@pytest.mark.parametrize("lens", [[1300], [1, 1200, 2, 0, 600]], ids=str)
def test_every_merge(merge, lens, monkeypatch):
    monkeypatch.setattr(numbers_module, "merge_config", lambda *asked: dict(merge))
    config = {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 1, "PER_SM": 30, "num_warps": 4}
    Case(lens, 2).check(config=config, v_scale=0.5)


@pytest.mark.parametrize("cache", [None, E4M3], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"k_scale": 0.5, "v_scale": 2.0},
        {"logit_cap": 0.7},
        {"xai_temperature_len": 16},
        {"xai_temperature_len": 70},
        {"logit_cap": 2.0, "xai_temperature_len": 8, "k_scale": 1.5},
    ],
    ids=str,
)
def test_options(options, cache):
    Case([90, 1, 17], 5, cache=cache).check(**options, sinks=torch.randn(5, device=DEVICE))


def test_sinks():
    sinks = torch.tensor([0.0, 3.0, -3.0, math.inf, -math.inf], device=DEVICE)
    for config in (None, {**decode_config(5, False, (9, 0), True), "PER_SM": 5}):
        case = Case([90, 1], 5)
        case.check(sinks=sinks, config=config)
        assert (case.out[:, 3] == 0).all()
        plain = Case([90, 1], 5)
        plain.q, plain.kv, plain.ids = case.q, case.kv, case.ids
        assert torch.equal(plain.run(config=config)[:, 4], case.out[:, 4])
        case.check(sinks=sinks.bfloat16(), config=config)


@pytest.mark.parametrize("cache", [None, E4M3, E5M2], ids=str)
def test_one_key_is_exact_to_one_rounding(cache):
    case = Case([1, 1], 3, cache=cache)
    got = case.run(v_scale=2.0)
    want = (case.kv[case.ids.long(), 0, :512].double() * 2.0).to(case.out.dtype)
    assert torch.equal(got, want[:, None].expand_as(got))


def test_every_byte_becomes_its_value():
    """Every finite code of both types, each as a value of the only key."""
    for cache in (E4M3, E5M2):
        codes = torch.arange(256, dtype=torch.uint8).repeat(3)[:576].view(cache).float()
        row = torch.where(torch.isfinite(codes), codes, 0.0).to(cache).view(1, 1, 576).to(DEVICE)
        q = torch.zeros(1, 1, 576, dtype=DTYPES[0], device=DEVICE)
        out = torch.full((1, 1, 512), math.nan, dtype=torch.float32, device=DEVICE)
        mla_decode(q, row, out, torch.tensor([0, 1], device=DEVICE), torch.tensor([0], device=DEVICE), sm_scale=1.0)
        assert torch.equal(out[0, 0], row[0, 0, :512].float())


def test_a_nan_in_the_cache_is_not_hidden():
    for cache in (E4M3, E5M2):
        case = Case([40], 2, cache=cache)
        case.kv.view(torch.uint8)[case.ids[7].long(), 0, 100] = 0x7F
        assert torch.isnan(case.run()[..., 100]).all()


def test_heads_do_not_see_each_other():
    for cache in (None, E4M3):
        case = Case([50, 300], 6, cache=cache)
        want = case.run().clone()
        case.q[:, 1], case.q[:, 4] = math.nan, math.inf
        got = case.run()
        for head in (0, 2, 3, 5):
            assert torch.equal(got[:, head], want[:, head])
        assert torch.isnan(got[:, 1]).all()


def test_large_and_small_queries_keep_their_bits():
    """bfloat16 reaches further than float16: q is brought into its range by a power of two for each head."""
    dtype, gains = torch.bfloat16, (2.0**-60, 1.0, 2.0**60)
    case = Case([64], 3, dtype, E4M3)
    case.q *= torch.tensor(gains, device=DEVICE, dtype=torch.float32)[None, :, None].to(dtype)
    keys = case.kv[case.ids.long(), 0].double()
    got = mla_decode(case.q, case.kv, case.out, case.indptr, case.ids, sm_scale=1.0)
    want = (case.q[0].double() @ keys.T).softmax(-1) @ keys[:, :512]
    assert (got[0].double() - want).norm() <= 4e-3 * want.norm()


def test_strides_and_index_types():
    for index in (torch.int32, torch.int64):
        case = Case([40, 9], 3, cache=E4M3, index=index)
        wide = torch.randn(2, 5, 600).to(DEVICE, case.q.dtype)
        case.q = wide[:, 1:4, 8:584]
        padded = torch.full((2, 3, 640), math.nan, dtype=case.q.dtype, device=DEVICE)
        case.out = padded[..., 64:576]
        rows = torch.zeros(case.kv.shape[0], 1, 640, dtype=torch.uint8, device=DEVICE)
        rows[..., :576] = case.kv.view(torch.uint8)
        case.kv = rows.view(E4M3)[..., :576]
        case.indptr = torch.cat([case.indptr, case.indptr[-1:] + 1000])  # longer than the batch: not read
        case.check()
        assert torch.isnan(padded[..., :64]).all() and torch.isnan(padded[..., 576:]).all()


def odd(tensor):
    """The same values two or four bytes behind an address that 16 divides, with -7 on both sides."""
    room = torch.full((tensor.numel() + 2,), -7.0, dtype=tensor.dtype, device=tensor.device)
    return room[1:-1].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("cache", [None, E4M3], ids=str)
@pytest.mark.parametrize("heads", [3, 40])
def test_rows_at_odd_addresses(heads, cache):
    case = Case([70, 0, 9], heads, cache=cache)
    want = case.run().clone()
    case.q, case.out = odd(case.q), odd(case.out)
    assert torch.equal(case.run(), want)
    assert (case.out._base[[0, -1]] == -7).all()


def parts(q):
    """A query as engines hand it over: latents head by head, the rope out of a wider projection."""
    nope = q[..., :512].transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((*q.shape[:2], 192), math.nan, dtype=q.dtype, device=q.device)
    wide[..., 128:] = q[..., 512:]
    assert nope.stride() == (512, 512 * len(q), 1) or len(q) == 1
    return nope, wide[..., 128:]


# every two of them together
@pytest.mark.parametrize(
    ("heads", "cache", "dtype"),
    [
        (3, torch.float16, torch.float16),
        (3, E4M3, torch.float32),
        (20, torch.float16, torch.float32),
        (20, E4M3, torch.float16),
    ],
)
def test_a_query_in_two_parts(heads, cache, dtype):
    """Bit for bit what it gives as one, by token and by page, also where one part begins at an odd address."""
    case = Paged([70, 0, 9], heads, 16, dtype=dtype, cache=cache)
    want = case.run().clone()
    nope, rope = parts(case.q)
    for pair in ((nope, rope), (odd(nope), rope), (nope, odd(rope))):
        case.q = pair
        assert torch.equal(case.run(), want)
        assert torch.equal(Case.run(case), want)


@pytest.mark.parametrize(
    ("heads", "lens", "programs", "cache"),
    [
        (3, [70, 0, 9, 130], 1, None),
        (3, [70, 0, 9, 130], 4, E4M3),
        (20, [70, 0], 3, None),
        (2, [1] * 32 + [130], 3, E4M3),
    ],
    ids=["one program", "several", "many heads", "many requests"],
)
def test_log_sum_exp(heads, lens, programs, cache):
    """Whoever has a request's keys: one program, or several and the merge. ``out`` is what it is without."""
    config = {**decode_config(heads, False, (9, 0), True), "PER_SM": programs} if interpreted() else None
    case = Case(lens, heads, cache=cache)
    empty = torch.tensor([length == 0 for length in lens], device=DEVICE)
    want = torch.empty(len(lens), heads, dtype=torch.float64, device=DEVICE)
    for sinks, place, most in (
        (None, torch.full((len(lens), heads), math.nan, device=DEVICE), 2e-3),
        # as FlashAttention-3 has it, and in the type of q
        (torch.randn(heads), torch.full((heads, len(lens) + 3), math.nan, device=DEVICE).T[: len(lens)], 2e-3),
        (torch.randn(heads), torch.full((len(lens), heads), math.nan, dtype=case.q.dtype, device=DEVICE), 8e-3),
    ):
        sinks = sinks if sinks is None else sinks.to(DEVICE)
        plain = case.run(config=config, sinks=sinks).clone()
        mla_decode_ref(case.q, case.kv, case.indptr, case.ids, sm_scale=SCALE, sinks=sinks, lse=want)
        assert torch.equal(case.run(config=config, sinks=sinks, lse=place), plain)
        assert (place[empty] == -math.inf).all()
        assert ((place - want)[~empty].abs() <= most).all()


def test_every_merge_keeps_its_log_sum_exp(monkeypatch):
    config = {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 1, "PER_SM": 30, "num_warps": 4}
    lens = [1, 700, 2, 0, 300]
    case = Case(lens, 2)
    want = torch.empty(5, 2, dtype=torch.float64, device=DEVICE)
    mla_decode_ref(case.q, case.kv, case.indptr, case.ids, sm_scale=SCALE, lse=want)
    for merge in (merge_config(1), merge_config(4), merge_config(16), merge_config(64)):
        monkeypatch.setattr(numbers_module, "merge_config", lambda *asked, merge=merge: dict(merge))
        lse = torch.full((5, 2), math.nan, device=DEVICE)
        case.run(config=config, lse=lse)
        assert torch.allclose(lse.double(), want, atol=2e-3)


@pytest.mark.parametrize("heads", [3, 20])
def test_scales_on_the_device(heads):
    """One number each, read by the kernel: what the numbers themselves give, whoever writes the output."""
    for lens in ([90, 1, 17], [150]):
        case = Case(lens, heads, cache=E4M3)
        want = case.run(k_scale=0.5, v_scale=2.0).clone()
        half, two = torch.tensor(0.5, device=DEVICE), torch.tensor([2.0], device=DEVICE)
        for k_scale, v_scale in ((half, two), (half.bfloat16(), 2.0), (0.5, two[None])):
            assert torch.equal(case.run(k_scale=k_scale, v_scale=v_scale), want)
        case.run(k_scale=half, v_scale=two)
        half.fill_(0.25)  # as a captured graph may find it
        assert torch.equal(case.run(k_scale=half, v_scale=two).clone(), case.run(k_scale=0.25, v_scale=2.0))


def test_a_view_of_a_tables_first_column():
    """Only the distance of its rows counts: engines capture graphs with such a view."""
    for page in (16, 64):
        case = Paged([200, 0, 31, 90], 5, page)
        case.check()
        want = case.out.clone()
        case.table = case.table[:, :1]
        assert torch.equal(case.run(), want)


def test_calls_that_are_alike():
    """A call finds what an earlier one has left, and goes by its own tensors."""
    remembered.KNOWN.clear()
    options = {"sinks": torch.randn(3, device=DEVICE), "lse": torch.empty(2, 3, device=DEVICE)}
    Paged([70, 9], 3, 16).run(**options)
    for lens in ([3, 76], [0, 1], [33, 16]):
        Paged(lens, 3, 16, spare=90 - sum(lens)).check(**options)
    first = len(remembered.KNOWN)
    case = Case([70, 9], 3)
    case.check(**options)
    for lens in ([3, 76], [0, 1], [40, 39]):
        Case(lens, 3, spare=7 + 79 - sum(lens)).check(**options)
    assert len(remembered.KNOWN) == first + 1
    case.check(**options, logit_cap=1.0)
    case.check(**options, k_scale=0.5)
    assert len(remembered.KNOWN) == first + 2


def test_numbers_in_tensors_are_numbers():
    """Calls with them are alike, and nothing of them is kept."""
    remembered.KNOWN.clear()
    case = Case([40, 9], 3)
    want = case.run(logit_cap=2.0, xai_temperature_len=8).clone()
    for _ in range(2):
        args = (case.q, case.kv, case.out, case.indptr, case.ids)
        mla_decode(
            *args, sm_scale=torch.tensor(SCALE), logit_cap=torch.tensor(2.0), xai_temperature_len=torch.tensor(8)
        )
        assert torch.equal(case.out, want)
    assert len(remembered.KNOWN) == 1
    assert not any(isinstance(value, torch.Tensor) for key in remembered.KNOWN for value in key)


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(remembered, "MAX_KNOWN", 2)
    remembered.KNOWN.clear()
    for heads in (1, 2, 3):
        Case([4], heads).check()
        assert len(remembered.KNOWN) <= 2


def test_float32_output_and_a_flat_cache():
    case = Case([40, 0], 3)
    case.out = torch.full((2, 3, 512), math.nan, device=DEVICE)
    case.kv = case.kv[:, 0]
    case.check()


def test_repeated_rows_and_equal_inputs():
    case = Case([60], 4, cache=E4M3)
    case.ids[:] = case.ids[0]
    case.check()
    assert torch.equal(case.run().clone(), case.run())


def test_no_requests():
    assert Case([], 4).run().numel() == 0


@pytest.mark.parametrize("gain", [1, 4, 8])
def test_peaked_attention_is_as_exact(gain):
    Case([300], 4, cache=E4M3, gain=gain).check()


@settings(max_examples=20, deadline=None)
@given(
    lens=st.lists(st.one_of(st.integers(0, 5), st.integers(20, 150)), min_size=1, max_size=7),
    heads=st.integers(1, 18),
    cache=st.sampled_from([None, E4M3, E5M2]),
    programs=st.integers(1, 12),
    sink=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_batch(lens, heads, cache, programs, sink, seed):
    torch.manual_seed(seed)
    config = {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 1, "PER_SM": programs, "num_warps": 4}
    sinks = torch.randn(heads, device=DEVICE) if sink else None
    Case(lens, heads, cache=cache).check(config=config, sinks=sinks)


class Paged(Case):
    """The same in pages of random places, by a table whose other entries would be a fault to follow."""

    def __init__(self, lens, heads, page, *, wide=3, index=torch.int32, **options):
        super().__init__(lens, heads, **options)
        counts = [-(-max(length, 0) // page) for length in lens]
        pages = torch.full((sum(counts) + 5, page, 1, 576), math.nan).to(self.kv.dtype).to(DEVICE)
        order = torch.randperm(len(pages))
        table = torch.full((len(lens) + 1, max(counts, default=0) + wide), -(2**30), dtype=index)
        slots, next_page = [], 0
        for b, (length, count) in enumerate(zip(lens, counts, strict=True)):
            own = order[next_page : next_page + count]
            table[b, :count] = own
            slots.append((own[:, None] * page + torch.arange(page)).flatten()[: max(length, 0)])
            next_page += count
        slots = torch.cat(slots).to(DEVICE) if slots else torch.zeros(0, dtype=torch.int64, device=DEVICE)
        flat = pages.view(-1, 1, 576).view(torch.uint8)
        flat[slots] = self.kv[self.ids.long()].view(torch.uint8)
        self.pages, self.table = pages, table.to(DEVICE)[:, : table.shape[1] - 1]
        # the definition reads the same by token
        self.kv, self.ids = pages.view(-1, 1, 576), slots
        self.lens_given = torch.tensor([*lens, 999999], dtype=index, device=DEVICE)

    def run(self, **options):
        got = mla_decode_paged(self.q, self.pages, self.out, self.table, self.lens_given, sm_scale=SCALE, **options)
        assert got is self.out
        return got


@pytest.mark.parametrize("page", [1, 16, 24, 64])
@pytest.mark.parametrize("lens", [[1], [0], [63, 64, 65, 1, 0, 129], [400, 3]], ids=str)
def test_by_pages(page, lens):
    for cache in (None, E4M3):
        Paged(lens, 3, page, cache=cache).check(sinks=torch.randn(3, device=DEVICE))


def test_the_stride_of_one_head_means_nothing():
    """PyTorch lets it be any number, which an 8-bit cache, read as a wider type, must not be held to."""
    for stride in (1, 7):
        case = Paged([70, 0, 9], 3, 16, cache=E4M3)
        case.pages = case.pages.as_strided(case.pages.shape, (16 * 576, 576, stride, 1))
        case.check()


def test_by_pages_is_what_it_is_by_token():
    """Bit for bit, with every option, whoever has the keys."""
    options = {"logit_cap": 2.0, "xai_temperature_len": 8, "k_scale": 1.5, "v_scale": 0.5}
    for cache in (None, E4M3):
        case = Paged([200, 0, 31, 90], 5, 16, cache=cache)
        for programs in (1, 7):
            config = {**decode_config(5, False, (9, 0), True), "PER_SM": programs}
            got = case.run(config=config, **options).clone()
            want = Case.run(case, config=config, **options)
            assert torch.equal(got, want) and torch.isfinite(got).all()


def test_pages_apart_and_index_types():
    for index in (torch.int32, torch.int64):
        case = Paged([70, 9], 3, 8, cache=E4M3, index=index)
        # other layers' pages between them, and rows wider than a latent
        apart = torch.full((len(case.pages), 2, 8, 640), 0x7F, dtype=torch.uint8, device=DEVICE)
        apart[:, 1, :, :576] = case.pages[:, :, 0].view(torch.uint8)
        case.pages = apart.view(E4M3)[:, 1, :, :576]
        assert case.pages.stride(0) == 2 * 8 * 640 and case.table.stride(0) > case.table.shape[1]
        case.check()
    case = Paged([40, 7], 2, 64, wide=1)
    case.lens_given = torch.tensor([-3, 7], dtype=torch.int32, device=DEVICE)
    got = case.run()
    assert (got[0] == 0).all() and torch.isfinite(got[1]).all()


def test_no_requests_by_pages():
    assert Paged([], 4, 16).run().numel() == 0


@settings(max_examples=10, deadline=None)
@given(
    lens=st.lists(st.one_of(st.integers(0, 5), st.integers(20, 150)), min_size=1, max_size=5),
    page=st.integers(1, 70),
    cache=st.sampled_from([None, E4M3]),
    programs=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_any_pages(lens, page, cache, programs, seed):
    torch.manual_seed(seed)
    config = {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 1, "PER_SM": programs, "num_warps": 4}
    Paged(lens, 2, page, cache=cache).check(config=config)


@pytest.mark.parametrize("gain", [1, 8])
def test_float32_queries(gain):
    for cache in (*DTYPES, E4M3):
        case = Case([300, 1, 40], 3, torch.float32, cache, gain=gain)
        assert case.q.dtype is case.out.dtype is torch.float32
        case.check()


def test_nothing_of_a_float32_query_is_lost():
    """Rounded to float16, scores of the order of 8 would be off by 8 * 2**-12 and out by 4e-4."""
    case = Case([300, 40], 3, torch.float32, torch.float16, gain=8)
    want = mla_decode_ref(case.q, case.kv, case.indptr, case.ids, sm_scale=SCALE)
    assert (case.run().double() - want).norm() <= 1e-4 * want.norm()


def test_large_and_small_float32_queries():
    """A head's q beyond what the cache's type holds: it is a power of two that keeps it."""
    case = Case([64], 3, torch.float32, DTYPES[0])
    case.q *= torch.tensor([2.0**-60, 1.0, 2.0**60], device=DEVICE)[None, :, None]
    keys = case.kv[case.ids.long(), 0].double()
    got = mla_decode(case.q, case.kv, case.out, case.indptr, case.ids, sm_scale=1.0)
    want = (case.q[0].double() @ keys.T).softmax(-1) @ keys[:, :512]
    assert (got[0].double() - want).norm() <= 4e-3 * want.norm()


def bad(name, spoil, message):
    return pytest.param(name, spoil, message, id=f"{name}: {message[:30]}")


def uneven(x, stride, offset):
    """An 8-bit cache whose pairs of bytes do not begin at even addresses."""
    return torch.zeros(stride * 9 + 1, device=DEVICE).to(E4M3).as_strided((9, 1, 576), (stride, stride, 1), offset)


def pair(rope):
    """A query's two parts, of which the second is not right."""
    return lambda x: (x[..., :512], rope(x[..., 512:]))


BAD = [
    bad("q", lambda x: (x, x[..., 512:]), r"q: shape \(2, 3, 576\), .* expected \[B, H, 512\] beside a rope"),
    bad("q", pair(lambda x: x[..., :32]), r"q's rope: torch.float16, shape \(2, 3, 32\).* expected .* \[2, 3, 64\]"),
    bad("q", pair(lambda x: x.float()), "q's rope: torch.float32, .* expected torch.float16 as q"),
    bad("q", pair(lambda x: x[:1]), r"q's rope: torch.float16, shape \(1, 3, 64\)"),
    bad("q", pair(lambda x: x.repeat(1, 1, 2)[..., ::2]), "q's rope: .* the last contiguous"),
    bad("lse", lambda x: torch.zeros(3, 2, device=DEVICE), r"lse: torch.float32, shape \(3, 2\), .*\[2, 3\]"),
    bad("lse", lambda x: torch.zeros(2, 3, device=DEVICE).double(), "lse: torch.float64, .* expected torch.float32 or"),
    bad("k_scale", lambda x: torch.ones(2, device=DEVICE), r"k_scale: torch.float32, shape \(2,\).* expected a number"),
    bad("v_scale", lambda x: torch.ones(1, device=DEVICE).int(), "v_scale: torch.int32, .* expected a number or one"),
    bad("q", lambda x: x.double(), "q: torch.float64, expected torch.bfloat16, torch.float16 or torch.float32"),
    bad("q", lambda x: x[..., :512], r"q: shape \(2, 3, 512\)"),
    bad("q", lambda x: x[0], r"q: shape \(3, 576\)"),
    bad("q", lambda x: x.repeat(1, 50, 1), "q: 150 heads, expected 1 to 128"),
    bad("q", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "q: shape .*the last contiguous"),
    bad("kv", lambda x: x[..., :512], r"kv: shape \(.*, 1, 512\)"),
    bad("kv", lambda x: x.repeat(1, 2, 1), r"kv: shape \(.*, 2, 576\)"),
    bad("kv", lambda x: x.to(torch.float32), "kv: torch.float32, expected torch.float16 as q"),
    bad("kv", lambda x: x.bfloat16(), "kv: torch.bfloat16, expected torch.float16 as q"),
    bad("kv", lambda x: uneven(x, 577, 0), r"kv: strides \(577, 577, 1\), offset 0, expected even numbers"),
    bad("kv", lambda x: uneven(x, 578, 1), r"kv: strides \(578, 578, 1\), offset 1, expected even numbers"),
    bad("out", lambda x: x[..., :500], "out: shape"),
    bad("out", lambda x: x[:1], "out: shape"),
    bad("out", lambda x: x.double(), "out: torch.float64"),
    bad("indptr", lambda x: x[:2], "indptr: torch.int32, shape \\(2,\\), expected .* at least 3 long"),
    bad("indptr", lambda x: x.float(), "indptr: torch.float32"),
    bad("token_ids", lambda x: x.float(), "token_ids: torch.float32"),
    bad("token_ids", lambda x: x[None], "token_ids: torch.int64, shape \\(1, "),
    bad("sinks", lambda x: torch.zeros(2, device=DEVICE), "sinks: torch.float32, shape \\(2,\\), expected a float"),
    bad(
        "sinks",
        lambda x: torch.zeros(6, device=DEVICE)[::2],
        r"sinks: .*, strides \(2,\), expected a float .*contiguous",
    ),
    bad("k_scale", lambda x: 0.0, "k_scale: 0.0, expected a finite number above 0"),
    bad("v_scale", lambda x: math.nan, "v_scale: nan"),
    bad("k_scale", lambda x: -1.0, "k_scale: -1.0"),
]


@pytest.mark.parametrize("name, spoil, message", BAD)
def test_misuse(name, spoil, message):
    case = Case([4, 5], 3)
    args = {"q": case.q, "kv": case.kv, "out": case.out, "indptr": case.indptr, "token_ids": case.ids}
    args |= {"sm_scale": SCALE}
    mla_decode(**args)  # what is kept of it must not be taken for what comes
    case.out.fill_(math.nan)
    args[name] = spoil(args.get(name))
    with pytest.raises(ValueError, match=message):
        mla_decode(**args)
    assert torch.isnan(case.out).all()


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("kv", lambda x: x[:, :, 0, :512], r"kv: shape \(.*, 16, 512\), .* expected \[pages, page_size, 576\]"),
        ("kv", lambda x: x.expand(-1, -1, 2, -1), r"kv: shape \(.*, 16, 2, 576\)"),
        ("kv", lambda x: x[:, :0], r"kv: shape \(.*, 0, 576\)"),
        ("kv", lambda x: x[0, 0], r"kv: shape \(1, 576\)"),
        ("kv", lambda x: x.float(), "kv: torch.float32, expected torch.float16 as q"),
        (
            "block_table",
            lambda x: x[0],
            r"block_table: torch.int32, shape .*, expected int32 or int64, \[2 or more, pages\]",
        ),
        ("block_table", lambda x: x[:1], r"block_table: torch.int32, shape \(1, "),
        ("block_table", lambda x: x.float(), "block_table: torch.float32"),
        ("block_table", lambda x: x.repeat(1, 2)[:, ::2], "block_table: stride 2 in the last dimension, expected 1"),
        ("lens", lambda x: x[:1], r"lens: torch.int32, shape \(1,\), expected .* at least 2 long"),
        ("lens", lambda x: x.float(), "lens: torch.float32"),
        ("k_scale", lambda x: 0.0, "k_scale: 0.0"),
    ],
)
def test_misuse_of_pages(name, spoil, message):
    case = Paged([4, 25], 3, 16)
    args = {"q": case.q, "kv": case.pages, "out": case.out, "block_table": case.table, "lens": case.lens_given}
    args |= {"sm_scale": SCALE}
    mla_decode_paged(**args)
    case.out.fill_(math.nan)
    args[name] = spoil(args.get(name))
    with pytest.raises(ValueError, match=message):
        mla_decode_paged(**args)
    assert torch.isnan(case.out).all()


def test_a_float32_cache_is_refused():
    case = Case([4], 2, torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"kv: torch.float32, expected torch.bfloat16, torch.float16, torch.float8"):
        case.run()


def test_launch_numbers_are_those_that_were_measured():
    eight = {"BLOCK_H": 16, "BLOCK_N": 64, "STAGES": 5, "PER_SM": 2, "num_warps": 4}
    assert decode_config(16, True, (9, 0)) == eight
    assert decode_config(16, False, (9, 0)) == eight | {"PER_SM": 1, "maxnreg": 255}
    assert decode_config(128, True, (9, 0)) == eight
    assert decode_config(128, False, (9, 0))["BLOCK_H"] == 32
    assert merge_config(1)["SLICES"] == 16 and merge_config(128)["SLICES"] == 0


class Launches:
    """A kernel that notes what it is launched with."""

    def __init__(self, name, seen):
        self.name, self.seen = name, seen

    def __getitem__(self, grid):
        return lambda *args, **numbers: self.seen.append((self.name, grid, args, numbers))


@pytest.mark.parametrize(
    ("heads", "cache", "change", "name", "grid"),
    [
        (16, None, "", "decode", (132, 1)),
        (17, None, "", "wide", (132, 1)),
        (64, E4M3, "", "wide", (132, 1)),
        (65, E5M2, "", "wide", (66, 2)),
        (128, None, "float32", "decode", (33, 4)),
        (128, None, "row", "decode", (33, 4)),
        (128, E4M3, "row", "decode", (33, 8)),
        (128, E4M3, "place", "decode", (33, 8)),
        (64, None, "odd q", "wide", (132, 1)),
        (64, E4M3, "odd out", "wide", (132, 1)),
        (16, E4M3, "odd q", "decode", (264, 1)),
        (128, None, "config", "decode", (33, 4)),
        (128, None, "scale", "decode", (33, 4)),
        (128, None, "sm_100", "decode", (16, 8)),
        (128, None, "no Gluon", "decode", (33, 4)),
    ],
)
def test_which_kernel_has_a_call(heads, cache, change, name, grid, monkeypatch):
    """decode_sm90 takes more heads than 16, with rows that can be copied 16 bytes at a time; else the portable one."""
    seen = []
    for module in (common_launch, numbers_module):
        monkeypatch.setattr(module, "INTERPRETED", False)
    kinds = numbers_module.EIGHT_BIT_KINDS
    monkeypatch.setattr(launch_module, "check", lambda q, rope, kv, *rest: kinds.get(kv.dtype, numbers_module.DIRECT))
    monkeypatch.setattr(launch_module, "_sm90_kernel", lambda: (Launches("wide", seen), 5))
    monkeypatch.setattr(launch_module, "_decode_kernel", Launches("decode", seen))
    monkeypatch.setattr(launch_module, "_merge_kernel", Launches("merge", seen))
    monkeypatch.setattr(launch_module, "HAS_GLUON", change != "no Gluon")
    monkeypatch.setattr(gpu, "on_other_device", lambda q: False)
    monkeypatch.setattr(gpu, "capability", lambda index: (10, 0) if change == "sm_100" else (9, 0))
    monkeypatch.setattr(gpu, "sm_count", lambda index: 132)
    pad = {"row": 8, "place": 0}.get(change, 0)
    dtype = torch.float16
    kv = torch.zeros(40 * (576 + pad) + 16, dtype=torch.float16).to(cache or dtype)
    kv = kv[8 if change == "place" else 0 :].as_strided((40, 1, 576), (576 + pad, 576 + pad, 1))
    q = torch.zeros(2, heads, 576, dtype=torch.float32 if change == "float32" else dtype)
    out = torch.zeros(2, heads, 512, dtype=dtype)
    indptr, ids = torch.tensor([0, 30, 33], dtype=torch.int32), torch.zeros(33, dtype=torch.int64)
    q, out = odd(q) if change == "odd q" else q, odd(out) if change == "odd out" else out
    config = {"BLOCK_H": 32, "BLOCK_N": 16, "STAGES": 1, "PER_SM": 1, "num_warps": 4} if change == "config" else None
    mla_decode(q, kv, out, indptr, ids, sm_scale=-1.0 if change == "scale" else 1.0, config=config)
    (kernel, launched, args, numbers), merge = seen
    assert (kernel, launched) == (name, grid) and merge[0] == "merge"
    given = args[2]
    assert all(tensor.data_ptr() % 16 == 0 for tensor in (*args[:2], args[3], merge[2][0]))  # kernels rely on it
    if name == "wide":
        assert given.dtype is (torch.int32 if cache else dtype) and numbers["KEY"] == 5
        assert args[21] == given.stride(0) and numbers["E5M2"] == (cache is E5M2)
    assert args[10].dtype is (torch.float16 if cache else torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
@pytest.mark.parametrize("cache", [None, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("heads", [16, 20, 128])
@pytest.mark.parametrize("lens", [[40000], [1, 9000, 64, 0, 4097, 63], [700] * 40 + [20000] + [3] * 90], ids=len)
def test_real_shapes(lens, heads, cache):
    Case(lens, heads, torch.bfloat16, cache).check(sinks=torch.randn(heads, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
def test_the_conversion_without_the_instruction(monkeypatch):
    monkeypatch.setitem(numbers_module.EIGHT_BIT_KINDS, E4M3, numbers_module.E4M3_BITS)
    Case([300, 1, 0, 77], 16, torch.bfloat16, E4M3).check()
    test_every_byte_becomes_its_value()
    test_a_nan_in_the_cache_is_not_hidden()


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
@pytest.mark.parametrize("cache", [None, E4M3], ids=str)
@pytest.mark.parametrize("batch", [1, 6, 20, 70])
def test_a_graph_follows_its_buffers(batch, cache):
    """Captured with lengths of one, as engines do, and replayed with others."""
    case = Case([3000] * batch, 16, torch.bfloat16, cache)
    full = case.indptr.clone()
    case.indptr.copy_(torch.arange(batch + 1, device=DEVICE))
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run()
    for _ in range(3):
        lens = torch.randint(0, 3001, (batch,))
        lens[torch.randint(0, batch, (1,))] = 0
        case.lens = lens.tolist()
        case.indptr.copy_(torch.tensor([0, *case.lens]).cumsum(0))
        case.out.fill_(math.nan)
        graph.replay()
        want = mla_decode_ref(case.q, case.kv, case.indptr, case.ids, sm_scale=SCALE)
        assert (case.out.double() - want).norm() <= 4e-3 * want.norm() + 1e-9
    assert int(full[-1]) == 3000 * batch


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
@pytest.mark.parametrize("cache", [None, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("page", [1, 24, 64])
def test_pages_on_a_gpu(page, cache):
    """Real lengths, and a graph captured with lengths of one and replayed with these."""
    lens = [1, 9000, 64, 0, 4097, 63]
    case = Paged(lens, 16, page, dtype=torch.bfloat16, cache=cache)
    case.check()
    full = case.lens_given.clone()
    case.lens_given.clamp_(max=1)  # the empty one has no page
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run()
    want = case.run().clone()
    case.lens_given.copy_(full)
    case.out.fill_(math.nan)
    graph.replay()
    assert not torch.equal(case.out, want) and torch.equal(case.out.clone(), case.run())


@pytest.mark.xdist_group("much memory")
@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("cache", [torch.bfloat16, E4M3], ids=str)
@pytest.mark.parametrize("heads", [16, 40])
def test_a_pool_beyond_31_bits(heads, cache, index):
    """An 8-bit cache is counted in 16 bits, and above 16 heads, on sm_90, in 32."""
    unit = 1 if cache is torch.bfloat16 else 2 if heads == 16 else 4
    rows = 2**31 * unit // 576 + 5000
    kv = torch.zeros(rows, 1, 576, dtype=cache, device=DEVICE)
    case = Case([200], heads, torch.bfloat16, cache, index)
    far = torch.arange(rows - 200, rows, device=DEVICE)
    kv[far] = case.kv[case.ids.long()]
    case.kv, case.ids = kv, far.to(index)
    case.check()
