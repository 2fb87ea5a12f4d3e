"""A documented import path of what lives in ``mla_patch.kernels.sparse``."""

from mla_patch.kernels.sparse import sparse_decode as sparse_decode
from mla_patch.kernels.sparse import sparse_decode_ref as sparse_decode_ref
