"""SGLang's MLA decode, served by mla_patch.kernels.decode: the Triton backend's, and the feature as a whole.

`decode_backends` serves the decode of FlashAttention-3, FlashInfer and FlashMLA.

Why: the engine's kernel reads the latent cache once per 16 query heads, and its split scratch grows with rows x heads x
splits. From 0.5.12 on, the engine has an MLA kernel. The table below says on which GPUs our kernel is faster.

A caller who does not pass `has_mla` may read the split scratch, as decode context parallelism does from 0.5.15 on. For
such a caller, our kernel fills the scratch as the engine's kernel would.

Our kernel cuts the keys of all requests into equal pieces. So the order in which it adds up the values of a request
depends on the other requests. If the engine promises that no result depends on the batch, the engine's kernel serves.

Scales of an fp8 cache. MHA prefill, other processes and the host arm read the same bytes, so that we must not change
what is stored. Our kernel reads what the release stores:

* Up to and including 0.5.9, the engine stores and reads latents without scales. The half of its extend kernel that
  reads the prefix takes none.
* 0.5.10 and 0.5.11 store without scales and read with them. An edit leaves the scales out of reading, in decode and
  extend. It holds for both arms, and it outlives the breaker and restore().
* From 0.5.12 on, both scales come with the call. V is part of the stored K, so that only k_scale == v_scale can be
  right. We decline any other pair. If the checkpoint has one scale of the two, the call shows 1 and 1. One warning
  tells of that, and of prompts that MHA prefill stores undivided.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import inf
from types import ModuleType
from typing import Any

from mla_patch.compat import gpu
from mla_patch.compat.sglang import backends as sglang_backends
from mla_patch.compat.sglang import decode as sglang
from mla_patch.compat.sglang import deterministic as sglang_deterministic
from mla_patch.compat.sglang.decode import DecodeCall, DecodeWarmup, Scales
from mla_patch.compat.sglang.release import supported
from mla_patch.compat.types import Change, Edit, Gpu, Undo, Variable
from mla_patch.features import DeviceCheck, Feature
from mla_patch.flags import nearest, variable
from mla_patch.hooks.sglang import decode_backends as sglang_decode_backends
from mla_patch.hooks.sglang.edits import graphs as sglang_graphs
from mla_patch.hooks.sglang.edits.deterministic import decoding, watch_decodes
from mla_patch.hooks.sglang.edits.scales import leave_scales_out, watch_scales
from mla_patch.hooks.sglang.edits.warmup import warm_once_built
from mla_patch.hookspecs import hookimpl

# compute capability -> whether our kernel is faster than SGLang's (docs/performance.md); no row: not measured
FASTER = {(9, 0): True}


def native(target: Change, version: str | None) -> DeviceCheck | None:
    """If the Triton backend of the release has an MLA decode, the GPU decides which of the two serves.

    For the other backends that depends on the cache, too: see `decode_backends`.
    """
    return host_is_kept if target.group == "triton" and sglang.has_mla_decode(version) else None


def host_is_kept(device: Gpu) -> str | None:
    """Why the engine's MLA decode serves on this device, or None."""
    faster = FASTER.get(device.capability)
    if faster is None:
        return f"not measured on {device.sm}"
    return None if faster else f"the engine's kernel is faster on {device.sm}"


def _backends(text: str) -> str:
    """The backends that a list names, each once and in our order."""
    named = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in sglang_backends.NAMES:
            known = ", ".join(sglang_backends.NAMES)
            raise ValueError(f"no backend {name}, expected some of {known}{nearest(name, sglang_backends.NAMES)}")
    if not named:
        raise ValueError(f"expected some of {', '.join(sglang_backends.NAMES)}; MLA_PATCH_DECODE=off serves none")
    return ",".join(name for name in sglang_backends.NAMES if name in named)


def targets(version: str | None) -> tuple[Change, ...]:
    """The entry points of the backends that MLA_PATCH_DECODE_BACKENDS leaves to us."""
    wanted = variable(FEATURE, "BACKENDS").split(",")
    every = (*triton_targets(version), *sglang_decode_backends.targets(version))
    return tuple(target for target in every if target.group in wanted)


# what the backend does with the scales of an fp8 cache -> the edit of it, and whether that outlives restore()
_SCALES: dict[Scales, tuple[Callable[[ModuleType], Undo], bool]] = {
    "divided": (watch_scales, False),
    "read": (leave_scales_out, True),
}


def triton_targets(version: str | None) -> tuple[Change, ...]:
    """The Triton backend's decode of ``version``, and the edits of the backend around it."""
    module, owner, group = sglang.BACKEND, "TritonAttnBackend", "triton"
    found: list[Change] = [
        home.target(declines, serve, shadow_clone=shadow_clone, group=group) for home in sglang.homes(version)
    ]
    scales = _SCALES.get(sglang.scales_of(version))
    if scales is not None:
        edit, survives = scales
        found.append(Edit(module, f"{owner}.scales", edit, survives_restore=survives, group=group))
    if sglang_deterministic.has_mode(version):
        found.append(Edit(module, f"{owner}.deterministic", watch_decodes, group=group))
    found.append(Edit(module, f"{owner}.warmup", warm_decode, group=group))
    return tuple(found)


def warm_decode(module: ModuleType) -> Undo:
    """Have our decode compiled once a backend is built, which all releases do before they capture graphs or serve."""
    return warm_once_built(module.TritonAttnBackend, warm, sglang.decode_warmup)


def serves(version: str, capability: tuple[int, int], heads: int, asked: bool) -> list[tuple[str, str]]:
    """For `explain`: what each backend decodes, and who serves it."""
    kept = None
    if sglang.has_mla_decode(version) and not asked:
        kept = host_is_kept(Gpu("", capability))
    rows = [("triton, any cache", "mla-patch" if kept is None else f"the engine: {kept}")]
    rows += sglang_decode_backends.serves(capability, asked)
    wanted = variable(FEATURE, "BACKENDS").split(",")
    return [
        row if row[0].partition(",")[0] in wanted else (row[0], "the engine: not in MLA_PATCH_DECODE_BACKENDS")
        for row in rows
    ]


FEATURE = Feature(
    name="decode",
    host=supported(),
    targets=targets,
    why="Triton's kernel reads the cache once per 16 query heads; FA3 and FlashInfer first cast the whole fp8 pool",
    upstream="https://github.com/sgl-project/sglang/pull/20479",
    drop_when="the engine reads the latent cache once per request and is at least as fast",
    native=native,
    hardware=gpu.not_nvidia,
    variables=(
        Variable(
            "BACKENDS", (), ",".join(sglang_backends.NAMES), "backends that the decode kernel may serve", _backends
        ),
    ),
    serves=serves,
    on_decision=sglang_decode_backends.on_decision,
    environment=sglang_deterministic.inherited,
    steps=sglang_graphs.step_targets,
    promises="deterministic inference: the engine's kernel decodes, because the order in which our kernel adds up the "
    "values of a request depends on the other requests. The state is `refused`, and no experiment starts",
)


@hookimpl
def mla_patch_features() -> list[Feature]:
    return [FEATURE]


def declines(call: DecodeCall) -> str | None:
    """Why this call goes to the engine, or None. The launcher refuses other shapes and dtypes that it cannot take."""
    reason = call.extra or decoding.promise
    if reason is not None:
        return reason
    try:
        _, heads, width = call.k.shape
    except ValueError:
        return f"{call.k.dim()}-D cache view"
    if width != 576 or heads != 1:
        return f"{heads} kv heads of {width}, not one of 512 + 64"
    k_scale = call.k_scale
    # false of NaN too
    if not (k_scale == call.v_scale and 0.0 < k_scale < inf):
        return sglang.scale_problem(k_scale, call.v_scale)
    return None


def serve(call: DecodeCall) -> None:
    q = call.q
    if q.shape[1] == 1:
        raise ValueError("MHA group size 1")  # a decline as well; `declines` has its share of 1.5 us to keep to
    if call.splits is None:
        from mla_patch.kernels.decode import mla_decode

        mla_decode(
            q,
            call.k,
            call.out,
            call.indptr,
            call.token_ids,
            sm_scale=call.sm_scale,
            k_scale=call.k_scale,
            v_scale=call.v_scale,
            logit_cap=call.logit_cap,
            sinks=call.sinks,
            xai_temperature_len=call.xai_temperature_len,
        )
    else:  # decode context parallelism: the caller reads its scratch afterwards
        from mla_patch.kernels.decode.splits import mla_decode_splits

        attn_logits, attn_lse, num_kv_splits, max_kv_splits = call.splits
        mla_decode_splits(
            q,
            call.k,
            call.out,
            call.indptr,
            call.token_ids,
            attn_logits,
            attn_lse,
            num_kv_splits,
            sm_scale=call.sm_scale,
            k_scale=call.k_scale,
            v_scale=call.v_scale,
            logit_cap=call.logit_cap,
            sinks=call.sinks,
            xai_temperature_len=call.xai_temperature_len,
            max_kv_splits=max_kv_splits,
        )


def shadow_clone(call: DecodeCall) -> tuple[DecodeCall, list[tuple[Any, Any]]]:
    """For shadow checks: the call with an output of its own."""
    if call.splits is not None:  # our kernel would fill the scratch that the caller reads before the engine's does
        raise ValueError("no shadow check: the caller reads the split scratch")
    clone = copy.copy(call)
    clone.out = call.out.clone()
    return clone, [(call.out, clone.out)]


def warm(asked: DecodeWarmup) -> int:
    """Compile what one backend's calls can reach, before graphs are captured; how many kernels that took.

    The backend's token ids, too: a few small kernels, for the feature beside this one.
    """
    import torch

    from mla_patch.kernels import decode
    from mla_patch.kernels.decode import splits as decode_splits
    from mla_patch.kernels.indices import kv as kv_indices

    if asked.heads == 1 or not gpu.on_nvidia(torch.empty(0, device=asked.device)):
        return 0  # its calls are declined
    ids = kv_indices.warmup(asked.device, ())
    if asked.deterministic:
        return ids  # its calls are declined
    if asked.splits:
        return ids + decode_splits.warmup(asked.device, asked.heads, asked.dtype, asked.cache_dtype, asked.splits)
    return ids + decode.warmup(asked.device, asked.heads, asked.dtype, asked.cache_dtype, asked.max_batch)
