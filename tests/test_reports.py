"""What a process tells of itself: one file, always whole, never in the engine's way."""

import json
import os
import re
import socket
import stat
from pathlib import Path

import pytest
from fake_host import FakeHost, fake_host

from mla_patch import files, reports, survey
from mla_patch.features import State

__all__ = ["fake_host"]  # a fixture

# Waits for a condition instead of sleeping; the writer looks for news once a second.
WAIT = """
import glob, os, time
def until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)

def files(): return sorted(glob.glob(os.environ["MLA_PATCH_REPORT"] + "/*"))
def told(path):
    with open(path) as file: return json.load(file)
def ops(path): return next((r for r in told(path)["features"] if r["name"] == "ops"), {})
from mla_patch import reports
reports.INTERVAL = 0.05
"""


def run(fake_host: FakeHost, code: str, folder: Path | str, **more) -> str:
    return fake_host.says(WAIT + code.replace("\n    ", "\n"), {"MLA_PATCH_REPORT": str(folder)}, **more)


def test_the_file(fake_host: FakeHost, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "reports"
    code = """
    mla_patch.apply("ops")
    import fakehost.caller as c
    c.run()
    c.run()
    until(lambda: files() and ops(files()[0]).get("served") == 2)
    until(lambda: mla_patch.report() == told(files()[0]))
    print(os.getpid(), "torch" in sys.modules)
    """
    pid, torch = run(fake_host, code, folder).split()
    assert torch == "False"
    (path,) = folder.iterdir()
    name = re.fullmatch(r"fakehost-(.+)-(\d+)-(\d+)\.json", path.name)
    assert name and name[1] == socket.gethostname() and name[2] == pid
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    report = json.loads(path.read_text())
    assert (report["engine"], report["pid"]) == ("fakehost", int(pid))
    assert report["started"] == int(name[3]) / 1e9
    assert report["argv"][1] == "-c"
    assert report["problems"] == []
    assert report["features"] == [
        {
            "name": "ops",
            "host": "fakehost",
            "flag": "MLA_PATCH_OPS",
            "value": "on",
            "source": "apply()",
            "state": "applied",
            "reason": "",
            "targets": [
                {"module": "fakehost.ops", "name": "decode", "kind": "call", "replaced_by": "fakeplug:serve"},
            ],
            "served": 2,
            "declined": {},
            "captured": 0,
            "replayed": None,
        }
    ]


def test_it_starts_with_the_host(fake_host: FakeHost, tmp_path: Path) -> None:
    fake_host.write("sglang/__init__.py", "")
    fake_host.install("sglang", "0.5.11")
    code = """
    print(files(), threading.active_count())
    import sglang
    until(files)
    print(os.path.basename(files()[0]).partition("-")[0], threading.active_count())
    """
    assert run(fake_host, code, tmp_path / "reports", door=True).splitlines() == ["[] 1", "sglang 2"]


def test_no_directory_no_thread(fake_host: FakeHost) -> None:
    assert fake_host.says("mla_patch.apply()\nimport fakehost.caller\nprint(threading.active_count())") == "1"


def test_it_is_whole_at_every_moment(fake_host: FakeHost, tmp_path: Path) -> None:
    code = """
    reports.INTERVAL = 0
    mla_patch.apply()
    import fakehost.caller as c
    until(files)
    seen = set()
    for _ in range(300):
        c.run()
        assert len([f for f in files() if f.endswith(".json")]) == 1
        seen.add(ops(files()[0]).get("served"))
    print(len(seen) > 1)
    """
    assert run(fake_host, code, tmp_path) == "True"


@pytest.mark.parametrize("place", ["a file", "below a file", "no such device"])
def test_a_directory_that_cannot_be_written(place: str, fake_host: FakeHost, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "deep", "no such device": "/proc/none"}
    code = """
    mla_patch.apply("ops")
    import fakehost.caller as c
    print(c.run(), state())
    for _ in range(5):
        c.run()
        time.sleep(0.06)
    print(c.run(), row("ops")["served"])
    """
    env = {"MLA_PATCH_REPORT": str(folder[place])}
    done = fake_host.run(WAIT + code.replace("\n    ", "\n"), env)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["ours applied", "ours 7"])
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"mla-patch: no report in MLA_PATCH_REPORT={folder[place]}: ")


def test_a_directory_that_is_removed(fake_host: FakeHost, tmp_path: Path) -> None:
    code = """
    import shutil
    mla_patch.apply("ops")
    import fakehost.caller as c
    until(files)
    shutil.rmtree(os.environ["MLA_PATCH_REPORT"], ignore_errors=True)
    print(c.run())
    until(lambda: files() and files()[0].endswith(".json") and ops(files()[0])["served"] == 1)
    print(len(files()))
    """
    done = fake_host.run(WAIT + code.replace("\n    ", "\n"), {"MLA_PATCH_REPORT": str(tmp_path / "reports")})
    assert done.stdout.splitlines() == ["ours", "1"]
    assert len(done.stderr.splitlines()) <= 1  # the writer may have been in the middle of it


def test_a_forked_child_tells_of_itself(fake_host: FakeHost, tmp_path: Path) -> None:
    code = """
    import warnings
    mla_patch.apply("ops")
    import fakehost.caller as c
    c.run()
    until(lambda: files() and ops(files()[0]).get("served") == 1)
    child = os.fork()
    if child == 0:
        c.run(), c.run()
        mine = lambda: [f for f in files() if f"-{os.getpid()}-" in f and f.endswith(".json")]
        until(lambda: mine() and ops(mine()[0]).get("served") == 2)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    c.run()
    parents = [f for f in files() if f"-{os.getpid()}-" in f]
    until(lambda: ops(parents[0])["served"] == 2)
    print(len(files()), [told(f)["pid"] == child for f in files()].count(True))
    """
    assert run(fake_host, code, tmp_path / "reports") == "2 1"


def test_two_processes_share_a_directory(fake_host: FakeHost, tmp_path: Path) -> None:
    code = """
    mla_patch.apply("ops")
    import fakehost.caller as c
    c.run()
    until(lambda: any(f"-{os.getpid()}-" in f and f.endswith(".json") and ops(f).get("served") for f in files()))
    """
    for _ in range(2):
        run(fake_host, code, tmp_path)
    found, broken = survey.read_directory(tmp_path)
    assert (len({report["pid"] for report in found}), broken) == (2, [])


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "not a report: "),
        (b'{"engine": ', "not a report: "),
        (b"[]", "not a report: it is [], expected an object"),
        (b"3", "not a report: "),
        (b"null", "not a report: "),
        (b"\xff\xfe\x00", "not a report: "),
        (b'{"engine": "sglang", "pid": 1}', "not a report: it lacks argv, features, started"),
    ],
)
def test_a_corrupt_file_is_named_and_the_others_are_read(content: bytes, reason: str, tmp_path: Path) -> None:
    good = reports.ProcessReport(engine="sglang")
    files.replace(tmp_path / "sglang-a-1-1.json", json.dumps(good.as_dict()))
    (tmp_path / "sglang-b-2-2.json").write_bytes(content)
    (tmp_path / "sglang-c-3-3.tmp").write_bytes(b"{")  # being written
    (tmp_path / "sglang-d-4-4.json").mkdir()
    found, broken = survey.read_directory(tmp_path)
    assert [report["engine"] for report in found] == ["sglang"]
    assert [row["file"] for row in broken] == ["sglang-b-2-2.json", "sglang-d-4-4.json"]
    assert broken[0]["reason"].startswith(reason)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        survey.read_directory(tmp_path / "none")


def test_an_old_file_is_replaced_and_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("old" * 1000)
    os.chmod(path, 0o644)
    files.replace(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_status_without_counts_is_what_doctor_prints() -> None:
    status = reports.FeatureStatus("decode", "sglang", "MLA_PATCH_DECODE", "on", "default", State.ARMED)
    row = status.as_dict(counts=False)
    assert list(row) == ["name", "host", "flag", "value", "source", "state", "reason", "targets"]
    assert set(status.as_dict()) - set(row) == {"served", "declined", "captured", "replayed"}
    assert json.loads(json.dumps(row))["state"] == "armed"
