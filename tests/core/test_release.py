"""Which reviewed release a host's source is, where its version does not say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mla_patch import eligibility, release
from mla_patch.compat import gpu, hosts
from mla_patch.compat.hosts import Installed
from mla_patch.compat.sglang import release as sglang
from mla_patch.compat.types import Gpu, Host, Mark, Target
from mla_patch.features import Feature, State
from mla_patch.flags import Setting
from mla_patch.hooks.sglang import decode as sglang_decode
from mla_patch.hooks.sglang import sched_meta as sglang_sched_meta
from mla_patch.session import find_host

# an engine of four releases: its entry point moves in the second, takes more in the third, and stays so
HOST = Host(
    "eng", "eng", ("eng",), reviewed=("1.0", "1.1", "1.2", "1.3"),
    marks=(("1.3", ("eng.d", "eng.dd")), ("1.2", ("eng.c",)), ("1.1", ("eng.b",)), ("1.0", ("eng.a",))),
)  # fmt: skip
HOMES = {"1.0": ("eng.old", ("q",)), "1.1": ("eng.new", ("q",)), "1.2": ("eng.new", ("q", "k"))}


def targets(version: str | None) -> tuple[Target, ...]:
    """As compat has them: by order of versions, in all homes where there is none."""
    eras = HOMES if version is None else {max(one for one in HOMES if one <= version): None}
    return tuple(Target(*(HOMES[era][0], "decode", HOMES[era][1])) for era in eras)


def feature(requirement: str = "eng>=1.0,<1.4", **more: Any) -> Feature:
    return Feature("decode", requirement, targets, "", "", "", **more)


def source(modules: str, entry: tuple[str, tuple[str, ...]] | None) -> release.Source:
    """A source with the modules eng.<letter>, and the entry point with that home and those parameters."""

    def problem(target: Target) -> str | None:
        return None if (target.module, target.params) == entry else "drifted"

    return release.Source(lambda module: module in {f"eng.{name}" for name in modules.split()}, problem)


def found(version: str | None, modules: str, code: str, note: str = "", **more: Any) -> Any:
    """What the code of release ``code``, with these marks, is taken for under a version, or why it is absent."""
    told = release.find(
        more.pop("feature", feature()), Installed(HOST, version, "", note), source(modules, HOMES.get(code)), **more
    )
    return told.outside or told.version


SEEN = {
    # what a release's own metadata say is believed, and so shows what has drifted
    "a reviewed release": (("1.1", "", ""), "1.1"),
    "a release out of range": (("1.4", "a b c d dd", "1.2"), "eng 1.4 is outside >=1.0,<1.4"),
    "a candidate out of range": (("1.4rc1", "a b c d dd", "1.2"), "eng 1.4rc1 is outside >=1.0,<1.4"),
    # a number that tells nothing, and one from before the code
    "no version": ((None, "a b c", "1.2"), "1.2"),
    "an older tag": (("1.0.post1.dev40+gabc", "a b c", "1.2"), "1.2"),
    "a newer number": (("2.0.dev1", "a b", "1.1"), "1.1"),
    "not a version": (("banana", "a b", "1.1"), "1.1"),
    # entry points alike in two releases: the marks tell
    "alike, the older": ((None, "a b c", "1.2"), "1.2"),
    "alike, the newer": ((None, "a b c d dd", "1.2"), "1.3"),
    "alike, half of the newer": ((None, "a b c d", "1.2"), "1.2"),
    # between two releases: what has come already, by each feature's own entry points
    "before its module": ((None, "a b", "1.2"), "1.2"),
    "a module cut out": ((None, "a b d dd", "1.1"), "1.1"),
    "no marks": ((None, "", "1.1"), "1.1"),
    "no marks, alike": ((None, "", "1.2"), "1.3"),
    # candidates: their own release first, then the source
    "a candidate": (("1.2rc0", "a b", "1.2"), "1.2"),
    "a candidate from before": (("1.2rc0", "a b", "1.1"), "1.1"),
    "a candidate of the lower bound": (("1.0rc1", "a", "1.0"), "1.0"),
    "a post release": (("1.2.post1", "a b c", "1.2"), "1.2.post1"),
    "a post release with the next one's code": (("1.0.post1", "a b", "1.1"), "1.1"),
    "a build's label": (("1.2+cu130", "a b c", "1.2"), "1.2+cu130"),
    # nothing fits
    "drifted": ((None, "a b c", ""), None),
    "a drifted candidate": (("1.2rc0", "a b c", ""), "1.2"),
    "of no release": (
        ("2.0.dev1", "a b c d dd", ""),
        "eng 2.0.dev1 is outside >=1.0,<1.4, and its source matches no reviewed release",
    ),
}


@pytest.mark.parametrize("case", SEEN)
def test_what_a_source_is_taken_for(case: str) -> None:
    (version, modules, code), told = SEEN[case]
    assert found(version, modules, code) == told


def test_a_release_before_the_range_by_its_source() -> None:
    later = feature("eng>=1.1,<1.4")
    why = "eng of an unknown version is outside >=1.1,<1.4: by its source it is 1.0"
    assert found(None, "a", "1.0", feature=later) == why
    assert found(None, "a", "1.0", feature=later, skip_version_check=True) == "1.0"
    assert found("0.9", "a", "1.0", feature=later) == "eng 0.9 is outside >=1.1,<1.4"


def test_a_version_file_may_be_older_than_its_code() -> None:
    """What lies beside a checkout was written when it was built: the source goes before it, where it tells."""
    checkout = "an editable install"
    assert found("1.2", "a b c d dd", "1.2", checkout) == "1.3"
    assert found("1.2", "a b c d dd", "1.2") == "1.2"
    assert found("1.2", "", "1.2", checkout) == "1.2"


def test_a_features_own_marks() -> None:
    """Where entry points look the same: a module that some releases have alone, as a backend of the host's own."""
    own = feature(marks=(Mark("eng.own", "1.2", "1.3"),))
    assert found(None, "a b c d dd", "1.2", feature=own) == "1.3"
    assert found(None, "a b c d dd own", "1.2", feature=own) == "1.2"
    assert found(None, "a b", "1.1", feature=own) == "1.1"
    assert found("1.2rc0", "a b", "1.2", feature=own) == "1.3"  # its parameters have come, its backend has gone


def test_a_host_that_nobody_has_read() -> None:
    bare = Host("eng", "eng", ("eng",))
    nothing = source("", None)
    told = {
        version: release.find(feature(), Installed(bare, version, ""), nothing)
        for version in ("1.2", "1.2.dev3", "2.0.dev3", None)
    }
    assert (told["1.2"].version, told["1.2"].notes) == ("1.2", [])
    assert told["2.0.dev3"].outside == "eng 2.0.dev3 is outside >=1.0,<1.4"
    for version in ("1.2.dev3", None):
        assert (told[version].version, told[version].notes) == (None, [release.EVERY_HOME])


def test_where_nothing_fits_the_nearest_release_says_what_the_host_has() -> None:
    """Homes and parameters that no release had together: the marks still tell an old release from a new one."""
    told = release.find(feature(), Installed(HOST, None, ""), source("a b c", ("eng.old", ("q", "k"))))
    assert (told.version, told.nearest, told.notes) == (None, "1.2", [release.EVERY_HOME])


@pytest.mark.parametrize("version", ["0.0.0", "0.0.0.dev0", "0.0.0.dev1+gdce8b0606", "0+unknown", "0.0", "0.0.0.post1"])
def test_versions_that_tell_nothing(version: str) -> None:
    assert not hosts._tells(version)


@pytest.mark.parametrize("version", ["0.5.11", "0.1.dev1+gabc", "0.5.10.post1.dev40+gabc", "0.0.1", "banana"])
def test_versions_that_tell_something(version: str) -> None:
    assert hosts._tells(version)


def test_each_reviewed_release_has_its_marks() -> None:
    """A post release has its release's; what came before the range shares the last row."""
    marked = [version for version, modules in sglang.HOST.marks if len(modules) == 2]
    reviewed = ["0.4.10", *(one for one in sglang.HOST.reviewed if "post" not in one)]
    assert marked == reviewed[::-1]
    modules = [module for _, both in sglang.HOST.marks for module in both]
    assert len(modules) == len(set(modules))


# what else a source tells


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SGLang 0.5.11 as far as sched_meta looks at it, without sgl_kernel."""
    attention = tmp_path / "sglang" / "srt" / "layers" / "attention"
    attention.mkdir(parents=True)
    for name in ("flashmla_backend", "nsa_backend"):
        (attention / f"{name}.py").touch()
    (tmp_path / "sglang" / "__init__.py").touch()
    (tmp_path / "sglang-0.5.11.dist-info").mkdir()
    (tmp_path / "sglang-0.5.11.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.11\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(gpu, "from_nvml", lambda: None)
    monkeypatch.setattr(gpu, "_told", [])
    return tmp_path


@pytest.mark.parametrize(
    "more, version, note",
    [
        ({"0.4.6": "Version: 0.4.6"}, None, "its metadata says 0.4.6 and 0.5.11; one of them is left over"),
        ({"0.4.6": "Version: 0.5.11"}, "0.5.11", ""),
        ({"0.4.6": None}, "0.5.11", ""),
        ({"0.5.11": None}, None, "no metadata of its own"),
        ({"0.5.11": "Version:"}, None, "no metadata of its own"),
    ],
    ids=["of another release", "of the same", "a folder without METADATA", "no METADATA at all", "without a version"],
)
def test_metadata_that_is_left_over(more: dict[str, str | None], version: str | None, note: str, site: Path) -> None:
    """What a broken upgrade leaves behind. Which of two is found first is chance, and neither is believed."""
    for called, line in more.items():
        folder = site / f"sglang-{called}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").unlink(missing_ok=True)
        if line is not None:
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\n{line}\n")
    found = find_host("sglang")
    assert found.version == version
    assert note in found.note if note else not found.note


def judged(one: Feature) -> eligibility.Eligibility:
    return eligibility.check(one, Setting(one.flag, "on", "default"), find_host("sglang"))


def test_a_package_that_is_not_installed_has_not_drifted(site: Path) -> None:
    told = judged(sglang_sched_meta.FEATURE)
    assert (told.state, told.reason) == (State.ABSENT, "sgl_kernel is not installed")
    (site / "sgl_kernel").mkdir()  # a folder is none, either
    assert judged(sglang_sched_meta.FEATURE).state is State.ABSENT
    (site / "sgl_kernel" / "__init__.py").touch()
    sys.path_importer_cache.clear()
    told = judged(sglang_sched_meta.FEATURE)
    assert (told.state, told.reason) == (State.DRIFTED, "sgl_kernel.flash_mla does not exist")


def test_another_makers_gpu_is_refused_and_not_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host has a decode of its own, too: its table is of NVIDIA's capabilities.

    What is not measured is the Triton backend's part alone; behind other backends an fp8 cache is served on any.
    """
    monkeypatch.setattr(eligibility, "_source_problem", lambda target: None)
    for device, state, reason in (
        (Gpu("NVIDIA A100", (8, 0)), State.ARMED, "not measured on sm_80"),
        (Gpu("Z100SM", (9, 0), cuda=False), State.REFUSED, "not an NVIDIA GPU"),
        (Gpu("Radeon 8060S Graphics", (11, 5), cuda=False), State.REFUSED, "not an NVIDIA GPU"),
    ):
        monkeypatch.setattr(gpu, "_told", [device])
        where = Installed(sglang.HOST, "0.5.23", "")
        told = eligibility.check(sglang_decode.FEATURE, Setting("MLA_PATCH_DECODE", "on", "default"), where)
        assert told.state is state and reason in told.reason
