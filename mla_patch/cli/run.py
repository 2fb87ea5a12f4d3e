"""``mla-patch run``: run a command with the plugin on, even if Python does not read the start-up file."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import mla_patch
from mla_patch.cli import here, show
from mla_patch.cli.exits import OK, Misuse

BOOTSTRAP = Path(__file__).parents[1] / "bootstrap"


def run(args: argparse.Namespace) -> int:
    """Replace this process by the command, with the plugin on in it and in all its children."""
    command = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not command:
        raise Misuse("run: expected a command, as in `mla-patch run -- python -m sglang.launch_server ...`")
    plugins, flags = here.read_flags(args.feature)
    if flags.problems:
        raise Misuse("; ".join(flags.problems))
    environ = dict(os.environ)
    if not flags.on("MLA_PATCH"):
        environ["MLA_PATCH"] = "1"
    for item in args.feature:
        name, _, mode = item.partition("=")
        for feature in plugins.features:
            if feature.matches(name):
                environ[feature.flag] = mode
    if here.start_file() is None:
        # a sitecustomize on the path is the one other file that every interpreter reads at start
        ours = [str(BOOTSTRAP), str(Path(mla_patch.__file__).parents[1])]
        environ["PYTHONPATH"] = os.pathsep.join([*ours, *filter(None, [environ.get("PYTHONPATH")])])
    interpreter = python_of(command, environ)
    problem = _inactive(interpreter, environ) if interpreter else None
    if interpreter and problem:
        raise Misuse(f"run: {interpreter[0]} would run without the plugin ({problem}): install mla-patch there")
    if args.json:
        changed = {key: value for key, value in environ.items() if os.environ.get(key) != value}
        show.as_json({"command": command, "environment": changed})
        return OK
    try:
        os.execvpe(command[0], command, environ)
    except (OSError, ValueError) as problem:
        raise Misuse(f"run: {command[0]}: {getattr(problem, 'strerror', None) or problem}") from None


_PYTHON = re.compile(r"(python|pypy)[0-9.]*[a-z]?")  # python3.13t, for one, is free-threaded


# the working directory is not yet on the path when Python reads its start-up files
_ASK = """import sys
sys.path[:] = filter(None, sys.path)
import mla_patch.patcher, mla_patch.plugins, mla_patch.startup
mla_patch.startup.started() or sys.exit("no start-up file of mla-patch is read")"""

ASKED = 30.0  # seconds


def python_of(command: Sequence[str], environ: Mapping[str, str]) -> list[str] | None:
    """The Python that ``command`` runs and its options; None where its name and its first lines do not tell."""
    path = shutil.which(command[0], path=environ.get("PATH"))
    if path is None or not os.path.isfile(path):
        return None
    if _PYTHON.fullmatch(os.path.basename(path)):
        return [path, *_options(command[1:])]
    try:
        with open(path, "rb") as file:
            first, second = (file.readline(4096).decode(errors="replace") for _ in range(2))
        words = shlex.split(first[2:]) if first.startswith("#!") else []
        if words and second.startswith("'''exec' "):  # how installers write a path that is too long for a first line
            words = shlex.split(second[len("'''exec' ") :])[:1]
    except (OSError, ValueError):
        return None
    if words and os.path.basename(words[0]) == "env":
        words = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
    found = shutil.which(words[0], path=environ.get("PATH")) if words else None
    if found is None or not _PYTHON.fullmatch(os.path.basename(found)):
        return None
    return [found, *_options(words[1:])]


def _options(argv: Sequence[str]) -> list[str]:
    """Python's own options at the beginning of its arguments; -S, for one, keeps start-up files from being read."""
    options: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("-") or word in ("-", "-c", "-m"):
            break
        if not word.startswith("--") and word[-1] in "cm":  # -Im
            options.append(word[:-1])
            break
        options += [word, next(words, "")] if word in ("-X", "-W", "--check-hash-based-pycs") else [word]
    return options


def _inactive(interpreter: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """Why the plugin is not active in a Python that starts so; None: it is, or that cannot be told."""
    try:
        done = subprocess.run(
            [*interpreter, "-c", _ASK], env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=ASKED
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as problem:
        show.complain(f"run: {interpreter[0]} cannot be asked whether it has the plugin: {problem}")
        return None
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return (lines[-1] if lines else f"exit status {done.returncode}") if done.returncode else None
