"""Launch numbers of the sparse family, kept out of the launchers so that tests can pin them."""

from __future__ import annotations

import math
from functools import lru_cache

SM90_MIN_HEADS = 17  # with fewer heads, sparse_sm90's tile of 64 is mostly empty
SM90_TILES = {"BLOCK_H": 64, "BLOCK_N": 128, "PER_SM": 1}  # sparse_sm90's tiles
MERGE = {"SPLITS": 256, "BLOCK_S": 8, "num_warps": 4}  # sparse_merge_kernel's: one for any number of splits


def sparse_config(heads: int, capability: tuple[int, int], interpret: bool = False) -> dict[str, int]:
    """Launch numbers of `sparse_kernel` and `dense_kernel`. ``PER_SM`` programs fit on a multiprocessor."""
    if interpret:
        return {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 1, "PER_SM": 3, "num_warps": 4}
    if capability[0] in (9, 10) and heads > 16:
        # 64 heads are a whole tile of the tensor cores, and each key is decoded once for all of them
        return {"BLOCK_H": 64, "BLOCK_N": 64, "STAGES": 2, "PER_SM": 1, "num_warps": 8}
    if capability[0] in (9, 10):
        return {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 3, "PER_SM": 2, "num_warps": 4}
    return {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 2, "PER_SM": 1, "num_warps": 4}


def sparse_prefill_config(heads: int, capability: tuple[int, int], interpret: bool = False) -> dict[str, int]:
    """Launch numbers of `sparse_prefill_kernel`."""
    if interpret:
        return {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 1, "num_warps": 4}
    # 64 heads are a whole tile of the tensor cores, and each key is gathered once for all of them
    if capability[0] == 9 and heads > 16:
        return {"BLOCK_H": 64, "BLOCK_N": 64, "STAGES": 2, "num_warps": 8}
    if capability[0] == 10 and heads > 16:
        return {"BLOCK_H": 64, "BLOCK_N": 32, "STAGES": 3, "num_warps": 8}
    # a gather follows its indices, so that five stages are two tiles of keys
    if capability == (8, 0) and heads > 16:
        return {"BLOCK_H": 64, "BLOCK_N": 32, "STAGES": 5, "num_warps": 8}
    return {"BLOCK_H": 16, "BLOCK_N": 32, "STAGES": 5, "num_warps": 4}


@lru_cache(maxsize=4096)
def split_count(tiles: int, blocks: int, places: int) -> int:
    """How many programs share the keys of one query.

    tiles     tiles of heads of all queries, each of which needs a program at least
    blocks    blocks of keys of one query
    places    how many programs the GPU runs at once
    """
    best, min_cost = 1, math.inf
    for splits in range(1, max(1, min(blocks, places // max(tiles, 1), 256)) + 1):
        waves = -(-tiles * splits // places)
        # a merge, and a program's beginning and end, cost about as much as two blocks of keys
        cost = waves * (-(-blocks // splits) + 2) + (2 if splits > 1 else 0)
        if cost < min_cost:
            best, min_cost = splits, cost
    return best
