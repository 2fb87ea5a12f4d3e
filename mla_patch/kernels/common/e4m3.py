"""Device helpers that decode e4m3, the 8-bit float of 4 exponent and 3 mantissa bits. All are exact, and NaN stays NaN.

    by integers        any chip, and the interpreter, which knows no assembler
    by an instruction  sm_89 and newer: cvt.rn.f16x2.e4m3x2 makes two values at once

Moved into a float16's place, 7 bits to the left, the bits of an e4m3 value stand for 2**-8 of it: float16 has one
exponent bit more, and another bias. Subnormal numbers fit, so that one multiplication by 256 is all there is to do.
The only code that does not follow is 0x7f, which is NaN in e4m3 and 480 by this rule.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mla_patch.kernels.common.launch import INTERPRETED

_PLAIN = tl.constexpr(INTERPRETED)  # the interpreter knows no assembler


@triton.jit
def e4m3_to_f16(byte):
    """e4m3 codes in an integer's low byte, its other bits 0 -> float16."""
    magnitude = byte & 0x7F
    value = (((byte & 0x80) << 8) | (magnitude << 7)).to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def e4m3_to_f32(byte):
    """The same -> float32, for callers who go on in float32."""
    magnitude = byte & 0x7F
    half = (((byte & 0x80) << 8) | (magnitude << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where(magnitude == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def unpack_e4m3x2(x, BITS: tl.constexpr):
    """int16 pairs of e4m3 codes -> (even, odd) float16 values. BITS: for a chip without the instruction."""
    if _PLAIN:
        even, odd = e4m3_to_f16(x & 0xFF), e4m3_to_f16((x >> 8) & 0xFF)
    elif BITS:
        # Two values at a time, as in `e4m3_to_f16`. Adding one to a magnitude of 0x7f carries into its sign's place;
        # prmt spreads that bit over the half, which makes the NaN.
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, s, m, n, c;
            mov.b32 c, 0x5c005c00;
            shl.b32 t, $2, 8;
            and.b32 s, t, 0x80008000;
            and.b32 m, t, 0x7f007f00;
            add.u32 n, m, 0x01000100;
            prmt.b32 n, n, 0, 0xbb99;
            and.b32 n, n, 0x7e007e00;
            shr.u32 m, m, 1;
            mul.f16x2 m, m, c;
            or.b32 m, m, n;
            or.b32 $0, m, s;
            and.b32 s, $2, 0x80008000;
            and.b32 m, $2, 0x7f007f00;
            add.u32 n, m, 0x01000100;
            prmt.b32 n, n, 0, 0xbb99;
            and.b32 n, n, 0x7e007e00;
            shr.u32 m, m, 1;
            mul.f16x2 m, m, c;
            or.b32 m, m, n;
            or.b32 $1, m, s;
            }""",
            "=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            .reg .b16 a, b;
            prmt.b32 t, $2, 0, 0x3120;
            mov.b32 {a, b}, t;
            cvt.rn.f16x2.e4m3x2 $0, a;
            cvt.rn.f16x2.e4m3x2 $1, b;
            }""",
            "=r,=r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return even, odd


@triton.jit
def unpack_scaled_e4m3x2(pairs, ratio, BITS: tl.constexpr):
    """int16 pairs of e4m3 codes times a float16 of at most 1, ``ratio`` -> float16 values, in order."""
    if BITS or _PLAIN:
        even, odd = e4m3_to_f16(pairs & 0xFF) * ratio, e4m3_to_f16((pairs >> 8) & 0xFF) * ratio
    else:
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, r;
            .reg .b16 a, b;
            prmt.b32 t, $2, 0, 0x3120;
            mov.b32 {a, b}, t;
            cvt.rn.f16x2.e4m3x2 t, a;
            mul.f16x2 $0, t, $3;
            cvt.rn.f16x2.e4m3x2 r, b;
            mul.f16x2 $1, r, $3;
            }""",
            "=&r,=r,r,r",
            [pairs, ratio],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return tl.interleave(even, odd)


@triton.jit
def scale_e4m3_to_bf16(code, scale):
    """e4m3 codes times float32 -> bits of bfloat16, by instructions of sm_89 and newer: a third of the work.

    Four bytes at a time, hence four scales.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 a, b, l, u;
        .reg .b32 h;
        .reg .f32 f, g;
        mov.b32 {a, b}, $2;
        cvt.rn.f16x2.e4m3x2 h, a;
        mov.b32 {l, u}, h;
        cvt.f32.f16 f, l;
        cvt.f32.f16 g, u;
        mul.f32 f, f, $3;
        mul.f32 g, g, $4;
        cvt.rn.bf16x2.f32 $0, g, f;
        cvt.rn.f16x2.e4m3x2 h, b;
        mov.b32 {l, u}, h;
        cvt.f32.f16 f, l;
        cvt.f32.f16 g, u;
        mul.f32 f, f, $5;
        mul.f32 g, g, $6;
        cvt.rn.bf16x2.f32 $1, g, f;
        }""",
        "=&r,=&r,r,r,r,r,r",
        [code, scale],
        dtype=tl.int16,
        is_pure=True,
        pack=4,
    )
