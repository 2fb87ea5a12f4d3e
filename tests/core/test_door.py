"""From interpreter start to a finder in place: nothing while off, once and cheaply while on, never an exception."""

import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scratch import DEPENDENCIES, ROOT, Scratch
from start_cost import measure

import mla_patch

pytestmark = pytest.mark.xdist_group("scratch")  # one worker, so that the wheel is built once

OFF = [None, "", "0", "off", "OFF", " False ", "no", "none", "disable"]
ON = ["1", "on", "yes", " 1 ", "anything"]

# What a process knows of us before it has imported anything itself.
SEEN = """
import sys
early = sorted(m for m in sys.modules if m.split(".")[0] == "mla_patch")
finders = [f for f in sys.meta_path if "HostFinder" in (type(f).__name__, getattr(f, "__name__", ""))]
"""
FINDERS = SEEN + "print(len(finders))"


@pytest.fixture(scope="module")
def scratch(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Scratch:
    """Has the wheel, its dependencies and a host package with nothing in it; no torch, no Triton."""
    made = Scratch.make(tmp_path_factory.mktemp("door") / "env", links=DEPENDENCIES)
    made.unpack(wheel)
    (made.site / "sglang").mkdir()
    (made.site / "sglang" / "__init__.py").write_text("")
    made.run("-c", "pass", env={"MLA_PATCH": "1"})  # writes the bytecode
    return made


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Scratch:
    made = Scratch.make(tmp_path_factory.mktemp("bare") / "env")
    # site reads any .pth file with a codec that it imports for the purpose; that is not our doing
    (made.site / "other.pth").write_text("# nothing\n")
    return made


def imported(scratch: Scratch, flag: str | None) -> set[str]:
    """Every module that a process has imported by the time it runs its first line, as Python itself logs it."""
    done = scratch.run("-X", "importtime", "-c", "pass", env={"MLA_PATCH": flag})
    assert done.returncode == 0
    rows = [line.rsplit("|", 1) for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(rows) == len(done.stderr.splitlines()), done.stderr
    return {name.strip() for _, name in rows}


@pytest.mark.parametrize("flag", OFF, ids=repr)
def test_off_imports_nothing(flag: str | None, scratch: Scratch, bare: Scratch) -> None:
    assert imported(scratch, flag) == imported(bare, flag)
    assert scratch.run("-c", FINDERS, env={"MLA_PATCH": flag}).stdout == "0\n"


def test_on_imports_the_door_and_the_start(scratch: Scratch, bare: Scratch) -> None:
    more = imported(scratch, "1") - imported(bare, None)
    assert {name for name in more if name.startswith("mla_patch")} == {
        "mla_patch",
        "mla_patch._autostart",
        "mla_patch.imports",
        "mla_patch.compat",  # the hosts' names and nothing else
        "mla_patch.startup",
    }
    assert {name.split(".")[0] for name in more} <= {"mla_patch", *sys.stdlib_module_names}


@pytest.mark.parametrize("flag", ON)
def test_on_installs_one_finder(flag: str, scratch: Scratch) -> None:
    done = scratch.run("-c", FINDERS, env={"MLA_PATCH": flag})
    assert (done.stdout, done.stderr) == ("1\n", "")


@pytest.mark.parametrize(
    "again",
    [
        "import site; site.addsitedir(SITE)",  # processes the .pth files of a folder that it has seen before
        "import site; site.addsitedir(SITE); site.addsitedir(SITE)",
        "import mla_patch._autostart as d; d.run(); d.run()",
        "import mla_patch.startup as s; s.start(); s.start()",
        "import importlib.metadata as m; [e.load()() for e in m.entry_points(group='sglang.srt.plugins')]",
        "import threading as t; s = __import__('mla_patch.startup').startup.start\n"
        "ts = [t.Thread(target=s) for _ in range(8)]; [x.start() for x in ts]; [x.join() for x in ts]",
    ],
)
@pytest.mark.parametrize("flag", ["1", None])
def test_start_again(flag: str | None, again: str, scratch: Scratch) -> None:
    code = f"SITE = {str(scratch.site)!r}\n{again}\n{FINDERS}"
    done = scratch.run("-c", code, env={"MLA_PATCH": flag})
    # a direct call starts it whatever the variable says; every door asks the variable
    started = flag or "startup" in again
    assert (done.stdout, done.stderr) == ("1\n" if started else "0\n", "")


def test_a_venv_that_runs_its_start_files_twice(scratch: Scratch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(scratch.site)!r})\n")
    env = {"MLA_PATCH": "1", "PYTHONPATH": str(tmp_path)}
    done = scratch.run("-c", FINDERS + "; print('sitecustomize' in sys.modules)", env=env)
    assert (done.stdout, done.stderr) == ("1\nTrue\n", "")


TREE = (
    SEEN.replace("import sys", "import json, multiprocessing, os, subprocess, sys")
    + """
def note(kind):
    # a forked child has its parent's: what counts is what is there, not who put it there
    now = [f for f in sys.meta_path if "HostFinder" in (type(f).__name__, getattr(f, "__name__", ""))]
    row = {"early": bool(early), "before": len(now)}
    import sglang
    if early:
        import mla_patch
        from mla_patch import startup
        row["started"] = startup.started()
        row["features"] = sorted(f["name"] for f in mla_patch.report()["features"] if f["host"].startswith("sglang"))
    with open(f"{sys.argv[1]}/{kind}-{os.getpid()}", "w") as out:
        json.dump(row, out)

if __name__ == "__main__":
    depth = int(sys.argv[2])
    for how in ("spawn", "fork", "forkserver"):
        child = multiprocessing.get_context(how).Process(target=note, args=(f"{how}{depth}",))
        child.start()
        child.join()
        assert child.exitcode == 0, how
    if depth < 2:
        subprocess.run([sys.executable, __file__, sys.argv[1], str(depth + 1)], check=True)
    note(f"main{depth}")
"""
)


@pytest.mark.parametrize("flag", ["1", "0"])
def test_every_process_of_a_tree_once(flag: str, scratch: Scratch, tmp_path: Path) -> None:
    script, out = tmp_path / "tree.py", tmp_path / "out"
    script.write_text(TREE)
    out.mkdir()
    done = scratch.run(script, out, "0", env={"MLA_PATCH": flag})
    told = done.stderr.splitlines()  # each process that imports the engine itself, in one line; a forked child has it
    assert (done.returncode, {line.split(":")[0] for line in told}) == (
        0,
        {f"mla-patch {mla_patch.__version__}, sglang of unknown version"} if flag == "1" else set(),
    )
    rows = {path.name.split("-")[0]: json.loads(path.read_text()) for path in out.iterdir()}
    assert set(rows) == {f"{how}{depth}" for how in ("spawn", "fork", "forkserver", "main") for depth in range(3)}
    for kind, row in rows.items():
        if flag == "0":
            assert row == {"early": False, "before": 0}, kind
        else:
            assert (row["early"], row["before"], row["started"]) == (True, 1, True), kind
            assert row["features"], kind
            assert len(set(row["features"])) == len(row["features"]), kind


def _write(name: str, text: str):
    return lambda package: (package / name).write_text(text)


BREAKS = {
    "removed": shutil.rmtree,
    "door gone": lambda package: (package / "_autostart.py").unlink(),
    "door is not Python": _write("_autostart.py", "def run(:\n"),
    "door raises": _write("_autostart.py", "raise RuntimeError('broken')\n"),
    "start-up gone": lambda package: (package / "startup.py").unlink(),
    "start-up is not Python": _write("startup.py", "def start(:\n"),
    "start raises": _write("startup.py", "def start():\n    raise RuntimeError('broken')\n"),
    "package raises": _write("__init__.py", "raise OSError('broken')\n"),
}


@pytest.fixture
def broken(request: pytest.FixtureRequest, wheel: Path, tmp_path: Path) -> Scratch:
    made = Scratch.make(tmp_path / "env")
    made.unpack(wheel)
    BREAKS[request.param](made.site / "mla_patch")
    return made


@pytest.mark.parametrize("broken", BREAKS, indirect=True)
def test_a_broken_package_leaves_python_healthy(broken: Scratch) -> None:
    off = broken.run("-c", "print('fine')")
    assert (off.stdout, off.stderr, off.returncode) == ("fine\n", "", 0)

    on = broken.run("-c", "print('fine')", env={"MLA_PATCH": "1"})
    assert (on.stdout, on.returncode) == ("fine\n", 0)
    # asked for and not there: one line, not a traceback
    assert on.stderr.startswith("mla-patch: ")
    assert len(set(on.stderr.splitlines())) == 1  # said again where a venv reads its start-up files twice

    # a daemon closes its streams: sys.stderr is None then, and nothing may land on standard output
    command = ["sh", "-c", '"$0" -c "print(1)" 2>&-', broken.python]
    closed = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "MLA_PATCH": "1"})
    assert (closed.stdout, closed.returncode) == ("1\n", 0)


def test_enter_never_raises(scratch: Scratch) -> None:
    code = """
from mla_patch import _autostart, startup
def start(): raise MemoryError("none left")
startup.start = start
_autostart.run()
print("fine")
"""
    done = scratch.run("-c", code, env={"MLA_PATCH": "1"})
    assert (done.stdout, done.returncode) == ("fine\n", 0)
    assert "none left" in done.stderr


def test_the_start_file_names_the_same_door(scratch: Scratch) -> None:
    """Python 3.15 reads mla_patch.start as here: UTF-8, no blank lines or comments, called without arguments."""
    lines = (ROOT / "mla_patch.start").read_text(encoding="utf-8-sig").splitlines()
    entries = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    assert entries == ["mla_patch._autostart:run"]
    assert callable(pkgutil.resolve_name(entries[0]))
    code = f"import pkgutil; pkgutil.resolve_name({entries[0]!r})()\n{SEEN}\nprint(early, len(finders))"
    # -S: without .pth files, as there, where the .start file takes their place
    path = {"PYTHONPATH": str(scratch.site)}
    assert scratch.run("-S", "-c", code, env=path).stdout == "['mla_patch', 'mla_patch._autostart'] 0\n"
    on = scratch.run("-S", "-c", code, env=path | {"MLA_PATCH": "1"})
    assert (on.stdout, on.stderr) == (
        "['mla_patch', 'mla_patch._autostart', 'mla_patch.compat', 'mla_patch.imports', 'mla_patch.startup'] 1\n",
        "",
    )


def test_the_pth_file_is_one_line_of_code() -> None:
    text = (ROOT / "mla_patch.pth").read_text(encoding="ascii")
    assert text.startswith("import ")
    assert text.count("\n") == 1


@pytest.mark.cost
def test_start_cost(wheel: Path, tmp_path: Path) -> None:
    """Medians of a few starts; other work on the machine is given three chances not to be in the way."""
    costs = []
    for attempt in range(3):
        costs.append(measure(wheel, tmp_path / str(attempt), starts=25)["wall_ms"])
        # off, the price of one more .pth file; on, what a worker that starts by the hundred may cost
        if costs[-1]["off_adds"] < 1 and costs[-1]["on_adds"] < 5:
            return
    pytest.fail(f"milliseconds: {costs}")
