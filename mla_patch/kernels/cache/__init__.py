"""Latent caches of fp8 tokens: their two formats, writing, reading back, and casts of pages to 16 bits.

layouts       the two formats, and caches as kernels address them
offsets       where a token's parts lie, as constants for device code
quantize      writes tokens
dequantize    reads tokens back
kv_cast       casts the pages of a plain fp8 cache that a batch names
"""
