"""Processes of a release that start in a tenth of a second: forks of one that has imported what every release imports.

Of the 8 s that the attention backends of a release take to be imported, 6 s go to torch, transformers and the like.
``run`` keeps one process that has imported those, and neither SGLang nor any module of ours; each script runs in a fork
of it. The fork then is what a fresh interpreter would be: environment, arguments, ``sys.path``, working directory,
output, and the start-up file's few lines.

    python tests/hosts/preloaded.py      that process; requests on stdin, answers on stdout, one line of JSON each
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What releases import of others and what takes long; of a package that is not there, a release imports nothing.
MODULES = (
    "triton", "torch._dynamo", "torch._inductor.decomposition", "torch._inductor.ir", "torch._inductor.lowering",
    "torch._inductor.select_algorithm", "torch._functorch.partitioners", "torch.distributed.fsdp",
    "torch.distributed.tensor", "torch.nn.attention.flex_attention", "networkx", "requests", "pydantic",
    "aiohttp", "fastapi", "fastapi.responses", "PIL.Image", "httpx", "openai", "huggingface_hub", "transformers",
    "transformers.models.auto.modeling_auto", "transformers.generation", "transformers.processing_utils",
    "transformers.modeling_utils", "compressed_tensors", "gguf", "xgrammar", "tvm_ffi", "zmq", "orjson",
)  # fmt: skip
# What transformers looks for when it is imported, and finds in a release's process: see `mla_patch.drive`.
STOOD_IN = ("torchvision", "vllm", "IPython", "uvicorn")
LONGEST = 300  # seconds


class _Server:
    """The process that forks, as its client has it."""

    def __init__(self, path: tuple[str, ...]) -> None:
        self.path, self.told_of = path, 0.0
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        env = {name: value for name, value in os.environ.items() if not name.startswith(("MLA_PATCH", "SGLANG_"))}
        env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "1"}
        env |= {"OMP_NUM_THREADS": "1"}  # a pool of threads does not survive a fork
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__))], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log,
        )  # fmt: skip

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            raise RuntimeError(f"the process that forks ended with {self.process.wait()}\n{self.log.read()}")
        return json.loads(answer)

    def told(self, cpu: float) -> None:
        """Until this process has ended, the system does not say what its forks took."""
        self.told_of += cpu

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


_held: list[_Server] = []  # one: tests come in the order of what releases import, and it takes half a gigabyte


def cpu_seconds() -> float:
    """What forks have taken that RUSAGE_CHILDREN does not count yet, because the process that forks still runs."""
    return sum(one.told_of for one in _held)


def run(
    command: Sequence[str], env: Mapping[str, str], cwd: Path, path: tuple[str, ...]
) -> subprocess.CompletedProcess[str]:
    """Run a script with its arguments, as ``subprocess.run([sys.executable, *command])`` would.

    ``path``: the part of PYTHONPATH with what the release imports of others.
    """
    if not _held or _held[0].path != path:
        close()
        _held.append(_Server(path))
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        request = {"command": list(command), "env": dict(env), "cwd": str(cwd), "out": str(out), "err": str(err)}
        answer = _held[0].ask(request)
        _held[0].told(answer["cpu"])
        texts = (one.read_text(encoding="utf-8", errors="replace") for one in (out, err))
        return subprocess.CompletedProcess(list(command), answer["status"], *texts)


@atexit.register
def close() -> None:
    """End the process that forks."""
    while _held:
        _held.pop().close()


def preload() -> None:
    """Import what releases import, and leave nothing of ours and nothing that is stood in for."""
    from mla_patch.drive import sglang as sglang_trial

    finder = sglang_trial.StubFinder([name for name in STOOD_IN if importlib.util.find_spec(name) is None])
    sys.meta_path.insert(0, finder)
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    sys.meta_path.remove(finder)
    gone = {"mla_patch", *finder.names}
    for name in [name for name in sys.modules if name.partition(".")[0] in gone]:
        del sys.modules[name]


def become(request: dict[str, Any]) -> None:
    """Be a fresh process that runs a script."""
    signal.alarm(LONGEST)
    for number, name, mode in ((0, os.devnull, "r"), (1, request["out"], "w"), (2, request["err"], "w")):
        with open(name, mode) as file:
            os.dup2(file.fileno(), number)
    before = len(os.environ["PYTHONPATH"].split(os.pathsep))
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    script = Path(request["command"][0])
    sys.path[:before] = [str(script.parent), *os.environ["PYTHONPATH"].split(os.pathsep)]
    sys.argv = request["command"]
    importlib.invalidate_caches()
    if os.environ.get("MLA_PATCH"):  # the start-up file
        from mla_patch import _autostart

        _autostart.run()
    runpy.run_path(str(script), run_name="__main__")


def status_of(request: dict[str, Any]) -> int:
    """Run the script; the status that Python would end with."""
    try:
        become(request)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    sys.path.pop(0)  # this folder: nothing that is imported must find our modules by their plain names
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what is imported may print
    preload()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.close()
            status = status_of(request)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, ended, used = os.wait4(child, 0)
        answer = {"status": os.waitstatus_to_exitcode(ended), "cpu": used.ru_utime + used.ru_stime}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
