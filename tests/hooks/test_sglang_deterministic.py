"""SGLang's promise of batch-invariant results: who can tell of it, and what each feature makes of it."""

from __future__ import annotations

import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mla_patch import eligibility, plugins
from mla_patch.compat.hosts import Installed
from mla_patch.compat.sglang import deterministic as sglang_deterministic
from mla_patch.compat.sglang.decode import DecodeWarmup
from mla_patch.compat.sglang.deterministic import REASON, VARIABLE
from mla_patch.compat.sglang.release import HOST
from mla_patch.features import State
from mla_patch.flags import Setting
from mla_patch.hooks.sglang import decode as sglang_decode
from mla_patch.hooks.sglang.edits.deterministic import decoding, watch_decodes


class Backend:
    """What a release's TritonAttnBackend is to the edit."""

    def __init__(self, inner: Backend | None = None, **attributes: Any) -> None:
        self.inner = inner
        vars(self).update(attributes)

    def forward_decode(self, q: Any, fails: bool = False) -> list[str | None]:
        if fails:
            raise RuntimeError("the host's own")
        seen = [decoding.promise]
        return [*seen, *self.inner.forward_decode(q), decoding.promise] if self.inner else seen


@pytest.fixture
def module() -> ModuleType:
    module = ModuleType("triton_backend")
    vars(module)["TritonAttnBackend"] = type("TritonAttnBackend", (Backend,), dict(vars(Backend)))
    return module


def test_a_decode_knows_what_its_backend_promises(module: ModuleType) -> None:
    before = vars(module.TritonAttnBackend)["forward_decode"]
    undo = watch_decodes(module)
    make = module.TritonAttnBackend
    assert make().forward_decode(1) == make(enable_deterministic=False).forward_decode(1) == [None]
    promised = make(enable_deterministic=True)
    assert promised.forward_decode(1) == [REASON] and decoding.promise is None
    # one backend within another, whatever the two promise
    assert make(promised).forward_decode(1) == [None, REASON, None]
    assert make(promised, enable_deterministic=True).forward_decode(1) == [REASON, REASON, REASON]
    with pytest.raises(RuntimeError, match="own"):
        promised.forward_decode(1, fails=True)
    assert decoding.promise is None
    undo()
    assert vars(make)["forward_decode"] is before


def test_another_threads_backend_promises_nothing_here(module: ModuleType) -> None:
    watch_decodes(module)
    seen: list[Any] = []

    class Waiting(Backend):
        def forward_decode(self, q: Any, fails: bool = False) -> list[str | None]:
            thread = threading.Thread(target=lambda: seen.append(decoding.promise))
            thread.start(), thread.join()
            return [decoding.promise]

    outer = module.TritonAttnBackend(Waiting(), enable_deterministic=True)
    assert outer.forward_decode(1) == [REASON] * 3 and seen == [None]


def test_a_compiled_step_declines_too(run_python: Any) -> None:
    """torch.compile traces the host's method; what the thread is told must be there when the decode runs."""
    code = """
import torch
from types import SimpleNamespace
from mla_patch.compat.sglang import deterministic as sglang_deterministic
from mla_patch.hooks.sglang.edits.deterministic import decoding, watch_decodes

seen = []

@torch.compiler.disable
def decode(x):
    seen.append(decoding.promise)
    return x + 1

class TritonAttnBackend:
    enable_deterministic = True
    def forward_decode(self, q):
        return decode(q * 2)

watch_decodes(SimpleNamespace(TritonAttnBackend=TritonAttnBackend))
backend = TritonAttnBackend()
step = torch.compile(lambda x: backend.forward_decode(x) + 1, backend="eager")
step(torch.zeros(2)), step(torch.zeros(2))
backend.enable_deterministic = False
step(torch.zeros(2))
print([promise is not None for promise in seen], decoding.promise)
"""
    assert run_python(code, check=True).stdout == "[True, True, False] None\n"


@pytest.mark.parametrize(
    ("value", "on"), [("1", True), ("True", True), ("yes", True), ("0", False), ("false", False), ("", False)]
)
def test_a_process_of_a_deterministic_engine_knows_from_its_start(
    value: str, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    monkeypatch.setattr(eligibility, "_source_problem", lambda target: None)
    where = Installed(HOST, "0.5.11", "")
    for mode in ("on", "ab"):  # ours serves in neither, whoever asks
        told = eligibility.check(sglang_decode.FEATURE, Setting("MLA_PATCH_DECODE", mode, "environment"), where)
        assert (told.state is State.REFUSED) == on, mode
        assert told.reason == (f"{REASON} ({VARIABLE}={value})" if on else "")


def test_the_modes_own_switch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, sglang_deterministic.OPS, raising=False)
    assert not sglang_deterministic.is_on()
    ops = SimpleNamespace(is_batch_invariant_mode_enabled=lambda: mode)
    monkeypatch.setitem(sys.modules, sglang_deterministic.OPS, ops)  # type: ignore[arg-type]
    for mode in (False, True):
        assert sglang_deterministic.is_on() is mode


def test_a_deterministic_backend_compiles_no_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    from mla_patch.kernels import decode
    from mla_patch.kernels.decode import splits as decode_splits
    from mla_patch.kernels.indices import kv as kv_indices

    asked: list[str] = []
    for one in (decode, decode_splits, kv_indices):
        monkeypatch.setattr(one, "warmup", lambda *args, name=one.__name__: asked.append(name) or 1)
    monkeypatch.setattr("mla_patch.compat.gpu.on_nvidia", lambda tensor: True)
    runner = SimpleNamespace(device="cpu", dtype=None)
    for deterministic in (False, True):
        numel = SimpleNamespace(numel=lambda: 9)
        backend = SimpleNamespace(
            num_head=16, kv_indptr=numel, dcp_size=2, max_kv_splits=8, enable_deterministic=deterministic
        )
        sglang_decode.warm(DecodeWarmup(backend, runner, None))
    assert [name.removeprefix("mla_patch.kernels.") for name in asked] == ["indices.kv", "decode.splits", "indices.kv"]


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A process whose engine has its batch-invariant operators on."""
    on = [True]
    ops = SimpleNamespace(is_batch_invariant_mode_enabled=lambda: on[0])
    monkeypatch.setitem(sys.modules, sglang_deterministic.OPS, ops)  # type: ignore[arg-type]
    return on


def test_flash_mla_decode_splits_nothing(mode: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """That this keeps the promise is shown of the kernels in test_batch_invariance."""
    from mla_patch import flash_mla
    from mla_patch.compat.sglang.flash_mla import SGL_KERNEL, Build, KvCacheCall
    from mla_patch.hooks.sglang import sched_meta as sglang_sched_meta

    asked: list[bool] = []
    monkeypatch.setattr(
        flash_mla, "flash_mla_with_kvcache", lambda *args, **options: asked.append(options["enable_batch_invariant"])
    )
    for mode[0] in (True, False):
        sglang_sched_meta.serve_kvcache(KvCacheCall(Build(SGL_KERNEL, True), *[None] * 6))
    assert asked == [True, False]


def test_v4s_route_is_the_releases(mode: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours chooses it by the lengths of all prompts of a step."""
    from test_sglang_sparse_prefill import forward, prompt, step

    from mla_patch.hooks.sglang.edits import v4_policy

    monkeypatch.setenv("MLA_PATCH_SPARSE_PREFILL_ROUTE", "all")
    monkeypatch.setattr("mla_patch.compat.sglang.v4_chunk.most_queries", lambda device: 5)  # fewer than there are
    for mode[0], reason in ((True, REASON), (False, None)):
        assert (v4_policy.route(step(), v4_policy.OF_STEP).value == REASON) == bool(reason)
        assert [v4_policy.declines(call) for call in (forward(), prompt(4))] == [reason] * 2
        row = v4_policy.route(prompt(4))
        assert (row.provider, row.value == REASON) == (("host", True) if reason else ("triton", False))


@pytest.mark.parametrize("given", [{"enable_deterministic_inference": True}, {"rl_on_policy_target": "fsdp"}])
def test_kernels_of_which_nothing_is_known_are_refused(given: dict[str, Any]) -> None:
    from mla_patch.hooks.sglang.edits import server_args

    args = SimpleNamespace(attention_backend="tokenspeed_mla", kv_cache_dtype="fp8_e4m3", page_size=64, **given)
    with pytest.raises(ValueError, match=f"tokenspeed_mla beside {REASON}"):
        server_args._choose(args, ("tokenspeed_mla",))
    assert args.attention_backend == "tokenspeed_mla"


def test_every_feature_says_what_it_makes_of_the_promise() -> None:
    told = {feature.label: feature.promises for feature in plugins.load().features if feature.host_name == "sglang"}
    assert told and all(text.startswith("deterministic inference: ") for text in told.values()), told
