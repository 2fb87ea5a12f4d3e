"""Sparse MLA prefill: every query attends to the rows of a 16-bit workspace that its own list of indices names.

    q               [Sq, H, 576 or 512]    bfloat16 or float16; any strides, but the last dimension contiguous; 1 to
                    128 heads
    kv              [Skv, 1, same width]    dtype of q; rows may lie apart
    indices         [Sq, 1, topk]    int32, rows of kv in any order; repeats count again, and an index outside
                    [0, Skv) is no key
    topk_length     [Sq]    int32, int64 or None: how many indices of a query count
    attn_sink       [H]    float or None
    out             [Sq, H, 512]    dtype of q
    max_logits      [Sq, H]    float32, max_j s_j
    lse             [Sq, H]    float32, log sum_j exp(s_j)

    s_j = sm_scale * q . kv_j        out = sum_j exp(s_j) kv_j[:512] / (sum_j exp(s_j) + exp(sink))

Both statistics leave the sink out. They are natural, or to the base 2. A query without a key has out 0, max_logits -inf
and lse +inf, whatever the sink.

There is one program for each query and tile of heads. It gathers keys a block at a time. On sm_90,
`mla_patch.kernels.sparse.sm90` serves more than 16 heads.
"""

from __future__ import annotations

import torch

from mla_patch.compat import gpu
from mla_patch.kernels.common.checks import check_can_launch, check_device, check_sinks
from mla_patch.kernels.common.constants import LATENT, LN2, WIDTH
from mla_patch.kernels.common.launch import INTERPRETED, can_launch, chip_of, on_device_of, warming_up
from mla_patch.kernels.sparse.config import sparse_prefill_config
from mla_patch.kernels.sparse.launch import NO_KEYS, Keys, Results, check_heads, check_lengths, launch_sm90, takes_sm90
from mla_patch.kernels.sparse.triton import sparse_prefill_kernel


def mla_sparse_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_log2: bool = False,
    *,
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend from every query to the rows that its indices name; see the module. Returns ``out, max_logits, lse``.

    ``return_log2`` gives both statistics to the base 2. It launches nothing if there are no queries, and never waits
    for the device. Results other than a given ``out`` come from torch's allocator at every call, so that a captured
    graph has them in its pool. ``config`` replaces `sparse_prefill_config`'s numbers.

    Raises:
        ValueError: a tensor has the wrong shape, type, device or layout. Values in tensors are not looked at.
    """
    _check(q, kv, indices, d_v, attn_sink, topk_length, out)
    with on_device_of(q):
        return _launch(q, kv, indices, sm_scale, attn_sink, topk_length, out, return_log2, config)


def _launch(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    sinks: torch.Tensor | None,
    lens: torch.Tensor | None,
    out: torch.Tensor | None,
    return_log2: bool,
    config: dict[str, int] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch over tensors that have been checked, on the current device."""
    queries, heads, width = q.shape
    if out is None:
        out = torch.empty(queries, heads, LATENT, dtype=q.dtype, device=q.device)
    max_logits = torch.empty(queries, heads, dtype=torch.float32, device=q.device)
    lse = torch.empty_like(max_logits)
    if queries == 0:
        return out, max_logits, lse
    chip = chip_of(q)
    log_unit = 1.0 if return_log2 else LN2
    # rows are copied 16 bytes at a time, and Triton wants to know of 16 elements
    aligned = kv.stride(0) % 16 == 0 and kv.data_ptr() % 16 == 0
    if aligned and config is None and takes_sm90(q, out, sm_scale, chip.capability):
        keys = Keys(kv, stride=kv.stride(0), slots=kv.shape[0], indices=indices, lens=lens)
        results = Results(out, lse[..., None], lse, lse, splits=1)
        # each query as a request of one token
        launch_sm90(
            gpu.ensure_16b_rows(q)[:, None], keys, NO_KEYS, results, max_logits, sm_scale=sm_scale, log_unit=log_unit,
            sinks=sinks,
        )  # fmt: skip
        return out, max_logits, lse
    numbers = config or sparse_prefill_config(heads, chip.capability, INTERPRETED)
    sparse_prefill_kernel[(queries * -(-heads // numbers["BLOCK_H"]),)](
        q, kv, indices, lens, sinks, out, max_logits, lse, heads, indices.shape[2], kv.shape[0], float(sm_scale),
        log_unit, q.stride(0), q.stride(1), kv.stride(0), indices.stride(0), out.stride(0), out.stride(1),
        ROPE=width == WIDTH, **numbers,
    )  # fmt: skip
    return out, max_logits, lse


def _check(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    _check_q(q)
    queries, heads, width = q.shape
    if kv.dim() != 3 or kv.shape[1:] != (1, width) or (kv.stride(2) != 1 and kv.numel()):
        raise ValueError(f"kv: {_shape(kv)}, expected [Skv, 1, {width}], the last contiguous")
    if kv.dtype is not q.dtype:
        raise ValueError(f"kv: {kv.dtype}, expected {q.dtype} as q")
    if kv.shape[0] >= 2**31:
        raise ValueError(f"kv: {kv.shape[0]} rows, expected less than 2**31, which is all that int32 indices name")
    if indices.dtype is not torch.int32 or indices.dim() != 3 or indices.shape[:2] != (queries, 1):
        found = f"{indices.dtype}, shape {tuple(indices.shape)}"
        raise ValueError(f"indices: {found}, expected torch.int32, [{queries}, 1, topk]")
    if indices.shape[2] > 1 and indices.stride(2) != 1:
        raise ValueError(f"indices: stride {indices.stride(2)} in the last dimension, expected 1")
    if d_v != LATENT:
        raise ValueError(f"d_v: {d_v}, expected {LATENT}")
    check_sinks("attn_sink", attn_sink, heads, q)
    check_lengths("topk_length", topk_length, q)
    if out is not None:
        _check_out(out, q, q.dtype)
    check_device("kv", kv, q)
    check_device("indices", indices, q)


def _check_q(q: torch.Tensor) -> None:
    check_can_launch("q", q)
    if q.dim() != 3 or q.shape[2] not in (WIDTH, LATENT) or (q.stride(2) != 1 and q.numel()):
        raise ValueError(f"q: {_shape(q)}, expected [Sq, H, 576 or 512], the last contiguous")
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"q: {q.dtype}, expected torch.bfloat16 or torch.float16")
    check_heads(q.shape[1])


def _check_out(out: torch.Tensor, q: torch.Tensor, dtype: torch.dtype) -> None:
    queries, heads, _ = q.shape
    if out.shape != (queries, heads, LATENT) or (out.stride(2) != 1 and out.numel()):
        raise ValueError(f"out: {_shape(out)}, expected [{queries}, {heads}, 512], the last contiguous")
    if out.dtype is not dtype:
        raise ValueError(f"out: {out.dtype}, expected {dtype}")
    check_device("out", out, q)


def _shape(tensor: torch.Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"


def warmup(
    device: torch.device | str,
    heads: int,
    width: int = WIDTH,
    dtype: torch.dtype = torch.bfloat16,
    with_sinks: bool = False,
    with_lengths: bool = False,
) -> int:
    """Compile what `mla_sparse_prefill` can reach for queries of this shape and type. Returns how many kernels that
    took; 0 on a CPU.

    ``with_sinks``: with sinks and int32 lengths. ``with_lengths``: with lengths alone. The numbers of queries, rows and
    indices and the base of the statistics change nothing. It is a real launch over one key.
    """
    q = torch.zeros(1, heads, width, dtype=dtype, device=device)
    if not can_launch(q):
        return 0
    ids = torch.zeros(1, 1, 1, dtype=torch.int32, device=device)
    sink = torch.zeros(heads, device=device) if with_sinks else None
    lens = torch.ones(1, dtype=torch.int32, device=device) if with_sinks or with_lengths else None
    with warming_up() as compiled:
        mla_sparse_prefill(q, q[:, :1], ids, 1.0, attn_sink=sink, topk_length=lens)
    return compiled()
