"""What a process tells of itself: one file, always whole, never in the engine's way."""

import json
import os
import re
import socket
import stat
import time
from pathlib import Path

import pytest
from fake_host import FakeHost, fake_host

import mla_patch
from mla_patch import files, reports, survey
from mla_patch.compat import processes
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
    assert (report["format"], report["version"], report["host_version"]) == (2, mla_patch.__version__, "1.5")
    assert report["hostname"] == socket.gethostname() and report["start_ticks"] > 0
    assert report["parent"] == f"{os.getpid()}-{processes.start_ticks(os.getpid())}"
    assert report["pid_space"] == processes.pid_space() != ""
    assert report["started"] < report["ended"] < time.time()
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


def test_a_fork_in_the_midst_of_a_write(fake_host: FakeHost, tmp_path: Path) -> None:
    """Whatever lock of the writer's the parent's thread has, the child waits for none of them."""
    code = """
    import signal
    report = reports.ProcessReport(engine="sglang")
    writer = reports.Writer(os.environ["MLA_PATCH_REPORT"], report)
    until(files)
    for event in (writer._wake, writer._looked, writer._left):
        event._cond.acquire()
    writer._lock.acquire()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        report.renew()
        writer.restart()
        print(repr(writer.problem(10)), flush=True)
        report.problems.append("new")
        writer.changed()
        until(lambda: writer.path.exists() and told(str(writer.path))["problems"] == ["new"])
        writer.farewell()
        print(told(str(writer.path))["ended"] is not None, flush=True)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
    os._exit(0)
    """
    assert run(fake_host, code + "\n", tmp_path / "reports").splitlines() == ["''", "True", "0"]


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


def only(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_a_normal_exit_loses_nothing(fake_host: FakeHost, tmp_path: Path) -> None:
    """The last calls come within a quarter of a second of the end."""
    code = """
    import mla_patch
    mla_patch.apply("ops")
    import fakehost.caller as c
    for _ in range(1000): c.run()
    """
    run(fake_host, code, tmp_path)
    report = only(tmp_path)
    assert report["features"][0]["served"] == 1000
    assert report["started"] < report["ended"]


WORK = """
import mla_patch, os
mla_patch.apply("ops")
import fakehost.caller

def work(count):
    for _ in range(count): fakehost.caller.run()
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_nor_does_that_of_a_child_of_multiprocessing(method: str, fake_host: FakeHost, tmp_path: Path) -> None:
    fake_host.write("work.py", WORK)
    code = f"""
    import work
    work.work(7)
    import multiprocessing
    child = multiprocessing.get_context({method!r}).Process(target=work.work, args=(500,))
    child.start()
    child.join()
    print(child.pid, child.exitcode)
    work.work(7)
    """
    folder = tmp_path / "reports"
    pid, status = run(fake_host, code, folder).split()
    found, broken = survey.read_directory(folder)
    served = {report["pid"]: report["features"][0]["served"] for report in found if report["features"][0]["served"]}
    assert (status, broken, served.pop(int(pid)), [*served.values()]) == ("0", [], 500, [14])
    assert {report["life"] for report in found} == {"ended"}


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)"])
def test_a_forked_child_ends_for_itself(end: str, fake_host: FakeHost, tmp_path: Path) -> None:
    code = f"""
    mla_patch.apply("ops")
    import fakehost.caller as c
    c.run()
    until(lambda: files() and ops(files()[0]).get("served") == 1)
    child = os.fork()
    if child == 0:
        until(lambda: len(files()) == 2)
        c.run(), c.run()
        {end}
    os.waitpid(child, 0)
    print(child)
    """
    child = int(run(fake_host, code, tmp_path / "reports"))
    found = {report["pid"] == child: report for report in survey.read_directory(tmp_path / "reports")[0]}
    assert (found[False]["life"], found[False]["features"][0]["served"]) == ("ended", 1)
    if "_exit" in end:
        assert (found[True]["life"], found[True]["ended"]) == ("gone", None)
    else:
        assert (found[True]["life"], found[True]["features"][0]["served"]) == ("ended", 2)


def test_an_exit_does_not_wait_for_a_dead_file_system(fake_host: FakeHost, tmp_path: Path) -> None:
    code = """
    from mla_patch import files as ours
    mla_patch.apply("ops")
    import fakehost.caller as c
    until(files)
    ours.replace = lambda *_: time.sleep(3600)
    c.run()
    time.sleep(0.2)  # the thread hangs
    """
    start = time.monotonic()
    run(fake_host, code, tmp_path)
    assert time.monotonic() - start < 30  # an exit that waits takes an hour


def test_the_file_shows_that_the_process_lives(fake_host: FakeHost, tmp_path: Path) -> None:
    code = """
    reports.HEARTBEAT = 0.1
    mla_patch.apply("ops")
    until(lambda: files() and mla_patch.report() == told(files()[0]))
    inode = os.stat(files()[0]).st_ino
    for _ in range(2):
        os.utime(files()[0], (0, 0))
        until(lambda: os.stat(files()[0]).st_mtime > time.time() - 60)
    print(os.stat(files()[0]).st_ino == inode, len(files()))
    """
    assert run(fake_host, code, tmp_path / "reports") == "True 1"


@pytest.mark.parametrize("mode", [0o700, 0o770, 0o777], ids=["private", "its group's", "everybody's"])
def test_nobody_else_chooses_what_is_written_over(mode: int, fake_host: FakeHost, tmp_path: Path) -> None:
    """The other user's move: links under each name that a writer could take, while the engine runs."""
    folder, victim = tmp_path / "shared", tmp_path / "victim.txt"
    folder.mkdir()
    folder.chmod(mode)
    victim.write_text("precious")
    code = f"""
    stems = []
    def stem(self, real=reports.ProcessReport.stem.fget):
        for end in (".tmp", ".json", ".json.tmp"):
            try: os.symlink({str(victim)!r}, os.path.join(os.environ["MLA_PATCH_REPORT"], real(self) + end))
            except FileExistsError: pass
        stems.append(real(self))
        return real(self)
    reports.ProcessReport.stem = property(stem)
    mla_patch.apply("ops")
    import fakehost.caller as c
    print(c.run(), state())
    until(lambda: len(stems) > 5)
    mla_patch.restore(), mla_patch.apply()
    until(lambda: len(stems) > 10)
    """
    done = fake_host.run(WAIT + code.replace("\n    ", "\n"), {"MLA_PATCH_REPORT": str(folder)})
    assert (done.returncode, done.stdout) == (0, "ours applied\n")
    assert victim.read_text() == "precious"
    plain = [path.name for path in folder.iterdir() if not path.is_symlink()]
    if mode == 0o700:
        assert done.stderr == "" and len(plain) == 1 and plain[0].endswith(".json")
    else:
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"mla-patch: no report in MLA_PATCH_REPORT={folder}: mode 0{mode:o} lets ")
        assert plain == []


def test_a_path_is_the_one_that_the_start_has_seen(fake_host: FakeHost, tmp_path: Path) -> None:
    fake_host.write("sglang/__init__.py", "")
    fake_host.install("sglang", "0.5.11")
    (tmp_path / "elsewhere").mkdir()
    code = """
    os.chdir("elsewhere")
    import sglang
    os.chdir("/")
    """
    for told in ("reports", "~/reports"):
        env = {"MLA_PATCH_REPORT": told, "HOME": str(tmp_path / "home")}
        fake_host.says("import os\n" + code.replace("\n    ", "\n"), env, door=True)
    assert not (tmp_path / "elsewhere" / "reports").exists()
    assert [only(path)["engine"] for path in (tmp_path / "reports", tmp_path / "home" / "reports")] == ["sglang"] * 2


def test_secrets_stay_out(fake_host: FakeHost, tmp_path: Path) -> None:
    code = """
    sys.orig_argv = ["python", "-m", "sglang.launch_server", "--api-key", "hunter2", "--model", "m"]
    mla_patch.apply("ops")
    print(mla_patch.report()["argv"][3:])
    """
    assert run(fake_host, code, tmp_path) == "['--api-key', '<redacted>', '--model', 'm']"
    assert "hunter2" not in (next(tmp_path.glob("*.json"))).read_text()


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
