"""``mla-patch``: what would happen on this machine, what did happen in an engine, and proof of it.

Exit status: 0 fine, 1 a finding, 2 misuse. Every command has ``--json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from typing import Any

import mla_patch
from mla_patch import flags as flags_
from mla_patch import plugins as plugins_
from mla_patch import reports
from mla_patch.compat import gpu, hosts, sglang_fetch
from mla_patch.features import MEANING, SATISFIED, Feature, State
from mla_patch.judge import Judgement, code_of, judge
from mla_patch.startup import HostFinder, experiment, find_host

OK, FINDING, MISUSE = 0, 1, 2
ENTRY_POINT = "mla_patch"  # our name in the hosts' own plugin groups, and so in their filters
BOOTSTRAP = Path(__file__).parent / "bootstrap"


class Misuse(Exception):
    """The command line cannot be acted on; the text says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return int(args.command(args))
    except Misuse as problem:
        print(f"mla-patch: {problem}", file=sys.stderr)
        return MISUSE
    except BrokenPipeError:
        sys.stderr.close()
        return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mla-patch", description=__doc__.partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"mla-patch {mla_patch.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true", help="machine-readable output")
        return sub

    sub = add("doctor", doctor, "what each feature would do on this machine, and why")
    _feature_option(sub)
    add("list", list_features, "every feature, the releases it is for, and when it can go")
    sub = add("explain", explain, "where a feature goes in each release, and how it stands here")
    sub.add_argument("feature", help="a name as `mla-patch list` shows it, such as kv_indices or kv_indices@sglang")
    sub.add_argument("--release", help="of the host, to be told who serves there; default: what is installed")
    sub.add_argument("--sm", type=_capability, help="the GPU's compute capability, such as 90; default: this machine's")
    sub.add_argument("--heads", nargs="+", type=_heads, default=[16, 64, 128], help="query heads of one GPU: 1 to 128")
    sub = add("status", status, "what the processes of a running engine report")
    sub.add_argument("directory", type=Path, help="the engine's MLA_PATCH_REPORT")
    sub = add("run", run, "run a command with the plugin on, even where the start-up file is not read")
    _feature_option(sub)
    sub.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD", help="the command and its arguments")
    sub = add("warmup", warmup, "compile what an engine on this machine can reach, so that nothing compiles in it")
    sub.add_argument("--heads", nargs="+", type=_heads, default=[16, 128], help="query heads of one GPU: 1 to 128")
    sub.add_argument(
        "--backend", nargs="+", choices=WARM_BACKENDS, default=["triton"],
        help="the engine's attention backends (dsa: nsa, too); default: triton",
    )  # fmt: skip
    sub.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16", help="of the model")
    sub.add_argument("--cache", nargs="+", choices=CACHES, help="of the cache; default: the model's, and e4m3")
    sub.add_argument("--max-batch", type=_count, default=512, help="requests that decode at once")
    sub = add("bench", bench, "our kernels beside the installed engine's own: right first, then timed")
    sub.add_argument("kernel", choices=["decode", "page-table", "token-indices"])
    sub.add_argument("--heads", nargs="+", type=_heads, default=[], help="decode: query heads, 1 to 128")
    sub.add_argument("--dtype", nargs="+", choices=CACHES, default=[], help="decode: of the cache")
    sub.add_argument("--batch", nargs="+", type=_count, default=[], help="requests")
    sub.add_argument("--length", nargs="+", type=_count, default=[], help="tokens of each request")
    _fetch_option(sub)
    _add_ab(commands)
    sub = add("demo", demo, "patch the installed engine in a fresh interpreter and compare its kernels with ours")
    _fetch_option(sub)
    return parser


def _add_ab(commands: Any) -> None:
    """``ab`` and what belongs to it."""
    text = "steer a running experiment, watch it, read its verdict"
    kinds = commands.add_parser("ab", help=text, description=text).add_subparsers(required=True, metavar="WHAT")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command, kind=name)
        sub.add_argument("directory", type=Path, help="the engine's MLA_PATCH_REPORT")
        sub.add_argument("--run", help="a run by its name; default: the newest")
        sub.add_argument("--json", action="store_true", help="machine-readable output")
        return sub

    for name, what in (("start", "run the schedule, from its warmup on"), ("stop", "run the host's arm")):
        sub = add(name, ab_send, f"{what}, from a step that all ranks will reach")
        sub.add_argument("features", nargs="*", metavar="FEATURE", help="default: all that are under test")
    sub = add("set", ab_send, "choose an arm, outside of any comparison, or the share of the schedule")
    sub.add_argument("feature")
    sub.add_argument("setting", type=_setting, metavar="arm=NAME | ratio=SHARE")
    sub = add("watch", ab_watch, "where it stands, again and again; no verdict, which is for one look at the end")
    sub.add_argument("--every", type=float, default=2.0, metavar="SECONDS")
    sub.add_argument("--once", action="store_true", help="one look")
    sub = add("report", ab_report, "the verdict of each bucket, shadow errors, what happened")
    sub.add_argument("--html", type=Path, metavar="FILE", help="write the run's page, which fetches nothing")


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
    if not (text.isdecimal() and 2 <= len(text) <= 3):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a compute capability without its dot, such as 90 or 120")
    return int(text[:-1]), int(text[-1])


def _fetch_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fetch", metavar="VERSION", help="use this SGLang release, fetched into a cache, never installed"
    )


def _feature_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f", "--feature", action="append", default=[], metavar="NAME=MODE",
        help="a feature's flag, before the environment's: kv_indices=off, decode@sglang=on",
    )  # fmt: skip


# doctor, list, explain


def doctor(args: argparse.Namespace) -> int:
    """Judge every feature from source, import no engine."""
    plugins, flags = _read(args.feature)
    found = [one for one in map(find_host, hosts.HOSTS) if one is not None]
    device = gpu.from_nvml() or _torch_gpu()  # before the features, which may depend on it
    rows = [_would_be(feature, flags, plugins) for feature in plugins.features]
    report = {
        "version": mla_patch.__version__,
        "python": sys.version.split()[0],
        "torch": _version("torch"),
        "triton": _version("triton"),
        "gpu": None if device is None else asdict(device) | {"sm": device.sm},
        "hosts": [{"name": h.host.name, "version": h.version, "reviewed": h.version in h.host.reviewed} for h in found],
        "findings": [*plugins.problems, *flags.problems, *_findings(found, flags), *_unsatisfied(rows)],
        "features": rows,
    }
    if args.json:
        _print_json(report)
    else:
        _show_doctor(report)
    return FINDING if report["findings"] else OK


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
        _print_json(rows)
    else:
        _table("features", ["feature", "host", "range", "default", "upstream", "drop_when"], rows)
        _lines(plugins.problems, "yellow")
    return FINDING if plugins.problems else OK


def explain(args: argparse.Namespace) -> int:
    plugins, flags = _read([])
    features = [feature for feature in plugins.features if feature.matches(args.feature)]
    if not features:
        names = [name for feature in plugins.features for name in (feature.name, feature.label)]
        raise Misuse(f"{args.feature!r} is not a feature{flags_.nearest(args.feature, names)}")
    routes = [row for feature in features for row in _routes(feature)]
    states = [_would_be(feature, flags, plugins) for feature in features]
    for row in states:
        row["meaning"] = MEANING[State(row["state"])]
    providers = [
        {"feature": feature.label, "provider": provider, "when": when}
        for feature in features
        for provider, when in feature.providers
    ]
    serves = [row for feature in features for row in _serves(feature, flags, args)]
    if args.json:
        told: dict[str, Any] = {"feature": args.feature, "routes": routes, "states": states}
        more = {"providers": providers, "serves": serves}
        _print_json(told | {name: rows for name, rows in more.items() if rows})
        return OK
    for feature in features:
        _lines([f"[bold]{feature.label}[/] {feature.why}", f"from {feature.upstream}", f"until {feature.drop_when}"])
    _table("routes", ["host", "releases", "module", "name", "kind", "replaced_by"], routes)
    if providers:
        _table("who serves a call, by the first row that applies", ["provider", "when"], providers)
    if serves:
        title = f"by default settings, on {serves[0]['host']} {serves[0]['release']} and {serves[0]['sm']}"
        _table(title, ["heads", "what", "who"], serves)
    elif any(feature.serves for feature in features):
        _lines(["who serves on one release and GPU: name both, as in --release 0.5.18 --sm 90"])
    _table("here", ["host", "flag", "value", "source", "state", "reason", "meaning"], states)
    return OK


def _serves(feature: Feature, flags: flags_.Flags, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Who serves on one release and GPU, for each number of heads; nothing where either is not known."""
    if feature.serves is None:
        if args.release or args.sm:
            raise Misuse(f"--release, --sm: who serves {feature.label} does not depend on them")
        return []
    found, device = find_host(feature.host_name), gpu.from_nvml() or _torch_gpu()
    release = args.release or (found.version if found else None)
    capability = args.sm or (device.capability if device else None)
    if release is None or capability is None:
        return []
    if not _in_range(release, feature):
        raise Misuse(f"--release {release}: expected a version that is {feature.requirement()[1]}")
    setting = flags.feature(feature)
    asked = setting.asked_for and setting.value == "on"
    sm = f"sm_{capability[0]}{capability[1]}"
    return [
        {"host": feature.host_name, "release": release, "sm": sm, "heads": heads, "what": what, "who": who}
        for heads in args.heads
        for what, who in feature.serves(release, capability, heads, asked)
    ]


def _in_range(version: str, feature: Feature) -> bool:
    from packaging.specifiers import SpecifierSet

    try:
        return SpecifierSet(feature.requirement()[1]).contains(version, prereleases=True)
    except ValueError:  # no version at all
        return False


def _routes(feature: Feature) -> list[dict[str, Any]]:
    """Where the feature goes, one row per entry point and run of releases with the same home and parameters."""
    name, specifier = feature.requirement()
    reviewed = [version for version in hosts.host(name).reviewed if _in_range(version, feature)]
    rows: list[dict[str, Any]] = []
    versions: list[str | None] = [*reviewed] or [None]
    for before, version in zip([None, *versions], versions, strict=False):
        for target in feature.targets(version):
            entry = (target.name, target.module, list(target.params))
            alike = (row for row in rows if (row["name"], row["module"], row["params"]) == entry)
            same = next((row for row in alike if row["releases"].rpartition(" - ")[2] == before), None)
            if same:
                same["releases"] = f"{same['releases'].partition(' - ')[0]} - {version}"
                continue
            rows.append({
                "host": name, "releases": version or specifier or "any", "module": target.module, "name": target.name,
                "kind": target.kind, "params": list(target.params), "replaced_by": code_of(target),
            })  # fmt: skip
    return sorted(rows, key=lambda row: row["name"])


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
    verdict = judge(feature, setting, host, skip_version_check=skip, skip_finders=(HostFinder,))
    if setting.value in flags_.EXPERIMENTS and verdict.state is State.ARMED:
        try:
            experiment(feature, setting, flags, verdict, plugins)
        except ValueError as problem:
            verdict = Judgement(State.REFUSED, str(problem))
    status = reports.FeatureStatus(feature.name, feature.host_name, feature.flag, setting.value, setting.source)
    status.state, status.reason = verdict.state, verdict.reason
    status.targets = [reports.TargetStatus(t.module, t.name, t.kind, code_of(t)) for t in verdict.targets]
    return status.as_dict(counts=False)


def _unsatisfied(rows: list[dict[str, Any]]) -> list[str]:
    """Features that were asked for and that no installed host gets."""
    findings = []
    for row in rows:
        asked = row["source"] != "default" and row["state"] != State.OFF
        elsewhere = any(other["name"] == row["name"] and other["state"] in SATISFIED for other in rows)
        if asked and row["state"] not in SATISFIED and not elsewhere and not _not_installed(row):
            findings.append(
                f"{row['name']}@{row['host']} ({row['flag']}={row['value']}): {row['state']}, {row['reason']}"
            )
    return findings


def _not_installed(row: Mapping[str, Any]) -> bool:
    return row["state"] == State.ABSENT and find_host(row["host"]) is None


def _findings(found: Iterable[hosts.Installed], flags: flags_.Flags) -> list[str]:
    """What about this interpreter and environment keeps the plugin out, or makes its judgement less sure."""
    findings = []
    active = flags.on("MLA_PATCH")
    if flags.on("MLA_PATCH_STRICT") and not active:
        findings.append("MLA_PATCH_STRICT is set and MLA_PATCH is not: nothing is active, so nothing is enforced")
    if sys.flags.no_site:
        findings.append("Python runs with -S: the start-up file is not read, use `mla-patch run`")
    elif active and not start_file():
        findings.append(
            "the start-up file mla_patch.pth is in no site directory: use `mla-patch run`, or install again"
        )
    for one in found:
        name = one.host.plugin_filter
        wanted = [part.strip() for part in os.environ.get(name, "").split(",") if part.strip()] if name else []
        if wanted and ENTRY_POINT not in wanted:
            findings.append(
                f"{name}={os.environ[name]} leaves out {ENTRY_POINT}: only the start-up file can activate it"
            )
        if one.note:
            findings.append(one.note)
    return findings


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
    try:
        processes, missing = reports.read_directory(args.directory)
    except OSError as problem:
        raise Misuse(f"{args.directory}: {problem.strerror or problem}") from None
    missing += reports.silent_processes(args.directory, {report["pid"] for report in processes})
    findings = [problem for report in processes for problem in report.get("problems", [])]
    for report in processes:
        findings += [f"pid {report['pid']}: {text}" for text in _unsatisfied(report["features"])]
    for label in sorted({f"{f['name']}@{f['host']}" for r in processes for f in r["features"]}):
        rows = [f for r in processes for f in r["features"] if f"{f['name']}@{f['host']}" == label]
        # what only adds a choice is not called by those who choose something else
        choices = [row for row in rows if {target["kind"] for target in row["targets"]} == {"edit"}]
        applied = [row for row in rows if row["state"] == State.APPLIED and row not in choices]
        if applied and not any(row["served"] or row["declined"] for row in applied):
            findings.append(f"{label} is applied, and nothing has called it yet")
    if args.json:
        _print_json({"processes": processes, "missing": missing, "findings": findings})
    else:
        _show_status(args.directory, processes, missing, findings)
    return FINDING if findings or missing else OK


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
    if args.json:
        changed = {key: value for key, value in environ.items() if os.environ.get(key) != value}
        _print_json({"command": command, "environment": changed})
        return OK
    try:
        os.execvpe(command[0], command, environ)
    except OSError as problem:
        raise Misuse(f"run: {command[0]}: {problem.strerror}") from None


# warmup


def warmup(args: argparse.Namespace) -> int:
    """Compile in this process; an engine finds the results in Triton's cache."""
    _need_triton("warmup")
    from mla_patch import warmup as warmup_

    if args.cache is None:
        args.cache = [args.dtype, "e4m3"]
    for cache in args.cache:
        if cache in ("bf16", "fp16") and cache != args.dtype:
            raise Misuse(f"warmup: --cache {cache} with --dtype {args.dtype}, expected {args.dtype}, e4m3 or e5m2")
    device = _torch_gpu()
    result = warmup_.run(device, args.heads, args.dtype, args.cache, args.max_batch, args.backend)
    if args.json:
        _print_json(result)
        return OK
    if result["kernels"]:
        _table(
            f"compiled for {result['device']}", ["kernel", "heads", "cache", "compiled", "seconds"], result["kernels"]
        )
    _lines(result["notes"])
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
        raise Misuse("bench: --dtype bf16 without a GPU: Triton's interpreter multiplies bf16 wrongly; expected fp16")
    options = {name: getattr(args, name) for name in ("kernel", "heads", "batch", "length", "dtype")}
    environ = {name: value for name, value in os.environ.items() if name != "MLA_PATCH"}
    result = _child("bench", [json.dumps(options)], environ, args)
    if result is None:
        return FINDING
    if args.json:
        _print_json(result)
    else:
        _show_bench(result)
    return OK if result["right"] else FINDING


# ab


def ab_send(args: argparse.Namespace) -> int:
    """Send a command; it holds from a step that no rank has reached."""
    from mla_patch import ab
    from mla_patch.experiment.control_file import ControlError

    kind, value = args.setting if args.kind == "set" else (args.kind, None)
    features = [args.feature] if args.kind == "set" else args.features
    try:
        told = ab.command(args.directory, args.run, kind, features, value)
    except (ab.NotThere, ControlError, ValueError) as problem:
        raise Misuse(f"ab {args.kind}: {problem}") from None
    if args.json:
        _print_json(told)
        return OK
    for one in told["commands"]:
        what = f"{kind} {value}" if value is not None else kind
        _lines([f"{one['feature']}: {what}, from step {one['at']} of run {told['run']} on"])
    return OK


def ab_watch(args: argparse.Namespace) -> int:
    """Look again and again, until interrupted."""
    from rich.live import Live

    from mla_patch import ab
    from mla_patch.experiment.control_file import ControlError

    def look() -> dict[str, Any]:
        try:
            return ab.snapshot(args.directory, args.run)
        except (ab.NotThere, ControlError) as problem:
            raise Misuse(f"ab watch: {problem}") from None

    if args.json or args.once:
        told = look()
        if args.json:
            _print_json(told)
        else:
            _console().print(_watched(told))
        return OK
    try:
        with Live(_watched(look()), console=_console(), auto_refresh=False) as live:
            while True:
                time.sleep(args.every)
                live.update(_watched(look()), refresh=True)
    except KeyboardInterrupt:
        return OK


def _watched(told: Mapping[str, Any]) -> Any:
    from rich.console import Group

    under = "; ".join(f"{name}: {', '.join(arms)}" for name, arms in told["features"].items())
    last = told["commands"][-1] if told["commands"] else None
    says = [f"run {told['run']}, {under}", "no verdict while it runs: `mla-patch ab report`, once, at the end"]
    if last:
        says.append(f"last command: {last['feature']} {last['kind']} {last['value'] or ''} from step {last['at']}")
    says += [_note(note) for note in told["notes"]]
    parts = [_make_table("ranks", ["rank", "step", "heard_s"], told["ranks"])]
    if told["buckets"]:
        rows = [row | {"median_us": f"{row['median_us']:.1f}"} for row in told["buckets"]]
        parts.append(_make_table("steps compared", ["feature", "bucket", "arm", "steps", "median_us"], rows))
    if told["shadow"]:
        rows = [_errors(row) for row in told["shadow"]]
        parts.append(_make_table("shadow checks", ["feature", "comparisons", "median", "worst", "nan"], rows))
    return Group(*says, *parts)


def _note(note: Mapping[str, Any]) -> str:
    return f"step {note['step']}: {note['feature']} {note['what']}: {_escaped(note['text'])}"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _errors(row: Mapping[str, Any]) -> dict[str, Any]:
    told = {
        name: None if value is None else f"{value:.3g}"
        for name, value in (("median", row["relative"]["0.5"]), ("worst", row["relative"]["1.0"]))
    }
    return {**row, **told}


def ab_report(args: argparse.Namespace) -> int:
    from mla_patch import ab

    try:
        told = ab.report(args.directory, args.run)
        if args.html:
            ab.write(args.html, ab.page(args.directory, told))
    except (ab.NotThere, OSError) as problem:
        raise Misuse(f"ab report: {problem}") from None
    if args.json:
        _print_json(told)
        return FINDING if told["findings"] else OK
    for run in told["runs"]:
        differed = f", {run['differed']} on which ranks differed" if run["differed"] else ""
        _lines([f"[bold]run {run['run']}[/] {run['steps']} steps, {len(run['ranks'])} rank(s){differed}"])
        rows = [
            {**one, "host": f"{one['host_us']:.1f}", "arm_us": f"{one['arm_us']:.1f}"} for one in run["comparisons"]
        ]
        if rows:
            _table("verdicts", ["feature", "bucket", "arm", "host", "arm_us", "text"], rows)
        if run["shadow"]:
            columns = ["feature", "comparisons", "median", "worst", "nan"]
            _table("shadow checks", columns, [_errors(row) for row in run["shadow"]])
        _lines(map(_note, run["notes"]))
    _lines([f"finding: {_escaped(text)}" for text in told["findings"]], "yellow")
    if args.html:
        _lines([f"written: {args.html}"])
    return FINDING if told["findings"] else OK


# demo


def demo(args: argparse.Namespace) -> int:
    """Run the demonstration in a fresh interpreter, as an engine's process would start."""
    _need_triton("demo")
    result = _child("demo", [], dict(os.environ) | {"MLA_PATCH": "1"}, args)
    if result is None:
        return FINDING
    if args.json:
        _print_json(result)
    else:
        _show_demo(result)
    return OK if result["equal"] else FINDING


def _child(name: str, argv: Sequence[str], environ: dict[str, str], args: argparse.Namespace) -> dict[str, Any] | None:
    """Run ``mla_patch.<name>`` in an interpreter of its own, and give back its result; None where it failed."""
    if _torch_gpu() is None:
        environ["TRITON_INTERPRET"] = "1"
    if args.fetch:
        try:
            folders = [str(folder) for folder in sglang_fetch.fetch(args.fetch)]
        except (RuntimeError, OSError) as problem:
            raise Misuse(f"{name}: {problem}") from None
        environ["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", f"mla_patch.{name}", *argv]
    result: dict[str, Any] | None = None
    with _progress(args.json) as tell, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(f"{name} "):
                message = json.loads(line.partition(" ")[2])
                result = message.get("result", result)
                tell(message)
        child.wait()
        errors.seek(0)
        said = errors.read()
    if child.returncode or result is None:
        print(said[-4000:], file=sys.stderr)
        print(f"mla-patch: {name} ended with status {child.returncode}", file=sys.stderr)
        return None
    return result


# printing


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1)
    print()


def _console() -> Any:
    from rich.console import Console

    # a file or a pipe has no width of its own
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _lines(lines: Iterable[str], style: str = "") -> None:
    console = _console()
    for line in lines:
        console.print(line, style=style)


def _table(title: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    _console().print(_make_table(title, columns, rows))


def _make_table(title: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(column, row.get(column)) for column in columns))
    return table


_COLOURS = {State.APPLIED: "green", State.ARMED: "green", State.NATIVE: "green", State.OFF: "dim", State.ABSENT: "dim"}


def _cell(column: str, value: Any) -> str:
    from rich.markup import escape

    text = escape("" if value is None else str(value))
    if column == "state":
        colour = _COLOURS.get(State(value), "red")
        return f"[{colour}]{text}[/]"
    return text


def _show_doctor(report: Mapping[str, Any]) -> None:
    device = report["gpu"]
    shown = f"{device['name']} ({device['sm']}, driver {device['driver'] or 'unknown'})" if device else "none"
    _lines([
        f"[bold]mla-patch {report['version']}[/]  Python {report['python']}  torch {report['torch']}  "
        f"Triton {report['triton']}  GPU {shown}",
    ])  # fmt: skip
    for host in report["hosts"]:
        note = "" if host["reviewed"] else " (unreviewed)"
        _lines([f"{host['name']} {host['version'] or 'of an unknown version'}{note}"])
    if not report["hosts"]:
        _lines(["no engine is installed here"])
    if os.environ.get("MLA_PATCH") is None:
        _lines(["MLA_PATCH is not set: an engine started from here runs untouched. With MLA_PATCH=1:"], "dim")
    columns = ["name", "host", "flag", "value", "source", "state", "reason"]
    _table("features", columns, report["features"])
    targets = [{"feature": f["name"], **target} for f in report["features"] for target in f["targets"]]
    if targets:
        _table("entry points", ["feature", "module", "name", "kind", "replaced_by"], targets)
    _lines([f"finding: {text}" for text in report["findings"]], "yellow")


def _show_status(
    directory: Path,
    processes: Sequence[Mapping[str, Any]],
    missing: Sequence[Mapping[str, Any]],
    findings: Sequence[str],
) -> None:
    rows = []
    for report in processes:
        for feature in report["features"]:
            replays = feature.get("replayed")
            captured = feature.get("captured", 0)
            told = "replays not counted" if replays is None else f"{replays} replayed"
            note = f"{captured} captured, {told}" if captured else ""
            declined = ", ".join(f"{n} × {reason}" for reason, n in feature.get("declined", {}).items())
            rows.append(
                feature | {"pid": report["pid"], "engine": report["engine"], "declined": declined, "graphs": note}
            )
    columns = ["engine", "pid", "name", "state", "reason", "served", "declined", "graphs"]
    if rows:
        _table(str(directory), columns, rows)
    else:
        _lines([f"no reports in {directory}"])
    for report in processes:
        compiled = report.get("compiled", {})
        if compiled is None:
            _lines([f"pid {report['pid']}: compiles are not counted with this Triton"])
        elif any(compiled.values()):
            text = f"pid {report['pid']}: {compiled['before']} kernels of ours compiled before it served"
            _lines([f"{text}, {compiled['serving']} since"], "yellow" if compiled["serving"] else "")
    for one in missing:
        _lines([f"missing: {', '.join(f'{key} {value}' for key, value in one.items())}"], "yellow")
    _lines([f"finding: {text}" for text in findings], "yellow")


def _show_demo(result: Mapping[str, Any]) -> None:
    _lines([f"[bold]{result['host'] or 'no engine installed'}[/] on {result['device']}"])
    if result["targets"]:
        _table("patched", ["module", "name", "replaced_by"], result["targets"])
    rows = [row | {f"error_{side}": error for side, error in row.get("error", {}).items()} for row in result["routes"]]
    columns = ["route", "builder", "equal", "error_host", "error_ours", "us_host", "us_ours"]
    _table("same input, both kernels", columns, rows)
    equal = "[green]equal[/]" if result["equal"] else "[red]NOT equal[/]"
    _lines([f"served {result['served']} calls of the host's; outputs {equal}", *result["notes"]])


def _show_bench(result: Mapping[str, Any]) -> None:
    _lines([f"[bold]{result['kernel']}[/], {result['host'] or 'no engine installed'}, on {result['device']}"])
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
    _table(title, ["case", "host us", "ours us", "host / ours", "GB/s", "of a copy", "host", "ours"], rows)
    right = "[green]right[/]" if result["right"] else "[red]NOT right[/]"
    copy = f", a copy reaches {result['copy_gbps']} GB/s" if result["copy_gbps"] else ""
    _lines([f"ours is {right}; an empty launch takes {result['floor_us']} us{copy}", *result["notes"]])


class _progress:
    """A progress bar on a terminal, silence elsewhere."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import Progress

        self.bar = Progress(disable=quiet or not sys.stderr.isatty(), transient=True, console=_stderr())

    def __enter__(self) -> Callable[[Mapping[str, Any]], None]:
        self.bar.start()
        task = self.bar.add_task("starting", total=None)

        def tell(message: Mapping[str, Any]) -> None:
            if "step" in message:
                self.bar.update(task, description=message["step"], completed=message["at"], total=message["of"])

        return tell

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)
