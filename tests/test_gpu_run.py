"""`make gpu`: which tests it runs, and the record that it leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gpu
import pytest

NAMES = ["commit", "gpu", "driver", "torch", "triton", "python", "of", "parts", "date"]


def complete(told: dict) -> list[str]:
    """What is wrong with a record of a whole green run."""
    wrong = [] if list(told) == NAMES else [f"names {list(told)}"]
    wrong += [name for name in NAMES[:7] if not isinstance(told.get(name), str)]
    wrong += [] if re.fullmatch(r"\d{4}-\d\d-\d\d", told.get("date", "")) else ["date"]
    wrong += [] if re.fullmatch(r"[0-9a-f]{7,40}", told.get("commit", "")) else ["commit"]
    parts = told.get("parts", {})
    count = int(told.get("of", 0))
    wrong += [] if set(parts) == {f"{i}/{count}" for i in range(1, count + 1)} else [f"parts {list(parts)} of {count}"]
    for part in parts.values():
        wrong += [] if list(part) == ["passed", "skipped"] and part["passed"] > 0 else [f"counts {part}"]
    return wrong


@pytest.mark.skipif(not gpu.RECORD.exists(), reason="no run has been kept yet: make gpu writes tests/gpu-last-run.json")
def test_the_last_run_is_told_whole() -> None:
    told = json.loads(gpu.RECORD.read_text(encoding="utf-8"))
    assert complete(told) == []


def test_a_record_is_of_one_commit_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, where = tmp_path / "run.json", dict.fromkeys(NAMES[1:6], "x")
    monkeypatch.setenv("COMMIT", "a" * 40)
    gpu.keep(path, where, "1/2", {"passed": 3})
    assert complete(json.loads(path.read_text())) == ["parts ['1/2'] of 2"]
    gpu.keep(path, where, "2/2", {"passed": 4, "skipped": 1})
    told = json.loads(path.read_text())
    assert complete(told) == [] and told["parts"]["2/2"] == {"passed": 4, "skipped": 1}
    monkeypatch.setenv("COMMIT", "b" * 40)
    gpu.keep(path, where, "2/2", {"passed": 4})
    assert list(json.loads(path.read_text())["parts"]) == ["2/2"]  # the first is another commit's


def test_every_kernel_and_every_marked_test_is_in_a_part() -> None:
    whole, marked = gpu.files()
    names = {path.name for path in (*whole, *marked)}
    for path in gpu.TESTS.glob("test_*.py"):
        if re.search(r"mark\.gpu\b", path.read_text(encoding="utf-8")) and path.name != "test_gpu_run.py":
            assert path.name in names
    kernels = {"decode", "decode_splits", "dense_decode", "sparse_decode", "sparse_prefill", "kv_indices", "dequantize"}
    assert {f"test_{name}.py" for name in kernels} | {"test_far_apart.py", "test_strided.py"} <= {
        one.name for one in whole
    }
    for parts in (2, 3):
        split = [path for number in range(parts) for path in whole[number::parts]]
        assert sorted(split) == whole
