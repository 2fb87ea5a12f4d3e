"""The experiments of one process: which arm each step runs, the CUDA graphs of each arm, the records of the steps.

The `ExperimentSession` belongs to the process. Edits in the engine tell it about forward steps, captures and replays of
graphs. It has a `FeatureExperiment` for each feature under test.

Outside steps and captures the engine's arm runs: in draft models (unless MLA_PATCH_AB=draft=1), in warm-ups, and in
graphs that are captured once. A step with a shadow check runs the engine's arm of all other features and is not timed.

The work on the engine's thread per step is two device events, a schedule lookup per feature, and appends to bounded
queues. It never synchronises with the device, copies from it, or touches a file.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mla_patch import files
from mla_patch.compat import steps
from mla_patch.compat.steps import RankInfo, StepInfo
from mla_patch.compat.types import HOST, SHADOW
from mla_patch.experiment import control_file
from mla_patch.experiment.assign import Assigner
from mla_patch.experiment.control import Control
from mla_patch.experiment.feature import FeatureExperiment
from mla_patch.experiment.metrics import Metrics, metrics
from mla_patch.experiment.record import DRAFT, Note, Recorder, Row, Timing
from mla_patch.experiment.timing import EventPool, device_event

log = logging.getLogger("mla_patch")
INTERVAL = 0.1  # seconds between two reads of shadow results
TELL = 10.0  # seconds between two notes about losses
MANY = 8  # a warning says that memory is needed when a size has more graphs than this


class ExperimentSession:
    """All experiments of this process. Implements `compat.steps.Watcher`."""

    def __init__(self, directory: str, stem: Callable[[], str]) -> None:
        """``directory``: for records and the control file. ``stem``: returns the name of this process's files.

        Raises:
            ValueError: there is no directory, or somebody else owns it or may write to it.
        """
        if not directory:
            raise ValueError("MLA_PATCH_REPORT is not set: an experiment needs a directory for its records")
        problem = files.directory_problem(directory)
        if problem:
            raise ValueError(f"MLA_PATCH_REPORT={directory}: {problem}")
        self.directory = Path(directory)
        self.experiments: dict[str, FeatureExperiment] = {}
        self.draft = False
        self.label = ""
        self.missing = False
        self.step = 0
        self.in_graphs: set[str] = set()  # features with calls in captured graphs of the target model
        self.in_drafts: set[str] = set()  # features with calls in captured graphs of draft models
        self.graph_open: set[str] | None = None  # while a graph is captured, the one of the two sets that it belongs to
        self.unmatched = 0  # steps whose arm had no graph
        self.recorder: Recorder | None = None
        self.control: Control | None = None
        self._stem = stem
        self._offset = 0
        self._within = ""  # "step" or "draft" while one runs
        self._shadow = False
        self._calls: dict[str, int] | None = None
        self._pool: EventPool | None = None
        self._arms: dict[str, dict[str, str]] = {"": {}}  # label -> feature -> arm
        self._broken: set[str] = set()
        self._stop = threading.Event()
        self._reading = threading.Lock()  # of the reader and of who closes; never taken on the step path
        self._rank = 0
        self._told, self._tell_at = "", 0.0
        self._failed = False
        self._metrics: Metrics | None = None

    def add(self, name: str, mode: str, ab: str, shadow: str, more: tuple[str, ...] = ()) -> FeatureExperiment:
        """Start an experiment on a feature, before the engine's first step.

        Raises:
            ValueError: as `FeatureExperiment`, or the engine has begun to step.
        """
        if self.recorder is not None and name not in self.experiments:
            raise ValueError("the engine has already run steps: choose experiments before it starts")
        experiment = self.experiments[name] = FeatureExperiment(self, name, mode, ab, shadow, more)
        self.draft = experiment.plan.draft  # of all features alike
        steps.watcher = self
        return experiment

    # steps

    def begin(self, rank: Callable[[], RankInfo], step: int) -> None:
        try:
            if self._pool is None:
                self._open(rank())
            step += self._offset
            if step <= self.step:  # the engine has restarted its count, as it does on all ranks
                self._offset += self.step + 1 - step
                step = self.step + 1
            self.step = step
            for experiment in self.experiments.values():
                experiment.take(step)
            self._begin("step", self.in_graphs)
        except Exception as problem:
            self._fail(problem)

    def begin_draft(self) -> None:
        if self._pool is None or self.graph_open is not None:  # no step yet, or it is being captured
            return
        try:
            self._begin("draft", self.in_drafts)
        except Exception as problem:
            self._fail(problem)

    def _begin(self, what: str, in_graphs: set[str]) -> None:
        assert self._pool is not None
        self._within, self.missing, self._calls = what, False, None
        due = [experiment.due(self.step) for experiment in self.experiments.values()]
        self._shadow = any(due)
        for experiment, its in zip(self.experiments.values(), due, strict=True):
            experiment.begin(self.step, self._shadow, its)
        self.label = self._label(in_graphs) if in_graphs else ""
        self._pool.begin()

    def end(self, work: Callable[[], StepInfo | None] | None) -> None:
        within, self._within = self._within, ""
        if not within:
            return
        try:
            rows: list[Timing] = []
            if self.missing:
                self.unmatched += 1
                if self.unmatched == 1:
                    self.note(self.label, "no graph", "such steps replay the engine's graph and are not compared")
            done = work() if work is not None and not self._shadow else None
            if done is not None:
                mode = "graph" if self._calls is not None else "eager" if done.kind == "decode" else "prefill"
                if within == "draft":
                    mode = DRAFT if mode == "graph" else f"{DRAFT}-{mode}"
                found = (experiment.row(self.step, mode, done, self._calls) for experiment in self.experiments.values())
                rows = [row for row in found if row is not None]
            for experiment in self.experiments.values():
                experiment.end()
                if experiment.drain is not None:
                    experiment.drain.poll()
            self.label = ""
            pool = self._pool
            assert pool is not None
            pool.end(rows)
            for timed, us in pool.harvest():
                for row in timed:
                    self._add(row._replace(us=us))
        except Exception as problem:
            self._fail(problem)

    def _fail(self, problem: Exception) -> None:
        """An error of ours: run the engine's arm from now on."""
        self.label = ""
        for experiment in self.experiments.values():
            experiment.arm = HOST
            experiment.stopped(f"experiment: {problem!r}")
        if not self._failed:
            self._failed = True
            log.warning("mla-patch: the experiment stopped, the engine's arm runs", exc_info=problem)

    def _label(self, in_graphs: set[str]) -> str:
        if self._shadow:
            return SHADOW if any(self.experiments[name].arm == SHADOW for name in in_graphs) else ""
        return _label({name: experiment.arm for name, experiment in self.experiments.items() if name in in_graphs})

    # graphs

    @contextmanager
    def capturing(self, label: str, draft: bool = False) -> Iterator[dict[str, int]]:
        calls: dict[str, int] = {}
        before = {name: experiment.counts.captured for name, experiment in self.experiments.items()}
        arms, was = self._arms[label], {name: experiment.arm for name, experiment in self.experiments.items()}
        for name, experiment in self.experiments.items():
            experiment.prepare(arms.get(name, HOST))
        self.graph_open = self.in_drafts if draft else self.in_graphs
        try:
            yield calls
        finally:
            self.graph_open = None
            for name, experiment in self.experiments.items():
                calls[name] = experiment.counts.captured - before[name]
                experiment.arm = was[name]

    def labels(self, draft: bool = False) -> list[str]:
        in_graphs = self.in_drafts if draft else self.in_graphs
        names = [name for name in self.experiments if name in in_graphs]
        choices = [self.experiments[n].plan.arms if self.experiments[n].ab else (HOST,) for n in names]
        found = {_label(arms): arms for arms in (dict(zip(names, c, strict=True)) for c in itertools.product(*choices))}
        shadowed = {name: SHADOW for name in names if self.experiments[name].sampling is not None}
        if shadowed:
            found[SHADOW] = shadowed
        if len(found) > MANY and len(self._arms) < len(found):
            log.warning("mla-patch: %d graphs of every size; MLA_PATCH_AB=arms=... takes fewer arms", len(found))
        self._arms |= found
        return [label for label in found if label and label not in self._broken]

    def failed(self, label: str, problem: Exception) -> None:
        self._broken.add(label)
        log.warning("mla-patch: no graphs of %s: %r", label, problem)
        for name, arm in self._arms[label].items():
            experiment = self.experiments[name]
            if arm == SHADOW:
                experiment.sampling = None
            elif arm != HOST:
                experiment.stopped(f"capturing {label}: {problem!r}")

    def replayed(self, calls: dict[str, int]) -> None:
        self._calls = calls
        for name, count in calls.items():
            if count:
                counts = self.experiments[name].counts
                counts.replayed = (counts.replayed or 0) + count

    # files and threads

    def note(self, feature: str, what: str, text: str) -> None:
        self._add(Note(self.step, feature, what, text))

    def _add(self, row: Row) -> None:
        if self.recorder is not None:
            self.recorder.add(row)
        if self._metrics is not None:
            self._metrics.add(row)

    def _open(self, rank: RankInfo) -> None:
        """At the first step, when the rank is known: create the records, the control file, the events, the reader."""
        about = {
            name: list(experiment.plan.arms) if experiment.ab else [HOST]
            for name, experiment in self.experiments.items()
        }
        tolerance = {name: t.breaker.tolerance for name, t in self.experiments.items() if t.sampling is not None}
        header = {"run": rank.run, "rank": rank.rank, "started": time.time()}
        header |= {"features": about, "tolerance": tolerance}
        self._rank = rank.rank
        self.recorder = Recorder(self.directory / self._stem(), header)
        path = self.directory / f"{rank.run}.control"
        try:
            control_file.create(path, {"run": rank.run, "ranks": rank.ranks, "features": about})
            self.control = Control(path, rank.rank)
        except (OSError, control_file.ControlError) as problem:
            log.warning("mla-patch: no live control: %s", problem)
        for name, experiment in self.experiments.items():
            experiment.assigner = Assigner(name, experiment.plan, self.control, experiment.breaker)
            if experiment.breaker.reason:  # it tripped before there was a record to note it in
                experiment._publish(experiment.breaker.reason)
        self._metrics = metrics()
        self._pool = EventPool(device_event if rank.device.startswith("cuda") else _Clock)
        self._stop = threading.Event()
        threading.Thread(target=self._read, args=(self._stop,), name="mla-patch-shadow", daemon=True).start()

    def _read(self, stop: threading.Event) -> None:
        while not stop.wait(INTERVAL):
            try:
                self.read()
            except BaseException as problem:  # nobody checks the results any more, so no arm of ours may run
                for experiment in self.experiments.values():
                    experiment.stopped(f"experiment: {problem!r}")
                if not isinstance(problem, Exception):
                    raise

    def read(self) -> None:
        """Check and record the shadow results that have arrived, update the metrics, and note losses."""
        with self._reading:
            for experiment in self.experiments.values():
                if experiment.drain is None or self.recorder is None:
                    continue
                for error in experiment.drain.take():
                    if error.step > 0:  # step 0 marks the warm-ups before a capture
                        self._add(error)
                        experiment.breaker.check(error)
            if self._metrics is not None:
                self._metrics.count()
            if time.monotonic() >= self._tell_at:
                self._tell_losses()

    def _tell_losses(self) -> None:
        """Note losses other than rows (which the recorder counts), if they have changed since the last note."""
        pool, control = self._pool, self.control
        counts = [(pool.untimed + pool.dropped, "steps untimed")] if pool is not None else []
        problems = [f"live control: {control.problem}"] if control is not None and control.problem else []
        for name, experiment in self.experiments.items():
            counts.append((experiment.assigner.late, f"commands to {name} came after their step"))
            if experiment.drain is not None:
                counts.append(
                    (experiment.drain.lost, f"shadow comparisons of {name} overwritten before they were fetched")
                )
                problems += (
                    [f"shadow results of {name}: {experiment.drain.problem}"] if experiment.drain.problem else []
                )
        told = "; ".join([f"{count} {what}" for count, what in counts if count] + problems)
        if told and told != self._told:
            self._told, self._tell_at = told, time.monotonic() + TELL
            self.note("", "lost", f"rank {self._rank}: {told}")

    def close(self) -> None:
        """Write everything. For tests, and for the end of a run."""
        self._stop.set()
        self._tell_at = 0.0
        self.read()
        if self.control is not None:
            self.control.close()
        if self.recorder is not None:
            self.recorder.close()
        if steps.watcher is self:
            steps.watcher = None

    def forked(self) -> None:
        """In a forked child: files, threads and events are created anew at its first step."""
        self._pool = self.recorder = self.control = self._metrics = None
        self._reading = threading.Lock()  # a thread of the parent may have held the old one


def _label(arms: dict[str, str]) -> str:
    return ",".join(f"{name}={arm}" for name, arm in arms.items() if arm != HOST)


class _Clock:
    """An event for the CPU."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: Any, /) -> float:
        return float(end_event.at - self.at) * 1e3
