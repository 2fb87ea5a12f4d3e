"""The definition of MLA decode, in float64; tests and benchmarks compare the kernels with it."""

from __future__ import annotations

import math

import torch

from mla_patch.kernels.common.constants import LATENT
from mla_patch.kernels.common.reference import attend_ref


def xai_temperature(length: int, xai_temperature_len: int) -> float:
    """The factor of a request's scores: more than 1 where it has more keys than ``xai_temperature_len``, if that is
    above 0."""
    if xai_temperature_len > 0 and length - 1 > xai_temperature_len:
        return math.log2(length - 1) / math.log2(xai_temperature_len)
    return 1.0


def mla_decode_ref(
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    kv: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    sm_scale: float,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    xai_temperature_len: int = -1,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, in float64 on the stored bytes: [B, H, 512]; ``lse`` is written where it is given."""
    if isinstance(q, tuple):
        q = torch.cat(q, -1)
    batch, heads = q.shape[:2]
    out = torch.zeros(batch, heads, LATENT, dtype=torch.float64, device=q.device)
    bounds = indptr[: batch + 1].tolist()
    if lse is not None:
        lse.fill_(-math.inf)
    for b in range(batch):
        length = bounds[b + 1] - bounds[b]
        if length <= 0:
            continue
        found = attend_ref(
            q[b], kv.reshape(kv.shape[0], -1)[token_ids[bounds[b] : bounds[b + 1]].long()], sm_scale=sm_scale * k_scale,
            logit_cap=logit_cap, temperature=xai_temperature(length, xai_temperature_len), sinks=sinks,
        )  # fmt: skip
        out[b] = found.out * v_scale
        if lse is not None:
            lse[b] = found.lse if sinks is None else torch.logaddexp(found.lse, sinks.double())
    return out
