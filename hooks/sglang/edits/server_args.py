"""Names of our backend among the server's arguments: they become trtllm_mla and a mark."""

from __future__ import annotations

import argparse
import functools
import inspect
from types import ModuleType
from typing import Any

from mla_patch.compat import gpu
from mla_patch.compat.sglang.deterministic import REASON
from mla_patch.compat.sglang.tokenspeed import FIELDS, HOST_NAME, NAME, OTHER_NAME, PAGE_SIZES
from mla_patch.compat.types import Undo
from mla_patch.hooks.editing import set_methods
from mla_patch.hooks.sglang.edits.mla_kernels import chosen_kernels

MARK = "_mla_patch_tokenspeed"  # the attribute of the arguments that holds the name that was asked for


def accept_backend_name(module: ModuleType) -> Undo:
    """Take both names, where the release knows neither."""
    return _accept_names(module, (NAME, OTHER_NAME))


def accept_other_backend_name(module: ModuleType) -> Undo:
    """Take the one name, where the release has a tokenspeed_mla of its own."""
    return _accept_names(module, (OTHER_NAME,))


def _accept_names(module: ModuleType, names: tuple[str, ...]) -> Undo:
    owner = module.ServerArgs
    reader = "resolve_once" if "resolve_once" in vars(owner) else "__post_init__"
    read, add = vars(owner)[reader], vars(owner)["add_cli_args"]
    if not isinstance(add, staticmethod) or tuple(inspect.signature(read).parameters) != ("self",):
        raise TypeError(f"{owner.__qualname__}: add_cli_args(parser) or {reader}(self) takes something else")

    @functools.wraps(read)
    def read_ours(self: Any) -> None:
        if any(getattr(self, field, None) in names for field in FIELDS):
            _choose(self, names)
        read(self)

    @functools.wraps(add.__func__)
    def add_ours(parser: argparse.ArgumentParser) -> None:
        add.__func__(parser)
        for action in parser._actions:
            if action.choices is not None and HOST_NAME in action.choices:
                # the list may be the host's own, which it extends and tests elsewhere
                action.choices = [*action.choices, *(name for name in names if name not in action.choices)]

    return set_methods(owner, {reader: read_ours, "add_cli_args": staticmethod(add_ours)})


def _choose(args: Any, names: tuple[str, ...]) -> None:
    """Make trtllm_mla and a mark of our name in a server's arguments.

    Raises:
        ValueError: what cannot work on this machine or with these arguments, before anything is loaded.
    """
    chosen = {field: getattr(args, field, None) for field in FIELDS}
    asked = next(name for name in chosen.values() if name in names)
    for field, name in chosen.items():
        if name == HOST_NAME:
            raise ValueError(f"--{field.replace('_', '-')} trtllm_mla beside {asked}: one of the two, not both")
    if getattr(args, "enable_deterministic_inference", False) or getattr(args, "rl_on_policy_target", None):
        raise ValueError(f"{asked} beside {REASON}, which nobody has shown for such kernels: use fa3 or triton")
    if args.kv_cache_dtype != "fp8_e4m3":
        raise ValueError(f"{asked} reads an fp8 cache: set --kv-cache-dtype fp8_e4m3, found {args.kv_cache_dtype}")
    if args.page_size not in (None, 1, *PAGE_SIZES):  # unset, or the default of old releases: the host makes it 64
        raise ValueError(f"{asked} reads pages of 32 or 64 tokens: set --page-size 64, found {args.page_size}")
    chosen_kernels(gpu.from_nvml(), asked)
    for field, name in chosen.items():
        if name in names:
            setattr(args, field, HOST_NAME)
    setattr(args, MARK, asked)
