"""`make gpu`: which tests it runs, and the record that it leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gpu
import pytest

NAMES = ["gpu", "driver", "torch", "triton", "python", "of", "runs"]


def complete(told: dict) -> list[str]:
    """What is wrong with a record of whole green runs."""
    wrong = [] if list(told) == NAMES else [f"names {list(told)}"]
    wrong += [name for name in NAMES[:6] if not isinstance(told.get(name), str)]
    runs, count = told.get("runs", {}), int(told.get("of", 0))
    wanted = {f"{run} {i}/{count}" for run in ("kernels", "marked", "times") for i in range(1, count + 1)}
    wrong += [] if set(runs) == wanted else [f"runs {list(runs)} of {count}"]
    for run in runs.values():
        wrong += [] if list(run) == ["commit", "date", "passed", "skipped"] else [f"a run of {list(run)}"]
        wrong += [] if re.fullmatch(r"\d{4}-\d\d-\d\d", run.get("date", "")) else ["date"]
        wrong += [] if re.fullmatch(r"[0-9a-f]{7,40}", run.get("commit", "")) else ["commit"]
        wrong += [] if run.get("passed", 0) > 0 else [f"counts {run}"]
    return wrong


def test_the_last_run_is_told_whole() -> None:
    told = json.loads(gpu.RECORD.read_text(encoding="utf-8"))
    assert complete(told) == []


def test_a_record_is_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, where = tmp_path / "run.json", dict.fromkeys(NAMES[:5], "x")
    monkeypatch.setenv("COMMIT", "a" * 40)
    for run in ("kernels", "marked"):
        gpu.keep(path, where, run, "1/1", {"passed": 3})
    assert complete(json.loads(path.read_text())) == ["runs ['kernels 1/1', 'marked 1/1'] of 1"]
    monkeypatch.setenv("COMMIT", "b" * 40)
    gpu.keep(path, where, "times", "1/1", {"passed": 4, "skipped": 1})
    told = json.loads(path.read_text())
    assert complete(told) == [] and told["runs"]["times 1/1"]["skipped"] == 1
    assert [run["commit"][0] for run in told["runs"].values()] == ["a", "a", "b"]  # each says of which commit it is
    gpu.keep(path, where | {"driver": "y"}, "times", "1/1", {"passed": 4})
    assert list(json.loads(path.read_text())["runs"]) == ["times 1/1"]  # the others are another machine's


def test_every_kernel_and_every_marked_test_is_in_a_part() -> None:
    whole, marked = gpu.files()
    names = {path.name for path in (*whole, *marked)}
    for path in set(gpu.TESTS.rglob("test_*.py")) - set(gpu.TESTS.glob("hosts/*")):
        if re.search(r"mark\.gpu\b", path.read_text(encoding="utf-8")) and path.name != "test_gpu_run.py":
            assert path.name in names
    kernels = {"decode", "decode_splits", "dense_decode", "sparse_decode", "sparse_prefill", "kv_indices", "dequantize"}
    assert {f"test_{name}.py" for name in kernels} | {"test_far_apart.py", "test_strided.py"} <= {
        one.name for one in whole
    }
    for parts in (2, 3):
        split = [path for number in range(parts) for path in whole[number::parts]]
        assert sorted(split) == whole
