"""Real releases on a CPU: prompts of a made-up DeepSeek V4 and V3.2 through the release's own backends."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mla_patch.compat.sglang_fetch import fetch
from mla_patch.compat.sglang_sparse_prefill import PARALLEL
from mla_patch.hooks.sglang_sparse_prefill import TOO_LARGE

HERE = Path(__file__).parent
# release -> what is set; from 0.5.21 the release's own is right, so ours is asked for
RELEASES = {"0.5.12": "on", "0.5.13": "", "0.5.15": "", "0.5.18": "", "0.5.21": "on", "0.5.23": "on"}
ERROR = 4e-3  # 16-bit keys and weights, and a rounded bfloat16 result

pytestmark = [pytest.mark.network, pytest.mark.slow]


def chosen(releases: Any) -> list[str]:
    asked = os.environ.get("HOSTS", "spread")
    return [one for one in releases if asked in ("spread", "all") or one in asked.replace(",", " ").split()]


def start(release: str, folder: Path, **flags: str) -> dict[str, Any]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MLA_PATCH", "SGLANG_"))}
    env |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} | flags
    env["PYTHONPATH"] = os.pathsep.join(map(str, fetch(release)))
    out = folder / "seen.json"
    command = [sys.executable, str(HERE / "sparse_prefill_child.py"), release, str(out)]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
    assert out.exists(), done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module", params=chosen(RELEASES))
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    release, base = request.param, tmp_path_factory.getbasetemp()
    kept = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"sparse-prefill-{release}.json"
    with open(kept.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test workers ask
        if not kept.exists():
            flag = {"MLA_PATCH_SPARSE_PREFILL": RELEASES[release]} if RELEASES[release] else {}
            told = start(release, tmp_path_factory.mktemp("seen"), MLA_PATCH="1", **flag)
            kept.write_text(json.dumps(told))
    return json.loads(kept.read_text())


def test_all_are_applied(seen: dict[str, Any]) -> None:
    state = seen["state"]
    assert state["state"] == "applied"
    assert all(target["replaced_by"] for target in state["targets"]), state
    left = "build_swa_token_ids: right in this release" in state["reason"]
    assert left == (RELEASES[seen["release"]] == "")


def test_three_chunks_are_as_one_prompt(seen: dict[str, Any]) -> None:
    """Every kind of layer, holes among what the indexer chose, requests without new tokens in all places."""
    own = seen["release"] in ("0.5.21", "0.5.23")  # whose route calls our kernels one by one
    for layers, row in zip((4, 3, 3), seen["chunks"], strict=True):
        assert max(row["result"]) < ERROR and not row["declined"], row
        # of its own: windows, then a dequantiser or two and a combination for each layer
        assert row["served"] == (3 * layers if own else layers)
        assert row["built"] == (0 if own else 1), "metadata is made once a chunk, at its first layer"
        # nothing but live tokens: a step of the workspace, and less than 64 KiB of metadata
        assert row["memory"] == 0 if own else 0 < row["memory"] - 16384 * 1024 < 65536
    assert (seen["calls"] > 0) == own  # on a CPU ours attends, where the route is ours


def test_metadata_that_is_filled_anew_is_a_new_chunk(seen: dict[str, Any]) -> None:
    refills = {name: row for name, row in seen.get("refilled", {}).items() if row}
    names = {"0.5.21": [], "0.5.23": [], "0.5.12": ["copy_"]}
    assert list(refills) == names.get(seen["release"], ["copy_", "refresh_for_breakable_cuda_graph_replay_"])
    for row in refills.values():
        assert (row["served"], row["built"]) == (1, 1) and max(row["result"]) < ERROR, row


def test_what_goes_over_pages(seen: dict[str, Any]) -> None:
    for name, reason in (("strided", PARALLEL), ("too large", TOO_LARGE)):
        row = seen.get(name)
        if row is None:
            assert seen["release"] in ("0.5.21", "0.5.23")
            continue
        assert (row["calls"], row["served"], row["result"]) == ([6], 0, 0), row
        # where the release has a route of its own, it is told not to take it
        assert row["declined"] == ({reason: 1} if seen["release"] == "0.5.12" else {})


def test_v32_takes_any_heads(seen: dict[str, Any]) -> None:
    """20 heads, which the release cannot pad; its dequantiser where that one is wrong, or ours is asked for."""
    told = seen["v32"]
    assert told["error"] < ERROR and told["heads"]["served"] == 1, told
    assert told["exact"] and told["read"]["served"] == 1, told


def test_the_backport_s_other_half(seen: dict[str, Any]) -> None:
    if seen["release"] != "0.5.12":
        assert "indexer" not in seen
        return
    assert seen["indexer"] == {"positions": True, "slots": True, "stored": [1]}
    many = seen["many"]
    assert many["many"]["served"] == 1 and max(many["many"]["result"]) < ERROR
    assert many["plans"] == ["DeepGEMM's", "own"]  # of 4 queries, which fit, and of 5
    assert many["few"].startswith("few enough queries")


def test_restored(seen: dict[str, Any]) -> None:
    assert any(seen["touched"].values()) == (seen["release"] not in ("0.5.21", "0.5.23"))
    assert not any(seen["restored"].values())


@pytest.mark.parametrize("release", chosen(("0.5.12", "0.5.18")))
def test_without_the_plugin_nothing_is_touched(release: str, tmp_path: Path) -> None:
    told = start(release, tmp_path)
    assert not any(told["touched"].values()) and "state" not in told


@pytest.mark.parametrize("release", chosen(("0.5.12",)))
def test_the_backport_waits_to_be_asked(release: str, tmp_path: Path) -> None:
    told = start(release, tmp_path, MLA_PATCH="1")
    assert not any(told["touched"].values()), told
    assert told["state"]["state"] == "applied" and told["v32"]["heads"]["served"] == 1
    assert "DeepseekV4AttnBackend.forward: the release has no such route" in told["state"]["reason"]
