"""FlashMLA's newer calls on any GPU that Triton compiles for: `get_mla_metadata`, `flash_mla_with_kvcache` and
`flash_mla_sparse_fwd`.

The parameters are the union of what FlashMLA and SGLang's wrappers take, in their order. Metadata comes in two forms:
a `FlashMLASchedMeta` that the first call fills, with sinks, a second cache and lengths; or the older pair of tensors.

Our kernels cut their work from the lengths that they find on the device. So metadata of either form is right for any
lengths, and a graph for any that its buffers hold at replay; tensors made by FlashMLA are taken and not read. What a
`FlashMLASchedMeta` was first used for is recorded and compared as FlashMLA does. Its two tensors stay None: whoever
fills them schedules from the call at hand, and FlashMLA's own kernels would do so if they were given it next.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from numbers import Integral
from typing import Any, NoReturn

import torch

from mla_patch.compat import gpu
from mla_patch.kernels.sparse.decode import sparse_decode
from mla_patch.kernels.sparse.dense import dense_decode
from mla_patch.kernels.sparse.prefill import mla_sparse_prefill


@dataclass
class FlashMLASchedMeta:
    """What one schedule is used for. A host's own class of this name serves as well, and its callers test for it."""

    @dataclass
    class Config:
        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: torch.Tensor | None = None
    num_splits: torch.Tensor | None = None


class MetadataMismatch(AssertionError, ValueError):
    """A `FlashMLASchedMeta` that was made for another call. FlashMLA raises an AssertionError."""


_FIELDS = (
    "b", "s_q", "h_q", "page_block_size", "h_k", "causal", "is_fp8_kvcache", "topk", "extra_page_block_size",
    "extra_topk",
)  # fmt: skip


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[Any, torch.Tensor | None]:
    """Metadata for `flash_mla_with_kvcache`: ``FlashMLASchedMeta(), None`` without lengths, else the older tensors.

    The tensors are int32 [parts, 8] and [B + 1], as FlashMLA's: parts depends on the device, heads and queries alone.
    They say one split a request and mean nothing to our kernels; FlashMLA's must not be given them.

    Raises:
        ValueError: lengths without what the tensors' shapes depend on.
    """
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    _check_dims(("cache_seqlens", cache_seqlens, None))
    if cache_seqlens.dim() != 1 or cache_seqlens.dtype not in (torch.int32, torch.int64):
        found = f"{cache_seqlens.dtype}, shape {tuple(cache_seqlens.shape)}"
        raise ValueError(f"cache_seqlens: {found}, expected int32 or int64, [B]")
    counts: dict[str, Any] = {"num_q_tokens_per_head_k": num_q_tokens_per_head_k, "num_heads_k": num_heads_k}
    if num_heads_q is not None:
        counts["num_heads_q"] = num_heads_q
    for name, value in counts.items():
        # no queries are work for nobody, but their call needs metadata, too
        least = 0 if name == "num_q_tokens_per_head_k" else 1
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name}: {value!r}, expected a number from {least} on beside cache_seqlens")
    assert num_q_tokens_per_head_k is not None and num_heads_k is not None
    sms = gpu.sm_count(cache_seqlens.device.index) if cache_seqlens.is_cuda else 1
    if topk is None:
        parts = sms // max(num_heads_k * -(-num_q_tokens_per_head_k // 64), 1)
    else:
        heads = num_heads_q or num_q_tokens_per_head_k * num_heads_k
        queries = max(num_q_tokens_per_head_k * num_heads_k // heads, 1)
        parts = sms // -(-heads // 64) // queries
    device = cache_seqlens.device
    schedule = torch.zeros(max(parts, 1), 8, dtype=torch.int32, device=device)
    return schedule, torch.arange(cache_seqlens.shape[0] + 1, dtype=torch.int32, device=device)


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    descale_q: torch.Tensor | None = None,
    descale_k: torch.Tensor | None = None,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    kv_format: str | None = None,
    *,
    use_legacy: bool = True,
    enable_batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode over a paged latent cache: ``out`` [B, Sq, H, 512] and its natural ``lse`` [B, H, Sq].

    With ``indices`` sparse, over fp8 tokens of 656 or 584 bytes (`mla_patch.kernels.sparse.decode`), else dense, over
    bfloat16, float16 or e4m3 rows (`mla_patch.kernels.sparse.dense`). 1 to 128 heads, any page size, any topk, any
    batch, 0 among them. A query without a key gets out 0 and lse +inf. ``descale_q`` and ``descale_k`` are e4m3's, and
    ignored beside 16-bit queries, as sgl_kernel ignores them. With ``enable_batch_invariant`` a query's results are the
    same, bit for bit, whatever other queries there are. Metadata do not record it, since they hold no schedule of ours.

    Raises:
        ValueError: an argument that neither takes, by its name.
        MetadataMismatch: a FlashMLASchedMeta that was made for another call; it is both a ValueError and an
            AssertionError, which FlashMLA raises.
    """
    if head_dim_v != 512:
        raise ValueError(f"head_dim_v: {head_dim_v}, expected 512")
    _check_dims(("q", q, 4), ("k_cache", k_cache, 4))
    _check_dims(
        ("block_table", block_table, None), ("cache_seqlens", cache_seqlens, None), ("descale_q", descale_q, None),
        ("descale_k", descale_k, None), ("indices", indices, 3), ("attn_sink", attn_sink, 1),
        ("extra_k_cache", extra_k_cache, 4), ("extra_indices_in_kvcache", extra_indices_in_kvcache, 3),
        ("topk_length", topk_length, 1), ("extra_topk_length", extra_topk_length, 1), optional=True,
    )  # fmt: skip
    problem = unknown_format(k_cache, indices, kv_format, use_legacy)
    if problem is not None:
        raise ValueError(problem)
    meta = is_sched_meta(tile_scheduler_metadata)
    if meta:
        if num_splits is not None:
            raise ValueError("num_splits: given, expected None beside a FlashMLASchedMeta")
    else:
        _check_tensors(
            tile_scheduler_metadata, num_splits,
            {"block_table": block_table, "cache_seqlens": cache_seqlens},
            {
                "attn_sink": attn_sink, "extra_k_cache": extra_k_cache, "topk_length": topk_length,
                "extra_indices_in_kvcache": extra_indices_in_kvcache, "extra_topk_length": extra_topk_length,
            },
        )  # fmt: skip
    scale = _number("softmax_scale", q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if indices is not None:
        if causal:
            raise ValueError("causal: True, expected False beside indices")
        if not is_fp8_kvcache:
            raise ValueError("is_fp8_kvcache: False, expected True beside indices")
        for name, value in (("descale_q", descale_q), ("descale_k", descale_k)):
            if value is not None:
                raise ValueError(f"{name}: given, expected None beside indices")
        _check_meta(
            meta, tile_scheduler_metadata, q, k_cache, causal, is_fp8_kvcache, indices, extra_k_cache,
            extra_indices_in_kvcache,
        )  # fmt: skip
        try:
            result = sparse_decode(
                q, k_cache, indices, sm_scale=scale, attn_sink=attn_sink, topk_length=topk_length,
                extra_k_cache=extra_k_cache, extra_indices=extra_indices_in_kvcache,
                extra_topk_length=extra_topk_length, batch_invariant=enable_batch_invariant,
            )  # fmt: skip
        except ValueError as refusal:
            # the kernel's name of it is shorter
            raise ValueError(str(refusal).replace("extra_indices", "extra_indices_in_kvcache")) from None
    else:
        for name, value in (
            ("attn_sink", attn_sink), ("extra_k_cache", extra_k_cache), ("topk_length", topk_length),
            ("extra_indices_in_kvcache", extra_indices_in_kvcache), ("extra_topk_length", extra_topk_length),
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"{name}: given, expected None without indices")
        if block_table is None or cache_seqlens is None:
            name = "block_table" if block_table is None else "cache_seqlens"
            raise ValueError(f"{name}: None, expected a tensor without indices")
        _check_meta(meta, tile_scheduler_metadata, q, k_cache, causal, is_fp8_kvcache, None, None, None)
        if q.element_size() > 1:
            descale_q = descale_k = None
        result = dense_decode(
            q, k_cache, block_table, cache_seqlens, sm_scale=scale, causal=causal, descale_q=descale_q,
            descale_k=descale_k, batch_invariant=enable_batch_invariant,
        )  # fmt: skip
    if meta:
        _record(tile_scheduler_metadata, q, k_cache, causal, is_fp8_kvcache, indices, extra_k_cache,
                extra_indices_in_kvcache)  # fmt: skip
    return result


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    use_legacy: bool | None = None,
    return_log2: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sparse prefill over a 16-bit workspace (`mla_patch.kernels.sparse.prefill`): ``out`` [Sq, H, 512], ``max_logits``
    and ``lse`` [Sq, H].

    1 to 128 heads, any topk, any Sq, 0 among them. Both statistics leave the sink out. They are natural, as FlashMLA's
    are today; with ``return_log2`` to the base 2, as sgl_kernel's. ``use_legacy`` is SGLang's name for the same choice,
    with True as its default. A query without a key gets out 0, max_logits -inf and lse +inf.

    Raises:
        ValueError: an argument that the kernel does not take, by its name.
    """
    if use_legacy is False and return_log2:
        raise ValueError("return_log2: True, expected False beside use_legacy=False, whose statistics are natural")
    _check_dims(("q", q, None), ("kv", kv, None), ("indices", indices, None))
    _check_dims(("attn_sink", attn_sink, None), ("topk_length", topk_length, None), ("out", out, None), optional=True)
    log2 = return_log2 if use_legacy is None else use_legacy
    return mla_sparse_prefill(q, kv, indices, _number("sm_scale", sm_scale), d_v, attn_sink, topk_length, out, log2)


def unknown_format(
    k_cache: torch.Tensor, indices: torch.Tensor | None, kv_format: str | None, use_legacy: bool
) -> str | None:
    """Why a cache is none that we can read, or None. V4.1's rows and V3.2's without rope are 528 bytes alike."""
    if kv_format not in (None, "V32"):
        return f"kv_format: {kv_format}, expected None or V32"
    if not use_legacy:
        return "use_legacy: False, expected True"
    known = (656, 584) if kv_format is None else (656,)
    if indices is not None and k_cache.shape[-1] not in known:
        return f"k_cache: {k_cache.shape[-1]} bytes a token, expected {' or '.join(map(str, known))}"
    return None


def is_sched_meta(metadata: Any) -> bool:
    """Whether this is a FlashMLASchedMeta, ours or the host's."""
    return hasattr(metadata, "have_initialized") and hasattr(metadata, "config")


def _check_dims(*given: tuple[str, Any, int | None], optional: bool = False) -> None:
    """Name, what should be a tensor, and its dimensions, None where the kernel's own check tells more."""
    for name, value, dims in given:
        if value is None and optional:
            continue
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name}: {type(value).__name__}, expected a tensor")
        if dims not in (None, value.dim()):
            raise ValueError(f"{name}: shape {tuple(value.shape)}, expected {dims} dimensions")


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: {value!r}, expected a number") from None


def _check_tensors(
    metadata: Any, num_splits: torch.Tensor | None, wanted: dict[str, Any], newer: dict[str, Any]
) -> None:
    """The older form, as FlashMLA takes it."""
    if not isinstance(metadata, torch.Tensor):
        found = type(metadata).__name__
        raise ValueError(f"tile_scheduler_metadata: {found}, expected a FlashMLASchedMeta or a tensor")
    for name, value in {"num_splits": num_splits, **wanted}.items():
        if value is None:
            raise ValueError(f"{name}: None, expected a tensor beside tensor metadata")
    for name, value in newer.items():
        if value is not None:
            raise ValueError(f"{name}: given, expected None beside tensor metadata; FlashMLASchedMeta takes it")


def _config(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    causal: bool,
    is_fp8_kvcache: bool,
    indices: torch.Tensor | None,
    extra_k_cache: torch.Tensor | None,
    extra_indices: torch.Tensor | None,
) -> tuple[Any, ...]:
    """What FlashMLA compares, in the order of its Config."""
    return (
        q.shape[0], q.shape[1], q.shape[2], k_cache.shape[1], k_cache.shape[2], causal, is_fp8_kvcache,
        None if indices is None else indices.shape[-1],
        None if extra_k_cache is None else extra_k_cache.shape[1],
        None if extra_indices is None else extra_indices.shape[-1],
    )  # fmt: skip


def _check_meta(meta: bool, metadata: Any, *call: Any) -> None:
    if meta and metadata.have_initialized:
        if metadata.config is None:
            raise MetadataMismatch("tile_scheduler_metadata: config None, expected what its first call was made for")
        now = _config(*call)
        for name, value in zip(_FIELDS, now, strict=True):
            had = getattr(metadata.config, name)
            if had != value:
                _mismatch(name, had, value)


def _mismatch(name: str, had: Any, now: Any) -> NoReturn:
    raise MetadataMismatch(
        f"tile_scheduler_metadata: made for {name} {had}, called with {now}; get a new one from get_mla_metadata()"
    )


def _record(metadata: Any, *call: Any) -> None:
    """After the first call, and not before: one that was refused has not used it."""
    if not metadata.have_initialized:
        kind = getattr(type(metadata), "Config", FlashMLASchedMeta.Config)
        made_for = dict(zip(_FIELDS, _config(*call), strict=True))
        metadata.config = kind(**made_for | _not_asked(kind))
        metadata.have_initialized = True


@lru_cache(maxsize=8)
def _not_asked(kind: type) -> dict[str, Any]:
    """What a newer Config needs besides, as sgl-flash-mla's enable_batch_invariant: as in a call that leaves it out."""
    more = [one for one in fields(kind) if one.name not in _FIELDS] if is_dataclass(kind) else []
    needed = [one for one in more if one.default is MISSING and one.default_factory is MISSING]
    return {one.name: False if one.type in (bool, "bool") else None for one in needed}
