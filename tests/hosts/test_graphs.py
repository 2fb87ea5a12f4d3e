"""Real SGLang releases' graph runners on a CPU: each size captured once per arm, and the step's arm replayed."""

import ast
from pathlib import Path

import hosts
import pytest
from packaging.version import Version

from mla_patch.drive.sglang_fetch import fetch
from mla_patch.experiment import merge
from mla_patch.experiment.schedule import Plan, Sampling, Schedule
from mla_patch.hooks.sglang.edits import graphs as sglang_graphs

CPU_SECONDS = 140  # see budget.py

pytestmark = [pytest.mark.network, pytest.mark.slow]
# of every shape of the runner: one class and dict of its own, one backend and its keys, with more in the keys
RELEASES = [release for release in hosts.chosen() if release in ("0.5.9", "0.5.13", "0.5.18", "0.5.23")]


@pytest.mark.parametrize("release", RELEASES)
def test_arms_in_the_releases_own_graphs(release: str, tmp_path: Path) -> None:
    report = tmp_path / "report"
    env = hosts.environment(release) | {
        "MLA_PATCH_DECODE": "ab+shadow",
        "MLA_PATCH_AB": "block=4,warmup=0,draft=1",
        "MLA_PATCH_SHADOW": "every=8,tolerance=0.02",
        "MLA_PATCH_REPORT": str(report),
    }
    seen = hosts.start("graphs_child", release, tmp_path / "seen.json", env=env)

    # two sizes, three arms; a draft model's runner of another kind is left alone
    assert (seen["graphs"], seen["draft graphs"]) == (6, 2)
    # EAGLE's is, unless it is asked for; 0.5.23 captures each size for sampled and for greedy drafts
    variants = 2 if Version(release) >= Version("0.5.23") else 1
    assert seen["eagle graphs"] == {"not asked": 2 * variants, "asked": 6 * variants}
    assert seen["labels"] == ["decode=patch", "shadow"]
    assert seen["captured"] == 4  # one layer: ours in two arms of each size
    if Version(release) < Version("0.5.14"):
        assert seen["keys"] == seen["eagle keys"] == ["8", "4"]
    else:
        assert seen["keys"] == ["8", "8+decode=patch", "8+shadow", "4", "4+decode=patch", "4+shadow"]
        kinds = ("", "greedy") if variants == 2 else ("",)
        arms = ("", "+decode=patch", "+shadow")
        assert seen["eagle keys"] == [f"{size}{kind}{arm}" for size in (8, 4) for arm in arms for kind in kinds]
    told = [line for line in seen["stderr"].splitlines() if "mla-patch: " in line]
    assert len(told) == 4, told
    assert "captured 2 more times (decode=patch; shadow)" in told[0]
    assert "CUDA graph of the draft model is captured 2 more times (decode=patch; shadow)" in told[2]
    for line in (told[1], told[3]):
        assert "captured 2 graphs of the host's arm in" in line and ", 4 of other arms in" in line

    schedule, sampling = Schedule(Plan(block=4, warmup=0, salt="decode")), Sampling(8)
    count = range(1, len(seen["ran"]) + 1)
    want = ["shadow" if sampling.due(step) else schedule.assignment(step).arm for step in count]
    assert seen["ran"] == want and set(want) == {"host", "patch", "shadow"}
    assert seen["drafted"] == want
    row = seen["row"]
    assert (row["state"], row["declined"]) == ("applied", {})
    assert row["replayed"] == 2 * (len(want) - want.count("host"))
    assert not seen["cuda initialized"]

    ((run,), problems) = merge.read_runs(report)
    assert problems == []
    for bucket in ("graph/4/64", "draft/4/64"):
        rows = [timing for timing in run.timings if timing.bucket == bucket]
        assert [timing.arm for timing in rows] == [arm for arm in want if arm != "shadow"]
    assert {timing.bucket for timing in run.timings} == {"graph/4/64", "draft/4/64"} and run.differed == 0


def methods(path: Path, owner: str) -> dict[str, list[str]]:
    """The parameters of each of a class's own methods."""
    (found,) = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef) and node.name == owner
    ]
    return {
        node.name: [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        for node in found.body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("release", hosts.chosen())
def test_every_release_has_what_the_edits_change(release: str) -> None:
    """By its source, so that a release need not be driven to be known."""
    home = fetch(release)[0] / "sglang/srt/model_executor"
    source = (home / "model_runner.py").read_text()
    assert methods(home / "model_runner.py", "ModelRunner")["forward"][:2] == ["self", "forward_batch"]
    assert "self.forward_pass_id += 1" in source and "self.is_draft_worker = is_draft_worker" in source
    targets = [target.module for target in sglang_graphs.step_targets(release)]
    runner = home.parents[2].joinpath(*targets[1].split(".")).with_suffix(".py")
    source = runner.read_text()
    if Version(release) < Version("0.5.14"):
        own = methods(runner, "CudaGraphRunner")
        assert own["capture_one_batch_size"][:3] == ["self", "bs", "forward"]
        assert "self.graphs = {}" in source and "self.output_buffers = {}" in source
        assert "].replay()" in source and "output = self.output_buffers[" in source
    else:
        own = methods(runner, "DecodeCudaGraphRunner")
        assert own["capture_one_shape"][:3] == ["self", "size", "forward"] and own["execute"][1] == "forward_batch"
        assert "variant_label" in own["_make_graph_key"]
        assert "self.backend.replay(self._replay_graph_key, forward_batch)" in source
        key = (home / "runner" / "shape_key.py").read_text()
        assert "@dataclass(frozen=True)\nclass ShapeKey" in key and "variant_label: Optional[str] = None" in key
    assert own["capture"] == ["self"]

    # a draft model's runner captures with the same loop, and brings what differs
    path = home.parent / "speculative" / "eagle_draft_cuda_graph_runner.py"
    source, own = path.read_text(), methods(path, "EAGLEDraftCudaGraphRunner")
    if Version(release) < Version("0.5.14"):
        assert (
            own["capture_one_batch_size"][:3] == ["self", "num_seqs", "forward"] and own["replay"][1] == "forward_batch"
        )
        assert "CudaGraphRunner.capture(self)" in source and "output_buffers[bs]" in source
    else:
        assert own["capture_one_shape"][:3] == ["self", "size", "forward"] and own["execute"][1] == "forward_batch"
        assert "class EAGLEDraftCudaGraphRunner(DecodeCudaGraphRunner)" in source
        assert "_make_graph_key" in own and "capture" not in own
