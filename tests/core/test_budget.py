"""A test file that takes more CPU time than it may fails the run, and is named."""

import os
import subprocess
import sys
from pathlib import Path

import budget
import pytest
from scratch import ROOT, clean_env

BURN = """
import subprocess, sys, time

{constant}

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def test_here():
    burn({here})

def test_in_a_child():
    code = "import time\\nwhile time.process_time() < {there}: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
"""


def run(folder: Path, *files: tuple[str, float, float], workers: int = 0, **flags: str) -> tuple[int, str]:
    """Status and output of pytest over files of (constant, CPU seconds of the test, CPU seconds of its child)."""
    for number, (constant, here, there) in enumerate(files):
        text = BURN.format(constant=constant, here=here, there=there)
        (folder / f"test_{number}.py").write_text(text)
    env = clean_env({"PYTHONPATH": str(ROOT / "tests"), "PYTEST_ADDOPTS": None, "HOSTS": None, **flags})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "budget", *(["-n", str(workers)] if workers else [])]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_over_its_budget_fails_the_run(workers: int, tmp_path: Path) -> None:
    """Its own time and that of its children; the file beside it takes as much, and may."""
    status, said = run(tmp_path, ("CPU_SECONDS = 0.1", 0.6, 0), ("CPU_SECONDS = 60", 0.6, 0), workers=workers)
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "test_0.py: " in said and "of which it may take 0.1" in said and "test_1.py: " not in said


def test_the_time_of_children_counts(tmp_path: Path) -> None:
    status, said = run(tmp_path, ("CPU_SECONDS = 0.2", 0, 1.2))
    assert status == pytest.ExitCode.TESTS_FAILED and "test_0.py: " in said


def test_a_file_within_its_budget_passes(tmp_path: Path) -> None:
    assert run(tmp_path, ("", 0.1, 0.1))[0] == pytest.ExitCode.OK


@pytest.mark.parametrize("flags", [{"TRITON_INTERPRET": "0"}, {"HOSTS": "all"}])
def test_budgets_are_of_what_ci_runs(flags: dict[str, str], tmp_path: Path) -> None:
    assert run(tmp_path, ("CPU_SECONDS = 0.1", 0.6, 0), **flags)[0] == pytest.ExitCode.OK


def test_a_slower_machine_gets_more() -> None:
    taken = budget.Taken()
    for _ in range(2):
        taken.add("test_it.py", 4.0, 5.0, 2 * budget.WORK)
    assert (taken.slowness, taken.over()) == (2.0, [])
    taken.add("test_it.py", 3.0, 5.0, 2 * budget.WORK)
    assert taken.over() == ["test_it.py: 11.0 CPU seconds, of which it may take 5 x 2.0"]
    taken.work = [budget.WORK / 2]  # and a faster one no less
    assert taken.slowness == 1.0


def test_no_forks_time_is_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks of a process that still runs are told by it, since the system does not count them yet."""
    before = budget.cpu_seconds()
    monkeypatch.setitem(sys.modules, "preloaded", type(os)("preloaded"))
    sys.modules["preloaded"].cpu_seconds = lambda: 100.0  # type: ignore[attr-defined]
    assert 100 <= budget.cpu_seconds() - before < 101
