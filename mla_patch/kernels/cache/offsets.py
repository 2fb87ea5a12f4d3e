"""Where the parts of a token lie in a page, in bytes, as constants for device code: `layouts` draws the two formats.

Kernels read them through the module, as ``offsets.V4_ROPE``. Of a constant that it reaches through a module, Triton
compares no value at a launch, which would cost time, nor does it compile anew when the value changes. Neither is
needed: the formats are fixed.
"""

from __future__ import annotations

import triton.language as tl

from mla_patch.kernels.cache.layouts import V4, V32
from mla_patch.kernels.common.constants import V4_PAGE_MULTIPLE

V32_TOKEN = tl.constexpr(V32.bytes)  # 656: from one token to the next
V32_SCALES = tl.constexpr(V32.nope)  # 512: four float32 behind the e4m3 values
V32_ROPE = tl.constexpr(V32.nope + 4 * V32.tiles)  # 528: bfloat16, behind the scales

V4_TOKEN = tl.constexpr(V4_PAGE_MULTIPLE)  # 576: from one token to the next, without its scales
V4_ROPE = tl.constexpr(V4.nope)  # 448: bfloat16, behind the e4m3 values
V4_SCALES = tl.constexpr(8)  # bytes of a token's scales, which lie behind the last token of the page
