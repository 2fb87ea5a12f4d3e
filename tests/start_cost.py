#!/usr/bin/env python3
"""What mla-patch adds to the start of every Python process: with MLA_PATCH unset, and with it set.

Three environments alike but for the plugin are started in turn, so that drift in the machine hits all of them: `bare`
has no plugin, `off` has it installed from the wheel, `on` is `off` with MLA_PATCH=1. A cost is the median, over the
rounds, of the difference between two neighbours in one round.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from scratch import ROOT, Scratch, build, clean_env


def _start(python: str, env: dict[str, str]) -> tuple[float, float]:
    """One interpreter, from nothing to its end: milliseconds by the wall clock, and of processor time."""
    begun = time.perf_counter()
    pid = os.posix_spawn(python, [python, "-c", "pass"], env)
    _, status, used = os.wait4(pid, 0)
    wall = time.perf_counter() - begun
    if status:
        raise RuntimeError(f"{python} ended with status {status}")
    return wall * 1e3, (used.ru_utime + used.ru_stime) * 1e3


def measure(
    wheel: Path, folder: Path, starts: int = 200, tick: Callable[[int], None] = lambda done: None
) -> dict[str, dict[str, float]]:
    """Median milliseconds per arm, and what the plugin adds, by the wall clock and in processor time."""
    bare, ours = Scratch.make(folder / "bare"), Scratch.make(folder / "ours")
    ours.unpack(wheel)
    env = clean_env({"MLA_PATCH": None})
    arms = {
        "bare": (bare.python, env),
        "off": (ours.python, env),
        "on": (ours.python, env | {"MLA_PATCH": "1"}),
    }
    for python, settings in arms.values():  # bytecode is written on the first start, not on the next
        _start(python, settings)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for done in range(starts):
        for name, (python, settings) in arms.items():
            seen[name].append(_start(python, settings))
        tick(done + 1)

    result: dict[str, dict[str, float]] = {}
    for clock, unit in enumerate(("wall_ms", "cpu_ms")):
        took = {name: [row[clock] for row in rows] for name, rows in seen.items()}
        result[unit] = {name: statistics.median(values) for name, values in took.items()}
        for name in ("off", "on"):
            added = [with_it - without for with_it, without in zip(took[name], took["bare"], strict=True)]
            result[unit][f"{name}_adds"] = statistics.median(added)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--starts", type=int, default=200, help="interpreters started per arm (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.starts < 1:
        parser.error("--starts must be at least 1")

    def tick(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{args.starts}", end="\n" if done == args.starts else "", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        wheel = build(ROOT, Path(folder, "dist"), "wheel")
        result = measure(wheel, Path(folder), args.starts, tick)
    if args.json:
        print(json.dumps({"python": sys.version.split()[0], "starts": args.starts, **result}))
        return 0
    print(f"Python {sys.version.split()[0]}, {args.starts} starts per arm, medians in ms")
    print(f"{'':12}{'bare':>9}{'off':>9}{'on':>9}{'off adds':>11}{'on adds':>11}")
    for unit, title in (("wall_ms", "wall clock"), ("cpu_ms", "processor")):
        row = result[unit]
        print(
            f"{title:12}{row['bare']:9.2f}{row['off']:9.2f}{row['on']:9.2f}{row['off_adds']:11.3f}{row['on_adds']:11.3f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
