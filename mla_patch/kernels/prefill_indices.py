"""A documented import path of what lives in ``mla_patch.kernels.indices.prefill``."""

from mla_patch.kernels.indices.prefill import build_swa_token_ids as build_swa_token_ids
from mla_patch.kernels.indices.prefill import build_swa_token_ids_ref as build_swa_token_ids_ref
from mla_patch.kernels.indices.prefill import combine_topk_swa_indices as combine_topk_swa_indices
from mla_patch.kernels.indices.prefill import combine_topk_swa_indices_ref as combine_topk_swa_indices_ref
