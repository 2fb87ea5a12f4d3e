"""Runs a program of ``mla_patch.drive`` in an interpreter of its own, in which the engine's modules are fresh."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from packaging.version import Version

from mla_patch.cli import here, show
from mla_patch.cli.exits import Misuse
from mla_patch.drive import sglang_fetch


def run_child(
    name: str, argv: Sequence[str], environ: dict[str, str], args: argparse.Namespace
) -> dict[str, Any] | None:
    """Run ``mla_patch.drive.<name>`` in an interpreter of its own, and give back its result; None where it failed."""
    if here.torch_gpu() is None:
        environ["TRITON_INTERPRET"] = "1"
    if args.fetch is not None:
        folders = fetched(name, args.fetch)
        environ["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", f"mla_patch.drive.{name}", *argv]
    result: dict[str, Any] | None = None
    with ProgressBar(args.json) as tell, tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                if line.startswith(f"{name} "):
                    message = json.loads(line.partition(" ")[2])
                    result = message.get("result", result)
                    tell(message)
            child.wait()
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if child.returncode or result is None:
        for line in said[-100:] if args.traceback else said[-1:]:
            show.complain(line)
        more = "" if args.traceback or len(said) < 2 else f"; `mla-patch --traceback {name} ...` shows all that it said"
        show.complain(f"{name}: its interpreter ended with status {child.returncode}{more}")
        return None
    return result


def fetched(name: str, release: str) -> list[str]:
    """The folders of a release that is fetched where it is missing."""
    try:
        # v0.5.18 and the like as its folder in the cache and what it needs are named by
        return [str(folder) for folder in sglang_fetch.fetch(str(Version(release)))]
    except ValueError:  # not a version, or one of more digits than Python reads
        raise Misuse(f"{name}: --fetch {release:.80}: expected a release of SGLang, such as 0.5.23") from None
    except (RuntimeError, OSError) as problem:
        said = str(problem).splitlines() or [repr(problem)]
        raise Misuse(f"{name}: --fetch {release}: {' '.join(dict.fromkeys([said[0], said[-1]]))}") from None


class ProgressBar:
    """A progress bar on a terminal, silence elsewhere."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import Progress

        self.bar = Progress(disable=quiet or not sys.stderr.isatty(), transient=True, console=show.console(stderr=True))

    def __enter__(self) -> Callable[[Mapping[str, Any]], None]:
        self.bar.start()
        task = self.bar.add_task("starting", total=None)

        def tell(message: Mapping[str, Any]) -> None:
            if "step" in message:
                self.bar.update(task, description=message["step"], completed=message["at"], total=message["of"])

        return tell

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()
