"""SGLang's Triton backend tells the decode that it calls whether it has promised deterministic inference."""

from __future__ import annotations

import functools
import inspect
import threading
from types import ModuleType
from typing import Any

from mla_patch.compat.sglang.deterministic import REASON
from mla_patch.compat.types import Undo
from mla_patch.hooks.editing import set_methods


class _Decoding(threading.local):
    """What this thread's backend promises while it decodes: REASON or None."""

    promise: str | None = None


decoding = _Decoding()


def watch_decodes(module: ModuleType) -> Undo:
    """Tell a decode whether the backend that asks for it is deterministic: its call does not say."""
    owner = module.TritonAttnBackend
    original = vars(owner)["forward_decode"]
    if next(iter(inspect.signature(original).parameters)) != "self":
        raise TypeError(f"{owner.__qualname__}.forward_decode is no method of an instance")

    @functools.wraps(original)
    def forward_decode(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, "enable_deterministic", False):
            return original(self, *args, **kwargs)
        before, decoding.promise = decoding.promise, REASON
        try:
            return original(self, *args, **kwargs)
        finally:
            decoding.promise = before

    return set_methods(owner, {"forward_decode": forward_decode})
