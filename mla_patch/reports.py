"""What each process tells of itself: states and counts, kept current in one JSON file."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_patch.compat.compiles import COMPILES
from mla_patch.features import SATISFIED, Counts, State

log = logging.getLogger("mla_patch")
INTERVAL = 0.25  # seconds between two looks for something new; an engine kills its processes without a word


@dataclass
class TargetStatus:
    """One entry point, and what stands there now."""

    module: str
    name: str
    kind: str
    replaced_by: str | None = None


@dataclass
class FeatureStatus:
    """One feature on one host, in this process."""

    name: str
    host: str
    flag: str
    value: str
    source: str
    state: State = State.OFF
    reason: str = ""
    targets: list[TargetStatus] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    memory: Callable[[], int] | None = None

    @property
    def label(self) -> str:
        return f"{self.name}@{self.host}"

    @property
    def satisfied(self) -> bool:
        return self.state in SATISFIED

    def as_dict(self, counts: bool = True) -> dict[str, Any]:
        row: dict[str, Any] = {key: getattr(self, key) for key in ("name", "host", "flag", "value", "source")}
        row |= {
            "state": str(self.state),
            "reason": self.reason,
            "targets": [vars(target).copy() for target in self.targets],
        }
        if counts:
            c = self.counts
            row |= {"served": c.served, "declined": dict(c.declined), "captured": c.captured, "replayed": c.replayed}
            if self.memory is not None:
                row["memory"] = self.memory()
        return row


@dataclass
class ProcessReport:
    """Everything that one process has to say."""

    engine: str = ""
    pid: int = field(default_factory=os.getpid)
    started_ns: int = field(default_factory=time.time_ns)
    problems: list[str] = field(default_factory=list)
    features: list[FeatureStatus] = field(default_factory=list)

    @property
    def stem(self) -> str:
        """The name of this process's files."""
        return f"{self.engine}-{socket.gethostname()}-{self.pid}-{self.started_ns}"

    def renew(self) -> None:
        """This is another process now: a forked child counts for itself."""
        self.pid, self.started_ns = os.getpid(), time.time_ns()
        COMPILES.reset()
        for status in self.features:
            status.counts.reset()

    def has_served(self) -> bool:
        """Whether any feature has served a call to its end."""
        return any(status.counts.served for status in self.features)

    def as_dict(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "pid": self.pid,
            "argv": list(getattr(sys, "orig_argv", sys.argv)),
            "started": self.started_ns / 1e9,
            "problems": list(self.problems),
            "compiled": COMPILES.as_dict(),
            "features": [status.as_dict() for status in list(self.features)],
        }


class Writer:
    """Keeps one process's report file current, from a thread of its own.

    The engine never waits for it and never hears of its errors but once: a full disk or a removed
    directory costs the report, nothing else.
    """

    def __init__(self, directory: str, report: ProcessReport) -> None:
        self.directory = Path(directory)
        self.report = report
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._written = ""
        self._complained = False
        self._start()

    @property
    def path(self) -> Path:
        return self.directory / f"{self.report.stem}.json"

    def changed(self) -> None:
        """Ask for a write soon; called where a state changes, never per call."""
        self._wake.set()

    def flush(self) -> None:
        """Write now, if there is something new."""
        with self._lock:
            try:
                text = json.dumps(self.report.as_dict(), indent=1)
                if text != self._written or not self.path.exists():
                    write_atomically(self.path, text)
                    self._written = text
            except Exception as problem:
                if not self._complained:
                    self._complained = True
                    log.warning("mla-patch: no report in MLA_PATCH_REPORT=%s: %s", self.directory, problem)

    def _start(self) -> None:
        threading.Thread(target=self._run, name="mla-patch-report", daemon=True).start()

    def _run(self) -> None:
        while True:
            self.flush()
            self._wake.wait(INTERVAL)
            self._wake.clear()

    def restart(self) -> None:
        """In a forked child: threads do not survive a fork, and locks may be held forever."""
        self._wake, self._lock = threading.Event(), threading.Lock()
        self._written, self._complained = "", False
        self._start()


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never half of one; for its owner's eyes only."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(beside, path)


def silent_processes(directory: Path, reported: set[int]) -> list[dict[str, Any]]:
    """Living processes of an engine that were told to report to ``directory`` and have not. Linux only."""
    found = []
    proc = Path("/proc")
    for entry in proc.iterdir() if proc.is_dir() else ():
        if not entry.name.isdigit() or int(entry.name) in reported:
            continue
        try:
            environ = (entry / "environ").read_bytes().split(b"\0")
            argv = (entry / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
        except OSError:  # gone, or another user's
            continue
        told = next((e.partition(b"=")[2] for e in environ if e.startswith(b"MLA_PATCH_REPORT=")), b"")
        # compile workers and the like inherit the variable and never import the engine: go by the name
        engine = any(name in " ".join(argv) for name in ("sglang::", "sglang.", "sglang serve", "vllm"))
        if told and engine and Path(os.fsdecode(told)).absolute() == directory.absolute():
            found.append({"pid": int(entry.name), "argv": argv, "reason": "no report: the plugin is not active in it"})
    return found


def read_directory(directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All reports in ``directory``, and the files that are not one, each with the reason.

    Raises:
        OSError: the directory cannot be read.
    """
    reports, broken = [], []
    for path in sorted(p for p in directory.iterdir() if p.suffix == ".json"):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            check(report)
            reports.append(report)
        except (OSError, ValueError, TypeError, RecursionError) as problem:
            broken.append({"file": path.name, "reason": f"not a report: {problem}"})
    return reports, broken


# what readers of a report rely on; there may be more, and names with a ? may be missing
_PROCESS = {
    "engine": str, "pid": int, "argv": list, "started": (int, float), "features": list,
    "problems?": list, "compiled?": dict,
}  # fmt: skip
_FEATURE = {
    "name": str, "host": str, "flag": str, "value": str, "source": str, "state": str, "reason": str, "targets": list,
    "served": int, "declined": dict, "captured": int, "replayed?": int,
}  # fmt: skip


def check(report: Any) -> None:
    """Raise ValueError where what a file holds is not a report that can be read."""
    _check_keys(report, _PROCESS, "it")
    _check_items(report.get("problems") or [], str, "problems")
    _check_items(report["argv"], str, "argv")
    compiled = report.get("compiled")
    if compiled is not None:
        _check_keys(compiled, {"before": int, "serving": int}, "compiled")
    for at, feature in enumerate(report["features"]):
        _check_keys(feature, _FEATURE, f"features[{at}]")
        _check_items(feature["targets"], dict, f"features[{at}].targets")
        _check_items(feature["declined"].values(), int, f"features[{at}].declined")


def _check_keys(value: Any, keys: dict[str, Any], what: str) -> None:
    _check_items([value], dict, what)
    missing = [key for key in keys if not key.endswith("?") and key not in value]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")
    for key, kind in keys.items():
        name = key.rstrip("?")
        if value.get(name) is not None or name == key:
            _check_items([value[name]], kind, f"{what}.{name}".removeprefix("it."))


_KINDS = {str: "text", int: "a whole number", (int, float): "a number", list: "a list", dict: "an object"}


def _check_items(values: Iterable[Any], kind: Any, what: str) -> None:
    for value in values:
        infinite = isinstance(value, float) and not math.isfinite(value)
        if not isinstance(value, kind) or isinstance(value, bool) or infinite:
            raise ValueError(f"{what} is {value!r:.80}, expected {_KINDS[kind]}")
