"""Launch numbers of the two KV-index builders, kept out of the launchers so that a test can pin them."""

from __future__ import annotations


def token_indices_config(rows: int, sms: int, interpret: bool = False) -> dict[str, int]:
    """Launch numbers of `build_token_indices`; ``sms`` multiprocessors. Nothing here knows the table's width."""
    if interpret:  # programs run one after another in Python: as few, and as wide, as will do
        return {"ctas": 1, "BLOCK": 16384, "WIDE": 1, "ROWS": 0, "num_warps": 4}
    return {"ctas": max(1, min(4 * sms // rows, 128)), "BLOCK": 1024, "WIDE": 1, "ROWS": 256, "num_warps": 4}


def page_table_config(rows: int, page_size: int, sms: int, interpret: bool = False) -> dict[str, int]:
    """Launch numbers of `build_page_table`."""
    if page_size == 1:
        return token_indices_config(rows, sms, interpret)
    if interpret:
        return {"ctas": 1, "BLOCK": 16384 // page_size, "WIDE": 1, "ROWS": 0, "num_warps": 4}
    # small pages make more entries: a block stays at about 8192 tokens of context
    block = min(max(8192 // page_size, 128), 1024)
    # few rows may be uneven, and idle programs cost less than a long row's loop; many rows fill the GPU by themselves
    ctas = max(1, min((8 if rows <= 64 else 4) * sms // rows, 32))
    return {"ctas": ctas, "BLOCK": block, "WIDE": 1024 // block, "ROWS": 0, "num_warps": max(block // 128, 1)}
