"""bench/backends.py: on a CPU, with stand-ins for the peers, every arm of every case is checked, run and told."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scratch import ROOT

from mla_patch.compat.triton import interpreted
from mla_patch.kernels.decode import mla_decode_ref

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")

E4M3 = torch.float8_e4m3fn
OURS = ["ours, slots", "ours, pages of 1", "ours, pages of 64"]
FP8 = ["conversion", "FlashAttention-3", "FlashInfer", "FlashMLA fp8", *OURS]
# the arguments of sglang-kernel 0.4.2's operator; 0.4.5's has two more
FORWARD = """fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor? out,
    Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k,
    int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k,
    Tensor? rotary_cos, Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale,
    Tensor? v_descale, float? softmax_scale, bool is_causal, int window_size_left, int window_size_right,
    int attention_chunk, float softcap, bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits,
    bool? pack_gqa, int sm_margin, Tensor? sinks{more}) -> (Tensor, Tensor, Tensor, Tensor)"""
NEWER = ", Tensor? sparse_mask_fine, bool only_qv"


def attention(q: Any, rows: Any, table: Any, lens: Any, scale: float) -> torch.Tensor:
    """In float64, over rows [slots, 576] that ``table`` [B, tokens] names."""
    ids = [line[:n] for line, n in zip(table.long(), lens.tolist(), strict=True)]
    bounds = torch.tensor([0, *map(len, ids)]).cumsum(0)
    return mla_decode_ref(q, rows, bounds, torch.cat(ids), sm_scale=scale).to(torch.bfloat16)


@pytest.fixture
def bench(monkeypatch) -> Any:
    """The benchmark, loaded by its path, with cases that the interpreter can run."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "peers", raising=False)
    spec = importlib.util.spec_from_file_location("bench_backends", ROOT / "bench" / "backends.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "LONG", 192)
    monkeypatch.setattr(module, "SHORT", 64)
    monkeypatch.setattr(module, "ROTATE_BELOW", 192 * 1152)
    monkeypatch.setattr(module, "TOGETHER", 3 * 128 * 1152)
    return module


@pytest.fixture
def run(bench, monkeypatch, tmp_path, capsys):
    def run_(*args: str) -> dict[str, Any]:
        place = tmp_path / "told.json"
        monkeypatch.setattr(sys, "argv", ["bench", *args, "--rounds", "2", "--json", str(place)])
        bench.main()
        return json.loads(place.read_text()) | {"shown": capsys.readouterr().out}

    return run_


def list_(bench: Any, monkeypatch: Any, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--list", *args])
    bench.main()


class Peers:
    """Stand-ins in a folder and in sys.modules, and what they were called with."""

    def __init__(self, folder: Path, monkeypatch: Any, more: str):
        self.folder, self.calls = folder, []
        (folder / "flash_ops.py").write_text("")
        (folder / "flashinfer_mla.so").write_bytes(b"")
        self.library = torch.library.Library("sgl_kernel", "FRAGMENT")
        self.library.define(FORWARD.format(more=more))
        self.library.impl("fwd", self.forward, "CPU")
        monkeypatch.setitem(sys.modules, "flash_mla", self.flash_mla())
        ffi = ModuleType("tvm_ffi")
        ffi.load_module = lambda path: self.flashinfer(path)
        ffi.use_torch_stream = lambda: torch.no_grad()
        monkeypatch.setitem(sys.modules, "tvm_ffi", ffi)
        monkeypatch.delitem(sys.modules, "flash_ops", raising=False)

    def forward(self, *args: Any) -> Any:
        names = [argument.name for argument in torch.ops.sgl_kernel.fwd.default._schema.arguments]
        given = dict(zip(names, args, strict=True))
        q = torch.cat((given["q_v"], given["q"]), -1)
        self.calls.append(("fa3", given["q_v"].stride(), given.get("only_qv"), given["k"].dtype))
        assert given["is_causal"] and (given["window_size_left"], given["window_size_right"]) == (-1, -1)
        assert (given["max_seqlen_q"], given["num_splits"], given["k_new"], given["sinks"]) == (1, 0, None, None)
        assert given["cu_seqlens_q"].tolist() == list(range(len(q) + 1))
        rows = torch.cat((given["v"].flatten(0, 2), given["k"].flatten(0, 2)), -1)
        out = attention(q, rows, given["page_table"], given["seqused_k"], given["softmax_scale"])
        return out, *(torch.empty(0) for _ in range(3))

    def flash_mla(self) -> ModuleType:
        module = ModuleType("flash_mla")

        class Meta:
            tile_scheduler_metadata = num_splits = None

        def get_mla_decoding_metadata(lens, tokens, heads, is_fp8_kvcache=False, use_legacy=False):
            assert use_legacy and is_fp8_kvcache and heads == 1
            return "schedule", "splits"

        def flash_mla_with_kvcache(
            q, k_cache, table, lens, dim, meta, num_splits, softmax_scale, causal, is_fp8_kvcache=False,
            descale_q=None, descale_k=None, use_legacy=False,
        ):  # fmt: skip
            assert use_legacy and k_cache.shape[1:] == (64, 1, 576) and q.dtype == k_cache.dtype
            assert meta.tile_scheduler_metadata == ("schedule" if is_fp8_kvcache else None)
            assert is_fp8_kvcache == (descale_q is not None) == (q.dtype == E4M3)
            self.calls.append(("flash_mla", q.dtype))
            slots = (table[:, :, None] * 64 + torch.arange(64)).flatten(1)
            out = attention(q[:, 0], k_cache.view(-1, 576), slots, lens, softmax_scale)
            return out[:, None], None

        module.get_mla_metadata = lambda: (Meta(), None)
        module.get_mla_decoding_metadata = get_mla_decoding_metadata
        module.flash_mla_with_kvcache = flash_mla_with_kvcache
        return module

    def flashinfer(self, path: str) -> Any:
        assert path == str(self.folder / "flashinfer_mla.so")
        module = ModuleType("flashinfer_mla")

        def plan(floats, ints, pinned, starts, indptr, lens, heads, dim, causal):
            assert indptr.diff().tolist() == lens.tolist() and starts.tolist() == list(range(len(lens) + 1))
            return [*indptr.tolist()], 16

        def run(floats, ints, plan, nope, rope, ckv, kpe, ids, out, lse, mask, heads, page, scale, *rest):
            rows = torch.cat((ckv[:, 0], kpe[:, 0]), -1)
            q = torch.cat((nope, rope), -1)
            self.calls.append(("flashinfer", nope.stride(), ckv.dtype))
            out.copy_(mla_decode_ref(q, rows, torch.tensor(plan), ids, sm_scale=scale))

        module.plan, module.run = plan, run
        return module


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Makes `Peers` whose FlashAttention-3 has these arguments more."""
    made = []

    def stand_ins_(more: str = "") -> Peers:
        (tmp_path / "peers").mkdir()
        made.append(Peers(tmp_path / "peers", monkeypatch, more))
        return made[0]

    yield stand_ins_
    made[0].library._destroy()


def right(arm: dict[str, Any], most: float = 5e-3) -> bool:
    return "refused" not in arm and len(arm["us"]) == 2 and min(arm["us"]) > 0 and arm["error"] < most


def test_every_arm_beside_stand_ins(run, stand_ins, bench, monkeypatch):
    peers = stand_ins()
    monkeypatch.setattr(bench, "captured", lambda call, caches: ((lambda: None), 1))  # slow in the interpreter
    queries = []
    for name in ("mla_decode", "mla_decode_paged"):
        decode = getattr(bench, name)
        monkeypatch.setattr(bench, name, lambda q, *args, f=decode, **more: queries.append(q) or f(q, *args, **more))
    told = run(
        "fp8", "bf16", "--peers", str(peers.folder), "--pools", "256", "--requests", "1", "3", "--heads", "2",
        "--shapes", "1x128", "3xragged",
    )  # fmt: skip
    fp8, bf16 = ([row for row in told["rows"] if row["part"] == part] for part in ("fp8", "bf16"))
    assert [(row["pool"], row["requests"], row["tokens"], row["heads"]) for row in fp8] == [
        (256, 1, 256, 2),
        (256, 3, 64, 2),
    ]
    assert [(row["requests"], row["tokens"]) for row in bf16] == [(1, 128), (3, "ragged")]
    assert (fp8[1]["bytes"], bf16[1]["bytes"]) == (3 * 64 * 576, (192 + 64 + 64) * 1152)
    assert fp8[1]["flops"] == 2 * 3 * 64 * 2 * (576 + 512)
    for row in fp8:
        assert list(row["arms"]) == FP8
        assert row["arms"]["conversion"]["error"] == 0
        # q in e4m3 costs FlashMLA what is told, and it is timed all the same
        assert 0.005 < row["arms"]["FlashMLA fp8"]["error"] < bench.LIMIT
        assert all(right(arm) for name, arm in row["arms"].items() if name != "FlashMLA fp8"), row
    for row in bf16:
        assert list(row["arms"]) == ["FlashAttention-3", "FlashInfer", "FlashMLA", *OURS]
        assert all(right(arm) for arm in row["arms"].values()), row
    # what the peers read is bfloat16, converted or not, and q is in the halves that a model hands over: to ours, too
    assert {tuple(half.shape[1:] for half in q) for q in queries} == {((2, 512), (2, 64))}
    assert {call[-1] for call in peers.calls if call[0] != "flash_mla"} == {torch.bfloat16}
    assert {call[1] for call in peers.calls if call[0] in ("fa3", "flashinfer")} == {(512, 512, 1), (512, 3 * 512, 1)}
    assert {call[1] for call in peers.calls if call[0] == "flash_mla"} == {E4M3, torch.bfloat16}
    assert told["missing"] == {} and told["gpu"] == "Triton's interpreter: times say nothing"
    shown = told["shown"].splitlines()
    assert "FlashInfer: found" in shown and " | ".join(["    pool requests heads", *FP8]) in shown
    assert sum(line.startswith("     256    3 x 64       2 | ") for line in shown) == 1
    assert [line for line in shown if line.startswith("  ours, slots: error at most 0.00")]
    assert "a step of 61 layers" in told["shown"]


def test_flash_attention_3_of_a_newer_library(run, stand_ins):
    peers = stand_ins(NEWER)
    told = run("bf16", "--peers", str(peers.folder), "--shapes", "1x64", "--heads", "1", "--arms", "FlashAttention-3")
    assert right(told["rows"][0]["arms"]["FlashAttention-3"])
    assert {call[2] for call in peers.calls} == {False}


def test_what_is_missing_is_named_and_ours_runs_alone(run, bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "REPLAYS", 1)
    for name in ("flash_ops", "sgl_kernel", "flash_mla"):
        monkeypatch.setitem(sys.modules, name, None)
    told = run("fp8", "--peers", str(tmp_path), "--pools", "64", "--requests", "1", "--heads", "1", "--arms", "64")
    (row,) = told["rows"]
    assert list(row["arms"]) == ["ours, pages of 64"] and right(row["arms"]["ours, pages of 64"])
    assert set(told["missing"]) == {"FlashAttention-3", "FlashInfer", "FlashMLA"}
    assert "FlashInfer: RuntimeError: no flashinfer_mla.so in --peers" in told["shown"]


def test_what_is_wrong_or_raises_has_no_time(run, bench, monkeypatch):
    decode = bench.mla_decode
    monkeypatch.setattr(bench, "mla_decode", lambda *args, **options: decode(*args, **options).mul_(1.2))
    monkeypatch.setattr(bench, "conversion", lambda case: lambda kv=None: (torch.full((1, 1, 512), torch.nan),))

    def refuse(*args, **options):
        raise ValueError("not this shape")

    monkeypatch.setattr(bench, "mla_decode_paged", refuse)
    monkeypatch.setattr(bench, "REPLAYS", 1)
    told = run("fp8", "--pools", "64", "--requests", "1", "--heads", "1", "--arms", "ours", "conversion")
    arms = told["rows"][0]["arms"]
    assert arms["ours, slots"]["refused"].startswith("RuntimeError: error 0.2")
    assert arms["ours, pages of 1"]["refused"] == "ValueError: not this shape"
    assert arms["conversion"]["refused"] == "AssertionError: not every row is finite"
    assert "ours, pages of 64: 1 of 1 refused: ValueError: not this shape" in told["shown"]


def test_small_caches_rotate_and_arms_take_turns(bench, monkeypatch):
    args = bench.argparse.Namespace(shapes=[(1, 128), (1, 192)], heads=[1])
    cases = [make() for _, make in bench.bf16_cases(args)]
    assert [len(case.caches) for case in cases] == [3, 1]
    assert not torch.equal(cases[0].caches[0], cases[0].caches[1])
    seen: list[str] = []

    def arm(name: str) -> Any:
        def make(case: Any) -> Any:
            return lambda cache=None: seen.append(name) or (case.want.to(torch.bfloat16).expand(1, 1, 512),)

        return make

    monkeypatch.setattr(bench, "REPLAYS", 1)
    bench.measure(cases[0], {name: arm(name) for name in "abc"}, 3)
    assert "".join(seen) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"


def test_the_default_cases_are_those_of_the_figures(bench, monkeypatch, capsys):
    for name in ("flash_ops", "sgl_kernel", "flash_mla"):
        monkeypatch.setitem(sys.modules, name, None)
    list_(bench, monkeypatch)
    shown = capsys.readouterr().out.splitlines()
    assert len([line for line in shown if " x " in line]) == 27 + 21
    assert "    131072   64 x 2048   128" in shown and "   2097152   64 x 8192    16" in shown
    assert "    64 x ragged 128" in shown
    assert "bf16: ours, slots, ours, pages of 1, ours, pages of 64" in shown


@pytest.mark.parametrize(
    "args, says",
    [
        (["fp4"], "no part 'fp4': expected fp8, bf16"),
        (["--shapes", "4x100"], "'4x100': requests x tokens, tokens a multiple of 64, or 64xragged"),
        (["--pools", "100"], "'100': slots, a multiple of 64"),
        (["fp8", "--pools", "128", "--requests", "3"], "a pool of 128 slots has no page of 64 for each of 3 requests"),
    ],
)
def test_misuse(args, says, bench, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        list_(bench, monkeypatch, *args)
    assert ended.value.code == 2 and says in capsys.readouterr().err
