"""Compile every kernel for every GPU we name, on a machine that has none, and check what each takes of the chip.

    python tests/compile_matrix.py [--every] [--family NAME] [--sm 90] [--match TEXT] [--jobs N]

A module anywhere under mla_patch/kernels takes part by defining `compile_cases(every: bool) -> list[CompileCase]`: what
its launch table can ask Triton to compile, with all options off and all on, or, with --every, their product.
Runs in its own process, without TRITON_INTERPRET. Exit 1: something does not compile, needs more shared memory than
the chip has, spills, or makes ptxas warn of slow code. With one job each case is named before it is compiled, so that
a process that is killed tells where it was. It and its workers end with whoever started them.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import multiprocessing
import os
import pkgutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # and in the workers, which import this file

import triton

import mla_patch.kernels
from mla_patch.compat.triton import SHARED_LIMIT, TARGETS, CompileCase, compile_case, slow_code, usage

PREFIX = "mla_patch.kernels."


@functools.cache
def collect(every: bool) -> list[tuple[str, CompileCase]]:
    found = []
    for info in pkgutil.walk_packages(mla_patch.kernels.__path__, PREFIX):
        cases = getattr(importlib.import_module(info.name), "compile_cases", None)
        if cases is not None and cases.__module__ == info.name:  # a family's package may offer its file's, too
            found += [(info.name.removeprefix(PREFIX), case) for case in cases(every)]
    return found


def check(every: bool, index: int, sm: int) -> tuple[str, str, int, str]:
    """(family, case, sm, what it takes, ending in the fault if there is one); by index, since kernels do not pickle."""
    family, case = collect(every)[index]
    try:
        compiled = compile_case(case, sm)
        taken, slow = usage(compiled), slow_code(compiled.asm["ptx"])
    except Exception as problem:
        return family, case.name, sm, f"FAILED {problem!r}"
    faults = []
    if taken.shared > SHARED_LIMIT[sm] * 1024:
        faults.append(f"FAILED {SHARED_LIMIT[sm]} KiB of shared memory is all there is")
    if taken.stack > case.stack:
        faults.append(f"FAILED expected a stack of at most {case.stack}")
    faults += [f"FAILED {warning}" for warning in slow]
    return (
        family,
        case.name,
        sm,
        " ".join([f"reg {taken.registers} stack {taken.stack} shared {taken.shared}", *faults]),
    )


def die_with_parent() -> None:
    """Have Linux kill this process when its parent ends: a worker that compiles would go on for minutes."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def results(
    work: list[tuple[bool, int, int]], cases: list[tuple[str, CompileCase]], jobs: int
) -> Iterator[tuple[str, str, int, str]]:
    if jobs == 1:
        for every, index, sm in work:
            print(f"compiling {cases[index][0]}: sm_{sm}  {cases[index][1].name}", flush=True)
            yield check(every, index, sm)
    elif work:
        # spawned: a forked child inherits the locks of Triton's and torch's threads
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=die_with_parent) as pool:
            yield from pool.map(check, *zip(*work, strict=True), chunksize=8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="the product of all options")
    parser.add_argument("--family", default="", help="only this kernel module's cases")
    parser.add_argument("--sm", type=int, action="append", choices=TARGETS)
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    die_with_parent()
    cases = collect(args.every)
    work = [
        (args.every, index, sm)
        for index, (family, case) in enumerate(cases)
        for sm in args.sm or TARGETS
        if sm in case.targets and args.match in case.name and args.family in ("", family)
    ]
    print(f"Triton {triton.__version__}", flush=True)
    failed = 0
    for family, name, sm, result in results(work, cases, args.jobs):
        failed += "FAILED" in result
        print(f"{family}: sm_{sm}  {name}: {result}", flush=True)
    print(f"{len(work)} compiled, {failed} failed")
    return int(failed > 0 or not work)


if __name__ == "__main__":
    sys.exit(main())
