"""Launches that are made again: every layer of every step makes the same call but for addresses.

A call's checks, its launch numbers and Triton's look at its arguments take many times as long as the launch itself. So
the first call of a kind leaves its launches here, and later ones only fill in what changes.
"""

from __future__ import annotations

from typing import Any

import torch

from mla_patch.compat.triton import Relaunch
from mla_patch.kernels.common.constants import LATENT
from mla_patch.kernels.decode.config import DIRECT

KNOWN: dict[Any, Launches] = {}
MAX_KNOWN = 8192  # an eager engine makes a few kinds of calls for each number of requests


def remember(key: Any, launches: Launches) -> None:
    """Keep launches for the calls that have this key, and have them go past Triton's look."""
    launches.settle()
    if len(KNOWN) >= MAX_KNOWN:
        KNOWN.clear()
    KNOWN[key] = launches


def scratch_size(programs: int, heads: int, batch: int, kind: int) -> tuple[int, torch.dtype]:
    """One call's scratch: two partials per program and head, their log-sum-exps, and who shares which request.

    It comes from torch's allocator at every call and is kept for none. The allocator knows where a call's memory
    belongs: to a stream, to the pool of a captured graph, or to a thread's own pool. A cache of ours would need a key
    that means the same in all of these.
    """
    places = 2 * programs * heads
    tables = places + 4 * programs + 2 * batch  # numbers of 4 bytes
    if kind == DIRECT:
        return places * LATENT + tables, torch.float32
    # no mean of 8-bit values leaves float16's range
    return places * LATENT + 2 * tables, torch.float16


class Launches:
    """Both launches of calls that are alike, whose tensors have been checked.

    The first time Triton looks at all arguments, and compiles what it has not; from `settle` on addresses will do.
    """

    __slots__ = (
        "address", "decode", "heads", "k_on_device", "kv_stride", "lse_strides", "merge", "out_strides", "page_stride",
        "programs", "q_strides", "rope_of", "rows_of", "scratch", "v_on_device",
    )  # fmt: skip

    def __init__(
        self, decode: Relaunch, merge: Relaunch, programs: int, heads: int, scratch: tuple[int, torch.dtype],
        seen_as: torch.dtype | None, k_on_device: bool, v_on_device: bool, q_strides: Any, kv_stride: int,
        page_stride: int | None, out_strides: Any, lse_strides: Any,
    ) -> None:  # fmt: skip
        self.decode, self.merge, self.programs, self.heads, self.scratch = decode, merge, programs, heads, scratch
        self.k_on_device, self.v_on_device = k_on_device, v_on_device
        self.q_strides, self.kv_stride, self.page_stride = q_strides, kv_stride, page_stride
        self.out_strides, self.lse_strides = out_strides, lse_strides
        self.address: Any = lambda tensor: tensor
        self.rope_of: Any = lambda q: q[..., LATENT:]
        self.rows_of: Any = lambda kv: kv if seen_as is None else view_as(kv, seen_as)

    def settle(self) -> None:
        if self.decode.settle() and self.merge.settle():
            self.address = self.rows_of = torch.Tensor.data_ptr
            self.rope_of = lambda q: q.data_ptr() + LATENT * q.element_size()

    def launch(
        self, q: Any, rope: Any, kv: Any, out: Any, indptr: Any, token_ids: Any, sinks: Any, lse: Any, k_scale: Any,
        v_scale: Any, batch: int, table_stride: int, sm_scale: float, logit_cap: float, xai_len: int,
    ) -> None:  # fmt: skip
        at, page_stride = self.address, self.page_stride
        size, dtype = self.scratch
        # held until both launches are made: an address keeps no memory
        scratch = torch.empty(size, dtype=dtype, device=q.device)
        partial, result = at(scratch), at(out)
        if sinks is not None:
            sinks = at(sinks)
        if lse is not None:
            lse = at(lse)
        k_scale_at = v_scale_at = None
        if self.k_on_device:
            k_scale_at = at(k_scale)
        else:
            sm_scale *= k_scale
        if self.v_on_device:
            v_scale_at, v_scale = at(v_scale), 1.0
        self.decode(
            at(q), self.rope_of(q) if rope is None else at(rope), self.rows_of(kv), result, lse, at(indptr),
            at(token_ids), sinks, k_scale_at, v_scale_at, partial, batch, self.heads, float(sm_scale), float(v_scale),
            logit_cap, xai_len, *self.q_strides, self.kv_stride, *self.out_strides, *self.lse_strides,
            None if page_stride is None else table_stride, page_stride,
        )  # fmt: skip
        self.merge(
            result, lse, sinks, v_scale_at, partial, self.programs, self.heads, float(v_scale), *self.out_strides,
            *self.lse_strides,
        )  # fmt: skip


def view_as(kv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of 8-bit values as rows of a wider type. A view looks at the strides of dimensions of one, too, which may be
    anything."""
    strides = [stride if size > 1 else 0 for size, stride in zip(kv.shape, kv.stride(), strict=True)]
    return kv.as_strided(kv.shape, strides).view(dtype)
