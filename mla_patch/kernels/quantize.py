"""The documented import path of ``quantize``, which lives in ``mla_patch.kernels.cache.quantize``."""

from mla_patch.kernels.cache.quantize import quantize as quantize
from mla_patch.kernels.cache.quantize import quantize_ref as quantize_ref
