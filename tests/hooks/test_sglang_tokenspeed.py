"""The tokenspeed backend over small hosts of our own: names, refusals, both kinds of seam, the package's shortfalls."""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mla_patch import eligibility
from mla_patch.compat import gpu
from mla_patch.compat.hosts import Installed
from mla_patch.compat.sglang.release import HOST
from mla_patch.compat.types import Gpu, MlaBackendSpec, MlaDecode, MlaKernel, MlaPrefill
from mla_patch.features import Counts, State
from mla_patch.flags import Setting
from mla_patch.hooks.sglang import tokenspeed as hook
from mla_patch.hooks.sglang.edits import mla_kernels, server_args, trtllm_backend

B200, B300, H200, RTX = (
    Gpu("NVIDIA B200", (10, 0)), Gpu("NVIDIA B300", (10, 3)), Gpu("NVIDIA H200", (9, 0)),
    Gpu("NVIDIA RTX PRO 6000", (12, 0)),
)  # fmt: skip
E4M3 = torch.float8_e4m3fn
CHOICES = ["triton", "trtllm_mla"]


class PostInit:
    """Arguments as they are to 0.5.18."""

    def __init__(self, **given: Any) -> None:
        self.page_size, self.kv_cache_dtype = None, "fp8_e4m3"
        self.attention_backend = self.decode_attention_backend = self.prefill_attention_backend = None
        vars(self).update(given)
        self.__post_init__()

    def __post_init__(self) -> None:
        self.read = self.attention_backend

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--attention-backend", choices=CHOICES)
        parser.add_argument("--sampling-backend", choices=["flashinfer", "pytorch"])
        parser.add_argument("--port", type=int)


class ResolveOnce(PostInit):
    """From 0.5.19."""

    def __post_init__(self) -> None:
        pass

    def resolve_once(self) -> None:
        self.read = self.attention_backend

    add_cli_args = staticmethod(PostInit.add_cli_args)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, MlaKernel]:
    """A kernel that runs anywhere beside the package's; no GPU."""
    mine = MlaKernel("mine", f"{__name__}:decode", f"{__name__}:prefill", prepare=f"{__name__}:prepare")
    never = MlaKernel("never", "nowhere:decode", problem=lambda device: f"not on {device}")
    offered = {kernel.name: kernel for kernel in (hook.KERNEL, mine, never)}
    monkeypatch.setattr(mla_kernels, "_offered", offered)
    monkeypatch.setattr(gpu, "from_nvml", lambda: None)
    for part in mla_kernels.VARIABLES:
        monkeypatch.setenv(mla_kernels.variable_of(part), "mine")
    calls.clear()
    return offered


calls: list[Any] = []


def decode(call: MlaDecode) -> torch.Tensor:
    calls.append(call)
    return torch.full((*call.query.shape[:3], 512), 7.0, dtype=torch.bfloat16)


def prefill(call: MlaPrefill) -> Any:
    calls.append(call)
    out = torch.full((*call.q.shape[:2], 128), 7.0, dtype=torch.bfloat16)
    return (out, torch.zeros(call.q.shape[:2])) if call.return_lse else out


def prepare(seam: MlaBackendSpec, parts: frozenset[str]) -> None:
    calls.append((seam, parts))


@pytest.fixture
def args(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Arguments of a release, read by it, with our names in them."""

    def read(owner: type = PostInit, edit: Any = server_args.accept_backend_name, **given: Any) -> Any:
        module = ModuleType("server_args")
        module.ServerArgs = type(owner.__name__, (owner,), dict(vars(owner)))  # type: ignore[attr-defined]
        edit(module)
        one = module.ServerArgs(**given)
        if owner is ResolveOnce:
            one.resolve_once()
        return one

    return read


@pytest.mark.parametrize("owner", [PostInit, ResolveOnce])
@pytest.mark.parametrize(
    "edit, name, ours",
    [
        (server_args.accept_backend_name, "tokenspeed_mla", True),
        (server_args.accept_backend_name, "tokenspeed_mla_patch", True),
        (server_args.accept_other_backend_name, "tokenspeed_mla_patch", True),
        (server_args.accept_other_backend_name, "tokenspeed_mla", False),  # the host's own, or its alias
        (server_args.accept_backend_name, "trtllm_mla", False),
        (server_args.accept_backend_name, None, False),
    ],
)
def test_a_name_becomes_the_hosts_and_a_mark(args: Any, owner: type, edit: Any, name: str, ours: bool) -> None:
    one = args(owner, edit, attention_backend=name)
    # the host reads its own name, so that all that it decides by it is right
    assert one.attention_backend == one.read == ("trtllm_mla" if ours else name)
    assert getattr(one, "_mla_patch_tokenspeed", None) == (name if ours else None)


@pytest.mark.parametrize("field", ["decode_attention_backend", "prefill_attention_backend"])
def test_one_of_two_backends(args: Any, field: str) -> None:
    one = args(attention_backend="flashinfer", **{field: "tokenspeed_mla"})
    assert (one.attention_backend, getattr(one, field)) == ("flashinfer", "trtllm_mla")
    assert one._mla_patch_tokenspeed == "tokenspeed_mla"


@pytest.mark.parametrize(
    "given, text",
    [
        ({"kv_cache_dtype": "auto"}, "tokenspeed_mla reads an fp8 cache: set --kv-cache-dtype fp8_e4m3, found auto"),
        ({"kv_cache_dtype": "bf16"}, "set --kv-cache-dtype fp8_e4m3, found bf16"),
        ({"page_size": 16}, "tokenspeed_mla reads pages of 32 or 64 tokens: set --page-size 64, found 16"),
        ({"decode_attention_backend": "trtllm_mla"}, "--decode-attention-backend trtllm_mla beside tokenspeed_mla"),
    ],
)
def test_arguments_that_cannot_be(args: Any, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        args(attention_backend="tokenspeed_mla", **given)


@pytest.mark.parametrize("page", [None, 1, 32, 64])
def test_page_sizes(args: Any, page: int | None) -> None:
    assert args(attention_backend="tokenspeed_mla", page_size=page).page_size == page


@pytest.mark.parametrize("owner", [PostInit, ResolveOnce])
def test_choices(owner: type) -> None:
    module = ModuleType("server_args")
    module.ServerArgs = type("ServerArgs", (owner,), dict(vars(owner)))  # type: ignore[attr-defined]
    before = dict(vars(module.ServerArgs))
    undo = server_args.accept_backend_name(module)
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.ServerArgs.add_cli_args(parser)
    assert parser.parse_args(["--attention-backend", "tokenspeed_mla"]).attention_backend == "tokenspeed_mla"
    with pytest.raises(argparse.ArgumentError):
        parser.parse_args(["--sampling-backend", "tokenspeed_mla"])
    assert CHOICES == ["triton", "trtllm_mla"]  # which the host reads elsewhere
    undo()
    assert {name: vars(module.ServerArgs)[name] for name in before if callable(before[name])} == {
        name: value for name, value in before.items() if callable(value)
    }
    server_args.accept_other_backend_name(module)
    module.ServerArgs.add_cli_args = theirs = staticmethod(lambda parser: None)
    undo()
    assert vars(module.ServerArgs)["add_cli_args"] is theirs


def test_arguments_that_have_moved() -> None:
    module = ModuleType("server_args")
    module.ServerArgs = type("ServerArgs", (PostInit,), {"__post_init__": PostInit.__post_init__})  # type: ignore[attr-defined]
    with pytest.raises(KeyError, match="add_cli_args"):
        server_args.accept_backend_name(module)
    module.ServerArgs.add_cli_args = classmethod(lambda cls, parser: None)
    with pytest.raises(TypeError, match="takes something else"):
        server_args.accept_backend_name(module)


# hardware and package


@pytest.mark.parametrize(
    "device, refused",
    [(B200, None), (B300, None), (None, None), (H200, r"9.0 \(NVIDIA H200\)"), (RTX, r"12.0 \(NVIDIA RTX PRO 6000\)")],
)
def test_compute_capability(args: Any, monkeypatch: Any, device: Gpu | None, refused: str | None) -> None:
    monkeypatch.setitem(sys.modules, "tokenspeed_mla", ModuleType("tokenspeed_mla"))
    monkeypatch.setattr(gpu, "from_nvml", lambda: device)
    monkeypatch.delenv("MLA_PATCH_TOKENSPEED_DECODE")
    if refused is None:
        assert args(attention_backend="tokenspeed_mla").attention_backend == "trtllm_mla"
    else:
        text = f"decode by tokenspeed_mla: its kernels need compute capability 10.x, found .* {refused}"
        with pytest.raises(ValueError, match=text):
            args(attention_backend="tokenspeed_mla")
    assert not torch.cuda.is_initialized()


def test_no_package(args: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLA_PATCH_TOKENSPEED_PREFILL", "")  # as if unset
    text = "prefill by tokenspeed_mla: the package tokenspeed_mla is not installed: pip install tokenspeed-mla"
    with pytest.raises(ValueError, match=text):
        args(attention_backend="tokenspeed_mla")


def test_a_kernel_that_nobody_offers(args: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLA_PATCH_TOKENSPEED_PREFILL", "never")  # which has a decode alone
    with pytest.raises(ValueError) as problem:
        args(attention_backend="tokenspeed_mla")
    assert str(problem.value) == (
        "MLA_PATCH_TOKENSPEED_PREFILL=never: no plugin offers a prefill kernel of that name; "
        "there are host, mine, tokenspeed_mla"
    )


def test_a_kernel_that_says_no(args: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLA_PATCH_TOKENSPEED_DECODE", "never")
    with pytest.raises(ValueError, match="tokenspeed_mla, decode by never: not on None; MLA_PATCH_TOKENSPEED_DECODE"):
        args(attention_backend="tokenspeed_mla")


def the_package(**changes: Any) -> ModuleType:
    """Its functions as 0.1.1 has them."""
    module = ModuleType("tokenspeed_mla")

    def get_num_sm(device):
        return 148

    def tokenspeed_mla_decode(
        query, kv_cache, workspace_buffer, kv_lora_rank, qk_rope_head_dim, block_tables, seq_lens, max_seq_len,
        softmax_scale, output_scale=1.0, out=None, is_var_seq=True, causal_mask=True, enable_pdl=False,
    ):  # fmt: skip
        raise AssertionError

    def tokenspeed_mla_prefill(
        query, key, value, seq_lens, cum_seq_lens, max_seq_len, batch_size, softmax_scale, is_causal=True,
        return_lse=False, cum_seq_lens_q=None, max_seq_len_q=None, enable_pdl=False,
    ):  # fmt: skip
        raise AssertionError

    def warmup_compile_prefill(q_dtype=None, d_qk=192, d_v=128, enable_pdl=False):
        calls.append((q_dtype, d_qk, d_v, enable_pdl))

    own = dict(locals())
    vars(module).update({name: value for name, value in own.items() if callable(value)} | changes)
    return module


def unavailable(*args, **kwargs):
    raise ImportError


class Private:
    """What 0.1.x keeps in mla_prefill."""

    def __init__(self) -> None:
        self._compiled_kernels: dict[Any, Any] = {}
        self.compiled: list[Any] = []

    def _enable_ex2_emulation(self) -> bool:
        return False

    def _compile_prefill_kernel(self, dtype, d_qk, d_v, causal, lse, use_pdl, enable_ex2_emulation) -> str:
        self.compiled.append((causal, lse))
        return "compiled"


@pytest.mark.parametrize(
    "changes, missing",
    [
        ({}, None),
        ({"tokenspeed_mla_decode": None}, "it has no tokenspeed_mla_decode"),
        ({"get_num_sm": lambda: 1}, "get_num_sm takes no device"),
        ({"tokenspeed_mla_prefill": lambda query, key: 1}, "tokenspeed_mla_prefill takes no batch_size, cum_seq_lens"),
        ({"get_num_sm": unavailable}, "its requirements are not installed (its own imports failed)"),
        ({"get_num_sm": unavailable, "_IMPORT_ERROR": "no cutlass"}, "its requirements are not installed (no cutlass)"),
        ({"warmup_compile_prefill": None}, "its prefill cannot be compiled in advance"),
        ({"warmup_compile_prefill": lambda: None}, "its prefill cannot be compiled in advance"),
        ({"warmup_compile_prefill": None, "mla_prefill": Private()}, None),
    ],
)
def test_what_the_package_lacks(changes: dict[str, Any], missing: str | None) -> None:
    found = hook.shortfall(the_package(**changes))
    assert found == missing or (missing is not None and found is not None and found.startswith(missing))


def test_a_package_that_cannot_be_used_says_so(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "tokenspeed_mla", the_package(tokenspeed_mla_decode=None))
    hook.package.cache_clear()
    text = "tokenspeed_mla of unknown version cannot be used: it has no tokenspeed_mla_decode"
    with pytest.raises(ImportError, match=text):
        hook.package()


# scratch and compiling ahead


def a_seam(**changes: Any) -> MlaBackendSpec:
    given = {
        "device": torch.device("cpu"), "heads": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 192,
        "v_head_dim": 128, "page_size": 64, "draft_tokens": 1, "has_prefill": True,
    }  # fmt: skip
    return MlaBackendSpec(**given | changes)


@pytest.mark.parametrize("heads", [1, 4, 8, 16, 64, 128])
@pytest.mark.parametrize("q_len", [1, 2, 4, 8, 16])
def test_the_workspace_is_enough_for_every_batch(heads: int, q_len: int) -> None:
    have = hook.workspace_bytes(148, heads, q_len, 512)
    for batch in range(1, 300):
        for splits in range(2, 65):  # with one split nothing is kept
            if batch * splits <= 148:
                rows = max(heads * q_len, 128 * -(-heads * q_len // 128))
                assert batch * splits * rows * 513 * 4 <= have
    if heads >= 16 and q_len <= 8:
        assert have == 148 * heads * 8 * 513 * 4  # upstream's


@pytest.fixture
def packed(monkeypatch: Any) -> ModuleType:
    module = the_package()
    monkeypatch.setattr(hook, "package", lambda: module)
    return module


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_call_has_a_workspace_of_its_own(packed: ModuleType, device: str) -> None:
    for q_len in (1, 16):
        first, second = (hook.workspace(a_seam(device=torch.device(device)), q_len) for _ in range(2))
        assert first is not second and first.dtype == torch.int8 and first.device.type == device
        assert first.numel() == hook.workspace_bytes(148, 16, q_len, 512)


BOTH = frozenset({"decode", "prefill"})


@pytest.mark.parametrize(
    "parts, has_prefill, compiled",
    [(BOTH, True, 1), (BOTH, False, 0), ({"decode"}, True, 0), ({"prefill"}, True, 1)],
)
def test_prepare(packed: ModuleType, parts: Any, has_prefill: bool, compiled: int) -> None:
    hook.prepare(a_seam(has_prefill=has_prefill, draft_tokens=12), frozenset(parts))
    assert calls == [(E4M3, 192, 128, False)] * compiled


def test_prepare_by_private_names(packed: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    private = packed.mla_prefill = Private()  # type: ignore[attr-defined]
    del packed.warmup_compile_prefill
    done = (E4M3, 192, 128, False, True, False, False)
    private._compiled_kernels[done] = "before"
    with caplog.at_level("INFO", "mla_patch"):
        hook.prepare(a_seam(), BOTH)
    assert private.compiled == [(True, True)]
    assert private._compiled_kernels == {done: "before", (E4M3, 192, 128, True, True, False, False): "compiled"}
    assert ["compiling its prefill" in line for line in caplog.messages] == [True, False]


@pytest.mark.parametrize("causal, lse", [(True, True), (True, False), (False, True)])
def test_prefill_asks_for_what_is_compiled(packed: ModuleType, causal: bool, lse: bool) -> None:
    given: dict[str, Any] = {}
    packed.tokenspeed_mla_prefill = lambda **more: given.update(more) or ("out", "lse")  # type: ignore[attr-defined]
    ends = torch.tensor([0, 5])
    q = torch.zeros(5, 4, 192).to(E4M3)
    call = MlaPrefill(q, q, q[..., :128], 1, ends, 5, ends[1:], ends, 5, 0.25, causal, lse, a_seam())
    assert hook.prefill(call) == (("out", "lse") if lse else "out")
    # the log-sum-exp always: its own warm-up compiles no variant without
    assert (given["is_causal"], given["return_lse"], given["softmax_scale"]) == (causal, True, 0.25)
    names = ("cum_seq_lens", "cum_seq_lens_q", "seq_lens")
    assert all(given[name].dtype == torch.int32 for name in names) and given["value"].is_contiguous()


def test_decode_asks_for_no_scale_of_the_output(packed: ModuleType) -> None:
    given: dict[str, Any] = {}
    packed.tokenspeed_mla_decode = lambda **more: given.update(more) or "out"  # type: ignore[attr-defined]
    tables, lens = torch.zeros(2, 8, dtype=torch.int32)[:, :4], torch.tensor([3, 70], dtype=torch.int32)
    query, cache = torch.zeros(2, 12, 16, 576).to(E4M3), torch.zeros(3, 64, 576).to(E4M3)
    assert hook.decode(MlaDecode(query, cache, tables, lens, 70, 0.25, a_seam())) == "out"
    assert (given["output_scale"], given["softmax_scale"], given["max_seq_len"]) == (1.0, 0.25, 70)
    assert given["block_tables"].is_contiguous()
    assert given["workspace_buffer"].numel() == hook.workspace_bytes(148, 16, 12, 512)


# the seam


def in_line() -> tuple[ModuleType, list[Any]]:
    """A backend of releases to 0.5.11: it calls flashinfer where it needs it."""
    seen: list[Any] = []
    module = ModuleType("backend")

    def of_flashinfer(name: str) -> Callable[..., str]:
        return lambda **given: seen.append((name, given)) or f"flashinfer's {name}"

    module.flashinfer = SimpleNamespace(  # type: ignore[attr-defined]
        rope="rope",
        decode=SimpleNamespace(trtllm_batch_decode_with_kv_cache_mla=of_flashinfer("decode"), other="other"),
        prefill=SimpleNamespace(trtllm_ragged_attention_deepseek=of_flashinfer("prefill")),
    )
    source = """
class TRTLLMMLABackend:
    def __init__(self, model_runner, skip_prefill=False):
        _init(self, model_runner, skip_prefill)

    def forward_decode(self, q, k, v, layer, forward_batch):
        return flashinfer.decode.trtllm_batch_decode_with_kv_cache_mla(
            **_decode_arguments(q), workspace_buffer=None, qk_nope_head_dim=128, bmm1_scale=1.0
        )

    def forward_extend(self, q, k, v, layer, forward_batch):
        return flashinfer.prefill.trtllm_ragged_attention_deepseek(**_prefill_arguments(q, k, v, forward_batch))


class Other(TRTLLMMLABackend):
    pass
"""
    exec(source, vars(module))
    vars(module).update(_init=built, _decode_arguments=decode_arguments, _prefill_arguments=prefill_arguments)
    return module, seen


def with_points() -> tuple[ModuleType, list[Any]]:
    """A backend of releases from 0.5.12."""
    seen: list[Any] = []
    module = ModuleType("backend")

    class TRTLLMMLABackend:
        def __init__(self, model_runner, skip_prefill=False):
            built(self, model_runner, skip_prefill)

        def _run_decode_kernel(self, query, kv_cache, block_tables, seq_lens, max_seq_len, layer, **dcp):
            seen.append(("decode", self._compute_decode_bmm1_scale(layer)))
            return "flashinfer's decode"

        def _compute_decode_bmm1_scale(self, layer):
            return "the host's scale"

        def _run_prefill_kernel(self, **given):
            seen.append(("prefill", given))
            return "flashinfer's prefill"

        def forward_decode(self, q, k, v, layer, forward_batch, **dcp):
            return self._run_decode_kernel(**decode_arguments(q) | {"seq_lens": LENS.long()}, layer=layer, **dcp)

        def forward_extend(self, q, k, v, layer, forward_batch):
            given = prefill_arguments(q, k, v, forward_batch)
            names = {"query": "q", "key": "k", "value": "v", "seq_lens": "seq_lens_kv", "out": "out_buffer"}
            given = {names.get(name, name): value for name, value in given.items() if "bmm" not in name}
            return self._run_prefill_kernel(**given, layer=layer)

    module.TRTLLMMLABackend = TRTLLMMLABackend  # type: ignore[attr-defined]
    module.Other = type("Other", (TRTLLMMLABackend,), {})  # type: ignore[attr-defined]
    return module, seen


LENS = torch.tensor([3, 70], dtype=torch.int32)
LAYER = SimpleNamespace(layer_id=5, scaling=0.25, k_scale_float=None, v_scale_float=None)
HOSTS = pytest.mark.parametrize("host", [in_line, with_points])


def built(self: Any, runner: Any, skip_prefill: bool) -> None:
    given = {"data_type": E4M3, "q_data_type": torch.float16, "page_size": 64, "num_q_heads": 4, "kv_lora_rank": 512}
    given |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "skip_prefill": skip_prefill}
    vars(self).update(given | runner.changes)


def decode_arguments(q: torch.Tensor) -> dict[str, Any]:
    tables = torch.zeros(len(q), 2, dtype=torch.int32)
    cache = torch.zeros(3, 1, 64, 576).to(E4M3)
    return {"query": q, "kv_cache": cache, "block_tables": tables, "seq_lens": LENS, "max_seq_len": torch.tensor(70)}


def prefill_arguments(q: Any, k: Any, v: Any, causal: bool) -> dict[str, Any]:
    ends = torch.tensor([0, len(q)], dtype=torch.int32)
    return {
        "query": q, "key": k, "value": v, "batch_size": 1, "cum_seq_lens_q": ends, "max_q_len": len(q),
        "seq_lens": ends[1:].long(), "cum_seq_lens_kv": ends, "max_kv_len": len(k), "is_causal": causal,
        "return_lse": not causal, "bmm1_scale": 1.0, "bmm2_scale": 1.0, "out": None, "o_sf_scale": 1.0,
    }  # fmt: skip


def runner(mark: str | None = "tokenspeed_mla", **changes: Any) -> Any:
    args = SimpleNamespace(speculative_num_draft_tokens=4)
    if mark is not None:
        args._mla_patch_tokenspeed = mark
    return SimpleNamespace(server_args=args, device="cpu", changes=changes)


def queries(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1, 4, 576, generator=torch.Generator().manual_seed(0)).to(E4M3)


@HOSTS
def test_decode_through_the_seam(host: Any) -> None:
    module, seen = host()
    counts = Counts()
    trtllm_backend.install_kernel_slot(module, counts)
    backend = module.TRTLLMMLABackend(runner())
    assert isinstance(backend, module.TRTLLMMLABackend) and type(backend).__name__ == "TRTLLMMLABackend"
    seam, parts = calls.pop()
    assert (seam.heads, seam.head_dim, seam.draft_tokens, seam.has_prefill, parts) == (4, 192, 4, True, BOTH)
    out = backend.forward_decode(queries(), None, None, LAYER, None)
    assert (out.shape, out.dtype, float(out.min())) == ((2, 1, 4, 512), torch.float16, 7.0)
    (call,) = calls
    assert call.kv_cache.shape == (3, 64, 576) and call.softmax_scale == 0.25 and call.seam is seam
    assert (call.seq_lens.dtype, type(call.max_seq_len)) == (torch.int32, int)
    assert (seen, counts.served, counts.captured) == ([], 1, 0)
    # a batch that has only padding
    assert backend.forward_decode(queries(0), None, None, LAYER, None).shape == (0, 1, 4, 512)
    assert len(calls) == counts.served == 1


@HOSTS
@pytest.mark.parametrize("causal", [True, False])
def test_prefill_through_the_seam(host: Any, causal: bool) -> None:
    module, seen = host()
    counts = Counts()
    trtllm_backend.install_kernel_slot(module, counts)
    backend = module.TRTLLMMLABackend(runner())
    del calls[:]
    q, k, v = torch.randn(6, 4, 192), torch.randn(6, 4, 192).to(E4M3), torch.randn(6, 4, 128)
    out = backend.forward_extend(q, k, v, LAYER, causal)
    out, *lse = (out,) if causal else out
    assert (out.dtype, len(lse), counts.served, seen) == (torch.float16, int(not causal), 1, [])
    (call,) = calls
    # scale 1, as the host's own decode path casts
    assert torch.equal(call.q.float(), q.to(E4M3).float()) and call.k.dtype == call.v.dtype == E4M3
    assert (call.is_causal, call.return_lse, call.softmax_scale, call.batch_size) == (causal, not causal, 0.25, 1)
    assert call.seq_lens_kv.tolist() == [6] and call.cum_seq_lens_kv.tolist() == [0, 6]


@HOSTS
def test_who_is_not_ours(host: Any) -> None:
    module, seen = host()
    counts = Counts()
    trtllm_backend.install_kernel_slot(module, counts)
    ours = module.TRTLLMMLABackend(runner())
    for other in (module.TRTLLMMLABackend(runner(None)), module.Other(runner())):
        assert type(other) in (module.TRTLLMMLABackend, module.Other)
        assert other.forward_decode(queries(), None, None, LAYER, None) == "flashinfer's decode"
        q = torch.randn(6, 4, 192)
        assert other.forward_extend(q, q, q[..., :128], LAYER, True) == "flashinfer's prefill"
    assert torch.is_tensor(ours.forward_decode(queries(), None, None, LAYER, None))
    assert ([name for name, _ in seen], counts.served) == (["decode", "prefill"] * 2, 1)


@HOSTS
@pytest.mark.parametrize("part", ["decode", "prefill"])
def test_the_hosts_own_kernel_for_one_part(host: Any, part: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(mla_kernels.variable_of(part), "host")
    module, seen = host()
    trtllm_backend.install_kernel_slot(module, Counts())
    backend = module.TRTLLMMLABackend(runner())
    q = torch.randn(6, 4, 192)
    told = {
        "decode": backend.forward_decode(queries(), None, None, LAYER, None),
        "prefill": backend.forward_extend(q, q, q[..., :128], LAYER, True),
    }
    assert {name for name, out in told.items() if out == f"flashinfer's {name}"} == {part}
    assert [name for name, _ in seen] == [part]
    assert calls[0][1] == BOTH - {part}  # what the other has to prepare
    if host is with_points and part == "decode":
        assert seen == [("decode", "the host's scale")]


@HOSTS
def test_undo(host: Any) -> None:
    module, _ = host()
    before = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    init = module.TRTLLMMLABackend.__init__
    undo = trtllm_backend.install_kernel_slot(module, Counts())
    ours = module.TRTLLMMLABackend(runner())
    undo()
    assert {name: vars(module)[name] for name in before} == before and module.TRTLLMMLABackend.__init__ is init
    assert type(module.TRTLLMMLABackend(runner())) is module.TRTLLMMLABackend
    if host is with_points:  # what has been built keeps its kernels
        assert torch.is_tensor(ours.forward_decode(queries(), None, None, LAYER, None))
    undo = trtllm_backend.install_kernel_slot(module, Counts())
    module.TRTLLMMLABackend.__init__ = theirs = lambda self, model_runner: None
    module.flashinfer = "theirs"
    undo()
    assert module.TRTLLMMLABackend.__init__ is theirs and module.flashinfer == "theirs"


def test_flashinfer_is_as_it_was_to_everybody_else() -> None:
    module, _ = in_line()
    trtllm_backend.install_kernel_slot(module, Counts())
    assert (module.flashinfer.rope, module.flashinfer.decode.other) == ("rope", "other")
    del module.flashinfer
    undo = trtllm_backend.install_kernel_slot(in_line_without(module), Counts())
    with pytest.raises(AttributeError, match=r"flashinfer\.rope: flashinfer is not installed"):
        _ = module.flashinfer.rope
    undo()
    assert not hasattr(module, "flashinfer")


def in_line_without(module: ModuleType) -> ModuleType:
    fresh, _ = in_line()
    module.TRTLLMMLABackend = fresh.TRTLLMMLABackend  # type: ignore[attr-defined]
    return module


@HOSTS
@pytest.mark.parametrize(
    "changes, text",
    [
        ({"data_type": torch.bfloat16}, "tokenspeed_mla: the cache is torch.bfloat16: set --kv-cache-dtype fp8_e4m3"),
        ({"page_size": 128}, "tokenspeed_mla: pages of 128 tokens, expected 32 or 64: set --page-size 64"),
    ],
)
def test_backends_that_cannot_be(host: Any, changes: dict[str, Any], text: str) -> None:
    module, _ = host()
    trtllm_backend.install_kernel_slot(module, Counts())
    with pytest.raises(ValueError, match=text):
        module.TRTLLMMLABackend(runner(**changes))
    module.TRTLLMMLABackend(runner(None, **changes))  # nobody asked


@HOSTS
@pytest.mark.parametrize("device", [B200, H200, RTX])
def test_without_nvml_the_backend_asks_its_own_gpu(host: Any, device: Gpu, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "tokenspeed_mla", ModuleType("tokenspeed_mla"))
    monkeypatch.setattr(torch, "empty", lambda *size, device: SimpleNamespace())
    monkeypatch.setattr(gpu, "from_tensor", lambda tensor: device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(hook, "prepare", prepare)
    monkeypatch.delenv("MLA_PATCH_TOKENSPEED_DECODE")
    module, _ = host()
    trtllm_backend.install_kernel_slot(module, Counts())
    on_a_gpu = runner()
    on_a_gpu.device = "cuda"
    if device is B200:
        module.TRTLLMMLABackend(on_a_gpu)
        assert {seam.device for seam, _ in calls} == {torch.device("cuda", 3)}
    else:
        found = f"{device.capability[0]}.0 ({device.name})"
        with pytest.raises(ValueError, match=r"decode by tokenspeed_mla: its kernels need .* 10\.x") as problem:
            module.TRTLLMMLABackend(on_a_gpu)
        assert found in str(problem.value)


@HOSTS
@pytest.mark.parametrize("name", ["k_scale_float", "v_scale_float"])
def test_scales(host: Any, name: str) -> None:
    module, _ = host()
    trtllm_backend.install_kernel_slot(module, Counts())
    backend = module.TRTLLMMLABackend(runner())
    q = torch.randn(6, 4, 192)
    layer = SimpleNamespace(**vars(LAYER) | {"k_scale_float": 1.0, "v_scale_float": 1.0})
    backend.forward_extend(q, q, q[..., :128], layer, True)
    setattr(layer, name, 0.5)
    with pytest.raises(ValueError, match=f"layer 5: {name} 0.5, expected 1"):
        backend.forward_extend(q, q, q[..., :128], layer, True)


def test_ranks_are_refused() -> None:
    module, _ = with_points()
    trtllm_backend.install_kernel_slot(module, Counts())
    backend = module.TRTLLMMLABackend(runner())
    backend.forward_decode(queries(), None, None, LAYER, None, cp_world=1, cp_rank=0, causal_seqs=None)
    for more in ({"cp_world": 2}, {"return_lse": True}, {"causal_seqs": LENS}, {"cp_rank": 1}, {"new": None}):
        with pytest.raises(ValueError, match=f"decode context parallelism \\({next(iter(more))}\\) is not served"):
            backend.forward_decode(queries(), None, None, LAYER, None, **more)


@pytest.mark.parametrize(
    "change, text",
    [
        ("__init__", r"__init__ does not take \(model_runner, ...\)"),
        ("forward_decode", "forward_decode does not call flashinfer.decode.trtllm_batch_decode_with_kv_cache_mla"),
        ("forward_extend", "forward_extend does not call flashinfer.prefill.trtllm_ragged_attention_deepseek"),
    ],
)
def test_a_backend_that_has_moved(change: str, text: str) -> None:
    module, _ = in_line()
    setattr(module.TRTLLMMLABackend, change, lambda self, config: None)
    with pytest.raises(TypeError, match=text):
        trtllm_backend.install_kernel_slot(module, Counts())
    assert isinstance(module.flashinfer, SimpleNamespace)


def test_half_of_the_points() -> None:
    module, _ = with_points()
    del module.TRTLLMMLABackend._run_prefill_kernel
    with pytest.raises(TypeError, match="has _run_decode_kernel alone"):
        trtllm_backend.install_kernel_slot(module, Counts())


# the feature


@pytest.mark.parametrize(
    "version, edit, state",
    [
        ("0.5.1", "accept_backend_name", State.ARMED),
        ("0.5.11", "accept_backend_name", State.ARMED),
        ("0.5.12", "accept_other_backend_name", State.NATIVE),
        ("0.5.22", "accept_other_backend_name", State.NATIVE),
        ("0.5.23", "accept_other_backend_name", State.ARMED),
        (None, "accept_other_backend_name", State.ARMED),
    ],
)
def test_releases(version: str | None, edit: str, state: State, monkeypatch: Any) -> None:
    monkeypatch.setattr(eligibility, "_source_problem", lambda target: None)
    first = hook.FEATURE.targets(version)[0]
    assert (first.edit.__name__, hook.FEATURE.default) == (edit, "on")  # type: ignore[union-attr]
    host = Installed(HOST, version, "/nowhere", "")
    default, asked = (Setting(hook.FEATURE.flag, "on", source) for source in ("default", "environment"))
    assert eligibility.check(hook.FEATURE, default, host).state is state
    assert eligibility.check(hook.FEATURE, asked, host).state is State.ARMED  # beside the host's own


def test_calls_are_small_and_travel() -> None:
    kernel = MlaKernel("mine", "a:b")
    assert pickle.loads(pickle.dumps(kernel)) == kernel
    with pytest.raises(AttributeError):
        a_seam().heads = 3  # type: ignore[misc]
