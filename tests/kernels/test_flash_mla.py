"""The wrappers: both forms of metadata, what is refused by name, and the kernel behind each call."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from mla_patch import flash_mla
from mla_patch.compat.triton import interpreted
from mla_patch.flash_mla import (
    FlashMLASchedMeta,
    MetadataMismatch,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from mla_patch.kernels.cache.layouts import V4, V32, new_pages
from mla_patch.kernels.cache.quantize import quantize
from mla_patch.kernels.sparse import dense_decode_ref, mla_sparse_prefill_ref, sparse_decode_ref

DEVICE = "cpu" if interpreted() else "cuda"
HALF = torch.float16 if interpreted() else torch.bfloat16


def sparse(layout=V4, batch=2, heads=4, topk=8, page=4, queries=1, pages=9):
    cache = new_pages(layout, pages, page, DEVICE)
    quantize(torch.randn(pages * page, layout.width, device=DEVICE), cache, torch.arange(pages * page, device=DEVICE))
    ids = torch.randint(0, pages * page, (batch, queries, topk), device=DEVICE).int()
    q = (torch.randn(batch, queries, heads, layout.width, device=DEVICE) / 4).bfloat16()
    return {
        "q": q, "k_cache": cache, "block_table": None, "cache_seqlens": None, "head_dim_v": 512,
        "tile_scheduler_metadata": get_mla_metadata()[0], "is_fp8_kvcache": True, "indices": ids,
    }  # fmt: skip


def dense(lens=(40, 3), heads=4, page=64, queries=1, dtype=HALF):
    pages = [-(-n // page) for n in lens]
    kv = torch.randn(sum(pages), page, 1, 576, device=DEVICE).to(dtype)
    table = torch.arange(sum(pages), device=DEVICE).int()[None].repeat(len(lens), 1)
    table[1] = table[1].roll(-pages[0])
    q = torch.randn(len(lens), queries, heads, 576, device=DEVICE).to(dtype)
    seqlens = torch.tensor(lens, device=DEVICE).int()
    metadata, num_splits = get_mla_metadata(seqlens, queries * heads, 1)
    return {
        "q": q, "k_cache": kv, "block_table": table, "cache_seqlens": seqlens, "head_dim_v": 512,
        "tile_scheduler_metadata": metadata, "num_splits": num_splits, "causal": True,
    }  # fmt: skip


def tensors(args):
    """The same call with tensors for metadata, as hosts of the older API make it."""
    batch, queries, heads = args["q"].shape[:3]
    seqlens = torch.ones(batch, device=DEVICE).int()
    metadata, num_splits = get_mla_metadata(seqlens, queries * heads, 1, heads, True, args["indices"].shape[-1])
    empty = torch.empty(batch, 0, dtype=torch.int32, device=DEVICE)
    new = {"tile_scheduler_metadata": metadata, "num_splits": num_splits, "block_table": empty}
    return args | new | {"cache_seqlens": seqlens}


def close(got, want):
    torch.testing.assert_close(got[1].double(), want[1], rtol=8 / 65536, atol=1e-3)
    assert (got[0].double() - want[0]).norm() <= 4e-3 * want[0].norm()


@pytest.mark.parametrize("layout", [V32, V4], ids=lambda layout: layout.name)
def test_sparse_calls(layout):
    args = sparse(layout)
    args |= {"attn_sink": torch.randn(4, device=DEVICE), "topk_length": torch.tensor([8, 0], device=DEVICE).int()}
    second = sparse(layout, topk=3, page=2)
    args |= {"extra_k_cache": second["k_cache"], "extra_indices_in_kvcache": second["indices"] // 2}
    args |= {"extra_topk_length": torch.tensor([2, 3], device=DEVICE).int(), "softmax_scale": 0.1}
    want = sparse_decode_ref(
        args["q"], args["k_cache"], args["indices"], sm_scale=0.1, attn_sink=args["attn_sink"],
        topk_length=args["topk_length"], extra_k_cache=args["extra_k_cache"],
        extra_indices=args["extra_indices_in_kvcache"], extra_topk_length=args["extra_topk_length"],
    )  # fmt: skip
    close(flash_mla_with_kvcache(**args), want)


def test_the_scale_is_the_keys_own():
    for layout in (V32, V4):
        args = sparse(layout)
        want = sparse_decode_ref(args["q"], args["k_cache"], args["indices"], sm_scale=layout.width**-0.5)
        close(flash_mla_with_kvcache(**args), want)


def test_tensor_metadata():
    args = tensors(sparse(V32))
    close(
        flash_mla_with_kvcache(**args),
        sparse_decode_ref(args["q"], args["k_cache"], args["indices"], sm_scale=576**-0.5),
    )
    for queries in (1, 2):
        args = dense(queries=queries)
        want = dense_decode_ref(
            args["q"], args["k_cache"], args["block_table"], args["cache_seqlens"], sm_scale=576**-0.5, causal=True
        )
        close(flash_mla_with_kvcache(**args), want)


def test_dense_e4m3():
    args = dense(dtype=torch.float8_e4m3fn)
    args |= {"descale_q": torch.tensor([0.5], device=DEVICE), "descale_k": torch.tensor([2.0], device=DEVICE)}
    want = dense_decode_ref(
        args["q"], args["k_cache"], args["block_table"], args["cache_seqlens"], sm_scale=576**-0.5,
        descale_q=args["descale_q"], descale_k=args["descale_k"],
    )  # fmt: skip
    out, lse = flash_mla_with_kvcache(**args)
    assert out.dtype == torch.bfloat16
    close((out, lse), want)


def test_descales_are_of_e4m3_alone():
    args = dense()
    want = flash_mla_with_kvcache(**args)
    two = torch.full((1,), 2.0, device=DEVICE)
    for given in ({"descale_q": two, "descale_k": two}, {"descale_k": two}):
        assert all(map(torch.equal, flash_mla_with_kvcache(**args | given), want))


def test_a_schedule_is_right_for_other_lengths():
    """Upstream reads stale work from it: wrong rows where lengths grew, a fault where they shrank."""
    args = sparse(topk=40, pages=20)
    lens = torch.tensor([3, 40], device=DEVICE).int()
    for _ in range(2):
        out = flash_mla_with_kvcache(**args, topk_length=lens)
        close(out, sparse_decode_ref(
            args["q"], args["k_cache"], args["indices"], sm_scale=512**-0.5, topk_length=lens))  # fmt: skip
        lens.copy_(lens.flip(0).clone())
    args = dense((40, 3))
    args["cache_seqlens"].copy_(torch.tensor([1, 60]))
    want = dense_decode_ref(args["q"], args["k_cache"], args["block_table"], args["cache_seqlens"], sm_scale=576**-0.5)
    close(flash_mla_with_kvcache(**args), want)


def test_what_a_sched_meta_was_used_for():
    args = sparse()
    meta = args["tile_scheduler_metadata"]
    assert get_mla_metadata() == (FlashMLASchedMeta(), None) and meta is not get_mla_metadata()[0]
    flash_mla_with_kvcache(**args)
    assert meta.have_initialized
    assert meta.config == FlashMLASchedMeta.Config(2, 1, 4, 4, 1, False, True, 8, None, None)
    # nothing that a schedule could be stale in
    assert meta.tile_scheduler_metadata is None and meta.num_splits is None
    flash_mla_with_kvcache(**args)


@pytest.mark.parametrize(
    "field, change",
    [
        ("b", lambda: sparse(batch=3)),
        ("s_q", lambda: sparse(queries=2)),
        ("h_q", lambda: sparse(heads=5)),
        ("page_block_size", lambda: sparse(page=8)),
        ("topk", lambda: sparse(topk=9)),
        ("extra_page_block_size", lambda: sparse() | extra(page=4)),
        ("extra_topk", lambda: sparse() | extra(topk=5)),
        ("is_fp8_kvcache", lambda: dense((1, 2), page=4) | {"is_fp8_kvcache": False}),
        ("causal", None),
        ("h_k", None),
    ],
)
def test_a_sched_meta_of_another_call(field, change):
    args = sparse() | (extra() if field.startswith("extra") else {})
    meta = args["tile_scheduler_metadata"]
    flash_mla_with_kvcache(**args)
    if change is None:  # what no call of ours gets as far as
        setattr(meta.config, field, {"causal": True, "h_k": 2}[field])
        other = args
    else:
        other = change() | {"tile_scheduler_metadata": meta, "num_splits": None, "causal": False}
    with pytest.raises(MetadataMismatch, match=f"tile_scheduler_metadata: made for {field} ") as raised:
        flash_mla_with_kvcache(**other)
    assert isinstance(raised.value, AssertionError) and isinstance(raised.value, ValueError)


def extra(topk=3, page=2):
    second = sparse(topk=topk, page=page)
    return {"extra_k_cache": second["k_cache"], "extra_indices_in_kvcache": second["indices"]}


def test_a_hosts_own_class():
    """It keeps its identity, is given a Config of its own, and nothing is recorded by a call that was refused."""

    class FlashMLASchedMeta:
        def __init__(self):
            self.have_initialized, self.config, self.tile_scheduler_metadata = False, None, None

        class Config(SimpleNamespace):
            pass

    meta = FlashMLASchedMeta()
    args = sparse() | {"tile_scheduler_metadata": meta}
    with pytest.raises(ValueError, match="indices"):
        flash_mla_with_kvcache(**args | {"indices": args["indices"].long()})
    assert not meta.have_initialized
    flash_mla_with_kvcache(**args)
    assert type(meta.config) is FlashMLASchedMeta.Config and meta.config.topk == 8 and meta.config.h_q == 4


@dataclass
class Newer(FlashMLASchedMeta.Config):
    """With fields of a FlashMLA to come."""

    enable_batch_invariant: bool
    stored_as: str | None
    waits: bool = True
    parts: list[int] = field(default_factory=list)


def test_a_class_whose_config_has_more():
    """sgl-flash-mla's compares one field more, which a call that leaves it out has False in."""
    kind = type("FlashMLASchedMeta", (FlashMLASchedMeta,), {"Config": Newer})
    meta = kind()
    for _ in range(2):
        flash_mla_with_kvcache(**sparse() | {"tile_scheduler_metadata": meta})
    assert meta.config == Newer(2, 1, 4, 4, 1, False, True, 8, None, None, False, None, True, [])
    assert meta.config.enable_batch_invariant is False


def test_nothing_to_do():
    args = sparse(topk=0)
    out, lse = flash_mla_with_kvcache(**args)
    assert (out == 0).all() and (lse == math.inf).all()
    args = sparse()
    args |= {"q": args["q"][:0], "indices": args["indices"][:0]}
    assert flash_mla_with_kvcache(**args)[0].shape == (0, 1, 4, 512)
    for args in (sparse(queries=0), tensors(sparse(V32)), dense(dtype=HALF), dense(dtype=torch.float8_e4m3fn)):
        new = {name: args[name][:, :0] for name in ("q", "indices") if name in args}
        out, lse = flash_mla_with_kvcache(**args | new)
        assert out.shape == (2, 0, 4, 512) and lse.shape == (2, 4, 0)
    args = dense((0, 0))
    out, lse = flash_mla_with_kvcache(**args | {"k_cache": torch.zeros(1, 64, 1, 576, device=DEVICE, dtype=HALF)})
    assert (out == 0).all() and (lse == math.inf).all()


def used(**changes):
    """A call whose metadata were used for another like it."""
    args = sparse()
    meta = args["tile_scheduler_metadata"]
    meta.have_initialized, meta.config = True, FlashMLASchedMeta.Config(2, 1, 4, 4, 1, False, True, 8, None, None)
    vars(meta).update(changes)
    return args


@pytest.mark.parametrize(
    "call, changes, message",
    [
        (sparse, {"kv_format": "V41"}, "kv_format: V41, expected None or V32"),
        (sparse, {"kv_format": "V32"}, "k_cache: 584 bytes a token, expected 656"),
        (sparse, {"use_legacy": False}, "use_legacy: False, expected True"),
        (sparse, {"k_cache": torch.zeros(2, 4, 1, 528, dtype=torch.uint8)}, "k_cache: 528 bytes a token"),
        (sparse, {"head_dim_v": 128}, "head_dim_v: 128, expected 512"),
        (sparse, {"q": torch.zeros(2, 4, 512)}, r"q: shape \(2, 4, 512\), expected 4 dimensions"),
        (sparse, {"num_splits": torch.zeros(3)}, "num_splits: given, expected None beside a FlashMLASchedMeta"),
        (sparse, {"causal": True}, "causal: True, expected False beside indices"),
        (sparse, {"is_fp8_kvcache": False}, "is_fp8_kvcache: False, expected True beside indices"),
        (sparse, {"descale_k": torch.ones(1)}, "descale_k: given, expected None beside indices"),
        (sparse, {"tile_scheduler_metadata": 3}, "tile_scheduler_metadata: int, expected"),
        (lambda: tensors(sparse()), {"num_splits": None}, "num_splits: None, expected a tensor beside tensor"),
        (lambda: tensors(sparse()), {"block_table": None}, "block_table: None"),
        (lambda: tensors(sparse()), {"attn_sink": torch.zeros(4)}, "attn_sink: given, expected None beside tensor"),
        (lambda: tensors(sparse()), {"topk_length": torch.zeros(2)}, "topk_length: given"),
        (dense, {"cache_seqlens": None}, "cache_seqlens: None"),
        (
            lambda: dense(dtype=torch.float8_e4m3fn),
            {"descale_q": torch.ones(1, device=DEVICE)},
            "descale_k: None, expected both descales or neither",
        ),
        (dense, {"block_table": [0]}, "block_table: list, expected a tensor"),
        (sparse, {"q": None}, "q: NoneType, expected a tensor"),
        (sparse, {"k_cache": torch.zeros(())}, r"k_cache: shape \(\), expected 4 dimensions"),
        (sparse, {"k_cache": torch.zeros(584)}, r"k_cache: shape \(584,\), expected 4 dimensions"),
        (sparse, {"indices": torch.tensor(3)}, r"indices: shape \(\), expected 3 dimensions"),
        (sparse, {"topk_length": [1, 2]}, "topk_length: list, expected a tensor"),
        (sparse, {"attn_sink": 0.5}, "attn_sink: float, expected a tensor"),
        (sparse, {"softmax_scale": "x"}, "softmax_scale: 'x', expected a number"),
        (used, {"extra_k_cache": torch.zeros(3)}, r"extra_k_cache: shape \(3,\), expected 4 dimensions"),
        (used, {"indices": torch.tensor(3)}, r"indices: shape \(\), expected 3 dimensions"),
        (lambda: used(config=None), {}, "tile_scheduler_metadata: config None, expected what its first call"),
        (
            lambda: sparse() | extra(),
            {"extra_indices_in_kvcache": torch.zeros(2, 1, 3, dtype=torch.int64)},
            r"extra_indices_in_kvcache: torch.int64, shape \(2, 1, 3\), expected torch.int32",
        ),
        (
            lambda: sparse() | {"extra_k_cache": extra()["extra_k_cache"]},
            {},
            "extra_indices_in_kvcache: None, expected a tensor, since the other half",
        ),
        (
            sparse,
            {"topk_length": torch.ones(4, dtype=torch.int32, device=DEVICE)[::2]},
            r"topk_length: torch.int32, shape \(2,\), strides \(2,\), expected int32 or int64, \[2\], contiguous",
        ),
        (
            sparse,
            {"attn_sink": torch.ones(8, device=DEVICE)[::2]},
            r"attn_sink: torch.float32, shape \(4,\), strides \(2,\), expected a float for each of 4 heads, contig",
        ),
        (
            dense,
            {"tile_scheduler_metadata": FlashMLASchedMeta(), "num_splits": None, "topk_length": torch.zeros(2)},
            "topk_length: given, expected None without indices",
        ),
    ],
)
def test_misuse(call, changes, message):
    with pytest.raises(ValueError, match=message):
        flash_mla_with_kvcache(**call() | changes)


def prefill(queries=3, heads=4, topk=40, width=576, rows=60, dtype=HALF):
    q = (torch.randn(queries, heads, width, device=DEVICE) / 4).to(dtype)
    kv = torch.randn(rows, 1, width, device=DEVICE).to(dtype)
    ids = torch.randint(-5, rows + 5, (queries, 1, topk), device=DEVICE).int()
    return {"q": q, "kv": kv, "indices": ids, "sm_scale": width**-0.5}


@pytest.mark.parametrize("width", [576, 512])
@pytest.mark.parametrize(
    "base, log2",
    [({}, False), ({"return_log2": True}, True), ({"use_legacy": True}, True), ({"use_legacy": False}, False)],
)
def test_sparse_prefill_calls(width, base, log2):
    """By name and by position, with each way of naming the base of the statistics."""
    args = prefill(width=width)
    sink = torch.randn(4, device=DEVICE)
    lens = torch.tensor([40, 0, 7], device=DEVICE).int()
    want = mla_sparse_prefill_ref(**args, attn_sink=sink, topk_length=lens, return_log2=log2)
    place = torch.empty(3, 4, 512, dtype=args["q"].dtype, device=DEVICE)
    named = flash_mla_sparse_fwd(**args, attn_sink=sink, topk_length=lens, out=place, **base)
    assert named[0] is place
    for got in (named, flash_mla_sparse_fwd(*args.values(), 512, sink, lens, **base)):
        for mine, theirs in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=8 / 65536, atol=1e-5)
        assert (got[0].double() - want[0]).norm() <= 4e-3 * want[0].norm()
        assert (got[0][1] == 0).all() and (got[2][1] == math.inf).all()


def test_sparse_prefill_misuse():
    with pytest.raises(ValueError, match="return_log2: True, expected False beside use_legacy=False"):
        flash_mla_sparse_fwd(**prefill(), use_legacy=False, return_log2=True)
    for changes, message in (
        ({"kv": None}, "kv: NoneType, expected a tensor"),
        ({"topk_length": [1, 2, 3]}, "topk_length: list, expected a tensor"),
        ({"sm_scale": "x"}, "sm_scale: 'x', expected a number"),
        ({"d_v": 256}, "d_v: 256, expected 512"),
        ({"indices": torch.zeros(3, 40, device=DEVICE).int()}, r"indices: .*, expected torch.int32, \[3, 1, topk\]"),
        ({"topk_length": torch.ones(2, device=DEVICE).int()}, "topk_length: "),
    ):
        with pytest.raises(ValueError, match=message):
            flash_mla_sparse_fwd(**prefill() | changes)


def test_tensors_have_flash_mlas_shapes(monkeypatch):
    """132 multiprocessors: as measured of FlashMLA for 64 and 128 heads, one and two queries."""
    monkeypatch.setattr(flash_mla.gpu, "sm_count", lambda index: 132)
    lens = torch.ones(5, dtype=torch.int32)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))

    def parts(tokens, heads=None, topk=None):
        schedule, splits = get_mla_metadata(lens, tokens, 1, heads, topk is not None, topk)
        assert schedule.dtype == splits.dtype == torch.int32 and schedule.shape[1] == 8 and splits.shape == (6,)
        return schedule.shape[0]

    assert [parts(64), parts(128), parts(16), parts(65), parts(64 * 200)] == [132, 66, 132, 66, 1]
    assert [parts(64, 64, 512), parts(128, 64, 512), parts(128, 128, 512), parts(256, 128, 512)] == [132, 66, 66, 33]
    with pytest.raises(ValueError, match="num_heads_k: None"):
        get_mla_metadata(lens, 64)
    for arguments, message in (
        ((lens.float(), 64, 1), "cache_seqlens: torch.float32"),
        (([1, 2], 64, 1), "cache_seqlens: list, expected a tensor"),
        ((lens, 64, 1, -3, True, 64), "num_heads_q: -3, expected a number from 1 on"),
        ((lens, "64", 1), "num_q_tokens_per_head_k: '64', expected a number from 0 on"),
    ):
        with pytest.raises(ValueError, match=message):
            get_mla_metadata(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
def test_the_life_of_a_graph():
    """As DeepSeek V4's backend does it: an empty FlashMLASchedMeta again after the run before capture."""
    args = sparse(heads=64, topk=128, page=64, batch=8)
    lens = torch.ones(8, dtype=torch.int32, device=DEVICE)
    flash_mla_with_kvcache(**args, topk_length=lens)
    args["tile_scheduler_metadata"] = get_mla_metadata()[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_mla_with_kvcache(**args, topk_length=lens)
    for _ in range(3):
        lens.copy_(torch.randint(0, 129, (8,)))
        graph.replay()
        want = sparse_decode_ref(args["q"], args["k_cache"], args["indices"], sm_scale=512**-0.5, topk_length=lens)
        close((out, lse), want)
