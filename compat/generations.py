"""Numbers that tell whether an object still holds what it held. Standard library only.

An address is used again, and an object that is filled anew keeps its own; a number is given once.
"""

from __future__ import annotations

import itertools
from typing import Any

_MARK = "_mla_patch_number"
_numbers = itertools.count(1)


def generation_of(holder: Any) -> int:
    """The number of what ``holder`` holds now."""
    number = vars(holder).get(_MARK)
    return bump(holder) if number is None else number


def bump(holder: Any) -> int:
    """Say that what ``holder`` holds has changed: it gets a new number."""
    number = next(_numbers)
    setattr(holder, _MARK, number)
    return number
