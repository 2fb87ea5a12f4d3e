"""A documented import path of what lives in ``mla_patch.kernels.sparse``."""

from mla_patch.kernels.sparse import mla_sparse_prefill as mla_sparse_prefill
from mla_patch.kernels.sparse import mla_sparse_prefill_ref as mla_sparse_prefill_ref
