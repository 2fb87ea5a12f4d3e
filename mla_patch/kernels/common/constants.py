"""Sizes and numbers that several kernel families have in common, for code that runs on the host.

Device code spells them out. A kernel reads a module's global only as a `tl.constexpr`, and Triton compares each of
these with its value of before at every launch.
"""

from __future__ import annotations

import math

LATENT = 512  # latent values of a token: the first part of its key, and all of its value
ROPE = 64  # rotary values of a token, behind the latent ones
WIDTH = LATENT + ROPE  # values of a key

V32_TOKEN_BYTES = 656  # a token of DeepSeek V3.2's fp8 cache
V4_TOKEN_BYTES = 584  # a token of DeepSeek V4's, nominally
V4_PAGE_MULTIPLE = 576  # a page of V4's is padded to a multiple of so many bytes

LOG2_E = math.log2(math.e)
LN2 = math.log(2.0)
