"""A last call: once a process ends normally it comes, in each kind of child too, and it can do no harm."""

import pytest
from conftest import RunPython

START = """
import multiprocessing, os, sys, threading, time
from mla_patch.at_exit import AtExit

def last():
    os.write(1, f"{os.getpid() == main} {name}\\n".encode())

main, name = os.getpid(), "last"
"""


@pytest.mark.parametrize(
    "code, says",
    [
        ("one = AtExit(last)", ["True last"]),
        ("one = AtExit(last)\nsys.exit(0)", ["True last"]),
        ("one = AtExit(last)\ndef work(): global name; time.sleep(0.2); name = 'after'\n"
         "threading.Thread(target=work).start()", ["True after"]),
        ("one = AtExit(last)\none.cancel()", []),
        ("one = AtExit(last)\nos._exit(0)", []),
        ("one = AtExit(last)\nif os.fork(): os.wait()\nelse: sys.exit(0)", ["True last"]),
        ("one = AtExit(last)\nif os.fork(): os.wait()\nelse: two = AtExit(last); sys.exit(0)",
         ["False last", "True last"]),
        ("def bad(): raise RuntimeError('boom')\none = AtExit(bad)\ntwo = AtExit(last)", ["True last"]),
    ],
    ids=["end", "exit", "a thread still runs", "cancelled", "os._exit", "a fork", "a fork with its own", "it raises"],
)  # fmt: skip
def test_it_is_called_in_its_own_process(code: str, says: list[str], run_python: RunPython) -> None:
    start = START.replace("multiprocessing, ", "")
    done = run_python(f"{start}{code}\nassert 'multiprocessing' not in sys.modules")
    assert (done.stdout.splitlines(), done.stderr, done.returncode) == (says, "", 0)


CHILDREN = """
def work():
    global name, kept
    name = "child"
    kept = AtExit(last)

if __name__ == "__main__":
    one = AtExit(last)
    child = multiprocessing.get_context(sys.argv[1]).Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 0
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing(method: str, run_python: RunPython, tmp_path) -> None:
    """Those that are forked end by os._exit: atexit knows nothing of them."""
    (tmp_path / "program.py").write_text(START + CHILDREN)
    start = "import runpy, sys; sys.argv = ['program.py', {!r}]; runpy.run_path('program.py', run_name='__main__')"
    done = run_python(start.format(method))
    assert done.stderr == ""
    child = "False child" if method == "fork" else "True child"  # the others import the program anew
    assert sorted(set(done.stdout.splitlines())) == [child, "True last"]
