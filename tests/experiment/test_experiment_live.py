"""Arms in a running engine: eager steps, graphs captured once per arm, shadow checks, the breaker, live commands."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import ERROR, LAYERS, ByKey, BySize, DraftByKey, Engine, Tape, batch, tapes

from mla_patch.compat import steps
from mla_patch.compat.sglang.graphs import rank_info
from mla_patch.dispatch import ArmCode, FeatureGate
from mla_patch.experiment import analysis, control, control_file, merge
from mla_patch.experiment import files as run_files
from mla_patch.experiment.feature import FeatureExperiment
from mla_patch.experiment.live import ExperimentSession
from mla_patch.experiment.record import Error, Timing
from mla_patch.experiment.schedule import AGAIN, NOT_COMPARED, Plan, Sampling, Schedule
from mla_patch.experiment.shadow import Drain
from mla_patch.features import Counts, State
from mla_patch.hooks import editing
from mla_patch.hooks.sglang.edits import graphs as sglang_graphs
from mla_patch.hooks.sglang.edits.steps import watch_steps

__all__ = ["tapes"]  # a fixture

AB = "block=4,warmup=4"
RUNNERS = [BySize, ByKey]


class Running:
    """An engine under test, with its edits in place."""

    def __init__(self, folder: Path, mode: str, ab: str, shadow: str, runner: type | None, **engine: Any) -> None:
        self.folder = folder
        self.engine = Engine(**engine)
        more = tuple(name for name in engine if name != "error")
        self.live = ExperimentSession(str(folder), lambda: "engine-1")
        self.experiment: FeatureExperiment = self.live.add("decode", mode, ab, shadow, more)
        module = self.engine.module
        edits = [watch_steps, sglang_graphs.arms_by_size, sglang_graphs.arms_by_key]
        self.undo = [edit(module) for edit in edits]
        self.engine.switch.set(arms=self.experiment)
        self.experiment.attach(self.engine.switch, self.engine.counts)
        self.runner = self.engine.start(runner)

    def run(self, count: int, **how: Any) -> list[str]:
        """Run ``count`` steps; for each, the arm that its result is of."""
        found = []
        for _ in range(count):
            found.append(self.engine.whose(self.runner.forward(batch(**how))))
            self.live.read()  # in an engine, a thread does this ten times a second
        return found

    def rows(self) -> list[Any]:
        self.live.close()
        (path,) = self.folder.glob("*.steps.jsonl")
        return merge.read_log(path).rows

    def path(self) -> Path:
        return next(self.folder.glob("*.control"))


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[Running] = []

    def start(
        mode: str = "ab", ab: str = AB, shadow: str = "every=8,tolerance=0.02", runner: Any = None, **engine: Any
    ) -> Running:
        made.append(Running(tmp_path, mode, ab, shadow, runner, **engine))
        return made[-1]

    yield start
    for one in made:
        one.live.close()
        for undo in one.undo:
            undo()
    assert steps.watcher is None and not editing._shared and not sglang_graphs._drafts


def planned(first: int, last: int, **changes: Any) -> list[str]:
    schedule = Schedule(Plan(**({"block": 4, "warmup": 4, "salt": "decode"} | changes)))
    return [schedule.assignment(step).arm for step in range(first, last)]


def test_each_step_runs_the_arm_of_its_number(start: Start) -> None:
    one = start()
    assert one.run(40) == planned(1, 41)
    rows = [row for row in one.rows() if isinstance(row, Timing)]
    assert [row.arm for row in rows] == planned(1, 41)
    assert {row.bucket for row in rows} == {"eager/4/128"} and all(row.us > 0 for row in rows)
    assert [row.block for row in rows[:5]] == [NOT_COMPARED] * 3 + [4] * 2
    assert one.engine.counts.served == LAYERS * planned(1, 41).count("patch")


def test_outside_steps_the_engines_arm_serves(start: Start) -> None:
    one = start(ab="block=1,warmup=0,ratio=0.9")
    one.run(20)
    assert one.engine.whose(one.engine.model(torch.ones(1, 8))) == "host"
    draft = one.engine.start(draft=True)
    assert {one.engine.whose(draft.forward(batch())) for _ in range(20)} == {"host"}


@pytest.mark.parametrize("runner", RUNNERS)
def test_what_another_graph_costs_is_measured_on_one_graph(
    start: Start, runner: type, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first graph also costs what the engine compiles and allocates, so a second of the same size is measured."""
    free = iter([2**40, 2**40 - 1878 * 2**20, 2**39, 2**39 - 56 * 2**20])
    monkeypatch.setattr(sglang_graphs.gpu, "free_memory", lambda: next(free, 0))
    caplog.set_level(logging.WARNING)
    start(runner=runner)
    (line,) = (message for message in caplog.messages if "every CUDA graph" in message)
    assert "; the first of these, of the largest size, took " in line and line.endswith(" s and 56 MiB")


@pytest.mark.parametrize("runner", RUNNERS)
def test_graphs_are_captured_once_per_arm_and_chosen_at_replay(start: Start, runner: type, caplog: Any) -> None:
    caplog.set_level(logging.WARNING)
    one = start(runner=runner)
    graphs = one.runner.graph_runner.graphs
    assert one.engine.counts.captured == 2 * LAYERS  # two sizes with one arm of ours each
    served = one.engine.counts.served
    assert one.run(40) == planned(1, 41)
    assert one.run(2, size=7) == planned(41, 43)
    assert one.engine.counts.served == served  # a replay runs no Python of ours
    patched = planned(1, 43).count("patch")
    assert one.engine.counts.replayed == LAYERS * patched
    rows = [row for row in one.rows() if isinstance(row, Timing)]
    assert [row.arm for row in rows] == planned(1, 43)
    assert {row.bucket for row in rows} == {"graph/4/128", "graph/8/128"}
    assert [message for message in caplog.messages if "captured" in message] == [
        m for m in caplog.messages if "every CUDA graph is captured 1 more times (decode=patch)" in m
        or "captured 2 graphs of the host's arm" in m
    ]  # fmt: skip
    assert len(caplog.messages) == 2
    assert len(graphs) == (2 if runner is BySize else 4)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_draft_models_graphs_are_captured_once(start: Start, runner: type) -> None:
    one = start()
    draft = one.engine.start(runner, draft=True)
    assert (one.engine.counts.captured, len(draft.graph_runner.graphs)) == (0, 2)
    assert not one.live.in_graphs and not one.experiment.breaker.reason
    assert one.engine.whose(draft.forward(batch())) == "host"


# --- draft models, with draft=1


def spoken(one: Running, count: int, decode: Callable[..., Any], **how: Any) -> tuple[list[str], list[str]]:
    """For each step, the arm that its result is of, and the arm of the draft after it."""
    steps, drafts = [], []
    for _ in range(count):
        steps += one.run(1)
        drafts.append(one.engine.whose(decode(batch(**how))))
        one.live.read()
    return steps, drafts


@pytest.mark.parametrize("draft", ["", ",draft=0", ",draft=1"])
@pytest.mark.parametrize("runner", RUNNERS)
def test_with_draft_1_a_draft_decodes_with_the_arm_of_its_step(
    start: Start, runner: type, draft: str, caplog: Any
) -> None:
    one = start(ab=AB + draft, runner=runner)
    before = one.engine.counts.captured
    eagle = one.engine.start_eagle(runner)
    decode = eagle.eagle.replay if runner is BySize else eagle.eagle.execute
    first = one.engine.whose(decode(batch()))
    steps, drafts = spoken(one, 40, decode)
    asked, sizes, variants = draft == ",draft=1", 2, 1 if runner is BySize else 2
    assert first == "host"  # before any step
    assert steps == planned(1, 41) and drafts == (steps if asked else ["host"] * 40)
    assert one.engine.counts.captured - before == asked * sizes * variants * LAYERS
    patched = steps.count("patch") * (1 + asked)
    assert one.engine.counts.replayed == LAYERS * patched
    assert len(eagle.eagle.graphs) == (sizes if runner is BySize else sizes * variants * (1 + asked))
    rows = [row for row in one.rows() if isinstance(row, Timing)]
    assert [row.arm for row in rows if row.bucket == "graph/4/128"] == steps
    assert [(row.step, row.arm) for row in rows if row.bucket == "draft/4/128"] == list(
        enumerate(drafts if asked else [], 1)
    )
    assert one.live.unmatched == 0
    assert sum("CUDA graph of the draft model is captured 1 more times" in line for line in caplog.messages) == asked
    assert one.experiment.breaker.reason == "" and merge.read_runs(one.folder)[0][0].differed == 0


@pytest.mark.parametrize("asked", [False, True])
def test_a_draft_model_without_graphs(start: Start, asked: bool) -> None:
    one = start(ab=f"{AB},draft={asked:d}")
    draft = one.engine.start(draft=True)
    steps, drafts = spoken(one, 40, draft.forward)
    assert drafts == (steps if asked else ["host"] * 40) and "patch" in steps
    assert one.engine.whose(draft.forward(batch(mode="extend"))) == "host"
    modes = [row.bucket.partition("/")[0] for row in one.rows()]
    assert modes.count("draft-eager") == 40 * asked and set(modes) <= {"eager", "draft-eager"}


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_draft_alone_has_calls_in_graphs(start: Start, runner: type) -> None:
    """As with SGLang's Triton backend, whose verify is an extend: the graphs of the target model are captured once."""
    one = start(ab=f"{AB},draft=1")
    model, one.runner.model = one.runner.model, lambda q: q * 2**LAYERS
    one.runner.graph_runner = getattr(one.engine.module, runner.name)(one.runner)
    one.runner.model = model
    eagle = one.engine.start_eagle(runner)
    assert (one.live.in_graphs, one.live.in_drafts) == (set(), {"decode"})
    steps, drafts = spoken(one, 40, eagle.eagle.replay if runner is BySize else eagle.eagle.execute)
    assert set(steps) == {"host"} and drafts == planned(1, 41) and one.live.unmatched == 0
    one.rows()
    ((run,), _) = merge.read_runs(one.folder)
    told = analysis.analyse(run)
    assert run.differed == 0 and (told["steps"], told["outside"]) == (40, 3)
    assert {comparison["bucket"] for comparison in told["comparisons"]} >= {"draft/4/128"}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("mode", ["shadow", "ab+shadow"])
def test_a_wrong_draft_trips_the_breaker(start: Start, runner: type, mode: str) -> None:
    one = start(mode, "block=1,warmup=0,draft=1", error=0.05)
    one.runner.model = lambda q: q * 2**LAYERS
    eagle = one.engine.start_eagle(runner)
    decode = eagle.eagle.replay if runner is BySize else eagle.eagle.execute
    spoken(one, 40, decode)
    ((reason, state),) = one.engine.stops
    assert state is State.FAILED and "error 0.05, tolerance 0.02" in reason
    sampled = next(step for step in range(1, 41) if Sampling(8).due(step))
    assert reason.startswith(f"shadow check at step {sampled},")
    assert spoken(one, 20, decode)[1] == ["host"] * 20


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_breaker_that_trips_between_a_step_and_its_draft(start: Start, runner: type) -> None:
    one = start(ab="block=1,warmup=0,ratio=0.9,draft=1")
    eagle = one.engine.start_eagle(runner)
    decode = eagle.eagle.replay if runner is BySize else eagle.eagle.execute
    while one.run(1) != ["patch"]:
        pass
    one.experiment.breaker.trip("enough")
    assert one.engine.whose(decode(batch())) == "host"
    row = [row for row in one.rows() if isinstance(row, Timing)][-1]
    assert (row.bucket, row.arm, row.block) == ("draft/4/128", "host", NOT_COMPARED)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_draft_that_is_captured_while_steps_run(start: Start, runner: type) -> None:
    """Captures and warm-ups call the draft model, too. Those calls are not decode steps."""
    one = start(ab="block=1,warmup=0,ratio=0.9,draft=1")
    while one.run(1) != ["patch"]:
        pass
    eagle = one.engine.start_eagle(runner)
    assert one.engine.whose((eagle.eagle.replay if runner is BySize else eagle.eagle.execute)(batch())) == "patch"
    assert {row.bucket.partition("/")[0] for row in one.rows()} == {"eager", "draft"}


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_draft_runner_with_other_methods_keeps_the_engines_arm(start: Start, runner: type, caplog: Any) -> None:
    one = start(ab=f"{AB},draft=1")
    owner = one.engine.drafts[runner]
    if runner is BySize:
        owner.replay = lambda self, batch: BySize.replay(self, batch)
    else:
        owner.execute = lambda self, batch: DraftByKey.execute(self, batch)
    eagle = one.engine.start_eagle(runner)
    assert one.engine.counts.captured == 0 and not sglang_graphs._drafts
    assert one.engine.whose(eagle.eagle.replay(batch())) == "host"
    (told,) = caplog.messages
    assert told.startswith("mla-patch: the draft model's graphs keep the host's arm: EAGLEDraftCudaGraphRunner.")


def test_a_draft_runner_without_keys_keeps_the_engines_arm(start: Start) -> None:
    one = start(ab=f"{AB},draft=1")
    owner = one.engine.drafts[ByKey]

    def capture_one_shape(self: Any, size: int, forward: Any, *more: Any) -> None:
        self.model_runner.draft(self.buffer[:size])

    def execute(self: Any, forward_batch: Any) -> torch.Tensor:
        return host_model(forward_batch.q)

    def host_model(q: torch.Tensor) -> torch.Tensor:
        return q * 2**LAYERS

    owner.capture_one_shape, owner.execute = capture_one_shape, execute
    eagle = one.engine.start_eagle(ByKey)
    assert set(spoken(one, 20, eagle.eagle.execute)[1]) == {"host"}
    assert one.experiment.breaker.reason == "" and owner in sglang_graphs._drafts


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_step_whose_arm_has_no_graph_is_not_compared(start: Start, runner: type) -> None:
    one = start(runner=runner, ab="block=1,warmup=0")
    graphs = one.runner.graph_runner
    if runner is BySize:
        for value in (*dict.values(graphs.graphs), *dict.values(graphs.output_buffers)):
            del value.by_label["decode=patch"]
    else:
        graphs._mla_patch_keys = {key: {} for key in graphs._mla_patch_keys if "decode" not in key.variant_label}
    assert set(one.run(20)) == {"host"}
    assert one.live.unmatched == planned(1, 21, block=1, warmup=0).count("patch")
    rows = one.rows()
    assert {row.arm for row in rows if isinstance(row, Timing)} == {"host"}
    assert [(row.feature, row.what) for row in rows if not isinstance(row, Timing)] == [("decode=patch", "no graph")]


@pytest.mark.parametrize("runner", RUNNERS)
def test_after_undo_the_engines_graphs_are_replayed(start: Start, runner: type) -> None:
    one = start(runner=runner, ab="block=1,warmup=0,ratio=0.9")
    assert "patch" in one.run(12)
    for undo in one.undo:
        undo()
    one.undo.clear()
    assert set(one.run(12)) == {"host"}
    plain = getattr(one.engine.module, runner.name).__dict__["capture"]
    assert not hasattr(plain, "__wrapped__")


def test_features_share_the_edits() -> None:
    module = Engine().module
    plain = module.ModelRunner.forward
    first, second = (watch_steps(module) for _ in range(2))
    ours = module.ModelRunner.forward
    first()
    assert module.ModelRunner.forward is ours is not plain
    second()
    assert module.ModelRunner.forward is plain


def test_a_runner_with_other_methods_is_reported() -> None:
    module = Engine().module
    del module.CudaGraphRunner.capture
    with pytest.raises(TypeError, match=r"CudaGraphRunner\.capture does not exist, expected \(self"):
        sglang_graphs.arms_by_size(module)
    module.ModelRunner.forward = lambda self, batch: None
    with pytest.raises(TypeError, match=r"ModelRunner\.forward takes \(self, batch\), expected \(self, forward_batch"):
        watch_steps(module)
    assert not editing._shared


@pytest.mark.parametrize("runner", [None, *RUNNERS])
def test_an_a_a_check_runs_the_engines_code_under_both_names(start: Start, runner: Any) -> None:
    one = start(ab=f"{AB},arms=host+{AGAIN}", runner=runner)
    assert set(one.run(40)) == {"host"}
    if runner is not None:
        assert len(Tape.open) == 0
    rows = [row for row in one.rows() if isinstance(row, Timing)]
    assert [row.arm for row in rows] == planned(1, 41, arms=("host", AGAIN))
    assert one.engine.counts.served == one.engine.counts.captured == 0


@pytest.mark.parametrize("runner", [None, *RUNNERS])
def test_a_plugins_arm(start: Start, runner: Any) -> None:
    def mine(call: Any) -> None:
        call.out.copy_(call.q * 3)

    one = start(mine=mine, runner=runner)
    arms = planned(1, 41, arms=("host", "patch", "mine"))
    found = one.run(40)
    assert [whose if whose[0] != "?" else "mine" for whose in found] == arms
    assert "mine" in arms


@pytest.mark.parametrize(
    "given, told",
    [
        ("arms=host+none", "arms=none: decode has host, patch, host-again"),
        ("arms=patch+host", "expected host first"),
        ("arms=host", "two or more"),
        ("blocks=1", "did you mean block"),
    ],
)
def test_arms_that_do_not_exist(tmp_path: Path, given: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ExperimentSession(str(tmp_path), lambda: "").add("decode", "ab", given, "every=8")


def test_no_directory_no_experiment() -> None:
    with pytest.raises(ValueError, match="MLA_PATCH_REPORT is not set"):
        ExperimentSession("", lambda: "").add("decode", "ab", AB, "")


def test_steps_with_declined_calls_are_not_compared(start: Start) -> None:
    one = start(ab="block=1,warmup=0")
    one.engine.declining = True
    assert set(one.run(20)) == {"host"}
    rows = [row for row in one.rows() if isinstance(row, Timing)]
    assert {(row.arm, row.block == NOT_COMPARED) for row in rows} == {("host", True), ("host", False)}


def test_prefill_and_idle_steps(start: Start) -> None:
    one = start()
    one.run(6, mode="extend")
    one.run(6, mode="idle")
    one.run(6, mode="target_verify")
    assert [row.bucket.partition("/")[0] for row in one.rows()] == ["prefill"] * 6 + ["eager"] * 6


# --- shadow checks


@pytest.mark.parametrize("mode", ["shadow", "ab+shadow"])
@pytest.mark.parametrize("runner", [None, *RUNNERS])
def test_a_shadow_step_returns_the_engines_result_and_records_the_error(start: Start, runner: Any, mode: str) -> None:
    one = start(mode, runner=runner)
    due = [step for step in range(1, 65) if Sampling(8).due(step)]
    arms = planned(1, 65) if "ab" in mode else ["host"] * 64
    want = ["host" if step in due else arm for step, arm in zip(range(1, 65), arms, strict=True)]
    assert one.run(64) == want
    one.run(2)
    rows = one.rows()
    errors = [row for row in rows if isinstance(row, Error)]
    assert [row.step for row in errors if row.tag == 0 and row.step < 65] == due
    assert {row.tag for row in errors} == set(range(LAYERS))
    assert all(abs(row.relative - ERROR) < 1e-6 and row.nan == 0 for row in errors)
    assert not {row.step for row in rows if isinstance(row, Timing)} & set(due)
    if runner is not None:
        sizes, labels = 2, 2 if "ab" in mode else 1
        assert one.engine.counts.captured == sizes * labels * LAYERS


def test_an_engine_may_step_inside_and_outside_inference_mode(start: Start) -> None:
    one = start("shadow", shadow="every=1")
    with torch.inference_mode():
        one.run(4)
    one.run(4)
    assert (
        one.experiment.breaker.reason == "" and one.experiment.drain is not None and one.experiment.drain.problem == ""
    )
    assert {row.step for row in one.rows() if isinstance(row, Error)} >= set(range(1, 8))


@pytest.mark.parametrize("runner", [None, *RUNNERS])
def test_an_arm_that_is_wrong_trips_the_breaker(start: Start, runner: Any) -> None:
    one = start("ab+shadow", "block=1,warmup=0", error=0.05, runner=runner)
    one.run(40)
    ((reason, state),) = one.engine.stops
    assert state is State.FAILED
    assert reason.startswith("shadow check at step ") and "error 0.05, tolerance 0.02" in reason
    first = int(reason.split("step ")[1].split(",")[0])
    assert first == next(step for step in range(1, 41) if Sampling(8).due(step))
    assert set(one.run(20)) == {"host"}
    rows = one.rows()
    assert [row.text for row in rows if getattr(row, "what", "") == "breaker"] == [reason]
    trips = control_file.read(one.path())[0].commands
    assert [(command.kind, command.feature) for command in trips] in ([("trip", "decode")], [])


def test_the_breaker_tells_the_other_ranks(start: Start) -> None:
    one = start("ab+shadow", "block=1,warmup=0", error=0.05)
    one.run(20)
    end = time.monotonic() + 10
    while not control_file.read(one.path())[0].commands:
        assert time.monotonic() < end
        time.sleep(0.02)
    (command,) = control_file.read(one.path())[0].commands
    assert (command.kind, command.feature) == ("trip", "decode") and "error 0.05" in command.reason


def test_an_exception_in_an_arm_trips_the_breaker(start: Start) -> None:
    one = start(ab="block=1,warmup=0", error="raise")
    one.engine.error = "raise"
    for _ in range(20):
        one.runner.forward(batch())
    assert one.engine.stops == [("decode: RuntimeError('boom')", State.FAILED)]
    assert one.experiment.breaker.reason == "decode: RuntimeError('boom')"
    rows = [row for row in one.rows() if isinstance(row, Timing)]
    assert len(rows) == 20 and {row.arm for row in rows} == {"host"}  # in the step of the exception, too


def test_an_unreadable_batch_stops_only_the_experiment(start: Start) -> None:
    one = start(ab="block=1,warmup=0")
    odd = batch()
    del odd.seq_lens_sum
    assert one.engine.whose(one.runner.forward(odd)) in ("host", "patch")
    assert "seq_lens_sum" in one.experiment.breaker.reason and set(one.run(8)) == {"host"}


@pytest.mark.parametrize("error", ["raise", "raise in a graph"])
@pytest.mark.parametrize("runner", RUNNERS)
def test_an_arm_that_cannot_be_captured_leaves_the_engines_graphs(start: Start, runner: type, error: str) -> None:
    one = start(ab="block=1,warmup=0", error=error, runner=runner)
    where = "decode: " if error == "raise" else "capturing decode=patch: "
    assert one.engine.stops == [(f"{where}RuntimeError('boom')", State.FAILED)]
    one.engine.error = ERROR
    assert set(one.run(20)) == {"host"}
    assert all(row.arm == "host" for row in one.rows() if isinstance(row, Timing))


# --- live control


@pytest.mark.parametrize("runner", [None, *RUNNERS])
def test_commands_switch_arms_without_a_restart(start: Start, runner: Any) -> None:
    one = start(runner=runner)
    one.run(1)
    path = one.path()
    about = control_file.read(path)[0].about
    assert (about["ranks"], about["features"]) == (1, {"decode": ["host", "patch"]})

    def send(kind: str, value: Any = None) -> None:
        with control.Controller(path) as controller:
            at = controller.send("decode", kind, value, at=one.live.step + 200).at
        assert one.live.control is not None
        one.live.control.poll()
        one.run(at - one.live.step)

    send("arm", "patch")
    assert set(one.run(20)) == {"patch"}
    send("stop")
    assert set(one.run(20)) == {"host"}
    send("start")
    assert set(one.run(40)) == {"host", "patch"}
    with pytest.raises(control_file.ControlError, match="'mine' is not an arm of decode"):
        send("arm", "mine")
    notes = [row.text for row in one.rows() if getattr(row, "what", "") == "command"]
    assert [note.partition(",")[0] for note in notes] == ["arm patch", "stop", "start"]


def test_an_unwritable_folder_costs_only_the_records(start: Start, tmp_path: Path) -> None:
    one = start()
    one.live.directory = tmp_path / "file" / "below"
    (tmp_path / "file").touch()
    assert one.run(12) == planned(1, 13)
    assert one.live.control is None and one.live.recorder is not None
    one.live.recorder.flush()
    assert one.live.recorder.lost == 12


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), control_file.ControlError("no room")])
def test_a_control_file_that_cannot_be_created_costs_only_the_commands(
    start: Start, problem: Exception, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def create(path: Path, about: Any) -> None:
        raise problem

    monkeypatch.setattr(control_file, "create", create)
    one = start()
    assert one.run(12) == planned(1, 13)
    assert one.live.control is None and [m for m in caplog.messages if f"no live control: {problem}" in m]
    assert len(one.rows()) == 12


def test_an_error_of_ours_does_not_reach_the_engine(start: Start, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    one = start(ab="block=1,warmup=0")
    one.run(4)
    monkeypatch.setattr(one.experiment.assigner, "assignment", lambda step: 1 / 0)
    assert set(one.run(8)) == {"host"}
    assert "ZeroDivisionError" in one.experiment.breaker.reason
    assert len([m for m in caplog.messages if "experiment stopped" in m]) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("problem", [ZeroDivisionError("x"), KeyboardInterrupt("killed")])
def test_shadow_results_that_cannot_be_read_stop_the_arm(
    start: Start, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    """The reader fails or is killed. In the second case its thread ends."""
    one = start("ab+shadow", "block=1,warmup=0", "every=1")

    def take(drain: Drain) -> Any:
        raise problem

    monkeypatch.setattr(Drain, "take", take)
    end = time.monotonic() + 10
    while not one.engine.stops:
        assert time.monotonic() < end
        one.runner.forward(batch())
        time.sleep(0.01)
    assert repr(problem) in one.engine.stops[0][0]
    assert {one.engine.whose(one.runner.forward(batch())) for _ in range(8)} == {"host"}
    one.live.experiments["decode"].drain = None


def test_two_readers_take_each_shadow_result_once(start: Start) -> None:
    """The readers are the session's thread and the caller of close()."""
    one = start("shadow", shadow="every=1")
    one.run(1)
    drain, inside = one.experiment.drain, threading.Barrier(2)
    assert drain is not None
    take = drain.take

    def slow() -> list[Error]:
        found = take()
        with contextlib.suppress(threading.BrokenBarrierError):  # broken, because the other reader waits for the lock
            inside.wait(0.2)
        return found

    drain.take = slow  # type: ignore[method-assign]
    for _ in range(3):
        one.runner.forward(batch())
    readers = [threading.Thread(target=one.live.read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert inside.broken
    drain.take = take  # type: ignore[method-assign]


def test_what_is_lost_is_in_the_report(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_patch.experiment.live.TELL", 0.0)
    one = start("ab+shadow", shadow="every=1")
    one.run(4)
    assert one.experiment.drain is not None and one.live._pool is not None and one.live.control is not None
    one.path().unlink()
    one.live.control.poll()
    one.experiment.drain.lost += 3
    one.live._pool.dropped += 1
    one.experiment.assigner.late += 2
    one.run(4)
    one.rows()
    told = run_files.report(one.folder)
    (finding,) = told["findings"]
    for part in (
        "rank 0: 1 steps untimed", "2 commands to decode came after their step", "live control: ", "No such file",
        "3 shadow comparisons of decode overwritten before they were fetched",
    ):  # fmt: skip
        assert part in finding
    assert finding in [f"{one.live.recorder.header['run']}: {note['text']}" for note in told["runs"][0]["notes"]]


def test_an_exception_of_the_engine_is_passed_on_unchanged(start: Start) -> None:
    one = start()
    one.run(2)
    bad = batch()
    bad.q = None
    with pytest.raises(TypeError, match="empty_like"):
        one.runner.forward(bad)
    assert one.experiment.arm == "host" and one.run(2) == planned(4, 6)


def test_an_engine_may_restart_its_step_count(start: Start) -> None:
    one = start()
    one.run(10)
    one.runner.forward_pass_id = 0
    assert one.run(10) == planned(11, 21)


def test_the_name_of_a_run_is_the_same_on_all_its_ranks(start: Start) -> None:
    one = start()
    rank = rank_info(one.runner)
    assert (rank.rank, rank.ranks, rank.device) == (0, 1, "cpu")
    assert rank.run.startswith("sglang-") and rank.run.endswith("-1234")
    one.run(1)
    header = json.loads(next(iter((one.rows(), *one.folder.glob("*.jsonl"))[1:])).read_text().splitlines()[0])
    assert (header["run"], header["rank"]) == (rank.run, 0)


# --- what a step costs


class Event:
    """Replaces torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1.0

    def synchronize(self) -> None:
        pass


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that have waited. Tensors are on ``meta``, so that reading a value fails as well."""
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for owner, names in (
        (torch.cuda, ("synchronize",)),
        (torch.accelerator, ("synchronize",)),
        (Event, ("synchronize",)),
        (torch.cuda.Stream, ("synchronize",)),
        (torch.Tensor, ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, lambda *args, _name=name: seen.append(_name))
    return seen


@pytest.mark.parametrize("runner", [None, *RUNNERS])
def test_no_step_waits_for_the_device(
    start: Start, runner: Any, monkeypatch: pytest.MonkeyPatch, waits: list[str]
) -> None:
    copies: list[Any] = []

    class Never:
        def query(self) -> bool:
            return False

    def copy_aside(targets: Any, sources: Any) -> Any:
        copies.append(sources)
        return Never()

    # data leave the device only by the drain's copy on a side stream
    monkeypatch.setattr("mla_patch.experiment.feature.Drain", functools.partial(Drain, copy=copy_aside))
    with torch.device("meta"):
        one = start("ab+shadow", "block=4,warmup=4,draft=1", runner=runner)
        draft = one.engine.start(draft=True)
        if runner is not None:
            eagle = one.engine.start_eagle(runner).eagle
        one.runner.device = "cuda"
        for _ in range(64):
            one.runner.forward(batch())
            draft.forward(batch())
            if runner is not None:
                (eagle.replay if runner is BySize else eagle.execute)(batch())
    assert waits == [] and one.engine.stops == [] and one.experiment.breaker.reason == ""
    assert len(copies) == 1 and one.experiment.drain is not None and one.experiment.drain.problem == ""
    served = one.engine.counts.replayed if runner else one.engine.counts.served
    assert served is not None and served > 2 * 64 * LAYERS / 4
    assert {row.us for row in one.rows() if isinstance(row, Timing)} == {1000.0}  # measured by the device's events


WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "torch.cuda.synchronize": lambda q: torch.cuda.synchronize(),
    "torch.accelerator.synchronize": lambda q: torch.accelerator.synchronize(),
    "Event.synchronize": lambda q: torch.cuda.Event().synchronize(),
    "item": lambda q: q.sum().item(),
    "if": lambda q: 1 if q.sum() != 0 else 0,
    "int": lambda q: int(q.sum()),
    "tolist": lambda q: q.tolist(),
    "nonzero": lambda q: q.nonzero(),
    "cpu": lambda q: q.cpu(),
    "to": lambda q: q.to("cpu"),
    "to, not blocking": lambda q: q.to("cpu", non_blocking=True),
    "copy_": lambda q: torch.empty(q.shape, device="cpu").copy_(q),
}


@pytest.mark.parametrize("what", WAITS)
@pytest.mark.parametrize("where", ["the arm", "the schedule"])
def test_a_wait_within_a_step_is_detected(
    start: Start, waits: list[str], what: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above fails if a step waits."""
    with torch.device("meta"):
        one = start(ab="block=1,warmup=0")
        if where == "the arm":
            codes, serve = one.engine.decode._self_entry.arms, one.engine.serve
            codes["patch"] = ArmCode(lambda call: (WAITS[what](call.q), serve(call))[1], codes["patch"].declines)
        else:
            monkeypatch.setattr(one.experiment, "due", lambda step: bool(WAITS[what](torch.ones(2))) and False)
        for _ in range(8):
            one.runner.forward(batch())
    assert waits or one.engine.stops


@pytest.mark.cost
@pytest.mark.parametrize("mode", ["ab", "ab+shadow"])
def test_a_step_costs_little(start: Start, mode: str) -> None:
    one = start(mode, "", "every=1000000")
    one.run(1)
    one.live.in_graphs.add("decode")
    work, numbers = steps.StepInfo("decode", 16, 4096), iter(range(10, 10**6))

    def step() -> None:
        one.live.begin(lambda: pytest.fail("asked once"), next(numbers))
        one.live.end(lambda: work)

    def plain() -> int:
        total = 0
        for number in range(200):
            total += number
        return total

    # alternately, since the speed of a shared machine changes from one second to the next
    took = [(timeit.timeit(step, number=500) / 500, timeit.timeit(plain, number=500) / 500) for _ in range(15)]
    fastest, loop = (min(times) for times in zip(*took, strict=True))
    # 20 us with a device's two events; a machine that takes 2.5 us for the loop is held to 15, a slower one to its pace
    assert fastest < max(15e-6, 6 * loop), (fastest, loop)


@pytest.mark.cost
def test_without_an_experiment_step_and_replay_are_untouched() -> None:
    engine = Engine()
    assert steps.watcher is None
    runner = engine.start(ByKey)
    for owner in (type(runner), type(runner.graph_runner)):
        assert not [name for name, value in vars(owner).items() if hasattr(value, "__wrapped__")]
    assert type(runner.graph_runner.graphs) is dict and engine.switch.fast_path


def test_two_ranks_run_the_same_arm_and_the_breaker_holds_for_both(tmp_path: Path) -> None:
    lives = [ExperimentSession(str(tmp_path), lambda rank=rank: f"engine-{rank}") for rank in range(2)]
    trials = [live.add("decode", "ab", "block=2,warmup=0", "every=8") for live in lives]
    stops: list[list[Any]] = [[], []]
    for trial, told in zip(trials, stops, strict=True):
        switch = FeatureGate(lambda *stop, told=told: told.append(stop))
        switch.set(arms=trial)
        trial.attach(switch, Counts())

    def step(number: int) -> list[str]:
        ran = []
        for rank, (live, trial) in enumerate(zip(lives, trials, strict=True)):
            live.begin(lambda rank=rank: steps.RankInfo("r", rank, 2, "cpu"), number)
            ran.append(trial.arm)
            trial.counts.served += trial.arm == "patch"
            live.end(lambda: steps.StepInfo("decode", 4, 100))
        return ran

    ran = [step(number) for number in range(1, 41)]
    assert all(first == second for first, second in ran) and ["patch", "patch"] in ran
    trials[1].breaker.check(Error(40, "decode", 0, 1.0, 0.5, 0))
    path = tmp_path / "r.control"
    end = time.monotonic() + 10
    while not (commands := control_file.read(path)[0].commands):
        assert time.monotonic() < end
        time.sleep(0.02)
    for live in lives:
        assert live.control is not None
        live.control.poll()
    at = commands[0].at
    after = [step(number) for number in range(41, at + 20)]
    assert {second for _, second in after} == {"host"}
    apart = [number for number, arms in enumerate(after, 41) if arms[0] != arms[1]]
    assert apart and max(apart) < at
    assert {first for first, _ in after[at - 41 :]} == {"host"}
    assert stops[0][0][0].startswith("rank 1: shadow check at step 40") and len(stops[0]) == len(stops[1]) == 1
    for live in lives:
        live.close()
    ((run,), problems) = merge.read_runs(tmp_path)
    assert (problems, run.ranks, run.differed) == ([], [0, 1], len(apart))
    assert not {row.step for row in run.timings} & set(apart)
    assert [note.what for note in run.notes] == ["breaker", "command", "command"]  # published once, obeyed by both


def test_features_in_the_same_graphs_multiply(tmp_path: Path, caplog: Any) -> None:
    live = ExperimentSession(str(tmp_path), lambda: "engine")
    one = live.add("one", "ab+shadow", "", "every=4")
    two = live.add("two", "ab", "", "every=4")
    other = live.add("beside", "ab", "", "every=4")  # it has no call in a graph
    for trial in (one, two, other):
        trial.attach(FeatureGate(lambda *stop: None), Counts())
    assert live.labels() == []
    live.in_graphs |= {"one", "two"}
    assert live.labels() == ["two=patch", "one=patch", "one=patch,two=patch", "shadow"]
    with live.capturing("one=patch,two=patch"):
        assert (one.arm, two.arm, other.arm) == ("patch", "patch", "host")
    with live.capturing("shadow"):
        assert (one.arm, two.arm, other.arm) == ("shadow", "host", "host")
    assert (one.arm, two.arm, other.arm) == ("host", "host", "host")
    seen = set()
    for step in range(1, 600):
        live.begin(lambda: steps.RankInfo("r", 0, 1, "cpu"), step)
        arms = {name: trial.arm for name, trial in live.experiments.items()}
        due = one.due(step)
        want = ",".join(f"{name}=patch" for name in ("one", "two") if arms[name] == "patch")
        assert live.label == ("shadow" if due else want)
        seen.add(live.label)
        live.end(None)
    assert seen == {"", *live.labels()}
    live.failed("shadow", RuntimeError("full"))
    assert one.sampling is None and "shadow" not in live.labels() and not one.breaker.reason
    with pytest.raises(ValueError, match="the engine has already run steps"):
        live.add("late", "ab", "", "")
    live.close()


def test_a_warning_for_many_arms(tmp_path: Path, caplog: Any) -> None:
    live = ExperimentSession(str(tmp_path), lambda: "engine")
    live.add("many", "ab", "", "", tuple("abcdefgh"))
    live.in_graphs.add("many")
    assert len(live.labels()) == len(live.labels()) == 9
    assert caplog.messages == ["mla-patch: 10 graphs of every size; MLA_PATCH_AB=arms=... takes fewer arms"]
    live.close()
