"""Why a call has failed, in words: an argument that no kernel takes, a tensor without memory, a failure that passes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from typing import Any

from mla_patch import endings

MADE_UP = "a tensor without memory, as tracers have"


def odd_argument(call: Any) -> str | None:
    """Which argument of a call no kernel takes, in words; None where those that its class declares are tensors and
    numbers. A class declares them as tuples of names: ``tensors``, ``numbers``, and ``optional`` for tensors or None.
    """
    kind = type(call)
    optional = getattr(kind, "optional", ())
    for name in (*getattr(kind, "tensors", ()), *optional):
        value = getattr(call, name, None)
        if not hasattr(value, "data_ptr") and not (value is None and name in optional):
            return f"{name}: expected a tensor, found {type(value).__name__}"
    for name in getattr(kind, "numbers", ()):
        value = getattr(call, name, None)
        if not isinstance(value, (int, float)):
            return f"{name}: expected a number, found {type(value).__name__}"
    return None


def fields_of(call: Any) -> Iterable[str]:
    """The names of what a call holds, its bases' too; a plugin's call may be a tuple, which has none."""
    slots = [name for kind in type(call).__mro__ for name in kind.__dict__.get("__slots__", ())]
    return slots or list(getattr(call, "__dict__", ()))


def made_up(call: Any) -> str | None:
    """Whether a call has tensors that only stand for tensors, whose data nobody may touch: a decline, in words."""
    for name in fields_of(call):
        value: Any = getattr(call, name, None)
        if hasattr(value, "data_ptr"):
            try:
                value.data_ptr()
            except Exception:
                return MADE_UP
    return None


def is_out_of_memory(problem: BaseException) -> bool:
    if isinstance(problem, RuntimeError):
        return "out of memory" in endings.text_of(problem, str)
    return isinstance(problem, MemoryError)


def passes(problem: BaseException) -> bool:
    """Whether a failure of `serve` says nothing of the next call, and nothing on the device was touched by it.

    A compile that lost a race for its cache, or a compiler that was killed, and an allocation that failed. Whatever
    else the device reports may have left it in a state in which nobody's next call can be trusted.
    """
    return isinstance(problem, (OSError, subprocess.CalledProcessError)) or is_out_of_memory(problem)
