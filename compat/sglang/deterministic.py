"""SGLang: deterministic inference: no result depends on the other requests of the batch. Per release.

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

import os
import sys

from mla_patch.compat.eras import Eras, value_at
from mla_patch.compat.sglang import release
from mla_patch.compat.types import SWITCHED_ON

VARIABLE, REASON = release.DETERMINISTIC, release.DETERMINISTIC_PROMISE
_HAS_MODE: Eras[bool] = (("0.5.3", True), ("0.5.1", False))
OPS = "sglang.srt.batch_invariant_ops"


def has_mode(version: str | None) -> bool:
    """Whether the release has the mode; an unknown one is taken for a new one."""
    return value_at(_HAS_MODE, version)


def inherited() -> str | None:
    """What the environment says of why no kernel may serve whose results depend on the batch; None: nothing."""
    value = os.environ.get(VARIABLE, "")
    return f"{REASON} ({VARIABLE}={value})" if value.lower() in SWITCHED_ON else None


def is_on() -> bool:
    """Whether this process's engine keeps the promise. Imports nothing."""
    ops = sys.modules.get(OPS)
    return ops is not None and bool(ops.is_batch_invariant_mode_enabled())
