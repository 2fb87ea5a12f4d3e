"""Any input: one line and the documented status, no traceback, no hang, no control character of somebody else's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scratch import clean_env

from mla_patch import plugins
from mla_patch.cli import child
from mla_patch.cli import main as cli
from mla_patch.compat import gpu

DOCUMENTED = {cli.OK, cli.FINDING, cli.MISUSE}
TEXTS = ["", " ", "[/on]", "\x1b[2J\x07", "\udcff\udcfe", "a\nb", "../..", "x" * 10_000, "{}", "%s{0}", "-1", "é"]
WRONG = [None, True, 3, 10**400, -1, 1.5, "x", [], {}, [[]], [{}], {"a": {}}, [None], "\x1b[2J"]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "from_nvml", lambda: None)
    monkeypatch.setattr(gpu, "from_torch", lambda: None)
    monkeypatch.chdir(tmp_path)


def good() -> dict[str, Any]:
    row = {
        "name": "decode", "host": "sglang", "flag": "MLA_PATCH_DECODE", "value": "on", "source": "environment",
        "state": "applied", "reason": "", "targets": [{"kind": "call"}], "served": 3, "declined": {"mask": 2},
        "captured": 1, "replayed": None,
    }  # fmt: skip
    return {
        "engine": "sglang", "pid": 10, "argv": ["python"], "started": 1.0, "problems": [], "features": [row],
        "compiled": {"before": 1, "serving": 0},
    }  # fmt: skip


def broken() -> Iterator[tuple[str, bytes]]:
    """Files in a report's place, each by what is wrong with it."""
    for key in good():
        yield f"no {key}", json.dumps({k: v for k, v in good().items() if k != key}).encode()
        for value in WRONG:
            yield f"{key}={value!r:.20}", json.dumps(good() | {key: value}).encode()
    (row,) = good()["features"]
    for key in row:
        yield (
            f"no features.{key}",
            json.dumps(good() | {"features": [{k: v for k, v in row.items() if k != key}]}).encode(),
        )
        for value in WRONG:
            yield f"features.{key}={value!r:.20}", json.dumps(good() | {"features": [row | {key: value}]}).encode()
    for text in TEXTS:
        told = row | {"name": text, "host": text, "state": text, "reason": text, "declined": {text: 1}, "flag": text}
        yield (
            f"text {text!r:.20}",
            json.dumps(good() | {"engine": text, "features": [told], "problems": [text]}).encode(),
        )
    yield "nan", json.dumps(good() | {"started": float("nan"), "x": float("inf")}).encode()
    yield "deep", b"[" * 200_000
    yield "empty", b""
    yield "bytes", bytes(range(256))
    yield "digits", b"9" * 10_000


def call(argv: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """Run one command; what it returns is documented, and what it prints is text."""
    capsys.readouterr()
    try:
        status = cli.main(argv)
    except SystemExit as end:  # argparse's own
        status = end.code if isinstance(end.code, int) else -1
    out, err = capsys.readouterr()
    assert status in DOCUMENTED, (argv, status, err)
    assert "Traceback" not in out + err, (argv, err)
    assert not {c for c in out + err if c != "\n" and not c.isprintable()}, (argv, out, err)
    if "--json" in argv and status != cli.MISUSE:
        json.loads(out)
    assert (status == cli.MISUSE) == bool(err), (argv, status, err)
    return status


def test_reports_with_anything_in_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {}
    for at, (what, content) in enumerate(broken()):
        names[f"sglang-host-{at}-1.json"] = what
        (tmp_path / f"sglang-host-{at}-1.json").write_bytes(content)
    for form in ([], ["--json"], ["--all"], ["--prune"]):
        assert call(["status", str(tmp_path), *form], capsys) == cli.FINDING
    for more in (["report"], ["watch", "--once"], ["stop"]):
        assert call(["ab", more[0], str(tmp_path), *more[1:]], capsys) == cli.MISUSE  # there is no experiment
    assert cli.main(["status", str(tmp_path), "--json"]) == cli.FINDING
    told = json.loads(capsys.readouterr().out)
    refused = {names[one["file"]] for one in told["missing"]}
    assert len(told["processes"]) + len(refused) == len(names)
    assert {"deep", "digits", "no pid", "features=None", "features.served='x'", "features.declined=[]"} <= refused
    assert not refused & {"problems=[]", "no compiled", "no features.replayed", "features.state='x'"}


def test_an_odd_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    odd = tmp_path / "odd"
    odd.mkdir()
    for name in (b"\xff\xfe.json", b"\x1b[2J.json", b"[bold].json", b"a.control", b"a.steps.jsonl", b"\xff.control"):
        Path(os.fsdecode(os.fsencode(odd) + b"/" + name)).write_bytes(b"{")
    (odd / "folder.json").mkdir()
    (odd / "folder.control").mkdir()
    (odd / "nowhere.json").symlink_to("nothing")
    (odd / "circle.json").symlink_to("circle.json")
    (odd / "nowhere.control").symlink_to("nothing")
    for where in (odd, tmp_path, tmp_path / "file", tmp_path / "none", Path("/proc/self/mem"), Path(os.devnull)):
        for argv in (["status"], ["ab", "report"], ["ab", "watch", "--once"], ["ab", "stop"], ["ab", "start"]):
            for form in ([], ["--json"]):
                call([*argv, str(where), *form], capsys)
        call(["ab", "set", str(where), "decode", "arm=host"], capsys)
        call(["ab", "report", str(where), "--html", str(where)], capsys)


def test_arguments(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(version: str) -> list[Path]:
        raise RuntimeError(f"pip could not fetch sglang=={version}:\nthis\nand that\nERROR: no such version\n")

    monkeypatch.setattr(child.sglang_fetch, "fetch", fetch)
    for text in [*TEXTS, "latest", "0.5", "1" * 5000]:
        for argv in (
            [text], ["doctor", "-f", text], ["doctor", "-f", f"{text}={text}"], ["doctor", "-f", f"decode={text}"],
            ["list", text], ["explain", text], ["explain", "decode", "--release", text, "--sm", "90"],
            ["explain", "decode", "--release", "0.5.18", "--sm", text], ["explain", "decode", "--heads", text],
            ["status", text], ["run", "-f", text, "--", "true"], ["run", "--", text], ["run", "--json", "--", text],
            ["warmup", "--heads", text], ["warmup", "--cache", text], ["bench", text],
            ["bench", "decode", "--heads", text],
            ["bench", "decode", "--fetch", text], ["demo", "--fetch", text], ["demo", "--fetch=" + text],
            ["ab", text], ["ab", "set", ".", text, text], ["ab", "set", ".", "decode", f"ratio={text}"],
            ["ab", "set", ".", "decode", f"arm={text}"], ["ab", "watch", ".", "--once", "--every", text],
            ["ab", "report", ".", "--run", text], ["ab", "stop", text], ["ab", "report", text, "--html", text],
        ):  # fmt: skip
            call(argv, capsys)


def test_a_release_is_fetched_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other spellings of it named another folder of the cache, and got what the oldest release needs."""
    monkeypatch.setattr(child.sglang_fetch, "fetch", lambda version: [Path(version)])
    spelled = ["0.5.18", "v0.5.18", " 0.5.18\n", "0.5.18RC1", "0.5.12-1"]
    fetched = [child.fetched("demo", text) for text in spelled]
    assert fetched == [["0.5.18"], ["0.5.18"], ["0.5.18"], ["0.5.18rc1"], ["0.5.12.post1"]]


def test_the_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["MLA_PATCH", "MLA_PATCH_DECODE", "MLA_PATCH_REPORT", "MLA_PATCH_AB", "MLA_PATCH_STRICT", "MLA_PATCH_[/x]"]
    names += ["SGLANG_PLUGINS", "PYTHONPATH", "MLA_PATCH_SHADOW", "MLA_PATCH_TOKENSPEED_DECODE", "MLA_PATCH_\x1b[2J"]
    for text in TEXTS:
        for name in names:
            monkeypatch.setenv(name, text)
        for argv in (["doctor"], ["doctor", "--json"], ["explain", "decode"]):
            call(argv, capsys)


def test_an_error_of_ours_is_one_line_and_3(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for problem in (KeyError("\x1bx"), RecursionError(), SystemExit(1), OSError(28, "No space left"), MemoryError()):
        monkeypatch.setattr(plugins, "load", lambda problem=problem: (_ for _ in ()).throw(problem))
        assert cli.main(["list"]) == cli.ERROR
        out, err = capsys.readouterr()
        assert err.startswith("mla-patch: list: ") and "Traceback" not in err and "\x1b" not in err and not out
    monkeypatch.setattr(plugins, "load", lambda: 1 / 0)
    assert cli.main(["--traceback", "list"]) == cli.ERROR
    assert "ZeroDivisionError" in (err := capsys.readouterr().err) and "Traceback" in err


def shell(command: str, **environ: str) -> tuple[int, str]:
    """The command's status, 'mla-patch' in it being this one, and stderr."""
    command = f'mla-patch() {{ "{sys.executable}" -m mla_patch "$@"; }}; {command}'
    done = subprocess.run(
        ["bash", "-c", command], env=clean_env(environ), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        ("mla-patch list >&-", 0, ""),
        ("mla-patch list >&- 2>&- <&-", 0, ""),
        ("mla-patch status . 2>&-", 1, ""),
        ("set -o pipefail; { mla-patch list; echo $? >&2; } | true", 0, "0\n"),
        ("set -o pipefail; { mla-patch --help; echo $? >&2; } | true", 0, "0\n"),
        ("mla-patch list >/dev/full", 3, "mla-patch: list: [Errno 28] No space left on device\n"),
        ("PYTHONIOENCODING=ascii mla-patch status .", 1, ""),
    ],
    ids=["no stdout", "no streams", "no stderr", "closed pipe", "help into a closed pipe", "full disk", "ASCII"],
)
def test_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, status: int, says: str) -> None:
    report = good()
    report["features"][0] |= {"reason": "é × 5", "state": "failed"}
    (tmp_path / "sglang-host-10-1.json").write_text(json.dumps(report))
    assert shell(f"cd {tmp_path}; {command}") == (status, says)


def test_ctrl_c_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "sglang-host-10-1.json").write_text(json.dumps(good()))
    code = (
        "import sys, time\nfrom mla_patch.cli import main as cli; from mla_patch import survey\n"
        "def wait(directory):\n    print('in', flush=True)\n    time.sleep(60)\n"
        "survey.survey = wait\nsys.exit(cli.main(['status', '.']))"
    )
    # a shell starts what it puts into the background with SIGINT ignored, and children inherit that
    command = ["env", "--default-signal=INT", sys.executable, "-c", code]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, env=clean_env({}), cwd=tmp_path, stdout=pipe, stderr=pipe)
    assert child.stdout is not None and child.stdout.readline() == b"in\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    assert (child.communicate(timeout=30), child.returncode) == ((b"", b""), 130)
