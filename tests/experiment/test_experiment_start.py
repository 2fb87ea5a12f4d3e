"""From flags to arms in an engine: what runs, what is refused, what is reported. Each test has a fresh interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_host import FakeHost, fake_host

from mla_patch.experiment import merge
from mla_patch.experiment.record import Timing
from mla_patch.experiment.schedule import Plan, Schedule

__all__ = ["fake_host"]  # a fixture

ENGINE = """
from types import SimpleNamespace
from fakehost.caller import run

class Mode:
    is_idle = is_target_verify = lambda self: False
    is_decode = lambda self: True

class ModelRunner:
    is_draft_worker, device, dist_port = False, "cpu", 1

    def __init__(self):
        self.forward_pass_id = 0

    def forward(self, forward_batch):
        self.forward_pass_id += 1
        return run()

def steps(count):
    runner = ModelRunner()
    batch = SimpleNamespace(forward_mode=Mode(), batch_size=2, seq_lens_sum=200)
    return [runner.forward(batch) for _ in range(count)]
"""
FEATURES = """
from mla_patch.hooks.sglang.edits.graphs import watch_steps

def steps(version):
    return (Edit("fakehost.engine", "ModelRunner.step", watch_steps),)

FEATURES = [feature("ops", DECODE, steps=steps), feature("kernel", KERNEL)]
"""
MINE = """
def mine(call):
    return "mine"

@hookimpl
def mla_patch_arms():
    return [Arm("mine", "ops", "fakeplug:mine")]
"""
BREAKS = """
from dataclasses import replace

calls = []

def sometimes(call):
    calls.append(call)
    if len(calls) > 5:
        raise RuntimeError("boom")
    return "ours"
"""
RUN = """
import json, mla_patch
mla_patch.apply()
from fakehost import engine
print(json.dumps(engine.steps({count})))
live = mla_patch.startup._get_session().experiments
if live is not None: live.close()
print(json.dumps(row("ops")))
"""
AB = "block=4,warmup=4"


@pytest.fixture
def engine(fake_host: FakeHost) -> FakeHost:
    fake_host.write("fakehost/engine.py", ENGINE)
    fake_host.plug(FEATURES)
    return fake_host


def told(engine: FakeHost, folder: Path | None, mode: str = "ab", count: int = 40, ab: str = AB, **env: str) -> Any:
    env = {"MLA_PATCH_OPS": mode, "MLA_PATCH_AB": ab, **env}
    if folder is not None:
        env["MLA_PATCH_REPORT"] = str(folder)
    done = engine.run(RUN.format(count=count), env)
    assert done.returncode == 0, done.stderr
    steps, row = map(json.loads, done.stdout.splitlines())
    return steps, row, done.stderr


def planned(count: int, *arms: str) -> list[str]:
    schedule = Schedule(Plan(block=4, warmup=4, salt="ops", arms=("host", "patch", *arms)))
    return [{"patch": "ours"}.get(arm, arm) for arm in (schedule.assignment(step).arm for step in range(1, count + 1))]


def test_arms_alternate_as_the_flags_say(engine: FakeHost, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    steps, row, said = told(engine, folder)
    assert (steps, said) == (planned(40), "")
    assert (row["state"], row["value"], row["served"]) == ("applied", "ab", steps.count("ours"))
    assert row["replayed"] == 0
    assert [target["replaced_by"] for target in row["targets"]] == [
        "fakeplug:serve",
        "mla_patch.hooks.sglang.edits.steps:watch_steps",
    ]
    ((run,), problems) = merge.read_runs(folder)
    assert problems == [] and [timing.step for timing in run.timings] == list(range(1, 41))
    assert all(isinstance(timing, Timing) and timing.feature == "ops" for timing in run.timings)
    assert len(list(folder.glob("*.control"))) == 1
    (report,) = folder.glob("fakehost-*.json")
    (records,) = folder.glob("*.steps.jsonl")
    assert records.name == report.name.replace(".json", ".steps.jsonl")


def test_a_plugins_arm_takes_part(engine: FakeHost, tmp_path: Path) -> None:
    engine.plug(FEATURES + MINE)
    steps, _, _ = told(engine, tmp_path / "report")
    assert steps == planned(40, "mine") and "mine" in steps
    steps, _, _ = told(engine, tmp_path / "other", ab=f"{AB},arms=host+mine")
    assert set(steps) == {"host", "mine"}


@pytest.mark.parametrize(
    "mode, env, reason",
    [
        ("ab", {}, "MLA_PATCH_REPORT is not set: an experiment needs a directory for its records"),
        ("ab", {"ab": "arms=host+none"}, "MLA_PATCH_AB: arms=none: ops has host, patch, host-again"),
        ("shadow", {}, "MLA_PATCH_OPS=shadow: decode does not say what it writes (shadow_clone)"),
    ],
)
def test_refused_with_the_reason(engine: FakeHost, tmp_path: Path, mode: str, env: dict, reason: str) -> None:
    folder = None if "REPORT" in reason else tmp_path
    steps, row, said = told(engine, folder, mode, 4, **env)
    assert set(steps) == {"host"}
    assert (row["state"], row["reason"]) == ("refused", reason)
    assert len(said.splitlines()) == 1 and reason in said


@pytest.mark.parametrize("mode", [0o770, 0o777], ids=["its group writes", "everybody writes"])
def test_refused_where_others_may_write(engine: FakeHost, tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    steps, row, said = told(engine, folder, count=4)
    assert set(steps) == {"host"} and row["state"] == "refused"
    assert row["reason"].startswith(f"MLA_PATCH_REPORT={folder}: mode 0{mode:o} lets ")
    assert len(said.splitlines()) == 2 and row["reason"] in said and "no report in MLA_PATCH_REPORT" in said
    assert list(folder.iterdir()) == []


def test_a_normal_exit_writes_the_last_rows(engine: FakeHost, tmp_path: Path) -> None:
    code = """
    from mla_patch.experiment import record
    record.INTERVAL = 3600
    mla_patch.apply()
    from fakehost import engine
    engine.steps(40)
    import os
    if os.fork(): os.wait()  # the child has the parent's rows, and is not to write them
    """
    env = {"MLA_PATCH_OPS": "ab", "MLA_PATCH_AB": AB, "MLA_PATCH_REPORT": str(tmp_path)}
    engine.says(code, env)
    (log,) = (merge.read_log(path) for path in tmp_path.glob("*.steps.jsonl"))
    assert [row.step for row in log.rows] == list(range(1, 41))


def test_a_host_whose_steps_have_changed_keeps_its_code(engine: FakeHost, tmp_path: Path) -> None:
    engine.change("fakehost/engine.py", "def forward(self, forward_batch)", "def forward(self, batch)")
    steps, row, said = told(engine, tmp_path, count=4, AB="")
    assert set(steps) == {"host"}
    assert row["state"] == "failed" and "expected (self, forward_batch, ...)" in row["reason"]
    assert "expected (self, forward_batch, ...)" in said


def test_without_an_experiment_nothing_of_it_is_imported(engine: FakeHost) -> None:
    code = """
    mla_patch.apply()
    from fakehost import engine
    print(*engine.steps(2), hasattr(engine.ModelRunner.forward, "__wrapped__"))
    print([name for name in sys.modules if name.startswith("mla_patch.experiment")])
    """
    assert engine.says(code).splitlines() == ["ours ours False", "[]"]


def test_restored_the_hosts_serves(engine: FakeHost, tmp_path: Path) -> None:
    code = """
    mla_patch.apply()
    from fakehost import engine
    print(*sorted(set(engine.steps(40))))
    mla_patch.restore()
    print(*sorted(set(engine.steps(40))), hasattr(engine.ModelRunner.forward, "__wrapped__"))
    mla_patch.apply()
    print(*sorted(set(engine.steps(40))))
    mla_patch.restore()
    mla_patch.apply("ops")  # an explicit "on"
    print(*sorted(set(engine.steps(40))))
    mla_patch.startup._get_session().experiments.close()
    """
    env = {"MLA_PATCH_OPS": "ab", "MLA_PATCH_AB": AB, "MLA_PATCH_REPORT": str(tmp_path)}
    assert engine.says(code, env).splitlines() == ["host ours", "host False", "host ours", "ours"]
    (log,) = (merge.read_log(path) for path in tmp_path.glob("*.steps.jsonl"))
    assert len(log.rows) == 80  # of the experiment, and no others


def test_a_forked_child_keeps_records_of_its_own(engine: FakeHost, tmp_path: Path) -> None:
    code = """
    import os
    mla_patch.apply()
    from fakehost import engine
    before = engine.steps(10)
    child = os.fork()
    after = engine.steps(20)
    mla_patch.startup._get_session().experiments.close()
    if child == 0: os._exit(0)
    os.waitpid(child, 0)
    """
    env = {"MLA_PATCH_OPS": "ab", "MLA_PATCH_AB": AB, "MLA_PATCH_REPORT": str(tmp_path)}
    engine.says(code, env)
    logs = [merge.read_log(path) for path in tmp_path.glob("*.steps.jsonl")]
    assert sorted(len(log.rows) for log in logs) == [20, 30]


METRICS = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_where_the_engine_exposes_metrics_ours_are_among_them(engine: FakeHost, tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    engine.plug(BREAKS + FEATURES.replace("DECODE, steps", "replace(DECODE, serve='fakeplug:sometimes'), steps"))
    metrics = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    for _ in range(2):  # two processes of an engine
        told(engine, tmp_path / "report", **metrics)
    shown = engine.run(METRICS, metrics).stdout
    count = {}
    for line in shown.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            count[name] = float(value)
    arms = {
        arm: count[f'mla_patch_step_seconds_count{{arm="{arm}",feature="ops",mode="eager"}}']
        for arm in ("host", "patch")
    }
    assert arms["patch"] == 10 and 50 < arms["host"] <= 70
    assert count['mla_patch_breaker_trips_total{feature="ops"}'] == 2


def test_without_metrics_in_the_engine_there_are_none(engine: FakeHost, tmp_path: Path) -> None:
    code = RUN.format(count=8) + "print('prometheus_client' in sys.modules)"
    env = {"MLA_PATCH_OPS": "ab", "MLA_PATCH_AB": AB, "MLA_PATCH_REPORT": str(tmp_path)}
    assert engine.says(code, env).splitlines()[-1] == "False"
