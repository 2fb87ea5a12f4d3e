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
from mla_patch.kernels.cache.dequantize import dequantize_k_cache_paged
from mla_patch.kernels.cache.layouts import V4, V32
from mla_patch.kernels.sparse import mla_sparse_prefill, sparse_decode

CPU_SECONDS = 160  # see budget.py

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
    assert told["rows"][0]["bytes"] == 3 * 40 * 656 and told["gpu"] == "Triton's interpreter: times say nothing"
    for row in told["rows"]:
        assert served(row["arms"]["ours"])
        assert row["arms"]["flash_mla"]["refused"] == "ModuleNotFoundError: No module named 'flash_mla'"
    assert "spread" in told["shown"] and "No module named 'sgl_kernel'" in told["shown"]


@pytest.fixture
def flash_mla(monkeypatch):
    """A package with FlashMLA's name, and every call of it."""
    calls = []

    def flash_mla_sparse_fwd(q, kv, indices, sm_scale):
        calls.append((q.shape, kv.shape, indices.shape))
        return mla_sparse_prefill(q, kv, indices, sm_scale)

    def flash_mla_with_kvcache(q, k_cache, *, softmax_scale, indices, tile_scheduler_metadata, **options):
        assert tile_scheduler_metadata == "schedule" and k_cache.dtype == torch.float8_e4m3fn
        given = {name: options.get(name) for name in ("attn_sink", "topk_length", "extra_k_cache")}
        given["extra_indices"] = options.get("extra_indices_in_kvcache")
        return sparse_decode(q, k_cache, indices, sm_scale=softmax_scale, **given)

    package = ModuleType("flash_mla")
    package.flash_mla_sparse_fwd = flash_mla_sparse_fwd
    package.flash_mla_with_kvcache = flash_mla_with_kvcache
    package.get_mla_metadata = lambda: ("schedule", None)
    monkeypatch.setitem(sys.modules, "flash_mla", package)
    return calls


@pytest.fixture
def sglang(monkeypatch):
    """SGLang's dequantisers by their names and parameters; what they were called for."""
    calls = []

    def dequantize_k_cache_paged_dsa(quant_k_cache, page_table_1_flattened, group_size=128):
        calls.append("V3.2")
        return dequantize_k_cache_paged(quant_k_cache, page_table_1_flattened)

    def dequantize_k_cache_paged_dsv4(quant_k_cache, page_table_1_flattened, page_size, out=None):
        calls.append("V4")
        return dequantize_k_cache_paged(quant_k_cache, page_table_1_flattened, page_size, out)

    for read in (dequantize_k_cache_paged_dsa, dequantize_k_cache_paged_dsv4):
        name = f"sglang.kernels.ops.attention.{read.__name__.rpartition('_')[2]}.dequant_k_cache"
        module = ModuleType(name)
        setattr(module, read.__name__, read)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


CPU = ("--device", "cpu")
OURS = {"all, ours", "pages, ours"}
PATH = OURS | {"all, flash_mla", "pages, flash_mla", "all by sglang, flash_mla"}


@pytest.mark.parametrize(
    "section, count, arms",
    [
        ("attention", 2, {"ours", "flash_mla"}),
        ("dequantise", 2, {"slots", "copy"}),
        ("indices", 2, {"ours"}),
        ("path", 2, PATH),
    ],
)
def test_every_section_of_sparse_prefill(section, count, arms, load, run, flash_mla, sglang, monkeypatch):
    module = load("sparse_prefill")
    if section == "path":  # slow in the interpreter, and the check has run every arm
        monkeypatch.setattr(module.peers, "time_us", lambda call, rep: 1.0)
    told = run(module, section, *CPU)
    assert len(told["rows"]) == count
    for row in told["rows"]:
        assert row["case"].startswith(section) and row["case"].split("   ")[0] in told["shown"]
        assert {name for name, arm in row["arms"].items() if served(arm)} == arms, row
        missing = [arm["refused"] for name, arm in row["arms"].items() if name not in arms]
        assert missing == ["ModuleNotFoundError: No module named 'sgl_kernel'"] * len(missing)
        assert section in ("attention", "path") or all(arm["error"] == 0 for arm in row["arms"].values())
    assert bool(flash_mla) == (section in ("attention", "path"))
    assert set(sglang) == ({"V3.2", "V4"} if section == "path" else set())


def test_a_package_that_wants_its_flag(load, run, flash_mla, monkeypatch):
    """sgl-flash-mla, whose kernels for sm_90 wait behind one."""
    module, package = load("sparse_prefill"), sys.modules["flash_mla"]

    def behind_a_flag(function):
        def call(*args, use_legacy=False, **kwargs):
            if not use_legacy:
                raise RuntimeError("only supported on SM100f")
            return function(*args, **kwargs)

        return call

    for name in ("flash_mla_sparse_fwd", "flash_mla_with_kvcache"):
        monkeypatch.setattr(package, name, behind_a_flag(getattr(package, name)))
    monkeypatch.setattr(module.peers, "time_us", lambda call, rep: 1.0)
    (row,) = run(module, "path", "--match", "V4", "--match", "chunk 4", "--provider", "flash_mla", *CPU)["rows"]
    assert not [arm for name, arm in row["arms"].items() if "sglang" not in name and "refused" in arm], row


def test_the_path_is_what_it_says(load, run, flash_mla, monkeypatch):
    module = load("sparse_prefill")
    monkeypatch.setattr(module.peers, "time_us", lambda call, rep: 1.0)
    told = run(module, "path", "--match", "V4", "--match", "chunk 4", "--provider", "flash_mla", *CPU)
    (row,) = told["rows"]
    assert row["case"] == "path V4 heads 3 chunk 4 context 256 share 0.25   1 of 1 pages named"
    assert set(row["arms"]) == PATH - OURS
    # 32 compressed keys and a window of 128, padded to 256; both caches' rows in one workspace
    assert set(flash_mla) == {((4, 3, 512), (64 + 256, 1, 512), (4, 1, 256))}
    assert row["flops"] == 2 * 4 * 3 * (32 + 128) * (512 + 512)


@pytest.mark.parametrize("section, layout, count", [("dequantise", "V4", 2 + 16), ("attention", "512", 1 + 24)])
def test_a_sweep_tries_our_launch_numbers(section, layout, count, load, run, monkeypatch):
    module = load("sparse_prefill")
    monkeypatch.setattr(module.peers, "time_us", lambda call, rep: 1.0)
    told = run(module, section, "--sweep", "--heads", "17", "--match", layout, *CPU)
    (row,) = told["rows"]
    assert len(row["arms"]) == count and all("refused" not in arm for arm in row["arms"].values())


def test_a_sweep_of_the_path_is_that_of_the_pages(load, monkeypatch):
    module = load("sparse_prefill")
    seen = []

    def decode(q, *args, **options):
        seen.append(options["config"])
        return q, None

    monkeypatch.setattr(module, "sparse_decode", decode)
    case = SimpleNamespace(q=torch.zeros(1, 64, 512), cache=None, ids=None, sm_scale=1.0, extra={})
    for make in module.path_arms(case, SimpleNamespace(sweep=True)).values():
        make(case)()
    assert len(seen) == 1 + 18 and seen[0] is None
    assert {tuple(sorted(numbers)) for numbers in seen[1:]} == {("BLOCK_H", "BLOCK_N", "PER_SM", "STAGES", "num_warps")}
    assert len({str(numbers) for numbers in seen}) == 19


def test_a_wrong_kernel_has_no_time(load, run, monkeypatch):
    module = load("sparse_prefill")
    right = module.combine_topk_swa_indices

    def wrong(*args, **options):
        ids, lens = right(*args, **options)
        return ids.add_(1), lens

    monkeypatch.setattr(module, "combine_topk_swa_indices", wrong)
    monkeypatch.setattr(module.peers, "time_us", lambda call, rep: 1.0)
    told = run(module, "indices", "path", "--provider", "ours", *CPU)
    refused = [[name for name, arm in row["arms"].items() if "refused" in arm] for row in told["rows"]]
    # combine, windows; the path of V3.2, whose indices need no combining, and V4's
    assert refused == [["ours"], [], [], ["all, ours"]]


@pytest.mark.parametrize(
    "args, says",
    [
        (["merge", *CPU], "no section 'merge': expected attention, dequantise, indices, path"),
        (["path", "--match", "V5", *CPU], "no case has all that --match wants"),
        (["path"], "--device cpu and TRITON_INTERPRET=1 go together"),
        (["path", "--provider", "mine", *CPU], "invalid choice: 'mine'"),
    ],
)
def test_misuse_of_sparse_prefill(args, says, load, run, capsys):
    with pytest.raises(SystemExit) as ended:
        run(load("sparse_prefill"), *args)
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_real_cases_are_those_of_the_figures(load):
    """Chunks and contexts that performance is told for; a chunk is no longer than its context."""
    module = load("sparse_prefill")
    module.DEVICE = "cuda"
    args = SimpleNamespace(heads=None)
    titles = [title for title, _ in module.path_cases(args)]
    assert len(titles) == len(set(titles)) == 2 * (2 * (4 + 4 + 3) + 3 * 4) + 3 * 4
    assert "path V3.2 heads 128 chunk 16384 context 131072 share 1" in titles
    assert not [title for title in titles if "chunk 16384 context 8192" in title]
    assert all("queries 4096" in title for title, _ in module.indices_cases(args))
    assert len(list(module.attention_cases(args))) == 5 and len(list(module.dequantise_cases(args))) == 6


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
