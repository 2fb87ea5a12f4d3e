"""The arguments of every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import mla_patch
from mla_patch import drive
from mla_patch.cli import ab, show
from mla_patch.cli.bench import bench
from mla_patch.cli.clean import clean
from mla_patch.cli.demo import demo
from mla_patch.cli.doctor import doctor
from mla_patch.cli.explain import explain
from mla_patch.cli.list import list_features
from mla_patch.cli.run import run
from mla_patch.cli.status import status
from mla_patch.cli.warmup import warmup
from mla_patch.compat import gpu

DESCRIPTION = (
    "mla-patch: check what the plugin would do on this machine, see what it did in an engine, and compare kernels."
)
_STATUS = "exit status: 0 fine, 1 a finding, 2 misuse, 3 an error of mla-patch itself, 130 interrupted"


WARM_BACKENDS = [backend for backends in drive.WARM_BACKENDS.values() for backend in backends]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(show.plain(message))


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mla-patch", description=DESCRIPTION, epilog=_STATUS)
    parser.add_argument("--version", action="version", version=f"mla-patch {mla_patch.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error of mla-patch itself comes from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command, name=name)
        sub.add_argument("--json", action="store_true", help="machine-readable output")
        return sub

    sub = add("doctor", doctor, "show what each feature would do on this machine, and why")
    _feature_option(sub)
    add("list", list_features, "list the features, the releases that they patch, and when they are no longer needed")
    sub = add("explain", explain, "show what a feature replaces in each release, and its state on this machine")
    sub.add_argument("feature", help="a name as `mla-patch list` shows it, such as kv_indices or kv_indices@sglang")
    sub.add_argument("--release", help="a release of the engine; default: the installed one")
    sub.add_argument("--sm", type=_capability, help="the GPU's compute capability, such as 90; default: this machine's")
    sub.add_argument("--heads", nargs="+", type=_heads, default=[16, 64, 128], help="query heads of one GPU: 1 to 128")
    sub = add("status", status, "show what the processes of a running engine report")
    sub.add_argument("directory", type=Path, help="the engine's MLA_PATCH_REPORT")
    sub.add_argument("--all", action="store_true", help="also show ended processes, and those that call nothing")
    sub.add_argument("--prune", action="store_true", help="first remove the reports of processes that have ended")
    sub = add("run", run, "run a command with the plugin on, even if Python does not read the start-up file")
    _feature_option(sub)
    sub.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD", help="the command and its arguments")
    sub = add("warmup", warmup, "compile the kernels that an engine on this machine can reach, before it starts")
    sub.add_argument("--heads", nargs="+", type=_heads, default=[16, 128], help="query heads of one GPU: 1 to 128")
    sub.add_argument(
        "--backend", nargs="+", choices=WARM_BACKENDS, default=["triton"],
        help="the engine's attention backends (dsa also means nsa); default: triton",
    )  # fmt: skip
    sub.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16", help="dtype of the model")
    sub.add_argument(
        "--cache", nargs="+", choices=[*drive.DTYPES], help="dtypes of the cache; default: the model's and e4m3"
    )
    sub.add_argument("--max-batch", type=_count, default=512, help="largest number of requests that decode at once")
    sub = add("bench", bench, "check our kernels and the installed engine's on the same inputs, then time both")
    sub.add_argument("kernel", choices=["decode", "page-table", "token-indices"])
    sub.add_argument("--heads", nargs="+", type=_heads, default=[], help="decode: query heads, 1 to 128")
    sub.add_argument("--dtype", nargs="+", choices=[*drive.DTYPES], default=[], help="decode: dtypes of the cache")
    sub.add_argument("--batch", nargs="+", type=_count, default=[], help="numbers of requests")
    sub.add_argument("--length", nargs="+", type=_count, default=[], help="tokens of each request")
    _fetch_option(sub)
    _add_ab(commands)
    sub = add("demo", demo, "patch the installed engine in a new interpreter, and compare its kernels with ours")
    _fetch_option(sub)
    add("clean", clean, "remove the releases that --fetch has downloaded, and nothing else")
    return parser


def _add_ab(commands: Any) -> None:
    """``ab`` and what belongs to it."""
    text = "control a running experiment, watch it, and read its verdict"
    kinds = commands.add_parser("ab", help=text, description=text).add_subparsers(required=True, metavar="WHAT")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command, kind=name, name=f"ab {name}")
        sub.add_argument("directory", type=Path, help="the engine's MLA_PATCH_REPORT")
        sub.add_argument("--run", help="name of a run; default: the newest")
        sub.add_argument("--json", action="store_true", help="machine-readable output")
        return sub

    def wait(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--wait", nargs="?", type=_seconds, const=30.0, metavar="SECONDS",
            help="wait until every rank has reached the step at which the command takes effect; default: at most 30 s",
        )  # fmt: skip

    for name, what in (("start", "run the schedule, beginning with its warmup"), ("stop", "run the engine's arm")):
        sub = add(name, ab.send, f"{what}, beginning at a step that no rank has reached yet")
        wait(sub)
        sub.add_argument("features", nargs="*", metavar="FEATURE", help="default: all features under test")
    sub = add("set", ab.send, "choose an arm, outside any comparison, or the share of the schedule")
    sub.add_argument("feature")
    sub.add_argument("setting", type=_setting, metavar="arm=NAME | ratio=SHARE")
    wait(sub)
    sub = add("watch", ab.watch, "show the state of an experiment repeatedly, without a verdict")
    sub.add_argument("--every", type=_seconds, default=2.0, metavar="SECONDS")
    sub.add_argument("--once", action="store_true", help="show it once")
    sub = add("report", ab.report, "show the verdict of each bucket, shadow errors and events")
    sub.add_argument("--html", type=Path, metavar="FILE", help="also write the run's page, which fetches nothing")


def _fetch_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fetch", metavar="VERSION", help="use this SGLang release: download it into a cache, without installing it"
    )


def _feature_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f", "--feature", action="append", default=[], metavar="NAME=MODE",
        help="override a feature's flag: kv_indices=off, decode@sglang=on",
    )  # fmt: skip


def _seconds(text: str) -> float:
    try:
        if 0 < float(text) < 1e6:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}, expected seconds, a number above 0")


def _setting(text: str) -> tuple[str, str | float]:
    kind, _, value = text.partition("=")
    if kind == "arm" and value:
        return kind, value
    try:
        if kind == "ratio" and 0 < float(value) < 1:
            return kind, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}, expected arm=NAME or ratio=SHARE, a share between 0 and 1")


def _number(most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a number from 1 to {most}")
        return int(text)

    return number


_heads, _count = _number(128), _number(2**24)


def _capability(text: str) -> tuple[int, int]:
    if not (text.isascii() and text.isdecimal() and 2 <= len(text) <= 3):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a compute capability without its dot, such as 90 or 120")
    found = int(text[:-1]), int(text[-1])
    if found not in gpu.CAPABILITIES:
        near = min(gpu.CAPABILITIES, key=lambda one: abs(one[0] * 10 + one[1] - int(text)))
        raise argparse.ArgumentTypeError(f"no NVIDIA GPU is sm_{text}; the nearest is sm_{near[0]}{near[1]}")
    return found
