"""The experiments of one process: the arm of each step, the graphs of each arm, and what becomes of the steps.

A `Trial` is one feature's; the dispatcher asks it call by call. `Live` is the process's; the edits in the host tell it
of steps, captures and replays. Outside of steps and captures every call is the host's: draft models, unless they are
asked for, warm-ups, graphs that are captured once. A step with a shadow check runs the host's arm of every feature, and
is timed for none.

On the step path: two events, one look at each schedule, appends to bounded queues. No sync, no copy, no file.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_patch import files
from mla_patch.compat import gpu, steps
from mla_patch.compat.steps import Rank, Work
from mla_patch.experiment import control_file
from mla_patch.experiment.assign import Assigner
from mla_patch.experiment.breaker import Breaker
from mla_patch.experiment.control import Control
from mla_patch.experiment.metrics import Metrics, metrics
from mla_patch.experiment.record import DRAFT, Note, Recorder, Row, Timing, bucket
from mla_patch.experiment.schedule import AGAIN, HOST, OUTSIDE, PATCH, SHADOW, Sampling, Turn, parse_ab, parse_shadow
from mla_patch.experiment.shadow import Drain, Ring
from mla_patch.experiment.timing import EventPool, device_event
from mla_patch.features import Counts

if TYPE_CHECKING:
    from mla_patch.dispatch import Site, Switch

log = logging.getLogger("mla_patch")
INTERVAL = 0.1  # seconds between two looks for shadow results
TELL = 10.0  # seconds between two notes of what is lost
MANY = 8  # graphs of one size, beyond which the memory is worth a warning
_OUT = Turn(HOST, OUTSIDE, OUTSIDE)


class Trial:
    """One feature under test. Implements the dispatcher's ``Arms``."""

    def __init__(self, live: Live, name: str, mode: str, ab: str, shadow: str, more: tuple[str, ...] = ()) -> None:
        """``mode``, ``ab`` and ``shadow`` as the flags have them; ``more``: the plugins' arms.

        Raises:
            ValueError: a value that cannot be taken, or an arm that does not exist.
        """
        self.name = name
        self.ab = "ab" in mode.split("+")
        plan = parse_ab(ab, (HOST, PATCH, *more))
        arms = plan.arms
        known = (HOST, PATCH, AGAIN, *more)
        for arm in arms:
            if arm not in known:
                raise ValueError(f"MLA_PATCH_AB: arms={arm}: {name} has {', '.join(known)}")
        if arms[0] != HOST:
            raise ValueError(f"MLA_PATCH_AB: arms={'+'.join(arms)}: expected {HOST} first")
        self.plan = replace(plan, salt=name)
        self.sampling: Sampling | None = parse_shadow(shadow) if "shadow" in mode.split("+") else None
        self.candidate = next((arm for arm in arms if arm not in (HOST, AGAIN)), PATCH)
        self.arm = HOST  # what runs now
        self.turn = _OUT
        self.before = 0  # calls served before this step, or this draft
        self.counts = Counts()
        self.assigner = Assigner(name, self.plan)
        self.breaker = Breaker(parse_shadow(shadow).tolerance, self._stop, self._publish)
        self.drain: Drain | None = None
        self._live = live
        self._switch: Switch | None = None
        self._ring: Ring | None = None
        self._tag = 0
        self._in_graph = False

    # for the dispatcher

    def choose(self, site: Site, call: Any) -> str:
        if self._live.graph_open is not None and gpu.capturing():
            self._live.graph_open.add(self.name)
        return HOST if self.arm == AGAIN else self.arm

    def compare(self, pairs: list[tuple[Any, Any]]) -> None:
        capturing = gpu.capturing()
        if capturing != self._in_graph:  # the warm-ups before a capture are over: layers count from 0
            self._in_graph, self._tag = capturing, 0
        if self._ring is None:
            if capturing:
                return  # what is allocated now would be the graph's; the warm-ups have made it, where there were any
            self._make_ring(pairs[0][0].device)
        assert self._ring is not None
        for host, ours in pairs:
            self._ring.compare(host, ours, self._tag)
        self._tag += 1

    def _make_ring(self, device: Any) -> None:
        import torch

        with torch.inference_mode(False):  # a host that steps in it may capture out of it, or the other way round
            self._ring = Ring(device)
            self._ring.begin(self._live.step if self._live.graph_open is None else 0)
            self.drain = Drain(self._ring, self.name)

    def attach(self, switch: Switch, counts: Counts) -> None:
        self._switch, self.counts = switch, counts
        counts.replayed = counts.replayed or 0

    def stopped(self, reason: str) -> None:
        self.breaker.trip(reason)

    def _stop(self, reason: str) -> None:
        if self._switch is not None:
            self._switch.trip(reason)

    def _publish(self, reason: str) -> None:
        self._live.note(self.name, "breaker", reason)
        if self._live.control is not None:
            self._live.control.trip(self.name, reason)

    # for the process's steps

    def due(self, step: int) -> bool:
        return self.sampling is not None and not self.breaker.reason and self.sampling.due(step)

    def take(self, step: int) -> None:
        """The host's step ``step`` begins: its turn, after commands."""
        taken = len(self.assigner.taken)
        self.turn = self.assigner.turn(step)
        for command in self.assigner.taken[taken:]:
            text = " ".join(map(str, filter(None, (command.kind, command.value, command.reason))))
            self._live.note(self.name, "command", f"{text}, by {command.by}")

    def begin(self, step: int, shadow: bool, due: bool) -> None:
        """The target model, or a draft model, runs this turn."""
        self.before = self.counts.served
        self._tag, self._in_graph = 0, False
        if shadow:
            self.arm = SHADOW if due else HOST
            if due and self._ring is not None:
                self._ring.begin(step)
        else:
            self.arm = self.turn.arm if self.ab and not self.breaker.reason else HOST

    def end(self) -> None:
        if self.arm == SHADOW and self._ring is not None:
            self._ring.end()
        self.arm = HOST

    def prepare(self, arm: str) -> None:
        """A capture with this arm begins."""
        self.arm, self._tag, self._in_graph = arm, 0, False
        if self._ring is not None:
            self._ring.begin(0)  # what the warm-ups compare is of no step

    def row(self, step: int, mode: str, work: Work, calls: dict[str, int] | None) -> Timing | None:
        """What is recorded of a step, but for its time."""
        if not self.ab or self._switch is None or self._switch.off:  # restored
            return None
        arm, block, group = self.turn
        ours = (calls or {}).get(self.name) or self.counts.served > self.before
        if arm not in (HOST, AGAIN) and (not ours or self.breaker.reason):
            # all was declined, there was nothing to serve, no graph of it, or it failed: other ranks' rows may differ
            arm, block, group = _OUT
        return Timing(step, self.name, arm, block, group, bucket(mode, work.batch, work.context), 0.0)


class Live:
    """All trials of this process. Implements ``compat.steps.Watcher``."""

    def __init__(self, directory: str, stem: Callable[[], str]) -> None:
        """``directory``: where records and the control file go; ``stem``: the name of this process's files.

        Raises:
            ValueError: no directory, or one that is not this process's alone.
        """
        if not directory:
            raise ValueError("MLA_PATCH_REPORT is not set: an experiment needs a directory for its records")
        problem = files.directory_problem(directory)
        if problem:
            raise ValueError(f"MLA_PATCH_REPORT={directory}: {problem}")
        self.directory = Path(directory)
        self.trials: dict[str, Trial] = {}
        self.draft = False
        self.label = ""
        self.missing = False
        self.step = 0
        self.in_graphs: set[str] = set()  # features with calls in captured graphs
        self.in_drafts: set[str] = set()  # the same, in draft models'
        self.graph_open: set[str] | None = None  # the one of these that a capture under way belongs to
        self.unmatched = 0  # steps whose arm had no graph
        self.recorder: Recorder | None = None
        self.control: Control | None = None
        self._stem = stem
        self._offset = 0
        self._within = ""  # what has begun and not ended: "step", "draft"
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

    def add(self, name: str, mode: str, ab: str, shadow: str, more: tuple[str, ...] = ()) -> Trial:
        """Put a feature under test, before the host's first step.

        Raises:
            ValueError: as `Trial`, or the host is at work already.
        """
        if self.recorder is not None and name not in self.trials:
            raise ValueError("the engine has begun to step: experiments are chosen before it starts")
        trial = self.trials[name] = Trial(self, name, mode, ab, shadow, more)
        self.draft = trial.plan.draft  # of all features alike
        steps.watcher = self
        return trial

    # steps

    def begin(self, rank: Callable[[], Rank], step: int) -> None:
        try:
            if self._pool is None:
                self._open(rank())
            step += self._offset
            if step <= self.step:  # the host counts anew, as all its ranks do
                self._offset += self.step + 1 - step
                step = self.step + 1
            self.step = step
            for trial in self.trials.values():
                trial.take(step)
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
        due = [trial.due(self.step) for trial in self.trials.values()]
        self._shadow = any(due)
        for trial, its in zip(self.trials.values(), due, strict=True):
            trial.begin(self.step, self._shadow, its)
        self.label = self._label(in_graphs) if in_graphs else ""
        self._pool.begin()

    def end(self, work: Callable[[], Work | None] | None) -> None:
        within, self._within = self._within, ""
        if not within:
            return
        try:
            rows: list[Timing] = []
            if self.missing:
                self.unmatched += 1
                if self.unmatched == 1:
                    self.note(self.label, "no graph", "such steps replay the host's and are in no comparison")
            done = work() if work is not None and not self._shadow else None
            if done is not None:
                mode = "graph" if self._calls is not None else "eager" if done.kind == "decode" else "prefill"
                if within == "draft":
                    mode = DRAFT if mode == "graph" else f"{DRAFT}-{mode}"
                found = (trial.row(self.step, mode, done, self._calls) for trial in self.trials.values())
                rows = [row for row in found if row is not None]
            for trial in self.trials.values():
                trial.end()
                if trial.drain is not None:
                    trial.drain.poll()
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
        """Our own error: the host's arm from here on."""
        self.label = ""
        for trial in self.trials.values():
            trial.arm = HOST
            trial.stopped(f"experiment: {problem!r}")
        if not self._failed:
            self._failed = True
            log.warning("mla-patch: the experiment stopped, the host's arm runs", exc_info=problem)

    def _label(self, in_graphs: set[str]) -> str:
        if self._shadow:
            return SHADOW if any(self.trials[name].arm == SHADOW for name in in_graphs) else ""
        return _label({name: trial.arm for name, trial in self.trials.items() if name in in_graphs})

    # graphs

    @contextmanager
    def capturing(self, label: str, draft: bool = False) -> Iterator[dict[str, int]]:
        calls: dict[str, int] = {}
        before = {name: trial.counts.captured for name, trial in self.trials.items()}
        arms, was = self._arms[label], {name: trial.arm for name, trial in self.trials.items()}
        for name, trial in self.trials.items():
            trial.prepare(arms.get(name, HOST))
        self.graph_open = self.in_drafts if draft else self.in_graphs
        try:
            yield calls
        finally:
            self.graph_open = None
            for name, trial in self.trials.items():
                calls[name] = trial.counts.captured - before[name]
                trial.arm = was[name]

    def labels(self, draft: bool = False) -> list[str]:
        in_graphs = self.in_drafts if draft else self.in_graphs
        names = [name for name in self.trials if name in in_graphs]
        choices = [self.trials[n].plan.arms if self.trials[n].ab else (HOST,) for n in names]
        found = {_label(arms): arms for arms in (dict(zip(names, c, strict=True)) for c in itertools.product(*choices))}
        shadowed = {name: SHADOW for name in names if self.trials[name].sampling is not None}
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
            trial = self.trials[name]
            if arm == SHADOW:
                trial.sampling = None
            elif arm != HOST:
                trial.stopped(f"capturing {label}: {problem!r}")

    def replayed(self, calls: dict[str, int]) -> None:
        self._calls = calls
        for name, count in calls.items():
            if count:
                counts = self.trials[name].counts
                counts.replayed = (counts.replayed or 0) + count

    # files and threads

    def note(self, feature: str, what: str, text: str) -> None:
        self._add(Note(self.step, feature, what, text))

    def _add(self, row: Row) -> None:
        if self.recorder is not None:
            self.recorder.add(row)
        if self._metrics is not None:
            self._metrics.add(row)

    def _open(self, rank: Rank) -> None:
        """At the first step, when the process's place is known: records, control file, events, a reader."""
        about = {name: list(trial.plan.arms) if trial.ab else [HOST] for name, trial in self.trials.items()}
        tolerance = {name: t.breaker.tolerance for name, t in self.trials.items() if t.sampling is not None}
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
        for name, trial in self.trials.items():
            trial.assigner = Assigner(name, trial.plan, self.control, trial.breaker)
            if trial.breaker.reason:  # before there was anything to note it in
                trial._publish(trial.breaker.reason)
        self._metrics = metrics()
        self._pool = EventPool(device_event if rank.device.startswith("cuda") else _Clock)
        self._stop = threading.Event()
        threading.Thread(target=self._read, args=(self._stop,), name="mla-patch-shadow", daemon=True).start()

    def _read(self, stop: threading.Event) -> None:
        while not stop.wait(INTERVAL):
            try:
                self.read()
            except BaseException as problem:  # whose checks are lost: no arm may run on without them
                for trial in self.trials.values():
                    trial.stopped(f"experiment: {problem!r}")
                if not isinstance(problem, Exception):
                    raise

    def read(self) -> None:
        """Judge and record the shadow results that have arrived; count what is to be counted; say what is lost."""
        with self._reading:
            for trial in self.trials.values():
                if trial.drain is None or self.recorder is None:
                    continue
                for error in trial.drain.take():
                    if error.step > 0:  # or of a warm-up before a capture
                        self._add(error)
                        trial.breaker.check(error)
            if self._metrics is not None:
                self._metrics.count()
            if time.monotonic() >= self._tell_at:
                self._tell_losses()

    def _tell_losses(self) -> None:
        """Note what this process has lost beside rows, which the recorder counts, when it has changed."""
        pool, control = self._pool, self.control
        counts = [(pool.untimed + pool.dropped, "steps untimed")] if pool is not None else []
        problems = [f"live control: {control.problem}"] if control is not None and control.problem else []
        for name, trial in self.trials.items():
            counts.append((trial.assigner.late, f"commands to {name} came after their step"))
            if trial.drain is not None:
                counts.append((trial.drain.lost, f"shadow comparisons of {name} overwritten before they were fetched"))
                problems += [f"shadow results of {name}: {trial.drain.problem}"] if trial.drain.problem else []
        told = "; ".join([f"{count} {what}" for count, what in counts if count] + problems)
        if told and told != self._told:
            self._told, self._tell_at = told, time.monotonic() + TELL
            self.note("", "lost", f"rank {self._rank}: {told}")

    def close(self) -> None:
        """Write what there is; for tests and the end of a run."""
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
        """In a child: files, threads and events are made anew at its first step."""
        self._pool = self.recorder = self.control = self._metrics = None
        self._reading = threading.Lock()  # another thread of the parent's may have held it


def _label(arms: dict[str, str]) -> str:
    return ",".join(f"{name}={arm}" for name, arm in arms.items() if arm != HOST)


class _Clock:
    """An event of a device that is the CPU."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: Any, /) -> float:
        return float(end_event.at - self.at) * 1e3
