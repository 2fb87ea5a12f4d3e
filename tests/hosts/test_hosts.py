"""Real SGLang releases on a CPU: ours is in every place it should be, and serves what the host's own code asks for."""

import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import budget
import hosts
import matrix
import preloaded
import pytest
from packaging.version import Version
from tokenspeed_runs import NATIVE

from mla_patch.compat.sglang import deterministic as sglang_deterministic
from mla_patch.drive.sglang_fetch import fetch

CPU_SECONDS = 1260  # see budget.py

pytestmark = [pytest.mark.network, pytest.mark.slow]


@pytest.fixture(params=hosts.chosen())
def release(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def seen(release: str, kept: Path, record_property) -> dict:
    seen = hosts.run(release, kept)
    record_property("sglang", {key: seen[key] for key in ("release", "holders", "ours", "seconds", "stubbed")})
    return seen


def test_applied(release: str, seen: dict) -> None:
    row = next(row for row in seen["features"] if row["name"] == "kv_indices")
    assert (row["state"], row["declined"]) == ("applied", {}), row
    assert {target["name"] for target in row["targets"] if target["replaced_by"]} == set(hosts.IMPORTERS)
    assert not seen["cuda initialized"]
    said = [line for line in seen["stderr"].splitlines() if "mla-patch:" in line]
    assert len([line for line in said if "refused: a living TritonAttnBackend has" in line]) == 1
    said = [line for line in said if "refused" not in line]
    assert len(said) == (1 if release in hosts.UNSCALED else 2), said  # of scales, once, and of the breaker
    assert "a test" in said[-1] and all("k_scale 0.5" in line for line in said[:-1])


def test_tokenspeed_stands_aside_where_the_release_has_it(release: str, seen: dict) -> None:
    (state,) = {row["state"] for row in seen["features"] if row["name"] == "tokenspeed"}
    assert state == ("native" if release in NATIVE else "applied")


def test_decode_applied(release: str, seen: dict) -> None:
    row = next(row for row in seen["features"] if row["name"] == "decode")
    served = len(seen["decode"]["ours"]) + 2 * len(seen["decode"]["ranks"]["ours"])
    assert (row["state"], row["declined"], row["served"]) == ("applied", {}, served), row
    # the other backends' modules are imported where they are driven, or not at all
    triton = [one for one in row["targets"] if one["module"].endswith((".triton_backend", ".decode_attention"))]
    assert all(target["replaced_by"] for target in triton)
    edits = [target["replaced_by"].rpartition(":")[2] for target in triton if target["kind"] == "edit"]
    own = "leave_scales_out" if release in hosts.MISREAD else "watch_scales"
    mode = [] if Version(release) < hosts.DETERMINISTIC else ["watch_decodes"]
    assert edits == [*([] if release in hosts.UNSCALED else [own]), *mode, "warm_decode"]
    assert seen["decode"]["holders"] == ["ours", "host's", "ours"]


def test_the_backend_tells_a_warm_up_what_it_will_decode(release: str, seen: dict) -> None:
    told = {"device": "cpu", "heads": "16", "dtype": "torch.float16", "cache_dtype": "torch.float8_e5m2"}
    assert seen["decode"]["warm"] == told | {"max_batch": "5", "splits": "0", "deterministic": "False"}
    assert seen["compiled"] == {"before": 0, "serving": 0}  # the interpreter compiles nothing
    # built before anything is captured, and nowhere else
    source = (fetch(release)[0] / "sglang/srt/layers/attention/triton_backend.py").read_text()
    assert "def __init__(\n        self,\n        model_runner: ModelRunner," in source


# of both homes that releases have had for their kernels
BENCHES = [("0.5.11", "decode"), ("0.5.11", "token-indices"), ("0.5.23", "decode"), ("0.5.23", "page-table")]


@pytest.mark.parametrize("version, kernel", [one for one in BENCHES if one[0] in hosts.chosen()])
def test_bench(version: str, kernel: str, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MLA_PATCH", "SGLANG_"))}
    command = [sys.executable, "-m", "mla_patch", "bench", kernel, "--fetch", version, "--json"]
    env |= {"CUDA_VISIBLE_DEVICES": "", "MLA_PATCH": "1"}  # which must not reach the process that measures
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["host"], told["right"]) == (f"SGLang {version}", True)
    for case in told["cases"]:
        assert case["us"]["host"] > 0 and case["us"]["ours"] > 0
        if kernel != "decode":
            assert case["equal"] == {"host": True, "ours": True}
            continue
        # the host's fp8 products, which the interpreter rounds toward zero: not ours, or the errors would be the same
        least, most = (0.01, 0.2) if case["case"].endswith("e4m3") else (0, 1e-3)
        assert least < case["error"]["host"] < most and 0 < case["error"]["ours"] < 1e-3


def test_only_the_triton_backend_takes_decode(release: str) -> None:
    """A name bound elsewhere at import would be seen, too; this one is taken when a backend is built."""
    root = fetch(release)[0]
    takes = hosts.importers_in(root, "decode_attention_fwd")
    assert takes - {"sglang.srt.layers.attention.wave_backend"} == {"sglang.srt.layers.attention.triton_backend"}


def test_decodes_what_was_stored(release: str, seen: dict) -> None:
    told = seen["decode"]
    assert set(told["again"]) == {"float16", "e4m3 k_scale 0.5"}
    for cache, ours in told["ours"].items():
        host, again = told["host"][cache], told["again"].get(cache, ours)  # two caches are run again
        assert (ours["served"], host["served"], again["served"]) == (1, 0, 1), cache
        # float16 results, and products of 16-bit numbers or better
        assert max(ours["error"], again["error"]) < 4e-3, cache
        # the host rounds probabilities to fp8, from 0.5.12 the query too, and the interpreter rounds toward zero
        assert host["error"] < {"float16": 1e-3, "e5m2": 0.1}.get(cache, 0.06), cache


def test_deterministic_inference(release: str, seen: dict) -> None:
    """The same request alone and beside others, bit for bit, through the host's own forward_decode."""
    for mode, row in seen["decode"]["company"].items():
        promised = mode == "deterministic" and Version(release) >= hosts.DETERMINISTIC
        decode = row["decode"]
        # as a rule ours serves, and its results depend on the others: a trial that could not show a broken promise
        assert (decode["differs"] > 0, decode["served"]) == (not promised, 0 if promised else 2), mode
        assert decode["declined"] == ({sglang_deterministic.REASON: 2} if promised else {}), mode
        assert decode["error"] < 1e-3, mode
        assert row["kv_indices"] == {"differs": 0, "served": 2}, mode


def test_the_release_says_which_decode_is_deterministic(release: str) -> None:
    """What the edit looks at, and what the processes of an engine inherit."""
    srt = fetch(release)[0] / "sglang/srt"
    backend = srt.joinpath("layers/attention/triton_backend.py").read_text()
    readers = [srt / "server_args.py", srt / "arg_groups/serving_hook.py"]
    arguments = "".join(path.read_text() for path in readers if path.exists())
    runner = srt.joinpath("model_executor/model_runner.py").read_text()
    has = Version(release) >= hosts.DETERMINISTIC
    assert ("self.enable_deterministic = (" in backend) == has
    # only forward_decode, which the edit watches, asks for a decode
    assert backend.count("self.decode_attention_fwd(") == backend.partition("def forward_decode(")[2].count(
        "self.decode_attention_fwd("
    )
    assert (sglang_deterministic.VARIABLE in arguments) == has
    assert ("enable_batch_invariant_mode()" in runner) == has
    if has:
        ops = srt / "batch_invariant_ops/batch_invariant_ops.py"
        assert "def is_batch_invariant_mode_enabled():\n    return _batch_invariant_MODE\n" in ops.read_text()


def test_decode_late(release: str, seen: dict) -> None:
    """Backends that were built before are given ours, and given back what they had."""
    steps = seen["decode"]["late"]["steps"]
    host = {"state": "off", "served": 0, "holds": ["host's"] * 2, "as it was": True}
    ours = {"state": "applied", "served": 2, "holds": ["ours"] * 2, "as it was": False}
    assert [step["step"] for step in steps] == ["built", "apply", "restore", "apply", "restore"]
    for step, want in zip(steps, [host, ours, host, ours, host], strict=True):
        assert {key: step[key] for key in want} == want, step
        assert step["error"] < 1e-3, step
    wrapped = seen["decode"]["late"]["wrapped"]
    assert (wrapped["state"], wrapped["as it was"]) == ("refused", True)
    assert (
        "a living TritonAttnBackend has a function late.<locals>.<lambda> for its decode_attention_fwd"
        in (wrapped["reason"])
    )


def test_the_hosts_splits_are_not_ours(release: str, seen: dict) -> None:
    """docs/tuning.md: what one split of the host's saves, and which flag gives it."""
    own = release not in (*hosts.UNSCALED, *hosts.MISREAD)  # an MLA decode
    assert seen["decode"]["splits"] == {"equal": True, "told 1": 256 if own else 1}
    backend = fetch(release)[0].joinpath("sglang/srt/layers/attention/triton_backend.py").read_text()
    assert ("triton_attention_split_tile_size" in backend) >= own


def test_decodes_a_ranks_part(release: str, seen: dict) -> None:
    """Decode context parallelism: the caller reads the log-sum-exp of the splits that it was left."""
    ours, host = seen["decode"]["ranks"]["ours"], seen["decode"]["ranks"]["host"]
    assert bool(ours) == (Version(release) >= Version("0.5.15"))
    for cache, row in ours.items():
        # one call for each rank; a request of which the rank has no key gives zeros, and a log-sum-exp left at -inf
        assert (row["served"], row["type"], host[cache]["served"]) == (2, "torch.float32", 0), cache
        assert row["error"] < 4e-3 and row["lse"] < 1e-3, (cache, row)
        assert row["empty"] == [0.0, 0.0, -float("inf")], cache
        # beside an 8-bit cache the host rounds the query, too, which the log-sum-exp shows
        assert host[cache]["error"] < (1e-3 if cache == "float16" else 0.15), (cache, host[cache])
        assert host[cache]["lse"] < (1e-3 if cache == "float16" else 0.5), (cache, host[cache])


def test_scales_are_read_as_they_are_stored(release: str, seen: dict) -> None:
    divided = release not in (*hosts.UNSCALED, *hosts.MISREAD)
    for arm in ("ours", "host", "again", "tripped"):
        row = seen["decode"][arm]["e4m3 k_scale 0.5"]
        assert row["stored"] == (0.5 if divided else 1.0), arm
        assert row["prefix"] == [row["stored"]] * 2, arm  # the host's extend kernel is told the same
    assert seen["decode"]["tripped state"] == "failed"
    assert seen["decode"]["tripped"]["e4m3 k_scale 0.5"]["served"] == 0
    # in the middle of a request: the host's arm, and the same latents
    assert seen["decode"]["tripped"]["e4m3 k_scale 0.5"]["error"] == seen["decode"]["host"]["e4m3 k_scale 0.5"]["error"]


def test_every_importer_holds_ours(release: str, seen: dict) -> None:
    root = fetch(release)[0]
    homes = {name: era["home"] for name, era in hosts.builders(release).items()}
    judged = {row["module"]: row["error"] for row in seen["holders"].values() if row["error"]}
    for module, error in judged.items():
        warnings.warn(
            f"SGLang {release}: {module} judged by its source, since it cannot be imported: {error}", stacklevel=1
        )
    wrong = [
        f"{row['module']} holds {row['holds']} as {row['builder']}"
        for row in seen["holders"].values()
        if row["holds"] != "ours"
        and not (row["error"] and hosts.comes_from(root, row["module"], row["builder"], homes[row["builder"]]))
    ]
    assert not wrong


def test_the_list_of_importers_is_whole(release: str) -> None:
    root = fetch(release)[0]
    for builder, era in hosts.builders(release).items():
        assert hosts.importers_in(root, builder) == set(era["importers"]), builder


def test_builds_what_the_host_builds(release: str, seen: dict) -> None:
    builders = set()
    for route, ours in seen["ours"].items():
        host = seen["host"][route]
        assert (ours["wrong"], ours["served"]) == (0, 1), route
        assert host["served"] == 0, route
        if (release, route) in hosts.FAULTS:
            assert host["wrong"] == host["differs"] > 0, f"{route}: no longer so: {hosts.FAULTS[release, route]}"
        else:
            assert (host["wrong"], host["differs"]) == (0, 0), route
        builders.add(ours["builder"])
    assert builders == set(hosts.IMPORTERS)  # each was driven by some route


def test_restore_and_apply_again(seen: dict) -> None:
    assert {row["holds"] for row in seen["holders restored"].values() if not row["error"]} == {"host's"}
    assert {row["holds"] for row in seen["holders applied again"].values() if not row["error"]} == {"ours"}
    assert {(row["wrong"], row["served"], row["differs"]) for row in seen["again"].values()} == {(0, 1, 0)}


def test_support_matrix_is_current(release: str, seen: dict) -> None:
    committed = matrix.PATH.read_text(encoding="utf-8").splitlines()
    missing = [row for row in matrix.rows(seen) if row not in committed]
    assert not missing, "docs/support-matrix.md is stale: python tests/hosts/matrix.py --write"


def test_support_matrix_says_what_its_writer_says() -> None:
    text = matrix.PATH.read_text(encoding="utf-8")
    assert [part for part in (matrix._HEAD, matrix._FOOT, matrix._TOKENSPEED) if part not in text] == []


@pytest.mark.parametrize("release", [one for one in hosts.chosen() if one in ("0.5.11", "0.5.23")])
def test_demo(release: str, tmp_path: Path) -> None:
    """Through the host's own forward_decode; where the host has an MLA decode and the GPU is not known, too."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLA_PATCH")}
    command = [sys.executable, "-m", "mla_patch", "demo", "--fetch", release, "--json"]
    done = subprocess.run(
        command, env=env | {"CUDA_VISIBLE_DEVICES": ""}, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["equal"], told["served"]) == (True, 4)
    assert {"decode_attention_fwd", *hosts.IMPORTERS} < {one["name"] for one in told["targets"]}
    errors = {row["route"]: row["error"] for row in told["routes"] if "error" in row}
    assert set(errors) == {f"triton_backend forward_decode, {cache}" for cache in ("float16", "e4m3")}
    for route, error in errors.items():
        assert error["ours"] < 1e-3, route
    assert errors["triton_backend forward_decode, e4m3"]["host"] > 5e-3  # the host rounds to fp8


def test_tests_of_one_process_are_in_one_worker(request: pytest.FixtureRequest) -> None:
    """And processes of two releases may be in two."""
    for item in request.session.items:
        if item.path.parent == hosts.HERE and {"seen", "kept"} & set(getattr(item, "fixturenames", ())):
            if "NOTSET" in item.nodeid:
                continue  # HOSTS has none of the releases that this test is about
            given = item.callspec.params
            release = given["release"] if "release" in given else given["seen"]
            assert hosts.process_of(item.nodeid) == f"tests/hosts/{item.path.name} {release}", item.nodeid
    assert hosts.process_of("a.py::b[0.5.1-c]") != hosts.process_of("a.py::b[0.5.11-c]")


def test_source_tells_where_a_name_comes_from(tmp_path: Path) -> None:
    package = tmp_path / "sglang"
    package.mkdir()
    for name, source in {
        "home": "def build(): pass",
        "again": "from sglang.home import build",
        "far": "try:\n    from sglang.again import build as b\nexcept ImportError:\n    b = None",
        "elsewhere": "from other import build",
        "ring": "from sglang.ring import build",
    }.items():
        (package / f"{name}.py").write_text(source)

    def told(module: str, name: str = "build") -> bool:
        return hosts.comes_from(tmp_path, f"sglang.{module}", name, "sglang.home")

    assert told("again") and told("far", "b")
    assert not told("elsewhere") and not told("ring") and not told("far") and not told("gone")
    assert hosts.importers_in(tmp_path, "build") == {f"sglang.{n}" for n in ("again", "far", "elsewhere", "ring")}


def test_forks_are_in_the_budget(tmp_path: Path) -> None:
    """Their time is counted once: while the process that they come from runs, and after it has ended."""
    script = tmp_path / "burn.py"
    script.write_text("import time\nend = time.process_time() + 1.5\nwhile time.process_time() < end: pass\n")
    preloaded.close()
    before = budget.cpu_seconds()
    env = {"PYTHONPATH": str(tmp_path)}
    assert preloaded.run([str(script)], env, tmp_path, (str(tmp_path),)).returncode == 0
    told, meanwhile = preloaded.cpu_seconds(), budget.cpu_seconds() - before
    assert 1.5 <= told <= meanwhile
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    preloaded.close()
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = now.ru_utime + now.ru_stime - children.ru_utime - children.ru_stime
    assert preloaded.cpu_seconds() == 0 and ended > 1.5
    assert abs(budget.cpu_seconds() - before - ended) < 1  # and not the forks' once more
