"""Records: cheap to add, bounded in size, and never a problem for the engine, whatever happens to the disk."""

import errno
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
import timeit
from collections.abc import Iterator
from pathlib import Path

import pytest
from deadline import within

from mla_patch.experiment import record
from mla_patch.experiment.merge import Log, merge, read_log, read_runs
from mla_patch.experiment.record import Error, Note, Recorder, Timing, bucket


def timing(step: int, arm: str = "host", **more) -> Timing:
    row = {"step": step, "feature": "decode", "arm": arm, "block": 0, "group": 0, "bucket": "graph/1/1024", "us": 1.5}
    return Timing(**(row | more))


ERROR = Error(7, "decode", 3, 0.25, 0.001, 0)
NOTE = Note(9, "decode", "breaker", 'shadow error "0.5"\n')


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setattr(record, "INTERVAL", 3600)  # no thread: a test calls flush itself
    one = Recorder(tmp_path / "reports" / "engine-1", {"run": "r", "rank": 0})
    yield one
    one._stop.set()
    one._thread.join(5)


def test_rows_come_back_as_they_were(recorder: Recorder) -> None:
    rows = [timing(1), ERROR, NOTE, timing(2, "patch", us=3)]
    for row in rows:
        recorder.add(row)
    recorder.close()
    log = read_log(recorder.path)
    assert log.rows == rows
    assert [type(row) for row in log.rows] == [Timing, Error, Note, Timing]
    assert (log.header["run"], log.damaged, log.lost) == ("r", 0, 0)
    assert recorder.path.name == "engine-1.steps.jsonl"
    assert stat.S_IMODE(recorder.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(recorder.path.parent.stat().st_mode) == 0o700


def test_the_thread_writes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "INTERVAL", 0.01)
    recorder = Recorder(tmp_path / "a", {"rank": 0})
    recorder.add(timing(1))
    for _ in range(500):
        if recorder.path.exists() and len(read_log(recorder.path).rows) == 1:
            break
        threading.Event().wait(0.01)
    assert read_log(recorder.path).rows == [timing(1)]
    recorder.close()
    assert not recorder._thread.is_alive()


def test_a_record_has_its_header_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader may find the file at any moment. On a file system without hard links, a moment later."""
    seen = []
    written = Recorder._put

    def look(self: Recorder, data: bytes) -> None:
        seen.append(read_log(self.path).header)
        written(self, data)

    monkeypatch.setattr(Recorder, "_put", look)
    recorder = Recorder(tmp_path / "a", {"rank": 3})
    recorder.add(timing(1))
    recorder.close()
    assert [header["rank"] for header in seen] == [3]
    monkeypatch.setattr(Recorder, "_put", written)

    def no_links(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    recorder = Recorder(tmp_path / "b", {"rank": 4})
    recorder.add(timing(1))
    recorder.close()
    log = read_log(recorder.path)
    assert log.header["rank"] == 4 and log.rows == [timing(1)] and not log.lost


def test_a_killed_process_leaves_whole_rows(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from mla_patch.experiment import record
record.INTERVAL = 0.001
r = record.Recorder(Path(sys.argv[1]) / "a", {"rank": 0})
step = 0
while True:
    step += 1
    r.add(record.Timing(step, "decode", "host", 0, 0, "graph/1/1024", 1.5))
    if step % 1000 == 0 and r.path.exists() and r.path.stat().st_size > 100000:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    log = read_log(tmp_path / "a.steps.jsonl")
    steps = [row.step for row in log.rows]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 1000
    assert log.damaged <= 1


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped(recorder: Recorder, cut: int) -> None:
    for step in range(3):
        recorder.add(timing(step))
    recorder.close()
    recorder.path.write_bytes(recorder.path.read_bytes()[:-cut])
    log = read_log(recorder.path)
    assert ([row.step for row in log.rows], log.damaged) == ([0, 1], 1)


@pytest.mark.parametrize(
    "line",
    ["", '["t",1]', "\0" * 40, "nonsense", "[]", "[[]]", "3", '{"a": 1}', '["x",1,2]', '["lost","many"]',
     '["t","one","decode","host",0,0,"graph/1/1",1.0]'],
)  # fmt: skip
def test_invalid_rows_are_counted_and_valid_rows_are_read(recorder: Recorder, line: str) -> None:
    recorder.add(timing(1))
    recorder.flush()
    with open(recorder.path, "a") as file:
        file.write(line + "\n")
    recorder.add(timing(2))
    recorder.close()
    log = read_log(recorder.path)
    assert ([row.step for row in log.rows], log.damaged) == ([1, 2], int(line != ""))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b'["t",1]\n',
        b'{"format": 99, "rank": 0}\n',
        b'{"format": 1}\n',
        b'{"format": 1, "rank": 0, "started": "then"}\n',
        b'{"format": 1, "rank": 0, "tolerance": 0.02}\n',
        b'{"format": 1, "rank": 0, "tolerance": {"decode": "x"}}\n',
        b'{"format": 1, "rank": 0, "tolerance": {"decode": Infinity}}\n',
        b'{"format": 1, "rank": 0, "tolerance": {"decode": 0}}\n',
    ],
)
def test_a_file_without_a_header_is_reported(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.steps.jsonl").write_bytes(content)
    (tmp_path / "b.steps.jsonl").mkdir()
    runs, problems = read_runs(tmp_path)
    assert runs == []
    assert problems == [
        "a.steps.jsonl: no header of a format that this version reads (1)",
        f"{tmp_path}/b.steps.jsonl: found a directory, expected a plain file",
    ]


def test_a_full_queue_loses_rows_and_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "INTERVAL", 3600)
    recorder = Recorder(tmp_path / "a", {"rank": 0}, capacity=10)
    recorder._stop.set()
    recorder._thread.join()
    for step in range(25):
        recorder.add(timing(step))
    recorder.flush()
    log = read_log(recorder.path)
    assert ([row.step for row in log.rows], log.lost, recorder.lost) == (list(range(10)), 15, 15)


def test_a_full_disk_costs_only_rows(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = os.write
    recorder.add(timing(1))
    recorder.flush()
    full = [True]

    def short(file: int, data: bytes) -> int:
        """Writes 20 bytes and then fails, as on a disk that fills up."""
        if not full[0]:
            return write(file, data)
        if len(data) > 20 and data.startswith(b'["t",2'):
            return write(file, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", short)
    with caplog.at_level(logging.WARNING, "mla_patch"):
        for step in (2, 3, 4):
            recorder.add(timing(step))
            recorder.flush()
    assert len(caplog.records) == 1  # logged once
    assert "No space left" in caplog.text
    assert recorder.lost == 3
    full[0] = False
    recorder.add(timing(5))
    recorder.flush()
    log = read_log(recorder.path)
    assert ([row.step for row in log.rows], log.damaged, log.lost) == ([1, 5], 1, 3)


def test_a_header_that_was_torn_is_written_again(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:20]) if len(data) > 20 else 1 / 0)
    recorder.add(timing(1))
    recorder.flush()
    assert recorder.path.stat().st_size > 0
    monkeypatch.undo()
    recorder.add(timing(2))
    recorder.flush()
    log = read_log(recorder.path)
    assert ([row.step for row in log.rows], log.lost) == ([2], 1)


def test_a_removed_directory_loses_what_was_in_it(recorder: Recorder) -> None:
    recorder.add(timing(1))
    recorder.flush()
    shutil.rmtree(recorder.path.parent)
    recorder.add(timing(2))
    recorder.flush()
    log = read_log(recorder.path)
    assert ([row.step for row in log.rows], log.lost) == ([2], 1)


def test_a_directory_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    recorder = Recorder(tmp_path / "file" / "deep" / "a", {"rank": 0})
    recorder.add(timing(1))
    recorder.close()
    assert recorder.lost == 1
    assert "experiment rows are lost" in caplog.text


def test_a_link_is_not_followed(recorder: Recorder, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    recorder.path.parent.mkdir()
    recorder.path.symlink_to(victim)
    recorder.add(timing(1))
    recorder.flush()
    assert (victim.read_text(), recorder.lost) == ("theirs", 1)


def test_a_directory_that_others_may_write_to_gets_no_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o770)
    recorder = Recorder(tmp_path / "a", {"rank": 0})
    recorder.add(timing(1))
    recorder.close()
    assert (recorder.lost, os.listdir(tmp_path)) == (1, [])
    assert len(caplog.records) == 1 and "mode 0770 lets its group write to it" in caplog.text


@pytest.mark.parametrize("half", [record.SUFFIX, record.OLD])
@pytest.mark.parametrize("kind", ["FIFO", "link", "directory"])
def test_only_plain_files_are_read(recorder: Recorder, half: str, kind: str) -> None:
    recorder.add(timing(1))
    recorder.close()
    path = recorder.path.with_name(f"engine-1{half}")
    path.unlink(missing_ok=True)
    {"FIFO": os.mkfifo, "link": lambda at: at.symlink_to("/dev/zero"), "directory": os.mkdir}[kind](path)
    with within(20):
        runs, problems = read_runs(recorder.path.parent)
    assert (runs, problems) == ([], [f"{path}: found a {kind}, expected a plain file"])


def test_size_is_bounded_and_the_newest_rows_stay(recorder: Recorder) -> None:
    recorder.limit = 20000
    for step in range(2000):
        recorder.add(timing(step))
        if step % 10 == 9:
            recorder.flush()
    folder = recorder.path.parent
    assert sorted(os.listdir(folder)) == ["engine-1.steps.jsonl", "engine-1.steps.old.jsonl"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20000 + 2000  # one write may exceed the limit
    recorder.close()
    steps = [row.step for row in read_log(recorder.path).rows]
    assert steps == list(range(steps[0], 2000)) and len(steps) > 100


def test_bytes_of_a_row(recorder: Recorder) -> None:
    """32 MiB then hold 350000 steps, as the module's docstring says."""
    recorder.add(timing(1000000, "patch", block=999936, group=999808, bucket="graph/128/131072", us=2731.51953125))
    recorder.flush()
    assert len(recorder.path.read_text().splitlines()[1]) < 96


@pytest.mark.cost
def test_adding_costs_little(recorder: Recorder) -> None:
    rows = [timing(step) for step in range(10000)]
    seconds = min(
        timeit.repeat(lambda: [recorder.add(row) for row in rows], setup=recorder._queue.clear, number=1, repeat=5)
    )
    assert seconds / len(rows) < 2e-6


@pytest.mark.parametrize(
    "mode, batch, context, name",
    [("graph", 1, 1, "graph/1/1"), ("graph", 16, 8192, "graph/16/8192"), ("eager", 17, 8193, "eager/32/16384"),
     ("prefill", 0, 0, "prefill/1/1")],
)  # fmt: skip
def test_buckets(mode: str, batch: int, context: int, name: str) -> None:
    assert bucket(mode, batch, context) == name


# -- merging


def test_steps_on_which_the_ranks_differed_are_left_out() -> None:
    a = Log({"rank": 0}, [timing(1), timing(2, "patch"), timing(3), ERROR], damaged=1)
    b = Log({"rank": 1}, [timing(1, us=9), timing(2, "host", us=9), timing(4), NOTE], lost=2)
    merged = merge("r", [b, a])
    assert merged.timings == [timing(1), timing(3)]  # rank 0's times; step 3 was seen by one rank alone
    assert (merged.ranks, merged.differed, merged.damaged, merged.lost) == ([0, 1], 1, 1, 2)
    assert (merged.errors, merged.notes) == ([ERROR], [NOTE])


def test_a_step_that_differed_in_one_feature_is_left_out_for_all() -> None:
    both = [timing(1), timing(1, feature="kv_indices")]
    merged = merge("r", [Log({"rank": 0}, both), Log({"rank": 1}, [both[0], timing(1, "patch", feature="kv_indices")])])
    assert (merged.timings, merged.differed) == ([], 1)


def test_runs_are_kept_apart(tmp_path: Path) -> None:
    for name, run, rank in (("a", "x", 0), ("b", "x", 1), ("c", "y", 0)):
        lines = [{"format": 1, "run": run, "rank": rank}, ["t", *timing(1, "host" if run == "x" else "patch")]]
        (tmp_path / f"{name}.steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs, problems = read_runs(tmp_path)
    assert [(run.run, run.ranks, run.differed) for run in runs] == [("x", [0, 1], 0), ("y", [0], 0)]
    assert problems == []
