"""SGLang: deterministic inference, in which no result depends on what else is in the batch, per release.

    to 0.5.2      there is no such mode
    from 0.5.3    --enable-deterministic-inference
    from 0.5.5    --rl-on-policy-target turns it on, too

Who can tell of it:

    SGLANG_ENABLE_DETERMINISTIC_INFERENCE    an environment variable. The process that reads the server's arguments
                                             writes 1 or 0 into it, over what a user has set; later ones inherit it
    srt.batch_invariant_ops                  ModelRunner switches them on before it builds a backend
    TritonAttnBackend.enable_deterministic   of one instance. Its decode then cuts each row every split_tile_size keys;
                                             from 0.5.4 its prompts take _forward_extend_unified, another kernel

Which attention backends the mode takes, of --attention-backend:

    from 0.5.3     fa3, flashinfer, triton; with DeepSeek models fa3 and triton from 0.5.5
    from 0.5.13    ascend; fa4 from 0.5.16, intel_xpu from 0.5.19

Every release refuses flashmla, trtllm_mla and the others. It refuses DeepSeek V3.2 and V4, too: it gives them nsa (from
0.5.13 dsa) and dsv4 before it looks. No release looks at --prefill-attention-backend and --decode-attention-backend, so
any backend but dsv4 can run in this mode. Where DSA does, its fa3 kernel takes one split, and from 0.5.22 its Triton
kernel keeps tokens apart; the splits of FlashMLA's decode depend on the batch in every release.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
from types import ModuleType
from typing import Any

from mla_patch.compat.types import SWITCHED_ON, Undo
from mla_patch.hooks.editing import set_methods

VARIABLE = "SGLANG_ENABLE_DETERMINISTIC_INFERENCE"
REASON = "deterministic inference: the engine promises batch-invariant results"
_OPS = "sglang.srt.batch_invariant_ops"


def inherited() -> str | None:
    """What the environment says of why no kernel may serve whose results depend on the batch; None: nothing."""
    value = os.environ.get(VARIABLE, "")
    return f"{REASON} ({VARIABLE}={value})" if value.lower() in SWITCHED_ON else None


def is_on() -> bool:
    """Whether this process's engine keeps the promise. Imports nothing."""
    ops = sys.modules.get(_OPS)
    return ops is not None and bool(ops.is_batch_invariant_mode_enabled())


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
