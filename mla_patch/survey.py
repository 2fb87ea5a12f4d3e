"""The reports of a directory, whoever wrote them, and how the process of each fares; `status` makes findings of them.

The files may be another version's or anybody's: what is no report is named with the reason. ``life`` of a report says:

    running   the process lives, as /proc tells; of another machine or container: heard of within 90 s
    ended     it said farewell at a normal exit: the counts are complete
    gone      it was killed, or left by os._exit: calls of its last 0.25 s may be missing from the counts. Of another
              machine or container: not heard of for an hour
    unknown   of another machine or container, not heard of for a while, or by an mla-patch whose reports were not
              touched (format 1)
"""

from __future__ import annotations

import os
import re
import socket
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mla_patch import files, redact
from mla_patch.compat import processes
from mla_patch.reports import FORMAT

RUNNING, ENDED, GONE, UNKNOWN = "running", "ended", "gone", "unknown"
HEARD, FORGOTTEN = 90.0, 3600.0  # seconds; network file systems show a time that is a minute old, clocks differ
_NAME = re.compile(r"(?P<engine>[^-]+)-(?P<host>.+)-(?P<pid>\d{1,10})-(?P<ns>\d{1,20})\.json")


def survey(directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What ``directory`` tells of processes: their reports, as `read_directory`, and what is missing, with reasons.

    Raises:
        OSError: the directory cannot be read.
    """
    found, missing = read_directory(directory)
    here = [_NAME.fullmatch(row["file"]) for row in missing]
    reported = {int(name["pid"]) for name in here if name is not None and name["host"] == socket.gethostname()}
    reported |= {report["pid"] for report in found if _of_this_machine(report)}
    return found, missing + silent_processes(directory, reported)


def silent_processes(directory: Path, reported: set[int]) -> list[dict[str, Any]]:
    """Living processes of an engine that were told to report to ``directory`` and have not. Linux only."""
    found = []
    proc = Path("/proc")
    for entry in proc.iterdir() if proc.is_dir() else ():
        if not entry.name.isdigit() or int(entry.name) in reported:
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            argv = (entry / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
            environ = dict(os.fsdecode(variable).partition("=")[::2] for variable in variables)
            told = environ.get("MLA_PATCH_REPORT")
            # compile workers and the like inherit the variable and never import the engine: go by the name
            engine = any(name in " ".join(argv) for name in ("sglang::", "sglang.", "sglang serve", "vllm"))
            if told and engine and _same(_absolute(told, environ.get("HOME", "~"), entry), directory):
                reason = "no report: the plugin is not active in it"
                found.append({"pid": int(entry.name), "argv": redact.argv(argv), "reason": reason})
        except OSError:  # gone, or another user's
            continue
    return found


def _absolute(told: str, home: str, entry: Path) -> Path:
    """As that process has understood its MLA_PATCH_REPORT, unless it has changed its directory since."""
    if told == "~" or told.startswith("~/"):
        told = home + told[1:]
    return Path(os.readlink(entry / "cwd"), told)


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def read_directory(directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All reports in ``directory``, newest first, and the files that are not one, each with the reason.

    A report is as `ProcessReport.as_dict` makes it, whatever version wrote it: a part that is missing has its usual
    value, a part of another type makes the file no report. Added are ``file``, its name; ``written``, when it was last
    written or touched, in seconds since 1970; ``life``, as the module says. Secrets in ``argv`` are redacted.

    Raises:
        OSError: the directory cannot be read.
    """
    reports, broken = [], []
    for path in sorted(p for p in directory.iterdir() if p.suffix == ".json"):
        try:
            report = _checked(files.parse(files.read(path, files.REPORT_BYTES)))
            report |= {"file": path.name, "written": path.lstat().st_mtime}
            report["life"] = _life(report)
            reports.append(report)
        except (OSError, ValueError) as problem:
            text = str(problem).removeprefix(f"{path}: ")
            broken.append({"file": _plain(path.name), "reason": f"not a report: {text}"})
    return sorted(reports, key=lambda report: -float(report["started"])), broken


def prune(directory: Path) -> tuple[list[str], int]:
    """Remove the reports of processes that have ended or are gone, and what they left half written.

    Removed are plain files of this user alone, under the names that we give. Records of experiments stay.

    Returns:
        The names of the files removed, and how many such files are not this user's to remove.

    Raises:
        OSError: the directory cannot be read.
    """
    reports, _ = read_directory(directory)
    removed, left = [], 0
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        names = [(report["file"], report["written"]) for report in reports if _may_go(report)]
        living = [report["file"] for report in reports if not _may_go(report)]
        names += [(name, None) for name in os.listdir(handle) if _left_over(name, living)]
        for name, written in names:
            try:
                found = os.stat(name, dir_fd=handle, follow_symlinks=False)
                if not stat.S_ISREG(found.st_mode) or written not in (None, found.st_mtime):
                    continue
                if written is None and time.time() - found.st_mtime < HEARD:  # somebody may be writing it
                    continue
                if found.st_uid != os.geteuid():
                    left += 1
                    continue
                os.unlink(name, dir_fd=handle)
                removed.append(name)
            except FileNotFoundError:
                continue
            except OSError:
                left += 1
    finally:
        os.close(handle)
    return removed, left


def _may_go(report: Mapping[str, Any]) -> bool:
    name = _NAME.fullmatch(report["file"])
    ours = name is not None and (name["engine"], int(name["pid"])) == (report["engine"], report["pid"])
    return ours and report["life"] in (ENDED, GONE)


def _left_over(name: str, living: list[str]) -> bool:
    """Whether this is a report that a process had begun to write when it was killed."""
    report = re.fullmatch(rf"\.(.+)\.[0-9a-f]{{{2 * files.TOKEN_BYTES}}}", name)
    return report is not None and _NAME.fullmatch(report[1]) is not None and report[1] not in living


def current(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of processes that run or may run; where none does, all of them."""
    return [report for report in reports if report["life"] in (RUNNING, UNKNOWN)] or reports


def siblings(reports: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Processes that one engine has started in the same way on one machine, such as its ranks, in groups of several.

    Their parent tells. Of two commands that a person has started from one shell, argv does, but for its numbers.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for report in reports:
        if report["parent"]:
            argv = re.sub(r"\d+", "#", " ".join(map(str, report["argv"])))
            key = report["engine"], report["hostname"], report["pid_space"], report["parent"], argv
            groups.setdefault(key, []).append(report)
    return [group for group in groups.values() if len(group) > 1]


def age(seconds: float) -> str:
    """A length of time for people: "12 s", "3 min", "5 h", "8 days"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def life_text(report: Mapping[str, Any], now: float | None = None) -> str:
    """How a process fares, for people: "running for 3 min", "ended 5 h ago", "gone, last heard of 5 h ago"."""
    now = time.time() if now is None else now
    heard = f"{age(now - report['written'])} ago"
    if report["life"] == RUNNING:
        return f"running for {age(now - report['started'])}"
    if report["life"] == ENDED:
        return f"ended {age(now - (report['ended'] or report['written']))} ago"
    if report["life"] == GONE:
        return f"gone, last heard of {heard}"
    return f"unknown, last heard of {heard}"


def _of_this_machine(report: Mapping[str, Any]) -> bool:
    """Whether the report's process number means the same here."""
    if report["format"] >= 2:
        return bool(report["pid_space"]) and report["pid_space"] == processes.pid_space()
    name = _NAME.fullmatch(report["file"])
    return name is not None and name["host"] == socket.gethostname()


def _life(report: Mapping[str, Any]) -> str:
    silence = time.time() - report["written"]
    if _of_this_machine(report):
        ticks = processes.start_ticks(report["pid"])
        if ticks is not None and _is_same_process(report, ticks, silence):
            return RUNNING
        return ENDED if report["ended"] is not None else GONE
    if report["ended"] is not None:
        return ENDED
    if report["format"] < 2:
        return UNKNOWN
    return RUNNING if silence < HEARD else UNKNOWN if silence < FORGOTTEN else GONE


def _is_same_process(report: Mapping[str, Any], ticks: int, silence: float) -> bool:
    """Whether the process of that number, which began at ``ticks``, wrote the report: numbers come again."""
    if ticks == processes.HIDDEN:
        return report["format"] < 2 or silence < HEARD
    if report["start_ticks"]:
        return bool(report["start_ticks"] == ticks)
    began = processes.start_time(report["pid"])
    return began is None or began <= report["started"] + 2  # the boot's time is known to the second


# one report, whoever wrote it


def _plain(text: str) -> str:
    """Without halves of characters, which no terminal can print."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


_REQUIRED = object()
Parts = tuple[tuple[str, Any, Any], ...]  # key, type or types, what stands for a missing one
_FEATURE: Parts = (
    ("name", str, _REQUIRED), ("host", str, _REQUIRED), ("state", str, _REQUIRED), ("flag", str, ""),
    ("value", str, ""), ("source", str, "default"), ("reason", str, ""), ("targets", list, ()), ("served", int, 0),
    ("declined", dict, {}), ("captured", int, 0), ("replayed", (int, None), None),
    ("traced", int, 0), ("served_by", dict, {}),
)  # fmt: skip
_TARGET: Parts = (("module", str, ""), ("name", str, ""), ("kind", str, ""), ("replaced_by", (str, None), None))
_REPORT: Parts = (
    ("engine", str, _REQUIRED), ("pid", int, _REQUIRED), ("argv", list, _REQUIRED), ("started", float, _REQUIRED),
    ("features", list, _REQUIRED), ("format", int, 1), ("version", (str, None), None),
    ("host_version", (str, None), None), ("hostname", str, ""), ("pid_space", str, ""),
    ("start_ticks", (int, None), None), ("parent", str, ""), ("ended", (float, None), None), ("problems", list, ()),
    ("compiled", (dict, None), {}),
)  # fmt: skip
_COMPILED: Parts = (("before", int, 0), ("serving", int, 0))
_WORDS = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "an object", None: "null"}


def _checked(value: Any) -> dict[str, Any]:
    """A report in the form that this version writes.

    Raises:
        ValueError: it is none; says which part was found and what was expected.
    """
    if not isinstance(value, dict):
        raise ValueError(_unlike(value, "it", (dict,)))
    if isinstance(value.get("format"), int) and value["format"] > FORMAT:
        raise ValueError(f"format is {value['format']}, expected at most {FORMAT}: a newer mla-patch reads it")
    missing = [name for name, _, default in _REPORT if default is _REQUIRED and name not in value]
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    report = _row(value, _REPORT, "")
    for name in ("started", "ended"):
        if report[name] is not None and not 0 <= report[name] < 1e11:
            raise ValueError(f"{name} is {report[name]}, expected seconds since 1970")
    if not 0 < report["pid"] < 1 << 31:
        raise ValueError(f"pid is {report['pid']}, expected a process's number")
    report["argv"] = redact.argv(_texts(report["argv"], "argv"))
    report["problems"] = _texts(report["problems"], "problems")
    if report["compiled"]:
        report["compiled"] = _row(report["compiled"], _COMPILED, "compiled.")
    report["features"] = [_feature(row, f"features[{at}]") for at, row in enumerate(report["features"])]
    return report


def _feature(value: Any, where: str) -> dict[str, Any]:
    row = _row(value, _FEATURE, f"{where}.")
    row["targets"] = [_row(one, _TARGET, f"{where}.targets[{at}].") for at, one in enumerate(row["targets"])]
    for key in ("declined", "served_by"):
        for name, count in row[key].items():
            _part({name: count}, name, int, f"{where}.{key}.")
        row[key] = {_plain(name): count for name, count in row[key].items()}
    return row


def _row(value: Any, parts: Parts, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(_unlike(value, where.rstrip("."), (dict,)))
    known = {name: _part(value, name, kind, where, default) for name, kind, default in parts}
    return value | known


def _part(row: dict[str, Any], name: str, kind: Any, where: str, default: Any = _REQUIRED) -> Any:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if name not in row:
        if default is _REQUIRED:
            raise ValueError(f"{where.rstrip('.') or 'it'} lacks {name}")
        return default.copy() if isinstance(default, dict) else list(default) if default == () else default
    value = row[name]
    found = type(value) if value is not None else None
    if found in kinds or (found is int and float in kinds):
        return _plain(value) if isinstance(value, str) else value
    raise ValueError(_unlike(value, f"{where}{_plain(name)}", kinds))


def _texts(values: list[Any], where: str) -> list[str]:
    for at, one in enumerate(values):
        if not isinstance(one, str):
            raise ValueError(_unlike(one, f"{where}[{at}]", (str,)))
    return [_plain(one) for one in values]


def _unlike(value: Any, what: str, kinds: tuple[Any, ...]) -> str:
    return f"{what} is {_plain(repr(value))[:80]}, expected {' or '.join(_WORDS[kind] for kind in kinds)}"
