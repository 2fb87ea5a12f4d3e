"""What this machine has, as several commands ask: flags, features as an engine here would report them, a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib import util
from pathlib import Path
from typing import Any

from mla_patch import flags as flags_
from mla_patch import plugins as plugins_
from mla_patch import reports
from mla_patch.cli.exits import Misuse
from mla_patch.compat import gpu
from mla_patch.eligibility import Eligibility, check, code_of
from mla_patch.features import Feature, State
from mla_patch.session import experiment, find_host


def read_flags(chosen: Iterable[str]) -> tuple[plugins_.Plugins, flags_.Flags]:
    modes = {}
    for item in chosen:
        name, sign, mode = item.partition("=")
        if not sign:
            raise Misuse(f"--feature {item}: expected NAME=MODE, such as kv_indices=off")
        modes[name] = mode
    plugins = plugins_.load()
    return plugins, flags_.read(os.environ, plugins.features, modes)


def would_be(feature: Feature, flags: flags_.Flags, plugins: plugins_.Plugins) -> dict[str, Any]:
    """The feature's row as a process of an engine on this machine would first report it."""
    setting = flags.feature(feature)
    skip = flags.on("MLA_PATCH_SKIP_VERSION_CHECK")
    host = find_host(feature.host_name)
    verdict = check(feature, setting, host, skip_version_check=skip)
    if setting.value in flags_.EXPERIMENTS and verdict.state is State.ARMED:
        try:
            experiment(feature, setting, flags, verdict, plugins)
        except ValueError as problem:
            verdict = Eligibility(State.REFUSED, str(problem))
    status = reports.FeatureStatus(feature.name, feature.host_name, feature.flag, setting.value, setting.source)
    status.state, status.reason = verdict.state, verdict.reason
    status.targets = [reports.TargetStatus(t.module, t.name, t.kind, code_of(t)) for t in verdict.targets]
    return status.as_dict(counts=False)


def start_file() -> Path | None:
    """The installed mla_patch.pth, where Python reads it at start."""
    import site

    for folder in [*site.getsitepackages(), site.getusersitepackages()]:
        path = Path(folder) / "mla_patch.pth"
        if folder in sys.path and path.exists():
            return path
    return None


def torch_gpu() -> Any:
    try:
        return gpu.from_torch()
    except Exception:  # no torch, or one that does not load: a device that cannot be asked is none
        return None


def need_triton(command: str) -> None:
    if util.find_spec("torch") is None or util.find_spec("triton") is None:
        raise Misuse(
            f"{command}: it needs torch and triton; on a machine without a GPU: pip install 'mla-patch[triton]'"
        )
