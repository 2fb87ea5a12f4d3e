"""Decode of FlashAttention-3, FlashInfer MLA and FlashMLA in real SGLang releases on a CPU, beside the engine's own."""

from __future__ import annotations

from pathlib import Path

import hosts
import pytest
from packaging.version import Version

from mla_patch.hooks.sglang import decode_backends as sglang_decode_backends

CPU_SECONDS = 500  # see budget.py

pytestmark = [pytest.mark.network, pytest.mark.slow]

ERAS = ("0.5.1", "0.5.3", "0.5.5", "0.5.7", "0.5.9", "0.5.11", "0.5.13", "0.5.15", "0.5.16", "0.5.18", "0.5.20")
ERAS += ("0.5.22", "0.5.23")
EVERY = set(hosts.chosen()) == set(hosts.REVIEWED)
SPREAD = hosts.chosen() == hosts.SPREAD
RELEASES = [
    one for one in hosts.REVIEWED if (one in hosts.chosen() and (EVERY or one in ERAS)) or (SPREAD and one in ERAS)
]
# asserts at import that its kernels are compiled ones, which under the interpreter none is
PYTHON_OPTIONS = hosts.PYTHON_OPTIONS | {"0.5.3": ["-O"], "0.5.2": ["-O"]}
NAMES = ("fa3", "flashinfer", "flashmla")
POOL = 1024 * 512  # values of a layer's latents without rope


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def seen(release: str, kept: Path) -> dict:
    """What a process of its own saw (see ``backends_child.py``), told again when asked again."""
    return hosts.kept_by("backends_child", release, kept, options=PYTHON_OPTIONS.get(release, ()))


def is_right(step: dict, apart: float = 1e-3) -> list[str]:
    """What is wrong with one step by both arms; nothing where it is as it should be."""
    found = {
        "served": step["served"] == 1 and not step["declined"],
        "shape or dtype": step["alike"],
        "the token was not stored": step["stored"],
        "other bytes were stored": step["pools differ"] == 0,
        # float16 results, and products of 16-bit numbers or better
        "error": step["error"]["ours"] < 1e-3,
        "apart from the engine's": step["apart"] < apart,
    }
    return [what for what, fine in found.items() if not fine]


@pytest.mark.parametrize("cache", ["e4m3", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_eager_and_at_a_replay(release: str, seen: dict, name: str, cache: str) -> None:
    told = seen["backends"][name][cache]
    # FlashMLA rounds the query to e4m3
    rounds = name == "flashmla" and cache == "e4m3"
    for phase in ("eager", "replay"):
        assert is_right(told[phase], 0.05 if rounds else 1e-3) == [], phase
        assert (told[phase]["error"]["host"] > 5e-3) is rounds, phase


@pytest.mark.parametrize("cache", ["e4m3", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_at_the_lengths_of_a_capture(release: str, seen: dict, name: str, cache: str) -> None:
    """Some releases fill the table at replay alone, so the engine's own result is the measure."""
    step = seen["backends"][name][cache]["capture"]
    assert (step["served"], step["alike"], step["stored"], step["pools differ"]) == (1, True, True, 0)
    assert step["apart"] < 1e-3


@pytest.mark.parametrize("name", ["fa3", "flashinfer"])
def test_the_engine_converts_its_whole_pool(release: str, seen: dict, name: str) -> None:
    """Or there is no reason for ours: the kernel behind it is given all slots in 16 bits."""
    assert seen["backends"][name]["e4m3"]["converted"] == POOL


def test_the_traps(release: str, seen: dict) -> None:
    for cache in ("e4m3", "float16"):
        told = seen["backends"]["flashinfer"][cache]
        assert told["stale"] == [0, 1, 2, 3] and told["lengths"] == [0, 66, 75, 76]
    assert seen["backends"]["flashmla"]["e4m3"]["captured table"] == {"columns": 1, "equal": True}


def test_16_bit_caches_wait_to_be_asked_for(release: str, seen: dict) -> None:
    step = seen["by default"]
    assert (step["served"], step["pools differ"]) == (0, 0)
    assert step["declined"] == {f"fa3: {sglang_decode_backends.SIXTEEN_BITS}": 1}


@pytest.mark.parametrize("name", NAMES)
def test_draft_steps_of_one_token(release: str, seen: dict, name: str) -> None:
    told = seen["drafts"][name]
    assert is_right(told["one token"], 0.05 if name == "flashmla" else 1e-3) == []
    if name == "fa3":
        assert told["lengths"] == [7, 72, 35]  # the drafts before this one, too
        assert told["two tokens"] == "fa3: a cascade of draft tokens (topk 2)"


@pytest.mark.parametrize("step", ["capture, step 0", "capture, step 1", "replay, step 0", "replay, step 1"])
def test_flashinfers_draft_steps_under_graphs(release: str, seen: dict, step: str) -> None:
    """The lengths of each step lie in a row of the buffers that all draft steps share."""
    told, number = seen["draft graphs"][step], int(step[-1])
    lens = (1, 1, 1) if step.startswith("capture") else (66, 9, 1)
    assert told["lengths"] == [length + number + 1 for length in lens]
    assert is_right(told) == []


def test_backends_that_hold_one_inside(release: str, seen: dict) -> None:
    """They pass save_kv_cache by position: ours stores nothing where it is False."""
    told = seen["hybrids"]
    assert told["HybridAttnBackend"] == [[1, False], [2, True]]
    linear = told["HybridLinearAttnBackend"]
    assert linear == [[1, False], [2, True]] if Version(release) >= Version("0.5.2") else "No module named" in linear


def test_fa3_prompts_beside_triton_decode(release: str, seen: dict) -> None:
    """docs/hopper.md: --prefill-attention-backend fa3 --decode-attention-backend triton."""
    assert seen["mixed"] == {"DECODE": "triton", "EXTEND": "fa3", "MIXED": "fa3", "TARGET_VERIFY": "fa3"}


def test_flashmlas_scale_is_read_by_neither_arm(release: str, seen: dict) -> None:
    step = seen["scaled"]
    assert is_right(step, 0.05) == [] and step["descale"] == 1.0


def test_warm_ups_know_what_will_be_asked(release: str, seen: dict) -> None:
    """Once for each backend, though FlashMLA's constructor calls FlashInfer's."""
    known = ["cpu", "2", "torch.float16", "torch.float8_e4m3fn", "8"]
    page = {"fa3": "64", "flashinfer": "0", "flashmla": "64"}
    assert seen["warmed"] == [[name, *known, page[name]] for name in NAMES]


def test_counts_are_told_by_backend_and_restore_gives_the_engine_back(release: str, seen: dict) -> None:
    row = seen["feature"]
    assert (row["state"], row["reason"], sum(row["served_by"].values())) == ("applied", "", row["served"])
    assert set(row["served_by"]) == {
        "FlashAttentionBackend.forward_decode", "FlashInferMLAAttnBackend.forward_decode",
        "FlashMLABackend.forward_decode",
    }  # fmt: skip
    replaced = {one["name"]: one["replaced_by"] for one in row["targets"] if one["replaced_by"]}
    assert {"FlashAttentionBackend.warmup", "FlashInferMLAAttnBackend.warmup", "FlashMLABackend.warmup"} < set(replaced)
    assert ("FlashMLABackend.scales" in replaced) == (Version(release) >= Version("0.5.6"))
    assert {name: served for name, (served, _) in seen["restored"].items()} == dict.fromkeys(NAMES, 0)
    assert not seen["cuda initialized"]


def test_no_process_takes_long(release: str, seen: dict) -> None:
    """Beside the import: 15 s on the machine of CI, of which a busy one makes more."""
    assert seen["seconds"]["steps"] < 60
