"""Live control: a file that cannot be trusted is ignored and reported, and all ranks change arms at the same step."""

import fcntl
import logging
import os
import re
import stat
import struct
import subprocess
import sys
import threading
import time
import timeit
from pathlib import Path

import pytest

from mla_patch.compat.types import PATCH
from mla_patch.dispatch import ArmCode, EntryPoint, FeatureGate
from mla_patch.experiment import control, control_file
from mla_patch.experiment.assign import Assigner
from mla_patch.experiment.breaker import Breaker
from mla_patch.experiment.control import Control, Controller
from mla_patch.experiment.control_file import SIZE, SLOT_BYTES, SLOTS_AT, Command, ControlError
from mla_patch.experiment.record import Error
from mla_patch.experiment.schedule import NOT_COMPARED, Plan, Schedule
from mla_patch.features import Counts

ABOUT = {"run": "r", "ranks": 4, "features": {"decode": ["host", "patch"], "kv_indices": ["host", "patch", "mine"]}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "reports" / "r.control"
    control_file.create(path, ABOUT)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_file, "WAIT", 0.05)


def rank(path: Path, number: int = 0) -> Control:
    """A rank's side without a thread: it reads the file when the test calls ``poll``."""
    return Control(path, number, thread=False)


def send(path: Path, *args, **more) -> Command:
    with Controller(path) as controller:
        return controller.send(*args, **{"at": 100} | more)


def test_the_file_is_made_once_and_for_its_owner(path: Path) -> None:
    send(path, "decode", "arm", "patch")
    control_file.create(path, {"run": "another"})
    content, beats = control_file.read(path)
    assert (content.about, len(content.commands), beats) == (ABOUT, 1, [])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == SIZE
    assert sorted(os.listdir(path.parent)) == ["r.control", "r.control.lock"]


def test_all_ranks_change_at_the_stated_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Controller, "_measure", lambda self: 177.0)  # steps per second
    plan = Plan(seed=1)
    ranks = [rank(path, number) for number in range(4)]
    assigners = [Assigner("decode", plan, one) for one in ranks]
    for step in range(1000):
        if step == 130:
            for one in ranks:
                one.poll()
            assert send(path, "decode", "arm", "patch", at=None).at == 193
        if step % 7 == 0:
            for one in ranks[:2]:
                one.poll()  # these ranks read early, the others at the last moment
        if step == 190:
            for one in ranks:
                one.poll()
        assignments = {assigner.assignment(step) for assigner in assigners}
        assert len(assignments) == 1
        arm = assignments.pop()
        assert arm == (("patch", NOT_COMPARED, NOT_COMPARED) if step >= 193 else Schedule(plan).assignment(step))
    assert [assigner.late for assigner in assigners] == [0] * 4


def sends(path: Path, monkeypatch: pytest.MonkeyPatch, ranks: list[Control], pace: int) -> int:
    """The step at which a command takes effect if ranks run ``pace`` steps in the quarter second that is measured."""
    clock = [time.time_ns()]
    monkeypatch.setattr(time, "time_ns", lambda: clock[0])

    def sleep(seconds: float) -> None:
        clock[0] += 250_000_000
        for one in ranks:
            one.step += pace
            one.poll()

    monkeypatch.setattr(time, "sleep", sleep)
    for one in ranks:
        one.poll()
    return send(path, "decode", "stop", at=None).at


@pytest.mark.parametrize(
    ("number", "pace", "at"),
    [(1, 0, 1001), (1, 250, 1001), (2, 0, 1001), (2, 1, 1001 + 4), (2, 5, 1005 + 9), (2, 250, 1250 + 352)],
    ids=["one, idle", "one, busy", "two, idle", "two, long prompts", "two, prompts", "two, decoding"],
)
def test_how_far_ahead_a_command_takes_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, pace: int, at: int
) -> None:
    """As many steps as run in 0.35 s, and two; the next step if there is one rank or the engine is idle."""
    path = tmp_path / "r.control"
    control_file.create(path, ABOUT | {"ranks": number})
    ranks = [rank(path, one) for one in range(number)]
    for one in ranks:
        one.step = 1000
    assert sends(path, monkeypatch, ranks, pace) == at


@pytest.mark.parametrize("number", [1, 2])
def test_the_next_step_of_an_idle_engine_obeys(tmp_path: Path, number: int) -> None:
    path = tmp_path / "r.control"
    control_file.create(path, ABOUT | {"ranks": number})
    ranks = [rank(path, one) for one in range(number)]
    assigners = [Assigner("decode", Plan(warmup=0, arms=("patch", "host")), one) for one in ranks]
    for step in range(16):
        assert {assigner.assignment(step).arm for assigner in assigners} <= {"patch", "host"}
    for one in ranks:
        one.poll()
    send(path, "decode", "arm", "host", at=None)
    for one in ranks:  # the threads read the file even when no steps run
        one.poll()
    assignments = [[assigner.assignment(step) for assigner in assigners] for step in range(16, 40)]
    assert all(assignment == ("host", NOT_COMPARED, NOT_COMPARED) for step in assignments for assignment in step)
    assert [assigner.late for assigner in assigners] == [0] * number


def test_one_rank_is_never_late(tmp_path: Path) -> None:
    path = tmp_path / "r.control"
    control_file.create(path, ABOUT | {"ranks": 1})
    one = rank(path)
    assigner = Assigner("decode", Plan(), one)
    assigner.assignment(150)
    one.poll()
    assert send(path, "decode", "arm", "patch", at=None).at == 151
    for step in range(151, 160):  # the file has not been read yet
        assigner.assignment(step)
    one.poll()
    assert (assigner.assignment(160).arm, assigner.late) == ("patch", 0)


def test_a_heartbeat_names_the_newest_command_read(path: Path) -> None:
    one = rank(path, 2)
    one.poll()
    assert [(beat.rank, beat.seen) for beat in control_file.read(path)[1]] == [(2, 0)]
    command = send(path, "decode", "stop")
    assert control_file.read(path)[1][0].seen == 0
    one.poll()
    assert control_file.read(path)[1][0].seen == command.seq == 1


def test_every_command(path: Path) -> None:
    one = rank(path)
    assigner = Assigner("decode", Plan(block=10, warmup=20), one)
    send(path, "decode", "stop", at=500)
    send(path, "decode", "start", at=1000)
    send(path, "decode", "ratio", 0.9, at=2000)
    send(path, "decode", "arm", "patch", at=4000)
    send(path, "decode", "start", at=4050)
    send(path, "kv_indices", "arm", "mine", at=0)  # a command to another feature
    one.poll()
    assignments = [assigner.assignment(step) for step in range(4200)]
    assert assignments[:500] == [Schedule(Plan(block=10, warmup=20)).assignment(step) for step in range(500)]
    assert set(assignments[500:1020]) == {
        ("host", NOT_COMPARED, NOT_COMPARED)
    }  # first stopped, then in the warmup of the new start
    assert assignments[1020].block == 1020
    tried = sum(assignment.arm == "patch" for assignment in assignments[2000:4000]) / 2000
    assert tried == 0.9
    assert {assignment.group for assignment in assignments[2000:2100]} == {2000, NOT_COMPARED}
    assert set(assignments[4000:4050]) == {("patch", NOT_COMPARED, NOT_COMPARED)}
    given = Schedule(Plan(block=10, warmup=20, start=4050))  # the earlier ratio is no longer valid
    assert assignments[4050:] == [given.assignment(step) for step in range(4050, 4200)]
    assert [command.kind for command in assigner.taken] == ["stop", "start", "ratio", "arm", "start"]


def test_commands_are_obeyed_by_step_then_in_order_of_writing(path: Path) -> None:
    one = rank(path)
    assigner = Assigner("kv_indices", Plan(warmup=0), one)
    send(path, "kv_indices", "arm", "host", at=50)
    send(path, "kv_indices", "arm", "mine", at=10)
    send(path, "kv_indices", "arm", "patch", at=10)
    one.poll()
    assert [assigner.assignment(step).arm for step in (10, 49, 50)] == ["patch", "patch", "host"]


def test_a_late_rank_obeys_and_is_counted(path: Path) -> None:
    one = rank(path)
    assigner = Assigner("decode", Plan(), one)
    assigner.assignment(150)
    send(path, "decode", "arm", "patch", at=100)
    one.poll()
    assert (assigner.assignment(151).arm, assigner.late) == ("patch", 1)
    fresh = Assigner("decode", Plan(), rank(path))  # for a rank that starts now, no command is late
    fresh._control.poll()
    assert (fresh.assignment(151).arm, fresh.late) == ("patch", 0)


def test_a_command_takes_effect_through_the_thread(path: Path) -> None:
    one = Control(path, 3)
    assigner = Assigner("decode", Plan(), one)
    try:
        assigner.assignment(5000)
        end = time.monotonic() + 10
        while not any(beat.step == 5000 for beat in control_file.read(path)[1]):
            assert time.monotonic() < end
            time.sleep(0.01)
        with Controller(path) as controller:
            command = controller.send("decode", "arm", "patch")
        assert command.at == 5001  # the engine is idle
        while assigner._inbox.next_at != command.at:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert assigner.assignment(command.at).arm == "patch"
    finally:
        one.close()


def test_a_faster_engine_gets_more_steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = rank(path)

    def pause(seconds: float) -> None:
        one.step += 1000
        one.poll()

    one.step = 10
    one.poll()
    now = iter(range(10**18, 10**19, 10**9))  # one second passes between two reads
    monkeypatch.setattr(time, "time_ns", lambda: next(now))
    one.poll()
    monkeypatch.setattr(time, "sleep", pause)
    assert send(path, "decode", "stop", at=None).at == 1010 + control.MARGIN + 350  # steps in 0.35 s


@pytest.mark.parametrize(
    "args, at, problem",
    [
        (("decod", "stop"), 100, "'decod' is not under test here; under test: decode, kv_indices"),
        (("decode", "arm", "mine"), 100, "'mine' is not an arm of decode; expected one of host, patch"),
        (("decode", "arm"), 100, "None is not an arm of decode; expected one of host, patch"),
        (("decode", "ratio", 1.5), 100, "ratio=1.5: expected a number between 0 and 1"),
        (("decode", "ratio", float("nan")), 100, "ratio=nan: expected a number between 0 and 1"),
        (("decode", "halt"), 100, "kind='halt': expected one of start, ratio, arm, stop, trip"),
        (("decode", "stop"), -1, "at=-1: expected a whole number, 0 or more"),
        (("decode", "stop"), 7, "at=7: a rank is already at step 7"),
    ],
)
def test_commands_that_are_refused(path: Path, args: tuple, at: int, problem: str) -> None:
    one = rank(path)
    if at == 7:
        one.step = 7
        one.poll()
    with pytest.raises((ControlError, ValueError)) as caught:
        send(path, *args, at=at)
    assert str(caught.value) == problem
    assert control_file.read(path)[0].commands == ()


@pytest.mark.parametrize("killed", [False, True])
def test_two_controllers_at_once(path: Path, killed: bool) -> None:
    code = (
        "import sys; from pathlib import Path; from mla_patch.experiment.control import Controller\n"
        "with Controller(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"in\n"
        assert stat.S_IMODE(path.with_name(path.name + ".lock").stat().st_mode) == 0o600
        with pytest.raises(ControlError, match=f"another controller is active .process {other.pid} on "):
            send(path, "decode", "stop")
    finally:
        if killed:
            other.kill()
        other.communicate(b"")
    assert send(path, "decode", "stop").seq == 1  # the lock ended with its process


def test_writers_wait_for_each_other(path: Path) -> None:
    threads = [threading.Thread(target=send_many, args=(path, number)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    commands = control_file.read(path)[0].commands
    assert [command.seq for command in commands] == list(range(1, 21))
    assert sorted({command.by for command in commands}) == ["rank 0", "rank 1", "rank 2", "rank 3"]


def send_many(path: Path, number: int) -> None:
    one = rank(path, number)
    for i in range(5):
        one.trip("decode", str(i))
        while one._trips:
            one.poll()


def test_a_writer_that_hangs_is_reported(path: Path) -> None:
    with control_file.opened(path, os.O_RDWR) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ControlError, match="locked by another process"):
            send(path, "decode", "stop")


# -- files that cannot be trusted


def spoil(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def as_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    euid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: euid + 1)


SPOILT = {
    "removed": (lambda path, patch: path.unlink(), "No such file"),
    "emptied": (lambda path, patch: path.write_bytes(b""), f"0 bytes, expected {SIZE}"),
    "truncated": (lambda path, patch: os.truncate(path, SLOTS_AT + 10), f"{SLOTS_AT + 10} bytes, expected {SIZE}"),
    "longer": (lambda path, patch: os.truncate(path, SIZE + 1), f"{SIZE + 1} bytes, expected"),
    "foreign": (as_other, "owned by user"),
    "open to others": (lambda path, patch: path.chmod(0o620), "mode 0620, expected 0600"),
    "magic": (lambda path, patch: spoil(path, 0, b"X"), "not a control file of version 2"),
    "version": (lambda path, patch: spoil(path, 8, b"\x03"), "not a control file of version 2"),
    "zeros": (lambda path, patch: spoil(path, SLOTS_AT, bytes(2 * SLOT_BYTES)), "corrupt, both slots"),
    "length": (
        lambda path, patch: [spoil(path, SLOTS_AT + i * SLOT_BYTES + 8, b"\xff\xff\xff\xff") for i in (0, 1)],
        "corrupt, both slots",
    ),
    "a link": (
        lambda path, patch: (path.rename(path.with_name("x")), path.symlink_to("x")),
        "found a link, expected",
    ),
    "a directory": (lambda path, patch: (path.unlink(), path.mkdir()), "found a directory, expected a plain file"),
    "a pipe": (lambda path, patch: (path.unlink(), os.mkfifo(path, 0o600)), "found a FIFO, expected a plain"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_file_is_ignored_and_reported_once(
    how: str, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = rank(path)
    assigner = Assigner("decode", Plan(warmup=0), one)
    send(path, "decode", "arm", "patch", at=10)
    one.poll()
    spoil_it, reason = SPOILT[how]
    spoil_it(path, monkeypatch)
    with caplog.at_level(logging.WARNING, "mla_patch"):
        for step in range(20):
            one.poll()
            arm = assigner.assignment(step).arm
    assert arm == "patch"  # commands that were read before stay valid
    assert re.search(reason, one.problem)
    assert len(caplog.records) == 1
    with pytest.raises(ControlError, match=reason):
        send(path, "decode", "stop", at=300)


def test_a_file_that_comes_back_is_read_again(path: Path) -> None:
    one = rank(path)
    assigner = Assigner("decode", Plan(warmup=0), one)
    aside = path.with_name("aside")
    path.rename(aside)
    one.poll()
    assert "No such file" in one.problem
    aside.rename(path)
    send(path, "decode", "arm", "patch", at=10)
    one.poll()
    assert (one.problem, assigner.assignment(10).arm) == ("", "patch")


def test_an_older_file_in_its_place_is_refused(path: Path) -> None:
    one = rank(path)
    send(path, "decode", "arm", "patch", at=10)
    one.poll()
    path.unlink()
    control_file.create(path, ABOUT)
    one.poll()
    assert one.problem.endswith("generation 1 after 2: replaced")


@pytest.mark.parametrize("cut", [0, 4, 11, 12, 16, 40, 200])
def test_a_torn_write_is_never_acted_on(path: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer dies after it has written ``cut`` bytes of a slot."""
    one = rank(path)
    send(path, "decode", "arm", "host", at=10)
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:cut] if at >= SLOTS_AT else data, at))
    send(path, "decode", "arm", "patch", at=20)
    monkeypatch.undo()
    one.poll()
    assert one.problem == ""
    assert [command.value for command in one._content.commands] == ["host"]
    send(path, "decode", "arm", "patch", at=30)  # the next writer repairs it
    one.poll()
    assert [command.at for command in one._content.commands] == [10, 30]


def test_every_flipped_bit_is_seen(path: Path) -> None:
    send(path, "decode", "arm", "patch", at=10)
    whole = path.read_bytes()
    used = len(control_file._pack(control_file.read(path)[0]))
    for at in range(SLOTS_AT, SLOTS_AT + used, 7):  # generation 2 lies in slot 0
        spoil(path, at, bytes([whole[at] ^ 1 << at % 8]))
        assert control_file.read(path)[0].generation == 1, at
        path.write_bytes(whole)


@pytest.mark.parametrize("at, step", [(-1, 0), (1.5, 0), (True, 0), (control_file.NEVER, 0)])
def test_commands_for_impossible_steps(at: object, step: int) -> None:
    with pytest.raises(ValueError, match="at="):
        Command("decode", "stop", at, 1)  # type: ignore[arg-type]


def test_a_damaged_heartbeat_is_ignored(path: Path) -> None:
    one = rank(path, 5)
    one.step = 1000
    one.poll()
    assert [(beat.rank, beat.step) for beat in control_file.read(path)[1]] == [(5, 1000)]
    spoil(path, control_file.CELLS_AT + 5 * control_file.CELL_BYTES + 4, struct.pack("<Q", 1 << 60))
    assert control_file.read(path)[1] == []
    assert send(path, "decode", "stop", at=None).at == 1


def test_a_rank_that_has_ended_is_not_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = rank(path, 0), rank(path, 1)
    one.step, two.step = 10**9, 500
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 11 * 10**9)
    one.poll()  # its last heartbeat
    monkeypatch.undo()
    two.poll()
    assert [beat.rank for beat in control_file.read(path)[1]] == [1]
    assert send(path, "decode", "stop", at=None).at == 501


def test_old_commands_are_dropped_and_those_of_breakers_kept(path: Path) -> None:
    one = rank(path)
    one.trip("decode", "x" * 400)
    one.poll()
    for number in range(200):
        send(path, "decode", "stop", at=number + 1000)
    commands = control_file.read(path)[0].commands
    assert 50 < len(commands) < 200
    assert [commands[0].kind, commands[-1].at] == ["trip", 1199]


# -- the breaker


def tripping(path: Path, number: int, log: list[str]) -> tuple[Control, Assigner]:
    one = rank(path, number)
    breaker = Breaker(0.02, lambda reason: log.append(f"{number}: {reason}"), lambda reason: one.trip("decode", reason))
    return one, Assigner("decode", Plan(warmup=0, seed=2), one, breaker)


def test_the_breaker_stops_this_rank_at_once_and_the_others_at_a_step(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LEAD", 0.0)  # steps take no time in this test
    monkeypatch.setattr(control, "INTERVAL", 0.0)
    said: list[str] = []
    (one, mine), (two, other) = tripping(path, 0, said), tripping(path, 1, said)
    tripped_at = 500
    differed = []
    for step in range(1500):
        if step == tripped_at:
            mine._breaker.check(Error(step, "decode", 3, 1.0, 0.05, 0))
        one.poll(), two.poll()
        a, b = mine.assignment(step), other.assignment(step)
        if step >= tripped_at:
            assert a == ("host", NOT_COMPARED, NOT_COMPARED)
        differed += [step] * (a.arm != b.arm)
    (command,) = control_file.read(path)[0].commands
    assert (command.kind, command.by) == ("trip", "rank 0")
    assert command.at == tripped_at - 1 + control.MARGIN
    assert differed and set(differed) <= set(range(tripped_at, command.at))  # steps that the records leave out
    reason = "shadow check at step 500, layer 3: error 0.05, tolerance 0.02"
    assert said == [f"0: {reason}", f"1: rank 0: {reason}"]  # one log line in each rank
    send(path, "decode", "arm", "patch", at=2000)
    one.poll(), two.poll()
    assert {mine.assignment(2500).arm, other.assignment(2500).arm} == {"host"}  # permanently


def test_an_exception_of_our_kernel_stops_the_other_ranks_too(path: Path) -> None:
    """The breaker and the dispatcher's switch stop each other, whichever of them stops first."""
    one = rank(path)
    switch = FeatureGate(lambda reason, fault: breaker.trip(reason))
    breaker = Breaker(0.02, switch.trip, lambda reason: one.trip("decode", reason))
    assigner = Assigner("decode", Plan(), one, breaker)
    site = EntryPoint("decode", lambda: (), {PATCH: ArmCode(lambda call: 1 / 0, lambda call: None)}, Counts(), switch)
    assert site.dispatch(lambda: "host", None, (), {}) == "host"
    one.poll()
    assert assigner.assignment(1000) == ("host", NOT_COMPARED, NOT_COMPARED)
    (command,) = control_file.read(path)[0].commands
    assert command.reason == "decode: ZeroDivisionError('division by zero')" == switch.stopped


def test_the_breaker_works_without_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []
    one, mine = tripping(tmp_path / "none", 0, said)
    mine._breaker.trip("an exception")
    one.poll()
    assert mine.assignment(1000).arm == "host"
    assert said == ["0: an exception"]
    assert "No such file" in caplog.text


@pytest.mark.parametrize(
    "error, reason",
    [
        (Error(1, "decode", 0, 0.0, 0.0, 0), ""),
        (Error(1, "decode", 0, 9.0, 0.02, 0), ""),
        (Error(1, "decode", 0, 9.0, 0.0201, 0), "shadow check at step 1, layer 0: error 0.0201, tolerance 0.02"),
        (Error(1, "decode", 0, 0.0, 0.0, 2), "2 elements are NaN or infinite in our result and finite in the engine's"),
        (Error(1, "decode", 0, 0.0, float("nan"), 0), "error nan, expected at most 0.02"),
        (Error(1, "decode", 0, 0.0, float("inf"), 0), "error inf, expected at most 0.02"),
    ],
)
def test_which_errors_trip_the_breaker(error: Error, reason: str) -> None:
    said: list[str] = []
    breaker = Breaker(0.02, said.append)
    for _ in range(3):
        breaker.check(error)
    assert breaker.reason.endswith(reason) and bool(breaker.reason) == bool(reason)
    assert said == [breaker.reason] * bool(reason)


@pytest.mark.cost
def test_a_step_costs_little(path: Path) -> None:
    one = Control(path, 0)
    assigner = Assigner("decode", Plan(), one, Breaker(0.02, str))
    steps = range(128, 20128)
    try:
        seconds = min(timeit.repeat(lambda: [assigner.assignment(step) for step in steps], number=1, repeat=7))
    finally:
        one.close()
    plain = Assigner("decode", Plan())
    base = min(timeit.repeat(lambda: [plain.assignment(step) for step in steps], number=1, repeat=7))
    assert (seconds - base) / len(steps) < 1e-6
