"""What kernel families share: the definition of attention, e4m3, checks, and what a launcher asks of its device."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from mla_patch.compat import gpu
from mla_patch.compat.compiles import Compiles
from mla_patch.compat.triton import interpreted
from mla_patch.kernels.common import checks, launch
from mla_patch.kernels.common.e4m3 import (
    e4m3_to_f16,
    e4m3_to_f32,
    scale_e4m3_to_bf16,
    unpack_e4m3x2,
    unpack_scaled_e4m3x2,
)
from mla_patch.kernels.common.reference import attend_ref
from mla_patch.kernels.common.rounding import rounded

DEVICE = "cpu" if interpreted() else "cuda"


@triton.jit
def _decode_codes(codes, pairs, f16, f32, even, odd, scaled, BITS: tl.constexpr):
    i = tl.arange(0, 256)
    p = tl.arange(0, 128)
    code = tl.load(codes + i).to(tl.int32)
    tl.store(f16 + i, e4m3_to_f16(code))
    tl.store(f32 + i, e4m3_to_f32(code))
    pair = tl.load(pairs + p)
    one, other = unpack_e4m3x2(pair, BITS)
    tl.store(even + p, one)
    tl.store(odd + p, other)
    half = tl.full([128], 0.5, tl.float16)
    tl.store(scaled + i, unpack_scaled_e4m3x2(pair, half, BITS))


@pytest.mark.parametrize("bits", [False, True], ids=["instruction", "integers"])
def test_every_code_of_e4m3(bits: bool) -> None:
    """All 256, by each decoder: exact, and NaN stays NaN. In the interpreter both ways are integers."""
    codes = torch.arange(256, dtype=torch.uint8)
    want = codes.view(torch.float8_e4m3fn).double()
    codes = codes.to(DEVICE)
    f16, scaled = (torch.empty(256, dtype=torch.float16, device=DEVICE) for _ in range(2))
    even, odd = (torch.empty(128, dtype=torch.float16, device=DEVICE) for _ in range(2))
    f32 = torch.empty(256, device=DEVICE)
    _decode_codes[(1,)](codes, codes.view(torch.int16), f16, f32, even, odd, scaled, BITS=bits)
    assert want.isnan().sum() == 2
    for got in (f16, f32, torch.stack([even, odd], 1).flatten()):
        assert torch.equal(got.cpu().double().nan_to_num(-1.0), want.nan_to_num(-1.0))
    assert torch.equal(scaled.cpu().double().nan_to_num(-1.0), (want * 0.5).nan_to_num(-1.0))


@triton.jit
def _scale_codes(codes, out):
    i = tl.arange(0, 256)
    tl.store(out + i, scale_e4m3_to_bf16(tl.load(codes + i), tl.full([256], 0.75, tl.float32)))


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
def test_every_code_of_e4m3_times_a_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    out = torch.empty(256, dtype=torch.int16, device=DEVICE)
    _scale_codes[(1,)](codes, out)
    want = (codes.view(torch.float8_e4m3fn).float() * 0.75).bfloat16()
    assert torch.equal(out.view(torch.bfloat16).nan_to_num(-1.0), want.nan_to_num(-1.0))


@triton.jit
def _round(x, out):
    i = tl.arange(0, 4)
    tl.store(out + i, rounded(tl.load(x + i), tl.bfloat16))


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even() -> None:
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, math.nan], device=DEVICE)
    out = torch.empty(4, dtype=torch.bfloat16, device=DEVICE)
    _round[(1,)](x, out)
    assert out[:3].tolist() == [1.0, 1 + 2**-6, 1 + 2**-7] and out[3].isnan()


def test_attention_is_softmax() -> None:
    torch.manual_seed(0)
    q, keys = torch.randn(3, 576), torch.randn(7, 576).to(torch.float8_e4m3fn)
    scores = q.double() @ keys.double().T * 0.1
    got = attend_ref(q, keys, sm_scale=0.1)
    torch.testing.assert_close(got.out, scores.softmax(-1) @ keys.double()[:, :512], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.lse, scores.exp().sum(-1).log(), rtol=1e-12, atol=1e-12)
    assert torch.equal(got.max_logits, scores.max(-1).values)
    assert attend_ref(q, keys, sm_scale=0.1, values=448).out.shape == (3, 448)


def test_attention_with_every_option() -> None:
    """A sink is a key without a value: the same as one more key whose value is zero."""
    q, keys = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25], [1.5, -1.0]])
    s = [1.25 * 3.0 * math.tanh(float(k @ q[0]) * 2.0 / 3.0) for k in keys]
    total = sum(math.exp(x) for x in s)
    given = {"sm_scale": 2.0, "logit_cap": 3.0, "temperature": 1.25, "values": 1}
    plain = attend_ref(q, keys, **given)
    sunk = attend_ref(q, keys, sinks=torch.tensor([0.7]), **given)
    assert plain.lse.item() == sunk.lse.item() == pytest.approx(math.log(total))
    assert plain.out.item() == pytest.approx((0.5 * math.exp(s[0]) + 1.5 * math.exp(s[1])) / total)
    assert sunk.out.item() == pytest.approx(plain.out.item() * total / (total + math.exp(0.7)))


@pytest.mark.parametrize("sinks", [None, torch.zeros(2)], ids=["no sink", "sink"])
def test_attention_to_nothing(sinks: torch.Tensor | None) -> None:
    got = attend_ref(torch.randn(2, 576), torch.empty(0, 576), sm_scale=1.0, sinks=sinks)
    assert not got.out.any() and (got.lse == -math.inf).all() and (got.max_logits == -math.inf).all()


@pytest.mark.parametrize(
    ("check", "says"),
    [
        (
            lambda t: checks.check_sinks("sinks", t.half()[:2], 3, t),
            "sinks: torch.float16, shape (2,), expected",
        ),
        (
            lambda t: checks.check_index_list("ids", t.int()[:2], 3, t),
            "ids: torch.int32, shape (2,), expected int32",
        ),
        (lambda t: checks.check_scale("k_scale", math.nan, t), "k_scale: nan, expected a finite number above 0"),
        (lambda t: checks.check_scale("k_scale", t, t), "k_scale: torch.float32, shape (4,), expected a number or one"),
        (lambda t: checks.check_device("kv", t.to("meta"), t), "kv: on meta, expected cpu as q"),
        (lambda t: checks.check_device("kv", t.to("meta"), t, "cache"), "kv: on meta, expected cpu as cache"),
    ],
    ids=["sinks", "index list", "scale", "scale on the device", "device", "device of another"],
)
def test_a_refused_argument_is_named(check: Any, says: str) -> None:
    with pytest.raises(ValueError) as refused:
        check(torch.ones(4))
    assert str(refused.value).startswith(says)


def test_what_is_right_passes() -> None:
    t = torch.ones(4)
    checks.check_sinks("sinks", None, 3, t)
    checks.check_sinks("sinks", t.bfloat16(), 4, t)
    checks.check_index_list("ids", t.long(), 4, t)
    checks.check_scale("k_scale", 0.5, t)
    checks.check_scale("k_scale", t[:1], t)
    checks.check_device("kv", t, t)


def test_without_a_gpu_nothing_runs_but_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.ones(2)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    checks.check_can_launch("q", t)
    assert launch.chip_of(t) == ((0, 0), 1)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="q: on cpu, expected a CUDA device"):
        checks.check_can_launch("q", t)
    monkeypatch.setattr(gpu, "capability", lambda index: (9, index))
    monkeypatch.setattr(gpu, "sm_count", lambda index: 100 + index)
    tensor: Any = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=3))
    assert launch.can_launch(tensor) and launch.chip_of(tensor) == ((9, 3), 103)


def test_a_launch_goes_to_the_tensors_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def device(of: torch.device) -> Any:
        entered.append(str(of))
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    for elsewhere in (False, True):
        monkeypatch.setattr(gpu, "on_other_device", lambda tensor, elsewhere=elsewhere: elsewhere)
        with launch.on_device_of(torch.ones(1)):
            pass
        assert entered == ["cpu"] * elsewhere


def test_a_warm_up_tells_what_it_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Compiles()
    counted.has_served = lambda: True
    monkeypatch.setattr(launch, "COMPILES", counted)
    counted.note()
    with launch.warming_up() as compiled:
        counted.note()
        counted.note()
    assert compiled() == 2 and counted.before == 2 and counted.serving == 1
