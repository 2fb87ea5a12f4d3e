"""A FlashMLASchedMeta where the engine's wrappers have none, and a flash_mla package where none is installed."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from mla_patch.compat import gpu
from mla_patch.compat.sglang.flash_mla import PACKAGE, PACKAGE_ORDER, Build
from mla_patch.compat.types import Undo
from mla_patch.hooks.editing import Undoing

log = logging.getLogger("mla_patch")

_CORE = "mla_patch.flash_mla"  # imports torch, so when it is needed


def knows_sched_meta(build: Build) -> bool:
    """Whether the wrappers' own module has a FlashMLASchedMeta, whose class its callers test for."""
    own = getattr(sys.modules.get(build.module), "FlashMLASchedMeta", None)
    return own is not None and own.__module__ != _CORE


def new_sched_meta(build: Build) -> Any:
    """A FlashMLASchedMeta of the class that callers of these wrappers test for: the host's own, else ours."""
    kind = getattr(sys.modules.get(build.module), "FlashMLASchedMeta", None)
    return (kind or import_module(_CORE).FlashMLASchedMeta)()


def add_sched_meta(module: ModuleType) -> Undo:
    """Callers import the class from where they import the wrappers: ours, where there is none."""
    if hasattr(module, "FlashMLASchedMeta"):
        return lambda: None
    ours = import_module(_CORE).FlashMLASchedMeta
    module.FlashMLASchedMeta = ours  # type: ignore[attr-defined]

    def undo() -> None:
        if vars(module).get("FlashMLASchedMeta") is ours:
            del module.FlashMLASchedMeta

    return Undoing(undo, lambda: [(module, "FlashMLASchedMeta", ours)])


def install_flash_mla_shim(module: ModuleType, counts: Any) -> Undo:
    """0.5.12's DeepSeek V4 imports flash_mla at each call: where it is not installed, it finds ours.

    In all of this process; nothing else of the release asks for it. ``counts`` takes what is served.
    """
    if "flash_mla" in sys.modules:
        return lambda: None
    core = import_module(_CORE)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            counts.served += 1
            if gpu.capturing():
                counts.captured += 1
            return result

        return call

    def flash_mla_with_kvcache(*args: Any, **kwargs: Any) -> Any:
        """In the package's order, which has no descales."""
        placed = dict(zip(PACKAGE_ORDER[: len(args)], args, strict=True))
        return core.flash_mla_with_kvcache(**placed, **kwargs)

    names = {one.__name__: counted(one) for one in (core.get_mla_metadata, flash_mla_with_kvcache)}
    names["FlashMLASchedMeta"] = core.FlashMLASchedMeta
    ours = {}
    for name in ("flash_mla", PACKAGE):
        one = ours[name] = ModuleType(name, "mla-patch's, in the place of a package that is not installed")
        one.__spec__ = ModuleSpec(name, None, is_package=name == "flash_mla")
        vars(one).update(names)
    ours["flash_mla"].__path__ = []
    ours["flash_mla"].flash_mla_interface = ours[PACKAGE]  # type: ignore[attr-defined]
    sys.modules.update(ours)
    log.info("mla-patch: flash_mla is not installed: DeepSeek V4's attention runs on our Triton kernels")

    def undo() -> None:
        for name, one in ours.items():
            if sys.modules.get(name) is one:
                del sys.modules[name]

    return Undoing(undo, lambda: [(sys.modules, name, one) for name, one in ours.items()])
