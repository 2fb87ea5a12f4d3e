"""Run every test that a GPU can run, and keep who ran what in tests/gpu-last-run.json.

    python tests/gpu.py [--part 1/3] [--workers N] [--record FILE] [pytest's own arguments]

`make gpu` calls it with the Python that has the GPU's torch; nothing is installed. Kernel tests that run on whatever
device there is run as a whole, of the other files what is marked ``gpu``. A run in parts is one run if all parts are of
one commit: each adds its counts. Only a part without a failure is kept. With several workers (pytest-xdist)
what needs much of the GPU's memory runs in one of them, and what measures time by itself afterwards. The exit status
is pytest's.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
RECORD = TESTS / "gpu-last-run.json"
ANY_DEVICE = 'DEVICE = "cpu" if interpreted() else "cuda"'  # how a file says that its tests run on either
BORROWED = ("test_decode_splits.py",)  # which has another file's


def files() -> tuple[list[Path], list[Path]]:
    """Test files that run as a whole, and those of which what is marked runs."""
    whole, marked = [], []
    for path in sorted(TESTS.glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if ANY_DEVICE in text or path.name in BORROWED:
            whole.append(path)
        elif "mark.gpu" in text:
            marked.append(path)
    return whole, marked


def commit() -> str:
    """What is run: a copy without its history is told by COMMIT."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return os.environ.get("COMMIT") or (done.stdout.strip() if done.returncode == 0 else "unknown")


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError:
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def machine() -> dict[str, str]:
    import torch
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


class Counter:
    """pytest's outcomes."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1


def keep(path: Path, where: dict[str, str], part: str, counts: dict[str, int]) -> None:
    """Add a green part to the record, beside the others of the same commit and machine."""
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    now = {"commit": commit(), **where}
    if {name: told.get(name) for name in now} != now or part.partition("/")[2] != told.get("of"):
        told = {**now, "of": part.partition("/")[2], "parts": {}}
    told["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    told["parts"][part] = {name: counts.get(name, 0) for name in ("passed", "skipped")}
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="1/1", help="one of so many, for machines that are lent for minutes")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the GPU; needs pytest-xdist")
    parser.add_argument("--record", type=Path, default=RECORD)
    args, more = parser.parse_known_args()
    number, parts = map(int, args.part.split("/"))
    os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported
    sys.path[:0] = [str(ROOT)]
    # children find the package as this process does
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

    import pytest
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device", file=sys.stderr)
        return 2
    whole, marked = (some[number - 1 :: parts] for some in files())
    counter, statuses = Counter(), []
    shared = ["-n", str(args.workers), "--dist", "loadgroup"] if args.workers > 1 else []
    runs = ((whole, "not cost", shared), (marked, "gpu and not cost", shared), (marked, "gpu and cost", []))
    for some, marks, how in runs:
        if some:
            statuses.append(int(pytest.main(["-m", marks, *how, *more, *map(str, some)], plugins=[counter])))
    green = not counter.counts["failed"] and counter.counts["passed"] and set(statuses) <= {0, 5}  # 5: none is marked
    print("make gpu:", dict(counter.counts))
    if green and not more:  # what was chosen by hand is not the run
        keep(args.record, machine(), args.part, dict(counter.counts))
    return 0 if green else next((one for one in statuses if one), 1)


if __name__ == "__main__":
    sys.exit(main())
