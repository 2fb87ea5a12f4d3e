"""The wrapper files of real kernel wheels, with their operators and where these do not load."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import hosts
import pytest

from mla_patch.drive.sglang_fetch import fetch_files

CPU_SECONDS = 90  # see budget.py

pytestmark = [pytest.mark.network, pytest.mark.slow]

SPREAD = ("sglang-kernel 0.4.5", "sgl-flash-mla 1.0.0")


def chosen() -> list[str]:
    asked = os.environ.get("HOSTS") or "spread"
    if asked == "spread":
        return list(SPREAD)
    return [
        wheel for wheel, release in hosts.WHEELS.items() if asked == "all" or release in asked.replace(",", " ").split()
    ]


@pytest.fixture(params=chosen())
def wheel(request: pytest.FixtureRequest) -> str:
    return request.param


def seen(wheel: str, loaded: bool, scratch: Path) -> dict[str, Any]:
    """What a process of its own saw over the wrapper; ``loaded``: its operators are there."""
    name, version = wheel.split()
    folder = scratch / "wheel"
    shutil.copytree(fetch_files(name, version, hosts.WHEEL_FILES), folder)
    given = [] if not loaded else ["newest"] if version == "0.4.10" else ["operators"]
    (folder / "given.json").write_text(json.dumps(given))
    if name == "sgl-flash-mla":
        for stem in ("cuda", "_C_legacy"):
            (folder / "flash_mla" / f"{stem}.abi3.so").touch()
    else:
        (folder / "sgl_kernel" / "__init__.py").touch()
    env = hosts.environment(hosts.WHEELS[wheel], folder)
    return hosts.start("flash_mla_wheels_child", hosts.WHEELS[wheel], scratch / "seen.json", env=env)


def test_without_operators_all_is_ours(wheel: str, tmp_path: Path) -> None:
    """A driver, a torch or an image that the extension does not load with: its wrapper raises at every call."""
    got = seen(wheel, False, tmp_path)
    assert got["state"] == "applied"
    assert {name: one for name, one in got.items() if name.endswith(" by")} == {
        "schedule by": "triton", "decode by": "triton", "tensors by": "triton", "prefill by": "triton",
    }  # fmt: skip
    assert got["of the class"] and got["V4's"] and got["class"] != "mla_patch.flash_mla"
    assert got["error"] < 4e-3 and got["recorded"] == [True, True, 64] and got["tensors"] == 0


def test_with_operators_all_is_the_hosts(wheel: str, tmp_path: Path) -> None:
    got = seen(wheel, True, tmp_path)
    assert {name: one for name, one in got.items() if name.endswith(" by")} == {
        "schedule by": "host", "decode by": "host", "tensors by": "host", "prefill by": "host",
    }  # fmt: skip
    assert got["of the class"] and got["V4's"] and got["recorded"] == [True, True, 64]
    assert got["error"] == 1 and got["tensors"] == 7  # the operators' zeros, and their schedule
