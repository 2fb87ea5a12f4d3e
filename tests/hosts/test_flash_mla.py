"""Real releases over a stand-in for FlashMLA: which calls the host's wrappers keep, and which ours serve."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import hosts
import pytest
from packaging.version import Version

from mla_patch.compat.sglang import flash_mla as sglang_flash_mla
from mla_patch.drive.sglang_fetch import fetch
from mla_patch.hooks.sglang import sched_meta
from mla_patch.hooks.sglang.flash_mla_providers import PREFILL_PROVIDERS, PROVIDERS

PACKAGED = ("0.5.3", "0.5.4")  # which take all of FlashMLA from the flash_mla package
RELEASES = (*PACKAGED, "0.5.5", "0.5.9", "0.5.11", "0.5.12", "0.5.13", "0.5.22", "0.5.23")
NEWER = ("0.5.13", "0.5.22", "0.5.23")
CPU_SECONDS = 230  # see budget.py
ALONE = "0.5.12 without flash_mla"
OWN = PROVIDERS[-1].when

# as in the wheels; the last field is sgl-flash-mla 1.0.0's
META = """
from dataclasses import dataclass

@dataclass
class FlashMLASchedMeta:
    @dataclass
    class Config:
        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: object
        extra_page_block_size: object
        extra_topk: object
        enable_batch_invariant: bool
    have_initialized: bool = False
    config: object = None
    tile_scheduler_metadata: object = None
    num_splits: object = None

"""

_ANY = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    from mla_patch.drive.sglang import Anything, Stub
    return Anything(name, (Stub,), {})
"""


def wrapper(name: str, params: tuple[str, ...], required: int) -> str:
    """A function with a release's parameters that answers with the names of what it was given."""
    given = [f"{one}=None" if i >= required else one for i, one in enumerate(params)]
    return f"def {name}({', '.join(given)}):\n    return {{k: 1 for k, v in locals().items() if v is not None}}\n"


def stand_in(folder: Path, release: str, package_too: bool) -> None:
    """The packages that the release takes FlashMLA from, with the signatures of the kernels of its time."""
    newer = release in NEWER
    package = folder / "flash_mla"
    if release in PACKAGED:
        package.mkdir()
        names = "flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata"
        (package / "__init__.py").write_text(f"from flash_mla.flash_mla_interface import {names}\n{_ANY}")
        inner = wrapper("get_mla_metadata", sglang_flash_mla._META, 3)
        inner += wrapper("flash_mla_with_kvcache", sglang_flash_mla._PACKAGE[1][0], 7)
        inner += wrapper("flash_mla_sparse_fwd", sglang_flash_mla._PREFILL, 4)
        (package / "flash_mla_interface.py").write_text(inner)
        return
    meta = META if release == "0.5.23" else META.replace("        enable_batch_invariant: bool\n", "")
    first = "    if cache_seqlens is None:\n        return FlashMLASchedMeta(), None\n"
    operators = ["fwd_kvcache_mla", *(["sparse_decode_fwd"] if newer else [])]
    kernel = folder / "sgl_kernel"
    kernel.mkdir()
    lines = [f'library.define("{name}(Tensor q) -> Tensor")' for name in operators]
    arguments = ", ".join(f"Tensor x{i}" for i in range(7 if newer else 5))
    lines.append(f'library.define("sparse_prefill_fwd({arguments}) -> Tensor")')
    define = "import torch\nlibrary = torch.library.Library('sgl_kernel', 'FRAGMENT')\n"
    (kernel / "__init__.py").write_text(define + "\n".join(lines) + _ANY)
    params, _ = sglang_flash_mla._SGL_KERNEL[2 if release == "0.5.22" else 1 if newer else 0]
    source = (meta if newer else "") + wrapper("get_mla_metadata", sglang_flash_mla._META, 0 if newer else 3)
    if newer:
        source = source.replace("    return {k", first + "    return {k")
    source += wrapper("flash_mla_with_kvcache", params, 6 if newer else 7)
    source += wrapper(
        "flash_mla_sparse_fwd", sglang_flash_mla._PREFILL_NEWER if newer else sglang_flash_mla._PREFILL, 4
    )
    (kernel / "flash_mla.py").write_text(source)
    if not package_too:
        return
    package.mkdir()
    names = "FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata"
    (package / "__init__.py").write_text(f"from flash_mla.flash_mla_interface import {names}\n{_ANY}")
    inner = meta + "def get_mla_metadata(*args, **kwargs):\n    return FlashMLASchedMeta(), None\n"
    inner += "def get_mla_decoding_metadata(*args, **kwargs):\n    return {'cache_seqlens': 1}\n"
    params, _ = sglang_flash_mla._PACKAGE[2]
    if release == "0.5.23":  # the wheel has what the release's interface passes on
        inner += "def flash_mla_with_kvcache(**given):\n    return {k: 1 for k, v in given.items() if v is not None}\n"
        inner += "def flash_mla_sparse_fwd(*args, **given):\n    return {'sm_scale': args[3], **given}\n"
        names += ", get_mla_decoding_metadata, flash_mla_sparse_fwd"
        (package / "__init__.py").write_text(f"from flash_mla.flash_mla_interface import {names}\n{_ANY}")
    else:
        inner += wrapper("flash_mla_with_kvcache", params, 6)
    (package / "flash_mla_interface.py").write_text(inner)


def chosen() -> list[str]:
    asked = os.environ.get("HOSTS", "spread")
    found = [one for one in RELEASES if asked in ("spread", "all") or one in asked.replace(",", " ").split()]
    return [*found, *([ALONE] if "0.5.12" in found else [])]


@pytest.fixture(scope="module", params=chosen())
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    release = request.param.split()[0]
    folder = tmp_path_factory.mktemp("stand-in")
    stand_in(folder, release, request.param != ALONE)
    env = hosts.environment(release, folder)
    out = tmp_path_factory.mktemp("seen") / "seen.json"
    options = hosts.PYTHON_OPTIONS.get(release, ())
    return hosts.start("flash_mla_child", release, out, env=env, options=options) | {
        "release": release,
        "newer": release in NEWER,
        "alone": request.param == ALONE,
    }


@pytest.mark.parametrize("release", [one for one in hosts.chosen() if Version(one) >= Version("0.5.3")])
def test_backends_are_built_as_their_warm_ups_need_it(release: str) -> None:
    """From source, in every release."""
    root = fetch(release)[0]
    found = [one for one in sched_meta.targets(release) if one.name.endswith(".warmup")]
    assert len(found) == (3 if Version(release) >= Version("0.5.12") else 2)
    for target in found:
        tree = ast.parse(root.joinpath(*target.module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
        inits = {
            owner.name: [arg.arg for arg in method.args.args]
            for owner in tree.body
            if isinstance(owner, ast.ClassDef)
            for method in owner.body
            if isinstance(method, ast.FunctionDef) and method.name == "__init__"
        }
        owners = [name for name in BUILT[target.edit.__name__] if name in inits]
        assert [inits[name][:2] for name in owners] == [["self", "model_runner"]], (target.module, owners)


BUILT = {
    "warm_dense": ["FlashMLABackend"],
    "warm_v32": ["NativeSparseAttnBackend", "DeepseekSparseAttnBackend"],
    "warm_v4": ["DeepseekV4AttnBackend"],
}


def test_everybody_holds_ours(seen: dict[str, Any]) -> None:
    both = {"get_mla_metadata": True, "flash_mla_with_kvcache": True}
    packaged = seen["release"] in PACKAGED
    assert seen["ours"] == both | {"flash_mla_sparse_fwd": not packaged}
    assert seen["backend"] == both  # the backend binds both by value at its top
    assert (seen["feature"]["state"], seen["not taken"]) == ("applied", []), seen["feature"]
    assert not any(seen["restored"])
    assert seen["class restored"] == seen["newer"]
    if packaged:
        assert seen["class"] is None  # nobody looks for one there
    else:
        assert (seen["class"] == "mla_patch.flash_mla") == (not seen["newer"])


def test_who_serves(seen: dict[str, Any]) -> None:
    calls = seen["calls"]
    mine = {name: row["by"] for name, row in calls.items() if "by" in row}
    assert mine == {
        "sm_90 V3.2 64 heads": "host",
        "sm_90 V3.2 16 heads": "triton",
        "sm_90 V4 lengths, sinks": "host" if seen["newer"] else "triton",
        "sm_90 metadata": "host",
        "sm_120 V3.2 64 heads": "triton",
        "sm_120 V3.2 16 heads": "triton",
        "sm_120 V4 lengths, sinks": "triton",
        "sm_120 metadata": "triton",
    }
    for name, row in calls.items():
        if row.get("by") == "host":
            assert row["reason"] == [OWN], name
            assert "cache_seqlens" in row["with"] or "topk_length" in row["with"], name
        elif "error" in row:
            # 16-bit weights and the rounding of a bfloat16 result
            assert row["error"] < 4e-3 and not row["reason"], name
    assert calls["sm_90 class"]["is"] and calls["sm_120 class"]["is"]


def test_who_serves_sparse_prefill(seen: dict[str, Any]) -> None:
    calls = seen["prefill"]
    if seen["release"] in PACKAGED:
        assert not calls
        return
    assert {name: row["by"] for name, row in calls.items()} == {
        "sm_90 64 heads": "host",
        "sm_90 16 heads": "triton",
        "sm_90 sink, lengths": "host" if seen["newer"] else "triton",
        "sm_120 64 heads": "triton",
        "sm_120 16 heads": "triton",
        "sm_120 sink, lengths": "triton",
    }
    for name, row in calls.items():
        if row["by"] == "host":
            assert row["reason"] == [PREFILL_PROVIDERS[-1].when] and "sm_scale" in row["with"], name
        else:
            # 16-bit weights and the rounding of a bfloat16 result; statistics to the base 2, as the release's own
            assert max(row["errors"]) < 8e-3 and not row["reason"], name


def test_through_the_releases_own_backend(seen: dict[str, Any]) -> None:
    assert seen["through"]["served"] == 1 and seen["through"]["error"] < 4e-3
    assert ("through dense" in seen) == (seen["release"] in PACKAGED)
    if "through dense" in seen:
        assert seen["through dense"]["served"] == 1 and seen["through dense"]["error"] < 4e-3


def test_deterministic_inference(seen: dict[str, Any]) -> None:
    """The same query alone and beside others, bit for bit, through the release's own sparse decode."""
    assert seen["company"]["on"] == {"differs": 0, "served": 2}
    # as a rule ours splits keys by how many queries there are: a trial that could not show a broken promise
    assert seen["company"]["off"]["differs"] > 0 and seen["company"]["off"]["served"] == 2


def test_the_package(seen: dict[str, Any]) -> None:
    """Releases to 0.5.4 call the flash_mla package, of 0.5.12 DeepSeek V4; all else is sgl_kernel's."""
    if seen["release"] in PACKAGED or (seen["release"] == "0.5.12" and not seen["alone"]):
        assert seen["package"] == {"get_mla_metadata": True, "flash_mla_with_kvcache": True}
        assert seen["package call"]["by"] == "triton" and seen["package call"]["error"] < 4e-3
    else:
        assert "package" not in seen


def test_deepseek_v4_of_0512(seen: dict[str, Any]) -> None:
    """Its own forward, over the package and without it."""
    if seen["release"] != "0.5.12":
        assert "v4" not in seen
        return
    assert seen["v4"]["served"] == 1
    assert seen["v4"]["error"] < 4e-3 and seen["v4"]["without a key"] == 0


def test_what_is_compiled_before_graphs(seen: dict[str, Any]) -> None:
    """For a chip that FlashMLA has no build for, from what each release's backends set."""
    release, v4 = seen["release"], Version(seen["release"]) >= Version("0.5.12")
    want = {"warm_dense": [["dense", "16", "torch.bfloat16", "64"]]}
    heads = "16" if release == "0.5.5" else "64"
    prefill = ["prefill", heads, "576", "torch.bfloat16", "False"]
    padded = "16" if Version(release) < Version("0.5.11") else "64"
    want["warm_v32"] = [["sparse", padded]]
    if release not in PACKAGED:
        want["warm_v32"] += [[*prefill, "False"], *([[*prefill, "True"]] if seen["newer"] else [])]
    if v4:
        want["warm_v4"] = []
        for count in ("64", "128"):
            want["warm_v4"] += [["sparse", count, "(128,)", extra] for extra in ("()", "(64,)", "(2,)")]
            if release != "0.5.12":
                want["warm_v4"].append(["prefill", count, "512", "torch.bfloat16", "True", "True"])
    assert seen["warm"] == want
