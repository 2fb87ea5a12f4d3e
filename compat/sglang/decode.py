"""SGLang: where its entry points live and how they are called, per release.

KV-index builders, two Triton kernels launched as ``kernel[grid](...)``:

    to 0.5.12.post1   srt.layers.attention.utils                      grid (rows,)
    0.5.13 - 0.5.15   srt.layers.attention.triton_ops.kv_indices      page table: grid (rows, blocks)
    0.5.16 - 0.5.22   kernels.ops.kvcache.kv_indices
    from 0.5.23       kernels.ops.attention.kv_indices

    create_flashmla_kv_indices_triton (page table): seven parameters, then
        0.4.6             nothing
        0.4.8 - 0.4.10    PAGED_SIZE=64
        0.5.1 - 0.5.3     NUM_PAGE_PER_BLOCK=64, PAGED_SIZE=64
        0.5.4 - 0.5.16    PAGED_SIZE=64
        0.5.17 - 0.5.18   PAGED_SIZE=64, v2p_ptr=None, PAGE_MULT=1
        from 0.5.19       PAGED_SIZE=64
    create_flashinfer_kv_indices_triton (flat token ids): seven parameters, then
        0.5.1             PAGE_SIZE=1
        other to 0.5.18   nothing
        0.5.19            ENTRY_PAGE_SIZE=1
        0.5.20 - 0.5.21   ENTRY_PAGE_SIZE=1, TOKEN_BLOCK_PARALLEL=False
        from 0.5.22       ENTRY_PAGE_SIZE=1, TOKEN_BLOCK_PARALLEL=False, token_mapping=None

MLA decode, decode_attention_fwd, a function that only TritonAttnBackend.__init__ imports. It keeps it in an attribute
of the instance, inside torch.compiler.disable (0.4.6: bare), so a backend that was built before ours came is given ours
there, unless the graphs that it replays are captured already:

    to 0.5.15      srt.layers.attention.triton_ops.decode_attention
    from 0.5.16    kernels.ops.attention.decode_attention

    q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, attn_lse, num_kv_splits, max_kv_splits, sm_scale, then
        0.4.6 - 0.4.10    logit_cap=0.0
        0.5.1 - 0.5.9     logit_cap=0.0, sinks=None, xai_temperature_len=-1
        0.5.10 - 0.5.11   k_scale and v_scale, required, before logit_cap
        0.5.12 - 0.5.14   has_mla=False, use_pdl=False after them
        0.5.15            page_size=1
        0.5.16 - 0.5.18   score_mod=None, aux_tensors=None
        0.5.19 - 0.5.22   enable_lean=None and four lean tensors, which only ROCm reads
        from 0.5.23       uneven_batch=None, likewise

    From 0.5.15 decode context parallelism calls it without has_mla: with the queries of all ranks, a float32 out, and
    attn_lse filled with -inf, of which it takes the log-sum-exp over the splits afterwards.

Scales of an fp8 latent cache (V is the first 512 of the same stored row, so one scale is the only right number):

    to 0.5.9          stored without, read without: consistent, whatever the checkpoint says
    0.5.10 - 0.5.11   stored without, decode and extend read with the layer's scales: wrong unless they are 1
    from 0.5.12       decode and extend store K / k_scale and read with both scales, or with none unless both exist;
                      MHA prefill stores the same rows without
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from packaging.version import Version

from mla_patch.compat import gpu
from mla_patch.compat.sglang import deterministic as sglang_deterministic
from mla_patch.compat.types import CachedOn, Change, Edit, Host, Target, Undo
from mla_patch.hooks.editing import Undoing, set_methods

log = logging.getLogger("mla_patch")

# read one by one; a post release is applied when its signatures match, and called unreviewed
_REVIEWED = (
    "0.4.6", "0.4.8", "0.4.9", "0.4.10", "0.5.1", "0.5.2", "0.5.3", "0.5.4", "0.5.5", "0.5.6", "0.5.7", "0.5.8",
    "0.5.9", "0.5.10", "0.5.11", "0.5.12", "0.5.12.post1", "0.5.13", "0.5.13.post1", "0.5.14", "0.5.15", "0.5.16",
    "0.5.17", "0.5.18", "0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23",
)  # fmt: skip
_ATTENTION, _OPS = "sglang.srt.layers.attention", "sglang.kernels.ops"
# (release, two modules that no earlier release has): source whose version tells nothing is told by them
_MARKS = (
    ("0.5.23", (f"{_OPS}.attention.kv_indices", f"{_OPS}.attention.flash_mla_interface")),
    ("0.5.22", (f"{_OPS}.kvcache.copy_pages", "sglang.kernels.numerics")),
    ("0.5.21", (f"{_OPS}.attention.dsv4.kv_layout", f"{_OPS}.attention.deep_select")),
    ("0.5.20", (f"{_OPS}.attention.suffix_attention_merge", "sglang.kernels.jit.cute_aot_cache")),
    ("0.5.19", (f"{_OPS}.kvcache.kv_read_table", "sglang.srt.arg_groups.attention_hook")),
    ("0.5.18", (f"{_OPS}.attention.verify_mla", "sglang.kernels.kernel_api_logging")),
    ("0.5.17", (f"{_OPS}.attention.concat_mla", "sglang.kernels.jit.utils.common")),
    ("0.5.16", (f"{_OPS}.attention.decode_attention", f"{_OPS}.attention.dsa.dequant_k_cache")),
    ("0.5.15", ("sglang.srt.layers.dcp.planner", "sglang.srt.mem_cache.unified_memory_pool")),
    ("0.5.14", ("sglang.srt.model_executor.runner.decode_cuda_graph_runner", "sglang.srt.mem_cache.pool_host.base")),
    ("0.5.13", (f"{_ATTENTION}.dsa_backend", f"{_ATTENTION}.dsv4.sparse_prefill_utils")),
    ("0.5.12", (f"{_ATTENTION}.deepseek_v4_backend", "sglang.srt.mem_cache.deepseek_v4_memory_pool")),
    ("0.5.11", ("sglang.srt.managers.communicator", "sglang.srt.model_executor.pool_configurator")),
    ("0.5.10", ("sglang.srt.managers.hisparse_coordinator", "sglang.srt.layers.conv")),
    ("0.5.9", ("sglang.srt.layers.radix_linear_attention", "sglang.srt.layers.quantization.base_scheme")),
    ("0.5.8", ("sglang.srt.managers.prefill_delayer", "sglang.srt.mem_cache.swa_memory_pool")),
    ("0.5.7", (f"{_ATTENTION}.nsa.nsa_backend_mtp_precompute", "sglang.srt.layers.utils.common")),
    ("0.5.6", ("sglang.srt.model_executor.input_buffers", "sglang.srt.mem_cache.cache_init_params")),
    ("0.5.5", ("sglang.srt.layers.moe.moe_runner.triton_kernels", "sglang.srt.mem_cache.utils")),
    ("0.5.4", ("sglang.srt.managers.scheduler_pp_mixin", "sglang.srt.mem_cache.common")),
    ("0.5.3", (f"{_ATTENTION}.attention_registry", "sglang.srt.speculative.eagle_info")),
    ("0.5.2", (f"{_ATTENTION}.hybrid_linear_attn_backend", "sglang.srt.managers.multi_tokenizer_mixin")),
    ("0.5.1", (f"{_ATTENTION}.trtllm_mla_backend", "sglang.srt.layers.moe.utils")),
    ("0.4.10", ("sglang.srt.server_args", "sglang.srt.managers.scheduler")),  # and all before it
)
HOST = Host(
    "sglang",
    "sglang",
    ("sglang",),
    reviewed=_REVIEWED,
    plugin_filter="SGLANG_PLUGINS",
    marks=_MARKS,
    promises=((sglang_deterministic.VARIABLE, sglang_deterministic.REASON),),
)


class PageTableCall:
    """One launch of the page-table builder, whatever the release; see ``kernels.kv_indices`` for shapes."""

    __slots__ = (
        "extra", "grid", "kv_start", "lens", "out", "out_stride", "page_size", "req_pool", "req_to_token", "row_stride",
    )  # fmt: skip
    tensors, numbers = ("req_to_token", "req_pool", "lens", "out"), ("row_stride", "out_stride", "page_size")
    optional = ("kv_start",)

    def __init__(
        self,
        grid: Any,
        req_to_token: Any,
        req_pool: Any,
        lens: Any,
        kv_start: Any,
        out: Any,
        row_stride: Any,
        out_stride: Any,
        page_size: Any,
        extra: str | None,
    ) -> None:
        self.grid = grid
        self.req_to_token = req_to_token  # [max requests, max context], int32
        self.req_pool = req_pool
        self.lens = lens
        self.kv_start = kv_start
        self.out = out
        self.row_stride = row_stride
        self.out_stride = out_stride
        self.page_size = page_size
        self.extra = extra  # a parameter of this release that holds something else than its default


class TokenIndicesCall:
    """One launch of the token-id builder, whatever the release."""

    __slots__ = ("extra", "grid", "indptr", "kv_start", "lens", "out", "req_pool", "req_to_token", "row_stride")
    tensors, numbers = ("req_to_token", "req_pool", "lens", "indptr", "out"), ("row_stride",)
    optional = ("kv_start",)

    def __init__(
        self,
        grid: Any,
        req_to_token: Any,
        req_pool: Any,
        lens: Any,
        indptr: Any,
        kv_start: Any,
        out: Any,
        row_stride: Any,
        extra: str | None,
    ) -> None:
        self.grid = grid
        self.req_to_token = req_to_token
        self.req_pool = req_pool
        self.lens = lens
        self.indptr = indptr
        self.kv_start = kv_start
        self.out = out
        self.row_stride = row_stride
        self.extra = extra


# The parameters below carry the host's names, since a caller may pass any of them by name.


def page_table_call(
    grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride, kv_indices_ptr_stride, PAGED_SIZE=64,
):  # fmt: skip
    return PageTableCall(
        grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
        req_to_token_ptr_stride, kv_indices_ptr_stride, PAGED_SIZE, None,
    )  # fmt: skip


def page_table_call_046(
    grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride, kv_indices_ptr_stride,
):  # fmt: skip
    return PageTableCall(
        grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
        req_to_token_ptr_stride, kv_indices_ptr_stride, 64, None,
    )  # fmt: skip


def page_table_call_051(
    grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride, kv_indices_ptr_stride, NUM_PAGE_PER_BLOCK=64, PAGED_SIZE=64,
):  # fmt: skip
    return PageTableCall(
        grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
        req_to_token_ptr_stride, kv_indices_ptr_stride, PAGED_SIZE,
        None if NUM_PAGE_PER_BLOCK == 64 else "NUM_PAGE_PER_BLOCK",
    )  # fmt: skip


def page_table_call_0517(
    grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride, kv_indices_ptr_stride, PAGED_SIZE=64, v2p_ptr=None, PAGE_MULT=1,
):  # fmt: skip
    extra = "v2p_ptr" if v2p_ptr is not None else "PAGE_MULT" if PAGE_MULT != 1 else None
    return PageTableCall(
        grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
        req_to_token_ptr_stride, kv_indices_ptr_stride, PAGED_SIZE, extra,
    )  # fmt: skip


def token_indices_call(
    grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_indptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride,
):  # fmt: skip
    return TokenIndicesCall(
        grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_indptr, kv_start_idx, kv_indices_ptr,
        req_to_token_ptr_stride, None,
    )  # fmt: skip


def token_indices_call_051(
    grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_indptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride, PAGE_SIZE=1,
):  # fmt: skip
    return TokenIndicesCall(
        grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_indptr, kv_start_idx, kv_indices_ptr,
        req_to_token_ptr_stride, None if PAGE_SIZE == 1 else "PAGE_SIZE",
    )  # fmt: skip


def token_indices_call_0519(
    grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_indptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride, ENTRY_PAGE_SIZE=1, TOKEN_BLOCK_PARALLEL=False, token_mapping=None,
):  # fmt: skip
    # TOKEN_BLOCK_PARALLEL only says how the host's kernel divides its work: ours divides it anyway
    extra = "ENTRY_PAGE_SIZE" if ENTRY_PAGE_SIZE != 1 else "token_mapping" if token_mapping is not None else None
    return TokenIndicesCall(
        grid, req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_indptr, kv_start_idx, kv_indices_ptr,
        req_to_token_ptr_stride, extra,
    )  # fmt: skip


_TABLE = (
    "req_to_token_ptr", "req_pool_indices_ptr", "page_kernel_lens_ptr", "kv_start_idx", "kv_indices_ptr",
    "req_to_token_ptr_stride", "kv_indices_ptr_stride",
)  # fmt: skip
_IDS = (
    "req_to_token_ptr", "req_pool_indices_ptr", "page_kernel_lens_ptr", "kv_indptr", "kv_start_idx", "kv_indices_ptr",
    "req_to_token_ptr_stride",
)  # fmt: skip

# (first release, value), newest first
Eras = tuple[tuple[str, Any], ...]
_INDEX_HOMES: Eras = (
    ("0.5.23", "sglang.kernels.ops.attention.kv_indices"),
    ("0.5.16", "sglang.kernels.ops.kvcache.kv_indices"),
    ("0.5.13", "sglang.srt.layers.attention.triton_ops.kv_indices"),
    ("0", "sglang.srt.layers.attention.utils"),
)
_PAGE_TABLE: Eras = (
    ("0.5.19", (("PAGED_SIZE",), page_table_call)),
    ("0.5.17", (("PAGED_SIZE", "v2p_ptr", "PAGE_MULT"), page_table_call_0517)),
    ("0.5.4", (("PAGED_SIZE",), page_table_call)),
    ("0.5.1", (("NUM_PAGE_PER_BLOCK", "PAGED_SIZE"), page_table_call_051)),
    ("0.4.8", (("PAGED_SIZE",), page_table_call)),
    ("0", ((), page_table_call_046)),
)
_TOKEN_INDICES: Eras = (
    ("0.5.22", (("ENTRY_PAGE_SIZE", "TOKEN_BLOCK_PARALLEL", "token_mapping"), token_indices_call_0519)),
    ("0.5.20", (("ENTRY_PAGE_SIZE", "TOKEN_BLOCK_PARALLEL"), token_indices_call_0519)),
    ("0.5.19", (("ENTRY_PAGE_SIZE",), token_indices_call_0519)),
    ("0.5.2", ((), token_indices_call)),
    ("0.5.1", (("PAGE_SIZE",), token_indices_call_051)),
    ("0", ((), token_indices_call)),
)


def era_of(eras: Eras, version: str | None) -> list[Any]:
    """What holds for ``version``; everything that ever held when it is unknown."""
    if version is None:
        return list(dict.fromkeys(value for _, value in eras))
    return [next(value for first, value in eras if Version(version) >= Version(first))]


def _builders(name: str, first: tuple[str, ...], eras: Eras, version: str | None, serve: str) -> list[Target]:
    hook = "mla_patch.hooks.sglang.kv_indices"
    return [
        Target(
            home,
            name,
            first + rest,
            "kernel",
            bind,
            f"{hook}:declines",
            f"{hook}:{serve}",
            shadow_clone=index_shadow_clone,
        )
        for home in era_of(_INDEX_HOMES, version)
        for rest, bind in era_of(eras, version)
    ]


def kv_indices_targets(version: str | None) -> tuple[Target, ...]:
    """The two KV-index builders of ``version``; every known home and parameter list when it is unknown."""
    return (
        *_builders("create_flashmla_kv_indices_triton", _TABLE, _PAGE_TABLE, version, "serve_page_table"),
        *_builders("create_flashinfer_kv_indices_triton", _IDS, _TOKEN_INDICES, version, "serve_token_indices"),
    )


class DecodeCall:
    """One decode step of one layer, whatever the release; see ``kernels.decode`` for shapes.

    Takes a call of 0.5.12 and later as it comes, in the newest release's order. The scratch and its splits are the
    host's: ours brings its own, but for a caller who may read them. PDL and page_size only say how the host's kernel
    works, and only ROCm looks at the lean arguments.
    """

    __slots__ = (
        "extra", "indptr", "k", "k_scale", "logit_cap", "out", "q", "sinks", "sm_scale", "splits", "token_ids",
        "v_scale", "xai_temperature_len",
    )  # fmt: skip
    tensors, optional = ("q", "k", "out", "indptr", "token_ids"), ("sinks",)
    numbers = ("k_scale", "v_scale", "sm_scale", "logit_cap", "xai_temperature_len")

    def __init__(
        self, q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, attn_lse, num_kv_splits, max_kv_splits,
        sm_scale, k_scale, v_scale, logit_cap=0.0, sinks=None, xai_temperature_len=-1, has_mla=False, use_pdl=False,
        page_size=1, score_mod=None, aux_tensors=None, enable_lean=None, lean_Mp=None, lean_Lp=None, lean_Op=None,
        lean_locks=None, uneven_batch=None,
    ):  # fmt: skip
        self.q = q
        self.k = k_buffer  # [slots, 1, 576]
        self.out = o
        self.indptr = kv_indptr
        self.token_ids = kv_indices
        self.sm_scale = sm_scale
        self.k_scale = k_scale
        self.v_scale = v_scale
        self.logit_cap = logit_cap
        self.sinks = sinks
        self.xai_temperature_len = xai_temperature_len
        # what of this call ours does not do
        self.extra = None if score_mod is None else "score_mod"
        if has_mla:  # then the host, too, reads values from k_buffer, and nobody the scratch
            self.splits = None
        else:
            self.splits = (attn_logits, attn_lse, num_kv_splits, max_kv_splits)
            self.extra = self.extra or _other_values(k_buffer, v_buffer)


def _other_values(k, v) -> str | None:
    """What keeps values from being the first 512 of the keys, or None."""
    if v.data_ptr() != k.data_ptr() or v.stride() != k.stride() or v.shape[-1] != 512:
        return "v_buffer is not the first 512 of k_buffer"
    return None


def decode_call_0510(
    q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, attn_lse, num_kv_splits, max_kv_splits, sm_scale,
    k_scale, v_scale, logit_cap=0.0, sinks=None, xai_temperature_len=-1,
):  # fmt: skip
    call = DecodeCall(
        q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, attn_lse, num_kv_splits, max_kv_splits, sm_scale,
        k_scale, v_scale, logit_cap, sinks, xai_temperature_len, True,
    )  # fmt: skip
    call.extra = _other_values(k_buffer, v_buffer)
    return call


def decode_call_046(
    q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, attn_lse, num_kv_splits, max_kv_splits, sm_scale,
    logit_cap=0.0, sinks=None, xai_temperature_len=-1,
):  # fmt: skip
    return decode_call_0510(
        q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, attn_lse, num_kv_splits, max_kv_splits, sm_scale,
        1.0, 1.0, logit_cap, sinks, xai_temperature_len,
    )  # fmt: skip


_DECODE_FIRST = (
    "q", "k_buffer", "v_buffer", "o", "kv_indptr", "kv_indices", "attn_logits", "attn_lse", "num_kv_splits",
    "max_kv_splits", "sm_scale",
)  # fmt: skip
_SCALED = (*_DECODE_FIRST, "k_scale", "v_scale", "logit_cap", "sinks", "xai_temperature_len")
_MLA = (*_SCALED, "has_mla", "use_pdl")
_MOD = (*_MLA, "page_size", "score_mod", "aux_tensors")
_LEAN = (*_MOD, "enable_lean", "lean_Mp", "lean_Lp", "lean_Op", "lean_locks")
_DECODE_HOMES: Eras = (
    ("0.5.16", "sglang.kernels.ops.attention.decode_attention"),
    ("0", "sglang.srt.layers.attention.triton_ops.decode_attention"),
)
_DECODE: Eras = (
    ("0.5.23", ((*_LEAN, "uneven_batch"), DecodeCall)),
    ("0.5.19", (_LEAN, DecodeCall)),
    ("0.5.16", (_MOD, DecodeCall)),
    ("0.5.15", ((*_MLA, "page_size"), DecodeCall)),
    ("0.5.12", (_MLA, DecodeCall)),
    ("0.5.10", (_SCALED, decode_call_0510)),
    ("0.5.1", ((*_DECODE_FIRST, "logit_cap", "sinks", "xai_temperature_len"), decode_call_046)),
    ("0", ((*_DECODE_FIRST, "logit_cap"), decode_call_046)),
)


def has_mla_decode(version: str | None) -> bool:
    """Whether the release's own decode is written for MLA; an unknown one is taken for a new one."""
    return version is None or Version(version) >= Version("0.5.12")


def decode_shadow_clone(call: DecodeCall) -> tuple[DecodeCall, list[tuple[Any, Any]]]:
    """For shadow checks: the call with an output of its own."""
    if call.splits is not None:  # scratch that the caller reads, which ours would have filled before the host
        raise ValueError("no shadow check: the caller reads the split scratch")
    ours = copy.copy(call)
    ours.out = call.out.clone()
    return ours, [(call.out, ours.out)]


_SHADOWED = 1 << 22  # entries of an index table, beyond which a copy of it is too much to compare


def index_shadow_clone(call: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """For shadow checks: the launch of a builder with a table of its own."""
    if call.out.numel() > _SHADOWED:
        raise ValueError(f"no shadow check: {call.out.numel()} entries, at most {_SHADOWED}")
    if not call.out.is_contiguous():  # the launch says its stride
        raise ValueError("no shadow check: a table that is not contiguous")
    ours = copy.copy(call)
    ours.out = call.out.clone()
    return ours, [(call.out, ours.out)]


def _disabled(function: Callable[..., Any]) -> Any:
    """As TritonAttnBackend.__init__ does it."""
    import torch

    return torch.compiler.disable(function)


def _captured(backend: Any) -> str | None:
    """Why a backend that has been built is beyond change, or None; its graph buffers come right before the capture."""
    if getattr(backend, "cuda_graph_attn_logits", None) is None or not gpu.has_graphs():
        return None
    return "its CUDA graphs are already captured and replay the engine's kernel"


_KEPT = "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.decode_attention_fwd"
_HELD = (CachedOn(_KEPT, within=_disabled, fixed=_captured),)


def decode_targets(version: str | None) -> tuple[Change, ...]:
    """MLA decode of ``version``, and the scales that the backend around it reads with."""
    hook = "mla_patch.hooks.sglang.decode"
    triton, edit = partial(Target, group="triton"), partial(Edit, group="triton")
    targets: list[Change] = [
        triton(
            home,
            "decode_attention_fwd",
            params,
            "call",
            bind,
            f"{hook}:declines",
            f"{hook}:serve",
            cached_on=_HELD,
            shadow_clone=decode_shadow_clone,
        )
        for home in era_of(_DECODE_HOMES, version)
        for params, bind in era_of(_DECODE, version)
    ]
    backend, name = "sglang.srt.layers.attention.triton_backend", "TritonAttnBackend.scales"
    if version is None or has_mla_decode(version):
        targets.append(edit(backend, name, watch_scales))
    elif Version(version) >= Version("0.5.10"):
        targets.append(edit(backend, name, leave_scales_out, survives_restore=True))
    if version is None or Version(version) >= Version("0.5.3"):
        watch = sglang_deterministic.watch_decodes
        targets.append(edit(backend, "TritonAttnBackend.deterministic", watch))
    targets.append(edit(backend, "TritonAttnBackend.warmup", warm_decode))
    return tuple(targets)


_said: set[str] = set()


def say_once(what: str, text: str, *values: Any) -> None:
    """A warning of scales, once in a process, whatever is restored and applied again."""
    if what not in _said:
        _said.add(what)
        log.warning("mla-patch: " + text, *values)


def is_compiling() -> Callable[[], bool]:
    """True inside torch.compile, which must not be made to break its graph for a warning."""
    import torch

    return torch.compiler.is_compiling


class Unscaled:
    """A layer as the backend reads it, but for its scales."""

    k_scale = v_scale = k_scale_float = v_scale_float = None

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def leave_scales_out(module: ModuleType) -> Undo:
    """0.5.10 and 0.5.11 store latents without a scale: read them without, in decode and extend, on either arm.

    Dividing before the store, as 0.5.12 does, would leave the prompts wrong that MHA prefill stores, and would change
    bytes that other processes may read. What is stored stays what the release stores.
    """
    compiling = is_compiling()

    def read(backend: Any, layer: Any) -> Any:
        if layer.k_scale is None or not backend.use_mla:
            return layer
        if not compiling() and (layer.k_scale_float, layer.v_scale_float) not in ((1.0, 1.0), (1.0, None)):
            say_once(
                "unused",
                "the checkpoint's scales (k_scale %s, v_scale %s, layer %s) are not used: this release of SGLang "
                "stores latents without them",
                layer.k_scale_float, layer.v_scale_float, layer.layer_id,
            )  # fmt: skip
        return Unscaled(layer)

    return wrap_methods(module.TritonAttnBackend, ("forward_decode", "forward_extend"), read)


def scale_problem(k_scale: float | None, v_scale: float | None) -> str | None:
    """Why these two cannot be the scale of one stored latent, or None; None is a scale that the checkpoint lacks."""
    if k_scale is None and v_scale is None:
        return None
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            return f"{name} {scale}"
    if k_scale is None or v_scale is None:
        return f"no {'k_scale' if k_scale is None else 'v_scale'}"
    return None if v_scale == k_scale else f"v_scale {v_scale} is not k_scale {k_scale}"


def watch_scales(module: ModuleType) -> Undo:
    """From 0.5.12 the host's scales are its own: say once where it cannot be right with them."""
    seen: set[int] = set()
    compiling = is_compiling()

    def look(backend: Any, layer: Any) -> Any:
        if not compiling() and id(layer) not in seen:  # a draft model's layers are numbered from 0, too
            seen.add(id(layer))
            scales = layer.k_scale_float, layer.v_scale_float
            problem = scale_problem(*scales)
            if problem is None and scales not in ((None, None), (1.0, 1.0)):
                problem = f"k_scale {scales[0]}: prompts that MHA prefill stores are not divided by it"
            if problem is not None and backend.use_mla:
                text = "SGLang's fp8 latent cache is not consistent with layer %s's scales: %s"
                say_once("inconsistent", text, layer.layer_id, problem)
        return layer

    return wrap_methods(module.TritonAttnBackend, ("forward_decode",), look)


class Capacity:
    """What a backend can be asked to decode, as far as it is known when it has been built."""

    __slots__ = ("cache_dtype", "deterministic", "device", "dtype", "heads", "max_batch", "splits")

    def __init__(self, backend: Any, runner: Any, cache_dtype: Any) -> None:
        self.device = runner.device
        self.heads = backend.num_head  # of this rank
        self.dtype = runner.dtype
        self.cache_dtype = cache_dtype
        # the running requests at most, times the drafts of each where there are several
        self.max_batch = backend.kv_indptr.numel() - 1
        # decode context parallelism reads its scratch: how many splits that has, else 0; its heads are of all ranks
        self.splits = backend.max_kv_splits if getattr(backend, "dcp_size", 1) > 1 else 0
        self.deterministic = bool(getattr(backend, "enable_deterministic", False))


def decode_capacity(backend: Any, runner: Any) -> Capacity | None:
    """What ``backend`` can be asked to decode of a latent cache of 512 + 64 values; None where it keeps another."""
    pool = runner.token_to_kv_pool
    pool = getattr(pool, "full_kv_pool", pool)  # of a model with linear attention, too
    if (getattr(pool, "kv_lora_rank", None), getattr(pool, "qk_rope_head_dim", None)) != (512, 64):
        return None
    return Capacity(backend, runner, pool.dtype)


def warm_decode(module: ModuleType) -> Undo:
    """Have our decode compiled once a backend is built, which all releases do before they capture graphs or serve."""
    return warm_once_built(module.TritonAttnBackend, "mla_patch.hooks.sglang.decode:warm", decode_capacity)


class _Warming:
    """An ``__init__`` with warm-ups at its end: those of all features, so that each can be taken back alone."""

    def __init__(self, owner: type) -> None:
        original = vars(owner)["__init__"]
        if tuple(inspect.signature(original).parameters)[:2] != ("self", "model_runner"):
            raise TypeError(f"{owner.__qualname__}.__init__ does not take (model_runner, ...)")
        self.asked: list[tuple[str, Callable[[Any, Any], Any]]] = []

        @functools.wraps(original)
        def init(backend: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
            original(backend, model_runner, *args, **kwargs)
            for path, find in tuple(self.asked):
                warm_up(path, backend, model_runner, find)

        self.init = init
        self.put_back = set_methods(owner, {"__init__": init})


_warming: dict[type, _Warming] = {}  # by the class that a module has


def warm_once_built(owner: type, path: str, find: Callable[[Any, Any], Any]) -> Undo:
    """Have instances of ``owner`` warmed up at the end of their ``__init__``; see ``warm_up``."""
    if owner not in _warming or vars(owner)["__init__"] is not _warming[owner].init:
        _warming[owner] = _Warming(owner)
    shared, asked = _warming[owner], (path, find)
    shared.asked.append(asked)

    def undo() -> None:
        shared.asked.remove(asked)
        if not shared.asked:
            shared.put_back()

    return Undoing(undo, shared.put_back.places)


def warm_up(path: str, backend: Any, runner: Any, find: Callable[[Any, Any], Any] = decode_capacity) -> None:
    """Call ``path``, "module:function", with what ``find`` says that ``backend`` can be asked.

    Nothing in it may fail the engine.
    """
    try:
        asked = find(backend, runner)
        if asked:
            module, _, name = path.partition(":")
            start = time.perf_counter()
            compiled = getattr(importlib.import_module(module), name)(asked)
            if compiled:
                log.info("mla-patch: %d kernels compiled in %.1f s", compiled, time.perf_counter() - start)
    except Exception as problem:
        say_once("warmup", "no warm-up, so kernels compile at their first calls: %r", problem)


def wrap_methods(owner: type, names: tuple[str, ...], seen_as: Callable[[Any, Any], Any]) -> Undo:
    """Let ``owner``'s forward methods see ``seen_as(self, layer)`` as their layer."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(self: Any, q: Any, k: Any, v: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
            return original(self, q, k, v, seen_as(self, layer), *args, **kwargs)

        return forward

    before = {name: vars(owner)[name] for name in names}
    for name, method in before.items():
        if tuple(inspect.signature(method).parameters)[:5] != ("self", "q", "k", "v", "layer"):
            raise TypeError(f"{owner.__qualname__}.{name} does not take (q, k, v, layer, ...)")
    return set_methods(owner, {name: wrap(method) for name, method in before.items()})
