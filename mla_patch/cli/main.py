"""mla-patch: check what the plugin would do on this machine, see what it did in an engine, and compare kernels.

Exit status: 0 fine, 1 a finding, 2 misuse, 3 an error of mla-patch itself, 130 interrupted by Ctrl-C.
Every command has ``--json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from typing import Any, NoReturn

from packaging.version import Version

import mla_patch
from mla_patch import files, reports
from mla_patch import flags as flags_
from mla_patch import plugins as plugins_
from mla_patch.cli import explain as explain_
from mla_patch.cli import show
from mla_patch.cli.show import Line, Table
from mla_patch.cli.status import unsatisfied
from mla_patch.compat import gpu, hosts
from mla_patch.compat.types import Gpu, Host
from mla_patch.drive import sglang_fetch
from mla_patch.eligibility import Eligibility, check, code_of, nothing_active, release_here
from mla_patch.features import MEANING, Feature, State
from mla_patch.session import experiment, find_host

OK, FINDING, MISUSE, ERROR, INTERRUPTED = 0, 1, 2, 3, 130
_STATUS = "exit status: 0 fine, 1 a finding, 2 misuse, 3 an error of mla-patch itself, 130 interrupted"
ENTRY_POINT = "mla_patch"  # our name in the hosts' own plugin groups, and so in their filters
BOOTSTRAP = Path(__file__).parents[1] / "bootstrap"


class Misuse(Exception):
    """The command line cannot be acted on; the text says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Nothing but argparse's own exit leaves it as an exception."""
    _open_streams()
    args = None
    try:
        args = _parser().parse_args(argv)
        status = int(args.command(args))
        sys.stdout.flush()  # a full disk or a closed pipe is told here, not by the interpreter's last words
        return status
    except Misuse as problem:
        show.complain(str(problem))
        return MISUSE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # who read has read enough
        _drop_stdout()
        return OK
    except OSError as problem:  # of a disk, a descriptor, a child: the machine's
        show.complain(f"{args.name if args else ''}: {problem}")
        _drop_stdout()
        return ERROR
    except BaseException as problem:
        if args is None:  # argparse has said it
            with suppress(OSError):
                sys.stdout.flush()
                raise
            _drop_stdout()
            raise
        show.complain(f"{args.name}: {type(problem).__name__}: {problem}")
        if args.traceback:
            for line in traceback.format_exc().splitlines():
                show.complain(line)
        else:
            show.complain(f"this is an error of mla-patch itself; `mla-patch --traceback {args.name} ...` shows where")
        return ERROR


def _open_streams() -> None:
    """Streams that take any text, also where a caller has closed them, lest the next file gets their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # for the process's life
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_stdout() -> None:
    """Lose what stdout still holds: the interpreter would complain of it at its end."""
    with suppress(OSError, ValueError):
        stdout = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stdout)
        os.close(nowhere)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(show.plain(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mla-patch", description=(__doc__ or "").partition("\n")[0], epilog=_STATUS)
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
    sub.add_argument("--cache", nargs="+", choices=CACHES, help="dtypes of the cache; default: the model's and e4m3")
    sub.add_argument("--max-batch", type=_count, default=512, help="largest number of requests that decode at once")
    sub = add("bench", bench, "check our kernels and the installed engine's on the same inputs, then time both")
    sub.add_argument("kernel", choices=["decode", "page-table", "token-indices"])
    sub.add_argument("--heads", nargs="+", type=_heads, default=[], help="decode: query heads, 1 to 128")
    sub.add_argument("--dtype", nargs="+", choices=CACHES, default=[], help="decode: dtypes of the cache")
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
        sub = add(name, ab_send, f"{what}, beginning at a step that no rank has reached yet")
        wait(sub)
        sub.add_argument("features", nargs="*", metavar="FEATURE", help="default: all features under test")
    sub = add("set", ab_send, "choose an arm, outside any comparison, or the share of the schedule")
    sub.add_argument("feature")
    sub.add_argument("setting", type=_setting, metavar="arm=NAME | ratio=SHARE")
    wait(sub)
    sub = add("watch", ab_watch, "show the state of an experiment repeatedly, without a verdict")
    sub.add_argument("--every", type=_seconds, default=2.0, metavar="SECONDS")
    sub.add_argument("--once", action="store_true", help="show it once")
    sub = add("report", ab_report, "show the verdict of each bucket, shadow errors and events")
    sub.add_argument("--html", type=Path, metavar="FILE", help="also write the run's page, which fetches nothing")


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


CACHES = ("bf16", "fp16", "e4m3", "e5m2")
WARM_BACKENDS = ("triton", "flashmla", "dsa", "dsv4")  # of SGLang; dsa was called nsa to 0.5.12


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


def _fetch_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fetch", metavar="VERSION", help="use this SGLang release: download it into a cache, without installing it"
    )


def _feature_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f", "--feature", action="append", default=[], metavar="NAME=MODE",
        help="override a feature's flag: kv_indices=off, decode@sglang=on",
    )  # fmt: skip


# doctor, list, explain


def doctor(args: argparse.Namespace) -> int:
    """Judge every feature from source, import no engine."""
    plugins, flags = _read(args.feature)
    found = [one for one in map(find_host, hosts.HOSTS) if one is not None]
    device, unknown = gpu.for_engines()  # before the features, which may depend on it
    rows = [_would_be(feature, flags, plugins) for feature in plugins.features]
    report = {
        "version": mla_patch.__version__,
        "python": sys.version.split()[0],
        "torch": _version("torch"),
        "triton": _version("triton"),
        "gpu": None if device is None else asdict(device) | {"sm": device.sm},
        "gpu_unknown": unknown,
        "hosts": [{"name": h.host.name, "version": h.version, "reviewed": h.version in h.host.reviewed} for h in found],
        "findings": [*plugins.problems, *flags.problems, *_findings(found, flags, rows), *_unsatisfied(rows)],
        "notes": [note for one in found for note in _promised(one.host, plugins.features)],
        "features": rows,
    }
    if args.json:
        show.as_json(report)
    else:
        _show_doctor(report)
    return FINDING if report["findings"] else OK


def _promised(host: Host, features: Sequence[Feature]) -> list[str]:
    """What this environment makes the host promise about results, and who says what becomes of it."""
    names = [feature.name for feature in features if feature.host_name == host.name]
    asks = f"; `mla-patch explain` says what this means for {', '.join(names)}" if names else ""
    return [f"{host.name}, {text}{asks}" for text in hosts.promised(host)]


def list_features(args: argparse.Namespace) -> int:
    plugins = plugins_.load()
    rows = [
        {
            "feature": feature.name,
            "host": feature.host_name,
            "range": feature.requirement()[1],
            "upstream": feature.upstream,
            "drop_when": feature.drop_when,
            "default": feature.default,
        }
        for feature in plugins.features
    ]
    if args.json:
        show.as_json(rows)
        for problem in plugins.problems:  # the rows have no place for it
            show.complain(problem)
    else:
        show.table("features", ["feature", "host", "range", "default", "upstream", "drop_when"], rows)
        show.lines(plugins.problems, "yellow")
    return FINDING if plugins.problems else OK


def explain(args: argparse.Namespace) -> int:
    plugins, flags = _read([])
    features = [feature for feature in plugins.features if feature.matches(args.feature)]
    if not features:
        names = [name for feature in plugins.features for name in (feature.name, feature.label)]
        raise Misuse(f"{args.feature!r} is not a feature{flags_.nearest(args.feature, names)}")
    routes = [row for feature in features for row in explain_.routes(feature)]
    states = [_would_be(feature, flags, plugins) for feature in features]
    for row in states:
        row["meaning"] = MEANING[State(row["state"])]
    providers = [
        {"feature": feature.label, "provider": provider, "when": when}
        for feature in features
        for provider, when in feature.providers
    ]
    verdicts, serves = _elsewhere(features, flags, args)
    promises = [{"feature": feature.label, "text": feature.promises} for feature in features if feature.promises]
    if args.json:
        told: dict[str, Any] = {"feature": args.feature, "routes": routes, "states": states}
        more = {"providers": providers, "verdicts": verdicts, "serves": serves, "promises": promises}
        show.as_json(told | {name: rows for name, rows in more.items() if rows})
        return OK
    for feature in features:
        show.show(Line(f" {feature.why}", head=feature.label))
        show.lines(filter(None, [f"from {feature.upstream}", f"needed until {feature.drop_when}", feature.promises]))
    show.table("routes", ["host", "releases", "module", "name", "kind", "replaced_by"], routes)
    if providers:
        show.table("who serves a call (the first row that applies)", ["provider", "when"], providers)
    if verdicts:
        show.table("on that release and GPU", ["host", "release", "sm", "state", "reason"], verdicts)
    if serves:
        title = f"who serves by default, on {serves[0]['host']} {serves[0]['release']} and {serves[0]['sm']}"
        show.table(title, ["heads", "what", "who"], explain_.by_heads(serves))
    elif not (args.release and args.sm):
        show.lines(["for another release and GPU, pass both, such as --release 0.5.18 --sm 90"])
    show.table("on this machine", ["host", "flag", "value", "source", "state", "reason", "meaning"], states)
    return OK


def _elsewhere(
    features: Sequence[Feature], flags: flags_.Flags, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What becomes of the features on the release and GPU that are named, this machine's where one is not."""
    verdicts: list[dict[str, Any]] = []
    serves: list[dict[str, Any]] = []
    device = Gpu(f"sm_{args.sm[0]}{args.sm[1]}", args.sm) if args.sm else gpu.for_engines()[0]
    for feature in features:
        found = find_host(feature.host_name)
        here = release_here(feature, found) if found else None
        release: str | None = here if args.release is None else args.release
        if args.release is not None and not explain_.in_range(args.release, feature):
            raise Misuse(f"--release {args.release}: expected a version that is {feature.requirement()[1]}")
        if release is None:
            continue
        setting = flags.feature(feature)
        if args.release is not None or args.sm:
            verdicts.append(explain_.verdict(feature, setting, release, device))
        if device is not None and explain_.in_range(release, feature):
            serves += explain_.serves(feature, setting, release, device, args.heads)
    return verdicts, serves


def _read(chosen: Iterable[str]) -> tuple[plugins_.Plugins, flags_.Flags]:
    modes = {}
    for item in chosen:
        name, sign, mode = item.partition("=")
        if not sign:
            raise Misuse(f"--feature {item}: expected NAME=MODE, such as kv_indices=off")
        modes[name] = mode
    plugins = plugins_.load()
    return plugins, flags_.read(os.environ, plugins.features, modes)


def _would_be(feature: Feature, flags: flags_.Flags, plugins: plugins_.Plugins) -> dict[str, Any]:
    """The feature's row as a process of an engine on this machine would first report it."""
    setting = flags.feature(feature)
    skip = flags.on("MLA_PATCH_SKIP_VERSION_CHECK")
    host = find_host(feature.host_name)
    verdict = check(feature, setting, host, skip_version_check=skip)
    if setting.value in flags_.EXPERIMENTS and verdict.state is State.ARMED:
        try:
            experiment(feature, setting, flags, verdict, plugins)
        except ValueError as problem:
            verdict = Eligibility(State.REFUSED, str(problem))
    status = reports.FeatureStatus(feature.name, feature.host_name, feature.flag, setting.value, setting.source)
    status.state, status.reason = verdict.state, verdict.reason
    status.targets = [reports.TargetStatus(t.module, t.name, t.kind, code_of(t)) for t in verdict.targets]
    return status.as_dict(counts=False)


def _unsatisfied(rows: list[dict[str, Any]]) -> list[str]:
    """Features that were asked for and that no installed host gets. What has no host here at all is not missing."""
    return unsatisfied([row for row in rows if not _not_installed(row)])


def _not_installed(row: Mapping[str, Any]) -> bool:
    return row["state"] == State.ABSENT and find_host(row["host"]) is None


def _findings(found: Sequence[hosts.Installed], flags: flags_.Flags, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What about this interpreter and environment keeps the plugin out, or makes what it finds less sure."""
    findings = []
    active = flags.on("MLA_PATCH")
    if flags.on("MLA_PATCH_STRICT") and not active:
        findings.append("MLA_PATCH_STRICT is set but MLA_PATCH is not: nothing is active, so nothing is enforced")
    directory = flags.text("MLA_PATCH_REPORT")
    problem = files.directory_problem(directory) if directory else None
    if problem:
        findings.append(f"MLA_PATCH_REPORT={directory}: {problem}; no process would write a report")
    if sys.flags.no_site:
        findings.append("Python runs with -S and does not read the start-up file: use `mla-patch run`")
    elif active and not start_file():
        findings.append(
            "the start-up file mla_patch.pth is in no site directory: use `mla-patch run`, or install again"
        )
    for one in found:
        name = one.host.plugin_filter
        wanted = [part.strip() for part in os.environ.get(name, "").split(",") if part.strip()] if name else []
        if wanted and ENTRY_POINT not in wanted:
            findings.append(
                f"{name}={os.environ[name]} excludes {ENTRY_POINT}: only the start-up file can activate the plugin"
            )
        if one.note:
            findings.append(one.note)
    return findings + nothing_active(found, rows)


def start_file() -> Path | None:
    """The installed mla_patch.pth, where Python reads it at start."""
    import site

    for folder in [*site.getsitepackages(), site.getusersitepackages()]:
        path = Path(folder) / "mla_patch.pth"
        if folder in sys.path and path.exists():
            return path
    return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch_gpu() -> Any:
    try:
        return gpu.from_torch()
    except Exception:  # no torch, or one that does not load: a device that cannot be asked is none
        return None


# status


def status(args: argparse.Namespace) -> int:
    """What every process of an engine reports, and which processes do not."""
    from mla_patch.cli import status as status_

    try:
        pruned = status_.prune(args.directory) if args.prune else {}
        told = status_.look(args.directory) | pruned
    except (OSError, ValueError) as problem:
        raise Misuse(f"{args.directory}: {getattr(problem, 'strerror', None) or problem}") from None
    if args.json:
        show.as_json(told)
    else:
        show.show(*status_.blocks(args.directory, told, args.all))
    return FINDING if told["findings"] or told["missing"] else OK


# run


def run(args: argparse.Namespace) -> int:
    """Replace this process by the command, with the plugin on in it and in all its children."""
    command = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not command:
        raise Misuse("run: expected a command, as in `mla-patch run -- python -m sglang.launch_server ...`")
    plugins, flags = _read(args.feature)
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
    if start_file() is None:
        # a sitecustomize on the path is the one other file that every interpreter reads at start
        ours = [str(BOOTSTRAP), str(Path(mla_patch.__file__).parents[1])]
        environ["PYTHONPATH"] = os.pathsep.join([*ours, *filter(None, [environ.get("PYTHONPATH")])])
    interpreter = _interpreter(command, environ)
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
_ASKED = 30.0  # seconds


def _interpreter(command: Sequence[str], environ: Mapping[str, str]) -> list[str] | None:
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
            [*interpreter, "-c", _ASK], env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASKED
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as problem:
        show.complain(f"run: {interpreter[0]} cannot be asked whether it has the plugin: {problem}")
        return None
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return (lines[-1] if lines else f"exit status {done.returncode}") if done.returncode else None


# warmup


def warmup(args: argparse.Namespace) -> int:
    """Compile in this process; an engine finds the results in Triton's cache."""
    _need_triton("warmup")
    from mla_patch.cli import warmup as warmup_

    if args.cache is None:
        args.cache = [args.dtype, "e4m3"]
    for cache in args.cache:
        if cache in ("bf16", "fp16") and cache != args.dtype:
            raise Misuse(f"warmup: --cache {cache} with --dtype {args.dtype}, expected {args.dtype}, e4m3 or e5m2")
    device = _torch_gpu()
    result = warmup_.run(device, args.heads, args.dtype, args.cache, args.max_batch, args.backend)
    if args.json:
        show.as_json(result)
        return OK
    if result["kernels"]:
        show.table(
            f"compiled for {result['device']}", ["kernel", "heads", "cache", "compiled", "seconds"], result["kernels"]
        )
    show.lines(result["notes"])
    return OK


def _need_triton(command: str) -> None:
    if util.find_spec("torch") is None or util.find_spec("triton") is None:
        raise Misuse(
            f"{command}: it needs torch and triton; on a machine without a GPU: pip install 'mla-patch[triton]'"
        )


# bench


def bench(args: argparse.Namespace) -> int:
    """Measure in a fresh interpreter, in which the engine's kernels are its own."""
    _need_triton("bench")
    for name in ("heads", "dtype"):
        if args.kernel != "decode" and getattr(args, name):
            raise Misuse(f"bench {args.kernel}: --{name} is for decode")
    if _torch_gpu() is None and "bf16" in args.dtype:
        raise Misuse(
            "bench: --dtype bf16 without a GPU: in Triton's interpreter the engine's kernel multiplies bf16 wrongly; "
            "expected fp16"
        )
    options = {name: getattr(args, name) for name in ("kernel", "heads", "batch", "length", "dtype")}
    environ = {name: value for name, value in os.environ.items() if name != "MLA_PATCH"}
    result = _child("bench", [json.dumps(options)], environ, args)
    if result is None:
        return FINDING
    if args.json:
        show.as_json(result)
    else:
        _show_bench(result)
    return OK if result["right"] and not result["findings"] else FINDING


# ab


def ab_send(args: argparse.Namespace) -> int:
    """Send a command; it holds from a step that no rank has reached."""
    from mla_patch.cli import ab
    from mla_patch.experiment.control_file import ControlError

    kind, value = args.setting if args.kind == "set" else (args.kind, None)
    features = [args.feature] if args.kind == "set" else args.features
    try:
        told = ab.command(args.directory, args.run, kind, features, value, args.wait)
    except (ab.NotThere, ControlError, ValueError, OSError) as problem:
        raise Misuse(f"ab {args.kind}: {problem}") from None
    if args.json:
        show.as_json(told)
        return FINDING if told["findings"] else OK
    for one in told["commands"]:
        what = f"{kind} {value}" if value is not None else kind
        show.lines([f"{one['feature']}: {what}, from step {one['at']} of run {told['run']} on"])
    if not told["findings"]:
        reached = all(row["reached"] for row in told["ranks"])
        show.lines([f"{len(told['ranks'])} rank(s) have {'reached that step' if reached else 'read the command'}"])
    show.lines([f"finding: {text}" for text in told["findings"]], "yellow")
    return FINDING if told["findings"] else OK


def ab_watch(args: argparse.Namespace) -> int:
    """Look again and again, until interrupted."""
    from mla_patch.cli import ab
    from mla_patch.experiment.control_file import ControlError

    def look() -> dict[str, Any]:
        try:
            return ab.snapshot(args.directory, args.run)
        except (ab.NotThere, ControlError, OSError) as problem:
            raise Misuse(f"ab watch: {problem}") from None

    if args.json:
        show.as_json(look())
    elif args.once:
        show.show(*_watched(look()))
    else:
        with suppress(KeyboardInterrupt):
            show.keep_showing(lambda: _watched(look()), args.every)
    return OK


def _watched(told: Mapping[str, Any]) -> list[Line | Table]:
    under = "; ".join(f"{name}: {', '.join(arms)}" for name, arms in told["features"].items())
    last = told["commands"][-1] if told["commands"] else None
    says = [f"run {told['run']}, {under}", "no verdict while it runs: use `mla-patch ab report` once, at the end"]
    if last:
        says.append(f"last command: {last['feature']} {last['kind']} {last['value'] or ''} from step {last['at']}")
    says += [_note(note) for note in told["notes"]]
    parts: list[Line | Table] = [*map(Line, says), Table("ranks", ["rank", "step", "heard_s"], told["ranks"])]
    if told["buckets"]:
        rows = [row | {"median_us": f"{row['median_us']:.1f}"} for row in told["buckets"]]
        parts.append(Table("steps compared", ["feature", "bucket", "arm", "steps", "median_us"], rows))
    if told["shadow"]:
        rows = [_errors(row) for row in told["shadow"]]
        parts.append(Table("shadow checks", ["feature", "comparisons", "median", "worst", "nan"], rows))
    return parts


def _note(note: Mapping[str, Any]) -> str:
    return f"step {note['step']}: {note['feature']} {note['what']}: {note['text']}"


def _errors(row: Mapping[str, Any]) -> dict[str, Any]:
    told = {
        name: None if value is None else f"{value:.3g}"
        for name, value in (("median", row["relative"]["0.5"]), ("worst", row["relative"]["1.0"]))
    }
    return {**row, **told}


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def ab_report(args: argparse.Namespace) -> int:
    from mla_patch.cli import ab
    from mla_patch.experiment import analysis

    try:
        told = ab.report(args.directory, args.run)
        if args.html:
            files.export(args.html, ab.page(args.directory, told))
    except (ab.NotThere, OSError) as problem:
        raise Misuse(f"ab report: {problem}") from None
    if args.json:
        show.as_json(told)
        return FINDING if told["findings"] else OK
    for run in told["runs"]:
        differed = f", {run['differed']} on which ranks differed" if run["differed"] else ""
        show.show(Line(f" {run['steps']} steps, {len(run['ranks'])} rank(s){differed}", head=f"run {run['run']}"))
        enough, few = analysis.by_groups(run["comparisons"])
        rows = [{**one, "host": _us(one["host_us"]), "arm_us": _us(one["arm_us"])} for one in enough]
        if rows:
            show.table("verdicts", ["feature", "bucket", "arm", "host", "arm_us", "text"], rows)
        if few:
            show.lines([analysis.in_few_groups(few)])
        if run["shadow"]:
            columns = ["feature", "comparisons", "median", "worst", "nan"]
            show.table("shadow checks", columns, [_errors(row) for row in run["shadow"]])
        show.lines(map(_note, run["notes"]))
    show.lines([f"finding: {text}" for text in told["findings"]], "yellow")
    if args.html:
        show.lines([f"written: {args.html}"])
    return FINDING if told["findings"] else OK


# demo


def demo(args: argparse.Namespace) -> int:
    """Run the demonstration in a fresh interpreter, as an engine's process would start."""
    _need_triton("demo")
    if args.fetch is not None:
        _demo_takes(args.fetch)
    result = _child("demo", [], dict(os.environ) | {"MLA_PATCH": "1"}, args)
    if result is None:
        return FINDING
    if args.json:
        show.as_json(result)
    else:
        _show_demo(result)
    return OK if result["equal"] else FINDING


def clean(args: argparse.Namespace) -> int:
    """Remove the cache of fetched releases, which an uninstall leaves."""
    try:
        told = sglang_fetch.clean()
    except RuntimeError as problem:
        raise Misuse(f"clean: {problem}") from None
    if args.json:
        show.as_json(told)
        return OK
    if not told["removed"]:
        show.lines([f"nothing to remove in {told['directory']}"])
    else:
        many = f"{len(told['removed'])} folders" if len(told["removed"]) > 1 else "1 folder"
        show.lines([f"removed {many}, {told['bytes'] / 1e6:.0f} MB, from {told['directory']}"])
    if told["left"]:
        show.lines([f"kept, because it is not from mla-patch: {', '.join(told['left'])}"])
    return OK


def _fetched(name: str, release: str) -> list[str]:
    """The folders of a release that is fetched where it is missing."""
    try:
        # v0.5.18 and the like as its folder in the cache and what it needs are named by
        return [str(folder) for folder in sglang_fetch.fetch(str(Version(release)))]
    except ValueError:  # not a version, or one of more digits than Python reads
        raise Misuse(f"{name}: --fetch {release:.80}: expected a release of SGLang, such as 0.5.23") from None
    except (RuntimeError, OSError) as problem:
        said = str(problem).splitlines() or [repr(problem)]
        raise Misuse(f"{name}: --fetch {release}: {' '.join(dict.fromkeys([said[0], said[-1]]))}") from None


def _demo_takes(release: str) -> None:
    """Refuse a release that no feature of the demonstration is applied to."""
    from mla_patch.cli.demo import DECODE, FEATURE

    plugins, flags = _read([])
    for feature in plugins.features:
        shown = feature.label in (DECODE, FEATURE)
        if shown and not flags.on("MLA_PATCH_SKIP_VERSION_CHECK") and not explain_.in_range(release, feature):
            range_ = feature.requirement()[1]
            raise Misuse(f"demo: --fetch {release:.80}: {feature.name} is for SGLang {range_}, such as 0.5.23")


def _child(name: str, argv: Sequence[str], environ: dict[str, str], args: argparse.Namespace) -> dict[str, Any] | None:
    """Run ``mla_patch.<name>`` in an interpreter of its own, and give back its result; None where it failed."""
    if _torch_gpu() is None:
        environ["TRITON_INTERPRET"] = "1"
    if args.fetch is not None:
        folders = _fetched(name, args.fetch)
        environ["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", f"mla_patch.cli.{name}", *argv]
    result: dict[str, Any] | None = None
    with _progress(args.json) as tell, tempfile.TemporaryFile("w+", errors="replace") as errors:
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


# printing


def _show_doctor(report: Mapping[str, Any]) -> None:
    device = report["gpu"]
    shown = f"{device['name']} ({device['sm']}, driver {device['driver'] or 'unknown'})" if device else "none"
    shown = f"unknown: {report['gpu_unknown']}" if report["gpu_unknown"] else shown
    versions = f"  Python {report['python']}  torch {report['torch']}  Triton {report['triton']}  GPU {shown}"
    show.show(Line(versions, head=f"mla-patch {report['version']}"))
    for host in report["hosts"]:
        note = "" if host["reviewed"] else " (unreviewed)"
        show.lines([f"{host['name']} {host['version'] or 'of an unknown version'}{note}"])
    if not report["hosts"]:
        show.lines(["no engine is installed here"])
    value = os.environ.get("MLA_PATCH")
    if value is None or value.strip().lower() in mla_patch.OFF:
        off = "is not set" if value is None else f"is {value!r}, which means off"
        show.lines([f"MLA_PATCH {off}: an engine that starts here runs without the plugin. With MLA_PATCH=1:"], "dim")
    columns = ["name", "host", "flag", "value", "source", "state", "reason"]
    show.table("features", columns, report["features"])
    targets = [{"feature": f["name"], **target} for f in report["features"] for target in f["targets"]]
    if targets:
        show.table("entry points", ["feature", "module", "name", "kind", "replaced_by"], targets)
    show.lines([f"note: {text}" for text in report["notes"]])
    show.lines([f"finding: {text}" for text in report["findings"]], "yellow")


def _show_demo(result: Mapping[str, Any]) -> None:
    show.show(Line(f" on {result['device']}", head=result["host"] or "no engine installed"))
    if result["targets"]:
        show.table("patched", ["module", "name", "replaced_by"], result["targets"])
    rows = [row | {f"error_{side}": error for side, error in row.get("error", {}).items()} for row in result["routes"]]
    columns = ["route", "builder", "equal", "error_host", "error_ours", "us_host", "us_ours"]
    show.table("same input, both kernels", columns, rows)
    equal, style = ("equal", "green") if result["equal"] else ("NOT equal", "red")
    show.lines([f"our kernels served {result['served']} calls of the engine; outputs {equal}"], style)
    show.lines(result["notes"])


def _show_bench(result: Mapping[str, Any]) -> None:
    show.show(Line(f", {result['host'] or 'no engine installed'}, on {result['device']}", head=result["kernel"]))
    rows = []
    for case in result["cases"]:
        us, told = case["us"], case.get("error") or case.get("equal") or {}
        ratio = f"{us['host'] / us['ours']:.2f}x" if us["host"] and case["gbps"] else None
        share = f"{case['of_copy']:.0%}" if case["of_copy"] else None
        rows.append({
            "case": case["case"], "host us": us["host"], "ours us": us["ours"], "host / ours": ratio,
            "GB/s": case["gbps"], "of a copy": share, "host": told.get("host"), "ours": told.get("ours"),
        })  # fmt: skip
    title = "median of each; host and ours: relative error" if result["kernel"] == "decode" else "host and ours: equal"
    show.table(title, ["case", "host us", "ours us", "host / ours", "GB/s", "of a copy", "host", "ours"], rows)
    right, style = ("right", "green") if result["right"] else ("NOT right", "red")
    copy = f", a copy reaches {result['copy_gbps']} GB/s" if result["copy_gbps"] else ""
    show.lines([f"our kernel is {right}; an empty launch takes {result['floor_us']} us{copy}"], style)
    show.lines(result["notes"])
    show.lines([f"finding: {text}" for text in result["findings"]], "yellow")


class _progress:
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
