"""A stand-in for the package tokenspeed_mla: its documented interface in float64, with every argument checked.

The signatures are those of 0.1.1, which 0.1.8 and 2.0.4 extend. ``calls`` is what was asked for.
"""

from itertools import pairwise

import torch

MULTIPROCESSORS = 148
calls: list[dict] = []


def get_num_sm(device: torch.device) -> int:
    assert isinstance(device, torch.device)
    return MULTIPROCESSORS


def workspace_bytes(batch: int, q_len: int, heads: int) -> int:
    """What the widest of the three releases asks for: whole tiles of 128 rows, or heads x tokens."""
    splits = min(64, max(1, MULTIPROCESSORS // batch))
    rows = max(heads * q_len, 128 * -(-heads * q_len // 128))
    return 0 if splits == 1 else batch * splits * rows * 513 * 4


def _is(tensor: torch.Tensor, shape: tuple, dtype: torch.dtype) -> None:
    assert tensor.dtype == dtype, f"{tensor.dtype}, not {dtype}"
    assert tuple(tensor.shape) == tuple(shape), f"{tuple(tensor.shape)}, not {tuple(shape)}"
    assert tensor.is_contiguous(), f"strides {tensor.stride()}"


def tokenspeed_mla_decode(
    query, kv_cache, workspace_buffer, kv_lora_rank, qk_rope_head_dim, block_tables, seq_lens, max_seq_len,
    softmax_scale, output_scale=1.0, out=None, is_var_seq=True, causal_mask=True, enable_pdl=False,
):  # fmt: skip
    batch, q_len, heads, _ = query.shape
    assert (kv_lora_rank, qk_rope_head_dim, out, is_var_seq, causal_mask) == (512, 64, None, True, True)
    assert type(max_seq_len) is int and type(softmax_scale) is float and type(output_scale) is float
    assert type(enable_pdl) is bool and not enable_pdl  # no GPU here
    _is(query, (batch, q_len, heads, 576), torch.float8_e4m3fn)
    if kv_cache.dim() == 4:
        kv_cache = kv_cache.squeeze(1)
    pages, page, _ = kv_cache.shape
    assert page in (32, 64)
    _is(kv_cache, (pages, page, 576), torch.float8_e4m3fn)
    _is(seq_lens, (batch,), torch.int32)
    _is(block_tables, (batch, block_tables.shape[1]), torch.int32)
    lens = seq_lens.tolist()
    assert max_seq_len > 0 and max(lens) <= max_seq_len
    assert block_tables.shape[1] * page >= max(lens) and block_tables.shape[1] * page % 128 == 0
    need = workspace_bytes(batch, q_len, heads)
    assert workspace_buffer.dtype == torch.int8 and workspace_buffer.dim() == 1 and workspace_buffer.numel() >= need
    workspace_buffer[:need].fill_(77)  # it is scratch
    calls.append({"call": "decode", "batch": batch, "q_len": q_len, "heads": heads, "scale": softmax_scale})
    out = torch.zeros(batch, q_len, heads, 512, dtype=torch.float64)
    for b, length in enumerate(lens):
        table = block_tables[b, : -(-length // page)].long()
        assert bool((table >= 0).all()) and bool((table < pages).all()), table
        rows = kv_cache[table].double().view(-1, 576)[:length]
        for i in range(q_len):
            seen = rows[: max(0, length - q_len + 1 + i)]
            if len(seen):
                weights = (query[b, i].double() @ seen.T * softmax_scale).softmax(-1)
                out[b, i] = weights @ seen[:, :512] * output_scale
    return out.bfloat16()


def tokenspeed_mla_prefill(
    query, key, value, seq_lens, cum_seq_lens, max_seq_len, batch_size, softmax_scale, is_causal=True, return_lse=False,
    cum_seq_lens_q=None, max_seq_len_q=None, enable_pdl=False,
):  # fmt: skip
    assert all(type(n) is int for n in (max_seq_len, batch_size, max_seq_len_q)) and type(softmax_scale) is float
    assert all(type(flag) is bool for flag in (is_causal, return_lse, enable_pdl)) and not enable_pdl
    heads = query.shape[1]
    variant = (torch.float8_e4m3fn, 192, 128, is_causal, return_lse, enable_pdl)
    assert variant in compiled, f"{variant} would be compiled while serving: minutes"
    for tensor in (cum_seq_lens, cum_seq_lens_q):
        _is(tensor, (batch_size + 1,), torch.int32)
    _is(seq_lens, (batch_size,), torch.int32)
    q_ends, k_ends = cum_seq_lens_q.tolist(), cum_seq_lens.tolist()
    assert q_ends[0] == k_ends[0] == 0
    _is(query, (q_ends[-1], heads, 192), torch.float8_e4m3fn)
    _is(key, (k_ends[-1], heads, 192), torch.float8_e4m3fn)
    _is(value, (k_ends[-1], heads, 128), torch.float8_e4m3fn)
    assert seq_lens.tolist() == [b - a for a, b in pairwise(k_ends)]
    assert max(seq_lens.tolist()) <= max_seq_len
    assert max(b - a for a, b in pairwise(q_ends)) <= max_seq_len_q
    calls.append({"call": "prefill", "batch": batch_size, "causal": is_causal, "lse": return_lse})
    out = torch.zeros(q_ends[-1], heads, 128, dtype=torch.float64)
    lse = torch.full((q_ends[-1], heads), -torch.inf, dtype=torch.float64)
    for b in range(batch_size):
        q = query[q_ends[b] : q_ends[b + 1]].double()
        k, v = (one[k_ends[b] : k_ends[b + 1]].double() for one in (key, value))
        if not (len(q) and len(k)):
            continue
        scores = torch.einsum("ihd,jhd->ihj", q, k) * softmax_scale
        if is_causal:  # the last query token sees the last key
            above = torch.ones(len(q), len(k)).triu(len(k) - len(q) + 1).bool()
            scores.masked_fill_(above[:, None], -torch.inf)
        out[q_ends[b] : q_ends[b + 1]] = torch.einsum("ihj,jhd->ihd", scores.softmax(-1), v)
        lse[q_ends[b] : q_ends[b + 1]] = scores.logsumexp(-1)
    return (out.bfloat16(), lse.float()) if return_lse else out.bfloat16()


compiled: set[tuple] = set()


def warmup_compile_prefill(q_dtype=torch.float8_e4m3fn, d_qk=192, d_v=128, enable_pdl=False):
    """The two variants that the package's own warms, which return the log-sum-exp."""
    calls.append({"call": "warmup"})
    compiled.update((q_dtype, d_qk, d_v, causal, True, enable_pdl) for causal in (True, False))
