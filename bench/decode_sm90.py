"""An experiment, not part of the package: MLA decode for 64 and 128 heads in Gluon, as far as it was brought.

64 heads x 64 keys a tile on two warp groups: q stays in shared memory, K is double buffered there, each warp group
makes half of the scores and half of the output's columns. bf16 rows come by cp.async; e4m3 rows through registers,
where they become float16 while the other product runs. The schedule is that of `mla_patch.kernels.decode`: tiles of all
requests in equal pieces, partials merged by a second kernel. docs/performance.md has its figures and what is left. An
arm file for the peers' measuring script; needs sm_90 and Triton 3.6. No sinks, no logit cap, no temperature.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _ids(ids, o, length):
    return gl.load(ids + gl.minimum(o, length - 1)).to(gl.int64)


@gluon.jit
def gdec(
    q,
    kv,
    out,
    indptr,
    token_ids,
    part_o,
    part_l,
    B,
    H,
    scale,
    sqb,
    sqh,
    skv,
    sob,
    soh,
    ROWS: gl.constexpr,
    FP8: gl.constexpr,
):
    BH: gl.constexpr = 64
    BN: gl.constexpr = 64
    ty: gl.constexpr = gl.float16 if FP8 else gl.bfloat16
    RL: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    # loads: bf16 4 rows x 128 bytes a warp; fp8 8 rows x 64 bytes
    LD: gl.constexpr = (
        gl.BlockedLayout([1, 16], [8, 4], [8, 1], [1, 0]) if FP8 else gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    )
    LQ: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    MS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    MO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    SH: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    qs = gl.allocate_shared_memory(ty, [BH, 512], SH)
    qrs = gl.allocate_shared_memory(ty, [BH, 64], SH)
    ks = gl.allocate_shared_memory(ty, [2, BN, 512], SH)
    krs = gl.allocate_shared_memory(ty, [2, BN, 64], SH)
    ps = gl.allocate_shared_memory(ty, [BH, BN], SH)

    pid = gl.program_id(0)
    G = gl.num_programs(0)
    lane = gl.arange(0, ROWS, layout=RL)
    lo = gl.load(indptr + lane, mask=lane < B, other=0)
    hi = gl.load(indptr + 1 + lane, mask=lane < B, other=0)
    total = gl.sum((hi - lo + BN - 1) // BN, 0)
    per = (total + G - 1) // G
    start = pid * per
    stop = gl.minimum(start + per, total)
    pos = start
    d = gl.arange(0, 512, layout=gl.SliceLayout(0, LD))
    r = gl.arange(0, 64, layout=gl.SliceLayout(0, LD))
    n = gl.arange(0, BN, layout=gl.SliceLayout(1, LD))
    ns = gl.arange(0, BN, layout=gl.SliceLayout(0, MS))
    while pos < stop:
        lo = gl.load(indptr + lane, mask=lane < B, other=0)
        hi = gl.load(indptr + 1 + lane, mask=lane < B, other=0)
        tiles = (hi - lo + BN - 1) // BN
        ends = gl.associative_scan(tiles, 0, _add)
        b = gl.sum(((ends <= pos) & (lane < B)).to(gl.int32), 0)
        row_end = gl.sum(gl.where(lane == b, ends, 0), 0)
        first = gl.load(indptr + b)
        length = gl.load(indptr + b + 1) - first
        row_tiles = (length + BN - 1) // BN
        count = gl.minimum(stop, row_end) - pos
        base = (pos - (row_end - row_tiles)) * BN
        ids = token_ids + first

        t = _ids(ids, base + n, length)
        row = kv + t[:, None] * skv
        if FP8:
            x = gl.load(row + d[None, :])
            xr = gl.load(row + 512 + r[None, :])
        else:
            async_copy.async_copy_global_to_shared(ks.index(0), row + d[None, :])
            async_copy.async_copy_global_to_shared(krs.index(0), row + 512 + r[None, :])
            async_copy.commit_group()
        hq = gl.program_id(1) * BH + gl.arange(0, BH, layout=gl.SliceLayout(1, LQ))
        qb = q + b.to(gl.int64) * sqb + hq[:, None] * sqh
        dq = gl.arange(0, 512, layout=gl.SliceLayout(0, LQ))
        rq = gl.arange(0, 64, layout=gl.SliceLayout(0, LQ))
        qs.store(gl.load(qb + dq[None, :], mask=(hq < H)[:, None], other=0.0).to(ty))
        qrs.store(gl.load(qb + 512 + rq[None, :], mask=(hq < H)[:, None], other=0.0).to(ty))
        if FP8:
            ks.index(0).store(x.to(ty))
            krs.index(0).store(xr.to(ty))
            fence_async_shared()
        t = _ids(ids, base + BN + n, length)

        m = gl.full([BH], -float("inf"), gl.float32, layout=gl.SliceLayout(1, MS))
        lt = gl.zeros([BH, BN], gl.float32, layout=MS)
        acc = gl.zeros([BH, 512], gl.float32, layout=MO)
        for i in range(count):
            cur = i % 2
            # tile i + 1 (past the end: a repeat of the last key, harmless)
            row = kv + t[:, None] * skv
            if FP8:
                x = gl.load(row + d[None, :])
                xr = gl.load(row + 512 + r[None, :])
            else:
                async_copy.wait_group(0)
                fence_async_shared()
                gl.thread_barrier()
                async_copy.async_copy_global_to_shared(ks.index(1 - cur), row + d[None, :])
                async_copy.async_copy_global_to_shared(krs.index(1 - cur), row + 512 + r[None, :])
                async_copy.commit_group()
            t = _ids(ids, base + (i + 2) * BN + n, length)
            s = gl.zeros([BH, BN], gl.float32, layout=MS)
            s = warpgroup_mma(qs, ks.index(cur).permute([1, 0]), s, use_acc=False, is_async=True)
            s = warpgroup_mma(qrs, krs.index(cur).permute([1, 0]), s, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            s = gl.where((base + i * BN + ns < length)[None, :], s * scale, -float("inf"))
            mn = gl.maximum(m, gl.max(s, 1))
            al = gl.exp2(m - mn)
            p = gl.exp2(s - mn[:, None])
            lt = lt * al[:, None] + p
            m = mn
            ps.store(p.to(ty))
            ao = gl.convert_layout(al, gl.SliceLayout(1, MO))
            acc = acc * ao[:, None]
            fence_async_shared()
            acc = warpgroup_mma(ps, ks.index(cur), acc, is_async=True)
            if FP8:
                ks.index(1 - cur).store(x.to(ty))
                krs.index(1 - cur).store(xr.to(ty))
                fence_async_shared()
            acc = warpgroup_mma_wait(0, deps=[acc])
        if not FP8:
            async_copy.wait_group(0)
        total_weight = gl.sum(lt, 1)
        lse = m + gl.log2(total_weight)
        acc = acc * gl.convert_layout(1.0 / total_weight, gl.SliceLayout(1, MO))[:, None]
        ho = gl.program_id(1) * BH + gl.arange(0, BH, layout=gl.SliceLayout(1, MO))
        do = gl.arange(0, 512, layout=gl.SliceLayout(0, MO))
        if count == row_tiles:
            ob = out + b.to(gl.int64) * sob + ho[:, None] * soh
            gl.store(ob + do[None, :], acc.to(gl.bfloat16), mask=(ho < H)[:, None])
        else:
            slot = (2 * pid + (pos > start).to(gl.int32)).to(gl.int64)
            op = part_o + (slot * H + ho[:, None]) * 512
            gl.store(op + do[None, :], acc, mask=(ho < H)[:, None])
            hs = gl.program_id(1) * BH + gl.arange(0, BH, layout=gl.SliceLayout(1, MS))
            gl.store(part_l + slot * H + hs, lse, mask=hs < H)
        pos += count


@triton.jit
def merge2(
    out,
    indptr,
    part_o,
    part_l,
    B,
    H,
    G,
    sob,
    soh,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    SMAX: tl.constexpr,
):
    b = tl.program_id(0)
    h = tl.program_id(1)
    dblk = tl.program_id(2)
    lane = tl.arange(0, ROWS)
    lo = tl.load(indptr + lane, mask=lane < B, other=0)
    hi = tl.load(indptr + 1 + lane, mask=lane < B, other=0)
    tiles = (hi - lo + BN - 1) // BN
    total = tl.sum(tiles, 0)
    per = (total + G - 1) // G
    begin = tl.sum(tl.where(lane < b, tiles, 0), 0)
    mine = tl.sum(tl.where(lane == b, tiles, 0), 0)
    d = dblk * BD + tl.arange(0, BD)
    if mine == 0:
        tl.store(out + b.to(tl.int64) * sob + h * soh + d, tl.zeros([BD], out.dtype.element_ty))
    else:
        c0 = begin // per
        c1 = (begin + mine - 1) // per
        if c1 > c0:
            cc = c0 + tl.arange(0, SMAX)
            slot = (2 * cc + (cc * per < begin).to(tl.int32)).to(tl.int64)
            lse = tl.load(part_l + slot * H + h, mask=cc <= c1, other=-float("inf"))
            m = tl.max(lse, 0)
            weight = tl.sum(tl.exp2(lse - m), 0)
            acc = tl.zeros([BD], tl.float32)
            for c in range(c0, c1 + 1, BS):
                ci = c + tl.arange(0, BS)
                slot2 = (2 * ci + (ci * per < begin).to(tl.int32)).to(tl.int64)
                ok = ci <= c1
                w = tl.exp2(tl.load(part_l + slot2 * H + h, mask=ok, other=-float("inf")) - m)
                po = tl.load(part_o + (slot2 * H + h)[:, None] * 512 + d[None, :], mask=ok[:, None], other=0.0)
                acc += tl.sum(po * w[:, None], 0)
            tl.store(out + b.to(tl.int64) * sob + h * soh + d, (acc / weight).to(out.dtype.element_ty))


def decode(case):
    """(call, out) as the measuring script wants them; for a tile of 64 heads and more."""
    batch, heads = case.B, case.H
    kv = case.kv.view(-1, 576)
    tiles = triton.cdiv(heads, 64)
    programs = max(1, torch.cuda.get_device_properties(0).multi_processor_count // tiles)
    out = torch.full((batch, heads, 512), float("nan"), device=case.q.device, dtype=torch.bfloat16)
    partial = torch.empty(2 * programs, heads, 512, device=case.q.device)
    partial_lse = torch.empty(2 * programs, heads, device=case.q.device)
    rows = max(triton.next_power_of_2(batch), 16)
    block_d = 512
    while block_d > 32 and batch * heads * 512 // block_d < 512:
        block_d //= 2
    block_s = max(4, 4096 // block_d) if batch < 32 else 4 if batch > 64 else 8

    def call():
        gdec[(programs, tiles)](
            case.q, kv, out, case.indptr, case.token_ids, partial, partial_lse, batch, heads,
            case.sm_scale * 1.4426950408889634, case.q.stride(0), case.q.stride(1), kv.stride(0),
            out.stride(0), out.stride(1), ROWS=rows, FP8=kv.element_size() == 1, num_warps=8,
        )  # fmt: skip
        merge2[(batch, heads, 512 // block_d)](
            out, case.indptr, partial, partial_lse, batch, heads, programs, out.stride(0), out.stride(1),
            ROWS=rows, BN=64, BD=block_d, BS=block_s, SMAX=triton.next_power_of_2(programs), num_warps=4,
        )  # fmt: skip

    return call, out
