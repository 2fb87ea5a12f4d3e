"""Makes a real SGLang release importable by standing in for the packages that this machine lacks."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from mla_patch.compat import interpreter
from mla_patch.compat.triton import interpreted

# Imported names that a CPU-only machine lacks; an attribute left out is a class that accepts anything.
STUBS: dict[str, dict[str, Any]] = {
    "sgl_kernel": {},
    "torchvision": {"__version__": "0.28.0"},  # transformers compares it
    "flash_mla": {},
    "vllm": {},
    "IPython": {},
    "uvicorn": {},
}

# Installed is not importable: a CPU torch beside these fails at their import, so they are tried first.
_TRIED = ("torchvision", "sgl_kernel", "flash_mla")


class Anything(type):
    """Classes stand in best for unknown names: they can be called, subclassed and used in annotations."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (Stub,), {})


class Stub(metaclass=Anything):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self  # a decorator gives back what it decorates

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub()


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Yields an empty package, at any depth, for each top-level name that it was told to stand in for."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(STUBS.get(module.__name__, {}))

        def missing(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return Anything(name, (Stub,), {})

        vars(module)["__getattr__"] = missing


def prepare() -> list[str]:
    """Make ``import sglang`` work here; the names that stubs stand in for. Installs nothing that is not needed."""
    stubbed = [name for name in STUBS if name not in sys.modules and not _importable(name)]
    if stubbed:
        sys.meta_path.insert(0, StubFinder(stubbed))
    if "sgl_kernel" in stubbed:
        _leave_operators_undescribed()
    _add_missing_names()
    if interpreted():
        interpreter.quicken()
    # 0.4.x compiles small helpers at import, which needs a C++ compiler and gains nothing here
    os.environ.setdefault("SGLANG_ENABLE_TORCH_COMPILE", "false")
    return stubbed


def _importable(name: str) -> bool:
    if importlib.util.find_spec(name) is None:
        return False
    if name not in _TRIED:
        return True
    try:
        importlib.import_module(name)
    except Exception:
        for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == name]:
            del sys.modules[loaded]
        return False
    return True


def _leave_operators_undescribed() -> None:
    """Where it finds a GPU the host describes sgl_kernel's operators to torch, and a stub registers none."""
    register = torch.library.register_fake

    @functools.wraps(register)
    def register_fake(op: Any, func: Any = None, /, **more: Any) -> Any:
        if isinstance(op, str) and op.startswith("sgl_kernel::"):
            return func or (lambda described: described)
        return register(op, func, **more)

    torch.library.register_fake = register_fake


def _add_missing_names() -> None:
    """Names that old releases take from Triton and torch, and newer ones of those no longer have."""
    import triton.runtime.cache as cache

    for name in ("default_cache_dir", "default_dump_dir", "default_override_dir"):
        if not hasattr(cache, name):
            setattr(cache, name, lambda: os.path.expanduser("~/.triton"))
    cpu = getattr(torch._C, "_cpu", None)
    if cpu is not None and not hasattr(cpu, "_is_amx_tile_supported"):
        cpu._is_amx_tile_supported = lambda: False
