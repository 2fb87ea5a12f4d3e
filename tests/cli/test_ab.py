"""``mla-patch ab``: commands reach a running engine, watching gives no verdict, a report does."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import tapes
from test_experiment_live import Running

from mla_patch.cli import ab, show
from mla_patch.cli import main as cli
from mla_patch.experiment import control, control_file, record
from mla_patch.experiment import files as run_files
from mla_patch.experiment.schedule import Plan, Schedule

__all__ = ["tapes"]  # a fixture


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    one = Running(tmp_path, "ab+shadow", "block=4,warmup=4", "every=8,tolerance=0.02", None)
    one.run(1)
    yield one
    one.live.close()
    for undo in one.undo:
        undo()


def told(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, Any]:
    capsys.readouterr()
    status = cli.main(["ab", *map(str, argv), "--json"])
    return status, json.loads(capsys.readouterr().out)


def heard(one: Running) -> None:
    """Wait until the heartbeat of the rank states its step."""
    end = time.monotonic() + 10
    while not (beats := control_file.read(one.path())[1]) or beats[0].step < one.live.step:
        assert time.monotonic() < end
        time.sleep(0.01)


def reach(one: Running, step: int) -> None:
    assert one.live.control is not None
    one.live.control.poll()
    one.run(step - one.live.step)


def test_commands_reach_the_engine(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, whose in (
        (("set", running.folder, "decode", "arm=patch"), {"patch"}),
        (("stop", running.folder), {"host"}),
        (("start", running.folder, "decode"), {"host", "patch"}),
    ):
        heard(running)
        status, answer = told(capsys, *argv)
        assert status == 0
        (command,) = answer["commands"]
        assert answer["run"] == running.path().stem and command["at"] > running.live.step
        reach(running, command["at"] + 4)
        found = set(running.run(40))
        assert found - ({"host"} if argv[0] == "set" else set()) == whose  # shadow steps run the engine's arm
    heard(running)
    _, answer = told(capsys, "set", running.folder, "decode", "ratio=0.2")
    assert (answer["commands"][0]["kind"], answer["commands"][0]["value"]) == ("ratio", 0.2)


@pytest.mark.parametrize(
    "argv, problem",
    [
        (("set", "{}", "decode", "arm=mine"), "'mine' is not an arm of decode; expected one of host, patch"),
        (("start", "{}", "kv_indices"), "'kv_indices' is not under test here; under test: decode"),
        (("stop", "{}", "--run", "other"), "no run other has a control file here"),
        (("stop", "{}/none"), "not a directory"),
        (("report", "{}/none"), "not a directory"),
        (("report", "{}", "--run", "other"), "no records of run other; there are sglang-"),
        (("watch", "{}/none", "--once"), "not a directory"),
    ],
)
def test_commands_that_cannot_be_carried_out(
    running: Running, capsys: Any, argv: tuple[str, ...], problem: str
) -> None:
    heard(running)
    assert running.live.recorder is not None
    running.run(2)
    running.live.recorder.flush()
    assert cli.main(["ab", *(arg.replace("{}", str(running.folder)) for arg in argv)]) == cli.MISUSE
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("given", ["arm=", "ratio=2", "ratio=x", "block=3", "arm"])
def test_a_setting_is_an_arm_or_a_ratio(tmp_path: Path, capsys: Any, given: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["ab", "set", str(tmp_path), "decode", given])
    assert ended.value.code == 2 and "expected arm=NAME or ratio=SHARE" in capsys.readouterr().err


def test_no_command_is_sent_while_a_rank_cannot_be_heard(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "r.control"
    control_file.create(path, {"run": "r", "ranks": 2, "features": {"decode": ["host", "patch"]}})
    control.Control(path, 0, thread=False).poll()
    assert cli.main(["ab", "stop", str(tmp_path)]) == cli.MISUSE
    assert "1 of 2 ranks are heard here; ranks on several nodes need a shared directory" in capsys.readouterr().err


def test_no_command_is_sent_to_an_engine_that_has_ended(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "r.control"
    control_file.create(path, {"run": "r", "ranks": 1, "features": {"decode": ["host", "patch"]}})
    with control_file.opened(path, os.O_RDWR) as file:
        control_file.beat(file, control_file.Heartbeat(0, 7, time.time_ns() - 90 * 10**9))
    assert cli.main(["ab", "stop", str(tmp_path)]) == cli.MISUSE
    assert "no rank has been heard for 90 s; has the engine ended?" in capsys.readouterr().err


def quiet(tmp_path: Path, ranks: int = 1) -> Path:
    """An engine that was killed a second ago."""
    path = tmp_path / "r.control"
    control_file.create(path, {"run": "r", "ranks": ranks, "features": {"decode": ["host", "patch"]}})
    with control_file.opened(path, os.O_RDWR) as file:
        for rank in range(ranks):
            control_file.beat(file, control_file.Heartbeat(rank, 7, time.time_ns() - 1_200_000_000))
    return path


def test_an_engine_that_was_killed_a_second_ago_is_a_finding(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_files, "SILENT", 2.0)
    quiet(tmp_path)
    start = time.monotonic()
    status, answer = told(capsys, "stop", tmp_path)
    assert status == cli.FINDING and time.monotonic() - start < 4
    (finding,) = answer["findings"]
    assert finding.startswith("rank 0 has not read the command: heard 3") and "has the engine ended?" in finding
    assert answer["ranks"][0]["read"] is False


def test_waiting(running: Running, capsys: Any) -> None:
    """``--wait`` waits until every rank has reached the step: one that steps, one that is idle, one that hangs."""
    heard(running)
    going = threading.Event()

    def steps() -> None:
        while not going.wait(0.01):
            running.run(1)

    thread = threading.Thread(target=steps)
    thread.start()
    try:
        status, answer = told(capsys, "set", running.folder, "decode", "arm=patch", "--wait", "20")
    finally:
        going.set()
        thread.join()
    assert (status, answer["findings"]) == (0, [])
    assert answer["ranks"][0]["reached"] and answer["ranks"][0]["step"] >= answer["commands"][0]["at"]
    heard(running)
    assert cli.main(["ab", "stop", str(running.folder), "--wait"]) == 0  # the engine is idle, so its next step obeys
    assert "1 rank(s) have read the command" in capsys.readouterr().out
    assert set(running.run(1)) == {"host"}


def test_a_rank_that_does_not_get_there_is_a_finding(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank runs steps, so it is not idle, but it has not reached the step when the time is over."""
    quiet(tmp_path, 2)
    ranks = [control.Control(tmp_path / "r.control", rank, thread=False) for rank in (0, 1)]
    monkeypatch.setattr(control.Controller, "_measure", lambda self: 1000.0)
    stop = threading.Event()

    def polls() -> None:
        while not stop.wait(0.02):
            for one in ranks:
                one.step += 1
                one.poll()

    thread = threading.Thread(target=polls)
    for one in ranks:
        one.step = 7
        one.poll()
    thread.start()
    try:
        status, answer = told(capsys, "stop", tmp_path, "--wait", "0.5")
    finally:
        stop.set()
        thread.join()
    assert status == cli.FINDING and len(answer["findings"]) == 2
    assert answer["findings"][0].startswith("rank 0 has read the command and is at step ")


def test_for_another_users_engine_the_error_names_the_user(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(tmp_path)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 12345)
    for what in (["stop"], ["watch", "--once"]):
        assert cli.main(["ab", what[0], str(tmp_path), *what[1:]]) == cli.MISUSE
        err = capsys.readouterr().err
        name = run_files._user(owner)
        assert f"the engine runs as user {name}, this is user #{owner + 12345}: run it as that user" in err


def test_watching_gives_no_verdict(running: Running, capsys: Any) -> None:
    running.run(60)
    assert running.live.recorder is not None
    heard(running)
    running.live.recorder.flush()
    status, seen = told(capsys, "watch", running.folder)
    assert status == 0 and seen["features"] == {"decode": ["host", "patch"]}
    assert [rank["rank"] for rank in seen["ranks"]] == [0]
    assert {row["arm"] for row in seen["buckets"]} == {"host", "patch"}
    assert all(row["bucket"] == "eager/4/128" and row["median_us"] > 0 for row in seen["buckets"])
    assert seen["shadow"][0]["relative"]["0.5"] == pytest.approx(1e-3, rel=1e-2)
    assert "verdict" not in json.dumps(seen)
    assert cli.main(["ab", "watch", str(running.folder), "--once"]) == 0
    shown = capsys.readouterr().out
    assert "no verdict while it runs" in shown and "eager/4/128" in shown and "faster" not in shown


def test_watching_goes_on_until_interrupted(running: Running, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heard(running)
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(show.time, "sleep", sleep)
    assert cli.main(["ab", "watch", str(running.folder), "--every", "0.5"]) == 0
    assert looks == [0.5] * 3 and "ranks" in capsys.readouterr().out


def record_run(
    folder: Path, name: str, started: float, factor: float, note: str = "", lonely: tuple[str, ...] = ()
) -> None:
    """``lonely``: buckets in which the engine's arm has no step."""
    recorder = record.Recorder(
        folder / name, {"run": name, "rank": 0, "started": started, "tolerance": {"decode": 0.02}}
    )
    schedule = Schedule(Plan(block=4, warmup=0))
    for step in range(400):
        arm, block, group = schedule.assignment(step)
        us = 100.0 * (factor if arm == "patch" else 1) + step % 7
        recorder.add(record.Timing(step, "decode", arm, block, group, "graph/8/1024", us))
    for bucket in lonely:
        for step in range(400, 404):
            recorder.add(record.Timing(step, "decode", "patch", 400, 400, bucket, 10.0))
    if note:
        recorder.add(record.Note(9, "decode", "breaker", note))
    recorder.close()


def test_the_report_names_the_faster_arm(tmp_path: Path, capsys: Any) -> None:
    record_run(tmp_path, "second", 2.0, 0.8)
    record_run(tmp_path, "a-first", 3.0, 1.25)
    status, report = told(capsys, "report", tmp_path)
    assert status == 0 and report["findings"] == []
    assert [run["run"] for run in report["runs"]] == ["second", "a-first"]  # in order of time
    assert [run["comparisons"][0]["verdict"] for run in report["runs"]] == ["faster", "slower"]
    page = tmp_path / "page.html"
    page.write_text("an older one")
    page.chmod(0o644)
    assert cli.main(["ab", "report", str(tmp_path), "--run", "second", "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "patch is faster: 0.80" in shown and f"written: {page}" in shown
    assert "Kernel experiment second" in page.read_text() and stat.S_IMODE(page.stat().st_mode) == 0o600


def test_damaged_lines_are_a_finding(tmp_path: Path, capsys: Any) -> None:
    record_run(tmp_path, "r", 1.0, 0.8)
    (path,) = tmp_path.glob("*.steps.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-20] + [line[:20] + "\n" for line in lines[-20:-1]] + [lines[-1][:9]]))
    status, report = told(capsys, "report", tmp_path)
    assert (status, report["findings"]) == (cli.FINDING, ["r: 20 damaged lines"])
    assert cli.main(["ab", "report", str(tmp_path)]) == cli.FINDING
    assert "finding: r: 20 damaged lines" in capsys.readouterr().out


@pytest.mark.parametrize(("reached", "missing"), [(100_000, 99_601), (400, 0)], ids=["a full disk", "killed"])
def test_rows_that_are_missing_at_the_end_are_a_finding(
    tmp_path: Path, capsys: Any, reached: int, missing: int
) -> None:
    """The size of a control file is fixed, so a full disk does not stop its heartbeats."""
    record_run(tmp_path, "r", 1.0, 0.8)
    path = tmp_path / "r.control"
    control_file.create(path, {"run": "r", "ranks": 1, "features": {"decode": ["host", "patch"]}})
    with control_file.opened(path, os.O_RDWR) as file:
        control_file.beat(file, control_file.Heartbeat(0, reached, time.time_ns()))
    status, report = told(capsys, "report", tmp_path)
    assert report["runs"][0]["missing_at_end"] == ({"0": missing} if missing else {})
    assert status == (cli.FINDING if missing else 0)
    assert [text.partition(",")[0] for text in report["findings"]] == (
        [f"r: rank 0: the last {missing} steps are not in its record"] if missing else []
    )


def test_buckets_with_too_few_groups_are_one_line(tmp_path: Path, capsys: Any) -> None:
    record_run(tmp_path, "r", 1.0, 0.8, lonely=("prefill/1/64", "prefill/2/64"))
    _, report = told(capsys, "report", tmp_path)
    few = [one for one in report["runs"][0]["comparisons"] if one["ratio"] is None]
    assert [(one["host_us"], one["arm_us"], one["groups"]) for one in few] == [(None, 10.0, 0)] * 2
    page = tmp_path / "page.html"
    assert cli.main(["ab", "report", str(tmp_path), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    line = "not enough blocks: 2 comparisons have fewer than the 8 groups that a verdict needs, 0 at most, 2 blocks and"
    for text in (shown, page.read_text()):
        assert (line in text and "graph/8/1024" in text) or "batch 8, context 1024" in text
    assert "prefill" not in shown and "0.0" not in shown.split()


def test_an_arm_without_a_block_shows_a_dash() -> None:
    assert (ab._us(None), ab._us(1.25), ab._us(0.0)) == ("-", "1.2", "0.0")


def test_a_breaker_is_a_finding(tmp_path: Path, capsys: Any) -> None:
    record_run(tmp_path, "r", 1.0, 1.0, "error [0.05], tolerance 0.02")
    status, report = told(capsys, "report", tmp_path)
    assert (status, report["findings"]) == (cli.FINDING, ["r: decode: error [0.05], tolerance 0.02"])
    cli.main(["ab", "report", str(tmp_path)])
    assert capsys.readouterr().out.count("error [0.05], tolerance 0.02") == 2
