"""Launch numbers of sparse prefill's indices, and the width of their rows."""

from __future__ import annotations


def swa_config(rows: int, total: int, sms: int) -> dict[str, int]:
    """Launch numbers of `build_swa_token_ids`; ``sms`` multiprocessors."""
    return {"ctas": max(1, min(4 * sms // rows, -(-total // 512), 128)), "BLOCK": 512, "ROWS": 256, "num_warps": 4}


def combine_config() -> dict[str, int]:
    """Launch numbers of `combine_topk_swa_indices`: a warp for each query, so that thousands are there at once."""
    return {"BLOCK": 256, "ROWS": 256, "num_warps": 1}


def combined_topk_width(topk: int, window_size: int) -> int:
    """Columns of a combined row: its most keys, to the next multiple of 128."""
    return -(-(topk + window_size) // 128) * 128
