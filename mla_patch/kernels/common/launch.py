"""What every launcher asks before it launches: the device, the chip, and whether anything can run at all; and warm-ups.

Nothing here waits for the device. All of it is on the path of a call, so each function asks for one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mla_patch.compat import gpu
from mla_patch.compat.compiles import COMPILES
from mla_patch.compat.triton import interpreted

INTERPRETED = interpreted()
"""Whether kernels run in Triton's interpreter. Asked at import, since Triton decides when it decorates a kernel."""


class Chip(NamedTuple):
    """The GPU that a launch goes to, as far as launch numbers depend on it."""

    capability: tuple[int, int]
    multiprocessors: int


_INTERPRETER = Chip((0, 0), 1)
_chip = lru_cache(Chip)  # at every call: to make a named tuple takes several times as long as to find one
_HERE = nullcontext()


def chip_of(tensor: torch.Tensor) -> Chip:
    """The GPU that holds a tensor; compute capability (0, 0) and one multiprocessor in the interpreter."""
    if INTERPRETED:
        return _INTERPRETER
    index = tensor.device.index
    return _chip(gpu.capability(index), gpu.sm_count(index))


def can_launch(tensor: torch.Tensor) -> bool:
    """Whether a kernel can run where a tensor lies: on a GPU, or anywhere in the interpreter."""
    return tensor.is_cuda or INTERPRETED


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one. Triton launches on the current GPU, wherever its arguments lie."""
    return torch.cuda.device(tensor.device) if gpu.on_other_device(tensor) else _HERE


@contextmanager
def warming_up() -> Iterator[Callable[[], int]]:
    """A warm-up: compiles inside count as none that hold up a call. Gives a function that counts them."""
    before = COMPILES.total
    with COMPILES.warming():
        yield lambda: COMPILES.total - before
