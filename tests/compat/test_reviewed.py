"""The tables of compat against what was read in every reviewed release (tests/hosts/reviewed.json), without a network.

Each boundary is held from both sides: what a release's targets name is there as they say, and what is there of what any
release's targets name is named, unless an exception says why not.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from scratch import TESTS

from mla_patch.compat.eras import value_at
from mla_patch.compat.sglang import backends, deterministic, graphs
from mla_patch.compat.sglang import decode as compat
from mla_patch.compat.sglang import flash_mla as sglang_flash_mla
from mla_patch.compat.sglang import release as sglang
from mla_patch.compat.sglang import sparse_prefill as routes
from mla_patch.compat.sglang import tokenspeed as sglang_tokenspeed
from mla_patch.compat.types import Change, Edit
from mla_patch.hooks.sglang import decode as sglang_decode
from mla_patch.hooks.sglang import kv_cast as sglang_kv_cast
from mla_patch.hooks.sglang import kv_indices as sglang_kv_indices
from mla_patch.hooks.sglang import sched_meta as sglang_sched_meta
from mla_patch.hooks.sglang import sparse_prefill as sglang_sparse_prefill
from mla_patch.hooks.sglang import tokenspeed as tokenspeed_hook
from mla_patch.hooks.sglang.edits import graphs as sglang_graphs
from mla_patch.hooks.sglang.edits import server_args, v4_route
from mla_patch.hooks.sglang.edits.scales import leave_scales_out, watch_scales

TOLD = json.loads(TESTS.joinpath("hosts", "reviewed.json").read_text())
RELEASES = tuple(TOLD["pins"])
V4 = "sglang.srt.layers.attention.deepseek_v4_backend"
FLASHMLA = "sglang.srt.layers.attention.flashmla_backend"
_FEATURES = (
    sglang_decode, sglang_kv_cast, sglang_kv_indices, sglang_sched_meta, sglang_sparse_prefill, tokenspeed_hook,
)  # fmt: skip
FEATURES = {hook.FEATURE.name: hook.FEATURE for hook in _FEATURES}
TABLES: dict[str, Callable[[str], tuple[Change, ...]]] = {name: one.targets for name, one in FEATURES.items()}
TABLES["graphs"] = sglang_graphs.step_targets


def at(release: str) -> Version:
    return Version(release)


def releases_of(table: str) -> list[str]:
    """Those in a feature's range."""
    host = FEATURES["decode" if table == "graphs" else table].host
    return [one for one in RELEASES if SpecifierSet(host.removeprefix("sglang")).contains(one)]


def function(module: str, name: str, release: str) -> tuple[str, ...] | None:
    """Its parameters in a release, or None where it is not defined there."""
    eras = TOLD["functions"].get(f"{module}:{name}", ())
    return next((tuple(era["params"].split()) for era in eras if release in era["releases"].split()), None)


def has_module(module: str, release: str) -> bool:
    return release in TOLD["modules"].get(module, "").split()


def takes_from(module: str, home: str, release: str) -> bool:
    return release in TOLD["imports"].get(f"{module} <- {home}", "").split()


def test_every_reviewed_release_was_read() -> None:
    assert set(RELEASES) == set(sglang.HOST.reviewed)


@pytest.mark.parametrize("table", TABLES)
def test_what_targets_name_is_there(table: str) -> None:
    for release in releases_of(table):
        entries: dict[str, list[Change]] = defaultdict(list)
        for target in TABLES[table](release):
            if not target.module.startswith("sglang."):
                continue  # the wheels' wrappers, below
            if target.kind == "edit":
                assert has_module(target.module, release), (release, target.module, target.name)
            else:
                entries[target.entry or target.name].append(target)
        for name, some in entries.items():
            found = [function(one.module, one.name, release) for one in some]
            assert [one.params for one in some] == found, (release, name)


# (table, function) -> why a release that has it is not asked for it
LEFT = {
    ("sparse_prefill", f"{V4}:DeepseekV4AttnBackend.forward"): lambda r: at(r) >= at("0.5.13"),  # calls the next
    # from 0.5.21 the release's own route is right, and has our kernels one by one
    ("sparse_prefill", f"{V4}:DeepseekV4AttnBackend._forward_prefill_sparse"): lambda r: bool(
        function(V4, "DeepseekV4AttnBackend._forward_attention", r)
    ),
}


@pytest.mark.parametrize("table", ["decode", "kv_cast", "kv_indices", "sched_meta", "sparse_prefill"])
def test_what_is_there_is_named(table: str) -> None:
    asked = {release: TABLES[table](release) for release in releases_of(table)}
    every = {(one.module, one.name) for some in asked.values() for one in some if one.kind != "edit"}
    for release, some in asked.items():
        named = {(one.module, one.name) for one in some}
        there = {place for place in every if function(*place, release) is not None}
        for module, name in sorted(there - named):
            left = LEFT.get((table, f"{module}:{name}"))
            assert left is not None and left(release), f"{release} has {module}.{name}, which {table} leaves out"


def test_scales_of_decode() -> None:
    """Read with from 0.5.10, where nothing divides what is stored; from 0.5.12 by the release's own MLA decode."""
    for release in RELEASES:
        (decode,) = (one for one in sglang_decode.triton_targets(release) if one.kind == "call")
        params = function(decode.module, decode.name, release)
        assert params is not None
        edits = [one.edit for one in sglang_decode.triton_targets(release) if one.name.endswith(".scales")]
        assert compat.has_mla_decode(release) == ("has_mla" in params), release
        want = [] if "k_scale" not in params else [watch_scales if "has_mla" in params else leave_scales_out]
        assert edits == want, release


def test_scales_of_flashmla() -> None:
    for release in RELEASES:
        reads = release in TOLD["mentions"][f"{FLASHMLA} k_scale"].split()
        assert backends.flashmla_reads_scales(release) == reads, release


def test_deterministic_inference() -> None:
    for release in RELEASES:
        assert deterministic.has_mode(release) == has_module(deterministic.OPS, release), release


def test_where_flashmla_is_taken_from() -> None:
    """The backend imports the wrappers from where they are replaced; DeepSeek V4 of 0.5.12 from the package."""
    homes = (sglang_flash_mla.INTERFACE, sglang_flash_mla.SGL_KERNEL)
    for release in releases_of("sched_meta"):
        some = sglang_sched_meta.targets(release)
        named = {one.module for one in some if one.kind == "call"} & {*homes, sglang_flash_mla.PACKAGE}
        taken = {home for home in homes if takes_from(FLASHMLA, home, release)}
        package = {sglang_flash_mla.PACKAGE} if takes_from(FLASHMLA, "flash_mla", release) else set()
        assert named == taken | package, release
        # with the package or, where it is not installed, in its place
        v4 = [one for one in some if one.module == "flash_mla" or one.name == "flash_mla"]
        assert bool(v4) == takes_from(V4, "flash_mla", release), release
        edits = {one.module: one.edit for one in some if one.name.endswith(".warmup")}
        warmed = set(edits)
        for module, edit in edits.items():
            asked = V4 if module == V4 else FLASHMLA
            (home,) = (one for one in (*homes, "flash_mla") if takes_from(asked, one, release))
            want = sglang_flash_mla.PACKAGE if home == "flash_mla" else home
            assert edit.args[0] == want, (release, module)  # type: ignore[union-attr]
        assert (V4 in warmed) == has_module(V4, release), release
        sparse = f"sglang.srt.layers.attention.{'d' if has_module(DSA, release) else 'n'}sa_backend"
        assert {one for one in warmed if one.endswith("sa_backend")} == {sparse}, release


DSA = "sglang.srt.layers.attention.dsa_backend"


def test_which_wheels_have_the_newer_api() -> None:
    for release in releases_of("sched_meta"):
        name, _, version = TOLD["pins"][release].partition(" ")
        newer = name == "sglang-kernel" and Version(version) >= Version("0.4.3")
        some = [one for one in sglang_sched_meta.targets(release) if one.name == "get_mla_metadata"]
        assert {one.bind.args[0].newer for one in some} == {newer}, release  # type: ignore[union-attr]


@pytest.mark.parametrize("wheel", TOLD["wheels"])
def test_the_wheels_wrappers(wheel: str) -> None:
    told = TOLD["wheels"][wheel]
    assert told["newer"] == "True"
    if told["module"] == sglang_flash_mla.PACKAGE:
        return  # which the release's interface calls; its parameters are read with the release
    variants = {params for params, newer in sglang_flash_mla._SGL_KERNEL if newer}
    assert tuple(told["flash_mla_with_kvcache"].split()) in variants
    assert tuple(told["get_mla_metadata"].split()) == sglang_flash_mla._META
    assert tuple(told["flash_mla_sparse_fwd"].split()) == sglang_flash_mla._PREFILL_NEWER


def test_routes_of_sparse_prefill() -> None:
    for release in releases_of("sparse_prefill"):
        v4, own = has_module(V4, release), function(V4, "DeepseekV4AttnBackend._forward_prefill_sparse", release)
        assert value_at(routes.ASKED_BY_RELEASE, release) == (release in TOLD["switch"]["off"].split()), release
        later = function(V4, "DeepseekV4AttnBackend._forward_attention", release) is not None
        served = dict(sglang_sparse_prefill.serves(release, (9, 0), 64, False))["V4"].partition(";")[0]
        want = "the release's route" if later else "our route"
        want = routes.V4.NO_MODEL.value if not v4 else "over pages, by the release" if own is None else want
        assert served == want, release
        some = sglang_sparse_prefill.targets(release)
        planned = any(isinstance(one, Edit) and one.edit is v4_route.route_prompts for one in some)
        assert planned == (own is not None and not later), release


def test_tokenspeed_is_the_releases_own() -> None:
    own = sglang_tokenspeed.OWN_BACKEND
    for release in releases_of("tokenspeed"):
        assert sglang_tokenspeed.is_native(release) == has_module(own.module, release), release
        names = [one.edit for one in tokenspeed_hook.targets(release) if one.name == "ServerArgs.backend"]
        # its name stays the release's from then on, also where the backend has gone
        known = at(release) >= min(map(at, TOLD["modules"][own.module].split()))
        assert names == [server_args.accept_other_backend_name if known else server_args.accept_backend_name], release


def test_graphs_by_size_or_by_key() -> None:
    for release in releases_of("graphs"):
        (edit,) = (one for one in sglang_graphs.step_targets(release) if one.name == "graphs")
        by_key = function(graphs.BY_KEY, "DecodeCudaGraphRunner._make_graph_key", release) is not None
        by_size = function(graphs.BY_SIZE, "CudaGraphRunner.capture_one_batch_size", release) is not None
        assert (edit.edit is sglang_graphs.arms_by_key, edit.edit is sglang_graphs.arms_by_size) == (
            by_key,
            by_size,
        )


def test_modules_that_tell_a_release() -> None:
    for first, names in sglang.HOST.marks[:-1]:  # the last stands for all before it
        for name in names:
            assert min(map(at, TOLD["modules"][name].split())) == at(first), name
