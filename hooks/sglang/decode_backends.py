"""SGLang's FlashAttention-3, FlashInfer and FlashMLA: their decode steps, served by mla_patch.kernels.decode.

Why: with an fp8 cache, FlashAttention-3 and FlashInfer convert the layer's whole pool to 16 bits at every layer of
every step, and FlashMLA rounds the query to e4m3. Our kernel reads the bytes of the requests' rows, once.

We store the new tokens as the engine's method does, and read what is stored without scales, because no release of
SGLang divides by a scale before it stores. FlashMLA's kernel multiplies by k_scale; an edit leaves that out, on both
arms.

By default we serve 8-bit caches. With a 16-bit cache, the batch and the number of heads decide which kernel is faster:
MLA_PATCH_DECODE=on serves it, and so does an experiment, which needs something to compare.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from mla_patch.compat import gpu
from mla_patch.compat.sglang import backends as sglang_backends
from mla_patch.compat.sglang import deterministic as sglang_deterministic
from mla_patch.compat.sglang.backends import BackendCall, BackendWarmup, Fa3Call, FlashInferCall, FlashMlaCall
from mla_patch.compat.types import Change, Edit, Undo
from mla_patch.hooks.sglang.edits.scales import leave_scale_out
from mla_patch.hooks.sglang.edits.warmup import warm_once_built

CONVERTS = ("fa3", "flashinfer")  # they convert the whole pool of an 8-bit cache, on every chip
SIXTEEN_BITS = "a 16-bit cache, which mla-patch serves only with MLA_PATCH_DECODE=on"
_SIXTEEN_BITS = {call.name: f"{call.name}: {SIXTEEN_BITS}" for call in sglang_backends.CALLS}
# where our kernel replaces FlashMLA's with an 8-bit cache: it is exact, and runs at 1.25 times FlashMLA's speed at 16
# heads, at 0.74 times at 128 heads (docs/performance.md)
MEASURED = ((9, 0),)


class _Flag:
    """What MLA_PATCH_DECODE says in this process."""

    asked = False  # an explicit on, or an experiment


def on_decision(mode: str, asked_for: bool) -> None:
    """Take over the feature's flag: where somebody has set it to anything but off, all that can be served is."""
    _Flag.asked = asked_for and mode != "off"


def declines(call: BackendCall) -> str | None:
    """Why the engine's backend serves this call, or None. The launcher refuses all other shapes that it cannot take."""
    if not _Flag.asked:
        # first, since it is what most servers meet in every layer
        dtype = getattr(sglang_backends.pool_of(call), "dtype", None)
        if dtype is not None and dtype.itemsize > 1 and getattr(call.backend, "use_mla", True):
            return _SIXTEEN_BITS[call.name]
    reason = sglang_backends.problem(call) or _kept(call)
    return None if reason is None else f"{call.name}: {reason}"


def _kept(call: BackendCall) -> str | None:
    """Why the engine serves a decode that our kernel could serve, or None."""
    if sglang_deterministic.is_on():
        return sglang_deterministic.REASON
    if _Flag.asked or call.name in CONVERTS:
        return None
    return by_default(call.name, 1, gpu.capability_of(call.q))


def by_default(name: str, itemsize: int, capability: tuple[int, int] | None) -> str | None:
    """Why the backend ``name`` keeps caches of so many bytes a value on a chip (None: a CPU), or None."""
    if itemsize > 1:
        return SIXTEEN_BITS
    if name in CONVERTS or capability is None or capability in MEASURED:
        return None
    return f"not measured on sm_{capability[0]}{capability[1]}, where only MLA_PATCH_DECODE=on serves it"


def serve(call: BackendCall) -> Any:
    import torch

    from mla_patch.kernels.decode import mla_decode, mla_decode_paged

    layer, rows = call.layer, call.batch.batch_size
    heads = layer.tp_q_head_num
    cache = sglang_backends.rows_of(call)
    q = _query(call, rows, heads)
    out = torch.empty((rows, heads, 512), dtype=call.q.dtype, device=call.q.device)
    sglang_backends.store(call)
    if isinstance(call, FlashInferCall):
        indptr, token_ids = call.tokens()
        mla_decode(q, cache, out, indptr, token_ids, sm_scale=layer.scaling)
    else:
        table, lens, page_size = call.pages()  # type: ignore[attr-defined]
        kv = sglang_backends.paged(cache, page_size)
        mla_decode_paged(q, kv, out, table, lens, sm_scale=layer.scaling, logit_cap=layer.logit_cap or 0.0)
    return out.view(rows, heads * 512)


def _query(call: BackendCall, rows: int, heads: int) -> Any:
    """Every request's query as the kernel takes it, [rows, heads, 576] or its two parts; as a rule no copy."""
    if call.q_rope is None:
        return call.q.reshape(rows, heads, 576)
    return call.q.reshape(rows, heads, 512), call.q_rope.reshape(rows, heads, 64)


def shadow_clone(call: BackendCall) -> tuple[BackendCall, None]:
    """For shadow checks: the output is what is returned. Both arms store the new tokens, the same bytes twice."""
    return call, None


def targets(version: str | None) -> tuple[Change, ...]:
    """``forward_decode`` of the three classes in ``version``, and the edits around each."""
    found: list[Change] = []
    for call, warm_up in ((Fa3Call, warm_fa3), (FlashInferCall, warm_flashinfer), (FlashMlaCall, warm_flashmla)):
        found += [
            home.target(declines, serve, shadow_clone=shadow_clone, group=call.name, arms=False)
            for home in sglang_backends.homes(call, version)
        ]
        if call is FlashMlaCall and sglang_backends.flashmla_reads_scales(version):
            name = f"{call.owner}.scales"
            found.append(Edit(call.module, name, leave_scale_out, survives_restore=True, group=call.name))
        found.append(Edit(call.module, f"{call.owner}.warmup", warm_up, group=call.name))
    return tuple(found)


def _warm_once_built(call: type[BackendCall], module: ModuleType) -> Undo:
    owner = getattr(module, call.owner)
    return warm_once_built(owner, warm, functools.partial(sglang_backends.warmup_of, call))


def warm_fa3(module: ModuleType) -> Undo:
    """Have our decode compiled once a backend is built, before graphs are captured."""
    return _warm_once_built(Fa3Call, module)


def warm_flashinfer(module: ModuleType) -> Undo:
    """As `warm_fa3`."""
    return _warm_once_built(FlashInferCall, module)


def warm_flashmla(module: ModuleType) -> Undo:
    """As `warm_fa3`."""
    return _warm_once_built(FlashMlaCall, module)


def warm(asked: BackendWarmup) -> int:
    """Compile what one backend's calls can reach, before graphs are captured; how many kernels that took."""
    import torch

    from mla_patch.kernels import decode

    probe = torch.empty(0, device=asked.device)
    kept = None if _Flag.asked else by_default(asked.name, asked.cache_dtype.itemsize, gpu.capability_of(probe))
    if kept is not None or sglang_deterministic.is_on() or not gpu.on_nvidia(probe):
        return 0  # its calls are declined
    whole = asked.name == "flashmla"  # models join the query for this backend alone
    lens = (torch.int32, torch.int64) if whole else (torch.int32,)
    more = (asked.dtype, asked.cache_dtype, asked.max_batch, asked.page_size)
    return sum(decode.warmup(asked.device, asked.heads, *more, (kind, torch.int32), not whole) for kind in lens)


def serves(capability: tuple[int, int], asked: bool) -> list[tuple[str, str]]:
    """For `explain`: what each backend decodes, and who serves it."""
    rows = []
    for call in sglang_backends.CALLS:
        if not sglang_backends.is_built_on(call, capability):
            rows.append((f"{call.name}, any cache", "nobody: SGLang builds this backend for MLA only on sm_90"))
            continue
        for what, itemsize in (("an fp8 cache", 1), ("a 16-bit cache", 2)):
            kept = None if asked else by_default(call.name, itemsize, capability)
            rows.append((f"{call.name}, {what}", "mla-patch" if kept is None else f"the engine: {kept}"))
    return rows
