"""MLA decode: one query token per request attends to its rows of the paged latent cache.

    q          [B, H, 576]          bfloat16, float16 or float32; 512 latent and 64 rope values, or these two as a pair
                                    of tensors, [B, H, 512] and [B, H, 64], each with strides of its own
    kv         [N, 576] (or [N, 1, 576])  float8_e4m3fn, float8_e5m2 or the dtype of q (bfloat16 or float16 where q is
                                    float32); V is the first 512 values of K
    out        [B, H, 512]          bfloat16, float16 or float32
    indptr     [>= B + 1]           int32 or int64; request b owns token_ids[indptr[b] : indptr[b + 1]]
    token_ids  [>= indptr[B]]       int32 or int64, physical rows of kv in any order, repeats allowed
    sinks      [H]                  float32 or bfloat16, or None
    lse        [B, H]               float32 or the dtype of q, written where it is given
    k_scale, v_scale                numbers, or one-element float tensors on the device, which the kernel reads

    s_bhj = q_bh . kv[slot_bj] * sm_scale * k_scale;   cap * tanh(s / cap) where there is a cap;
            * log2(L_b - 1) / log2(xai_len) where L_b - 1 > xai_len > 0
    out_bh = v_scale * sum_j exp(s_bhj) kv[slot_bj, :512] / (sum_j exp(s_bhj) + exp(sink_h));   0 where L_b = 0
    lse_bh = log(sum_j exp(s_bhj) + exp(sink_h));   -inf where L_b = 0

Every row of the cache is read once per tile of query heads. An 8-bit row is read as 288 pairs of bytes: one copy in
shared memory serves both products, and each register of pairs becomes one operand of even and one of odd values, both
float16 and exact. q and the probabilities stay 16-bit, so the error does not grow as attention sharpens. A float32 q
becomes float16 beside an 8-bit cache and the sum of two operands beside a 16-bit one, inside the kernel.

A cache may also be read by pages, `mla_decode_paged`. Callers who read the splits: `mla_patch.kernels.decode.splits`.

The keys of all requests, in tiles, are one line of work that is cut into equal pieces, one per program; a program finds
its requests on the device, so a captured graph stays right when lengths change. A request that one program has to
itself is written at once; the others leave at most two partials per program, which a second kernel merges: the programs
that shared a long request share the work of merging it, too.

On sm_90, calls with 17 heads and more, 16-byte rows and no float32 go to the Gluon kernel of
`mla_patch.kernels.decode.sm90`.
"""

from __future__ import annotations

from mla_patch.kernels.decode.cases import warmup
from mla_patch.kernels.decode.config import decode_config, merge_config
from mla_patch.kernels.decode.launch import Query, mla_decode, mla_decode_paged
from mla_patch.kernels.decode.reference import mla_decode_ref

__all__ = [
    "Query", "decode_config", "merge_config", "mla_decode", "mla_decode_paged", "mla_decode_ref", "warmup",
]  # fmt: skip
