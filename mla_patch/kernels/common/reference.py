"""Attention in float64: the one definition behind every kernel's ``*_ref``. Slow, for tests and benchmarks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mla_patch.kernels.common.constants import LATENT


class Attended(NamedTuple):
    """What one query's heads get from their keys, float64."""

    out: torch.Tensor  # [H, values]
    lse: torch.Tensor  # [H], natural log of the sum of exp(score), without the sink; -inf where there is no key
    max_logits: torch.Tensor  # [H], the largest score; -inf where there is no key


def attend_ref(
    q: torch.Tensor,
    keys: torch.Tensor,
    *,
    sm_scale: float | torch.Tensor,
    logit_cap: float = 0.0,
    temperature: float = 1.0,
    sinks: torch.Tensor | None = None,
    values: int = LATENT,
) -> Attended:
    """Attend from the heads of one query to its keys, of which the first ``values`` columns are the values.

    q        [H, width]       any float type
    keys     [L, width]       any float type; L may be 0, which gives an output of zeros
    sinks    [H], or None     a score without a value, which only makes the denominator larger

    s = q . k * sm_scale;   logit_cap * tanh(s / logit_cap) where there is a cap;   * temperature
    out = sum exp(s) v / (sum exp(s) + exp(sink))
    """
    keys = keys.double()
    scores = q.double() @ keys.T * sm_scale
    if logit_cap > 0:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    scores = scores * temperature
    lse = total = scores.logsumexp(-1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.double())
    out = torch.exp(scores - total[:, None]) @ keys[:, :values]
    max_logits = scores.amax(-1) if len(keys) else torch.full_like(lse, -torch.inf)
    return Attended(out, lse, max_logits)
