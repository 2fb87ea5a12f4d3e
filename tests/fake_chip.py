"""A GPU that is none: Triton specialises launches for it as it does for a real one, and compiles and runs nothing.

For a process of its own, without the interpreter; ``install()`` before our kernels are called.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mla_patch.compat import gpu
from mla_patch.kernels.indices import kv as kv_indices

SM = 90  # the chip from here on; every chip is a device with its own compiled kernels


class _Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", SM, 32)

    def get_current_device(self) -> int:
        return SM

    def get_current_stream(self, device: int) -> int:
        return 0


launched: list[tuple[Any, ...]] = []  # grid and all arguments of every launch


class _Compiled:
    """What Triton launches after a look at all arguments, which it takes at every launch: nothing else is offered."""

    function = packed_metadata = None

    def launch_metadata(self, *args: Any) -> None:
        pass

    def run(self, *args: Any) -> None:
        launched.append((args[:3], *args[9:]))


class _Again(_Compiled):
    """And what can be launched without it."""

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: launched.append((grid, *args))


def _do_compile(self: Any, key: Any, *args: Any, **kwargs: Any) -> _Compiled:
    compiled = self.device_caches[SM][0][key] = (_Again if again else _Compiled)()
    return compiled


again = False


def _zeros(*size: Any, **options: Any) -> torch.Tensor:
    """Caches and workspaces are read by kernels alone, and no kernel runs: their memory is not touched."""
    made = torch.empty(*size, **options)
    return made if made.nbytes > 2**20 else made.zero_()


def install(multiprocessors: int = 132) -> None:
    """Have CPU tensors taken for a GPU's, and launches for a GPU's launches."""
    driver.set_active(_Driver())
    JITFunction._do_compile = _do_compile
    torch.Tensor.is_cuda = property(lambda self: True)
    gpu.capability = lambda index: (SM // 10, SM % 10)
    gpu._from_index = lambda index: gpu.Gpu(f"chip {SM}", (SM // 10, SM % 10))
    gpu.sm_count = lambda index: multiprocessors
    # of what it checks only the device is wrong; it tells the number of rows
    kv_indices.launch._check = lambda table, pool, lens, indptr, start, out, rows: (
        lens.numel() if rows is None else rows
    )
    torch.cuda.current_device = lambda: None
    torch.zeros = _zeros
