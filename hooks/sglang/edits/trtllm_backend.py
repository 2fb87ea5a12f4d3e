"""A TRTLLMMLABackend that was built with our mark becomes a backend of ours, with the kernels that a plugin offers."""

from __future__ import annotations

import contextvars
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from mla_patch.compat import gpu
from mla_patch.compat.named import named
from mla_patch.compat.sglang.tokenspeed import IN_LINE_CALLS, PAGE_SIZES
from mla_patch.compat.types import MlaBackendSpec, MlaDecode, MlaPrefill, Undo
from mla_patch.hooks.editing import Undoing, set_methods
from mla_patch.hooks.sglang.edits.mla_kernels import HOST_KERNEL, chosen_kernels
from mla_patch.hooks.sglang.edits.server_args import MARK

log = logging.getLogger("mla_patch")

# which of our instances is in its forward method, and for what layer: to 0.5.11 the kernel calls do not say
_running: contextvars.ContextVar[tuple[Any, Any] | None] = contextvars.ContextVar("mla_patch_tokenspeed", default=None)


def install_kernel_slot(module: ModuleType, counts: Any) -> Undo:
    """Let marked instances of the host's class become ours, once they have been built.

    ``counts`` takes the calls that a kernel other than the host's has served.
    """
    owner = module.TRTLLMMLABackend
    original = vars(owner)["__init__"]
    if tuple(inspect.signature(original).parameters)[:2] != ("self", "model_runner"):
        raise TypeError(f"{owner.__qualname__}.__init__ does not take (model_runner, ...)")
    points = [name for name in ("_run_decode_kernel", "_run_prefill_kernel") if name in vars(owner)]
    undo_calls = Undoing(_nothing, list)
    if not points:
        undo_calls = _redirect(module, owner)
    elif len(points) == 1:
        raise TypeError(f"{owner.__qualname__} has {points[0]} alone")
    ours = _kernels_of(owner, counts) if points else _in_line_of(owner, counts)
    ours.__name__ = owner.__name__  # which the host compares in places

    @functools.wraps(original)
    def init(self: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
        original(self, model_runner, *args, **kwargs)
        asked = getattr(model_runner.server_args, MARK, None)
        if asked is not None and type(self) is owner:  # a subclass of the host's has kernels of its own
            self.__class__ = ours
            self._take_kernels(asked, model_runner)

    undo_init = set_methods(owner, {"__init__": init})

    def undo() -> None:
        undo_init()
        undo_calls()

    return Undoing(undo, lambda: [*undo_init.places(), *undo_calls.places()])


def _nothing() -> None:
    return None


def _kernels_of(owner: Any, counts: Any) -> Any:
    """A class of whose instances one of ``owner``, which is the host's, can become."""

    def served(out: Any, dtype: Any) -> Any:
        counts.served += 1
        if gpu.capturing():
            counts.captured += 1
        return out if out.dtype == dtype else out.to(dtype)

    class Kernels(owner):
        """The host's backend, with the kernels that a plugin offers."""

        # None: the host's own
        _mla_patch_decode: Callable[[MlaDecode], Any] | None
        _mla_patch_prefill: Callable[[MlaPrefill], Any] | None

        def _take_kernels(self: Any, asked: str, runner: Any) -> None:
            import torch

            if self.data_type != torch.float8_e4m3fn:
                raise ValueError(f"{asked}: the cache is {self.data_type}: set --kv-cache-dtype fp8_e4m3")
            if self.page_size not in PAGE_SIZES:
                raise ValueError(f"{asked}: pages of {self.page_size} tokens, expected 32 or 64: set --page-size 64")
            device = torch.device(runner.device)
            detected = gpu.from_tensor(torch.empty(0, device=device)) if device.type == "cuda" else None
            chosen = chosen_kernels(detected, asked)
            self._mla_patch_seam = MlaBackendSpec(
                device=device if device.type != "cuda" else torch.device("cuda", torch.cuda.current_device()),
                heads=self.num_q_heads,
                kv_lora_rank=self.kv_lora_rank,
                qk_rope_head_dim=self.qk_rope_head_dim,
                head_dim=self.qk_nope_head_dim + self.qk_rope_head_dim,
                v_head_dim=self.v_head_dim,
                page_size=self.page_size,
                draft_tokens=getattr(runner.server_args, "speculative_num_draft_tokens", None) or 1,
                has_prefill=not self.skip_prefill and "forward_extend" in vars(owner),
            )
            for part, kernel in chosen.items():
                setattr(self, f"_mla_patch_{part}", None if kernel is None else named(getattr(kernel, part)))
            for kernel in dict.fromkeys(kernel for kernel in chosen.values() if kernel is not None):
                if kernel.prepare:
                    parts = frozenset(part for part, one in chosen.items() if one is kernel)
                    named(kernel.prepare)(self._mla_patch_seam, parts)
            names = {part: HOST_KERNEL if kernel is None else kernel.name for part, kernel in chosen.items()}
            log.info("mla-patch: %s: decode by %s, prefill by %s", asked, names["decode"], names["prefill"])

        def _compute_decode_bmm1_scale(self: Any, layer: Any) -> float:
            """Softmax scale of the scores; the layer's own scale, since what is stored is not scaled."""
            if self._mla_patch_decode is None:
                return super()._compute_decode_bmm1_scale(layer)
            _unscaled(layer, "k_scale_float")
            return float(layer.scaling)

        def _run_decode_kernel(
            self: Any, query: Any, kv_cache: Any, block_tables: Any, seq_lens: Any, max_seq_len: Any, layer: Any,
            **dcp: Any,
        ) -> Any:  # fmt: skip
            import torch

            if self._mla_patch_decode is None:
                return super()._run_decode_kernel(
                    query=query, kv_cache=kv_cache, block_tables=block_tables, seq_lens=seq_lens,
                    max_seq_len=max_seq_len, layer=layer, **dcp,
                )  # fmt: skip
            alone = {"causal_seqs": None, "cp_world": 1, "cp_rank": 0, "return_lse": False}
            ranks = [n for n, v in dcp.items() if n not in alone or torch.is_tensor(v) or v != alone[n]]
            if ranks:
                raise ValueError(
                    f"decode context parallelism ({', '.join(ranks)}) is not served by this backend: use cutedsl_mla"
                )
            batch, q_len, heads, _ = query.shape
            if batch == 0:
                return query.new_empty((0, q_len, heads, self.kv_lora_rank), dtype=self.q_data_type)
            out = self._mla_patch_decode(
                MlaDecode(
                    query=query,
                    # [pages, 1, page, 576] as the host has it
                    kv_cache=kv_cache.squeeze(1) if kv_cache.dim() == 4 else kv_cache,
                    block_tables=block_tables,
                    seq_lens=seq_lens if seq_lens.dtype == torch.int32 else seq_lens.to(torch.int32),
                    max_seq_len=int(max_seq_len),
                    softmax_scale=self._compute_decode_bmm1_scale(layer),
                    seam=self._mla_patch_seam,
                )
            )
            return served(out, self.q_data_type)

        def _run_prefill_kernel(
            self: Any, q: Any, k: Any, v: Any, layer: Any, batch_size: int, cum_seq_lens_q: Any, max_q_len: int,
            seq_lens_kv: Any, cum_seq_lens_kv: Any, max_kv_len: int, is_causal: bool, return_lse: bool,
            out_buffer: Any = None, o_sf_scale: float = 1.0, **more: Any,
        ) -> Any:  # fmt: skip
            import torch

            if self._mla_patch_prefill is None:
                return super()._run_prefill_kernel(
                    q=q, k=k, v=v, layer=layer, batch_size=batch_size, cum_seq_lens_q=cum_seq_lens_q,
                    max_q_len=max_q_len, seq_lens_kv=seq_lens_kv, cum_seq_lens_kv=cum_seq_lens_kv,
                    max_kv_len=max_kv_len, is_causal=is_causal, return_lse=return_lse, out_buffer=out_buffer,
                    o_sf_scale=o_sf_scale, **more,
                )  # fmt: skip
            for name in ("k_scale_float", "v_scale_float"):
                _unscaled(layer, name)
            q, k, v = (one if one.dtype == torch.float8_e4m3fn else one.to(torch.float8_e4m3fn) for one in (q, k, v))
            result = self._mla_patch_prefill(
                MlaPrefill(
                    q=q,
                    k=k,
                    v=v,
                    batch_size=int(batch_size),
                    cum_seq_lens_q=cum_seq_lens_q,
                    max_q_len=int(max_q_len),
                    seq_lens_kv=seq_lens_kv,
                    cum_seq_lens_kv=cum_seq_lens_kv,
                    max_kv_len=int(max_kv_len),
                    softmax_scale=float(layer.scaling),
                    is_causal=bool(is_causal),
                    return_lse=bool(return_lse),
                    seam=self._mla_patch_seam,
                )
            )
            out, *lse = result if return_lse else (result,)
            out = served(out, self.q_data_type)
            return (out, *lse) if return_lse else out

    return Kernels


def _in_line_of(owner: Any, counts: Any) -> Any:
    base: Any = _kernels_of(owner, counts)

    class InLine(base):
        """The same on releases whose forward methods call flashinfer themselves."""

        def forward_decode(self: Any, q: Any, k: Any, v: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
            with _forward(self, layer):
                return super().forward_decode(q, k, v, layer, *args, **kwargs)

        def forward_extend(self: Any, q: Any, k: Any, v: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
            with _forward(self, layer):
                return super().forward_extend(q, k, v, layer, *args, **kwargs)

    return InLine


@contextmanager
def _forward(backend: Any, layer: Any) -> Iterator[None]:
    token = _running.set((backend, layer))
    try:
        yield
    finally:
        _running.reset(token)


def _unscaled(layer: Any, name: str) -> None:
    """q and K are cast with scale 1 wherever this backend stores them, so that no other scale can be right."""
    scale = getattr(layer, name, None)
    if scale is not None and scale != 1.0:
        raise ValueError(f"layer {layer.layer_id}: {name} {scale}, expected 1: latents are stored without a scale")


class _Part:
    """``flashinfer``, or a module of it, but for what is given by name."""

    def __init__(self, name: str, real: Any, **ours: Any) -> None:
        self.__name__ = name
        self._real = real
        vars(self).update(ours)

    def __getattr__(self, name: str) -> Any:
        if self._real is None:
            raise AttributeError(f"{self.__name__}.{name}: flashinfer is not installed, or its host did not import it")
        return getattr(self._real, name)


def _redirect(module: ModuleType, owner: type) -> Undoing:
    """To 0.5.11: the backend's module sees a flashinfer whose two calls reach the instance that makes them."""
    for method, names in IN_LINE_CALLS.items():
        code = getattr(vars(owner).get(method), "__code__", None)
        if code is not None and not {"flashinfer", *names} <= set(code.co_names):
            raise TypeError(f"{owner.__qualname__}.{method} does not call flashinfer.{'.'.join(names)}")
    if "forward_decode" not in vars(owner):
        raise TypeError(f"{owner.__qualname__} has no forward_decode of its own")
    missing = object()
    real = vars(module).get("flashinfer", missing)
    flashinfer = None if real is missing else real

    def decode(**given: Any) -> Any:
        running = _running.get()
        if running is None or running[0]._mla_patch_decode is None:
            return flashinfer.decode.trtllm_batch_decode_with_kv_cache_mla(**given)  # type: ignore[union-attr]
        names = ("query", "kv_cache", "block_tables", "seq_lens", "max_seq_len")
        return running[0]._run_decode_kernel(**{name: given[name] for name in names}, layer=running[1])

    def prefill(**given: Any) -> Any:
        running = _running.get()
        if running is None or running[0]._mla_patch_prefill is None:
            return flashinfer.prefill.trtllm_ragged_attention_deepseek(**given)  # type: ignore[union-attr]
        names = ("batch_size", "cum_seq_lens_q", "max_q_len", "cum_seq_lens_kv", "max_kv_len", "is_causal")
        return running[0]._run_prefill_kernel(
            given["query"], given["key"], given["value"], running[1], seq_lens_kv=given["seq_lens"],
            return_lse=given["return_lse"], **{name: given[name] for name in names},
        )  # fmt: skip

    ours = _Part(
        "flashinfer",
        flashinfer,
        decode=_Lazy("flashinfer.decode", flashinfer, "decode", trtllm_batch_decode_with_kv_cache_mla=decode),
        prefill=_Lazy("flashinfer.prefill", flashinfer, "prefill", trtllm_ragged_attention_deepseek=prefill),
    )
    module.flashinfer = ours  # type: ignore[attr-defined]

    def undo() -> None:
        if vars(module).get("flashinfer") is ours:
            if real is missing:
                del module.flashinfer
            else:
                module.flashinfer = real  # type: ignore[attr-defined]

    return Undoing(undo, lambda: [(module, "flashinfer", ours)])


class _Lazy(_Part):
    """A module of flashinfer, looked up when it is asked for: flashinfer may load its own late."""

    def __init__(self, name: str, package: Any, attribute: str, **ours: Any) -> None:
        super().__init__(name, package, **ours)
        self._attribute = attribute

    def __getattr__(self, name: str) -> Any:
        if self._real is None:
            return super().__getattr__(name)
        return getattr(getattr(self._real, self._attribute), name)
