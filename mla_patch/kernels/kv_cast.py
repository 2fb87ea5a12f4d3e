"""A documented import path of what lives in ``mla_patch.kernels.cache.kv_cast``."""

from mla_patch.kernels.cache.kv_cast import cast_pages as cast_pages
from mla_patch.kernels.cache.kv_cast import cast_pages_ref as cast_pages_ref
