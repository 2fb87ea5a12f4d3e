"""Scratch environments for the tests and for start_cost.py: this tree's wheel, and bare interpreters to put it into."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
DEPENDENCIES = ("packaging", "pluggy", "rich", "wrapt")  # all of ours but torch, which no start-up path may need


def is_installed() -> bool:
    """Whether this tree is installed here; else, as `make gpu` runs it, children are given it by PYTHONPATH."""
    try:
        importlib.metadata.distribution("mla-patch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def clean_env(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment without our flags or Python's; a change to None removes the name."""
    # PYTHONDONTWRITEBYTECODE, for one, would have every start compile what an installed package has compiled
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MLA_PATCH", "PYTHON"))}
    if not is_installed():
        env["PYTHONPATH"] = str(ROOT)
    for name, value in (changes or {}).items():
        if value is None:
            env.pop(name, None)
        else:
            env[name] = value
    return env


def build(source: Path, out: Path, *kinds: str) -> Path:
    """Build from ``source`` with the tools installed here; ``kinds`` none: an sdist, and the wheel from that."""
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        out,
        *(f"--{kind}" for kind in kinds),
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_env())
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.tar.gz" if kinds == ("sdist",) else "*.whl"))


def fake_wheel(folder: Path, name: str, version: str, requires: Iterable[str] = ()) -> Path:
    """An importable distribution with nothing in it but its metadata."""
    info = f"{name}-{version}.dist-info"
    metadata = "".join(
        [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", *(f"Requires-Dist: {r}\n" for r in requires)]
    )
    files = {
        f"{name}.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for inner, text in files.items():
            wheel.writestr(inner, text)
    return path


@dataclass
class Scratch:
    """A virtual environment that shares nothing with this one but what is linked into it by name."""

    root: Path

    @classmethod
    def make(cls, root: Path, links: Iterable[str] = ()) -> "Scratch":
        venv.EnvBuilder(symlinks=True, with_pip=False).create(root)
        scratch = cls(root)
        scratch.link(links)
        return scratch

    @property
    def python(self) -> str:
        return str(self.root / "bin" / "python")

    @cached_property
    def site(self) -> Path:
        return next(self.root.glob("lib/python*/site-packages"))

    def run(
        self, *args: str | Path, env: Mapping[str, str | None] | None = None, cwd: Path | None = None, **options
    ) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python, away from the repository."""
        options = {"capture_output": True, "text": True, "timeout": 120} | options
        return subprocess.run([self.python, *args], env=clean_env(env), cwd=cwd or self.root, **options)

    def pip(self, *args: str | Path) -> str:
        """Run pip on this environment, with no index: what is not given to it cannot be had."""
        # an explicit empty file: a machine's own pip settings may add places to look in
        env = {name: None for name in os.environ if name.startswith("PIP_")} | {"PIP_CONFIG_FILE": os.devnull}
        command = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", *args]
        done = subprocess.run(command, capture_output=True, text=True, env=clean_env(env), cwd=self.root)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def unpack(self, wheel: Path) -> None:
        """What installing does, less the scripts: enough for a process that only starts, and much faster."""
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(self.site)

    def link(self, names: Iterable[str]) -> None:
        """Make distributions of this environment, and what they need, importable there."""
        todo, seen = list(names), set()
        while todo:
            name = canonicalize_name(todo.pop())
            if name in seen:
                continue
            seen.add(name)
            dist = importlib.metadata.distribution(name)
            for top in {file.parts[0] for file in dist.files or ()} - {"..", "__pycache__"}:
                source = Path(str(dist.locate_file(top)))
                # a start-up file would run there what is being tested here
                if source.suffix not in (".pth", ".start") and not (self.site / top).exists():
                    (self.site / top).symlink_to(source)
            for line in dist.requires or ():
                need = Requirement(line)
                if need.marker is None or need.marker.evaluate({"extra": ""}):
                    todo.append(need.name)

    def files(self) -> dict[str, bytes | str]:
        """Everything in it but bytecode, so that two moments can be compared."""
        found: dict[str, bytes | str] = {}
        for folder, folders, names in os.walk(self.root):
            if "__pycache__" in folders:
                folders.remove("__pycache__")
            for name in [*names, *folders]:
                path = Path(folder, name)
                where = str(path.relative_to(self.root))
                if path.is_symlink():
                    found[where] = os.readlink(path)
                else:
                    found[where] = "folder" if path.is_dir() else path.read_bytes()
        return found


def copy_tree(to: Path) -> Path:
    """A copy of the sources, links kept, without what tools and builds leave."""
    ignore = shutil.ignore_patterns(".*", "__pycache__", "dist", "build", "tests", "docs", "bench")
    return Path(shutil.copytree(ROOT, to, symlinks=True, ignore=ignore))
