"""FlashMLA's API over our kernels, on any GPU that Triton compiles for: `get_mla_metadata`, `flash_mla_with_kvcache`
and `flash_mla_sparse_fwd`.

The parameters are the union of what FlashMLA and SGLang's wrappers take, in their order. Metadata come in two forms: a
`FlashMLASchedMeta`, which the first call fills, and the older pair of tensors. Only the first form allows sinks, a
second cache, and lengths.

Our kernels cut their work from the lengths that they find on the device. So metadata of either form are right for any
lengths, and a captured graph is right for any lengths that its buffers hold at replay. Tensors made by FlashMLA are
accepted and not read. We record what a `FlashMLASchedMeta` was first used for, and compare later calls with it, as
FlashMLA does. Its two tensors stay None. FlashMLA's kernels, given such an object next, would fill them from their own
call.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from numbers import Integral
from typing import Any, NoReturn

import torch

from mla_patch.compat import gpu
from mla_patch.kernels.cache.layouts import LAYOUTS, V32
from mla_patch.kernels.common.constants import LATENT
from mla_patch.kernels.sparse.decode import sparse_decode
from mla_patch.kernels.sparse.dense import dense_decode
from mla_patch.kernels.sparse.prefill import mla_sparse_prefill


@dataclass
class FlashMLASchedMeta:
    """What one schedule is used for. An engine's own class of this name serves as well; see `is_sched_meta`."""

    @dataclass
    class Config:
        """The call that it was first used for, by FlashMLA's names."""

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
    """A `FlashMLASchedMeta` was made for another call. FlashMLA raises an AssertionError in this case."""


_CONFIG_FIELDS = (
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

    The tensors are int32 [parts, 8] and [B + 1], as FlashMLA's. ``parts`` depends on the device, the heads and the
    queries alone. The tensors say that each request has one split. Our kernels ignore them, and FlashMLA's kernels must
    not be given them.

    Raises:
        ValueError: lengths are given without the numbers that the tensors' shapes depend on.
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
        # a call without queries needs metadata, too
        minimum = 0 if name == "num_q_tokens_per_head_k" else 1
        if not isinstance(value, Integral) or value < minimum:
            raise ValueError(f"{name}: {value!r}, expected a number from {minimum} on beside cache_seqlens")
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

    With ``indices`` it is sparse, over fp8 tokens of 656 or 584 bytes (`mla_patch.kernels.sparse.decode`). Without, it
    is dense, over bfloat16, float16 or e4m3 rows (`mla_patch.kernels.sparse.dense`). It takes 1 to 128 heads and any
    page size, topk and batch, 0 included. A query without a key gets out 0 and lse +inf. ``descale_q`` and
    ``descale_k`` belong to e4m3 queries; beside 16-bit queries they are ignored, as sgl_kernel ignores them. With
    ``enable_batch_invariant`` the results of a query do not depend on the other queries, bit for bit. Metadata do not
    record this flag, because they hold no schedule of ours.

    Raises:
        ValueError: an argument that the kernel does not take, by its name.
        MetadataMismatch: the FlashMLASchedMeta was made for another call. It is both a ValueError and the
            AssertionError that FlashMLA raises.
    """
    if head_dim_v != LATENT:
        raise ValueError(f"head_dim_v: {head_dim_v}, expected {LATENT}")
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
            # the kernel calls this argument extra_indices
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

    It takes 1 to 128 heads and any topk and Sq, 0 included. Both statistics leave the sink out. They are natural, as in
    FlashMLA today, or, with ``return_log2``, to the base 2, as in sgl_kernel. ``use_legacy`` is SGLang's name for the
    same choice, with True as its default. A query without a key gets out 0, max_logits -inf and lse +inf.

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
    """Why our kernels cannot read a cache, or None. Rows of 528 bytes are ambiguous: V4.1's, or V3.2's without rope."""
    if kv_format not in (None, "V32"):
        return f"kv_format: {kv_format}, expected None or V32"
    if not use_legacy:
        return "use_legacy: False, expected True"
    sizes = tuple(LAYOUTS) if kv_format is None else (V32.bytes,)
    if indices is not None and k_cache.shape[-1] not in sizes:
        return f"k_cache: {k_cache.shape[-1]} bytes a token, expected {' or '.join(map(str, sizes))}"
    return None


def is_sched_meta(metadata: Any) -> bool:
    """Whether this is a FlashMLASchedMeta: our class or an engine's."""
    return hasattr(metadata, "have_initialized") and hasattr(metadata, "config")


def _check_dims(*given: tuple[str, Any, int | None], optional: bool = False) -> None:
    """Check arguments: name, what should be a tensor, and how many dimensions it should have, or None.

    None leaves the dimensions to the kernel's own check, which says more.
    """
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
    metadata: Any, num_splits: torch.Tensor | None, required: dict[str, Any], newer: dict[str, Any]
) -> None:
    """Check the older form of metadata, as FlashMLA does: what it requires, and what only the newer form allows."""
    if not isinstance(metadata, torch.Tensor):
        found = type(metadata).__name__
        raise ValueError(f"tile_scheduler_metadata: {found}, expected a FlashMLASchedMeta or a tensor")
    for name, value in {"num_splits": num_splits, **required}.items():
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
    """What FlashMLA compares, in the order of `_CONFIG_FIELDS`."""
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
        for name, value in zip(_CONFIG_FIELDS, _config(*call), strict=True):
            recorded = getattr(metadata.config, name)
            if recorded != value:
                _mismatch(name, recorded, value)


def _mismatch(name: str, recorded: Any, value: Any) -> NoReturn:
    made_for = f"made for {name} {recorded}, called with {value}"
    raise MetadataMismatch(f"tile_scheduler_metadata: {made_for}; get a new one from get_mla_metadata()")


def _record(metadata: Any, *call: Any) -> None:
    """Record the first call, after it has been served: a refused call has not used the metadata."""
    if not metadata.have_initialized:
        config_type = getattr(type(metadata), "Config", FlashMLASchedMeta.Config)
        made_for = dict(zip(_CONFIG_FIELDS, _config(*call), strict=True))
        metadata.config = config_type(**made_for | _unknown_fields(config_type))
        metadata.have_initialized = True


@lru_cache(maxsize=8)
def _unknown_fields(config_type: type) -> dict[str, Any]:
    """Values for required fields of a newer Config, such as sgl-flash-mla's enable_batch_invariant.

    They are those of a call that leaves the argument out: False for a bool, otherwise None.
    """
    if not is_dataclass(config_type):
        return {}
    unknown = [field for field in fields(config_type) if field.name not in _CONFIG_FIELDS]
    required = [field for field in unknown if field.default is MISSING and field.default_factory is MISSING]
    return {field.name: False if field.type in (bool, "bool") else None for field in required}
