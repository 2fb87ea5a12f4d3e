"""What each process tells of itself: states and counts, kept current in one JSON file. `status` reads such files.

While the process runs the file is touched every 10 s at least. A normal exit writes it once more, with ``ended``.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mla_patch
from mla_patch import endings, files, redact
from mla_patch.at_exit import AtExit
from mla_patch.compat import processes
from mla_patch.compat.compiles import COMPILES
from mla_patch.features import SATISFIED, Counts, State

log = logging.getLogger("mla_patch")
FORMAT = 2  # raised when what a key means changes, not when keys are added; reports without one are of format 1
INTERVAL = 0.25  # seconds between two looks for something new; an engine kills its processes without a word
HEARTBEAT = 10.0  # seconds after which the file is touched, where nothing is new
EXIT_WAIT = 1.0  # seconds that a normal exit waits for the last write


@dataclass
class TargetStatus:
    """One entry point, and what stands there now."""

    module: str
    name: str
    kind: str
    replaced_by: str | None = None


def traced_text(graphs: int) -> str:
    """That torch.compile has taken the engine's own code, in words."""
    one = f"{graphs} graphs that may" if graphs > 1 else "a graph that may"
    return f"the engine's own code is in {one} not be broken (torch.compile(fullgraph=True), torch.export)"


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
            if len({target.name for target in self.targets if target.kind != "edit"}) > 1:
                row["served_by"] = dict(c.served_by)
            if c.traced:
                row["traced"] = c.traced
                row["reason"] = "; ".join(filter(None, (self.reason, traced_text(c.traced))))
            if self.memory is not None:
                try:
                    row["memory"] = self.memory()
                except BaseException as problem:  # a plugin's; the report goes on without it
                    endings.pass_on(problem)
        return row


@dataclass
class ProcessReport:
    """Everything that one process has to say."""

    engine: str = ""
    host_version: str | None = None  # the engine's release, as features were judged by
    pid: int = field(default_factory=os.getpid)
    started_ns: int = field(default_factory=time.time_ns)
    ended: float | None = None  # seconds since 1970, once the process has begun a normal exit
    problems: list[str] = field(default_factory=list)
    features: list[FeatureStatus] = field(default_factory=list)
    look: Callable[[], None] = lambda: None  # brings the features' states up to date; cheap, called from any thread
    _fixed: dict[str, Any] = field(default_factory=dict, repr=False)  # what does not change while the process lives

    @property
    def stem(self) -> str:
        """The name of this process's files."""
        return f"{self.engine}-{socket.gethostname()}-{self.pid}-{self.started_ns}"

    def renew(self) -> None:
        """This is another process now: a forked child counts for itself."""
        self.pid, self.started_ns, self.ended = os.getpid(), time.time_ns(), None
        self._fixed = {}
        COMPILES.reset()
        for status in self.features:
            status.counts.reset()

    def has_served(self) -> bool:
        """Whether any feature has served a call to its end."""
        return any(status.counts.served for status in self.features)

    def as_dict(self) -> dict[str, Any]:
        self.look()
        if not self._fixed:
            self._fixed = {
                "argv": redact.argv(getattr(sys, "orig_argv", sys.argv)),
                "hostname": socket.gethostname(),
                "pid_space": processes.pid_space(),
                "start_ticks": processes.start_ticks(self.pid),
                "parent": _parent(),  # the ranks of one engine have one
            }
        return {
            "format": FORMAT,
            "version": mla_patch.__version__,
            "engine": self.engine,
            "host_version": self.host_version,
            "pid": self.pid,
            **self._fixed,
            "started": self.started_ns / 1e9,
            "ended": self.ended,
            "problems": list(self.problems),
            "compiled": COMPILES.as_dict(),
            "features": [status.as_dict() for status in list(self.features)],
        }


def _parent() -> str:
    """The parent process, by its number and its beginning."""
    parent = os.getppid()
    return f"{parent}-{processes.start_ticks(parent)}"


class Writer:
    """Keeps one process's report file current, from a thread of its own.

    The engine never waits for it and never hears of its errors but once: a full disk, a directory that was removed or
    is not ours costs the report, nothing else. At a normal exit the thread writes once more, and is given a second.
    """

    def __init__(self, directory: str, report: ProcessReport) -> None:
        self.directory = Path(directory)
        self.report = report
        self._written = ""
        self._touched = 0.0  # when the file was last written or touched, by the monotonic clock
        self._complained = False
        self._problem = ""
        self._start()

    @property
    def path(self) -> Path:
        return self.directory / f"{self.report.stem}.json"

    def problem(self, wait: float = 0.5) -> str:
        """Why the report could not be written, or nothing; the first write is given ``wait`` seconds."""
        self._looked.wait(wait)
        return self._problem

    def changed(self) -> None:
        """Ask for a write soon; called where a state changes, never per call."""
        self._wake.set()

    def flush(self) -> None:
        """Write now, if there is something new; else say now and then that this process lives."""
        with self._lock:
            try:
                text = json.dumps(self.report.as_dict(), indent=1)
                if text != self._written or not self.path.exists():
                    files.replace(self.path, text)
                    self._written, self._touched = text, time.monotonic()
                elif time.monotonic() - self._touched >= HEARTBEAT:
                    files.touch(self.path)
                    self._touched = time.monotonic()
                self._problem = ""
            except Exception as problem:
                self._problem = str(problem)
                if not self._complained:
                    self._complained = True
                    log.warning("mla-patch: no report in MLA_PATCH_REPORT=%s: %s", self.directory, problem)
            self._looked.set()

    def farewell(self) -> None:
        """The process ends: have all of it written. Waits for the thread, which may hang in a dead file system."""
        self.report.ended = time.time()
        self._leaving = True
        self._wake.set()
        if self._thread.is_alive():
            self._left.wait(EXIT_WAIT)
        else:
            self.flush()

    def _start(self) -> None:
        self._wake, self._looked, self._left = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._leaving = False
        self._exit = AtExit(self.farewell)
        self._thread: threading.Thread = threading.Thread(target=self._run, name="mla-patch-report", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # a fork while the interpreter shuts down: the exit writes
            pass

    def _run(self) -> None:
        while True:
            leaving = self._leaving
            self.flush()
            if leaving:
                self._left.set()
            self._wake.wait(INTERVAL)
            self._wake.clear()

    def restart(self) -> None:
        """In a forked child: threads do not survive a fork, and locks may be held forever."""
        self._exit.cancel()
        self._written, self._complained, self._problem = "", False, ""
        self._start()
