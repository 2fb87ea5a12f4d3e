"""``mla-patch bench``: right before fast, in an interpreter of its own, on any machine."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scratch import clean_env

from mla_patch import session
from mla_patch.cli import bench as command
from mla_patch.cli import child
from mla_patch.cli import main as cli
from mla_patch.compat import gpu
from mla_patch.compat.triton import interpreted
from mla_patch.compat.types import Gpu
from mla_patch.drive import bench
from mla_patch.drive import sglang as trial
from mla_patch.stand_ins import KernelStandIn

CPU_SECONDS = 60  # see budget.py

in_the_interpreter = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
KEYS = {"kernel", "device", "host", "floor_us", "copy_gbps", "cases", "right", "notes", "findings"}


def result(**options: Any) -> dict[str, Any]:
    """What the child tells last, without a child."""
    *steps, last = bench.run(**options)
    assert steps[0]["step"] == "importing the engine"
    assert json.loads(json.dumps(last["result"])) == last["result"]
    return last["result"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "from_torch", lambda: None)


@pytest.mark.parametrize("kernel", ["decode", "page-table", "token-indices"])
def test_without_an_engine_and_a_gpu(kernel: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mla_patch", "bench", kernel, "--json"]
    env = clean_env({"CUDA_VISIBLE_DEVICES": "", "MLA_PATCH": "1"})
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told) == KEYS
    assert (told["kernel"], told["host"], told["copy_gbps"], told["right"]) == (kernel, None, None, True)
    assert told["notes"] == [
        "no engine is installed, so only our kernel is measured",
        "there is no GPU: the kernels run in Triton's interpreter, and their times mean nothing",
    ]
    assert told["floor_us"] > 0 and len(told["cases"]) == (2 if kernel == "decode" else 1)
    for case in told["cases"]:
        verdict = case["error" if kernel == "decode" else "equal"]
        assert verdict["host"] is None and (0 < verdict["ours"] < 4e-3 if kernel == "decode" else verdict["ours"])
        assert case["us"]["host"] is None and case["us"]["ours"] > 0 and case["bytes"] > 0
        assert case["gbps"] is case["of_copy"] is None  # of the interpreter


@pytest.mark.gpu
@pytest.mark.cost
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kernel", ["decode", "page-table", "token-indices"])
def test_on_a_gpu(kernel: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mla_patch", "bench", kernel, "--json", "--batch", "16", "--length", "16384"]
    env = clean_env({"TRITON_INTERPRET": None})
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["device"] == torch.cuda.get_device_name() and 0.5 < told["floor_us"] < 20
    assert told["copy_gbps"] > 100 and len(told["cases"]) == (4 if kernel == "decode" else 1)
    for case in told["cases"]:
        # an empty launch is part of it, and no cache is infinitely fast
        assert case["right"] and case["us"]["ours"] > 0.8 * told["floor_us"] and 0 < case["of_copy"] < 20


@in_the_interpreter
def test_the_bytes_that_must_move() -> None:
    (case,) = result(kernel="token-indices", batch=[2], length=[100])["cases"]
    assert case["bytes"] == (100 + 100 - 37) * (4 + 8)
    (case,) = result(kernel="page-table", batch=[1], length=[100])["cases"]
    assert case["bytes"] == 2 * (4 + 4)
    (case,) = result(kernel="decode", batch=[2], length=[40], heads=[5], dtype=["e4m3"])["cases"]
    assert case["bytes"] == 80 * (576 + 8) + 2 * 5 * (576 + 512) * 2
    assert case["case"] == "2 x 40, 5 heads, e4m3"


@in_the_interpreter
def test_what_is_asked_is_measured() -> None:
    told = result(kernel="decode", batch=[1, 2], length=[33], heads=[2], dtype=["fp16", "e5m2"])
    assert [case["case"] for case in told["cases"]] == [
        f"{n} x 33, 2 heads, {t}" for n in (1, 2) for t in ("fp16", "e5m2")
    ]
    assert told["right"]


@in_the_interpreter
def test_ours_wrong_has_no_time_and_is_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = bench.kv_indices.build_token_indices

    def wrong(*args: Any) -> torch.Tensor:
        out = right(*args)
        out[-1] = 7  # past the last request's end
        return out

    monkeypatch.setattr(bench.kv_indices, "build_token_indices", wrong)
    told = result(kernel="token-indices")
    assert (told["right"], told["cases"][0]["equal"]["ours"], told["cases"][0]["us"]["ours"]) == (False, False, None)
    monkeypatch.setattr(command, "run_child", lambda *args: told)
    assert cli.main(["bench", "token-indices"]) == 1
    assert "NOT right" in capsys.readouterr().out


@in_the_interpreter
@pytest.mark.parametrize(("factor", "right"), [(1.003, True), (1.005, False), (torch.nan, False)])
def test_decode_is_held_to_its_error(factor: float, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = bench.decode_.mla_decode
    monkeypatch.setattr(bench.decode_, "mla_decode", lambda *args, **kwargs: decode(*args, **kwargs).mul_(factor))
    told = result(kernel="decode", heads=[2], length=[40], dtype=["fp16"])
    assert (told["right"], told["cases"][0]["us"]["ours"] is not None) == (right, right)
    assert ("1 x 40, 2 heads, fp16: ours is not finite everywhere" in told["notes"]) == (factor != factor)


@in_the_interpreter
def test_ours_failing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no launch")

    monkeypatch.setattr(bench.kv_indices, "build_page_table", fail)
    told = result(kernel="page-table")
    assert (told["right"], told["cases"][0]["equal"]["ours"]) == (False, None)
    assert "3 x 97: ours failed: RuntimeError('no launch')" in told["notes"]


@in_the_interpreter
def test_too_little_memory_leaves_a_case_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(bench.kv_indices, "build_page_table", full)
    told = result(kernel="page-table")
    assert (told["right"], told["cases"]) == (False, [])
    assert "3 x 97: left out, because it needs more memory than this device has free" in told["notes"]


# the host's side; tests/hosts has real releases


UNMEASURED = "nothing to compare with in every case: the engine's own kernel did not run, as the notes say"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "find_host", lambda name: SimpleNamespace(version="0.5.11"))
    monkeypatch.setattr(trial, "prepare", lambda: ["sgl_kernel"])


@in_the_interpreter
def test_an_engine_that_cannot_be_imported_leaves_ours(engine: None) -> None:
    told = result(kernel="decode", heads=[2], dtype=["fp16"])
    assert (told["host"], told["right"], told["cases"][0]["us"]["host"]) == ("SGLang 0.5.11", True, None)
    assert told["notes"][0] == "replaced by stand-ins, because this machine lacks them: sgl_kernel"
    assert told["notes"][1].startswith("the engine's own kernel cannot be imported here: ModuleNotFoundError")
    assert told["findings"] == [UNMEASURED]


@in_the_interpreter
@pytest.mark.parametrize("fault", [None, "wrong", "fails"])
def test_the_hosts_own_beside_ours(fault: str | None, engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is wrong is told, and timed; it is not our finding."""

    def decode_launch(host: Any, q: Any, kv: Any, out: Any, indptr: Any, ids: Any, lens: Any, scale: float) -> Any:
        assert host == "theirs"
        if fault == "fails":
            raise AssertionError("no such split")
        want = bench.decode_.mla_decode_ref(q, kv, indptr, ids, sm_scale=scale)
        return lambda: out.copy_(want * (1.5 if fault == "wrong" else 1.0))

    monkeypatch.setattr(trial, "imported", lambda what: "theirs")
    monkeypatch.setattr(trial, "decode_launch", decode_launch)
    told = result(kernel="decode", heads=[2], length=[40], dtype=["e4m3"])
    (case,) = told["cases"]
    assert told["right"] and case["us"]["ours"] > 0
    if fault == "fails":
        assert case["error"]["host"] is case["us"]["host"] is None
        assert "1 x 40, 2 heads, e4m3: host failed: AssertionError('no such split')" in told["notes"]
        assert told["findings"] == [UNMEASURED]
    else:
        assert told["findings"] == []
        assert case["us"]["host"] > 0
        assert case["error"]["host"] == pytest.approx(0.5 if fault else 0, abs=1e-3)


@in_the_interpreter
def test_a_release_that_was_not_reviewed_is_a_finding(engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "find_host", lambda name: SimpleNamespace(version="0.4.6"))
    told = result(kernel="page-table")
    assert told["findings"] == [
        "SGLang 0.4.6 is outside >=0.5.1,<0.5.24, for which kv_indices was reviewed", UNMEASURED,
    ]  # fmt: skip


def test_a_patched_host_is_asked_for_its_own(engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        pass

    monkeypatch.setattr(trial, "builder", lambda name, version: KernelStandIn(Kernel(), SimpleNamespace()))
    own, _ = bench._host_kernel("page-table", "0.5.11")
    assert type(own) is Kernel


# the command


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["page-table", "--heads", "16"], "--heads is for decode"),
        (["token-indices", "--dtype", "e4m3"], "--dtype is for decode"),
        (["decode", "--dtype", "bf16"], "the engine's kernel multiplies bf16 wrongly; expected fp16"),
        (["decode", "--heads", "129"], "'129', expected a number from 1 to 128"),
        (["decode", "--length", "-3"], "expected"),
        (["decode", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["merge"], "invalid choice: 'merge'"),
    ],
)
def test_misuse_is_2(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = cli.main(["bench", *argv])
    except SystemExit as ended:
        status = ended.code
    assert (status, says in capsys.readouterr().err) == (2, True)


def test_the_child_gets_what_was_asked_and_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setenv("MLA_PATCH", "1")
    monkeypatch.setenv("MLA_PATCH_STRICT", "1")
    monkeypatch.setattr(gpu, "from_torch", lambda: Gpu("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(command, "run_child", lambda *args: seen.extend(args))
    assert cli.main(["bench", "decode", "--heads", "8", "64", "--dtype", "bf16", "--batch", "2", "--length", "9"]) == 1
    name, (options,), environ, _ = seen
    assert (name, json.loads(options)) == (
        "bench",
        {"kernel": "decode", "heads": [8, 64], "batch": [2], "length": [9], "dtype": ["bf16"]},
    )
    assert "MLA_PATCH" not in environ and environ["MLA_PATCH_STRICT"] == "1"


def test_a_child_that_dies_is_a_finding(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert cli.main(["bench", "decode"]) == 1
    assert capfd.readouterr().err == "mla-patch: bench: its interpreter ended with status 1\n"


def test_of_a_childs_traceback_the_last_line_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = tmp_path / "python"
    child.write_text("#!/bin/sh\nprintf 'Traceback\\n  in it\\nOSError: \\033[2J it broke\\n' >&2\nexit 3\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    assert cli.main(["bench", "decode"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "mla-patch: OSError: \\x1b[2J it broke" and len(lines) == 2
    assert "bench: its interpreter ended with status 3; `mla-patch --traceback bench ...` shows all" in lines[1]
    assert cli.main(["--traceback", "bench", "decode"]) == 1
    assert capsys.readouterr().err.splitlines()[:2] == ["mla-patch: Traceback", "mla-patch:   in it"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["demo", "--fetch", "latest"], "demo: --fetch latest: "),
        (["demo", "--fetch", "0.4.6"], "demo: --fetch 0.4.6: decode is for SGLang >=0.5.1,<0.5.24"),
        (["bench", "decode", "--fetch", "latest"], "--fetch latest: expected a release of SGLang, such as 0.5.23"),
        (["bench", "decode", "--fetch", "0.5.99"], "--fetch 0.5.99: pip could not fetch it: ERROR: No matching"),
    ],
)
def test_a_release_that_cannot_be_fetched_is_misuse(
    argv: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(version: str) -> list[Path]:
        raise RuntimeError("pip could not fetch it:\nERROR: Could not find\nERROR: No matching distribution")

    monkeypatch.setattr(child.sglang_fetch, "fetch", fetch)
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1


def test_what_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = {"case": "1 x 8192, 16 heads, e4m3", "bytes": 5_000_000, "us": {"host": 60.0, "ours": 20.0},
            "error": {"host": 0.037, "ours": 0.0016}, "gbps": 250.0, "of_copy": 0.0625, "right": True}  # fmt: skip
    told = {"kernel": "decode", "device": "NVIDIA H200", "host": "SGLang 0.5.23", "floor_us": 2.1, "copy_gbps": 4000.0,
            "cases": [case], "right": True, "notes": ["a note"], "findings": []}  # fmt: skip
    monkeypatch.setattr(command, "run_child", lambda *args: told)
    assert cli.main(["bench", "decode"]) == 0
    shown = capsys.readouterr().out
    for text in ("SGLang 0.5.23", "3.00x", "6%", "0.037", "0.0016", "250.0", "2.1 us", "4000.0 GB/s", "a note"):
        assert text in shown, text
    told["findings"] = ["it is old"]
    assert cli.main(["bench", "decode"]) == 1
    assert "finding: it is old" in capsys.readouterr().out
