"""Our wrappers beside FlashMLA's own builds: the same tensors, and each side against the definition in float64.

    TRITON_INTERPRET=0 PYTHONPATH=FOLDER FLASHMLA_OPS=FILE.so pytest -m gpu tests/kernels/test_flash_mla_peers.py

    package      the newer API: FOLDER holds the unpacked wheel tokenspeed-flashmla 1.0.0.post20260615, sgl-flash-mla
                 1.0.0, or any other package `flash_mla` that has FlashMLASchedMeta
    operators    the older API: FILE.so is sgl_kernel/flashmla_ops.abi3.so of the wheel sglang-kernel 0.4.2

Both need an sm_90 GPU and the torch that they were built for, 2.11. Without them the same cases run small, with a
stand-in for each peer: its parameters and its limits, over the definition. So whatever makes a peer's call from ours is
run everywhere.
"""

from __future__ import annotations

import inspect
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_sparse_decode import keys_as_multiplied

from mla_patch.compat.sglang.flash_mla import before_v41
from mla_patch.compat.triton import interpreted
from mla_patch.flash_mla import FlashMLASchedMeta, flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata
from mla_patch.kernels.cache.layouts import V4, V32, new_pages
from mla_patch.kernels.cache.quantize import quantize
from mla_patch.kernels.sparse import dense_decode_ref, mla_sparse_prefill_ref, sparse_decode_ref

DEVICE = "cpu" if interpreted() else "cuda"
# the interpreter's tl.dot is wrong on bfloat16
HALF = torch.float16 if interpreted() else torch.bfloat16
E4M3 = torch.float8_e4m3fn
LAYOUTS = {"V3.2": V32, "V4": V4}
INT = {"dtype": torch.int32, "device": DEVICE}


@dataclass(frozen=True)
class Case:
    peer: str
    kind: str  # dense, e4m3 (dense too), V3.2, V4, prefill
    heads: int
    queries: int  # of each request; of prefill, all
    count: int  # topk; of dense, the longest request's tokens
    extra: int = 0  # topk in a second cache
    page: int = 64  # of V4's caches
    extra_page: int = 64
    width: int = 576  # of prefill
    rows: int = 2500  # tokens in a cache, or of a workspace

    def __str__(self) -> str:
        more = f" + {self.extra} page {self.extra_page}" if self.extra else f" {self.width}" * (self.kind == "prefill")
        return f"{self.peer} {self.kind} {self.heads} heads {self.queries} queries {self.count}{more}"


HEADS = (64, 128)
CASES = [
    *(Case("package", "dense", heads, queries, 4000) for heads in (20, *HEADS) for queries in (1, 2)),
    *(Case("package", "V3.2", heads, q, topk) for heads in HEADS for q, topk in ((1, 2048), (2, 100))),
    *(Case("package", "V4", heads, q, topk, page=128) for heads in HEADS for q, topk in ((1, 128), (2, 100))),
    *(Case("package", "V4", heads, 1, 128, 512) for heads in HEADS),
    *(Case("package", "V4", heads, 2, 70, 33, 256, 2) for heads in HEADS),
    *(Case("package", "prefill", h, 50, n, width=w) for h in HEADS for n, w in ((640, 576), (100, 576), (2000, 512))),
    *(Case("operators", "dense", heads, queries, 4000) for heads in (16, *HEADS) for queries in (1, 2)),
    *(Case("operators", "e4m3", heads, queries, 4000) for heads in (16, *HEADS) for queries in (1, 2)),
    *(Case("operators", "V3.2", heads, q, topk) for heads in HEADS for q, topk in ((1, 2048), (2, 100))),
    *(Case("operators", "prefill", h, 50, n, width=w) for h in HEADS for n, w in ((640, 576), (100, 512))),
]
# one of every kind, and of every way to be padded or not
SMALL = [
    Case("package", "dense", 20, 2, 70),
    Case("package", "V3.2", 64, 1, 40, rows=60),
    Case("package", "V4", 64, 1, 64, page=16, rows=60),
    Case("package", "V4", 64, 2, 40, 33, 16, 2, rows=60),
    Case("package", "prefill", 64, 4, 40, rows=60),
    Case("package", "prefill", 64, 4, 128, width=512, rows=60),
    Case("operators", "dense", 16, 1, 70),
    Case("operators", "e4m3", 16, 2, 70),
    Case("operators", "V3.2", 64, 2, 40, rows=60),
    Case("operators", "prefill", 64, 4, 40, rows=60),
]


def lens_of(count: int) -> list[int]:
    """Lengths of four requests; the last has keys beyond its holes."""
    return [count // 3, 0, 1, count]


def holes(ids: torch.Tensor) -> torch.Tensor:
    """-1 for a tenth of the indices, a whole stretch, and all that the first query has."""
    ids[torch.rand(ids.shape, device=DEVICE) < 0.1] = -1
    ids[-1, :, 2:35] = -1
    ids[0] = -1
    return ids.int()


def sinks(heads: int) -> torch.Tensor:
    values = torch.randn(heads, device=DEVICE)
    values[:2] = torch.tensor([math.inf, -math.inf])
    return values


def dense_call(case: Case) -> SimpleNamespace:
    """Pages in any order; e4m3 without empty requests, for which the peer's kernel faults."""
    lens = [max(n, case.queries) if case.kind == "e4m3" else n for n in lens_of(case.count)]
    pages = [-(-n // 64) for n in lens]
    order = torch.randperm(sum(pages)).tolist()
    table = torch.zeros(len(lens), max(pages), dtype=torch.int32)
    for b, count in enumerate(pages):
        table[b, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    dtype = E4M3 if case.kind == "e4m3" else HALF
    args = {
        "q": torch.randn(len(lens), case.queries, case.heads, 576, device=DEVICE).to(dtype),
        "k_cache": torch.randn(sum(pages), 64, 1, 576, device=DEVICE).to(dtype), "block_table": table.to(DEVICE),
        "cache_seqlens": torch.tensor(lens, **INT), "softmax_scale": 0.05, "causal": True,
    }  # fmt: skip
    if case.kind == "e4m3":
        args |= {"descale_q": torch.tensor([0.5], device=DEVICE), "descale_k": torch.tensor([1.5], device=DEVICE)}
    want = dense_decode_ref(**{"sm_scale" if name == "softmax_scale" else name: one for name, one in args.items()})
    return SimpleNamespace(args=args, want=want, ours=lambda: decode(args))


def sparse_call(case: Case) -> SimpleNamespace:
    """Sinks; of V4 lengths, too, and a second cache. V3.2's kernel takes neither."""
    layout, batch = LAYOUTS[case.kind], 4

    def cached(count: int, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        cache = new_pages(layout, -(-case.rows // page), page, DEVICE)
        slots = torch.arange(cache.shape[0] * page, device=DEVICE)
        quantize(torch.randn(len(slots), layout.width, device=DEVICE), cache, slots)
        return cache, holes(torch.randint(0, len(slots), (batch, case.queries, count), device=DEVICE))

    args: dict[str, Any] = {
        "q": (torch.randn(batch, case.queries, case.heads, layout.width, device=DEVICE) / 4).bfloat16(),
        "softmax_scale": 0.05, "is_fp8_kvcache": True,
    }  # fmt: skip
    args["k_cache"], args["indices"] = cached(case.count, case.page if layout is V4 else 64)
    if case.peer == "package":
        args["attn_sink"] = sinks(case.heads)
    if layout is V4:
        args["topk_length"] = torch.tensor(lens_of(case.count), **INT)
    if case.extra:
        args["extra_k_cache"], args["extra_indices_in_kvcache"] = cached(case.extra, case.extra_page)
        args["extra_topk_length"] = torch.tensor([0, 0, case.extra, case.extra // 2], **INT)
    with keys_as_multiplied(layout, args["q"]):
        want = sparse_definition(**args)
    return SimpleNamespace(args=args, want=want, ours=lambda: decode(args))


def sparse_definition(
    q, k_cache, indices, softmax_scale, is_fp8_kvcache=True, extra_indices_in_kvcache=None, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sparse_decode_ref` by the wrappers' names."""
    extra = {"extra_indices": extra_indices_in_kvcache, **options}
    return sparse_decode_ref(q, k_cache, indices, sm_scale=softmax_scale, **extra)


def decode(args: dict[str, Any], **metadata: Any) -> tuple[torch.Tensor, ...]:
    rest = {"block_table": None, "cache_seqlens": None, "head_dim_v": 512}
    return flash_mla_with_kvcache(**rest | args | (metadata or {"tile_scheduler_metadata": get_mla_metadata()[0]}))


def prefill_call(case: Case) -> SimpleNamespace:
    """Rows that nobody names are NaN."""
    kv = torch.full((case.rows, 1, case.width), math.nan, dtype=HALF, device=DEVICE)
    ids = torch.randint(1, case.rows // 2, (case.queries, 1, case.count), device=DEVICE) * 2
    kv[ids.flatten(), 0] = torch.randn(ids.numel(), case.width, device=DEVICE).to(HALF)
    args: dict[str, Any] = {
        "q": (torch.randn(case.queries, case.heads, case.width, device=DEVICE) / 4).to(HALF), "kv": kv,
        "indices": holes(ids), "sm_scale": 0.05,
    }  # fmt: skip
    args["indices"][-1, 0, :3] = torch.tensor([case.rows, 2**31 - 1, -(2**31)], **INT)  # no keys either
    if case.peer == "package":
        lens = (lens_of(case.count) * case.queries)[: case.queries]
        args |= {"attn_sink": sinks(case.heads), "topk_length": torch.tensor(lens, **INT)}
    log2 = case.peer == "operators"
    want = mla_sparse_prefill_ref(**args, return_log2=log2)
    return SimpleNamespace(args=args, want=want, ours=lambda: flash_mla_sparse_fwd(**args, return_log2=log2))


def padded(ids: torch.Tensor, step: int) -> torch.Tensor:
    """As many indices as a kernel takes, -1 behind a query's own."""
    return torch.nn.functional.pad(ids, (0, -ids.shape[-1] % step), value=-1)


def through_package(package: Any, case: Case, given: dict[str, Any], meta: Any = None) -> tuple[torch.Tensor, ...]:
    if case.kind == "prefill":
        prefill = before_v41(package.flash_mla_sparse_fwd)
        return prefill(**given | {"indices": padded(given["indices"], 128)})
    args = {"block_table": None, "cache_seqlens": None, "head_dim_v": 512, **given}
    for name in ("indices", "extra_indices_in_kvcache"):
        if name in args:
            args[name] = padded(args[name], 64)
    if case.kind in LAYOUTS:
        args |= {name: args[name].view(E4M3) for name in ("k_cache", "extra_k_cache") if name in args}
    meta = package.get_mla_metadata()[0] if meta is None else meta
    return before_v41(package.flash_mla_with_kvcache)(**args, tile_scheduler_metadata=meta)


def through_operators(ops: Any, case: Case, args: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """As the wrappers of sglang-kernel to 0.4.2 call them."""
    if case.kind == "prefill":
        return ops.sparse_prefill_fwd(args["q"], args["kv"], padded(args["indices"], 128), args["sm_scale"], 512)
    q, cache, scale = args["q"], args["k_cache"], args["softmax_scale"]
    batch, queries, heads = q.shape[:3]
    if case.kind in LAYOUTS:
        ids = padded(args["indices"], 64)
        lens, table = torch.full((batch,), ids.shape[-1], **INT), torch.empty(batch, 0, **INT)
        schedule = ops.get_mla_decoding_metadata(lens, queries * heads, 1, heads, True, ids.shape[-1])
        return ops.fwd_kvcache_mla(q, cache.view(E4M3), 512, lens, table, scale, False, *schedule, True, ids)
    lens, table = args["cache_seqlens"], args["block_table"]
    if case.kind == "e4m3":
        schedule = ops.get_mla_decoding_metadata_dense_fp8(lens, queries * heads, 1)
        descales = args["descale_q"], args["descale_k"]
        return ops.fwd_kvcache_mla_fp8(q, cache, 512, lens, table, scale, args["causal"], *schedule, *descales)
    schedule = ops.get_mla_decoding_metadata(lens, queries * heads, 1, None, False, None)
    return ops.fwd_kvcache_mla(q, cache, 512, lens, table, scale, args["causal"], *schedule, False, None)


THROUGH = {"package": through_package, "operators": through_operators}


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """The worst query's distance, relative to its norm; one of zeros must be met exactly."""
    assert got.shape == want.shape and torch.isfinite(got).all()
    wrong, norm = (got.double() - want).flatten(-2).norm(dim=-1), want.flatten(-2).norm(dim=-1)
    assert not wrong[norm == 0].any()
    return float((wrong / norm)[norm > 0].max())


def make(case: Case) -> SimpleNamespace:
    return {"dense": dense_call, "e4m3": dense_call, "prefill": prefill_call}.get(case.kind, sparse_call)(case)


def beside(case: Case, peer: Any) -> None:
    call = make(case)
    lonely = (call.want[0].flatten(-2) == 0).all(-1)
    assert lonely.any() == (case.kind != "e4m3") and not lonely.all()
    theirs, mine = THROUGH[case.peer](peer, case, call.args), call.ours()
    # 16-bit weights and the rounding of a 16-bit result; both sides multiply V3.2's keys in bfloat16, where wide
    assert off(mine[0], call.want[0]) < 4e-3
    # loose: that both mean the same by these tensors. Of fp8 products 0.05 was measured, and 0.17 of a sharp softmax
    assert off(theirs[0], call.want[0]) < (0.2 if case.kind == "e4m3" else 0.02)
    # scores are float32 sums, but V3.2's values are rounded by 2**-12, in parts of up to 8 times a score
    atol = 1e-5 if case.kind == "prefill" else 32 * 2**-12 if case.kind in LAYOUTS else 1e-3
    for ours, other, want in zip(mine[1:], theirs[1:], call.want[1:], strict=True):
        # infinities in the same places; the wrong base would be off by a factor of 1.44
        torch.testing.assert_close(ours.double(), want, rtol=8 / 65536, atol=atol)
        loose = 0.1 if case.kind == "e4m3" else 0.02
        torch.testing.assert_close(other.double(), want, rtol=1e-3, atol=loose)


def one_schedule(case: Case, package: Any) -> None:
    """A FlashMLASchedMeta of the package's: ours use it first, then FlashMLA, then ours."""
    call = make(case)
    meta = package.get_mla_metadata()[0]
    first = decode(call.args, tile_scheduler_metadata=meta)
    assert off(first[0], call.want[0]) < 4e-3 and meta.tile_scheduler_metadata is None
    assert off(through_package(package, case, call.args, meta)[0], call.want[0]) < 0.02
    for mine, again in zip(first, decode(call.args, tile_scheduler_metadata=meta), strict=True):
        assert torch.equal(mine, again)


def older_schedule(case: Case, ops: Any) -> None:
    """The operators' tensors are of the shapes that ours are, and ours take them."""
    call = make(case)
    batch, queries, heads = call.args["q"].shape[:3]
    lens, topk = torch.full((batch,), case.count, **INT), case.count if case.kind in LAYOUTS else None
    arguments = (call.args.get("cache_seqlens", lens), queries * heads, 1, heads, topk is not None, topk)
    made = ops.get_mla_decoding_metadata(*arguments)
    for theirs, mine in zip(made, get_mla_metadata(*arguments), strict=True):
        assert (theirs.shape, theirs.dtype, theirs.device) == (mine.shape, mine.dtype, mine.device)
    rest = {"cache_seqlens": lens, "block_table": torch.empty(batch, 0, **INT)}
    args = rest | call.args
    got = decode(args, tile_scheduler_metadata=made[0], num_splits=made[1])
    assert off(got[0], call.want[0]) < 4e-3


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_beside_a_stand_in(case):
    beside(case, STAND_INS[case.peer])


@pytest.mark.parametrize("case", (SMALL[0], SMALL[1], SMALL[4]), ids=str)
def test_beside_a_stand_in_that_wants_its_flag(case):
    beside(case, Flagged)


def test_one_schedule_beside_a_stand_in():
    one_schedule(SMALL[0], Package)
    older_schedule(Case("operators", "dense", 16, 2, 70), Operators)


def on_sm_90() -> None:
    if interpreted():
        pytest.skip("needs TRITON_INTERPRET=0")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an sm_90 GPU")


def the_package() -> Any:
    on_sm_90()
    if find_spec("flash_mla") is None:
        pytest.skip("no package flash_mla: unpack its wheel and name the folder in PYTHONPATH")
    module = import_module("flash_mla")
    if not hasattr(import_module("flash_mla.flash_mla_interface"), "FlashMLASchedMeta"):
        pytest.skip(f"{module.__file__} has the older API")
    return module


@lru_cache(maxsize=1)
def the_operators() -> Any:
    on_sm_90()
    if "FLASHMLA_OPS" not in os.environ:
        pytest.skip("FLASHMLA_OPS does not name a library of FlashMLA's operators")
    torch.ops.load_library(os.environ["FLASHMLA_OPS"])
    return torch.ops.sgl_kernel


REAL = {"package": the_package, "operators": the_operators}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_beside_flash_mla(case):
    beside(case, REAL[case.peer]())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case("package", "dense", 64, 2, 4000),
        Case("package", "V3.2", 64, 1, 2048),
        Case("package", "V4", 128, 2, 128, 64),
        *(Case("operators", "dense", heads, queries, 4000) for heads in (16, 128) for queries in (1, 3)),
        *(Case("operators", "V3.2", heads, queries, 2048) for heads in HEADS for queries in (1, 2)),
    ],
    ids=str,
)
def test_one_schedule_beside_flash_mla(case):
    {"package": one_schedule, "operators": older_schedule}[case.peer](case, REAL[case.peer]())


@pytest.mark.gpu
def test_stand_ins_have_the_peers_parameters():
    package, operators = the_package(), the_operators()
    for name, function in vars(Package).items():
        if isinstance(function, staticmethod):
            theirs = inspect.signature(getattr(package, name)).parameters
            # what newer packages added may be left out
            more = [theirs[one] for one in theirs.keys() - parameters(function)]
            assert theirs.keys() >= parameters(function) and all(one.default is not one.empty for one in more), name
    for name, function in vars(Operators).items():
        if isinstance(function, staticmethod):
            schema = getattr(operators, name).default._schema
            assert {one.name for one in schema.arguments} == parameters(function), name


def parameters(function: staticmethod) -> Any:
    return inspect.signature(function.__func__).parameters.keys()


def taken(q: torch.Tensor, ids: torch.Tensor, step: int, extra: torch.Tensor | None = None) -> None:
    """FlashMLA's limits on sparse attention."""
    assert q.shape[-2] in HEADS
    for one in (ids, extra):
        assert one is None or (one.shape[-1] and one.shape[-1] % step == 0 and one.is_contiguous())


def stored(q, k_cache, *tables) -> None:
    """FlashMLA's limits on dense decode."""
    assert k_cache.shape[1] == 64 and k_cache.dtype is q.dtype and all(one.dtype is torch.int32 for one in tables)


class Package:
    """In the place of the package."""

    @staticmethod
    def get_mla_metadata(*args, **kwargs):
        return FlashMLASchedMeta(), None

    @staticmethod
    def flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
        softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None, extra_k_cache=None,
        extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None,
    ):  # fmt: skip
        more = (attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length)
        assert isinstance(tile_scheduler_metadata, FlashMLASchedMeta) and num_splits is None and head_dim_v == 512
        if indices is None:
            assert not is_fp8_kvcache and more == (None,) * 5
            stored(q, k_cache, block_table, cache_seqlens)
            return dense_decode_ref(q, k_cache, block_table, cache_seqlens, sm_scale=softmax_scale, causal=causal)
        assert is_fp8_kvcache and not causal and k_cache.dtype is E4M3
        # the only one that the kernels know
        assert ((indices == -1) | ((indices >= 0) & (indices < k_cache.shape[0] * k_cache.shape[1]))).all()
        assert k_cache.shape[-1] == 584 or more[1:] == (None,) * 4
        taken(q, indices, 64, extra_indices_in_kvcache)
        return sparse_definition(
            q, k_cache, indices, softmax_scale, attn_sink=attn_sink, topk_length=topk_length,
            extra_k_cache=extra_k_cache, extra_indices_in_kvcache=extra_indices_in_kvcache,
            extra_topk_length=extra_topk_length,
        )  # fmt: skip

    @staticmethod
    def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
        taken(q, indices, 128)
        return mla_sparse_prefill_ref(q, kv, indices, sm_scale, d_v, attn_sink, topk_length)


def behind_a_flag(function: Any) -> staticmethod:
    def call(*args: Any, use_legacy: bool = False, **kwargs: Any) -> Any:
        assert use_legacy
        return function(*args, **kwargs)

    return staticmethod(call)


class Flagged(Package):
    flash_mla_with_kvcache = behind_a_flag(Package.flash_mla_with_kvcache)
    flash_mla_sparse_fwd = behind_a_flag(Package.flash_mla_sparse_fwd)


class Operators:
    """In the place of the operators, whose statistics of sparse prefill are to the base 2."""

    @staticmethod
    def get_mla_decoding_metadata(seqlens_k, num_q_tokens_per_head_k, h_k, h_q, is_fp8_kvcache, topk):
        assert is_fp8_kvcache == (topk is not None) and (h_q is not None or not is_fp8_kvcache)
        return get_mla_metadata(seqlens_k, num_q_tokens_per_head_k, h_k, h_q, is_fp8_kvcache, topk)

    @staticmethod
    def get_mla_decoding_metadata_dense_fp8(seqlens_k, num_heads_per_head_k, num_heads_k):
        assert (seqlens_k > 0).all()
        return get_mla_metadata(seqlens_k, num_heads_per_head_k, num_heads_k)

    @staticmethod
    def fwd_kvcache_mla(
        q, kv_cache, head_size_v, seqlens_k, block_table, softmax_scale, is_causal, tile_scheduler_metadata, num_splits,
        is_fp8, indices,
    ):  # fmt: skip
        assert head_size_v == 512 and num_splits.shape == (len(q) + 1,) and tile_scheduler_metadata.shape[1] == 8
        assert is_fp8 == (indices is not None)
        if indices is None:
            stored(q, kv_cache, block_table, seqlens_k)
            return dense_decode_ref(q, kv_cache, block_table, seqlens_k, sm_scale=softmax_scale, causal=is_causal)
        assert kv_cache.dtype is E4M3 and not is_causal and (seqlens_k == indices.shape[-1]).all()
        taken(q, indices, 64)
        return sparse_definition(q, kv_cache, indices, softmax_scale)

    @staticmethod
    def fwd_kvcache_mla_fp8(
        q, kcache, head_size_v, seqlens_k, block_table, softmax_scale, is_causal, tile_scheduler_metadata, num_splits,
        descale_q, descale_k,
    ):  # fmt: skip
        assert q.dtype is E4M3 and head_size_v == 512 and descale_q.shape == descale_k.shape == (1,)
        stored(q, kcache, block_table, seqlens_k)
        return dense_decode_ref(
            q, kcache, block_table, seqlens_k, sm_scale=softmax_scale, causal=is_causal, descale_q=descale_q,
            descale_k=descale_k,
        )  # fmt: skip

    @staticmethod
    def sparse_prefill_fwd(q, kv, indices, sm_scale, d_v):
        taken(q, indices, 128)
        return mla_sparse_prefill_ref(q, kv, indices, sm_scale, d_v, return_log2=True)


STAND_INS = {"package": Package, "operators": Operators}
