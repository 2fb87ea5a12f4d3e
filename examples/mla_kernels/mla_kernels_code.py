import torch

from mla_patch.kernels.decode import mla_decode_paged


def decode(call):
    """Decode every query token as a request of its own, with as many keys as its position allows."""
    batch, q_len, heads, _ = call.query.shape
    q = call.query.to(torch.float16).view(batch * q_len, heads, 576)  # float16 represents every e4m3 number exactly
    ahead = torch.arange(q_len - 1, -1, -1, dtype=torch.int32, device=q.device)
    lens = (call.seq_lens[:, None] - ahead).clamp(min=0).view(-1)
    table = call.block_tables.repeat_interleave(q_len, dim=0)
    out = q.new_empty(batch * q_len, heads, 512)
    mla_decode_paged(q, call.kv_cache, out, table, lens, sm_scale=call.softmax_scale)
    return out.view(batch, q_len, heads, 512)


def prefill(call):
    """Attention request by request in float32. It waits for the GPU, which a prefill may do."""
    out = call.q.new_zeros(*call.q.shape[:2], call.v.shape[2], dtype=torch.float32)
    lse = out.new_full(call.q.shape[:2], -torch.inf)
    ends, kv_ends = call.cum_seq_lens_q.tolist(), call.cum_seq_lens_kv.tolist()
    for b in range(call.batch_size):
        rows, keys = slice(ends[b], ends[b + 1]), slice(kv_ends[b], kv_ends[b + 1])
        q, k, v = call.q[rows].float(), call.k[keys].float(), call.v[keys].float()
        if len(q) and len(k):
            scores = torch.einsum("ihd,jhd->hij", q, k) * call.softmax_scale
            if call.is_causal:  # the last query token sees the last key
                seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
                scores = scores.masked_fill(~seen, -torch.inf)
            lse[rows] = scores.logsumexp(-1).T
            out[rows] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
    out = out.to(torch.bfloat16)
    return (out, lse) if call.return_lse else out
