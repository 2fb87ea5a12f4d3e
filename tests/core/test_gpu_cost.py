"""What an eager call of decode costs the engine's thread: a step of few requests waits for it, and not for the GPU."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from mla_patch.compat.sglang.decode import DecodeCall
from mla_patch.compat.triton import Relaunch, interpreted
from mla_patch.dispatch import ArmCode, EntryPoint, FeatureGate
from mla_patch.features import Counts
from mla_patch.hooks.sglang import decode as sglang_decode
from mla_patch.kernels import decode
from mla_patch.stand_ins import stand_in

BATCH, TOKENS = 4, 8192


def host(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the host was called")


def arguments(device: str, heads: int, cache: torch.dtype) -> tuple[Any, ...]:
    """As SGLang 0.5.23 calls, but for its scratch, which ours does not touch."""
    q = torch.zeros(BATCH, heads, 576, dtype=torch.bfloat16, device=device)
    kv = torch.zeros(BATCH * TOKENS, 1, 576, dtype=torch.bfloat16, device=device).to(cache)
    out = torch.zeros(BATCH, heads, 512, dtype=torch.bfloat16, device=device)
    starts = torch.arange(BATCH + 1, dtype=torch.int32, device=device) * TOKENS
    ids = torch.arange(BATCH * TOKENS, device=device)
    return q, kv, kv[..., :512], out, starts, ids, None, None, None, 8, 0.04, 1.0, 1.0


def took(call: Any, calls: int = 50, repeats: int = 30) -> float:
    """Median microseconds a call, of the calling thread alone."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls * 1e6)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # between measures: a full queue would have the GPU measured
    return statistics.median(times)


@pytest.mark.gpu
@pytest.mark.cost
@pytest.mark.skipif(interpreted() or not torch.cuda.is_available(), reason="needs a GPU and TRITON_INTERPRET=0")
@pytest.mark.parametrize("heads", [16, 128])
def test_host_time_of_an_eager_call(
    heads: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call that is like an earlier one goes past Triton's look at its arguments, and is the faster for it."""
    given, counts = arguments("cuda", heads, torch.float8_e4m3fn), Counts()
    code = ArmCode(sglang_decode.serve, sglang_decode.declines)
    served = stand_in(
        host, "call", EntryPoint("decode", DecodeCall, {"patch": code}, counts, FeatureGate(lambda *stop: None))
    )

    def entry() -> None:
        served(*given, logit_cap=0.0, has_mla=True)

    for _ in range(3):
        entry()
    torch.cuda.synchronize()
    past = took(entry)
    monkeypatch.setattr(Relaunch, "settle", lambda self: False)
    decode.remembered.KNOWN.clear()
    looked_at = took(entry)
    with capsys.disabled():
        print(
            f"\n  {heads} heads: {past:.1f} us of host time a call, {looked_at:.1f} where Triton looks at its arguments"
        )
    assert counts.declined == {} and past <= 0.75 * looked_at


@pytest.mark.skipif(not interpreted(), reason="launches on the CPU")
def test_launch_numbers_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer of every step asks for the same; nothing that a launch is given may change what the next one gets."""
    asked: list[int] = []
    own = decode.decode_config

    def watched(heads: int, *more: Any) -> dict[str, int]:
        asked.append(heads)
        return own(heads, *more)

    monkeypatch.setattr(decode.config, "decode_config", watched)
    q, kv, _, out, starts, ids, *_ = arguments("cpu", 2, torch.float16)
    starts = torch.arange(BATCH + 1, dtype=torch.int32)
    given = q.half(), kv, out.half(), starts, ids
    for _ in range(3):
        decode.mla_decode(*given, sm_scale=0.04)
    assert asked == [2]
    work, variant = (16, 4, decode.config.E4M3, False, (9, 0), 132, None), (False, False, 0)
    others = [(16, 64, *work[2:]), (32, *work[1:]), (*work[:4], (8, 0), 108, None), (*work[:6], 7)]
    plan = decode.config.launch_plan
    assert len({repr(plan(other, variant, None)) for other in [work, *others]}) == 5
    first = plan(work, variant, None)
    assert plan(work, (True, True, 64), None)[2] | {"CAPPED": False, "XAI": False, "PAGE_SIZE": 0} == first[2]
