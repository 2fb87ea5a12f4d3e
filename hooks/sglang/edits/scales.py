"""SGLang's backends read an fp8 cache with the scales with which it was stored, or say that they do not."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from mla_patch.compat.sglang.decode import scale_problem
from mla_patch.compat.types import Undo
from mla_patch.hooks.editing import say_once, set_methods


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


def watch_scales(module: ModuleType) -> Undo:
    """From 0.5.12 on the engine stores and reads with scales: warn once where they cannot be right."""
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


def leave_scale_out(module: ModuleType) -> Undo:
    """From 0.5.6 FlashMLA reads an 8-bit cache times k_scale, and nobody stores it divided: read it without.

    On either arm, in decode and in verify, as both read the same bytes; prompts with a prefix have always read them so.
    """
    compiling = is_compiling()

    def read(backend: Any, layer: Any) -> Any:
        if layer.k_scale is None or layer.k_scale_float == 1.0 or not getattr(backend, "is_fp8_kvcache", False):
            return layer
        if not compiling():
            say_once(
                "flashmla",
                "the checkpoint's k_scale (%s, layer %s) is not used: SGLang's FlashMLA backend stores latents without",
                layer.k_scale_float, layer.layer_id,
            )  # fmt: skip
        return Unscaled(layer)

    return wrap_methods(module.FlashMLABackend, ("forward_decode", "forward_extend"), read)


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
