"""Real releases under names that tell nothing: the source says which release each is, feature by feature."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosts
import pytest

from mla_patch import plugins, release, sources
from mla_patch.cli import main as cli
from mla_patch.compat import gpu
from mla_patch.compat.sglang import release as sglang
from mla_patch.drive.sglang_fetch import fetch_package
from mla_patch.eligibility import Eligibility, check, code_of
from mla_patch.features import Feature, State
from mla_patch.flags import Setting
from mla_patch.session import find_host

CPU_SECONDS = 130  # see budget.py

FEATURES = plugins.load().features
GPUS = [(8, 0), (9, 0), (12, 0)]
# a build whose checkout had no tags, a source build after an older tag, nightlies from before and after the range, and
# a checkout on PYTHONPATH, of which only the version file that a build left beside it tells
CALLED = ["0.0.0.dev1+gdce8b0606", "0.5.10.post1.dev40+gabc", "0.4.9.post1.dev123+gabc", "0.6.0.dev20261130", None]
# with what sglang-kernel's older wrappers take, beside the releases that import them from there
KERNELS = """
def get_mla_metadata(
    cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q=None, is_fp8_kvcache=False, topk=None
): ...
def flash_mla_with_kvcache(
    q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits, softmax_scale=None,
    causal=False, descale_q=None, descale_k=None, is_fp8_kvcache=False, indices=None
): ...
def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512): ...
"""


def site(where: Path, wheel: Path, called: str | None) -> Path:
    """A folder in which a release is installed under another name; links to what the wheel has."""
    where.mkdir()
    (where / "sglang").symlink_to(wheel / "sglang")
    (where / "sgl_kernel").mkdir()
    (where / "sgl_kernel" / "__init__.py").write_text("raise RuntimeError('nothing here is to be imported')\n")
    (where / "sgl_kernel" / "flash_mla.py").write_text(KERNELS)
    if called is not None:
        (where / f"sglang-{called}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: sglang\nVersion: {called}\n"
        (where / f"sglang-{called}.dist-info" / "METADATA").write_text(metadata)
    return where


def nvml(capability: tuple[int, int]) -> Any:
    return SimpleNamespace(
        nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetName=lambda handle: "a GPU",
        nvmlDeviceGetCudaComputeCapability=lambda handle: capability, nvmlSystemGetDriverVersion=lambda: "600",
    )  # fmt: skip


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Any:
    """All features' judgements on a machine with one site folder and one GPU: (folder, capability) -> by label."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu, "_told", [])

    def judged(where: Path, capability: tuple[int, int] = (9, 0)) -> dict[str, Eligibility]:
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(where))
            patch.setitem(sys.modules, "pynvml", nvml(capability))
            gpu._visible.cache_clear()
            found = find_host("sglang")
            assert found is not None
            return {f"{one.name}={value}": check(one, setting, found) for one, value, setting in _settings()}

    yield judged
    gpu._visible.cache_clear()


def _settings() -> list[tuple[Feature, str, Setting]]:
    rows = []
    for feature in FEATURES:
        rows.append((feature, "default", Setting(feature.flag, "on", "default")))
        rows += [
            (feature, value, Setting(feature.flag, value, "environment"))
            for value in ("on", *(("ab",) if feature.steps else ()))
        ]
    return rows


def told(checked: Eligibility) -> Any:
    """What an engine would do, without the words for it."""
    return checked.state, [
        (t.module, t.name, getattr(t, "params", ()), code_of(t), getattr(t, "bind", None)) for t in checked.targets
    ]


@pytest.mark.parametrize("version", hosts.chosen())
def test_the_source_decides_what_a_name_does_not_tell(version: str, here: Any, tmp_path: Path) -> None:
    wheel = fetch_package("sglang", version)
    own = site(tmp_path / "own", wheel, version)
    folders = {called: site(tmp_path / f"as-{called}", wheel, called) for called in CALLED}
    states = set()
    for capability in GPUS:
        true = here(own, capability)
        states |= {checked.state for checked in true.values()}
        for called in CALLED if capability == GPUS[0] else CALLED[:1]:
            seen = here(folders[called], capability)
            for label, checked in true.items():
                found = seen[label]
                if (found.state, checked.state) != (State.ABSENT, State.ABSENT):
                    assert _comparable(told(found)) == _comparable(told(checked)), (called, label, found.reason)
                    assert found.reason.endswith(checked.reason), (called, label)
                elif "is outside" in checked.reason:
                    assert "is outside" in found.reason, (called, label, found.reason)
    assert State.ARMED in states


def _comparable(row: Any) -> Any:
    """Binders are made anew at each asking: by what they call and with what."""
    state, targets = row

    def bind(one: Any) -> Any:
        if not hasattr(one, "func"):
            return one
        return one.func, [vars(given) if hasattr(given, "__dict__") else given for given in one.args]

    return state, [(*target[:-1], bind(target[-1])) for target in targets]


def _source() -> release.Source:
    return release.Source(lambda module: sources.find_module(module) is not None, lambda target: None)


@pytest.mark.parametrize("version", hosts.chosen())
def test_marks_tell_each_release(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of one release's marks are there, and none of any later release's."""
    monkeypatch.syspath_prepend(str(site(tmp_path / "site", fetch_package("sglang", version), None)))
    reviewed = sglang.HOST.reviewed
    own = next((marked for marked, _ in sglang.HOST.marks if marked == version), None)
    if own is None:  # a post release is told as the release before it
        own = version.partition(".post")[0]
    assert _source().floor(sglang.HOST) == own
    *marks, _ = sglang.HOST.marks  # the last stands for all before the range
    later = [module for marked, both in marks if reviewed.index(marked) > reviewed.index(own) for module in both]
    assert [module for module in later if sources.find_module(module)] == []


# (candidate, feature) -> the release that its source is, or why it is absent
CANDIDATES = {
    "0.5.10rc0": {"decode": "0.5.10", "kv_indices": "0.5.10", "sparse_prefill": "0.5.10", "tokenspeed": "0.5.10"},
    "0.5.2rc0": {"decode": "0.5.2", "kv_indices": "0.5.2", "sparse_prefill": None},
    # before sparse attention came, which the release itself has
    "0.5.3rc0": {"decode": "0.5.3", "kv_indices": "0.5.3", "sched_meta": None},
}


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_release_candidates(candidate: str, here: Any, tmp_path: Path) -> None:
    seen = here(site(tmp_path / "site", fetch_package("sglang", candidate), candidate))
    for name, taken in CANDIDATES[candidate].items():
        checked = seen[f"{name}=default"]
        if taken is None:
            assert checked.state is State.ABSENT and "is outside" in checked.reason
        else:
            assert checked.state is State.ARMED
            assert checked.reason == f"sglang {candidate}: taken for {taken} by its source"


def test_a_release_under_a_candidates_name(here: Any, tmp_path: Path) -> None:
    """The code of 0.5.11 called a candidate of 0.5.12: the next release does not fit it, but its neighbour does."""
    seen = here(site(tmp_path / "site", fetch_package("sglang", "0.5.11"), "0.5.12rc3"), (8, 0))
    for name in ("decode", "sparse_prefill", "tokenspeed"):
        checked = seen[f"{name}=default"]
        assert checked.state is State.ARMED and "taken for 0.5.11 by its source" in checked.reason, name


def test_explain_of_a_build_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`explain` tells of the release that the source is: this one has no DeepSeek V4, whatever it is called."""
    folder = site(tmp_path / "site", fetch_package("sglang", "0.5.11"), "0.5.14.dev7+gabc")
    monkeypatch.syspath_prepend(str(folder))
    assert cli.main(["explain", "sparse_prefill", "--sm", "90", "--json"]) == 0
    serves = json.loads(capsys.readouterr().out)["serves"]
    assert {row["release"] for row in serves} == {"0.5.11"}
    assert "the release has no DeepSeek V4" in {row["who"] for row in serves}
