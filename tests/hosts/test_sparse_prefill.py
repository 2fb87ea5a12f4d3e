"""Real releases: prompts of a made-up DeepSeek V4 and V3.2 through the release's own backends, on a CPU.

Where SGLANG_TREES names a folder with sglang-0.5.12/ and the like, and common/ with what they import, on a GPU, too:

    SGLANG_TREES=/tmp/trees TRITON_INTERPRET=0 PYTHONPATH=/tmp/fm pytest -m gpu tests/hosts/test_sparse_prefill.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hosts
import pytest
import torch

from mla_patch.compat.triton import interpreted
from mla_patch.hooks.sglang.edits.v4_policy import Route

# release -> what is set; from 0.5.21 the release's own is right, so ours is asked for
RELEASES = {"0.5.12": "on", "0.5.21": "on", "0.5.23": "on"}
RELEASES |= dict.fromkeys(("0.5.13", "0.5.15", "0.5.18", "0.5.19", "0.5.20"), "")
ERROR = 4e-3  # 16-bit keys and weights, and a rounded bfloat16 result
CPU_SECONDS = 290  # see budget.py

TREES = Path(os.environ.get("SGLANG_TREES", ""))


def chosen(releases: Any) -> list[Any]:
    """Those to run on a CPU."""
    asked = os.environ.get("HOSTS", "spread")
    found = [one for one in releases if asked in ("spread", "all") or one in asked.replace(",", " ").split()]
    return [pytest.param(one, marks=[pytest.mark.network, pytest.mark.slow]) for one in found]


def environment(release: str, **flags: str) -> dict[str, str]:
    """With ours activated where ``flags`` say so."""
    env = hosts.environment(release)
    del env["MLA_PATCH"]
    return env | flags


@pytest.fixture(scope="module", params=chosen(RELEASES))
def seen(request: pytest.FixtureRequest, kept: Path) -> dict[str, Any]:
    release = request.param
    flag = {"MLA_PATCH_SPARSE_PREFILL": RELEASES[release]} if RELEASES[release] else {}
    env = environment(release, MLA_PATCH="1", **flag)
    return hosts.kept_by("sparse_prefill_child", release, kept, env=env)


def test_all_are_applied(seen: dict[str, Any]) -> None:
    state = seen["state"]
    assert state["state"] == "applied"
    assert all(target["replaced_by"] for target in state["targets"]), state
    left = re.search(r"build_swa_token_ids(, [^:]+)?: the release's code is correct", state["reason"])
    assert bool(left) == (RELEASES[seen["release"]] == "")


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
    for name, reason in (("strided", Route.PARALLEL), ("too large", Route.TOO_LARGE), ("few", Route.FEW)):
        row = seen.get(name)
        if row is None:
            assert seen["release"] in ("0.5.21", "0.5.23")
            continue
        assert (row["calls"], row["served"], row["result"]) == ([row["queries"]], 0, 0), row
        # where the release has a route of its own, it is told not to take it
        assert row["declined"] == ({reason.value: 1} if seen["release"] == "0.5.12" else {})


def test_deterministic_inference(seen: dict[str, Any]) -> None:
    """V4's prompt takes the release's route, whatever is beside it; V3.2's queries are alone what they are together."""
    assert seen["v32"]["alone differs"] == 0
    row = seen.get("deterministic")
    if row is None:
        assert seen["release"] in ("0.5.21", "0.5.23")
        return
    assert row["declined"] == {Route.DETERMINISTIC.value: 1}
    backport = seen["release"] == "0.5.12"
    assert (row["calls"], row["result"] == 0) == (([row["queries"]], True) if backport else ([], False)), row


def test_other_routes_of_the_releases_are_left(seen: dict[str, Any]) -> None:
    """Each sees the prompt that it was given, as it asserts."""
    names = {"0.5.19": ["q8kv8"], "0.5.20": ["q8kv8", "trtllm"]}.get(seen["release"], [])
    assert seen.get("other routes", {}) == dict.fromkeys(names, True)


def test_v32_takes_any_heads(seen: dict[str, Any]) -> None:
    """20 heads, which the release cannot pad; its dequantiser where that one is wrong, or ours is asked for."""
    told = seen["v32"]
    assert told["error"] < ERROR and told["heads"]["served"] == 1, told
    assert told["exact"] and told["read"]["served"] == 1, told


def test_more_queries_than_a_schedule_holds(seen: dict[str, Any]) -> None:
    if seen["release"] in ("0.5.21", "0.5.23"):
        assert "many" not in seen
        return
    many = seen["many"]
    assert many["plans"] == ["DeepGEMM's", "own"]  # of as many queries as fit, and of one more
    if seen["release"] == "0.5.12":
        assert many["many"]["served"] == 1 and max(many["many"]["result"]) < ERROR
        assert many["few"].startswith("few enough queries")


def test_the_backport_s_other_half(seen: dict[str, Any]) -> None:
    if seen["release"] != "0.5.12":
        assert "indexer" not in seen
        return
    assert seen["indexer"] == {"positions": True, "slots": True, "stored": [1]}


def test_restored(seen: dict[str, Any]) -> None:
    assert any(seen["touched"].values()) == (seen["release"] not in ("0.5.21", "0.5.23"))
    assert not any(seen["restored"].values())


@pytest.mark.parametrize("release", chosen(("0.5.12", "0.5.18")))
def test_without_the_plugin_nothing_is_touched(release: str, tmp_path: Path) -> None:
    told = hosts.start("sparse_prefill_child", release, tmp_path / "seen.json", env=environment(release))
    assert not any(told["touched"].values()) and "state" not in told


@pytest.mark.parametrize("release", chosen(("0.5.12",)))
def test_the_backport_waits_to_be_asked(release: str, tmp_path: Path) -> None:
    env = environment(release, MLA_PATCH="1")
    told = hosts.start("sparse_prefill_child", release, tmp_path / "seen.json", env=env)
    assert not any(told["touched"].values()), told
    assert told["state"]["state"] == "applied" and told["v32"]["heads"]["served"] == 1
    reason = told["state"]["reason"]
    assert re.search(r"DeepseekV4AttnBackend\.forward(, [^:]+)?: the release has no such route", reason)


def lacking(release: str) -> str | None:
    """What a run on a GPU would need and is not here, or None."""
    if interpreted():
        return "TRITON_INTERPRET=0"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "a GPU of sm_90"
    if importlib.util.find_spec("flash_mla") is None:
        return "flash_mla on PYTHONPATH"
    if not (TREES / f"sglang-{release}").is_dir():
        return f"SGLANG_TREES, a folder with sglang-{release}"
    return None


def drive(release: str, folder: Path, path: list[Path], options: Any, flags: dict[str, str]) -> dict[str, Any]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MLA_PATCH", "SGLANG_"))}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # the next process reads it
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path))} | flags
    out = folder / "seen.json"
    command = [sys.executable, str(hosts.HERE / "sparse_prefill_child.py"), release, str(out), *options]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
    assert out.exists(), done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 20])
@pytest.mark.parametrize("release", RELEASES)
def test_on_a_gpu(release: str, heads: int, tmp_path: Path) -> None:
    """FlashMLA attends over what ours has read back, where it takes the heads; of others ours does both."""
    if missing := lacking(release):
        pytest.skip(f"needs {missing}")
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = [TREES / f"sglang-{release}", TREES / "common", *map(Path, given)]
    flags = {"MLA_PATCH": "1", "MLA_PATCH_SPARSE_PREFILL": RELEASES[release]}
    flags = {name: value for name, value in flags.items() if value}
    seen = drive(release, tmp_path, path, ("--device", "cuda", "--heads", str(heads)), flags)
    print(json.dumps(seen))
    assert (seen["heads"], seen["flash_mla"]) == (heads, heads == 64)
    own, layers = release in ("0.5.21", "0.5.23"), (4, 3, 3)
    for count, row in zip(layers, seen["chunks"], strict=True):
        assert max(row["result"]) < ERROR and not row["declined"], row
        assert row["served"] == (3 * count if own else count)
        # a step of the workspace; for 12400 queries 4 bytes for each of 640, 256 and 128 keys, and what is shared
        assert own or 0 < row["memory"] - 16384 * 1024 < 12400 * 4400, row
    assert seen["calls"] == (sum(layers) if heads == 64 or own else 0)
    test_all_are_applied(seen)
    test_metadata_that_is_filled_anew_is_a_new_chunk(seen)
    test_what_goes_over_pages(seen)
    test_v32_takes_any_heads(seen)
    test_more_queries_than_a_schedule_holds(seen)
    test_the_backport_s_other_half(seen)
    test_restored(seen)
