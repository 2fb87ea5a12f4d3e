"""The tokenspeed backend in real SGLang releases on a CPU, over a stand-in for its package that checks every argument;
and the real package's wheels, which are looked at for the names that are used."""

import ast
import subprocess
import sys
from pathlib import Path

import hosts
import matrix
import pytest
from tokenspeed_runs import STEPS, environment, faults, name_in, row, run, steps_of

from mla_patch.drive import sglang_fetch
from mla_patch.hooks.sglang import tokenspeed as sglang_tokenspeed

CPU_SECONDS = 200  # see budget.py

pytestmark = [pytest.mark.network, pytest.mark.slow]

ERAS = ("0.5.1", "0.5.3", "0.5.5", "0.5.9", "0.5.11", "0.5.12", "0.5.16", "0.5.23")
EVERY = set(hosts.chosen()) == set(hosts.REVIEWED)
RELEASES = [one for one in hosts.chosen() if EVERY or one in ERAS]
WHEELS = ("0.1.1", "0.1.8", "2.0.4")


@pytest.mark.parametrize("release", RELEASES)
def test_the_arguments(release: str, kept: Path) -> None:
    told, name = run(release, kept, "package")["arguments"], name_in(release)
    assert {"--attention-backend", "--decode-attention-backend", "--prefill-attention-backend"} <= set(told["options"])
    assert (told["parsed"], told["backend"]) == (name, "trtllm_mla")
    assert (told["mark"], told["mark elsewhere"], told["not asked"]) == (name, name, False)
    assert told["refused"] == [
        f"{name} reads an fp8 cache: set --kv-cache-dtype fp8_e4m3, found auto",
        f"{name} reads pages of 32 or 64 tokens: set --page-size 64, found 16",
        f"--decode-attention-backend trtllm_mla beside {name}: one of the two, not both",
        f"{name}, decode by tokenspeed_mla: its kernels need compute capability 10.x, found "
        "compute capability 12.0 (NVIDIA RTX PRO 6000); MLA_PATCH_TOKENSPEED_DECODE chooses another",
    ]


@pytest.mark.parametrize("release", RELEASES)
def test_the_backend_becomes_ours(release: str, kept: Path) -> None:
    seen, name = run(release, kept, "package"), name_in(release)
    assert (seen["feature"]["state"], seen["cuda initialized"]) == ("applied", False), seen["feature"]
    assert (seen["unmarked"], seen["ours"], seen["class name"]) == (True, True, "TRTLLMMLABackend")
    assert seen["drafts"] and all(seen["drafts"])
    assert seen["refused cache"] == f"{name}: the cache is torch.bfloat16: set --kv-cache-dtype fp8_e4m3"
    assert seen["refused page"] == f"{name}: pages of 128 tokens, expected 32 or 64: set --page-size 64"
    assert "k_scale_float 0.5, expected 1" in seen["scaled"]
    # 16 heads, at least 8 query tokens of each request; one for all backends of the device
    assert f"mla-patch: {name}: decode by tokenspeed_mla, prefill by tokenspeed_mla" in seen["said"]
    # 0.5.1 prefills by FlashInfer: nothing to wait for
    assert any("compiling its prefill" in line for line in seen["said"]) is (release != "0.5.1")
    assert (seen["restored"], seen["flashinfer restored"]) == (True, True)


ASKED = [(one, "package") for one in RELEASES]
# without and with the host's override points
ASKED += [(one, "example") for one in RELEASES if EVERY or one in ("0.5.9", "0.5.23")]


@pytest.mark.parametrize("release, by", ASKED)
def test_the_hosts_own_forward_methods(release: str, by: str, kept: Path) -> None:
    seen = run(release, kept, by)
    assert set(STEPS) & set(seen) == steps_of(release)
    assert faults(release, seen, by, "cpu") == []


SEEN = {"error": 1e-4, "dtype": "torch.float32", "served": 1, "captured": 0, "calls": [{"call": "decode"}]}


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({}, None),
        ({"error": float("nan")}, "decode: error nan"),
        ({"served": 0}, "decode: served 0, captured 0"),
        ({"captured": 1}, "decode: served 1, captured 1"),
        ({"dtype": "torch.bfloat16"}, "decode: torch.bfloat16"),
        ({"calls": []}, "decode: the package was asked for []"),
        ({"failed": "why"}, "decode: why"),
    ],
)
def test_faults_are_told(changes: dict, fault: str | None) -> None:
    assert faults("0.5.1", {"decode": SEEN | changes}, "package", "cpu") == ([] if fault is None else [fault])


def test_faults_of_a_graph_and_of_what_is_missing() -> None:
    again = SEEN | {"calls": []}
    seen = {"decode": again, "decode again": again | {"served": 2, "captured": 1}}
    assert faults("0.5.1", seen, "example", "cuda") == []
    assert faults("0.5.1", seen, "example", "cpu") == ["decode again: served 2, captured 1"]
    assert faults("0.5.2", seen, "example", "cuda") == ["no prompts"]


@pytest.mark.parametrize("provider, says", [("package", "is for CPUs alone"), ("example", "torch sees no GPU")])
def test_a_gpu_that_cannot_be(provider: str, says: str, tmp_path: Path) -> None:
    command = [sys.executable, str(hosts.HERE / "tokenspeed_child.py"), "0.5.11", "seen.json", "--device", "cuda"]
    env = environment("0.5.11") | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, "--provider", provider], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and says in done.stderr and not (tmp_path / "seen.json").exists()


@pytest.mark.parametrize("release", RELEASES)
def test_support_matrix_is_current(release: str, kept: Path) -> None:
    committed = matrix.PATH.read_text(encoding="utf-8").splitlines()
    stale = "docs/support-matrix.md is stale: python tests/hosts/matrix.py --write"
    assert row(release, run(release, kept, "package")) in committed, stale


@pytest.fixture(scope="session", params=WHEELS)
def wheel(request: pytest.FixtureRequest) -> Path:
    """One real wheel, unpacked beside the host releases."""
    return sglang_fetch.fetch_package("tokenspeed-mla", request.param)


def functions(path: Path) -> dict[str, set[str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)}
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def test_the_wheels_have_the_names_that_are_used(wheel: Path) -> None:
    root = wheel / "tokenspeed_mla"
    found = {**functions(root / "mla_decode.py"), **functions(root / "mla_prefill.py"), **functions(root / "utils.py")}
    for name, names in sglang_tokenspeed._USED.items():
        assert names <= found[name], name
        assert f'"{name}",' in (root / "__init__.py").read_text()
    assert found["warmup_compile_prefill"] >= sglang_tokenspeed._WARM
    assert set(sglang_tokenspeed._PRIVATE) - {"_compiled_kernels"} <= set(found)
    # natural: what the host's merge of prefix chunks takes
    assert "lse = cute.math.log(" in (root / "fmha.py").read_text()


def test_the_wheels_say_what_they_lack_on_a_cpu(wheel: Path, tmp_path: Path) -> None:
    code = "from mla_patch.hooks.sglang.tokenspeed import package, problem\nprint(problem(None))\npackage()"
    env = environment("0.5.11") | {"PYTHONPATH": str(wheel)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "None\n"
    last = done.stderr.strip().splitlines()[-1]
    version = wheel.name.removeprefix("tokenspeed-mla-")
    assert last.startswith(
        f"ImportError: tokenspeed_mla {version} cannot be used: its requirements are not installed ("
    )
