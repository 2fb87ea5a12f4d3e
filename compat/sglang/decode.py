"""SGLang: where the Triton backend's MLA decode is and how it is called, per release.

decode_attention_fwd is a function that only TritonAttnBackend.__init__ imports. The backend keeps it in an attribute of
the instance, inside torch.compiler.disable. A backend that was built before our function came is given our function
there, unless the graphs that it replays are captured already:

    to 0.5.15      srt.layers.attention.triton_ops.decode_attention
    from 0.5.16    kernels.ops.attention.decode_attention

    q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, attn_lse, num_kv_splits, max_kv_splits, sm_scale, then
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

    to 0.5.9          stored without, read without: consistent for every checkpoint
    0.5.10 - 0.5.11   stored without, decode and extend read with the layer's scales: wrong unless they are 1
    from 0.5.12       decode and extend store K / k_scale and read with both scales, or with none unless both exist;
                      MHA prefill stores the same rows without
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from mla_patch.compat import gpu
from mla_patch.compat.eras import Eras, era_of, value_at
from mla_patch.compat.types import CachedOn, Home

BACKEND = "sglang.srt.layers.attention.triton_backend"  # its TritonAttnBackend is the only caller


class DecodeCall:
    """One decode step of one layer, of any release; see ``mla_patch.kernels.decode`` for shapes.

    Takes a call of 0.5.12 and later as it comes, in the newest release's order. Our kernel has
    its own scratch and fills the engine's only for a caller who may read it. PDL and page_size only say how the
    engine's kernel works, and only ROCm looks at the lean arguments.
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
        # what of this call our kernel does not do
        self.extra = None if score_mod is None else "score_mod"
        if has_mla:  # then the engine reads values from k_buffer, too, and nobody reads the scratch
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


def decode_call_051(
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
_MODULES: Eras[str] = (
    ("0.5.16", "sglang.kernels.ops.attention.decode_attention"),
    ("0.5.1", "sglang.srt.layers.attention.triton_ops.decode_attention"),
)
_DECODE: Eras[tuple[tuple[str, ...], Callable[..., Any]]] = (
    ("0.5.23", ((*_LEAN, "uneven_batch"), DecodeCall)),
    ("0.5.19", (_LEAN, DecodeCall)),
    ("0.5.16", (_MOD, DecodeCall)),
    ("0.5.15", ((*_MLA, "page_size"), DecodeCall)),
    ("0.5.12", (_MLA, DecodeCall)),
    ("0.5.10", (_SCALED, decode_call_0510)),
    ("0.5.1", ((*_DECODE_FIRST, "logit_cap", "sinks", "xai_temperature_len"), decode_call_051)),
)
# Whether the release's own decode is written for MLA
_MLA_DECODE: Eras[bool] = (("0.5.12", True), ("0.5.1", False))
# What becomes of the scales of an fp8 cache: see above
Scales = Literal["unused", "read", "divided"]
_SCALES: Eras[Scales] = (("0.5.12", "divided"), ("0.5.10", "read"), ("0.5.1", "unused"))


def has_mla_decode(version: str | None) -> bool:
    """Whether the release's own decode is written for MLA; an unknown one is taken for a new one."""
    return value_at(_MLA_DECODE, version)


def scales_of(version: str | None) -> Scales:
    """What becomes of the scales of an fp8 cache; an unknown release is taken for a new one."""
    return value_at(_SCALES, version)


def _disabled(function: Callable[..., Any]) -> Any:
    """As TritonAttnBackend.__init__ does it."""
    import torch

    return torch.compiler.disable(function)


def _captured(backend: Any) -> str | None:
    """Why a backend that has been built is beyond change, or None; its graph buffers come right before the capture."""
    if getattr(backend, "cuda_graph_attn_logits", None) is None or not gpu.has_graphs():
        return None
    return "its CUDA graphs are already captured and replay the engine's kernel"


_ATTRIBUTE = f"{BACKEND}:TritonAttnBackend.decode_attention_fwd"
_CACHED_ON = (CachedOn(_ATTRIBUTE, within=_disabled, fixed=_captured),)


def homes(version: str | None) -> list[Home]:
    """MLA decode of ``version``; every known home and parameter list when it is unknown."""
    return [
        Home(module, "decode_attention_fwd", params, "call", bind, cached_on=_CACHED_ON)
        for module in era_of(_MODULES, version)
        for params, bind in era_of(_DECODE, version)
    ]


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


class DecodeWarmup:
    """What a backend can be asked to decode, as far as it is known when it has been built: what a warm-up compiles."""

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


def decode_warmup(backend: Any, runner: Any) -> DecodeWarmup | None:
    """What ``backend`` can be asked to decode of a latent cache of 512 + 64 values; None where it keeps another."""
    pool = runner.token_to_kv_pool
    pool = getattr(pool, "full_kv_pool", pool)  # of a model with linear attention, too
    if (getattr(pool, "kv_lora_rank", None), getattr(pool, "qk_rope_head_dim", None)) != (512, 64):
        return None
    return DecodeWarmup(backend, runner, pool.dtype)
