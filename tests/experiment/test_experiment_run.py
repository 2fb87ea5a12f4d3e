"""All parts together: two ranks, with a loop in place of the engine, get commands while they run."""

import json
import subprocess
import sys
import time
from pathlib import Path

from mla_patch.experiment import analysis, control, control_file, merge
from mla_patch.experiment.html import report_html

# What the edits in an engine do at each step. The barrier stands for its collectives, the clock for its device.
RANK = """
import multiprocessing, os, random, sys, time
from pathlib import Path
from mla_patch.experiment import control, control_file, record
from mla_patch.experiment.assign import Assigner
from mla_patch.experiment.breaker import Breaker
from mla_patch.experiment.schedule import Plan
from mla_patch.experiment.timing import EventPool

class Event:
    now = 0.0
    def record(self): self.at = Event.now
    def query(self): return True
    def elapsed_time(self, end): return end.at - self.at

def rank(number, folder, barrier, stop):
    live = control.Control(folder / "r.control", number)
    breaker = Breaker(0.02, stop=lambda reason: None, publish=lambda reason: live.trip("decode", reason))
    assigner = Assigner("decode", Plan(block=8, warmup=16, salt="decode"), live, breaker)
    recorder = record.Recorder(folder / f"fake-{os.getpid()}", {"run": "r", "rank": number})
    pool = EventPool(Event)
    step = 0
    while True:
        step += 1
        barrier.wait()
        if stop.value and step > stop.value: break
        arm, block, group = assigner.assignment(step)
        pool.begin()
        Event.now += random.Random(step).gauss(1, 0.01) * (0.8 if arm == "patch" else 1.0)
        pool.end((step, "decode", arm, block, group, record.bucket("graph", 16, 5000 + step % 100)))
        for about, us in pool.harvest():
            recorder.add(record.Timing(*about, us))
        if number == 1 and (folder / "wrong").exists():
            breaker.check(record.Error(step, "decode", 0, 1.0, 0.05, 0))
        time.sleep(0.0005)
    recorder.close()
    live.close()
    assert assigner.late == 0 and not live.problem and recorder.lost == 0, vars(assigner)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    control_file.create(folder / "r.control", {"run": "r", "ranks": 2, "features": {"decode": ["host", "patch"]}})
    fork = multiprocessing.get_context("fork")
    barrier, stop = fork.Barrier(2), fork.Value("q", 0)
    ranks = [fork.Process(target=rank, args=(n, folder, barrier, stop)) for n in range(2)]
    for one in ranks: one.start()
    stop.value = int(sys.stdin.readline())
    for one in ranks: one.join()
    sys.exit(max(abs(one.exitcode) for one in ranks))
"""


def reach(path: Path, step: int) -> None:
    end = time.monotonic() + 60
    while not (path.exists() and max((beat.step for beat in control_file.read(path)[1]), default=0) >= step):
        assert time.monotonic() < end, f"step {step} was not reached"
        time.sleep(0.02)


def test_from_a_running_engine_to_the_page(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    path = tmp_path / "r.control"
    engine = subprocess.Popen([sys.executable, "rank.py", tmp_path], stdin=subprocess.PIPE, cwd=tmp_path, text=True)
    try:
        reach(path, 600)
        with control.Controller(path) as controller:
            forced = controller.send("decode", "arm", "patch").at
        reach(path, forced + 50)
        (tmp_path / "wrong").touch()
        end = time.monotonic() + 60
        while not (trips := [c for c in control_file.read(path)[0].commands if c.kind == "trip"]):
            assert time.monotonic() < end
            time.sleep(0.02)
        engine.communicate(f"{trips[0].at + 50}\n", timeout=60)
    finally:
        engine.kill()
    assert engine.returncode == 0

    (run,), problems = merge.read_runs(tmp_path)
    assert problems == []
    assert (run.ranks, run.lost, run.damaged) == ([0, 1], 0, 0)
    # rank 1 tripped and ran the host's at once; rank 0 followed at the published step, and not one step later
    wrong = {row.step for row in run.timings}
    differed = set(range(1, trips[0].at + 51)) - wrong
    assert 0 < len(differed) == run.differed
    assert forced < min(differed) and max(differed) == trips[0].at - 1
    arms = {row.step: row.arm for row in run.timings}
    assert {arms[step] for step in range(forced, min(differed))} == {"patch"}
    assert {arms[step] for step in range(trips[0].at, trips[0].at + 51)} == {"host"}

    report = analysis.analyse(run)
    (one,) = report["comparisons"]
    assert (one["bucket"], one["arm"], one["verdict"]) == ("graph/16/8192", "patch", "faster")
    assert one["interval"][0] < 0.8 < one["interval"][1]
    assert "graph, batch 16, context 8192" in report_html(json.loads(json.dumps(report)))
