"""MLA decode as an arm for an external script that measures it together with its peers."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without an install

from mla_patch.kernels.decode import mla_decode


def decode(case):
    """``(call, out)``: what the measuring script calls, and the tensor that it checks."""
    out = torch.full((case.B, case.H, 512), float("nan"), device=case.q.device, dtype=case.q.dtype)
    return lambda: mla_decode(case.q, case.kv, out, case.indptr, case.token_ids, sm_scale=case.sm_scale), out
