"""The command line on a machine without an engine, and with a made-up SGLang beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scratch import Scratch, clean_env

from mla_patch import plugins
from mla_patch.cli import explain
from mla_patch.cli import main as cli
from mla_patch.cli import run as run_command
from mla_patch.compat import gpu
from mla_patch.hooks.sglang.decode_backends import SIXTEEN_BITS

TABLE = ("req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr, "
         "req_to_token_ptr_stride, kv_indices_ptr_stride, PAGED_SIZE=64")  # fmt: skip
IDS = ("req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_indptr, kv_start_idx, kv_indices_ptr, "
       "req_to_token_ptr_stride")  # fmt: skip


ALL_FLAGS = [feature.flag for feature in plugins.load().features]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "from_nvml", lambda: None)
    monkeypatch.setattr(gpu, "from_torch", lambda: None)


def with_steps(where: Path) -> None:
    """The modules that tell an experiment of steps and graphs."""
    home = where / "sglang" / "srt" / "model_executor"
    home.mkdir(parents=True)
    for name in ("model_runner", "cuda_graph_runner"):
        (home / f"{name}.py").touch()


def fake_sglang(where: Path, version: str | None = "0.5.11", table: str = TABLE, told: str = "") -> Path:
    """A package that has SGLang's shape as far as the judge reads it, and fails on import."""
    home = where / "sglang" / "srt" / "layers" / "attention"
    home.mkdir(parents=True)
    (where / "sglang" / "__init__.py").write_text("raise RuntimeError('the command line must not import a host')\n")
    (where / "sglang" / "version.py").write_text(f"__version__ = {told!r}\n")
    (home / "utils.py").write_text(
        f"def create_flashmla_kv_indices_triton({table}): ...\ndef create_flashinfer_kv_indices_triton({IDS}): ...\n"
    )
    if version is not None:
        info = where / f"sglang-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    return where


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Any]:
    status = cli.main([*argv, "--json"])
    return status, json.loads(capsys.readouterr().out)


def row_of(report: dict[str, Any], name: str = "kv_indices") -> dict[str, Any]:
    (row,) = [row for row in report["features"] if row["name"] == name]
    return row


def test_no_engine_is_no_finding(capsys):
    status, report = run(capsys, "doctor")
    assert (status, report["hosts"], report["findings"], report["gpu"]) == (0, [], [], None)
    assert report["gpu_unknown"] == ""
    keys = {"version", "python", "torch", "triton", "gpu", "gpu_unknown", "hosts", "findings", "notes", "features"}
    assert set(report) == keys
    feature = row_of(report)
    assert {row["state"] for row in report["features"]} == {"absent"}
    assert (feature["name"], feature["host"], feature["state"]) == ("kv_indices", "sglang", "absent")
    assert set(feature) == {"name", "host", "flag", "value", "source", "state", "reason", "targets"}


def test_doctor_judges_an_installed_engine_without_importing_it(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(fake_sglang(tmp_path)))
    status, report = run(capsys, "doctor")
    assert (status, report["hosts"]) == (0, [{"name": "sglang", "version": "0.5.11", "reviewed": True}])
    feature = row_of(report)
    assert feature["state"] == "armed"
    assert {(t["name"], t["kind"], t["replaced_by"]) for t in feature["targets"]} == {
        ("create_flashmla_kv_indices_triton", "kernel", "mla_patch.hooks.sglang.kv_indices:serve_page_table"),
        ("create_flashinfer_kv_indices_triton", "kernel", "mla_patch.hooks.sglang.kv_indices:serve_token_indices"),
    }
    assert "sglang" not in sys.modules


@pytest.mark.parametrize(
    ("version", "environ", "table", "state", "exit_status", "says"),
    [
        ("0.5.11", {"MLA_PATCH_KV_INDICES": "off"}, TABLE, "off", 1, "MLA_PATCH_KV_INDICES unset"),
        ("0.5.11", {"MLA_PATCH_KV_INDICES": "onn"}, TABLE, "refused", 1, "did you mean on?"),
        ("0.5.11", {"MLA_PATCH_KV_INDICES": "ab"}, TABLE, "drifted", 1, "model_runner does not exist"),
        ("0.5.11", {"MLA_PATCH_KV_INDICE": "on"}, TABLE, "refused", 1, "did you mean MLA_PATCH_KV_INDICES?"),
        ("0.5.11", {"MLA_PATCH_STRICT": "1"}, TABLE, "armed", 1, "nothing is active"),
        ("0.5.11", {"SGLANG_PLUGINS": "other"}, TABLE, "armed", 1, "SGLANG_PLUGINS=other"),
        ("0.5.11", {"SGLANG_PLUGINS": "other, mla_patch"}, TABLE, "armed", 0, ""),
        ("0.5.11", {}, TABLE + ", NEW=1", "drifted", 1, "nothing active on sglang 0.5.11 (decode: drifted"),
        ("0.5.11", {"MLA_PATCH_KV_INDICES": "on"}, TABLE + ", NEW=1", "drifted", 1, "has the new NEW"),
        (
            "0.6.0",
            {},
            TABLE,
            "absent",
            1,
            "nothing active on sglang 0.6.0 (decode, kv_cast, kv_indices, tokenspeed: absent",
        ),
        ("0.6.0", {}, TABLE, "absent", 1, "MLA_PATCH_SKIP_VERSION_CHECK=1"),
        ("0.6.0", {"MLA_PATCH_SKIP_VERSION_CHECK": "1"}, TABLE, "armed", 0, ""),
        ("0.6.0", dict.fromkeys(ALL_FLAGS, "off"), TABLE, "off", 0, ""),
        ("0.6.0", {"MLA_PATCH_KV_INDICES": "on"}, TABLE, "absent", 1, "0.6.0 is outside"),
        ("0.5.11.post1", {}, TABLE, "armed", 0, ""),
        ("0.0.0.dev0", {}, TABLE, "armed", 1, "not informative"),
        ("0.0.0.dev1+gdce8b0606", {}, TABLE, "armed", 1, "0.0.0.dev1+gdce8b0606, which is not informative"),
        ("0.5.10.post1.dev40+gabc", {}, TABLE, "armed", 0, ""),
        (None, {}, TABLE, "armed", 1, "no metadata"),
    ],
)
def test_what_doctor_finds(capsys, tmp_path, monkeypatch, version, environ, table, state, exit_status, says):
    monkeypatch.syspath_prepend(str(fake_sglang(tmp_path, version, table)))
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    status, report = run(capsys, "doctor")
    assert (row_of(report)["state"], status) == (state, exit_status), report
    assert says in " ".join(report["findings"])
    assert bool(report["findings"]) == bool(exit_status)


@pytest.mark.parametrize(
    "place, says",
    [
        ("reports", ""),
        ("~/reports", ""),
        ("shared", "{tmp}/shared: mode 0777 lets everybody write to it: `chmod go-w {tmp}/shared`"),
        ("file", "{tmp}/file: found a file, expected a directory"),
        ("file/deep", "{tmp}/file/deep: Not a directory"),
    ],
    ids=["to be made", "below home", "shared", "a file", "below a file"],
)
def test_doctor_looks_at_the_report_directory(capsys, tmp_path, monkeypatch, place, says):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLA_PATCH_REPORT", place)
    status, report = run(capsys, "doctor")
    found = [text for text in report["findings"] if text.startswith("MLA_PATCH_REPORT=")]
    assert (status, len(found)) == ((1, 1) if says else (0, 0))
    assert not says or found[0].startswith(f"MLA_PATCH_REPORT={says.format(tmp=tmp_path)}")
    assert sorted(os.listdir(tmp_path)) == ["file", "shared"]  # it makes nothing


def namespace(where: Path, name: str) -> None:
    """A folder of an engine's name that is no package, as lies beside somebody's notes."""
    (where / name).mkdir()
    (where / name / "notes.txt").write_text("how we run it\n")


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_folder_of_that_name_is_no_engine(name, capsys, tmp_path, monkeypatch):
    namespace(tmp_path, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    status, report = run(capsys, "doctor")
    assert (status, report["hosts"], report["findings"]) == (0, [], [])


def test_an_engine_that_no_feature_is_for(capsys, tmp_path, monkeypatch):
    """Alone it is told; beside an engine on which something is active, there is nothing to do about it."""
    namespace(tmp_path, "vllm")
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('not to be imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    status, report = run(capsys, "doctor")
    assert status == 1 and "no feature exists for vllm: MLA_PATCH=1 changes nothing in it" in report["findings"]
    fake_sglang(tmp_path)
    status, report = run(capsys, "doctor")
    assert [one["name"] for one in report["hosts"]] == ["sglang", "vllm"]
    assert not [text for text in report["findings"] if "no feature" in text or "nothing active" in text]


def test_an_overlay_on_pythonpath_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(fake_sglang(tmp_path, None, told="0.5.9")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, report = run(capsys, "doctor")
    assert (status, report["hosts"][0]["version"]) == (1, "0.5.9")
    assert "comes from PYTHONPATH" in report["findings"][0]


def test_the_command_line_goes_before_the_environment(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(fake_sglang(tmp_path)))
    monkeypatch.setenv("MLA_PATCH_KV_INDICES", "on")
    status, report = run(capsys, "doctor", "-f", "kv_indices@sglang=off")
    assert (status, row_of(report)["state"], row_of(report)["source"]) == (1, "off", "command line")
    assert "MLA_PATCH_KV_INDICES unset" in report["findings"][-1]  # the one feature that this package has


def test_doctor_tells_when_python_skips_the_start_up_file(tmp_path):
    paths = [p for p in sys.path if p]
    env = clean_env({"PYTHONPATH": os.pathsep.join([str(Path(cli.__file__).parents[1]), *paths])})
    command = [sys.executable, "-S", "-m", "mla_patch", "doctor", "--json"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert any("-S" in finding for finding in json.loads(done.stdout)["findings"])


@pytest.mark.parametrize(
    "environ, state, says",
    [
        ({}, "refused", "MLA_PATCH_REPORT is not set"),
        ({"MLA_PATCH_REPORT": "{tmp}/reports"}, "armed", ""),
        ({"MLA_PATCH_REPORT": "{tmp}/shared"}, "refused", "shared: mode 0777 lets everybody write to it"),
        (
            {"MLA_PATCH_REPORT": "{tmp}/reports", "MLA_PATCH_AB": "arms=host+mine"},
            "refused",
            "arms=mine: kv_indices has host,",
        ),
    ],
)
def test_doctor_judges_an_experiment(capsys, tmp_path, monkeypatch, environ, state, says):
    monkeypatch.syspath_prepend(str(fake_sglang(tmp_path)))
    with_steps(tmp_path)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    for name, value in (environ | {"MLA_PATCH_KV_INDICES": "ab+shadow"}).items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    _, report = run(capsys, "doctor")
    assert row_of(report)["state"] == state and says in row_of(report)["reason"]
    targets = [target["name"] for target in row_of(report)["targets"]]
    assert ("ModelRunner.step" in targets and "graphs" in targets) == (state == "armed")


def test_promises_of_the_engine_are_told(capsys, tmp_path, monkeypatch):
    """Where the environment turns deterministic inference on, and what becomes of it with each feature."""
    monkeypatch.syspath_prepend(str(fake_sglang(tmp_path)))
    assert run(capsys, "doctor")[1]["notes"] == []
    monkeypatch.setenv("SGLANG_ENABLE_DETERMINISTIC_INFERENCE", "1")
    status, report = run(capsys, "doctor")
    assert status == 0 and len(report["notes"]) == 1
    note = (
        "sglang, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=1: deterministic inference: the engine promises batch-invariant"
    )
    assert report["notes"][0].startswith(note) and "`mla-patch explain` says" in report["notes"][0]
    assert cli.main(["doctor"]) == 0
    assert "note: sglang, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=1" in capsys.readouterr().out
    for feature, what in (
        ("kv_indices", "deterministic inference: the promise holds"),
        ("decode", "the engine's kernel decodes"),
    ):
        told = run(capsys, "explain", feature)[1]["promises"]
        assert [row["feature"] for row in told] == [f"{feature}@sglang"] and what in told[0]["text"]
        assert cli.main(["explain", feature]) == 0 and what in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "MLA_PATCH is not set: an engine that starts here runs without the plugin"),
        ("", "MLA_PATCH is '', which means off: an engine that starts here runs without the plugin"),
        ("No", "MLA_PATCH is 'No', which means off: an engine that starts here runs without the plugin"),
        ("1", None),
    ],
)
def test_the_printed_doctor_says_what_is_missing(capsys, monkeypatch, value, says):
    monkeypatch.delenv("MLA_PATCH", raising=False)
    if value is not None:
        monkeypatch.setenv("MLA_PATCH", value)
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "no engine is installed here" in shown
    assert says in shown if says else "runs without the plugin" not in shown


def test_list(capsys):
    status, rows = run(capsys, "list")
    assert status == 0
    assert set(rows[0]) == {"feature", "host", "range", "upstream", "drop_when", "default"}
    assert ("kv_indices", "sglang", "on") in [(row["feature"], row["host"], row["default"]) for row in rows]
    assert cli.main(["list"]) == 0
    assert "kv_indices" in capsys.readouterr().out


def test_explain_says_who_serves_a_call(capsys):
    status, told = run(capsys, "explain", "sched_meta")
    assert status == 0
    assert [row["provider"] for row in told["providers"]] == ["host", *["triton"] * 11, "host", *["triton"] * 7, "host"]
    # three parameter lists of one wrapper, each over all the releases that may have it
    lists = [row["releases"] for row in told["routes"] if row["name"] == "flash_mla_with_kvcache"]
    assert lists == [*["0.5.3 - 0.5.4"] * 3, *["0.5.5 - 0.5.22"] * 3, "0.5.23"]
    assert cli.main(["explain", "sched_meta"]) == 0
    assert "every other call: the engine's CUDA operator serves it" in capsys.readouterr().out
    assert "providers" not in run(capsys, "explain", "kv_indices")[1]


def test_explain_says_which_route_a_prompt_takes(capsys):
    status, told = run(capsys, "explain", "sparse_prefill")
    assert status == 0
    rows = [(row["provider"], row["when"].partition(":")[0]) for row in told["providers"]]
    assert rows == [
        *[("host", "V4")] * 10, ("ours + FlashMLA", "V4"), ("triton", "V4"), ("host", "V3.2"), ("triton", "V3.2"),
    ]  # fmt: skip
    backport = [
        row for row in told["routes"] if row["name"] == "DeepseekV4AttnBackend.forward" and row["kind"] == "call"
    ]
    assert [row["releases"] for row in backport] == ["0.5.12 - 0.5.12.post1"]
    # two entry points of one name are two rows in each release that has both
    both = [row["module"] for row in told["routes"] if row["releases"] == "0.5.13 - 0.5.15"]
    assert {one.rpartition(".")[0].rpartition(".")[2] for one in both} == {"dsa", "dsv4"}


@pytest.mark.parametrize(
    ("release", "sm", "heads", "flag", "v4", "v32"),
    [
        ("0.5.11", "90", "64", "", "the release has no DeepSeek V4", "FlashMLA, called by the release"),
        ("0.5.12", "90", "64", "", "over pages, by the release", "FlashMLA, called by the release"),
        ("0.5.12.post1", "90", "64", "on", "our route; FlashMLA attends", "FlashMLA, called by the release"),
        ("0.5.13", "90", "64", "", "our route; FlashMLA attends; short prompts over pages unless", "FlashMLA, called"),
        ("0.5.15", "120", "16", "", "our route; triton attends", "triton"),
        ("0.5.18", "90", "20", "", "our route; triton attends", "triton"),
        ("0.5.20", "100", "128", "", "our route; FlashMLA attends", "FlashMLA, called by the release"),
        ("0.5.20", "120", "16", "", "over pages, by the release", "triton"),
        ("0.5.21", "90", "128", "", "the release's route; FlashMLA attends", "FlashMLA, called by the release"),
        ("0.5.23", "80", "16", "on", "the release's route with our kernels; triton attends", "triton"),
    ],
)
def test_explain_says_who_serves_on_one_release_and_gpu(capsys, monkeypatch, release, sm, heads, flag, v4, v32):
    if flag:
        monkeypatch.setenv("MLA_PATCH_SPARSE_PREFILL", flag)
    status, told = run(capsys, "explain", "sparse_prefill", "--release", release, "--sm", sm, "--heads", heads)
    assert status == 0
    assert [row["what"] for row in told["serves"]] == ["V4", "V3.2"]
    for row, who in zip(told["serves"], (v4, v32), strict=True):
        assert row["who"].startswith(who) and (row["release"], row["sm"]) == (release, f"sm_{sm}"), row
        assert row["heads"] == int(heads)


def test_explain_tells_what_holds_for_several_heads_once(capsys) -> None:
    assert cli.main(["explain", "decode", "--release", "0.5.11", "--sm", "90", "--heads", "16", "128"]) == 0
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines() if " fa3, " in line]
    assert rows == [
        ["16,", "128", "fa3, an fp8 cache           mla-patch"],
        ["16,", "128", f"fa3, a 16-bit cache         the engine: {SIXTEEN_BITS}"],
    ]


@pytest.mark.parametrize(
    ("feature", "release", "sm", "flag", "state", "reason"),
    [
        ("decode", "0.5.18", "90", "", "applied", ""),
        ("decode", "0.5.18", "120", "", "applied", "TritonAttnBackend.warmup: not measured on sm_120"),
        ("decode", "0.5.18", "120", "on", "applied", ""),
        ("decode", "0.5.11", "120", "", "applied", ""),
        ("decode", "0.5.18", "120", "off", "off", "MLA_PATCH_DECODE=off (environment)"),
        ("kv_indices", "0.5.23", "80", "", "applied", ""),
        ("sched_meta", "0.5.23", "120", "", "applied", ""),
        ("sched_meta", "0.5.23", "120", "ab", "refused", "there is no host arm to compare with"),
        ("sparse_prefill", "0.5.18", "90", "", "applied", ""),
        ("tokenspeed", "0.5.11", "100", "", "applied", ""),
        ("tokenspeed", "0.5.18", "100", "", "native", "ServerArgs.backend, TRTLLMMLABackend.kernels: "),
    ],
)
def test_explain_answers_for_every_feature(capsys, monkeypatch, feature, release, sm, flag, state, reason):
    if flag:
        monkeypatch.setenv(f"MLA_PATCH_{feature.upper()}", flag)
    status, told = run(capsys, "explain", feature, "--release", release, "--sm", sm)
    (verdict,) = told["verdicts"]
    assert (status, verdict["release"], verdict["sm"], verdict["state"]) == (0, release, f"sm_{sm}", state)
    assert reason in verdict["reason"]
    assert verdict["reason"].count("not measured") <= 1, "a reason of all entry points is said once"
    assert cli.main(["explain", feature, "--release", release, "--sm", sm]) == 0
    shown = capsys.readouterr().out
    assert f"sm_{sm}" in shown and state in shown


def test_explain_without_a_gpu_leaves_it_to_the_first_call(capsys):
    _, told = run(capsys, "explain", "decode", "--release", "0.5.18")
    assert (told["verdicts"][0]["state"], told["verdicts"][0]["sm"]) == ("applied", None)
    assert "the first call" in told["verdicts"][0]["reason"]


def test_explain_asks_for_what_it_has_to_know(capsys, monkeypatch):
    monkeypatch.setattr(explain, "find_host", lambda name: None)
    status, told = run(capsys, "explain", "sparse_prefill", "--sm", "90")
    assert status == 0 and "serves" not in told
    assert cli.main(["explain", "sparse_prefill"]) == 0
    assert "--release 0.5.18 --sm 90" in capsys.readouterr().out
    assert cli.main(["explain", "sparse_prefill", "--release", "0.5.18", "--sm", "90"]) == 0
    assert "our route; FlashMLA attends" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("feature", "given", "problem"),
    [
        ("sparse_prefill", ("--release", "0.5.4", "--sm", "90"), "expected a version that is >=0.5.5,<0.5.24"),
        ("sparse_prefill", ("--release", "newest", "--sm", "90"), "--release newest: expected a version"),
        ("sparse_prefill", ("--sm", "9.0"), "'9.0': expected a compute capability without its dot"),
        ("decode", ("--sm", "999"), "no NVIDIA GPU is sm_999; the nearest is sm_121"),
        ("decode", ("--sm", "91"), "no NVIDIA GPU is sm_91; the nearest is sm_90"),
        ("decode", ("--sm", "00"), "no NVIDIA GPU is sm_00; the nearest is sm_50"),
    ],
)
def test_explain_refuses(capsys, feature, given, problem):
    try:
        status = cli.main(["explain", feature, *given])
    except SystemExit as end:
        status = end.code
    assert status == 2 and problem in capsys.readouterr().err


def test_explain_names_every_home(capsys):
    status, told = run(capsys, "explain", "kv_indices")
    assert status == 0 and set(told) == {"feature", "routes", "states", "promises"}
    tables = [r for r in told["routes"] if r["name"] == "create_flashmla_kv_indices_triton"]
    assert [(r["releases"], r["module"].rpartition(".")[0], r["params"][7:]) for r in tables] == [
        ("0.5.1 - 0.5.3", "sglang.srt.layers.attention", ["NUM_PAGE_PER_BLOCK", "PAGED_SIZE"]),
        ("0.5.4 - 0.5.12.post1", "sglang.srt.layers.attention", ["PAGED_SIZE"]),
        ("0.5.13 - 0.5.15", "sglang.srt.layers.attention.triton_ops", ["PAGED_SIZE"]),
        ("0.5.16", "sglang.kernels.ops.kvcache", ["PAGED_SIZE"]),
        ("0.5.17 - 0.5.18", "sglang.kernels.ops.kvcache", ["PAGED_SIZE", "v2p_ptr", "PAGE_MULT"]),
        ("0.5.19 - 0.5.22", "sglang.kernels.ops.kvcache", ["PAGED_SIZE"]),
        ("0.5.23", "sglang.kernels.ops.attention", ["PAGED_SIZE"]),
    ]
    assert told["states"][0]["state"] == "absent"
    assert cli.main(["explain", "kv_indices@sglang"]) == 0
    assert "0.5.13 - 0.5.15" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["explain", "kv_index"], "did you mean kv_indices?"),
        (["status", "no/such/folder"], "no/such/folder: No such file or directory"),
        (["run"], "expected a command"),
        (["run", "--", "no-such-command-of-anybody"], "No such file or directory"),
        (["run", "-f", "kv_index=on", "--", "true"], "did you mean kv_indices?"),
        (["run", "-f", "kv_indices=onn", "--", "true"], "did you mean on?"),
        (["doctor", "-f", "kv_indices"], "expected NAME=MODE"),
    ],
)
def test_misuse_is_2(capsys, argv, says):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert says in captured.err and not captured.out


def test_unknown_commands_are_2():
    with pytest.raises(SystemExit) as ended:
        cli.main(["demon"])
    assert ended.value.code == 2


def report_file(folder: Path, pid: int, **feature: Any) -> None:
    row = {
        "name": "kv_indices", "host": "sglang", "flag": "MLA_PATCH_KV_INDICES", "value": "on", "source": "default",
        "state": "applied", "reason": "", "targets": [], "served": 0, "declined": {}, "captured": 0, "replayed": None,
    } | feature  # fmt: skip
    report = {"engine": "sglang", "pid": pid, "argv": ["python"], "started": 1.0, "problems": [], "features": [row]}
    (folder / f"sglang-host-{pid}-1.json").write_text(json.dumps(report))


def test_status_reads_what_processes_left(capsys, tmp_path):
    report_file(tmp_path, 10, state="armed")
    report_file(tmp_path, 11, served=12, declined={"token_mapping": 3}, captured=4)
    report_file(tmp_path, 12, served=12, captured=5, replayed=600)
    status, told = run(capsys, "status", str(tmp_path))
    assert (status, [p["pid"] for p in told["processes"]], told["missing"]) == (0, [10, 11, 12], [])
    assert cli.main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "3 × token_mapping" in shown and "4 captured, replays not counted" in shown
    assert "5 captured, 600 replayed" in shown


def test_a_choice_that_nobody_takes_is_no_finding(capsys, tmp_path):
    report_file(tmp_path, 10, targets=[{"kind": "edit"}, {"kind": "edit"}])
    assert run(capsys, "status", str(tmp_path))[0] == 0
    report_file(tmp_path, 10, targets=[{"kind": "edit"}, {"kind": "call"}], source="environment")
    assert run(capsys, "status", str(tmp_path))[0] == 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"served": 0, "source": "environment"}, "nothing has called it yet"),
        ({"state": "failed", "reason": "it broke"}, "failed, it broke"),
        ({"state": "paused"}, "state 'paused' is not known"),
        ({"state": "drifted", "source": "environment", "reason": "it moved"}, "drifted, it moved"),
    ],
)
def test_status_has_findings(capsys, tmp_path, row, says):
    report_file(tmp_path, 10, **row)
    status, told = run(capsys, "status", str(tmp_path))
    assert status == 1 and says in " ".join(told["findings"])


def test_a_corrupt_report_is_missing_and_the_others_are_read(capsys, tmp_path):
    report_file(tmp_path, 10, served=1)
    (tmp_path / "sglang-host-11-1.json").write_text('{"engine": "sgl')
    (tmp_path / "sglang-host-12-1.json").write_text("[]")
    status, told = run(capsys, "status", str(tmp_path))
    assert (status, len(told["processes"])) == (1, 1)
    assert [one["file"] for one in told["missing"]] == ["sglang-host-11-1.json", "sglang-host-12-1.json"]


def test_status_names_a_process_that_should_report_and_does_not(capsys, tmp_path):
    report_file(tmp_path, 1, served=1)
    code = "import sys; print('up', flush=True); sys.stdin.read()  # sglang.launch_server"
    env = clean_env({"MLA_PATCH_REPORT": str(tmp_path)})
    child = subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        status, told = run(capsys, "status", str(tmp_path))
        assert (status, [one["pid"] for one in told["missing"]]) == (1, [child.pid])
    finally:
        child.communicate(b"")


@pytest.mark.parametrize("installed", [True, False], ids=["start-up file", "no start-up file"])
def test_run_opens_the_door(tmp_path, installed):
    """Without site-packages' start-up file, a sitecustomize opens it, and the one that was there still runs."""
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.theirs = True\n")
    code = "import builtins, sys; print(builtins.theirs, sys.modules.get('mla_patch.startup') is not None)"
    patch = "" if installed else "from mla_patch.cli import here; here.start_file = lambda: None; "
    start = f"import mla_patch.cli.main as cli; {patch}cli.main(['run', '--', {sys.executable!r}, '-c', {code!r}])"
    env = clean_env({"PYTHONPATH": str(tmp_path)})
    done = subprocess.run([sys.executable, "-c", start], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True True\n", "")


TRAMPOLINE = "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\nprint('ran')\n"
SCRIPTS = {
    "interpreter": None,
    "first line": "#!{python}\nprint('ran')\n",
    "env": "#!/usr/bin/env -S python3 -u\nprint('ran')\n",
    "long path": TRAMPOLINE,
}


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("where", ["another environment", "this environment"])
def test_run_asks_the_python_that_it_starts(kind, where, tmp_path, capfd, monkeypatch):
    """An environment without mla-patch would run the command unpatched without a word."""
    other = Scratch.make(tmp_path / "other")
    python = other.python if where == "another environment" else sys.executable
    script = tmp_path / "serve"
    if SCRIPTS[kind]:
        script.write_text(SCRIPTS[kind].format(python=python))
        script.chmod(0o700)
        monkeypatch.setenv("PATH", os.path.dirname(python), prepend=os.pathsep)
    command = [str(script)] if SCRIPTS[kind] else [python, "-c", "print('ran')"]
    status = cli.main(["run", "--json", "--", *command])
    out, err = capfd.readouterr()
    if where == "this environment":
        assert (status, err) == (0, "") and json.loads(out)["command"] == command
        return
    assert (status, out) == (2, "")
    assert err.startswith(f"mla-patch: run: {other.root}/bin/python")
    assert "would run without the plugin (" in err and "install mla-patch there" in err
    assert "No module named 'mla_patch'" in err


@pytest.mark.parametrize(
    "argv, options",
    [
        ([], []),
        (["-c", "-I"], []),
        (["-", "-I"], []),
        (["serve.py", "-I"], []),
        (["-I", "-m", "sglang.launch_server", "-S"], ["-I"]),
        (["-u", "-X", "dev", "serve.py"], ["-u", "-X", "dev"]),
        (["-Im", "sglang.launch_server"], ["-I"]),
    ],
    ids=" ".join,
)
def test_run_asks_with_pythons_own_options(argv, options):
    assert run_command.python_of([sys.executable, *argv], os.environ) == [sys.executable, *options]


def test_run_asks_with_options_that_keep_the_plugin_out(capfd):
    assert cli.main(["run", "--json", "--", sys.executable, "-S", "-c", "pass"]) == 2
    assert "would run without the plugin (" in capfd.readouterr().err


def test_run_goes_on_where_a_python_cannot_be_asked(capfd, monkeypatch, tmp_path):
    slow = tmp_path / "python3"
    slow.write_text("#!/bin/sh\nsleep 5\n")
    slow.chmod(0o700)
    monkeypatch.setattr(run_command, "ASKED", 0.1)
    assert cli.main(["run", "--json", "--", str(slow), "x.py"]) == 0
    assert "cannot be asked whether it has the plugin" in capfd.readouterr().err
    for command in ("true", "no_such_command", str(tmp_path)):
        assert run_command.python_of([command], os.environ) is None


def test_run_says_what_it_would_set(capsys):
    status, told = run(capsys, "run", "-f", "kv_indices=off", "--json", "--", "true")
    assert status == 0 and told["command"][0] == "true"
    assert told["environment"]["MLA_PATCH"] == "1" and told["environment"]["MLA_PATCH_KV_INDICES"] == "off"


def test_demo_without_an_engine_compares_with_the_definitions(tmp_path):
    command = [sys.executable, "-m", "mla_patch", "demo", "--json"]
    done = subprocess.run(
        command, env=clean_env({"CUDA_VISIBLE_DEVICES": ""}), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {"device", "targets", "served", "equal", "us"} <= set(told)
    assert (told["targets"], told["served"], told["equal"], told["us"]["host"]) == ([], 0, True, None)
    errors = {row["builder"]: row["error"]["ours"] for row in told["routes"] if "error" in row}
    assert set(errors) == {"mla_decode, float16", "mla_decode, e4m3"} and max(errors.values()) < 4e-3
