"""Run every test that a GPU can run, and keep who ran what in tests/gpu-last-run.json.

    python tests/gpu.py [--part 1/3] [--workers N] [--record FILE] [pytest's own arguments]

`make gpu` calls it with the Python that has the GPU's torch; nothing is installed. There are three runs: ``kernels``,
the test files that run on whatever device there is; ``marked``, of the other files what is marked ``gpu``; ``times``,
what measures time. Each green run is kept with its commit and date; one with a failure leaves the record as it is. With
several workers (pytest-xdist) tests that need much memory share one, and ``times`` has the GPU to itself. The exit
status is pytest's.
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
    for path in sorted(set(TESTS.rglob("test_*.py")) - set(TESTS.glob("hosts/*"))):
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


def keep(path: Path, where: dict[str, str], run: str, part: str, counts: dict[str, int]) -> None:
    """Put one green run into the record, beside those of the same machine."""
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    now = {**where, "of": part.partition("/")[2]}
    if {name: told.get(name) for name in now} != now:
        told = {**now, "runs": {}}
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    kept = {name: counts.get(name, 0) for name in ("passed", "skipped")}
    told["runs"][f"{run} {part}"] = {"commit": commit(), "date": date, **kept}
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
    shared = ["-n", str(args.workers), "--dist", "loadgroup"] if args.workers > 1 else []
    status = 0
    for run, some, marks, how in (
        ("kernels", whole, "not cost", shared),
        ("marked", marked, "gpu and not cost", shared),
        ("times", marked, "gpu and cost", []),
    ):
        counter = Counter()
        ended = int(pytest.main(["-m", marks, *how, *more, *map(str, some)], plugins=[counter])) if some else 0
        print(f"make gpu: {run}", dict(counter.counts), flush=True)
        if ended not in (0, 5):  # 5: none is marked
            status = status or ended
        elif counter.counts["passed"] and not more:  # what was chosen by hand is not the run
            keep(args.record, machine(), run, args.part, dict(counter.counts))
    return status


if __name__ == "__main__":
    sys.exit(main())
