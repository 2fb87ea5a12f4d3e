"""Reports as they are read: whoever wrote them, and whatever has become of the process."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deadline import within

from mla_patch import files, redact, reports, survey
from mla_patch.cli import main as cli
from mla_patch.compat import processes
from mla_patch.features import State

FEATURE = reports.FeatureStatus("decode", "sglang", "MLA_PATCH_DECODE", "on", "default", State.APPLIED)
OTHER = 12345  # another user


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    with within(60):
        yield


def report(folder: Path, name: str | None = None, heard: float = 0, **more: Any) -> Path:
    """Write a report of this very process, but for ``more``; ``heard``: seconds since it was touched."""
    one = reports.ProcessReport(engine="sglang", features=[FEATURE]).as_dict() | more
    path = folder / (name or f"sglang-{one['hostname']}-{one['pid']}-{int(one['started'] * 1e9)}.json")
    path.write_text(json.dumps(one))
    os.utime(path, (time.time() - heard,) * 2)
    return path


def old_report(folder: Path, pid: int, started: float, host: str | None = None) -> None:
    """As versions before ``format`` wrote them."""
    row = {"engine": "sglang", "pid": pid, "argv": [], "started": started, "problems": [], "features": []}
    (folder / f"sglang-{host or socket.gethostname()}-{pid}-{int(started * 1e9)}.json").write_text(json.dumps(row))


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that is no more."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


# what a file holds


GOOD = reports.ProcessReport(engine="sglang", features=[FEATURE]).as_dict()


def changed(**more: Any) -> bytes:
    return json.dumps(GOOD | more).encode()


def feature(**more: Any) -> bytes:
    return changed(features=[GOOD["features"][0] | more])


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "Expecting value"),
        (b'{"engine": ', "Expecting value"),
        (b"[]", "it is [], expected an object"),
        (b"3", "it is 3, expected an object"),
        (b"null", "it is None, expected an object"),
        (b"\xff\xfe\x00", "'utf-8' codec"),
        (b'{"engine": "sglang", "pid": 1}', "it lacks argv, features, started"),
        (b"[" * 100_000, "it is nested"),
        (changed(more=json.loads("[" * 50 + "]" * 50)), "it is nested more than 32 deep"),
        (changed(pid=0), "pid is 0, expected a process's number"),
        (changed(pid=1 << 40), "pid is 1099511627776, expected a process's number"),
        (changed(pid=True), "pid is True, expected a whole number"),
        (changed(pid=10**40), "a number of 41 digits"),
        (changed(started=1e300), "started is 1e+300, expected seconds since 1970"),
        (changed(started="then"), "started is 'then', expected a number"),
        (changed(started=float("nan")), "NaN, expected a finite number"),
        (changed(ended=-1), "ended is -1, expected seconds since 1970"),
        (changed(format=3), "format is 3, expected at most 2: a newer mla-patch reads it"),
        (changed(format="2"), "format is '2', expected a whole number"),
        (changed(argv=None), "argv is None, expected a list"),
        (changed(argv=["a", 1]), "argv[1] is 1, expected text"),
        (changed(problems={}), "problems is {}, expected a list"),
        (changed(compiled=3), "compiled is 3, expected an object or null"),
        (changed(compiled={"before": "x"}), "compiled.before is 'x', expected a whole number"),
        (changed(host_version=5), "host_version is 5, expected text or null"),
        (changed(features=None), "features is None, expected a list"),
        (changed(features=[None]), "features[0] is None, expected an object"),
        (changed(features=[{}]), "features[0] lacks name"),
        (feature(name=None), "features[0].name is None, expected text"),
        (feature(state=4), "features[0].state is 4, expected text"),
        (feature(served="many"), "features[0].served is 'many', expected a whole number"),
        (feature(served=None), "features[0].served is None, expected a whole number"),
        (feature(declined=[]), "features[0].declined is [], expected an object"),
        (feature(declined={"a": None}), "features[0].declined.a is None, expected a whole number"),
        (feature(targets=[1]), "features[0].targets[0] is 1, expected an object"),
        (feature(targets=[{"kind": 1}]), "features[0].targets[0].kind is 1, expected text"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_what_is_no_report_is_named_and_the_others_are_read(
    content: bytes, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = report(tmp_path)
    (tmp_path / "sglang-b-2-2.json").write_bytes(content)
    (tmp_path / ".sglang-c-3-3.json.0123456789abcdef").write_bytes(b"{")  # being written
    found, broken = survey.read_directory(tmp_path)
    assert [row["file"] for row in found] == [good.name]
    ((name, text),) = [row.values() for row in broken]
    assert name == "sglang-b-2-2.json" and text.startswith(f"not a report: {reason}")
    for more in ([], ["--json"]):
        assert cli.main(["status", str(tmp_path), *more]) == 1
    assert capsys.readouterr().err == ""


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        survey.read_directory(tmp_path / "none")


@pytest.mark.parametrize("kind", ["FIFO", "device", "link", "directory", "large"])
def test_nothing_but_a_plain_file_of_some_size_is_read(kind: str, tmp_path: Path) -> None:
    path, good = tmp_path / "x.json", report(tmp_path)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        path.symlink_to(good)
    elif kind == "directory":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    found, broken = survey.read_directory(tmp_path)
    what = {"large": f"more than {files.REPORT_BYTES} bytes", "device": "found a link"}.get(kind, f"found a {kind}")
    assert len(found) == 1 and [row["file"] for row in broken] == ["x.json"]
    assert broken[0]["reason"].startswith(f"not a report: {what}, expected")
    assert cli.main(["status", str(tmp_path)]) == 1


def test_what_an_older_version_left_out_has_its_usual_value(tmp_path: Path) -> None:
    old_report(tmp_path, os.getpid(), time.time())
    (one,), broken = survey.read_directory(tmp_path)
    assert broken == []
    assert (one["format"], one["version"], one["host_version"], one["ended"]) == (1, None, None, None)


def test_what_a_newer_version_has_added_stays(tmp_path: Path) -> None:
    report(tmp_path, mood="good", features=[GOOD["features"][0] | {"state": "paused", "colour": "red"}])
    (one,), broken = survey.read_directory(tmp_path)
    assert broken == [] and one["mood"] == "good"
    assert (one["features"][0]["state"], one["features"][0]["colour"]) == ("paused", "red")


def test_secrets_of_older_reports_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(tmp_path, argv=["python", "--api-key", "hunter2", "http://me:hunter2@host"])
    cli.main(["status", str(tmp_path), "--json"])
    told = capsys.readouterr().out
    assert json.loads(told)["processes"][0]["argv"] == ["python", "--api-key", redact.REDACTED, redact.REDACTED]
    assert "hunter2" not in told


def test_halves_of_characters_can_be_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What os.fsdecode makes of bytes that are no UTF-8, and what no terminal takes."""
    report(tmp_path, engine="\udcff", argv=["\udcff"], problems=["\ud800"])
    assert cli.main(["status", str(tmp_path)]) == 1
    capsys.readouterr().out.encode()


# what has become of the process


def lives(folder: Path) -> list[str]:
    found, broken = survey.read_directory(folder)
    assert broken == []
    return [one["life"] for one in found]


@pytest.mark.parametrize(
    "more, life",
    [
        ({}, "running"),
        ({"heard": 1e6}, "running"),
        ({"ended": time.time()}, "running"),  # it has said farewell and is there still
        ({"start_ticks": 7}, "gone"),  # another process has its number
        ({"start_ticks": 7, "ended": time.time()}, "ended"),
    ],
    ids=["alive", "long silent", "leaving", "number taken again", "number taken again after the end"],
)
def test_a_process_of_this_machine_is_looked_up(more: dict, life: str, tmp_path: Path) -> None:
    report(tmp_path, **more)
    assert lives(tmp_path) == [life]


def test_a_process_that_is_no_more(dead: int, tmp_path: Path) -> None:
    report(tmp_path, pid=dead)
    assert lives(tmp_path) == ["gone"]
    report(tmp_path, pid=dead, ended=time.time(), started=time.time() - 5)
    assert lives(tmp_path) == ["gone", "ended"]  # newest first


def test_a_process_that_nobody_has_waited_for_is_no_more(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        report(tmp_path, pid=child.pid, start_ticks=processes.start_ticks(child.pid))
        assert lives(tmp_path) == ["running"]
        assert child.stdin is not None
        child.stdin.close()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert lives(tmp_path) == ["gone"]
    finally:
        child.wait()


@pytest.mark.parametrize(
    "heard, ended, life",
    [(0, None, "running"), (80, None, "running"), (100, None, "unknown"), (4000, None, "gone"), (0, 1e9, "ended")],
)
@pytest.mark.parametrize("pid_space", ["another boot pid:[1]", ""], ids=["another", "not told"])
def test_elsewhere_the_time_of_the_file_tells(
    heard: float, ended: float | None, life: str, pid_space: str, tmp_path: Path
) -> None:
    report(tmp_path, heard=heard, ended=ended, pid_space=pid_space)
    assert lives(tmp_path) == [life]


def test_a_process_that_proc_hides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hidepid, another user's process can be told to exist and no more."""
    monkeypatch.setattr(processes, "start_ticks", lambda pid: processes.HIDDEN)
    path = report(tmp_path, start_ticks=7)
    assert lives(tmp_path) == ["running"]
    os.utime(path, (0, 0))
    assert lives(tmp_path) == ["gone"]


def test_reports_without_a_format(dead: int, tmp_path: Path) -> None:
    now = time.time()
    old_report(tmp_path, os.getpid(), now)
    old_report(tmp_path, os.getpid(), 1e9 + 3)  # long before this process began: its number came again
    old_report(tmp_path, dead, 1e9 + 2)
    old_report(tmp_path, 1, 1e9 + 1, "another-host")
    assert lives(tmp_path) == ["running", "gone", "gone", "unknown"]


def test_the_text(dead: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    report(tmp_path, started=now - 200)
    report(tmp_path, pid=dead, started=now - 90_000, ended=now - 50)
    report(tmp_path, pid=dead, started=now - 900_000, heard=20_000)
    report(tmp_path, pid=dead, pid_space="", started=now - 1_000_000, heard=600)
    found, _ = survey.read_directory(tmp_path)
    assert [survey.life_text(one, now) for one in found] == [
        "running for 3 min",
        "ended 50 s ago",
        "gone, last heard of 6 h ago",
        "unknown, last heard of 10 min ago",
    ]
    assert cli.main(["status", str(tmp_path)]) in (0, 1)
    shown = capsys.readouterr().out
    assert "2 processes that have ended are left out: --all shows them, --prune removes their reports" in shown
    assert "running for 3 min" in shown and "ended 50 s ago" not in shown
    cli.main(["status", str(tmp_path), "--all"])
    shown = capsys.readouterr().out
    assert "ended 50 s ago" in shown
    assert f"pid {dead}: it did not exit normally, so its counts may lack the last 0.25 s" in shown


def test_the_past_is_no_finding_while_something_runs(
    dead: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = GOOD["features"][0] | {"state": "drifted", "reason": "it moved", "source": "environment"}
    report(tmp_path, pid=dead, features=[bad])
    assert cli.main(["status", str(tmp_path)]) == 1
    assert "drifted, it moved" in capsys.readouterr().out
    report(tmp_path)
    assert cli.main(["status", str(tmp_path)]) == 0


# removing


def test_prune_removes_the_reports_of_processes_that_have_ended(
    dead: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    gone = report(tmp_path, pid=dead)
    gone.with_suffix(".steps.jsonl").touch()
    half = tmp_path / f".{gone.name}.0123456789abcdef"
    half.touch()
    os.utime(half, (0, 0))
    ended = report(tmp_path, pid=dead, started=now - 60, ended=now)
    stays = {
        report(tmp_path).name,
        report(tmp_path, pid=dead, pid_space="", started=now - 70, heard=600).name,  # unknown
        report(tmp_path, "mine.json", pid=dead).name,  # not a name that we give
        report(tmp_path, f"sglang-host-{dead + 1}-1.json", pid=dead).name,  # nor one that fits
        f".{gone.name}.fedcba9876543210",  # somebody may be writing it
        "sglang-b-2-2.json",
        gone.with_suffix(".steps.jsonl").name,
        "r.control",
    }
    (tmp_path / f".{gone.name}.fedcba9876543210").touch()
    (tmp_path / "sglang-b-2-2.json").write_text("{")
    (tmp_path / "r.control").touch()
    cli.main(["status", str(tmp_path), "--prune", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (sorted(told["pruned"]), told["not_pruned"]) == (sorted([gone.name, half.name, ended.name]), 0)
    assert set(os.listdir(tmp_path)) == stays
    report(tmp_path, pid=dead)
    cli.main(["status", str(tmp_path), "--prune"])
    assert "removed 1 report of processes that have ended\n" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_prune_removes_nothing_of_another_user(dead: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = report(tmp_path, pid=dead)
    os.chown(path, OTHER, OTHER)
    assert survey.prune(tmp_path) == ([], 1)
    cli.main(["status", str(tmp_path), "--prune"])
    assert "removed 0 reports of processes that have ended; left: 1 that another user owns" in capsys.readouterr().out
    assert path.exists()


def test_prune_follows_no_link(dead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one takes the report's place after it has been read."""
    path, victim = report(tmp_path, pid=dead), tmp_path / "victim"
    real = survey.read_directory

    def exchange(directory: Path) -> Any:
        found = real(directory)
        path.rename(victim)
        path.symlink_to(victim)
        return found

    monkeypatch.setattr(survey, "read_directory", exchange)
    assert survey.prune(tmp_path) == ([], 0)
    assert victim.exists() and path.is_symlink()


# processes without a report


SILENT = "import sys; print('up', flush=True); sys.stdin.read()  # sglang.launch_server"


@pytest.mark.parametrize("told", ["{folder}", "reports", "~/reports", "{folder}/../reports/"])
def test_a_process_that_should_report_and_does_not(told: str, tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    folder.mkdir()
    env = os.environ | {"MLA_PATCH_REPORT": told.format(folder=folder), "HOME": str(tmp_path), "SECRET": "\udcff"}
    argv = [sys.executable, "-c", SILENT, "--api-key", "hunter2"]
    child = subprocess.Popen(argv, env=env, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        _, missing = survey.survey(folder)
        assert [row["pid"] for row in missing] == [child.pid]
        assert missing[0]["argv"][-2:] == ["--api-key", redact.REDACTED]
        (folder / f"sglang-{socket.gethostname()}-{child.pid}-1.json").write_text("{")  # it reports, and badly
        _, missing = survey.survey(folder)
        assert [row.get("file", "") for row in missing] == [f"sglang-{socket.gethostname()}-{child.pid}-1.json"]
    finally:
        child.communicate(b"")
