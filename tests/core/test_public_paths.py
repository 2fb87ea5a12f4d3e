"""Import paths that the documentation has named keep working, wherever the code lives by now."""

import importlib

import pytest

PATHS = {
    "mla_patch": "apply restore report",
    "mla_patch.compat.types": "Arm MlaDecode MlaKernel MlaPrefill Target Variable",
    "mla_patch.compat.steps": "watcher",
    "mla_patch.features": "Counts Feature State",
    "mla_patch.flash_mla": "flash_mla_sparse_fwd flash_mla_with_kvcache get_mla_metadata",
    "mla_patch.hooks.sglang_decode": "declines serve",
    "mla_patch.hookspecs": "hookimpl",
    "mla_patch.kernels.decode": "mla_decode mla_decode_paged mla_decode_ref",
    "mla_patch.kernels.decode_splits": "mla_decode_splits mla_decode_splits_ref",
    "mla_patch.kernels.kv_cast": "cast_pages cast_pages_ref",
    "mla_patch.kernels.layouts": "V4 V32 Layout new_pages pages_of",
    "mla_patch.kernels.prefill_indices": "build_swa_token_ids combine_topk_swa_indices",
    "mla_patch.kernels.quantize": "quantize quantize_ref",
    "mla_patch.kernels.sparse_decode": "sparse_decode sparse_decode_ref",
    "mla_patch.kernels.sparse_prefill": "mla_sparse_prefill mla_sparse_prefill_ref",
    "mla_patch.sparse_prefill": "ChunkInputs SparsePrefillChunkCache pages_are_faster",
}


@pytest.mark.parametrize("module", PATHS)
def test_a_documented_path_leads_somewhere(module: str) -> None:
    found = importlib.import_module(module)
    assert not [name for name in PATHS[module].split() if not hasattr(found, name)]
