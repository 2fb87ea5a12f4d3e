"""A small engine, a plugin for it, and fresh interpreters that see both.

``fakehost`` has what real engines have: callers that did ``from fakehost.ops import decode``, inherited methods, class
attributes, kernel objects, a namespace package on the way. ``fakeplug`` declares features for it as a stranger would,
through entry-point metadata. Nothing here imports torch.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import pytest
from scratch import ROOT, clean_env

ANNOUNCED = re.compile(r"mla-patch \S+, \w+ ")
HOST = {
    "fakehost/__init__.py": "",
    "fakehost/ops.py": """
        def decode(q, kv, scale=1.0):
            return "host"
    """,
    "fakehost/more.py": """
        def prefill(q):
            return "host"
    """,
    # fakehost/srt has no __init__.py, as sglang/srt has none
    "fakehost/srt/layers/__init__.py": "",
    "fakehost/srt/layers/attend.py": """
        def attend(q):
            return "host"
    """,
    "fakehost/layers.py": """
        class Base:
            def forward(self, q):
                return "host"

        class Backend(Base):
            pass

        class Other(Base):
            pass

        class Tools:
            @staticmethod
            def plan(q):
                return "host"

            @classmethod
            def make(cls, q):
                assert issubclass(cls, Tools)
                return "host"
    """,
    "fakehost/kernels.py": """
        from fakejit import jit

        @jit
        def indices(src, dst, n, BLOCK=64):
            dst.append("host")

        @jit
        def inner(dst):
            dst.append("host")

        @jit
        def outer(dst):
            inner(dst)
    """,
    "fakehost/caller.py": """
        from abc import ABC

        from fakehost.kernels import indices
        from fakehost.layers import Backend, Other, Tools
        from fakehost.more import prefill as fill
        from fakehost.ops import decode
        from fakehost.srt.layers.attend import attend

        class Static:
            decode = staticmethod(decode)

        class Abstract(ABC):
            decode = staticmethod(decode)

        class Keeper:
            def __init__(self):
                self.decode = decode

        def launch():
            dst = []
            indices[(1,)](None, dst, n=3)
            return dst[0]

        def run():
            return decode(1, kv=2)

        def run_all():
            return {
                "alias": run(),
                "static": Static.decode(1, 2),
                "instance static": Static().decode(1, 2),
                "abstract": Abstract.decode(1, 2),
                "kernel": launch(),
                "inherited": Backend().forward(1),
                "staticmethod": Tools.plan(1),
                "classmethod": Tools.make(q=1),
                "renamed": fill(1),
                "namespace": attend(1),
            }
    """,
    # a kernel object as Triton's, whose machinery lives in another package than the host
    "fakejit.py": """
        import inspect

        class Kernel:
            def __init__(self, fn):
                self.fn = fn
                self.__name__ = fn.__name__
                self.__module__ = fn.__module__
                self.arg_names = list(inspect.signature(fn).parameters)

            def __getitem__(self, grid):
                return lambda *args, **kwargs: self.run(*args, grid=grid, **kwargs)

            def run(self, *args, grid, **kwargs):
                return self.fn(*args, **kwargs)

            def warmup(self, *args, grid, **kwargs):
                return "warmed"

            def __call__(self, *args):
                return self.fn(*args)

        def jit(fn):
            return Kernel(fn)
    """,
    # what a test asks of the process
    "told.py": """
        import importlib, json, logging, sys, threading, types
        import mla_patch

        def row(name):
            return next(r for r in mla_patch.report()["features"] if name in (r["name"], r["name"] + "@" + r["host"]))

        def state(name="ops"):
            told = row(name)
            return f"{told['state']}: {told['reason']}" if told["reason"] else told["state"]

        def states(*names):
            print(*(row(name)["state"] for name in names))

        def serves():
            '''What all callers get: one word when they agree.'''
            import fakehost.caller
            found = fakehost.caller.run_all()
            return found.popitem()[1] if len(set(found.values())) == 1 else found

        def left():
            '''Names in the host that are not its own.'''
            from mla_patch.stand_ins import is_ours
            hosts = [m for n, m in sys.modules.items() if n.partition(".")[0] in ("fakehost", "sglang")]
            hosts += [c for m in hosts for c in vars(m).values() if isinstance(c, type)]
            return sorted(f"{h.__name__}.{n}" for h in hosts for n, v in vars(h).items()
                          if is_ours(getattr(v, "__func__", v)))
    """,
}

# The plugin's first lines; a test adds the features that it is about.
PLUGIN = """
from mla_patch.compat.types import Arm, Edit, Target, Variable
from mla_patch.features import Feature
from mla_patch.hookspecs import hookimpl


class Call:
    __slots__ = ("args", "options")

    def __init__(self, *args, **options):
        self.args = args
        self.options = options


def decode_call(q, kv, scale=1.0):
    return Call(q, kv, scale)


def one_call(q):
    return Call(q)


def method_call(self, q):
    return Call(q, owner=self)


def kernel_call(grid, src, dst, n, BLOCK=64):
    return Call(dst, grid=grid)


def inner_call(grid, dst):
    return Call(dst)


def serve(call):
    return "ours"


def serve_kernel(call):
    call.args[0].append("ours")


def serve_host(call):
    return "host"


def broken(call):
    raise RuntimeError("boom")


def target(module, name, params, bind, serve="serve", kind="call", **more):
    return Target(module, name, params, kind=kind, bind=bind, serve=f"fakeplug:{serve}", **more)


DECODE = target("fakehost.ops", "decode", ("q", "kv", "scale"), decode_call)
PREFILL = target("fakehost.more", "prefill", ("q",), one_call)
ATTEND = target("fakehost.srt.layers.attend", "attend", ("q",), one_call)
METHOD = target("fakehost.layers", "Backend.forward", ("self", "q"), method_call)
STATIC = target("fakehost.layers", "Tools.plan", ("q",), one_call)
CLASS = target("fakehost.layers", "Tools.make", ("cls", "q"), method_call)
KERNEL = target("fakehost.kernels", "indices", ("src", "dst", "n", "BLOCK"), kernel_call, "serve_kernel", "kernel")


def feature(name, *targets, host="fakehost>=1,<2", **more):
    told = {"why": "", "upstream": "", "drop_when": ""} | more
    return Feature(name, host, lambda version: targets, **told)


@hookimpl
def mla_patch_features():
    return FEATURES


"""

FEATURES = """
FEATURES = [
    feature("ops", DECODE),
    feature("kernel", KERNEL),
    feature("method", METHOD),
    feature("tools", STATIC, CLASS),
    feature("both", PREFILL, ATTEND),
]
"""


@dataclass
class FakeHost:
    """A folder on PYTHONPATH that holds the engine, the plugin and their metadata."""

    root: Path
    announced: list[str] = field(default_factory=list)  # by the process that was run last

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text))

    def change(self, path: str, old: str, new: str) -> None:
        text = (self.root / path).read_text()
        assert old in text
        (self.root / path).write_text(text.replace(old, new))

    def install(self, name: str, version: str, entry_points: str = "") -> None:
        """Metadata of a distribution that lies in this folder."""
        info = f"{name}-{version}.dist-info"
        self.write(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if entry_points:
            self.write(f"{info}/entry_points.txt", f"[mla_patch]\n{entry_points}\n")

    def plug(self, text: str) -> None:
        """Replace the plugin's features; ``text`` ends with ``FEATURES = [...]``."""
        self.write("fakeplug.py", PLUGIN + dedent(text))

    def run(
        self, code: str, env: Mapping[str, str | None] | None = None, door: bool = False, path: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run code in a fresh interpreter; with ``door`` it starts as MLA_PATCH=1 would start it."""
        head = "import mla_patch._autostart; mla_patch._autostart.run()\n" if door else ""
        # apart from the test's own folder, so that the tree's hooks and compat have one name each
        changes = {"PYTHONPATH": ":".join([*path, str(self.root), str(ROOT)]), "MLA_PATCH": "1" if door else None}
        done = subprocess.run(
            [sys.executable, "-c", head + "from told import *\n" + dedent(code)],
            env=clean_env(changes | dict(env or {})),
            cwd=self.root.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )
        # the line that every process writes when it imports an engine has tests of its own
        self.announced = [line for line in done.stderr.splitlines() if ANNOUNCED.match(line)]
        done.stderr = "".join(line for line in done.stderr.splitlines(keepends=True) if not ANNOUNCED.match(line))
        return done

    def says(
        self, code: str, env: Mapping[str, str | None] | None = None, door: bool = False, path: tuple[str, ...] = ()
    ) -> str:
        """What the code prints; it must succeed and complain of nothing."""
        done = self.run(code, env, door, path)
        assert (done.stderr, done.returncode) == ("", 0), done.stdout + done.stderr
        return done.stdout.strip()


@pytest.fixture
def fake_host(tmp_path: Path) -> FakeHost:
    made = FakeHost(tmp_path / "site")
    for path, text in HOST.items():
        made.write(path, text)
    made.install("fakehost", "1.5")
    made.install("fakeplug", "1.0", "fakeplug = fakeplug")
    made.plug(FEATURES)
    return made
