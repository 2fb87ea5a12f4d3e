"""What a plugin may offer, in pluggy's terms; see docs/plugins.md for one in 40 lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from mla_patch.compat.types import Arm, MlaKernel
    from mla_patch.features import Feature

PROJECT = "mla_patch"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def mla_patch_features() -> list[Feature]:  # type: ignore[empty-body]
    """Features that this plugin brings. Called once per process or more often; must import neither a host nor torch."""


@hookspec
def mla_patch_arms() -> list[Arm]:  # type: ignore[empty-body]
    """Further implementations of existing features' calls, for experiments to choose from."""


@hookspec
def mla_patch_mla_kernels() -> list[MlaKernel]:  # type: ignore[empty-body]
    """Decode and prefill kernels for the backend that the feature ``tokenspeed`` adds; see docs/tokenspeed.md."""


@hookspec
def mla_patch_begin(kernels: list[MlaKernel]) -> None:
    """All plugins of this process are loaded; ``kernels`` is what they offer. Called once in each process."""
