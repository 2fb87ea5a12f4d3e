"""Whose MLA kernels a backend of ours runs: what plugins offer, and what the variables choose."""

from __future__ import annotations

import os
from collections.abc import Iterable

from mla_patch.compat.sglang.tokenspeed import NAME, OTHER_NAME
from mla_patch.compat.types import Gpu, MlaKernel, Variable

HOST_KERNEL = "host"  # chooses the kernel of TRT-LLM
_FLAG = "MLA_PATCH_TOKENSPEED"
VARIABLES = {
    "decode": Variable("DECODE", (), NAME, "decode kernel of the backend, by name; `host` is the TRT-LLM kernel"),
    "prefill": Variable("PREFILL", (), NAME, "prefill kernel of the backend, by name; `host` is the TRT-LLM kernel"),
}
_offered: dict[str, MlaKernel] = {}  # by name


def offer(kernels: Iterable[MlaKernel]) -> None:
    """Take what the plugins of this process offer."""
    _offered.update((kernel.name, kernel) for kernel in kernels)


def offered() -> list[str]:
    """The names that the variables can choose, but for the host's."""
    return sorted(_offered)


def variable_of(part: str) -> str:
    """The environment variable that chooses the kernel of ``part``, "decode" or "prefill"."""
    return f"{_FLAG}_{VARIABLES[part].name}"


def chosen_kernels(device: Gpu | None, asked: str = OTHER_NAME) -> dict[str, MlaKernel | None]:
    """The kernels that the variables choose, decode and prefill; None is the host's own.

    Raises:
        ValueError: a name that nobody offers, or a kernel that cannot run here.
    """
    found: dict[str, MlaKernel | None] = {}
    for part, declared in VARIABLES.items():
        variable = variable_of(part)
        name = os.environ.get(variable) or declared.default
        able = {one.name: one for one in _offered.values() if getattr(one, part)}
        if name != HOST_KERNEL and name not in able:
            names = ", ".join(sorted([*able, HOST_KERNEL]))
            raise ValueError(f"{variable}={name}: no plugin offers a {part} kernel of that name; there are {names}")
        kernel = found[part] = able.get(name)
        try:
            problem = kernel.problem(device) if kernel is not None and kernel.problem is not None else None
        except (Exception, SystemExit) as raised:  # a plugin's: it cannot run here
            problem = repr(raised)
        if problem is not None:
            raise ValueError(f"{asked}, {part} by {name}: {problem}; {variable} chooses another")
    return found
