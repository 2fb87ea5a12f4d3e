"""The smallest launches that reach every branch of our kernels, for compute-sanitizer.

compute-sanitizer --tool memcheck|racecheck python bench/sanitize.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without an install

from mla_patch.kernels.kv_indices import build_page_table, build_token_indices, page_table_ref, token_indices_ref


def kv_indices() -> None:
    lens = torch.tensor([3000, 0, 65, 5, 700], device="cuda")
    pool = torch.tensor([1, 0, 3, 2, 4], device="cuda")
    indptr = lens.cumsum(0) - lens
    table = torch.randint(0, 2**30, (5, 3000), device="cuda", dtype=torch.int32)
    for ctas, wide, rows in ((2, 1, 0), (2, 2, 4), (3, 1, 256)):
        config = {"ctas": ctas, "BLOCK": 128, "WIDE": wide, "ROWS": rows, "num_warps": 4}
        ids = torch.full((int(lens.sum()),), -1, device="cuda", dtype=torch.int64)
        want = token_indices_ref(table, pool, lens, indptr, ids)
        assert torch.equal(build_token_indices(table, pool, lens, indptr, ids, config=config), want)
        pages = torch.full((5, 188), -1, device="cuda", dtype=torch.int32)
        want = page_table_ref(table, pool, lens, pages, page_size=16)
        assert torch.equal(build_page_table(table, pool, lens, pages, page_size=16, config=config), want)


if __name__ == "__main__":
    kv_indices()
    torch.cuda.synchronize()
    print("every launch equals its definition")
