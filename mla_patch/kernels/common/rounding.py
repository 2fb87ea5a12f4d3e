"""Device helpers that make Triton's interpreter compute what a chip computes. On a chip they are plain conversions."""

from __future__ import annotations

import triton
import triton.language as tl

from mla_patch.kernels.common.launch import INTERPRETED

_PLAIN = tl.constexpr(INTERPRETED)


@triton.jit
def round_bf16(x):
    """float32 -> the bits of the nearest bfloat16, ties to even; by integers, since interpreters round otherwise."""
    bits = x.to(tl.int32, bitcast=True)
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, up).to(tl.int16)


@triton.jit
def rounded(x, kind: tl.constexpr):
    """float32 in another type, rounded to the nearest, where an interpreter would cut bfloat16 off."""
    if _PLAIN and kind == tl.bfloat16:
        return round_bf16(x).to(tl.bfloat16, bitcast=True)
    return x.to(kind)


@triton.jit
def operand(x):
    """What an interpreter can multiply: it takes bfloat16's bits for integers."""
    if _PLAIN and x.dtype == tl.bfloat16:
        return x.to(tl.float32)
    return x
