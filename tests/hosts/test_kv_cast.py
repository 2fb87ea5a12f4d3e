"""Real releases: prefix hits, target verify and draft extend of the FA3 and FlashInfer backends over an fp8 cache, on a
CPU. One process for each release; see kv_cast_child.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hosts
import pytest

from mla_patch.compat.sglang import kv_cast as compat

CPU_SECONDS = 140  # see budget.py

RELEASES = ("0.5.1", "0.5.5", "0.5.9", "0.5.11", "0.5.13", "0.5.16", "0.5.18", "0.5.22", "0.5.23")
SPREAD = ("0.5.1", "0.5.11", "0.5.13", "0.5.18", "0.5.23")  # every way to find the pool, the pages and the lengths
POOL = 1024 + 64  # rows
LARGEST = POOL * 576  # values of a layer's pool

# step -> rows of the workspace, rows that are written: whole pages of those that the requests name
PACKED = {
    "fa3 page 1 prompt": (3 * 130, 70 + 130 + 5),
    "fa3 page 1 verify": (3 * 134, 74 + 134 + 9),
    "fa3 page 1 draft extend": (3 * 130, 70 + 130 + 5),
    "fa3 page 1 one request": (400, 134),  # captured: as wide as the context
    "fa3 page 1 tree": (3 * 130 + 12 * 4, 70 + 130 + 5 + 3 * (1 + 2 + 2 + 2)),
    "fa3 page 16 prompt": (3 * 9 * 16, (5 + 9 + 1) * 16),
    "fa3 page 16 verify": (3 * 9 * 16, (5 + 9 + 1) * 16),
    "fa3 page 16 draft extend": (3 * 9 * 16, (5 + 9 + 1) * 16),
    "flashinfer page 1 prompt": (205, 205),
    "flashinfer page 1 verify": (217, 217),
}
# captured with room for contexts that together are longer than the pool; replayed at 130, 1 and 66 tokens and 4 drafts
WHOLE = {
    "fa3 page 1 replayed verify": 134 + 5 + 70,
    "fa3 page 16 replayed verify": (9 + 1 + 5) * 16,
    "flashinfer page 1 replayed verify": 134 + 5 + 70,
}
DECLINED = {
    f"{backend} page 1 declined {name}": reason
    for backend in ("fa3", "flashinfer")
    for name, reason in (("parallel", compat.PARALLEL), ("many", compat.MANY), ("window", compat.WINDOW))
} | {"fa3 page 1 declined 16 bits": "a cache of float16: nothing to cast"}


def chosen() -> list[Any]:
    asked = os.environ.get("HOSTS", "spread")
    named = {"spread": SPREAD, "all": RELEASES}.get(asked, asked.replace(",", " ").split())
    found = [one for one in RELEASES if one in named]
    return [pytest.param(one, marks=[pytest.mark.network, pytest.mark.slow]) for one in found]


@pytest.fixture(scope="module", params=chosen())
def seen(request: pytest.FixtureRequest, kept: Path) -> dict[str, Any]:
    return hosts.kept_by("kv_cast_child", request.param, kept)


def test_both_backends_hold_ours(seen: dict[str, Any]) -> None:
    state = seen["state"]
    assert (state["state"], state["reason"]) == ("applied", "")
    assert all(target["replaced_by"] for target in state["targets"]), state
    assert set(seen["steps"]) == {*PACKED, *WHOLE, *DECLINED}
    assert state["captured"] == len(WHOLE) + 1


def test_the_hosts_kernel_gives_the_same_bits(seen: dict[str, Any]) -> None:
    """Over a workspace whose other rows are NaN; and the pool holds the new keys as before."""
    for name, step in seen["steps"].items():
        assert step["equal"] and step["same pool"], name
        assert step["served"] == (name not in DECLINED), name
        assert step["declined"] == ([DECLINED[name]] if name in DECLINED else []), name
        assert [call["width"] for call in step["ours"]["calls"]] == [c["width"] for c in step["host"]["calls"]], name


def test_nothing_of_the_pools_size_is_allocated_or_written(seen: dict[str, Any]) -> None:
    """The host allocates a copy of the pool in each of these steps."""
    for name, (rows, written) in PACKED.items():
        host, ours = seen["steps"][name]["host"], seen["steps"][name]["ours"]
        assert host["largest"] == LARGEST, name
        assert (ours["rows"], ours["written"]) == ([rows], [written]), name
        assert ours["largest"] == rows * 576 < LARGEST, name


def test_a_graph_with_room_for_the_pool_writes_what_is_named(seen: dict[str, Any]) -> None:
    """Its replays may name any row, so that the room is there; the host takes as much, and writes all of it."""
    for name, written in WHOLE.items():
        host, ours = seen["steps"][name]["host"], seen["steps"][name]["ours"]
        assert (ours["rows"], ours["written"]) == ([POOL], [written]), name
        assert ours["largest"] == host["largest"] == LARGEST, name


def test_restore_gives_the_host_back(seen: dict[str, Any]) -> None:
    assert seen["restored"] == [LARGEST, LARGEST] and seen["served after restore"] == 0
