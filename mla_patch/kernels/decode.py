"""MLA decode over a paged latent cache, in plain torch.

q          [B, H, 576]  512 latent and 64 rope values
kv         [N, 1, 576] or [N, 576], q's dtype, float8_e4m3fn or float8_e5m2
out        [B, H, 512]  q's dtype or float32
indptr     [>= B + 1]   request b owns token_ids[indptr[b] : indptr[b + 1]]
token_ids  physical slots of kv
"""

from __future__ import annotations

import itertools
import math

import torch


def mla_decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    out: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    sm_scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    xai_temperature_len: int = -1,
) -> torch.Tensor:
    """Attention of each request's query over its latents; requests of no tokens come out as zeros.

    Raises:
        ValueError: shapes or dtypes other than the module's.
    """
    if q.dim() != 3 or q.shape[-1] != 576:
        raise ValueError(f"q: found {tuple(q.shape)}, expected [B, H, 576]")
    if kv.shape[-1] != 576 or kv.dim() not in (2, 3) or (kv.dim() == 3 and kv.shape[1] != 1):
        raise ValueError(f"kv: found {tuple(kv.shape)}, expected [N, 1, 576]")
    if kv.dtype not in (q.dtype, torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"kv: found {kv.dtype}, expected {q.dtype} or an fp8 type")
    if tuple(out.shape) != (*q.shape[:2], 512) or out.dtype not in (q.dtype, torch.float32):
        raise ValueError(f"out: found {tuple(out.shape)} {out.dtype}, expected [B, H, 512]")
    rows = kv.view(kv.shape[0], 576)
    bounds = indptr[: q.shape[0] + 1].tolist()
    for b, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            out[b] = 0
            continue
        latents = rows[token_ids[start:end].long()].double()
        scores = q[b].double() @ latents.T * (sm_scale * k_scale)
        if logit_cap > 0:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        last = end - start - 1
        if xai_temperature_len > 0 and last > xai_temperature_len:
            scores *= math.log2(last) / math.log2(xai_temperature_len)
        total = scores.logsumexp(-1, keepdim=True)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.double()[:, None])
        out[b] = ((scores - total).exp() @ latents[:, :512] * v_scale).to(out.dtype)
    return out
