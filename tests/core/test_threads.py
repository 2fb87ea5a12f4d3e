"""Imports, threads and us: nothing of ours waits while it holds what another thread's import needs.

A hang is told by the stacks of all threads: each trial arms faulthandler.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_host import FakeHost, fake_host
from scratch import DEPENDENCIES, ROOT, Scratch, clean_env
from test_patcher import as_sglang

CPU_SECONDS = 110  # see budget.py

__all__ = ["fake_host"]  # a fixture

PATIENT = "import faulthandler; faulthandler.dump_traceback_later(25, exit=True)\n"

TRIALS_EACH = 16  # of every Python; each is a third of a second
# Forks for each trial, so that each wakes the plugin anew, a few at once.
TRIALS = """
import faulthandler, os, sys, threading
import mla_patch._autostart

mla_patch._autostart.run()
assert "pluggy" not in sys.modules and "mla_patch.patcher" not in sys.modules

def trial():
    both = threading.Barrier(2)
    failed = []

    def go(act):
        both.wait()
        try:
            act()
        except BaseException as problem:
            failed.append(problem)

    def one():
        try:
            import sglang
        except ModuleNotFoundError as problem:  # a real release needs more than what is installed here
            if problem.name == "sglang":
                raise

    def other():
        OTHER

    threads = [threading.Thread(target=go, args=(act,)) for act in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed

def children(count, at_once):
    running, bad = set(), 0
    while count or running:
        if count and len(running) < at_once:
            count -= 1
            pid = os.fork()
            if not pid:
                faulthandler.dump_traceback_later(PATIENCE, exit=True)
                sys.setswitchinterval(1e-4)
                failed = trial()
                if failed:
                    sys.stderr.write(f"{failed}\\n")
                os._exit(bool(failed) or "mla_patch.patcher" not in sys.modules)
            running.add(pid)
            continue
        pid, status = os.wait()
        running.discard(pid)
        bad += status != 0
    return bad

print(children(COUNT, AT_ONCE), "of COUNT")
"""


def pythons() -> dict[str, str]:
    """Every Python from 3.10 to 3.13 that this machine has, by its version: on PATH, or of pyenv's."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    folders += [str(path / "bin") for path in sorted(versions.glob("3.*"))]
    found = {f"{sys.version_info[0]}.{sys.version_info[1]}": sys.executable}
    for minor in range(10, 14):
        for folder in folders:
            path = shutil.which(f"python3.{minor}", path=folder)
            if path is None or f"3.{minor}" in found:
                continue
            # a shim of pyenv's is there for versions that it does not start
            if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
                found[f"3.{minor}"] = path
    return dict(sorted(found.items()))


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What we need, apart from this environment's torch: importable by other Pythons too."""
    root = tmp_path_factory.mktemp("dependencies")
    site = root / "lib" / "python3" / "site-packages"
    site.mkdir(parents=True)
    Scratch(root).link(DEPENDENCIES)
    return site


def run_trials(
    python: str, other: str, count: int, *path: Path, at_once: int = 4, patience: int = 30, cache: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """``count`` processes in which one thread imports the engine while the other runs ``other``."""
    code = TRIALS.replace("OTHER", other).replace("COUNT", str(count))
    code = code.replace("AT_ONCE", str(at_once)).replace("PATIENCE", str(patience))
    env = clean_env({"MLA_PATCH": "1", "PYTHONPATH": ":".join(map(str, path))})
    if cache is not None:
        env["PYTHONPYCACHEPREFIX"] = str(cache)
    return subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("version", pythons())
def test_a_thread_imports_while_another_imports_the_engine(
    version: str, dependencies: Path, fake_host: FakeHost
) -> None:
    as_sglang(fake_host)
    other = "import importlib.metadata, inspect, json, logging, pluggy, packaging.version, wrapt"
    done = run_trials(pythons()[version], other, TRIALS_EACH, dependencies, fake_host.root, ROOT, cache=dependencies)
    assert (done.stdout, done.returncode) == (f"0 of {TRIALS_EACH}\n", 0), done.stderr


HALF = """
import threading
entered, go_on = threading.Event(), threading.Event()
"""

# a plugin that is slow where no import lock is held: the first thread that asks it waits until the others are through
SLOW = """
import gate
from mla_patch.hookspecs import hookimpl

asked = []

@hookimpl
def mla_patch_features():
    asked.append(True)
    if len(asked) == 1:
        gate.entered.set()
        assert gate.go_on.wait(10)
    return []
"""


def test_many_threads_import_the_engine_at_once(fake_host: FakeHost) -> None:
    """Meanwhile a plugin is slow to import, until other threads have imported what they want."""
    as_sglang(fake_host)
    fake_host.write("gate.py", HALF)
    fake_host.write("slow.py", "import gate\ngate.entered.set()\nassert gate.go_on.wait(10)\nprint('loaded')\n")
    fake_host.install("slow", "1.0", "slow = slow")
    for at in range(16):
        fake_host.write(f"elsewhere{at}.py", "import colorsys, elsewhere\n")
    fake_host.write("elsewhere.py", "import sched\n")
    code = (
        PATIENT
        + """
import gate
both, others = threading.Barrier(32), threading.Barrier(16, action=gate.go_on.set)
seen = []
def engine():
    both.wait()
    from sglang.ops import decode
    seen.append(decode(1, 2))
def other(at):
    both.wait()
    assert gate.entered.wait(10)
    importlib.import_module(f"elsewhere{at}")
    others.wait(10)
threads = [threading.Thread(target=engine) for _ in range(16)]
threads += [threading.Thread(target=other, args=(at,)) for at in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(set(seen), len(seen), state())
"""
    )
    assert fake_host.says(code, door=True).splitlines() == ["loaded", "{'ours'} 16 applied"]


ASK = (
    PATIENT
    + """
import importlib.util, pathlib
def ask():
    spec = importlib.util.find_spec("sglang")
    early = threading.active_count() - (threading.current_thread() is not threading.main_thread())
    print(spec.origin.endswith("__init__.py"), early, "pluggy" in sys.modules, pathlib.Path("reports").exists())
"""
)
IN_MAIN, IN_THREAD = "ask()\n", "thread = threading.Thread(target=ask); thread.start(); thread.join()\n"


@pytest.mark.parametrize("strict", [None, "1"], ids=["lenient", "strict"])
@pytest.mark.parametrize("where", [IN_MAIN, IN_THREAD], ids=["main", "thread"])
def test_only_asking_for_the_engine_wakes_nothing(where: str, strict: str | None, fake_host: FakeHost) -> None:
    as_sglang(fake_host, "0.5.99")  # which strict would not have
    env = {"MLA_PATCH_OPS": "on", "MLA_PATCH_STRICT": strict, "MLA_PATCH_REPORT": "reports"}
    done = fake_host.run(ASK + where, env, door=True)
    assert (done.stdout, done.stderr, done.returncode) == ("True 1 False False\n", "", 0)
    # and it is not forgotten by that
    done = fake_host.run(ASK + where + "import sglang", env, door=True)
    assert "ops@sglang (MLA_PATCH_OPS=on, environment) is absent" in done.stderr
    assert done.returncode == (1 if strict else 0)


def test_a_namespace_package_wakes_nothing(fake_host: FakeHost) -> None:
    (fake_host.root / "sglang").mkdir()
    code = "import sglang, mla_patch.startup\nprint(sglang.__spec__.origin, 'pluggy' in sys.modules)\n"
    assert fake_host.says(code, door=True) == "None False"
    late = "import sglang\nimport mla_patch.startup; mla_patch.startup.start()\nprint('pluggy' in sys.modules)"
    assert fake_host.says(late) == "False"


def test_nobody_sees_the_loader_that_wakes(fake_host: FakeHost) -> None:
    """Resources, sources, runpy and reload work as without us, whether they look before the import or after it."""
    as_sglang(fake_host)
    fake_host.write("sglang/__main__.py", "import sglang\nprint('run', type(sglang.__loader__).__name__)\n")
    fake_host.write("sglang/data.txt", "text")
    fake_host.write("sglang/__init__.py", "LOADERS = __loader__, __spec__.loader\n")
    code = """
    import importlib.machinery, importlib.resources, importlib.util, inspect, pkgutil, runpy
    plain = importlib.machinery.SourceFileLoader
    spec = importlib.util.find_spec("sglang")
    print(isinstance(spec.loader, plain), spec.loader.get_source("sglang")[:7], spec.loader.is_package("sglang"))
    print(type(spec.loader.get_code("sglang")).__name__, spec.loader.path == spec.origin)
    print(pkgutil.get_data("sglang", "data.txt"))
    import sglang
    print({type(one) is plain for one in (*sglang.LOADERS, sglang.__loader__, sglang.__spec__.loader)})
    print((importlib.resources.files("sglang") / "data.txt").read_text(), inspect.getsource(sglang)[:7])
    print(importlib.reload(sglang) is sglang, type(sglang.__spec__.loader) is plain)
    runpy.run_module("sglang", run_name="__main__")
    import sglang.ops
    print(type(sglang.ops.__loader__) is plain, sglang.ops.decode(1, 2))
    """
    assert fake_host.says(code, door=True).splitlines() == [
        "True LOADERS True", "code True", "b'text'", "{True}", "text LOADERS", "True True", "run SourceFileLoader",
        "True ours",
    ]  # fmt: skip


def test_the_engine_in_a_zip_file(fake_host: FakeHost) -> None:
    as_sglang(fake_host)
    shutil.make_archive(str(fake_host.root / "engine"), "zip", fake_host.root, "sglang")
    shutil.rmtree(fake_host.root / "sglang")
    code = "import sglang\nprint(type(sglang.__loader__).__name__, 'mla_patch.patcher' in sys.modules)"
    assert fake_host.says(code, door=True, path=(str(fake_host.root / "engine.zip"),)) == "zipimporter True"


@pytest.mark.parametrize("where", ["sglang/__init__.py", "sglang/ops.py"], ids=["package", "target"])
def test_apply_restore_and_report_in_the_midst_of_the_import(where: str, fake_host: FakeHost) -> None:
    """From a thread that the engine's own code starts and waits for, which no import lock knows of."""
    as_sglang(fake_host)
    body = (fake_host.root / where).read_text()
    (fake_host.root / where).write_text(
        "import threading, mla_patch\n"
        "def work():\n"
        "    mla_patch.report(); mla_patch.apply(); mla_patch.restore(); mla_patch.apply('ops'); mla_patch.report()\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n" + body
    )
    code = PATIENT + "from sglang.ops import decode\n"
    assert fake_host.says(code + "print(decode(1, 2), state())", door=True) == "ours applied"
    # nobody knew of the module when its import began: its end is seen by a thread that waits for it
    late = "import time\nwhile state() == 'armed': time.sleep(0.01)\nprint(decode(1, 2), state())"
    assert fake_host.says(code + late) == "ours applied"


def test_apply_restore_and_report_while_plugins_load(fake_host: FakeHost) -> None:
    """The main thread imports the engine, and a plugin of ours goes on when another thread has asked for all three."""
    as_sglang(fake_host)
    fake_host.write("gate.py", HALF)
    fake_host.write("slow.py", SLOW)
    fake_host.install("slow", "1.0", "slow = slow")
    code = (
        PATIENT
        + """
import gate
def work():
    assert gate.entered.wait(10)
    mla_patch.report(); mla_patch.apply(); mla_patch.restore(); mla_patch.apply(); mla_patch.report()
    gate.go_on.set()
thread = threading.Thread(target=work)
thread.start()
from sglang.ops import decode
thread.join()
print(decode(1, 2), state())
"""
    )
    assert fake_host.says(code, door=True) == "ours applied"


def test_a_submodule_is_imported_while_its_package_still_is(fake_host: FakeHost) -> None:
    """Whoever waits for the package's lock may not have the one that the package's own imports need."""
    fake_host.write("gate.py", HALF)
    fake_host.write(
        "fakehost/__init__.py", "import gate, time\ngate.entered.set()\ntime.sleep(0.3)\nimport fakehost.more\n"
    )
    code = (
        PATIENT
        + """
import gate
mla_patch.apply()
first = threading.Thread(target=importlib.import_module, args=("fakehost",))
first.start()
assert gate.entered.wait(10)
import fakehost.ops
first.join()
print(fakehost.ops.decode(1, 2), state())
"""
    )
    assert fake_host.says(code) == "ours applied"


def test_an_edit_that_waits_for_another_threads_import(fake_host: FakeHost) -> None:
    """Of one feature's two modules one thread imports one, whose edit imports what the thread of the other imports."""
    fake_host.write("gate.py", HALF)
    fake_host.plug("""
    def edit(module):
        import gate
        gate.entered.set()
        import slow_part
        return lambda: None
    FEATURES = [feature("both", PREFILL, Edit("fakehost.ops", "edit", edit))]
    """)
    fake_host.write(
        "slow_part.py", "import gate, time\nassert gate.entered.wait(10)\ntime.sleep(0.2)\nimport fakehost.more\n"
    )
    code = (
        PATIENT
        + """
mla_patch.apply()
other = threading.Thread(target=importlib.import_module, args=("slow_part",))
other.start()
import fakehost.ops, fakehost.more
other.join()
import time
for _ in range(100):
    if state("both") == "applied": break
    time.sleep(0.02)
print(fakehost.more.prefill(1), state("both"))
"""
    )
    assert fake_host.says(code) == "ours applied"


SLOW_LOOK = """
def edit(module):
    def undo(): pass
    def places():
        import gate, time
        if gate.go_on.is_set():  # a look that takes its time
            gate.entered.set()
            time.sleep(0.3)
        return []
    undo.places = places
    return undo
EDIT = Edit("fakehost.ops", "edit", edit)
"""
LOOKS = (
    PATIENT
    + """
import gate
mla_patch.apply()
import fakehost.ops
gate.go_on.set()
thread = threading.Thread(target=mla_patch.report)
thread.start()
assert gate.entered.wait(10)
gate.go_on.clear()
"""
)


def test_an_import_in_the_midst_of_a_look(fake_host: FakeHost) -> None:
    """Where another thread asks for the state, as the report does, the host's import ends with ours in place."""
    fake_host.write("gate.py", HALF)
    fake_host.plug(SLOW_LOOK + 'FEATURES = [feature("both", PREFILL, EDIT)]')
    code = """
from fakehost.more import prefill
print(prefill(1), state("both"))
thread.join()
print(prefill(1), state("both"))
"""
    assert fake_host.says(LOOKS + code).splitlines() == ["ours applied", "ours applied"]


def test_the_breaker_in_the_midst_of_a_look(fake_host: FakeHost) -> None:
    fake_host.write("gate.py", HALF)
    fake_host.plug(
        SLOW_LOOK
        + """
BROKEN = target("fakehost.ops", "decode", ("q", "kv", "scale"), decode_call, "broken")
FEATURES = [feature("both", BROKEN, EDIT)]
"""
    )
    code = """
print(fakehost.ops.decode(1, 2))
thread.join()
print(state("both"))
"""
    done = fake_host.run(LOOKS + code)
    assert done.stdout.splitlines() == ["host", "failed: decode: RuntimeError('boom')"], done.stderr


def test_a_thread_that_lists_the_features_late(fake_host: FakeHost) -> None:
    """Two threads apply features; the list of the one that began first comes last and lacks the other's."""
    code = """
from mla_patch import startup
mla_patch.apply("ops")
session = startup._published["session"]
early = session.report.features
mla_patch.apply("kernel")
session.report.features = early
states("ops", "kernel")
"""
    assert fake_host.says(code) == "armed armed"


def test_restore_while_an_edit_is_at_work(fake_host: FakeHost) -> None:
    """It returns at once, and the thread with the edit does it next."""
    fake_host.write("gate.py", HALF)
    fake_host.plug("""
    def edit(module):
        import gate
        gate.entered.set()
        assert gate.go_on.wait(10)
        return lambda: print("undone")
    FEATURES = [feature("both", DECODE, Edit("fakehost.ops", "edit", edit))]
    """)
    code = (
        PATIENT
        + """
import gate
mla_patch.apply()
def work():
    assert gate.entered.wait(10)
    mla_patch.restore()
    mla_patch.report()
    gate.go_on.set()
thread = threading.Thread(target=work)
thread.start()
import fakehost.ops
thread.join()
print(fakehost.ops.decode(1, 2), state("both"), left())
"""
    )
    assert fake_host.says(code).splitlines() == ["undone", "host off: restored []"]


def test_two_plugins_that_import_each_other_and_the_engine(fake_host: FakeHost) -> None:
    as_sglang(fake_host)
    fake_host.write("one_plugin.py", "import time\ntime.sleep(0.1)\nimport two_plugin, sglang\n")
    fake_host.write("two_plugin.py", "import time\ntime.sleep(0.1)\nimport one_plugin, sglang\n")
    fake_host.install("one_plugin", "1.0", "one = one_plugin")
    fake_host.install("two_plugin", "1.0", "two = two_plugin")
    code = (
        PATIENT
        + """
names = ["sglang", "one_plugin", "two_plugin", "sglang.ops"]
threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in names]
threads.append(threading.Thread(target=mla_patch.report))
for thread in threads: thread.start()
for thread in threads: thread.join()
import sglang.ops
print(sglang.ops.decode(1, 2), state())
"""
    )
    done = fake_host.run(code, door=True)
    assert (done.stdout, done.returncode) == ("ours applied\n", 0), done.stderr
    # CPython itself breaks such a circle, by an error in one of the threads; that plugin may be left out, with a line
    left_out = [line for line in done.stderr.splitlines() if line.startswith("mla-patch: ")]
    assert all("_DeadlockError" in line or "partially initialized" in line for line in left_out), done.stderr


@pytest.mark.parametrize("kind", ["plugin", "edit"])
def test_a_fork_while_a_thread_wakes(kind: str, fake_host: FakeHost) -> None:
    """What the parent's thread had in hand is not there in the child, and the child waits for none of it."""
    as_sglang(fake_host)
    if kind == "plugin":
        fake_host.write("slow.py", SLOW)
        fake_host.install("slow", "1.0", "slow = slow")
    fake_host.write("gate.py", HALF)
    fake_host.write("fakehost/slow.py", "import gate\ngate.entered.set()\nassert gate.go_on.wait(10)\n")
    fake_host.plug(
        """
    OPS = target("sglang.ops", "decode", ("q", "kv", "scale"), decode_call)
    def edit(module):
        if KIND == "edit":
            import fakehost.slow
        return lambda: None
    FEATURES = [
        feature("ops", OPS, Edit("sglang.ops", "edit", edit), host="sglang>=0.5.1,<0.5.24"),
        feature("fill", PREFILL),
    ]
    """.replace("KIND", repr(kind))
    )
    code = (
        PATIENT
        + """
import gate, os, signal
thread = threading.Thread(target=importlib.import_module, args=("sglang.ops",))
thread.start()
assert gate.entered.wait(10)
child = os.fork()
if not child:
    signal.alarm(10)  # faulthandler's watchdog does not outlive a fork
    mla_patch.report(); mla_patch.restore(); mla_patch.apply("fill")
    import fakehost.more
    states = [row["state"] for row in mla_patch.report()["features"] if row["name"] == "ops"]
    print(fakehost.more.prefill(1), states, flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1], flush=True)
gate.go_on.set()
thread.join()
print(sys.modules["sglang.ops"].decode(1, 2), state())
"""
    )
    child = "ours ['off']" if kind == "edit" else "ours []"  # the engine's features are the thread's to apply
    assert fake_host.says(code, door=True).splitlines() == [child, "0", "ours applied"]


# --- strict


@pytest.mark.parametrize("kind", ["package", "target", "flag"])
def test_strict_ends_the_process_from_a_thread(kind: str, fake_host: FakeHost) -> None:
    as_sglang(fake_host, "0.5.99" if kind == "package" else "0.5.11")
    if kind == "target":
        fake_host.write("sglang/ops.py", "def decode(q, kv, scale=1.0): ...\ndecode = lambda q: 'host'\n")
    env = {"MLA_PATCH_OPS": "onn" if kind == "flag" else "on", "MLA_PATCH_STRICT": "1"}
    code = (
        PATIENT
        + """
import concurrent.futures
sys.stdout.write("said before")
with concurrent.futures.ThreadPoolExecutor() as pool:
    print(pool.submit(importlib.import_module, "sglang.ops").exception())
print("went on")
"""
    )
    done = fake_host.run(code, env, door=True)
    assert (done.stdout, done.returncode) == ("said before", 1)
    assert done.stderr.splitlines()[-1].startswith("mla-patch: ")
    assert "OPS" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("kind", ["package", "target", "flag"])
def test_strict_ends_the_process_whatever_the_importer_catches(kind: str, fake_host: FakeHost) -> None:
    """`except Exception` does not see it; who swallows even SystemExit meets it again at the next import."""
    as_sglang(fake_host, "0.5.99" if kind == "package" else "0.5.11")
    if kind == "target":
        fake_host.write("sglang/ops.py", "def decode(q, kv, scale=1.0): ...\ndecode = lambda q: 'host'\n")
    env = {"MLA_PATCH_OPS": "onn" if kind == "flag" else "on", "MLA_PATCH_STRICT": "1"}
    for caught in ("Exception", "BaseException"):
        code = f"""
        for _ in range(2):
            try:
                import sglang.ops
            except {caught}:
                print("caught")
        import sglang.ops
        print("went on")
        """
        done = fake_host.run(code, env, door=True)
        assert (done.stdout, done.returncode) == ("" if caught == "Exception" else "caught\ncaught\n", 1)
        assert done.stderr.splitlines()[-1].startswith("mla-patch: ")
