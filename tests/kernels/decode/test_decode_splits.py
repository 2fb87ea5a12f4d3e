"""MLA decode in a caller's scratch against its definition: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import DEVICE, DTYPES, E4M3, E5M2, SCALE, Case, odd

from mla_patch.compat.triton import interpreted
from mla_patch.kernels.decode import decode_config, mla_decode_ref
from mla_patch.kernels.decode import splits as module
from mla_patch.kernels.decode.splits import mla_decode_splits, mla_decode_splits_ref

CPU_SECONDS = 70  # see budget.py


class Splits(Case):
    """Beside a `Case`, scratch for more requests than there are, full of NaN."""

    def __init__(self, lens, heads, splits, *, most=8, **options):
        super().__init__(lens, heads, **options)
        count = [splits] * len(lens) if isinstance(splits, int) else splits
        self.splits = torch.tensor([*count, -7], dtype=torch.int32, device=DEVICE)
        self.logits = torch.full((len(lens) + 1, heads, most, 512), math.nan, device=DEVICE)
        self.lse = torch.full((len(lens) + 1, heads, most), math.nan, device=DEVICE)

    @property
    def inputs(self):
        return self.q, self.kv, self.indptr, self.ids, self.logits, self.lse, self.splits

    def run(self, **options):
        q, kv, *rest = self.inputs
        got = mla_decode_splits(q, kv, self.out, *rest, sm_scale=SCALE, **options)
        assert got is self.out
        return got

    def check(self, **options):
        scores = {name: value for name, value in options.items() if name not in ("config", "sinks", "v_scale")}
        partial, lse = mla_decode_splits_ref(*self.inputs, sm_scale=SCALE, **scores)
        super().check(**options)
        # NaN where nothing may be written
        assert torch.equal(torch.isnan(self.logits), torch.isnan(partial))
        assert torch.equal(torch.isnan(self.lse), torch.isnan(lse))
        error, size = (self.logits - partial).nan_to_num(), partial.nan_to_num()
        assert (error.norm(dim=-1) <= 4e-3 * size.norm(dim=-1)).all()
        # a 16-bit q is exact: what is left are float32's sums of 576 products, which a GPU's units truncate; a float32
        # one has 11 bits beside 8-bit values, and scores are of the order of 1
        tol = 1e-3 if self.q.dtype is torch.float32 else 1e-4
        torch.testing.assert_close(self.lse.double(), lse, rtol=tol, atol=tol, equal_nan=True)


def test_caches_and_types():
    for dtype in DTYPES:
        for cache in (None, E4M3, E5M2):
            Splits([70, 1, 0, 33], 3, 3, dtype=dtype, cache=cache).check()


@pytest.mark.parametrize("heads", [1, 16, 17, 128])
def test_heads(heads):
    Splits([100, 5], heads, 2, cache=E4M3 if heads % 2 else None).check()


@pytest.mark.parametrize("splits", [1, 2, 3, 8, [8, 1, 5, 2]], ids=str)
@pytest.mark.parametrize(
    "lens", [[1, 31, 32, 33], [0, 300, 0, 64], [257, 255, 256, 1000], [0, 0, 0, 0], [-1, 64, 65, 63]], ids=str
)
def test_every_cut(lens, splits):
    """More splits than there are keys for, ends within a tile, and the last split shorter than the rest."""
    if lens[0] < 0:
        case = Splits([0, *lens[1:]], 2, splits, cache=E4M3)
        case.indptr[0] += 5  # bounds that run backwards own nothing
        case.lens[0] = -5
        case.check()
    else:
        Splits(lens, 2, splits, cache=E4M3).check()


def test_a_number_of_splits_that_cannot_be():
    """The definition takes the nearest: no key is left out, nothing is written beyond the last split."""
    Splits([300, 100, 70], 2, [99, 0, -3], most=4).check()


@pytest.mark.parametrize("most", [1, 33])
def test_the_scratchs_size(most):
    Splits([1100, 7], 2, most, most=most).check()


@pytest.mark.parametrize("tile", [32, 64])
def test_a_split_ends_where_its_tile_does_not(tile):
    config = {**decode_config(2, True, (9, 0), True), "BLOCK_N": tile}
    Splits([500, 97], 2, [5, 3], cache=E4M3).check(config=config)


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
    Splits([90, 1, 17], 5, 3, cache=cache).check(**options, sinks=torch.randn(5, device=DEVICE))


def test_sinks_count_in_out_alone():
    case = Splits([90, 1, 0], 5, 3)
    case.check()
    lse, logits, plain = case.lse.clone(), case.logits.clone(), case.out.clone()
    sinks = torch.tensor([0.0, 3.0, -3.0, math.inf, -math.inf], device=DEVICE)
    case.check(sinks=sinks)
    assert torch.equal(case.lse.nan_to_num(), lse.nan_to_num())
    assert torch.equal(case.logits.nan_to_num(), logits.nan_to_num())
    assert (case.out[:, 3] == 0).all() and torch.equal(case.out[:, 4], plain[:, 4])
    case.check(sinks=sinks.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_type_of_out(dtype):
    case = Splits([40, 0, 200], 3, 4, cache=E4M3)
    case.out = torch.full(case.out.shape, math.nan, dtype=dtype, device=DEVICE)
    case.check()


def test_what_a_rank_makes_of_it():
    """The log-sum-exp over the splits, after they were filled with -inf, is that of all keys; no keys, -inf."""
    case = Splits([200, 0, 45], 4, 5)
    case.lse.fill_(-math.inf)
    case.run()
    got = case.lse[:3].logsumexp(-1)
    keys = case.kv[case.ids.long(), 0].double()
    for b, rows in ((0, keys[:200]), (2, keys[200:])):
        want = (case.q[b].double() @ rows.T * SCALE).logsumexp(-1)
        torch.testing.assert_close(got[b].double(), want, rtol=1e-5, atol=1e-5)
    assert (got[1] == -math.inf).all() and (case.out[1] == 0).all()


def test_strides_and_index_types():
    for index in (torch.int32, torch.int64):
        case = Splits([40, 90], 3, 2, cache=E4M3, index=index)
        case.q = torch.randn(2, 5, 600).to(DEVICE, case.q.dtype)[:, 1:4, 8:584]
        padded = torch.full((2, 3, 640), math.nan, dtype=case.q.dtype, device=DEVICE)
        case.out = padded[..., 64:576]
        case.indptr = case.indptr.to(index)
        case.check()
        assert torch.isnan(padded[..., :64]).all() and torch.isnan(padded[..., 576:]).all()


@pytest.mark.parametrize("cache", [None, E4M3], ids=str)
def test_rows_at_odd_addresses(cache, monkeypatch):
    case = Splits([70, 0, 9], 3, 2, cache=cache)
    want = case.run().clone()
    case.q, case.out = odd(case.q), odd(case.out)
    seen = []
    kernel = module._splits_kernel
    monkeypatch.setattr(module, "_splits_kernel", Noting(kernel, seen))
    assert torch.equal(case.run(), want)
    assert (case.out._base[[0, -1]] == -7).all() and [q.data_ptr() % 16 for q in seen] == [0]


class Noting:
    """A kernel whose first argument is seen."""

    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        def launch(q, *args, **numbers):
            self.seen.append(q)
            return self.kernel[grid](q, *args, **numbers)

        return launch


def test_heads_do_not_see_each_other():
    case = Splits([50, 300], 6, 3, cache=E4M3)
    want = case.run().clone()
    case.q[:, 1], case.q[:, 4] = math.nan, math.inf
    got = case.run()
    for head in (0, 2, 3, 5):
        assert torch.equal(got[:, head], want[:, head])
    assert torch.isnan(got[:, 1]).all()


def test_float32_queries():
    for cache in (torch.float16, E4M3):
        Splits([90, 1], 3, 2, dtype=torch.float32, cache=cache).check()


def test_scores_beyond_what_exp_holds():
    Splits([300, 90], 2, [8, 3], gain=64).check()


def test_no_requests():
    assert Splits([], 4, []).run().numel() == 0


@settings(max_examples=10, deadline=None)
@given(
    lens=st.lists(st.one_of(st.integers(0, 5), st.integers(20, 150)), min_size=1, max_size=5),
    heads=st.integers(1, 18),
    cache=st.sampled_from([None, E4M3, E5M2]),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_any_batch(lens, heads, cache, data, seed):
    torch.manual_seed(seed)
    count = data.draw(st.lists(st.integers(1, 6), min_size=len(lens), max_size=len(lens)))
    Splits(lens, heads, count, most=6, cache=cache).check()


BAD = [
    ("attn_logits", lambda x: x[..., :256], r"attn_logits: shape \(3, 3, 8, 256\), expected \[2 or more, 3, S, 512\]"),
    ("attn_logits", lambda x: x[:, :2], r"attn_logits: shape \(3, 2, 8, 512\)"),
    ("attn_logits", lambda x: x[:1], r"attn_logits: shape \(1, 3, 8, 512\)"),
    ("attn_logits", lambda x: x.half(), "attn_logits: torch.float16, .* expected torch.float32 and contiguous"),
    ("attn_logits", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "attn_logits: .* and contiguous"),
    ("attn_logits", lambda x: x[:, :, :4].contiguous(), "attn_logits: 4 splits, expected 8 as attn_lse"),
    ("attn_lse", lambda x: x[..., None], r"attn_lse: shape \(3, 3, 8, 1\), expected \[2 or more, 3, S\]"),
    ("attn_lse", lambda x: x[:, :, ::2], "attn_lse: torch.float32, strides .* and contiguous"),
    ("attn_lse", lambda x: x[:, :, :0], "attn_logits: 8 splits, expected 0 as attn_lse"),
    ("num_kv_splits", lambda x: x.long(), "num_kv_splits: torch.int64, .* expected torch.int32, at least 2 long"),
    ("num_kv_splits", lambda x: x[:1], r"num_kv_splits: torch.int32, shape \(1,\)"),
    ("num_kv_splits", lambda x: x.repeat(2)[::2], "num_kv_splits: stride 2, expected 1"),
    ("max_kv_splits", lambda x: 16, "max_kv_splits: 16, expected 8 as attn_lse has"),
    ("indptr", lambda x: x[:2], "indptr: torch.int32"),
    ("kv", lambda x: x[..., :512], r"kv: shape \(.*, 1, 512\)"),
    ("k_scale", lambda x: 0.0, "k_scale: 0.0, expected a finite number above 0"),
    ("v_scale", lambda x: math.nan, "v_scale: nan"),
]


@pytest.mark.parametrize("name, spoil, message", BAD, ids=[f"{name} {i}" for i, (name, _, _) in enumerate(BAD)])
def test_misuse(name, spoil, message):
    case = Splits([4, 5], 3, 2)
    names = ("q", "kv", "indptr", "token_ids", "attn_logits", "attn_lse", "num_kv_splits")
    args = dict(zip(names, case.inputs, strict=True)) | {"out": case.out, "sm_scale": SCALE}
    args[name] = spoil(args.get(name))
    with pytest.raises(ValueError, match=message):
        mla_decode_splits(**args)
    assert torch.isnan(case.out).all() and torch.isnan(case.lse).all()


def test_no_split_at_all():
    case = Splits([4], 3, 1, most=0)
    with pytest.raises(ValueError, match="attn_lse: 0 splits, expected 1 to 65535"):
        case.run()


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
@pytest.mark.parametrize("cache", [None, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("heads", [16, 128])
def test_real_shapes(heads, cache):
    lens, splits = [1, 9000, 64, 0, 4097, 63], [1, 16, 16, 1, 7, 3]
    Splits(lens, heads, splits, most=16, dtype=torch.bfloat16, cache=cache).check(
        sinks=torch.randn(heads, device=DEVICE)
    )


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
def test_a_graph_follows_its_buffers():
    case = Splits([3000] * 6, 16, 1, dtype=torch.bfloat16, cache=E4M3)
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run()
    for seed in range(3):
        torch.manual_seed(seed)
        case.lens = torch.randint(0, 3001, (6,)).tolist()
        case.indptr.copy_(torch.tensor([0, *case.lens]).cumsum(0))
        case.splits[:6] = torch.randint(1, 9, (6,))
        for tensor in (case.out, case.lse, case.logits):
            tensor.fill_(math.nan)
        graph.replay()
        want = mla_decode_ref(case.q, case.kv, case.indptr, case.ids, sm_scale=SCALE)
        assert (case.out.double() - want).norm() <= 4e-3 * want.norm() + 1e-9
        _, lse = mla_decode_splits_ref(*case.inputs[:4], torch.full_like(case.logits, math.nan),
                                       torch.full_like(case.lse, math.nan), case.splits, sm_scale=SCALE)  # fmt: skip
        torch.testing.assert_close(case.lse.double(), lse, rtol=1e-4, atol=1e-4, equal_nan=True)
