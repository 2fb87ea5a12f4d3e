"""SGLang: where it takes FlashMLA's wrappers from, and how they are called, per release.

    to 0.5.4           flash_mla, a package of its own, in either API
    0.5.5 - 0.5.22     sgl_kernel.flash_mla; sgl-kernel 0.3.16 - 0.4.2.post2 (pinned to 0.5.12.post1) has the older API,
                       sglang-kernel 0.4.3 (pinned from 0.5.13) the newer, 0.4.10 kv_format, too
    0.5.12             DeepSeek V4 through the flash_mla package, in the newer API, beside sgl_kernel for the rest
    from 0.5.23        kernels.ops.attention.flash_mla_interface, over the wheel sgl-flash-mla

    get_mla_metadata        older: lengths, queries per KV head, KV heads, then num_heads_q=None, is_fp8_kvcache=False,
                            topk=None; newer: all of them optional, and without lengths a FlashMLASchedMeta
    flash_mla_with_kvcache  older: to `indices`; newer: num_splits=None, attn_sink, extra_k_cache,
                            extra_indices_in_kvcache, topk_length, extra_topk_length; then kv_format, which 0.5.22 and
                            0.5.23 set to V32 for a cache of 656 bytes a token; then use_legacy.
                            The flash_mla package has no descale_q and descale_k; to 0.5.4 flashmla_backend passes
                            them to it for e4m3 caches, which is a TypeError
    flash_mla_sparse_fwd    older: to `d_v`; newer: attn_sink, topk_length; from 0.5.23 use_legacy. Statistics are to
                            the base 2, but for use_legacy=False. The flash_mla package's differ by build: left alone

flashmla_backend binds both by value at its top in every release, the sparse backends import them at each call. From
0.5.23 DeepSeek V4's backend keeps a partial of the wrapper from its construction on.

What a backend can ask of them, which is compiled at the end of its __init__, before graphs are captured:

    flashmla_backend.FlashMLABackend                  dense over pages of 64, in the model's type or e4m3
    nsa_backend.NativeSparseAttnBackend to 0.5.12,    V3.2, by names of implementations: flashmla_kv (to 0.5.4 also
    dsa_backend.DeepseekSparseAttnBackend             flashmla_decode) is sparse decode, flashmla_sparse
                                                      (flashmla_prefill) sparse prefill, flashmla_auto both. They are in
                                                      globals of its module to 0.5.5. Heads are padded to 64 or 128 for
                                                      sparse prefill from 0.5.6, for decode from flashmla_kv_num_q_heads
    deepseek_v4_backend.DeepseekV4AttnBackend         V4 from 0.5.12, sparse prefill from 0.5.13; all heads of the
                                                      model, later at least 64 of this rank's
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module, metadata
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from packaging.version import InvalidVersion

from mla_patch.compat.eras import Eras, between, era_of, since, value_at
from mla_patch.compat.types import Home

INTERFACE = "sglang.kernels.ops.attention.flash_mla_interface"
SGL_KERNEL = "sgl_kernel.flash_mla"
PACKAGE = "flash_mla.flash_mla_interface"


class Build:
    """The FlashMLA behind one wrapper: which operators are loaded, and whether it knows the newer API and descales.

    Operators are asked of torch at the first call, when whatever registers them has been imported.
    """

    def __init__(self, module: str, newer: bool) -> None:
        self.module = module
        self.newer = newer
        self.descales = module != PACKAGE
        self.ignores_descales = module != INTERFACE  # of 16-bit queries; else it refuses them

    def has(self, newer: bool) -> bool:
        """Whether calls of the newer or the older form have an operator."""
        return operators(self.module)[newer]


@lru_cache(maxsize=8)
def operators(module: str) -> tuple[bool, bool]:
    """(older, newer): whether the operators of each API are loaded behind the wrappers in ``module``."""
    if _gave_up(module):
        return False, False
    if module == SGL_KERNEL:
        import torch

        ops = torch.ops.sgl_kernel
        newer = hasattr(ops, "sparse_decode_fwd")  # from 0.4.10 behind tensor metadata, too
        return newer or hasattr(ops, "fwd_kvcache_mla"), newer
    has = _package()
    return has, has


def _gave_up(module: str) -> bool:
    """Whether sgl_kernel's wrappers could not load their extension (driver, torch's ABI, an image cut down): each call
    of them raises then, whoever else has registered operators of these names."""
    return getattr(sys.modules.get(module), "_flashmla_import_error", None) is not None


def _package() -> bool:
    """Whether the flash_mla package is loaded, which it is not without its extension. What our calls ask of
    sgl-flash-mla lies in a second one, without which it does load."""
    package = sys.modules.get("flash_mla")
    return package is not None and bool(getattr(package, "has_legacy", lambda: True)())


@lru_cache(maxsize=8)
def dense_widths(module: str) -> tuple[int, ...]:
    """Widths of 16-bit queries that the dense operator behind ``module`` takes; others end the process."""
    if module == SGL_KERNEL:
        try:
            wide = since(metadata.version("sglang-kernel"), "0.4.5")
        except (metadata.PackageNotFoundError, InvalidVersion, TypeError):  # which None has
            wide = False
    else:
        wide = module == INTERFACE
    return (576, 512) if wide else (576,)


@lru_cache(maxsize=8)
def prefill_arity(module: str) -> int:
    """How many arguments the sparse prefill's operator behind ``module`` takes: 7 with sink and lengths, 0: none is."""
    if _gave_up(module):
        return 0
    if module == SGL_KERNEL:
        import torch

        operator = getattr(torch.ops.sgl_kernel, "sparse_prefill_fwd", None)
        return 0 if operator is None else len(operator.default._schema.arguments)
    return 7 if _package() else 0


CHIPS = ((9, 0), (10, 0), (10, 3))  # that FlashMLA is built for; dense for the first alone


def prefill_takes(heads: int, width: int, topk: int, capability: tuple[int, int] | None) -> bool:
    """Whether FlashMLA's sparse prefill has a build for these heads and this topk, on a chip that it is built for."""
    small = heads == 64 or (width == 512 and topk <= 1280)  # of sm_100's builds
    step = 64 if capability is not None and capability[0] == 10 and small else 128
    return heads in (64, 128) and topk > 0 and topk % step == 0


def prefill_wrapper(module: str) -> Callable[..., Any] | None:
    """``flash_mla_sparse_fwd`` of ``module``, if its operator takes sinks and lengths."""
    if prefill_arity(module) < 7:
        return None
    function = getattr(import_module(module), "flash_mla_sparse_fwd", None)
    return function if function is not None and "topk_length" in inspect.signature(function).parameters else None


def before_v41(function: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper of the flash_mla package's, for who calls it past SGLang's: sgl-flash-mla wants it said that its
    kernels from before V4.1's are meant, as all of sm_90's are."""
    named = inspect.signature(function).parameters
    return partial(function, use_legacy=True) if "use_legacy" in named else function


class MetadataCall:
    """One call of get_mla_metadata."""

    __slots__ = ("build", "cache_seqlens", "heads", "is_fp8_kvcache", "kv_heads", "tokens", "topk")
    optional = ("cache_seqlens",)

    def __init__(
        self, build, cache_seqlens=None, num_q_tokens_per_head_k=None, num_heads_k=None, num_heads_q=None,
        is_fp8_kvcache=False, topk=None,
    ):  # fmt: skip
        self.build = build
        self.cache_seqlens = cache_seqlens
        self.tokens = num_q_tokens_per_head_k
        self.kv_heads = num_heads_k
        self.heads = num_heads_q
        self.is_fp8_kvcache = is_fp8_kvcache
        self.topk = topk


def package_metadata(build, cache_seqlens, num_heads_per_head_k, num_heads_k):
    """The flash_mla package's older name for the queries' heads of one KV head."""
    return MetadataCall(build, cache_seqlens, num_heads_per_head_k, num_heads_k)


class KvCacheCall:
    """One call of flash_mla_with_kvcache, in the newest wrapper's order."""

    __slots__ = (
        "attn_sink", "block_table", "build", "cache_seqlens", "causal", "descale_k", "descale_q", "extra_indices",
        "extra_k_cache", "extra_topk_length", "head_dim_v", "indices", "is_fp8_kvcache", "k_cache", "kv_format",
        "metadata", "num_splits", "q", "softmax_scale", "topk_length", "use_legacy",
    )  # fmt: skip
    tensors, numbers = ("q", "k_cache"), ("head_dim_v",)
    optional = (
        "block_table", "cache_seqlens", "indices", "attn_sink", "extra_k_cache", "extra_indices", "topk_length",
        "extra_topk_length", "descale_q", "descale_k",
    )  # fmt: skip

    def __init__(
        self, build, q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
        softmax_scale=None, causal=False, descale_q=None, descale_k=None, is_fp8_kvcache=False, indices=None,
        attn_sink=None, extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None,
        kv_format=None, *, use_legacy=True,
    ):  # fmt: skip
        self.build = build
        self.q = q
        self.k_cache = k_cache
        self.block_table = block_table
        self.cache_seqlens = cache_seqlens
        self.head_dim_v = head_dim_v
        self.metadata = tile_scheduler_metadata
        self.num_splits = num_splits
        self.softmax_scale = softmax_scale
        self.causal = causal
        self.descale_q = descale_q
        self.descale_k = descale_k
        self.is_fp8_kvcache = is_fp8_kvcache
        self.indices = indices
        self.attn_sink = attn_sink
        self.extra_k_cache = extra_k_cache
        self.extra_indices = extra_indices_in_kvcache
        self.topk_length = topk_length
        self.extra_topk_length = extra_topk_length
        self.kv_format = kv_format
        self.use_legacy = use_legacy


class PrefillCall:
    """One call of flash_mla_sparse_fwd; ``use_legacy`` is what the wrappers without it do."""

    __slots__ = ("attn_sink", "build", "d_v", "indices", "kv", "q", "sm_scale", "topk_length", "use_legacy")
    tensors, optional, numbers = ("q", "kv", "indices"), ("attn_sink", "topk_length"), ("sm_scale", "d_v")

    def __init__(
        self, build, q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None, *, use_legacy=True
    ):  # fmt: skip
        self.build = build
        self.q = q
        self.kv = kv
        self.indices = indices
        self.sm_scale = sm_scale
        self.d_v = d_v
        self.attn_sink = attn_sink
        self.topk_length = topk_length
        self.use_legacy = use_legacy


def package_call(
    build, q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
    softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None, extra_k_cache=None,
    extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None, *, descale_q=None, descale_k=None,
):  # fmt: skip
    """The flash_mla package's order, which has no descales; releases to 0.5.4 name them."""
    return KvCacheCall(
        build, q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits, softmax_scale,
        causal, descale_q, descale_k, is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache,
        topk_length, extra_topk_length,
    )  # fmt: skip


_META = ("cache_seqlens", "num_q_tokens_per_head_k", "num_heads_k", "num_heads_q", "is_fp8_kvcache", "topk")
_FIRST = (
    "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits",
    "softmax_scale", "causal",
)  # fmt: skip
_SPARSE = ("is_fp8_kvcache", "indices")
_NEWER = ("attn_sink", "extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length")
_DESCALED = (*_FIRST, "descale_q", "descale_k", *_SPARSE)

# (parameters, whether it is the newer API), for every wrapper that was read
_SGL_KERNEL = (
    (_DESCALED, False),
    ((*_DESCALED, *_NEWER), True),
    ((*_DESCALED, *_NEWER, "kv_format"), True),
)
_PACKAGE = ((_FIRST, False), ((*_FIRST, *_SPARSE), False), ((*_FIRST, *_SPARSE, *_NEWER), True))
PACKAGE_ORDER = _PACKAGE[-1][0]  # of the newer API's arguments
_INTERFACE = (((*_DESCALED, *_NEWER, "kv_format", "use_legacy"), True),)
_PREFILL = ("q", "kv", "indices", "sm_scale", "d_v")
_PREFILL_NEWER = (*_PREFILL, "attn_sink", "topk_length")


def _wrapper(module: str, prefix: str, home: str, variants: Any, call: Callable[..., Any]) -> list[Home]:
    """``flash_mla_with_kvcache`` in one module, by each of the parameter lists that it may have."""
    return [
        Home(home, f"{prefix}flash_mla_with_kvcache", params, "call", partial(call, Build(module, newer)))
        for params, newer in variants
    ]


def _metadata(module: str, prefix: str, home: str, lists: tuple[tuple[str, ...], ...], newer: bool) -> list[Home]:
    # its parameters are the same in both APIs; whether it gives a FlashMLASchedMeta is asked when it is called
    build = Build(module, newer)
    return [
        Home(
            home, f"{prefix}get_mla_metadata", params, "call",
            partial(package_metadata if "num_heads_per_head_k" in params else MetadataCall, build),
        )
        for params in lists
    ]  # fmt: skip


def _prefill(home: str, variants: tuple[tuple[str, ...], ...]) -> list[Home]:
    return [
        Home(home, "flash_mla_sparse_fwd", params, "call", partial(PrefillCall, Build(home, len(params) > 5)))
        for params in variants
    ]


_PACKAGE_META = (("*args", "**kwargs"), _META, ("cache_seqlens", "num_heads_per_head_k", "num_heads_k"))


def has_package() -> bool:
    """Whether the flash_mla package is installed; imports nothing of it."""
    return PathFinder.find_spec("flash_mla") is not None


# where the release takes the wrappers from
HOMES: Eras[str] = (("0.5.23", INTERFACE), ("0.5.5", SGL_KERNEL), ("0.5.3", PACKAGE))
NEWER_API = "0.5.13"  # from then on the pinned packages have it


def v4_is_apart(version: str | None) -> bool:
    """Whether DeepSeek V4 takes FlashMLA from the package, and all else of the release from another place."""
    return between(version, "0.5.12", "0.5.13")


def wrapper_homes(home: str, version: str | None) -> list[Home]:
    """The wrappers in ``home``, one of `HOMES`, as ``version`` finds them: by each parameter list that was read."""
    newer = since(version, NEWER_API, unknown=True)
    if home == INTERFACE:
        return [
            *_metadata(INTERFACE, "", INTERFACE, (_META,), newer),
            *_wrapper(INTERFACE, "", INTERFACE, _INTERFACE, KvCacheCall),
            *_prefill(INTERFACE, ((*_PREFILL_NEWER, "use_legacy"),)),
        ]
    if home == SGL_KERNEL:
        return [
            *_metadata(SGL_KERNEL, "", SGL_KERNEL, (_META,), newer),
            *_wrapper(SGL_KERNEL, "", SGL_KERNEL, _SGL_KERNEL, KvCacheCall),
            *_prefill(SGL_KERNEL, (_PREFILL, _PREFILL_NEWER)),
        ]
    return [
        *_metadata(PACKAGE, "", PACKAGE, _PACKAGE_META, newer),
        *_wrapper(PACKAGE, "", PACKAGE, _PACKAGE, package_call),
    ]


def v4_wrapper_homes() -> list[Home]:
    """The package's wrappers beside others, where `v4_is_apart`: by names of its own, since source alone does not tell
    them apart. V4 needs the newer API."""
    found = _metadata(PACKAGE, "flash_mla_interface.", "flash_mla", _PACKAGE_META[:1], True)
    return found + _wrapper(PACKAGE, "flash_mla_interface.", "flash_mla", _PACKAGE[2:], package_call)


_BACKENDS = "sglang.srt.layers.attention"
DENSE_BACKEND = f"{_BACKENDS}.flashmla_backend"  # has FlashMLABackend
V4_BACKEND = f"{_BACKENDS}.deepseek_v4_backend"  # has DeepseekV4AttnBackend, from 0.5.12
# the module of V3.2's backend; see `v32_backend`
_V32_BACKENDS: Eras[str] = (("0.5.13", f"{_BACKENDS}.dsa_backend"), ("0.5.3", f"{_BACKENDS}.nsa_backend"))


def v4_home(version: str | None) -> str:
    """Where DeepSeek V4 takes the wrappers from."""
    return PACKAGE if v4_is_apart(version) else value_at(HOMES, version)


def v32_modules(version: str | None) -> list[str]:
    """Where V3.2's backend lives; each place where the version is unknown."""
    return era_of(_V32_BACKENDS, version)


def has_v4(version: str | None) -> bool:
    """Whether the release has DeepSeek V4's backend; an unknown one is taken to have none."""
    return since(version, "0.5.12")


def v32_backend(module: ModuleType) -> type:
    """V3.2's backend, whose name changed in 0.5.13."""
    return getattr(module, "DeepseekSparseAttnBackend", None) or module.NativeSparseAttnBackend


def v4_heads(runner: Any) -> tuple[int, ...]:
    """What V4's backend gives FlashMLA: all of the model's heads, or those of a rank in 64."""
    return tuple(sorted({runner.model_config.num_attention_heads, 64}))
