"""Who serves what, beside FlashMLA's builds themselves: what is left to the host the host can, and nothing else.

    FLASHMLA_BUILDS=FOLDER[:FOLDER...] TRITON_INTERPRET=0 pytest -m gpu tests/kernels/test_flash_mla_builds.py

A folder holds one of

    sgl_kernel/    flash_mla.py and flashmla_ops.abi3.so of a wheel sglang-kernel, an empty __init__.py, and beside it
                   the wheel's .dist-info
    flash_mla/     of the wheel sgl-flash-mla 1.0.0, with sglang/kernels/ops/attention/flash_mla_interface.py of 0.5.23
    flash_mla/     alone, of another package

It needs an sm_90 GPU and the torch that a build was made for. What a build faults on ends a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_flash_mla_peers import on_sm_90

from mla_patch.hooks.sglang.flash_mla_providers import PROVIDERS

CHILD = Path(__file__).with_name("flash_mla_builds_child.py")
FOLDERS = [Path(one) for one in os.environ.get("FLASHMLA_BUILDS", "").split(os.pathsep) if one]
FAULTS = 40  # more would be another kind of failure


def rows_of(folder: Path, out: Path) -> list[dict[str, Any]]:
    """A row for each case; without "host" it ended the process."""
    found: dict[int, dict[str, Any]] = {}
    for _ in range(FAULTS):
        first = max(found, default=-1) + 1
        command = [sys.executable, str(CHILD), str(folder), str(out), str(first)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        found = {line["number"]: line for line in lines if "number" in line}
        if lines and "end" in lines[-1]:
            return list(found.values())
        assert max(found, default=-1) >= first, done.stdout + done.stderr
    pytest.fail(f"{FAULTS} processes ended before their last case")


@pytest.mark.gpu
@pytest.mark.parametrize("folder", FOLDERS or [None], ids=lambda folder: folder and folder.name)
def test_who_serves_is_who_can(folder: Path | None, tmp_path: Path) -> None:
    if folder is None:
        pytest.skip("FLASHMLA_BUILDS does not name folders with FlashMLA's builds")
    on_sm_90()
    rows = rows_of(folder, tmp_path / "rows.jsonl")
    assert len(rows) > 40
    wrong = [row for row in rows if fault(row)]
    assert not wrong, "\n".join(f"{fault(row)}: {row}" for row in wrong)


def fault(row: dict[str, Any]) -> str | None:
    host, ours, asked = row.get("host", "ended the process"), row["ours"], row["asked"]
    if row["when"] == PROVIDERS[0].when:  # whatever the host makes of it
        return None
    if row["by"] == "host":
        if row.get("metadata by") == "triton":
            return "the host has ours' metadata"
        return None if host == "right" else "the host cannot"
    # its lengths end within the indices, of which the host reads whole blocks of 64
    lucky = asked.get("extra") == 33 and asked["lengths"]
    if host == "right" and not lucky:
        return "the host could"
    return None if ours == "right" or (host != "right" and "Error: " in ours) else "ours cannot"
