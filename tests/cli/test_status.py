"""What ``mla-patch status`` makes of reports: what is a finding, what is a note, and which processes are rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mla_patch.cli import main as cli
from mla_patch.cli import status


def feature(name: str = "decode", **more: Any) -> dict[str, Any]:
    return {
        "name": name, "host": "sglang", "flag": f"MLA_PATCH_{name.upper()}", "value": "on", "source": "default",
        "state": "applied", "reason": "", "targets": [{"kind": "call"}], "served": 0, "declined": {}, "captured": 0,
        "replayed": None,
    } | more  # fmt: skip


def process(folder: Path, pid: int, *features: dict[str, Any], engine: str = "sglang", **more: Any) -> None:
    report = {"engine": engine, "pid": pid, "argv": ["python"], "started": 1.0, "problems": []} | more
    (folder / f"{engine}-host-{pid}-1.json").write_text(json.dumps(report | {"features": features}))


def told(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    exit_status = cli.main(["status", str(folder), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert cli.main(["status", str(folder)]) == exit_status
    return exit_status, answer, capsys.readouterr().out


def deployment(folder: Path, **scheduler: Any) -> None:
    """A launcher, a scheduler and a detokenizer, as a server of one GPU has them."""
    features = [feature("decode"), feature("kv_indices"), feature("sparse_prefill")]
    process(folder, 10, *features)
    decode = feature("decode", served=40, captured=12) | scheduler
    process(folder, 11, decode, feature("kv_indices", served=7), feature("sparse_prefill"))
    process(folder, 12, *features)


def test_a_healthy_deployment_is_no_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deployment(tmp_path)
    exit_status, answer, shown = told(tmp_path, capsys)
    assert (exit_status, answer["findings"], answer["missing"]) == (0, [], [])
    (note,) = answer["notes"]
    assert note.startswith("sparse_prefill@sglang is applied, but nothing has called it yet")
    assert f"note: {note}" in shown
    assert [report["pid"] for report in answer["processes"] if report.get("idle")] == [10, 12]
    rows = [line for line in shown.splitlines() if line.startswith("  sglang")]
    assert [row.split()[1] for row in rows] == ["11"] * 3
    assert "2 processes that call nothing are left out (pid 10, 12): --all shows them" in shown
    assert cli.main(["status", str(tmp_path), "--all"]) == 0
    shown = capsys.readouterr().out
    assert len([line for line in shown.splitlines() if line.startswith("  sglang")]) == 9 and "left out" not in shown


@pytest.mark.parametrize(
    ("given", "finding"),
    [
        ({"served": 0, "captured": 0, "source": "environment"}, "decode@sglang is applied, but nothing has called it"),
        ({"state": "failed", "reason": "it broke"}, "decode@sglang (MLA_PATCH_DECODE=on): failed, it broke"),
        ({"state": "drifted", "source": "environment", "reason": "it moved"}, "drifted, it moved"),
        ({"state": "paused"}, "decode@sglang: state 'paused' is not known to mla-patch"),
    ],
    ids=["asked for and not called", "failed by default", "asked for and drifted", "of another version"],
)
def test_what_is_not_as_it_should_be_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: dict[str, Any], finding: str
) -> None:
    deployment(tmp_path, **given)
    exit_status, answer, shown = told(tmp_path, capsys)
    assert exit_status == 1 and len(answer["findings"]) == 1 and finding in answer["findings"][0]
    assert f"finding: {answer['findings'][0]}" in shown


def test_a_process_that_has_done_something_is_a_row(tmp_path: Path) -> None:
    idle = [feature()]
    for pid, features, more in (
        (20, [feature(served=1)], {}),
        (21, idle, {}),
        (22, [feature(declined={"score_mod": 3})], {}),
        (23, [feature(replayed=5)], {}),
        (24, idle, {"compiled": {"before": 2, "serving": 0}}),
        (25, [feature(state="drifted")], {}),
        (26, [feature(state="native"), feature("kv_indices", state="off")], {}),
        (27, [feature(state="armed")], {"compiled": {"before": 0, "serving": 0}}),
        (28, idle, {"compiled": None}),
    ):
        process(tmp_path, pid, *features, **more)
    answer = status.look(tmp_path)
    assert [report["pid"] for report in answer["processes"] if report.get("idle")] == [21, 26, 27, 28]
    (tmp_path / "sglang-host-20-1.json").unlink()
    for pid in (22, 23, 24):
        (tmp_path / f"sglang-host-{pid}-1.json").unlink()
    assert not any(report.get("idle") for report in status.look(tmp_path)["processes"])  # none has called anything


def empty(folder: Path) -> str:
    return "it is empty"


def no_feature(folder: Path) -> str:
    process(folder, 10)
    process(folder, 11)
    return "nothing is active in sglang (pid 10, 11): its reports list no feature"


def vllm(folder: Path) -> str:
    process(folder, 10, engine="vllm")
    process(folder, 11, feature(served=5))
    return "nothing is active in vllm (pid 10): its reports list no feature, because none exists for this engine"


def all_absent(folder: Path) -> str:
    process(folder, 10, feature(state="absent"), feature("kv_indices", state="native"))
    return "nothing is active in sglang (pid 10): absent: decode; native: kv_indices"


def experiment(folder: Path) -> str:
    (folder / "r.control").write_bytes(b"")
    (folder / "sglang-host-1-1.steps.jsonl").write_bytes(b"")
    return "it holds r.control, sglang-host-1-1.steps.jsonl; `mla-patch ab report` reads an experiment's records"


def others(folder: Path) -> str:
    for number in range(10):
        (folder / f"{number}.txt").touch()
    return "it holds 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt, 6.txt, 7.txt and 2 more"


@pytest.mark.parametrize("make", [empty, no_feature, vllm, all_absent, experiment, others], ids=lambda f: f.__name__)
def test_nothing_active_is_a_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any) -> None:
    says = make(tmp_path)
    exit_status, answer, shown = told(tmp_path, capsys)
    assert exit_status == 1 and says in " ".join(answer["findings"]) and says in shown


def test_nothing_active_by_somebodys_wish_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process(
        tmp_path, 10, feature(state="off", source="environment", value="off"), feature("kv_indices", state="native")
    )
    exit_status, answer, shown = told(tmp_path, capsys)
    assert (exit_status, answer["findings"]) == (0, [])
    assert "note: nothing is active in sglang (pid 10): native: kv_indices; off: decode" in shown


def test_ranks_that_part_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Same parent, same command but for its numbers; a detokenizer is armed, and another engine's ranks are others."""
    served, failed = feature(served=9), feature(state="failed", reason="it broke", served=3)
    rank = {"parent": "9-1234", "pid_space": "here"}
    fork = ["python", "-c", "from multiprocessing.spawn import spawn_main; spawn_main(pipe_handle=41)"]
    process(tmp_path, 9, feature(state="armed"), argv=["python", "-m", "sglang.launch_server"], parent="1-1")
    for pid, row in ((11, served), (12, served), (13, feature(state="armed"))):
        process(tmp_path, pid, row, argv=[*fork[:2], fork[2].replace("41", str(pid))], **rank)
    for pid, other in ((20, {"parent": "8-1"}), (21, {"pid_space": "there"}), (22, {"argv": ["python", "bench.py"]})):
        process(tmp_path, pid, feature(state="off"), **({"argv": fork} | rank | other))
    exit_status, answer, _ = told(tmp_path, capsys)
    assert (exit_status, answer["findings"]) == (0, [])
    process(tmp_path, 14, failed, argv=fork, **rank)
    exit_status, answer, shown = told(tmp_path, capsys)
    text = "decode@sglang differs between processes of one engine: applied in pid 11, 12; failed in pid 14"
    assert exit_status == 1 and text in answer["findings"]
    assert "differs between processes of one engine" in shown


def test_displaced_is_a_finding_whoever_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = feature(state="displaced", reason="sglang.ops.decode is plugin:mine", served=3)
    process(tmp_path, 11, row, feature("kv_indices", served=3))
    exit_status, answer, shown = told(tmp_path, capsys)
    finding = "pid 11: decode@sglang (MLA_PATCH_DECODE=on): displaced, sglang.ops.decode is plugin:mine"
    assert (exit_status, answer["findings"]) == (1, [finding])
    assert "displaced" in shown


def test_thousands_of_reports_are_not_compared_with_each_other(tmp_path: Path) -> None:
    class Report(dict[str, Any]):
        def __eq__(self, other: object) -> bool:
            raise AssertionError("each with each: 5000 reports took 14 s")

        __hash__ = None  # type: ignore[assignment]

    deployment(tmp_path)
    answer = status.look(tmp_path)
    answer["processes"] = list(map(Report, answer["processes"]))
    assert list(status.blocks(tmp_path, answer))
