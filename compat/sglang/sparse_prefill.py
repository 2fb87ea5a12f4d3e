"""SGLang: sparse prefill of DeepSeek V3.2 and V4, per release.

V4, DeepseekV4AttnBackend in srt.layers.attention.deepseek_v4_backend:

    0.5.12             none: `forward` attends over fp8 pages, and FlashMLA cannot make a schedule for many queries; the
                       indexer's choice is kept as slots alone
    0.5.13 - 0.5.23    `forward` (from 0.5.21 `_forward_attention`) calls `_forward_prefill_sparse` for prompts of more
                       than 11673 tokens, or all: SGLANG_OPT_FLASHMLA_SPARSE_PREFILL, on by default from 0.5.15
    0.5.13 - 0.5.14    its chunk's metadata outlives the replay of a breakable graph; it reads back as many tokens as
                       the page table is wide
    to 0.5.20          requests without new tokens index out of range; holes in what the indexer chose become rows of
                       another request; ranks of context parallelism, which have every n-th query, are taken for whole
    0.5.19 - 0.5.20    the metadata may be built ahead, where the tables may change under the forward; beside it
                       `_forward_prefill_sparse_q8kv8`, and in 0.5.20 TRT-LLM's route, both when asked for

Its kernels, all called from there:

    dequantize_k_cache_paged    srt.layers.attention.dsv4.dequant_k_cache to 0.5.15, kernels.ops.attention.dsv4 from
                                0.5.16; `layout` from 0.5.21; another name from 0.5.23. 32-bit addresses of what it
                                writes to 0.5.18
    combine_topk_swa_indices    srt.layers.attention.dsv4.sparse_prefill_utils, from 0.5.23 sparse_prefill_kernels in
                                kernels.ops.attention.dsv4; `query_pos` third from 0.5.21; `swa_indices`, `swa_lengths`
                                from 0.5.22
    build_swa_token_ids         beside it; `total_swa` from 0.5.18

V3.2, NativeSparseAttnBackend in nsa_backend, from 0.5.13 DeepseekSparseAttnBackend in dsa_backend:

    _forward_flashmla_sparse    pads heads to 64, on sm_100 to 128, which have to be a multiple of their number;
                                topk_length from 0.5.17, attn_sink from 0.5.20
    dequantize_k_cache_paged    nsa.dequant_k_cache, dsa from 0.5.13, kernels.ops.attention.dsa from 0.5.16; renamed in
                                0.5.23. 32-bit addresses of what it reads to 0.5.18: wrong beyond slot 3273603
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from mla_patch.compat.eras import Eras, since, value_at
from mla_patch.compat.sglang.v4_chunk import BACKEND, FORWARD, PREFILL, forward_call, prefill_call
from mla_patch.compat.types import Home

_SRT, _OPS = "sglang.srt.layers.attention", "sglang.kernels.ops.attention"


class DequantizeCall:
    """One call of dequantize_k_cache_paged; ``page_size`` None is V3.2's."""

    __slots__ = ("cache", "layout", "out", "page_size", "slots", "tile")
    tensors, optional = ("cache", "slots"), ("out",)

    def __init__(self, cache, slots, page_size=None, out=None, layout=None, tile=128):
        self.cache = cache
        self.slots = slots
        self.page_size = page_size
        self.out = out
        self.layout = layout
        self.tile = tile


def dequantize_v4(quant_k_cache, page_table_1_flattened, page_size, out=None, layout=None):
    return DequantizeCall(quant_k_cache, page_table_1_flattened, page_size, out, layout)


def dequantize_v32(quant_k_cache, page_table_1_flattened, group_size=128):
    return DequantizeCall(quant_k_cache, page_table_1_flattened, tile=group_size)


class CombineCall:
    """One call of combine_topk_swa_indices, in the newest release's order."""

    __slots__ = (
        "compress_ratio", "compressed_base", "gather_lens", "out_indices", "out_lens", "query_pos", "query_start_loc",
        "seq_lens", "swa_base", "swa_indices", "swa_lengths", "topk", "topk_indices", "window_size",
    )  # fmt: skip

    def __init__(
        self, topk_indices, query_start_loc, query_pos, seq_lens, gather_lens, compressed_base, swa_base, window_size,
        compress_ratio, topk, out_indices=None, out_lens=None, swa_indices=None, swa_lengths=None,
    ):  # fmt: skip
        self.topk_indices = topk_indices
        self.query_start_loc = query_start_loc
        self.query_pos = query_pos
        self.seq_lens = seq_lens
        self.gather_lens = gather_lens
        self.compressed_base = compressed_base
        self.swa_base = swa_base
        self.window_size = window_size
        self.compress_ratio = compress_ratio
        self.topk = topk
        self.out_indices = out_indices
        self.out_lens = out_lens
        self.swa_indices = swa_indices
        self.swa_lengths = swa_lengths


def combine_call(
    topk_indices, query_start_loc, seq_lens, gather_lens, compressed_base, swa_base, window_size, compress_ratio, topk,
    out_indices=None, out_lens=None,
):  # fmt: skip
    """To 0.5.20, without positions."""
    return CombineCall(
        topk_indices, query_start_loc, None, seq_lens, gather_lens, compressed_base, swa_base, window_size,
        compress_ratio, topk, out_indices, out_lens,
    )  # fmt: skip


class SwaCall:
    """One call of build_swa_token_ids."""

    __slots__ = (
        "extend_seq_lens", "full_to_swa", "req_pool_indices", "req_to_token", "seq_lens", "swa_window", "total_swa",
    )  # fmt: skip

    def __init__(
        self, seq_lens, extend_seq_lens, req_pool_indices, req_to_token, full_to_swa, swa_window, total_swa=None
    ):
        self.seq_lens = seq_lens
        self.extend_seq_lens = extend_seq_lens
        self.req_pool_indices = req_pool_indices
        self.req_to_token = req_to_token
        self.full_to_swa = full_to_swa
        self.swa_window = swa_window
        self.total_swa = total_swa


class V32Call:
    """One call of _forward_flashmla_sparse: sparse attention over a 16-bit workspace or cache."""

    __slots__ = ("attn_sink", "d_v", "indices", "kv", "q", "sm_scale", "topk_length")
    tensors, optional, numbers = ("q", "kv", "indices"), ("attn_sink", "topk_length"), ("sm_scale", "d_v")

    def __init__(
        self, backend, q_all, kv_cache, v_head_dim, page_table_1, sm_scale, topk_length=None, attn_sink=None
    ):  # fmt: skip
        self.q = q_all
        self.kv = kv_cache
        self.d_v = v_head_dim
        self.indices = page_table_1
        self.sm_scale = sm_scale
        # as the host does where padding makes them disagree
        whole = topk_length is not None and topk_length.shape[0] == q_all.shape[0]
        self.topk_length = topk_length if whole else None
        self.attn_sink = attn_sink


def pads(heads: int, capability: tuple[int, int] | None) -> bool:
    """Whether the V3.2 backend can give FlashMLA this number of heads, as it is or padded with zeros."""
    wanted = 128 if capability is not None and capability[0] >= 10 else 64
    return heads in (64, 128) if heads % wanted == 0 else wanted % heads == 0


# which releases have what

_DEQUANTIZE = ("quant_k_cache", "page_table_1_flattened")
_COMBINE = (
    "seq_lens", "gather_lens", "compressed_base", "swa_base", "window_size", "compress_ratio", "topk", "out_indices",
    "out_lens",
)  # fmt: skip
_WINDOWS = ("swa_indices", "swa_lengths")
_SWA = ("seq_lens", "extend_seq_lens", "req_pool_indices", "req_to_token", "full_to_swa", "swa_window")
_V32 = ("self", "q_all", "kv_cache", "v_head_dim", "page_table_1", "sm_scale")
# entry points that have had other names, or share one
V4_DEQUANTIZE, V32_DEQUANTIZE = "V4 dequantize_k_cache_paged", "V3.2 dequantize_k_cache_paged"
V32_PREFILL, V32_WARMUP, V4_WARMUP = "V3.2 _forward_flashmla_sparse", "V3.2 warmup", "DeepseekV4AttnBackend.warmup"


class V4(Enum):
    """What a release makes of the prompts of DeepSeek V4."""

    NO_MODEL = "the release has no DeepSeek V4"
    NO_ROUTE = "no sparse prefill: prompts attend over pages"
    FAULTY_ROUTE = "sparse prefill with the faults above"
    RIGHT_ROUTE = "sparse prefill that is right"


V4_PROMPTS: Eras[V4] = (
    ("0.5.21", V4.RIGHT_ROUTE),
    ("0.5.13", V4.FAULTY_ROUTE),
    ("0.5.12", V4.NO_ROUTE),
    ("0.5.5", V4.NO_MODEL),
)
# whether sm_120 attends over pages, by kernels of the release's own
SM120_OVER_PAGES: Eras[bool] = (("0.5.16", True), ("0.5.5", False))
# whether the release takes its route for long prompts alone, unless its own switch is set
ASKED_BY_RELEASE: Eras[bool] = (("0.5.15", False), ("0.5.13", True), ("0.5.5", False))
V32_BACKEND: Eras[tuple[str, str]] = (
    ("0.5.13", (f"{_SRT}.dsa_backend", "DeepseekSparseAttnBackend")),
    ("0.5.5", (f"{_SRT}.nsa_backend", "NativeSparseAttnBackend")),
)
INDEXER, PAGED_METADATA = f"{_SRT}.dsv4.indexer", f"{_SRT}.dsv4.metadata"
# from when on a release's own piece is as it should be. V3.2's dequantiser never is: from 0.5.19 its addresses are
# right, but it takes six times as long (docs/performance.md)
_RIGHT_SINCE = {
    V4_DEQUANTIZE: "0.5.19", "combine_topk_swa_indices": "0.5.21", "build_swa_token_ids": "0.5.13", V4_WARMUP: "0.5.21",
}  # fmt: skip


def v4_prompts(version: str | None) -> V4:
    """What the release makes of V4's prompts; the newest answer for an unknown one."""
    return value_at(V4_PROMPTS, version)


def own_is_right(entry: str, version: str | None) -> bool:
    """Whether the release's own piece at this entry point is as it should be."""
    first = _RIGHT_SINCE.get(entry)
    return first is not None and since(version, first)


def _v32_attention(at: tuple[str, str], *more: str) -> Home:
    module, owner = at
    return Home(module, f"{owner}._forward_flashmla_sparse", (*_V32, *more), bind=V32Call, entry=V32_PREFILL)


_DSA, _NSA = (value for _, value in V32_BACKEND)
V32_ATTENTION_HOMES: Eras[Home] = (
    ("0.5.20", _v32_attention(_DSA, "topk_length", "attn_sink")),
    ("0.5.17", _v32_attention(_DSA, "topk_length")),
    ("0.5.13", _v32_attention(_DSA)),
    ("0.5.5", _v32_attention(_NSA)),
)


def _v32_dequantize(folder: str, name: str = "dequantize_k_cache_paged") -> Home:
    params = (*_DEQUANTIZE, "group_size")
    return Home(f"{folder}.dequant_k_cache", name, params, bind=dequantize_v32, entry=V32_DEQUANTIZE)


V32_DEQUANTIZE_HOMES: Eras[Home] = (
    ("0.5.23", _v32_dequantize(f"{_OPS}.dsa", "dequantize_k_cache_paged_dsa")),
    ("0.5.16", _v32_dequantize(f"{_OPS}.dsa")),
    ("0.5.13", _v32_dequantize(f"{_SRT}.dsa")),
    ("0.5.5", _v32_dequantize(f"{_SRT}.nsa")),
)


def _v4_dequantize(folder: str, *more: str, name: str = "dequantize_k_cache_paged") -> Home:
    params = (*_DEQUANTIZE, "page_size", "out", *more)
    return Home(f"{folder}.dequant_k_cache", name, params, bind=dequantize_v4, entry=V4_DEQUANTIZE)


V4_DEQUANTIZE_HOMES: Eras[Home] = (
    ("0.5.23", _v4_dequantize(f"{_OPS}.dsv4", "layout", name="dequantize_k_cache_paged_dsv4")),
    ("0.5.21", _v4_dequantize(f"{_OPS}.dsv4", "layout")),
    ("0.5.16", _v4_dequantize(f"{_OPS}.dsv4")),
    ("0.5.13", _v4_dequantize(f"{_SRT}.dsv4")),
)
_UTILS, _KERNELS = f"{_SRT}.dsv4.sparse_prefill_utils", f"{_OPS}.dsv4.sparse_prefill_kernels"


def _combine(module: str, *rest: str, bind: Callable[..., Any] = CombineCall) -> Home:
    return Home(module, "combine_topk_swa_indices", ("topk_indices", "query_start_loc", *rest), bind=bind)


COMBINE_HOMES: Eras[Home] = (
    ("0.5.23", _combine(_KERNELS, "query_pos", *_COMBINE, *_WINDOWS)),
    ("0.5.22", _combine(_UTILS, "query_pos", *_COMBINE, *_WINDOWS)),
    ("0.5.21", _combine(_UTILS, "query_pos", *_COMBINE)),
    ("0.5.13", _combine(_UTILS, *_COMBINE, bind=combine_call)),
)
SWA_HOMES: Eras[Home] = (
    ("0.5.23", Home(_KERNELS, "build_swa_token_ids", (*_SWA, "total_swa"), bind=SwaCall)),
    ("0.5.18", Home(_UTILS, "build_swa_token_ids", (*_SWA, "total_swa"), bind=SwaCall)),
    ("0.5.13", Home(_UTILS, "build_swa_token_ids", _SWA, bind=SwaCall)),
)
# from 0.5.13, and on 0.5.12, where no such method is
PREFILL_HOME = Home(BACKEND, "DeepseekV4AttnBackend._forward_prefill_sparse", PREFILL, bind=prefill_call)
FORWARD_HOME = Home(BACKEND, "DeepseekV4AttnBackend.forward", FORWARD, bind=forward_call)
