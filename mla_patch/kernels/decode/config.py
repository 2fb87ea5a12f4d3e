"""Launch numbers of MLA decode by architecture and shape, and the grids that follow from them.

Kept out of the launchers so that a test can pin them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mla_patch.compat.triton import HAS_PDL
from mla_patch.kernels.common.launch import INTERPRETED

SM90_MIN_HEADS = 17  # the portable kernel is the faster one on sm_90 below so many heads

# KIND: how a cache's bytes become operands. E4M3_BITS is for a chip that has no instruction for it.
DIRECT, E4M3, E4M3_BITS, E5M2 = 0, 1, 2, 3
EIGHT_BIT_KINDS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}


def decode_config(heads: int, eight_bit: bool, capability: tuple[int, int], interpret: bool = False) -> dict[str, int]:
    """Launch numbers by architecture and shape class; ``PER_SM`` programs fit on a multiprocessor."""
    if interpret:  # few programs, and small tiles that tests can fill
        return {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 1, "PER_SM": 3, "num_warps": 4}
    if capability == (9, 0) and not eight_bit and heads > 16:
        # an 8-bit cache's conversion costs more than reading it half as often gains
        return {"BLOCK_H": 32, "BLOCK_N": 64, "STAGES": 5, "PER_SM": 1, "num_warps": 8}
    if eight_bit:
        # two pairs of buffers and q are 95 KiB: two programs where there are 227, one elsewhere
        per_sm = 2 if capability in ((9, 0), (10, 0), (10, 3)) else 1
        return {"BLOCK_H": 16, "BLOCK_N": 64, "STAGES": 5, "PER_SM": per_sm, "num_warps": 4}
    if capability == (9, 0):
        # With more than 16 requests ptxas takes 182 to 188 registers by itself, by schedules whose times differ by 20%.
        # Allowed 255, it takes all of them, by the fastest schedule.
        return {"BLOCK_H": 16, "BLOCK_N": 64, "STAGES": 5, "PER_SM": 1, "num_warps": 4, "maxnreg": 255}
    if capability[0] in (9, 10):
        return {"BLOCK_H": 16, "BLOCK_N": 64, "STAGES": 5, "PER_SM": 1, "num_warps": 4}
    return {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 5, "PER_SM": 1, "num_warps": 4}


def launch_numbers(heads: int, kind: int, capability: tuple[int, int], float32: bool) -> dict[str, int]:
    """Launch numbers of `decode_config`; a float32 q over a 16-bit cache takes twice the shared memory."""
    numbers = decode_config(heads, kind != DIRECT, capability, INTERPRETED)
    if float32 and kind == DIRECT:
        numbers["BLOCK_N"] //= 2
    return numbers


def kinds_on(capability: tuple[int, int]) -> tuple[int, ...]:
    """The ways to read a cache on a chip: as it is, e4m3, e5m2. sm_89 was the first with an instruction for e4m3."""
    return (DIRECT, E4M3 if capability >= (8, 9) else E4M3_BITS, E5M2)


def merge_config(batch: int, after_sm90: bool = False, interpret: bool = False) -> dict[str, int]:
    """Launch numbers of the merge; ``after_sm90``: of what `decode_sm90` left. Few requests have many partials each;
    among many requests, few have any."""
    if interpret and batch <= 32:  # programs run one after the other there, and each costs the same
        return {"SLICES": 2, "BLOCK_S": 16, "num_warps": 1}
    if batch == 1 and after_sm90:
        return {"SLICES": 16, "BLOCK_S": 32, "num_warps": 1}
    if batch == 1:
        return {"SLICES": 16, "BLOCK_S": 128, "num_warps": 4}
    if batch <= 8 and not after_sm90:
        return {"SLICES": 8, "BLOCK_S": 64, "num_warps": 2}
    if batch <= 32:
        return {"SLICES": 4, "BLOCK_S": 16, "num_warps": 1}
    return {"SLICES": 0, "BLOCK_S": 64, "num_warps": 1}


class Plan(NamedTuple):
    """Both launches of a call, but for its tensors."""

    programs: int  # pieces that the work is cut into
    grid: tuple[int, int]
    numbers: dict[str, Any]  # constants and options of the kernel
    merge_grid: tuple[int, int]
    merge_numbers: dict[str, Any]


def launch_plan(
    work: tuple[int, int, int, bool, tuple[int, int], int, int | None],
    variant: tuple[bool, bool, int],
    config: dict[str, int] | None,
) -> Plan:
    """How many programs a call gets, and the grids and numbers of both launches.

    ``work``: heads, requests, how the cache is read, whether q is float32, the chip's capability and multiprocessors,
    and the key of `decode_sm90` where that kernel serves. ``variant``: whether scores are capped, whether there is a
    temperature, and the page size. ``config`` replaces the numbers of `decode_config`.
    """
    heads, batch, kind, float32, capability, multiprocessors, sm90_key = work
    capped, xai, page_size = variant
    numbers: dict[str, Any]
    if sm90_key is not None:
        numbers, tiles, per_sm = {"E5M2": kind == E5M2, "KEY": sm90_key, "num_warps": 4}, -(-heads // 64), 1
    else:
        numbers = dict(config or launch_numbers(heads, kind, capability, float32))
        tiles, per_sm = -(-heads // numbers["BLOCK_H"]), numbers.pop("PER_SM")
        rows = next((rows for rows in (16, 64, 256, 1024, 4096) if rows >= batch), 1 << (batch - 1).bit_length())
        # measured: with few requests the merge's early programs only stand in the way
        numbers |= {"KIND": kind, "ROWS": rows, "PDL": capability >= (9, 0) and HAS_PDL and batch >= 64}
    numbers |= {"CAPPED": capped, "XAI": xai, "PAGE_SIZE": page_size}
    programs = max(1, per_sm * multiprocessors // tiles)
    merge: dict[str, Any] = merge_config(batch, sm90_key is not None, INTERPRETED)
    pdl = numbers.get("PDL", False)
    merge |= {"PARTIALS": max(1 << (programs - 1).bit_length(), 2), "PDL": pdl} | ({"launch_pdl": True} if pdl else {})
    return Plan(programs, (programs, tiles), numbers, (batch * merge["SLICES"] or programs, heads), merge)
