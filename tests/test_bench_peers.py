"""The benchmarks beside peers: on a CPU every section runs, and what is wrong is refused, not timed."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from scratch import ROOT

from mla_patch.compat.triton import interpreted
from mla_patch.kernels.layouts import V4, V32

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")


@pytest.fixture
def load(monkeypatch):
    """A benchmark as a measuring script loads it: by its path, from anywhere."""

    def load_(name: str) -> ModuleType:
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.delitem(sys.modules, "peers", raising=False)
        spec = importlib.util.spec_from_file_location(f"arm_{name}", ROOT / "bench" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.DEVICE = "cpu"
        return module

    return load_


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    def run_(module: ModuleType, *args: str) -> dict[str, Any]:
        place = tmp_path / "told.json"
        monkeypatch.setattr(sys, "argv", ["bench", *args, "--rounds", "2", "--json", str(place)])
        module.main()
        return json.loads(place.read_text()) | {"shown": capsys.readouterr().out}

    return run_


def served(arm: dict[str, Any]) -> bool:
    return "refused" not in arm and len(arm["us"]) == 2 and min(arm["us"]) > 0 and arm["error"] < 4e-3


def test_sparse_decode(load, run, monkeypatch):
    module = load("sparse_decode")
    monkeypatch.setattr(module, "CASES", [(V32, 3, 2, 40, 0, 128), (V4, 2, 3, 33, 8, 64)])
    told = run(module)
    assert [row["case"].split("   ")[0] for row in told["rows"]] == [
        "V3.2 batch 3 heads 2 topk 40+0",
        "V4 batch 2 heads 3 topk 33+8",
    ]
    assert told["rows"][0]["bytes"] == 3 * 40 * 656 and told["gpu"].startswith("no GPU")
    for row in told["rows"]:
        assert served(row["arms"]["ours"])
        assert row["arms"]["flash_mla"]["refused"] == "ModuleNotFoundError: No module named 'flash_mla'"
    assert "spread" in told["shown"] and "No module named 'sgl_kernel'" in told["shown"]


def test_an_arm_of_the_measuring_script(load):
    module = load("sparse_prefill")
    q, kv = torch.randn(3, 2, 576).bfloat16(), torch.randn(50, 1, 576).bfloat16()
    case = SimpleNamespace(q=q, kv=kv, indices=torch.randint(0, 50, (3, 1, 20)).int(), sm_scale=0.05)
    call, out = module.sparse_prefill(case)
    assert out.isnan().all()
    call()
    assert out.shape == (3, 2, 512) and torch.isfinite(out).all()


def a_case(peers, count=100):
    picks = peers.pick(count)
    return SimpleNamespace(picks=picks, want=torch.ones(len(picks), 2, 4).double())


def test_at_most_eight_queries_are_compared(load):
    load("sparse_prefill")
    peers = sys.modules["peers"]
    for count in (1, 2, 5, 4096):
        picks = peers.pick(count)
        assert len(picks) <= 8 and picks[0] == 0 and picks[-1] == count - 1
    case = a_case(peers)
    out = torch.ones(100, 2, 4)
    assert peers.error(case, (out,)) == 0
    out[-1, 0, 0] = 2
    assert peers.error(case, (out,)) == pytest.approx(8**-0.5)


def test_what_is_wrong_has_no_time(load):
    load("sparse_prefill")
    peers = sys.modules["peers"]
    case, right = a_case(peers), torch.ones(100, 2, 4)
    hole = right.clone()
    hole[next(t for t in range(100) if t not in case.picks)] = torch.nan
    arms = {
        "right": lambda case: lambda: (right,),
        "off": lambda case: lambda: (right * 1.03,),
        "nan": lambda case: lambda: (hole,),
    }
    table = peers.measure(case, arms, 3, 1)
    assert len(table["right"]["us"]) == 3 and table["right"]["error"] == 0
    assert table["off"]["refused"].startswith("RuntimeError: error 0.0")
    assert table["nan"]["refused"] == "AssertionError: not every row is finite"
