"""Sparse and dense MLA attention over fp8 and 16-bit pages, and sparse prefill over a 16-bit workspace.

decode     sparse_decode: each query attends to the slots in its list, over pages of an fp8 cache
dense      dense_decode: each query attends to its request, over a paged cache, with a log-sum-exp
prefill    mla_sparse_prefill: each query attends to the rows in its list, over a workspace
"""

from mla_patch.kernels.sparse.decode import sparse_decode as sparse_decode
from mla_patch.kernels.sparse.dense import dense_decode as dense_decode
from mla_patch.kernels.sparse.prefill import mla_sparse_prefill as mla_sparse_prefill
from mla_patch.kernels.sparse.reference import dense_decode_ref as dense_decode_ref
from mla_patch.kernels.sparse.reference import mla_sparse_prefill_ref as mla_sparse_prefill_ref
from mla_patch.kernels.sparse.reference import sparse_decode_ref as sparse_decode_ref
