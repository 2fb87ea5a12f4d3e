"""Triton: what differs between its releases, and how to compile a kernel with no GPU.

to 3.3      the interpreter is chosen by TRITON_INTERPRET alone
from 3.4    by triton.knobs, which reads the same variable
from 3.4    a launch of what is compiled takes all of the kernel's arguments, constants included
from 3.4    programmatic dependent launch: `launch_pdl`, and gdc_wait and gdc_launch_dependents for kernels
from 3.6    sm_100 and newer are assembled by a second ptxas, `ptxas-blackwell`
from 3.6    Gluon has what decode_sm90 needs: warp groups with registers of their own, copies that arrive at a barrier
from 3.7    there, thread_barrier, async_copy_global_to_shared and _reinterpret have other names

Triton decides at decoration time whether a kernel is interpreted, so ask `interpreted()` next to the kernel.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import triton

from mla_patch.compat.compiles import COMPILES
from mla_patch.compat.gpu import SHARED_KIB

try:
    from triton.language.extra.cuda import gdc_launch_dependents as gdc_launch_dependents
    from triton.language.extra.cuda import gdc_wait as gdc_wait
except ImportError:  # an older Triton, or one that a test has cut down: kernels ask HAS_PDL first
    gdc_launch_dependents = gdc_wait = None
HAS_PDL = gdc_wait is not None

try:  # what kernels/decode/sm90.py is written in
    from triton.experimental.gluon.language import _core as _gluon
    from triton.experimental.gluon.language.nvidia.hopper import async_copy as _copy
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier as _mbarrier

    gluon_barrier = _gluon.barrier if hasattr(_gluon, "barrier") else _gluon.thread_barrier
    gluon_copy = _copy.async_load if hasattr(_copy, "async_load") else _copy.async_copy_global_to_shared
    _memory = _gluon.shared_memory_descriptor
    _seen_as = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret

    @_gluon.builtin
    def gluon_reinterpret(place: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
        """Shared memory, seen as another type, shape and layout."""
        return _seen_as(place, dtype, shape, layout, _semantic=_semantic)

    HAS_GLUON = (
        hasattr(_gluon, "warp_specialize") and hasattr(_copy, "mbarrier_arrive") and hasattr(_mbarrier, "arrive")
    )
except (ImportError, AttributeError):
    gluon_barrier = gluon_copy = gluon_reinterpret = None
    HAS_GLUON = False

TARGETS = (80, 86, 89, 90, 100, 120)
"""The compute capabilities every kernel is compiled for."""

FEW_TARGETS = (86, 90, 120)
"""Of these, one for each way to read e4m3 and each table of launch numbers, that with the least shared memory.

Enough for a case that differs in few of its instructions from one that is compiled for all.
"""

SHARED_LIMIT = {10 * major + minor: kib for (major, minor), kib in SHARED_KIB.items()}
"""KiB of shared memory one block may use, per compute capability."""


@dataclass(frozen=True)
class CompileCase:
    """One launch-table entry: a kernel and everything that Triton compiles it apart by."""

    name: str
    kernel: Any  # what @triton.jit returned
    signature: Mapping[str, str]  # parameter -> "*i32", "i64", ...; what is in `constexprs` is left out
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()  # parameters that Triton may take to be multiples of 16
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    targets: tuple[int, ...] = TARGETS
    stack: int = 0  # bytes of local memory allowed at most; a number other than 0 needs its reason beside it


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes of a multiprocessor."""

    registers: int
    stack: int
    shared: int  # bytes, static and dynamic together


def interpreted() -> bool:
    """Whether kernels decorated now run in Triton's interpreter, on CPU tensors."""
    knobs = getattr(triton, "knobs", None)
    if knobs is not None:
        return bool(knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def watch_compiles(*kernels: Any) -> None:
    """Count in ``COMPILES`` what Triton compiles for launches of ``kernels``; nothing is, where they are interpreted.

    Each kernel's own step to the compiler is wrapped. Triton's `jit_post_compile_hook` would do, but it is one for the
    process: somebody else may set it, and with any hook set Triton writes every kernel's constants as JSON, which in
    3.6 fails for a kernel that takes a function as a constant.
    """
    for kernel in kernels:
        if isinstance(getattr(kernel, "_do_compile", None), MethodType):
            kernel._do_compile = _counted(kernel)
        elif not interpreted():
            COMPILES.seen = False


def _counted(kernel: Any) -> Any:
    def compile_and_count(*args: Any, **kwargs: Any) -> Any:
        compiled = type(kernel)._do_compile(kernel, *args, **kwargs)
        COMPILES.note()
        return compiled

    return compile_and_count


class Relaunch:
    """A kernel with its grid and options, launched over and over with arguments of the same types and alignments.

    Triton looks at every argument of every launch, for some 20 us. After the first launch, `settle` keeps what it came
    to: then arguments are no longer looked at, and tensors may be addresses. Constants have to be the kernel's last
    parameters.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], options: Mapping[str, Any]) -> None:
        self._kernel, self._grid, self._options = kernel, grid, options
        self._constants: tuple[Any, ...] = ()
        self._compiled: Any = None
        self._run: Any = self._look

    def __call__(self, *args: Any) -> None:
        self._run(*args, *self._constants)

    def _look(self, *args: Any) -> None:
        self._compiled = self._kernel[self._grid](*args, **self._options)

    def settle(self) -> bool:
        """Whether launches go past Triton's look from now on; not in the interpreter, nor before 3.4."""
        if not hasattr(self._compiled, "__getitem__") or not hasattr(triton, "knobs"):
            return False
        names = [name for name in self._kernel.arg_names if name in self._options]
        self._constants = tuple(self._options[name] for name in names)
        self._run = self._compiled[(*self._grid, 1, 1)[:3]]
        return True


def gpu_compile(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    sm: int,
    *,
    divisible: tuple[str, ...] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
) -> Any:
    """Compile ``kernel`` for compute capability ``sm`` (80, 90, ...); no GPU is needed.

    Returns Triton's compiled kernel: ``.asm["cubin"]``, ``.asm["ptx"]``, ``.metadata.shared``.

    Raises:
        RuntimeError: called under TRITON_INTERPRET, where tl.sum and every other helper are interpreted too.
        ValueError: a parameter that the kernel does not have, or one that is given neither a type nor a value.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if interpreted():
        raise RuntimeError("gpu_compile needs a process without TRITON_INTERPRET")
    names = kernel.arg_names
    unknown = [name for name in (*signature, *constexprs, *divisible) if name not in names]
    missing = [name for name in names if name not in signature and name not in constexprs]
    if unknown or missing:
        raise ValueError(f"{kernel.__name__}: unknown parameters {unknown}, parameters without a type {missing}")
    # in the kernel's own order: Triton takes the positions of a launch from it
    full = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    if getattr(kernel, "is_gluon", lambda: False)():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(fn=kernel, signature=full, constexprs=dict(constexprs), attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def compile_case(case: CompileCase, sm: int) -> Any:
    return gpu_compile(
        case.kernel,
        case.signature,
        case.constexprs,
        sm,
        divisible=case.divisible,
        num_warps=case.num_warps,
        num_stages=case.num_stages,
        maxnreg=case.maxnreg,
    )


def cuda_tool(name: str) -> Path:
    """One of CUDA's tools in Triton's wheel, such as "cuobjdump".

    Raises:
        FileNotFoundError: this Triton ships none.
    """
    from triton.backends import nvidia

    found = sorted(Path(nvidia.__path__[0]).glob(f"**/bin/{name}"))
    if not found:
        raise FileNotFoundError(f"this Triton ships no {name}")
    return found[0]


# What ptxas says before it goes on to code that is right and slow: wgmma instructions wait for one another (C7510 -
# C7514, C7517), or registers stay divided evenly among the warps (C7507, C7508).
SLOW_CODE = re.compile(r"\(C75\d\d\)|Potential Performance Loss")


def slow_code(ptx: str) -> list[str]:
    """ptxas' warnings that a kernel of sm_90 is assembled into slow code; none where it has nothing of the kind.

    Triton keeps its own run of ptxas to itself, and does not run it for what its cache holds, so ptxas runs here again.
    """
    if "wgmma" not in ptx and "setmaxnreg" not in ptx:
        return []
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target\s+(sm_(\d+)\w*)", ptx, re.MULTILINE)
    if target is None:
        raise ValueError("PTX without a .target line")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        ptxas = get_ptxas(int(target[2])).path  # which of the wheel's two
        command = [ptxas, "-v", f"--gpu-name={target[1]}", source, "-o", Path(folder) / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = (done.stdout + done.stderr).splitlines()
    return [line.strip() for line in lines if SLOW_CODE.search(line)]


def usage(compiled: Any) -> Usage:
    """Registers and stack as the assembler left them; shared memory as Triton will ask for it at launch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        done = subprocess.run([cuda_tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True)
    # ` Function name: REG:18 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:592 TEXTURE:0 ...`
    line = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", done.stdout)
    if line is None:
        raise ValueError(f"no resource usage in {done.stdout!r}")
    registers, stack, static = map(int, line.groups())
    return Usage(registers, stack, static + compiled.metadata.shared)
