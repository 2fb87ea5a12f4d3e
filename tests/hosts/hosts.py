"""Which SGLang releases are run, and how: one process each, its answers kept for the whole test session.

A test that needs a process of a release takes a fixture (`seen`, or `kept` with what it calls) that starts the process
and keeps what it wrote. Its id begins with the release: then all tests that look at the process run in one worker, and
other workers import other releases meanwhile (`process_of`). A new kind of process needs nothing more than a script and
`kept_by`. The process is forked from one that has imported torch, transformers and the like (`preloaded.py`); importing
the release still takes 2 s of CPU, so use one process for many assertions.

    python tests/hosts/hosts.py    fetch those of HOSTS, and nothing else

HOSTS    "spread" (a release of every era, the default), "all", or releases by name: HOSTS=0.5.11,0.5.23
HOSTS_CACHE    where releases are unpacked, about 1.5 GB for all of them
"""

from __future__ import annotations

import ast
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import preloaded
from packaging.version import Version

from mla_patch.drive.sglang_fetch import fetch

HERE = Path(__file__).parent
IMPORTERS = json.loads((HERE / "importers.json").read_text())
REVIEWED = tuple(dict.fromkeys(release for eras in IMPORTERS.values() for era in eras for release in era["releases"]))
SPREAD = ("0.5.1", "0.5.3", "0.5.5", "0.5.9", "0.5.11", "0.5.12", "0.5.13", "0.5.15", "0.5.16", "0.5.18", "0.5.20")
SPREAD += ("0.5.22", "0.5.23")

# kernel packages whose wrappers of FlashMLA are read and driven, and a release over each; a wheel of sglang-kernel is
# 320 to 380 MB, of which 20 KB are kept
WHEELS = {
    "sglang-kernel 0.4.3": "0.5.13",
    "sglang-kernel 0.4.5": "0.5.16",
    "sglang-kernel 0.4.10": "0.5.22",
    "sgl-flash-mla 1.0.0": "0.5.23",
}
WHEEL_FILES = r"^(sgl_kernel/flash_mla\.py|flash_mla/(\w+\.py|VERSION)|[^/]+\.dist-info/METADATA)$"

# At import it asserts that its kernels are compiled ones, which under the interpreter none is.
PYTHON_OPTIONS = {"0.5.4": ["-O"]}

# read without scales; stored without and read with; divided when stored
UNSCALED = tuple(release for release in REVIEWED if Version(release) < Version("0.5.10"))
MISREAD = ("0.5.10", "0.5.11")

DETERMINISTIC = Version("0.5.3")  # the first with --enable-deterministic-inference

# (release, route): what is wrong in the release itself, so that its own result is no measure
FAULTS = {
    **{
        (
            release,
            "trtllm_mla_backend page 32",
        ): "it fills 64 of the 128 pages for each 4096 tokens, so the end of a row is missing"
        for release in ("0.5.1", "0.5.2", "0.5.3")
    },
}


def chosen() -> tuple[str, ...]:
    """The releases that this run is about."""
    asked = os.environ.get("HOSTS") or "spread"
    if asked == "spread":
        return SPREAD
    if asked == "all":
        return REVIEWED
    releases = tuple(asked.replace(",", " ").split())
    unknown = set(releases) - set(REVIEWED)
    if unknown:
        raise ValueError(f"HOSTS names {', '.join(sorted(unknown))}; known are spread, all, {', '.join(REVIEWED)}")
    return releases


def process_of(nodeid: str) -> str:
    """The process that a test looks at, by the test's id: its module, and its first parameter where it has one."""
    module, _, test = nodeid.partition("::")
    _, _, given = test.partition("[")
    return f"{module} {given.removesuffix(']').partition('-')[0]}" if given else nodeid


def place_of(nodeid: str) -> int:
    """A key that puts tests in the order of the releases that they look at; those of none come last."""
    given = process_of(nodeid).partition(" ")[2].partition(" ")[0]
    release = next((one for wheel, one in WHEELS.items() if wheel in nodeid), given)
    return REVIEWED.index(release) if release in REVIEWED else len(REVIEWED)


def builders(release: str) -> dict[str, dict]:
    """Each index builder's home, parameters and importers in ``release``, as they were reviewed."""
    return {name: era for name, eras in IMPORTERS.items() for era in eras if release in era["releases"]}


def environment(release: str, *first: Path) -> dict[str, str]:
    """For a process that imports ``release`` on a CPU, with ours activated; ``first`` lie before it on the path."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MLA_PATCH", "SGLANG_"))}
    # a release is imported by one process after the other: keep its bytecode
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    path = os.pathsep.join(map(str, (*first, *fetch(release))))
    return env | {"CUDA_VISIBLE_DEVICES": "", "MLA_PATCH": "1", "PYTHONPATH": path, "TRITON_INTERPRET": "1"}


def start(
    script: str, release: str, out: Path, *arguments: str, env: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Run ``script`` in a process of ``release``, and return what it wrote to ``out`` and what it said as "stderr".

    The process is a fork (see ``preloaded.py``), or a fresh interpreter where that is to have ``options``.
    """
    command = [str(HERE / f"{script}.py"), release, str(out), *arguments]
    env = environment(release) if env is None else env
    if options:
        done = subprocess.run(
            [sys.executable, *options, *command], env=env, cwd=out.parent, capture_output=True, text=True, timeout=300
        )
    else:
        done = preloaded.run(command, env, out.parent, tuple(map(str, fetch(release)[1:])))
    if not out.exists():
        raise RuntimeError(f"SGLang {release}: {script} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return json.loads(out.read_text()) | {"stderr": done.stderr}


def kept_by(
    script: str, release: str, kept: Path, *arguments: str, env: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """What ``start`` returns; told again from the folder ``kept`` to whichever test worker asks again."""
    answer = kept / f"{'-'.join((script, release, *arguments))}.json"
    with open(answer.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not answer.exists():
            with tempfile.TemporaryDirectory(dir=kept) as scratch:
                told = start(script, release, Path(scratch, "seen.json"), *arguments, env=env, options=options)
            answer.write_text(json.dumps(told))
    return json.loads(answer.read_text())


def run(release: str, kept: Path) -> dict[str, Any]:
    """What ``child.py`` saw in ``release``."""
    env = environment(release)
    env["MLA_PATCH_DECODE"] = "on"  # forced, where the release has an MLA decode of its own
    return kept_by("child", release, kept, env=env, options=PYTHON_OPTIONS.get(release, ()))


def imports_of(source: str) -> dict[str, tuple[str, str]]:
    """Names that a module takes from others at its top level, in whatever branch: name -> (module, name there)."""
    names = {}
    nodes = list(ast.parse(source).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, (ast.If, ast.Try)):
            nodes += [*node.body, *node.orelse, *getattr(node, "finalbody", [])]
            nodes += [inner for handler in getattr(node, "handlers", []) for inner in handler.body]
    return names


def comes_from(root: Path, module: str, name: str, home: str) -> bool:
    """Does the source of ``module`` take ``name`` from ``home``, or from a module that takes it from there?"""
    seen = set()
    while module != home and module not in seen:
        seen.add(module)
        path = root.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.exists():
            return False
        module, name = imports_of(path.read_text(encoding="utf-8")).get(name, ("", ""))
    return module == home


def importers_in(root: Path, builder: str) -> set[str]:
    """Every module of the package that names ``builder`` in an import from another module."""
    found = set()
    for path in root.joinpath("sglang").rglob("*.py"):
        source = path.read_text(encoding="utf-8", errors="replace")
        if builder in source and any(
            isinstance(node, ast.ImportFrom) and builder in {alias.name for alias in node.names}
            for node in ast.walk(ast.parse(source))
        ):
            found.add(".".join(path.relative_to(root).with_suffix("").parts))
    return found


if __name__ == "__main__":
    for one in chosen():
        fetch(one)
