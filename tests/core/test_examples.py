"""What examples/ tells people to type does what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_engine import ByKey, BySize, tapes
from scratch import ROOT, clean_env
from test_experiment_live import Running

from mla_patch.experiment.schedule import Sampling
from mla_patch.hooks.sglang import decode as sglang_decode

CPU_SECONDS = 60  # see budget.py

__all__ = ["tapes"]  # a fixture

EXAMPLES = ROOT / "examples"

# /generate as SGLang answers it; with the plugin on, the fourth token is another one
SERVER = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import sglang

PATCHED = os.environ.get("MLA_PATCH") == "1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        params, prompts = body["sampling_params"], body["input_ids"]
        assert self.path == "/generate" and params["temperature"] == 0 and params["ignore_eos"]
        count = params["max_new_tokens"]
        self.send_response(200)
        self.end_headers()
        if body.get("stream"):
            for n in range(1, count + 1):
                time.sleep(0.002 if PATCHED else 0.02)
                self.wfile.write(b"data: " + json.dumps({"meta_info": {"completion_tokens": n}}).encode() + b"\\n\\n")
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\\n\\n")
        else:
            assert body["return_logprob"] and all(len(prompt) == len(prompts[0]) for prompt in prompts)
            rows = [[-1.0 - 0.01 * PATCHED, 9 if PATCHED and i == 3 else sum(prompts[0]) % 100 + i, None]
                    for i in range(count)]
            answers = [{"meta_info": {"output_token_logprobs": rows}} for _ in prompts]
            self.wfile.write(json.dumps(answers).encode())

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    assert sys.argv[sys.argv.index("--model-path") + 1] == "model" and "fp8_e4m3" in sys.argv
    assert sys.argv[sys.argv.index("--attention-backend") + 1] == "triton"
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path: Path) -> dict[str, str | None]:
    """A stand-in for SGLang on the path; the environment for a script that starts it."""
    package = tmp_path / "site" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "launch_server.py").write_text(SERVER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(package.parent), str(ROOT)])
    return clean_env({"PYTHONPATH": path, "PORT": str(port), "PYTHON": sys.executable, "OUT": str(tmp_path / "out")})


def test_real_engine(server: dict[str, str], tmp_path: Path) -> None:
    command = ["bash", str(EXAMPLES / "real_engine.sh"), "model", "--kv-cache-dtype", "fp8_e4m3"]
    more = {"TOKENS": "40", "NEW": "12", "REQUESTS": "2"}
    done = subprocess.run(command, env=server | more, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("time per output token: ")
    changed = [line for line in lines if line.startswith("request ")]
    assert [line.partition(": ")[2].partition(", was ")[0] for line in changed] == [
        "the first 3 tokens are equal, their log-probs 0.0100 apart on average; the next is 9 (-1.0100)"
    ] * 2
    told = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("host", "patched")}
    assert told["host"]["ms"] >= 20 > told["patched"]["ms"] >= 2
    assert f"time per output token: {told['patched']['ms']} ms, was {told['host']['ms']} ms" in lines
    assert "decode" in done.stdout.partition("was ")[2]  # the report of the server's process
    (report,) = (tmp_path / "out" / "report").glob("sglang-*.json")
    assert json.loads(report.read_text())["features"]


def test_real_engine_tells_why_a_server_did_not_start(server: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "site" / "sglang" / "launch_server.py").write_text("raise SystemExit('no GPU here')")
    command = ["bash", str(EXAMPLES / "real_engine.sh"), "model"]
    done = subprocess.run(command, env=server, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no GPU here" in done.stderr and "did not start" in done.stderr
    usage = subprocess.run(command[:2], env=server, capture_output=True, text=True, timeout=60)
    assert usage.returncode == 2 and "real_engine.sh MODEL" in usage.stdout


def test_answers_to_other_questions_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"asked": [1, 2, 3], "ms": 1.0, "outputs": []}))
    command = [sys.executable, str(EXAMPLES / "ask.py"), "http://127.0.0.1:9", "--against", "old.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 2
        and "has answers for [1, 2, 3] (tokens, new, requests), not for [8192, 64, 1]" in done.stderr
    )


def test_the_same_answers_are_said_to_be() -> None:
    ask = load(EXAMPLES / "ask.py")
    answer = {"ms": 1.0, "outputs": [[[-0.5, 7], [-0.25, 8]]]}
    other = {"ms": 2.0, "outputs": [[[-0.25, 7], [-0.25, 8]]]}
    assert list(ask.compare(answer, other)) == [
        "request 0: the first 2 tokens are equal, their log-probs 0.1250 apart on average",
        "time per output token: 2.0 ms, was 1.0 ms",
    ]


@pytest.mark.parametrize("cache", ["fp16", "e4m3", "e5m2"])
def test_decode(cache: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "decode.py"), "--cache", cache, "--lengths", "70,1"]
    env = clean_env({"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)})
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    head, _, error = done.stdout.strip().rpartition(" ")
    assert head == f"2 requests, 16 heads, {cache} cache: relative error" and float(error) < 4e-3


def test_decode_refuses_what_the_interpreter_has_wrong(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "decode.py"), "--cache", "bf16"]
    env = clean_env({"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)})
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "bf16 needs a GPU" in done.stderr


def test_the_page_of_the_tokenspeed_backend_shows_the_example_as_it_is() -> None:
    page = (ROOT / "docs" / "tokenspeed.md").read_text()
    assert f"```python\n{(EXAMPLES / 'mla_kernels' / 'mla_kernels.py').read_text()}```\n" in page


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("runner", [None, BySize, ByKey])
def test_the_wrong_arm_is_stopped_at_the_first_check(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a fake engine, whose decode stands in for ours."""
    monkeypatch.setattr(sglang_decode, "serve", lambda call: call.out.copy_(call.q * 2))
    folder = EXAMPLES / "own_arm"
    code = load(folder / "own_arm_code.py")
    (arm,) = load(folder / "own_arm.py").mla_patch_arms()
    assert (arm.name, arm.feature, arm.serve) == ("wrong", "decode@sglang", "own_arm_code:serve")
    one = Running(
        tmp_path, "ab+shadow", "block=2,warmup=0,arms=host+wrong", "every=8", runner, error=0.05, wrong=code.serve
    )
    try:
        found = one.run(40)
    finally:
        one.live.close()
        for undo in one.undo:
            undo()
    first = next(step for step in range(1, 41) if Sampling(8).due(step))
    ((reason, _),) = one.engine.stops
    assert reason == f"shadow check at step {first}, layer 0: error 0.05, tolerance 0.02"
    # the wrong arm has run before, and not since
    assert "patch" in found[: first - 1] and set(found[first:]) == {"host"}
