"""Decode steps of FlashAttention-3, FlashInfer MLA and FlashMLA: what a call means, who serves it, what is stored."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version

from mla_patch import flags
from mla_patch.compat.sglang import backends as sglang_backends
from mla_patch.compat.sglang import deterministic as sglang_deterministic
from mla_patch.compat.sglang.backends import CALLS, Fa3Call, FlashInferCall
from mla_patch.compat.types import HOST, PATCH, SHADOW, Change, Edit
from mla_patch.dispatch import ArmCode, EntryPoint, FeatureGate
from mla_patch.features import Counts
from mla_patch.hooks import editing
from mla_patch.hooks.sglang import decode as sglang_decode
from mla_patch.hooks.sglang import decode_backends as sglang_decode_backends
from mla_patch.hooks.sglang.decode import FEATURE
from mla_patch.hooks.sglang.edits.scales import leave_scale_out
from mla_patch.stand_ins import stand_in

BY_NAME = {call.name: call for call in CALLS}
ERAS = ["0.5.1", "0.5.5", "0.5.6", "0.5.15", "0.5.16", "0.5.20", "0.5.21", "0.5.23"]
HEADS, SCALE, SLOTS = 2, 0.07, 1024
LENS = (5, 34, 1)
E4M3, E5M2, HALF = torch.float8_e4m3fn, torch.float8_e5m2, torch.float16


class MLATokenToKVPool:
    """The engine's pool, as far as its callers see."""

    kv_lora_rank, qk_rope_head_dim = 512, 64

    def __init__(self, dtype: torch.dtype, row: int = 576) -> None:
        self.dtype = dtype
        values = torch.randn(SLOTS, 1, row, generator=torch.Generator().manual_seed(5))
        self.buffer = values.to(dtype)[..., :576]
        self.writes: list[str] = []

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.buffer

    def set_kv_buffer(self, layer: Any, loc: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        self.write(loc, k.view(-1, 576))

    def set_mla_kv_buffer(self, layer: Any, loc: Any, k: torch.Tensor, k_rope: torch.Tensor) -> None:
        self.write(loc, torch.cat([k.view(-1, 512), k_rope.view(-1, 64)], -1))

    def write(self, loc: Any, rows: torch.Tensor) -> None:
        self.writes.append(getattr(loc, "made_for", "out_cache_loc"))
        self.bytes[getattr(loc, "loc", loc), 0] = rows.to(self.dtype).view(torch.uint8).view(len(rows), -1)

    @property
    def bytes(self) -> torch.Tensor:
        return self.buffer.view(torch.uint8)


class MLATokenToKVPoolFP4(MLATokenToKVPool):
    """Other rows."""


class HybridLinearKVPool:
    """A pool of a model with linear attention, which keeps one for the other layers."""

    def __init__(self, inner: MLATokenToKVPool) -> None:
        self.full_kv_pool = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["full_kv_pool"], name)


class WriteLoc:
    """From 0.5.22."""

    def __init__(self, loc: Any, made_for: str) -> None:
        self.loc, self.made_for = loc, made_for

    @classmethod
    def for_batch(cls, batch: Any) -> WriteLoc:
        return cls(batch.out_cache_loc, "batch")

    @classmethod
    def for_layer(cls, batch: Any, layer: Any) -> WriteLoc:
        return cls(batch.out_cache_loc, "layer")


def host_decode(self: Any, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None, **more):
    """What the engine's methods do, in float64 over this step's own slots."""
    self.asked.append(layer.k_scale)
    pool = getattr(self, "token_to_kv_pool", None) or forward_batch.token_to_kv_pool
    if k is not None and save_kv_cache:
        kind = getattr(sys.modules[type(self).__module__], "KVWriteLoc", None)
        loc: Any = forward_batch.out_cache_loc
        if hasattr(kind, "for_layer"):
            fa3 = type(self).__name__ == "FlashAttentionBackend"
            loc = kind.for_layer(forward_batch, layer) if fa3 else kind.for_batch(forward_batch)
        pool.set_kv_buffer(layer, loc, k, v) if k_rope is None else pool.set_mla_kv_buffer(layer, loc, k, k_rope)
    whole = q.reshape(-1, HEADS, 576) if q_rope is None else torch.cat([q, q_rope], -1)
    out = [dense(one, pool.get_key_buffer(0)[ids, 0]) for one, ids in zip(whole, self.slots, strict=True)]
    return torch.stack(out).to(q.dtype).view(-1, HEADS * 512) if out else q.new_empty(0, HEADS * 512)


def dense(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    if not len(keys):
        return torch.zeros(len(q), 512, dtype=torch.float64)
    keys = keys.double()
    return (q.double() @ keys.T * SCALE).softmax(-1) @ keys[:, :512]


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules in which the engine's classes are, with one class of each."""
    pools = ModuleType(sglang_backends._POOLS)
    for kind in (MLATokenToKVPool, MLATokenToKVPoolFP4, HybridLinearKVPool):
        monkeypatch.setattr(kind, "__module__", pools.__name__)
    for call in CALLS:
        module = ModuleType(call.module)
        members = {"__module__": call.module, "__qualname__": call.owner, "forward_decode": host_decode}
        members["forward_extend"] = lambda self, q, k, v, layer, *args: layer.k_scale
        setattr(module, call.owner, type(call.owner, (), members))
        monkeypatch.setitem(sys.modules, call.module, module)
    monkeypatch.setattr(sglang_decode_backends._Flag, "asked", False)
    yield


@pytest.fixture
def real_kernel() -> None:
    """For tests of what the kernel reads: half a second a call in the interpreter."""


@pytest.fixture(autouse=True)
def definition(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all other tests the kernels' definition serves, on the arguments that they are given."""
    if "real_kernel" in request.fixturenames:
        return
    from mla_patch.kernels import decode

    def fill(q: Any, out: torch.Tensor, rows: list[torch.Tensor], sm_scale: float) -> torch.Tensor:
        whole = torch.cat(q, -1) if isinstance(q, tuple) else q
        assert sm_scale == SCALE and whole.shape[2] == 576
        for one, to, mine in zip(whole, out, rows, strict=True):
            to.copy_(dense(one, mine))
        return out

    def by_tokens(q, kv, out, indptr, token_ids, *, sm_scale, logit_cap=0.0):
        ends = indptr.tolist()
        rows = [kv[token_ids[ends[b] : ends[b + 1]].long(), 0] for b in range(len(out))]
        return fill(q, out, rows, sm_scale)

    def by_pages(q, kv, out, table, lens, *, sm_scale, logit_cap=0.0):
        at = [torch.arange(length) for length in lens[: len(out)].tolist()]
        size = kv.shape[1]
        rows = [kv[table[b][t // size].long(), t % size] for b, t in enumerate(at)]
        return fill(q, out, rows, sm_scale)

    monkeypatch.setattr(decode, "mla_decode", by_tokens)
    monkeypatch.setattr(decode, "mla_decode_paged", by_pages)


class Step:
    """One decode step of a backend: its instance, its batch, its layer, and a call of its method."""

    def __init__(
        self, name: str, dtype: torch.dtype = E4M3, lens: tuple[int, ...] = LENS, page: int | None = None,
        q_dtype: torch.dtype = HALF, pool: Any = None, halves: bool = True, heads: int = HEADS,
    ) -> None:  # fmt: skip
        self.call = BY_NAME[name]
        self.module = sys.modules[self.call.module]
        self.pool = pool or MLATokenToKVPool(dtype)
        page = page or (64 if name == "flashmla" else 8 if name == "fa3" else 1)
        g = torch.Generator().manual_seed(1)
        free = (torch.randperm(SLOTS // page - 1, generator=g) + 1).tolist()
        pages = [[free.pop() for _ in range(-(-length // page))] for length in lens]
        slots = [
            [one * page + at for one in mine for at in range(page)][:length]
            for mine, length in zip(pages, lens, strict=True)
        ]
        self.backend = getattr(self.module, self.call.owner)()
        self.backend.asked, self.backend.slots, self.backend.page_size = [], slots, page
        self.backend.use_mla, self.backend.topk, self.backend.is_fp8_kvcache = True, 0, dtype.itemsize == 1
        table = torch.full((len(lens), max([80, *map(len, pages)])), -7, dtype=torch.int32)
        for row, mine in zip(table, pages, strict=True):
            row[: len(mine)] = torch.tensor(mine, dtype=torch.int32)
        counts = torch.tensor(lens, dtype=torch.int32)
        self.backend.kv_indptr = torch.tensor([0, *lens, 0, 0]).cumsum(0).int()
        ids = torch.tensor([slot for mine in slots for slot in mine] + [0] * 9, dtype=torch.int32)
        self.backend.forward_metadata = {
            "fa3": lambda: SimpleNamespace(page_table=table, cache_seqlens_int32=counts, max_seq_len_q=1),
            "flashmla": lambda: SimpleNamespace(block_kv_indices=table),
            "flashinfer": lambda: SimpleNamespace(decode_wrapper=SimpleNamespace(_kv_indices_buf=ids)),
        }[name]()
        self.batch = SimpleNamespace(
            batch_size=len(lens), seq_lens=counts.long(), spec_info=None, token_to_kv_pool=self.pool,
            out_cache_loc=torch.tensor([mine[-1] if mine else 0 for mine in slots]),
        )  # fmt: skip
        self.layer = SimpleNamespace(
            layer_id=3, head_dim=576, v_head_dim=512, tp_k_head_num=1, tp_q_head_num=heads, scaling=SCALE,
            logit_cap=0.0, sliding_window_size=-1, is_cross_attention=False, k_scale=None, k_scale_float=None,
        )  # fmt: skip
        count = len(lens)
        q = torch.randn(count, heads, 576, generator=g).to(q_dtype)
        k = torch.randn(count, 1, 576, generator=g).to(q_dtype)
        if halves and name != "flashmla":
            nope = q[..., :512].transpose(0, 1).contiguous().transpose(0, 1)  # as a model's batched product leaves it
            self.args, self.more = (nope, k[..., :512], k[..., :512]), {"q_rope": q[..., 512:], "k_rope": k[..., 512:]}
        else:
            self.args, self.more = (q, k, k[..., :512]), {}
        self.q = q

    def tensors(self) -> Iterator[tuple[Any, str]]:
        """What an engine fills anew for every step, as (holder, name)."""
        metadata = self.backend.forward_metadata
        for holder in (self.backend, metadata, self.batch, getattr(metadata, "decode_wrapper", None)):
            yield from ((holder, name) for name, one in vars(holder).items() if torch.is_tensor(one)) if holder else ()

    def on(self, device: str) -> Step:
        for holder, name in list(self.tensors()):
            setattr(holder, name, getattr(holder, name).to(device))
        self.pool.buffer, self.q = self.pool.buffer.to(device), self.q.to(device)
        self.args = tuple(one.to(device) for one in self.args)
        self.more = {name: one.to(device) for name, one in self.more.items()}
        return self

    def bind(self, **changes: Any) -> Any:
        """The call as our kernels' hook sees it; ``changes`` of its arguments."""
        given = dict(zip(("q", "k", "v"), self.args, strict=True)) | self.more | changes
        return self.call(self.backend, layer=self.layer, forward_batch=self.batch, **given)

    def reason(self, **changes: Any) -> str | None:
        return sglang_decode_backends.declines(self.bind(**changes))

    def decode(self, **changes: Any) -> Any:
        given = dict(zip(("q", "k", "v"), self.args, strict=True)) | self.more | changes
        return self.backend.forward_decode(layer=self.layer, forward_batch=self.batch, **given)

    def expected(self) -> torch.Tensor:
        rows = [
            dense(one, self.pool.get_key_buffer(0)[ids, 0]) for one, ids in zip(self.q, self.backend.slots, strict=True)
        ]
        return torch.stack(rows).view(len(rows), -1)


def patched(step: Step, monkeypatch: pytest.MonkeyPatch) -> EntryPoint:
    """Put ours in the place of the step's method."""
    hook = sglang_decode_backends
    owner = type(step.backend)
    site = EntryPoint(
        f"{owner.__name__}.forward_decode", step.call, {PATCH: ArmCode(hook.serve, hook.declines)}, Counts(),
        FeatureGate(lambda reason, state: None), sglang_decode_backends.shadow_clone,
    )  # fmt: skip
    monkeypatch.setattr(owner, "forward_decode", stand_in(vars(owner)["forward_decode"], "call", site))
    return site


def targets_of(version: str | None, group: str) -> list[Change]:
    return [one for one in sglang_decode_backends.targets(version) if one.group == group and one.kind == "call"]


@pytest.mark.parametrize("version", ERAS)
def test_every_release_binds_its_own_parameters_in_its_order(version: str) -> None:
    for name, call in BY_NAME.items():
        (target,) = targets_of(version, name)
        assert target.bind is call and (target.module, target.name) == (call.module, f"{call.owner}.forward_decode")
        taken = tuple(inspect.signature(call).parameters)
        assert ("self", *taken[1 : len(target.params)]) == target.params, name
    (fa3,) = targets_of(version, "fa3")
    assert ("q_descale" in fa3.params, "return_lse" in fa3.params) == (
        Version(version) >= Version("0.5.16"), Version(version) >= Version("0.5.21"),
    )  # fmt: skip


def test_an_unknown_release_may_have_any_of_them() -> None:
    assert [len(targets_of(None, name)) for name in BY_NAME] == [3, 1, 1]


ERA = {
    "the batch's pool": lambda step: None,
    "the backend's pool": lambda step: (
        setattr(step.backend, "token_to_kv_pool", step.batch.token_to_kv_pool)
        or delattr(step.batch, "token_to_kv_pool")
    ),
    "planned": lambda step: (
        setattr(step.module, "KVWriteLoc", WriteLoc) or setattr(step.backend, "token_to_kv_pool", step.pool)
    ),
}


@pytest.mark.parametrize("era", ERA)
@pytest.mark.parametrize("name", BY_NAME)
def test_serves_and_stores_as_the_engine_does(name: str, era: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(name)
    ERA[era](step)
    before = step.pool.bytes.clone()
    host, stored = step.decode(), step.pool.bytes.clone()
    assert not torch.equal(before, stored)
    step.pool.bytes.copy_(before)
    site = patched(step, monkeypatch)
    out = step.decode()
    assert (site.counts.served, site.counts.declined) == (1, {})
    assert torch.equal(step.pool.bytes, stored)
    made_for = {"planned": "layer" if name == "fa3" else "batch"}.get(era, "out_cache_loc")
    assert step.pool.writes == [made_for] * 2
    assert (out.shape, out.dtype) == (host.shape, host.dtype)
    torch.testing.assert_close(out.double(), step.expected(), rtol=2e-3, atol=2e-3)  # float16, values about 1


@pytest.mark.parametrize(
    ("dtype", "halves"),
    [(E4M3, False), (E5M2, True), (HALF, True), (HALF, False)],
    ids=["e4m3, whole", "e5m2, halves", "float16, halves", "float16, whole"],
)
@pytest.mark.parametrize("name", BY_NAME)
def test_every_cache(
    name: str, dtype: torch.dtype, halves: bool, monkeypatch: pytest.MonkeyPatch, real_kernel: None
) -> None:
    sglang_decode_backends.on_decision("on", True)
    step = Step(name, dtype, halves=halves)
    site = patched(step, monkeypatch)
    # without its rope FlashAttention's backend cannot store a whole key: a layer that shares one stores nothing
    out = step.decode(save_kv_cache=halves or name != "fa3")
    assert (site.counts.served, site.counts.declined) == (1, {})
    torch.testing.assert_close(out.double(), step.expected(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("page", [1, 16, 64, 128])
def test_any_page_size_of_the_server(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step("fa3", page=page, lens=(5, 30, 1))
    site = patched(step, monkeypatch)
    torch.testing.assert_close(step.decode().double(), step.expected(), rtol=2e-3, atol=2e-3)
    assert site.counts.served == 1


@pytest.mark.parametrize("name", BY_NAME)
def test_nothing_is_stored_where_the_engine_stores_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(name)
    site = patched(step, monkeypatch)
    step.decode(save_kv_cache=False)
    step.decode(k=None, v=None)
    # HybridAttnBackend and HybridLinearAttnBackend pass it by position
    step.backend.forward_decode(*step.args, step.layer, step.batch, False, **step.more)
    assert (step.pool.writes, site.counts.served) == ([], 3)
    step.backend.forward_decode(*step.args, step.layer, step.batch, True, **step.more)
    assert (len(step.pool.writes), site.counts.served) == (1, 4)


# who serves


def test_a_16_bit_cache_waits_to_be_asked_for() -> None:
    for name in BY_NAME:
        step = Step(name, HALF)
        for mode, asked_for, served in [
            ("on", False, False), ("on", True, True), ("off", True, False), ("ab", True, True),
            ("shadow", True, True), ("ab+shadow", True, True), ("on", False, False),
        ]:  # fmt: skip
            sglang_decode_backends.on_decision(mode, asked_for)
            expected = None if served else f"{name}: {sglang_decode_backends.SIXTEEN_BITS}"
            assert step.reason() == expected, (name, mode)
            assert Step(name, E4M3).reason() is None


@pytest.mark.parametrize(
    ("name", "itemsize", "capability", "says"),
    [
        ("fa3", 1, (9, 0), None),
        ("flashinfer", 1, (9, 0), None),
        ("flashmla", 1, (9, 0), None),
        ("flashinfer", 1, (10, 0), None),  # it converts the pool on every chip
        ("flashmla", 1, (10, 0), "not measured on sm_100, where only MLA_PATCH_DECODE=on serves it"),
        ("flashmla", 1, None, None),
        ("flashmla", 2, (9, 0), sglang_decode_backends.SIXTEEN_BITS),
        ("flashinfer", 2, (8, 0), sglang_decode_backends.SIXTEEN_BITS),
    ],
)
def test_who_serves_by_default(name: str, itemsize: int, capability: tuple[int, int] | None, says: str | None) -> None:
    assert sglang_decode_backends.by_default(name, itemsize, capability) == says


@pytest.mark.parametrize(
    ("set_to", "groups"),
    [
        (None, {"triton", "fa3", "flashinfer", "flashmla"}),
        ("fa3", {"fa3"}),
        (" FlashMLA , triton,", {"triton", "flashmla"}),
        ("fa4", {"triton", "fa3", "flashinfer", "flashmla"}),  # refused, and said: the default holds
    ],
)
def test_the_flag_narrows_the_backends(set_to: str | None, groups: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLA_PATCH_DECODE_BACKENDS", raising=False)
    if set_to is not None:
        monkeypatch.setenv("MLA_PATCH_DECODE_BACKENDS", set_to)
    assert {target.group for target in FEATURE.targets("0.5.23")} == groups
    who = {
        row[0].partition(",")[0] for row in sglang_decode.serves("0.5.23", (9, 0), 16, True) if row[1] == "mla-patch"
    }
    assert who == groups


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fa4", "no backend fa4, expected some of triton, fa3, flashinfer, flashmla; did you mean fa3?"),
        (" , ", "expected some of triton, fa3, flashinfer, flashmla; MLA_PATCH_DECODE=off serves none"),
    ],
)
def test_a_wrong_backend_is_refused(text: str, says: str) -> None:
    found = flags.read({"MLA_PATCH_DECODE_BACKENDS": text}, [FEATURE])
    assert found.problems == [f"MLA_PATCH_DECODE_BACKENDS={text}: {says}"]


def test_explain_tells_it_by_backend() -> None:
    rows = dict(sglang_decode.serves("0.5.23", (9, 0), 16, False))
    assert rows["triton, any cache"] == rows["fa3, an fp8 cache"] == rows["flashmla, an fp8 cache"] == "mla-patch"
    assert rows["fa3, a 16-bit cache"] == f"the engine: {sglang_decode_backends.SIXTEEN_BITS}"
    assert dict(sglang_decode.serves("0.5.23", (9, 0), 16, True))["fa3, a 16-bit cache"] == "mla-patch"
    other = dict(sglang_decode.serves("0.5.23", (10, 0), 16, False))
    assert other["triton, any cache"] == "the engine: not measured on sm_100"
    assert other["flashinfer, an fp8 cache"] == "mla-patch"
    assert other["fa3, any cache"].startswith("nobody") and "fa3, an fp8 cache" not in other


# what is left to the engine

PARALLEL = SimpleNamespace(dcp_enabled=True)
DECLINED: dict[str, tuple[str, Callable[[Step], Any], dict[str, Any], str]] = {
    "sinks": ("fa3", lambda s: None, {"sinks": torch.zeros(4)}, "sinks, which the engine's MLA decode ignores"),
    "return_lse": ("fa3", lambda s: None, {"return_lse": True}, "return_lse"),
    "score_mod": ("fa3", lambda s: None, {"score_mod": print}, "score_mod"),
    "descale": ("fa3", lambda s: None, {"k_descale": torch.ones(1)}, "k_descale"),
    "MHA": ("fa3", lambda s: setattr(s.backend, "use_mla", False), {}, "no MLA"),
    "cascade": ("fa3", lambda s: vars(s.batch).update(spec_info=1) or setattr(s.backend, "topk", 2), {},
                "a cascade of draft tokens (topk 2)"),
    "FA4": ("fa3", lambda s: setattr(s.backend, "fa_impl_ver", 4), {}, "FlashAttention 4"),
    "one split": ("fa3", lambda s: setattr(s.backend, "num_splits", 1), {}, "deterministic inference: one split"),
    "verify": ("fa3", lambda s: setattr(s.backend.forward_metadata, "max_seq_len_q", 4), {}, "4 queries per request"),
    "prompt metadata": ("fa3", lambda s: setattr(s.backend, "forward_metadata", None), {},
                        "None queries per request"),
    "other lengths": ("fa3", lambda s: setattr(s.backend.forward_metadata, "cache_seqlens_int32", torch.ones(9)), {},
                      "lengths of 9 requests, not of 3"),
    "no k_rope": ("fa3", lambda s: None, {"k_rope": None},
                  "no k_rope, without which the engine cannot store the token"),
    "no wrapper": ("flashinfer", lambda s: setattr(s.backend, "forward_metadata", SimpleNamespace()), {},
                   "no token ids in FlashInfer's wrapper"),
    "no table": ("flashmla", lambda s: setattr(s.backend, "forward_metadata", SimpleNamespace()), {},
                 "no block table"),
    "cap, FlashInfer": ("flashinfer", lambda s: setattr(s.layer, "logit_cap", 30.0), {},
                        "a logit cap, which the engine's decode ignores"),
    "cap, FlashMLA": ("flashmla", lambda s: setattr(s.layer, "logit_cap", 30.0), {},
                      "a logit cap, which the engine's decode ignores"),
    "several queries": ("flashmla", lambda s: setattr(s.batch, "batch_size", 1), {},
                        "3 rows of queries for 1 requests"),
    "half a q": ("fa3", lambda s: None, {"q": torch.zeros(3, 2, 256).half()}, "1.5 rows of queries for 3 requests"),
    "width": ("fa3", lambda s: setattr(s.layer, "head_dim", 320), {}, "1 kv heads of 320 and 512, not one of 512 + 64"),
    "NoPE": ("fa3", lambda s: setattr(s.layer, "head_dim", 512), {}, "1 kv heads of 512 and 512, not one of 512 + 64"),
    "kv heads": ("fa3", lambda s: setattr(s.layer, "tp_k_head_num", 8), {},
                 "8 kv heads of 576 and 512, not one of 512 + 64"),
    "cross": ("fa3", lambda s: setattr(s.layer, "is_cross_attention", True), {}, "cross attention"),
    "window": ("fa3", lambda s: setattr(s.layer, "sliding_window_size", 127), {},
               "a sliding window, which the engine's MLA decode ignores"),
    "keys alone": ("flashmla", lambda s: None, {"v": None}, "keys without values"),
    "DCP": ("flashinfer", lambda s: setattr(s.module, "get_parallel", lambda: PARALLEL), {},
            "decode context parallelism, which needs the log-sum-exp"),
    "DCP 0.5.15": ("flashmla", lambda s: vars(s.module).update(dcp_enabled=lambda: True, get_parallel=SimpleNamespace),
                   {}, "decode context parallelism, which needs the log-sum-exp"),
    "FP4": ("fa3", lambda s: setattr(s.batch, "token_to_kv_pool", MLATokenToKVPoolFP4(E4M3)), {},
            "another kind of cache, MLATokenToKVPoolFP4"),
    "a stranger's pool": ("fa3", lambda s: setattr(s.batch, "token_to_kv_pool", SimpleNamespace()), {},
                          "another kind of cache, SimpleNamespace"),
    "two pools": ("fa3", lambda s: setattr(s.backend, "token_to_kv_pool", MLATokenToKVPool(E4M3)), {},
                  "two caches, or none"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "given", "says"), DECLINED.values(), ids=DECLINED)
def test_declined(name: str, change: Callable[[Step], Any], given: dict[str, Any], says: str) -> None:
    sglang_decode_backends.on_decision("on", True)
    step = Step(name)
    assert step.reason() is None
    change(step)
    assert step.reason(**given) == f"{name}: {says}"


@pytest.mark.parametrize("name", BY_NAME)
def test_a_subclass_is_left_alone(name: str) -> None:
    step = Step(name)
    other = type("Other", (type(step.backend),), {"__module__": "elsewhere"})
    step.backend.__class__ = other
    assert step.reason() == f"{name}: another backend class, Other"


def test_deterministic_inference_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_deterministic, "is_on", lambda: True)
    sglang_decode_backends.on_decision("on", True)
    assert [Step(name).reason() for name in BY_NAME] == [f"{name}: {sglang_deterministic.REASON}" for name in BY_NAME]


def test_a_hybrid_models_pool_is_read_through_its_own_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step("fa3", pool=HybridLinearKVPool(MLATokenToKVPool(E4M3)))
    site = patched(step, monkeypatch)
    torch.testing.assert_close(step.decode().double(), step.expected(), rtol=2e-3, atol=2e-3)
    assert site.counts.served == 1
    assert Step("fa3", pool=HybridLinearKVPool(MLATokenToKVPoolFP4(E4M3))).reason() == (
        "fa3: another kind of cache, HybridLinearKVPool"
    )


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "no q": ({"q": None}, "q: expected a tensor, found NoneType"),
    "q is text": ({"q": "q"}, "q: expected a tensor, found str"),
    "k is a number": ({"k": 1}, "k: expected a tensor, found int"),
    "another keyword": ({"tree_mask": None}, "unknown argument tree_mask"),
}


@pytest.mark.parametrize(("given", "says"), ODD.values(), ids=ODD)
def test_what_nobody_takes_is_the_engines_and_stops_nothing(
    given: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step("fa3")
    monkeypatch.setattr(type(step.backend), "forward_decode", lambda self, **more: "host")
    site = patched(step, monkeypatch)
    for _ in range(3):
        assert step.decode(**given) == "host"
    assert site.counts.declined == {says: 3}
    step.decode()
    assert (site.counts.served, site.switch.stopped) == (1, "")


def test_what_the_launcher_refuses_is_declined_and_stored_once_more(
    monkeypatch: pytest.MonkeyPatch, real_kernel: None
) -> None:
    sglang_decode_backends.on_decision("on", True)
    step = Step("fa3", torch.bfloat16)  # beside a float16 q
    site = patched(step, monkeypatch)
    assert step.decode().shape == (3, HEADS * 512)
    assert list(site.counts.declined) == [
        "kv: torch.bfloat16, expected torch.float16 as q, torch.float8_e4m3fn or torch.float8_e5m2"
    ]
    assert step.pool.writes == ["out_cache_loc"] * 2 and not site.switch.stopped


# traps


def test_flashinfers_stale_lengths_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a graph's replay the wrapper's own indptr is what it was at capture; on a GPU it is no alias of the other."""
    step = Step("flashinfer")
    wrapper = step.backend.forward_metadata.decode_wrapper
    wrapper._kv_indptr_buf = torch.arange(len(LENS) + 1, dtype=torch.int32)
    patched(step, monkeypatch)
    torch.testing.assert_close(step.decode().double(), step.expected(), rtol=2e-3, atol=2e-3)


def test_flashmlas_table_of_one_column_is_the_whole_one(monkeypatch: pytest.MonkeyPatch, real_kernel: None) -> None:
    """At capture the lengths are 1 and the view as narrow; its graph is replayed with others over the same memory."""
    step = Step("flashmla", lens=(5, 300, 77))
    patched(step, monkeypatch)
    whole = step.decode()
    metadata = step.backend.forward_metadata
    metadata.block_kv_indices = metadata.block_kv_indices[:, :1]
    assert torch.equal(step.decode(), whole)
    torch.testing.assert_close(whole.double(), step.expected(), rtol=2e-3, atol=2e-3)


def test_strides_of_dimensions_of_one_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step("fa3", page=1)
    buffer = step.pool.buffer
    step.pool.buffer = buffer.as_strided(buffer.shape, (576, 7, 1))
    site = patched(step, monkeypatch)
    torch.testing.assert_close(step.decode().double(), step.expected(), rtol=2e-3, atol=2e-3)
    assert site.counts.served == 1


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_graph_captured_at_one_length_is_right_at_others(name: str, heads: int, real_kernel: None) -> None:
    """As the engine does: captured with lengths of 1, then the same memory filled with another step's."""
    lens = (300, 1, 77)
    page = {"page": 16} if name == "fa3" else {}
    captured = Step(name, lens=(1, 1, 1), q_dtype=torch.bfloat16, heads=heads, **page).on("cuda")
    metadata, serve = captured.backend.forward_metadata, sglang_decode_backends.serve
    if name == "flashmla":
        metadata.block_kv_indices = metadata.block_kv_indices[:, :1]
    if name == "flashinfer":  # its buffer has room for any lengths
        wrapper = metadata.decode_wrapper
        wrapper._kv_indices_buf = torch.zeros(500, dtype=torch.int32, device="cuda")
        wrapper._kv_indptr_buf = torch.arange(4, dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        serve(captured.bind())  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = serve(captured.bind())
    for lengths in (lens, (2, 400, 33)):
        later = Step(name, lens=lengths, q_dtype=torch.bfloat16, heads=heads, **page).on("cuda")
        there = {key: one for holder, key in later.tensors() for one in [getattr(holder, key)]}
        for holder, key in captured.tensors():
            if key == "_kv_indptr_buf":
                continue  # which a replay leaves as it was
            target, source = getattr(holder, key), there[key]
            if target.shape != source.shape:  # the view of a capture: its storage is the engine's whole buffer
                target = (
                    target.as_strided(source.shape, target.stride()) if target.dim() == 2 else target[: len(source)]
                )
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        captured.backend.slots = later.backend.slots
        # a bfloat16 result, and values about 1
        torch.testing.assert_close(out.double(), captured.expected(), rtol=1e-2, atol=1e-2)


# bad input


@pytest.mark.parametrize("name", BY_NAME)
def test_rows_of_the_pool_that_lie_apart(name: str, monkeypatch: pytest.MonkeyPatch, real_kernel: None) -> None:
    step = Step(name, pool=MLATokenToKVPool(E4M3, row=640))
    site = patched(step, monkeypatch)
    torch.testing.assert_close(step.decode().double(), step.expected(), rtol=2e-3, atol=2e-3)
    assert site.counts.served == 1


def test_a_pool_of_another_shape_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step("fa3")
    step.pool.buffer = step.pool.buffer[..., ::2]
    monkeypatch.setattr(type(step.backend), "forward_decode", lambda self, **more: "host")
    site = patched(step, monkeypatch)
    assert step.decode() == "host" and step.pool.writes == []
    assert list(site.counts.declined) == ["a cache of shape (1024, 1, 288), strides (576, 576, 2), not [slots, 1, 576]"]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_query_of_another_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(name)
    site = patched(step, monkeypatch)
    want = step.decode()
    q = step.args[0]
    assert torch.equal(step.decode(q=q.reshape(3, -1)), want) and site.counts.served == 2
    strange = q.transpose(1, 2).contiguous().transpose(1, 2)  # its last dimension lies apart
    torch.testing.assert_close(step.decode(q=strange), want, rtol=2e-3, atol=2e-3)  # by whomsoever


@pytest.mark.parametrize("name", BY_NAME)
def test_a_table_that_is_wider_than_the_context(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies past a request's pages is not read: it may be anything."""
    step = Step(name)
    metadata = step.backend.forward_metadata
    patched(step, monkeypatch)
    want = step.decode()
    key = {"fa3": "page_table", "flashmla": "block_kv_indices"}.get(name)
    if key is None:
        wrapper = metadata.decode_wrapper
        wrapper._kv_indices_buf = torch.cat([wrapper._kv_indices_buf[: sum(LENS)], torch.full((500,), 1 << 30)]).int()
    else:
        table = getattr(metadata, key)
        setattr(metadata, key, torch.cat([table, torch.full((3, 40), 1 << 30, dtype=torch.int32)], 1))
    assert torch.equal(step.decode(), want)


@pytest.mark.parametrize("lens", [(0, 3), ()], ids=["one without", "no requests"])
@pytest.mark.parametrize("name", BY_NAME)
def test_requests_without_keys(
    name: str, lens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, real_kernel: None
) -> None:
    step = Step(name, lens=lens)
    site = patched(step, monkeypatch)
    out = step.decode(save_kv_cache=False)
    assert (out.shape, site.counts.served) == ((len(lens), HEADS * 512), 1)
    for row, length in zip(out, lens, strict=True):
        assert bool(row.any()) == bool(length)


# scales


@pytest.mark.parametrize("version", [version for version in ERAS if Version(version) >= Version("0.5.6")])
def test_flashmlas_scale_is_left_out_on_both_arms(
    version: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = [one for one in sglang_decode_backends.targets(version) if one.name == "FlashMLABackend.scales"]
    assert [(one.edit, one.survives_restore) for one in edits] == [(leave_scale_out, True)]

    monkeypatch.setattr(editing, "_said", set())
    step = Step("flashmla")
    step.layer.k_scale, step.layer.k_scale_float = torch.tensor(0.5), 0.5
    undo = leave_scale_out(step.module)
    with caplog.at_level(logging.WARNING, "mla_patch"):
        step.decode(), step.decode()
    assert step.backend.asked == [None, None]
    assert step.backend.forward_extend(*step.args, step.layer, step.batch) is None
    assert [record.getMessage() for record in caplog.records] == [
        "mla-patch: the checkpoint's k_scale (0.5, layer 3) is not used: "
        "SGLang's FlashMLA backend stores latents without"
    ]
    step.layer.k_scale_float = 1.0  # as the engine has it without a checkpoint's: nothing to leave out
    step.decode()
    assert step.backend.asked[2] is step.layer.k_scale
    undo()
    step.layer.k_scale_float = 0.5
    step.decode()
    assert step.backend.asked[3] is step.layer.k_scale


def test_to_0_5_5_flashmla_reads_without_a_scale() -> None:
    assert not [one for one in sglang_decode_backends.targets("0.5.5") if one.name == "FlashMLABackend.scales"]


@pytest.mark.parametrize("name", BY_NAME)
def test_ours_reads_what_is_stored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(name)
    step.layer.k_scale, step.layer.k_scale_float = torch.tensor(0.5), 0.5
    patched(step, monkeypatch)
    torch.testing.assert_close(step.decode().double(), step.expected(), rtol=2e-3, atol=2e-3)


# experiments


class Chosen:
    candidate = PATCH

    def __init__(self, arm: str) -> None:
        self.arm = arm
        self.pairs: list[Any] = []

    def choose(self, site: Any, call: Any) -> str:
        return self.arm

    def compare(self, pairs: list[Any]) -> None:
        self.pairs += pairs


@pytest.mark.parametrize("name", BY_NAME)
def test_arms_and_shadow_checks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(name)
    site = patched(step, monkeypatch)
    arms = {arm: Chosen(arm) for arm in (HOST, PATCH, SHADOW)}
    outs = {}
    for arm, chosen in arms.items():
        before = step.pool.bytes.clone()
        site.switch.set(arms=chosen)
        outs[arm] = step.decode()
        if arm == HOST:
            stored = step.pool.bytes.clone()
        assert torch.equal(step.pool.bytes, stored), arm  # a shadow check stores the same bytes twice
        step.pool.bytes.copy_(before)
    assert [len(chosen.pairs) for chosen in arms.values()] == [0, 0, 1]
    ((host, ours),) = arms[SHADOW].pairs
    assert host is outs[SHADOW] and torch.equal(host, outs[HOST]) and torch.equal(ours, outs[PATCH])
    assert site.counts.served == 2 and site.counts.served_by == {site.name: 2}
    assert len(step.pool.writes) == 4


@pytest.mark.parametrize("candidate", [PATCH, "mine"])
def test_an_arm_for_the_triton_backends_calls_gets_none_of_these(
    candidate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = sglang_decode_backends.targets("0.5.23")
    assert [one.arms for one in targets if one.kind == "call"] == [False] * 3
    step = Step("fa3")
    site = patched(step, monkeypatch)
    want = step.decode(save_kv_cache=False)
    for arm in ("mine", SHADOW):
        chosen = Chosen(arm)
        chosen.candidate = candidate
        site.switch.set(arms=chosen)
        torch.testing.assert_close(step.decode(save_kv_cache=False), want, rtol=2e-3, atol=2e-3)
    assert not site.switch.stopped
    times = 1 if candidate == PATCH else 2
    assert site.counts.declined == {"the arm mine has no code for this entry point": times}


# warm-up


class Runner:
    dtype, device = HALF, "cpu"
    model_config = SimpleNamespace(num_attention_heads=32)
    req_to_token_pool = SimpleNamespace(size=6)

    def __init__(self, dtype: torch.dtype) -> None:
        self.token_to_kv_pool: Any = MLATokenToKVPool(dtype)


@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is compiled, over classes whose ``__init__`` is as the engine's: FlashMLA's calls FlashInfer's."""
    from mla_patch.kernels import decode

    def init(self: Any, model_runner: Any, skip_prefill: bool = False) -> None:
        if type(self).__name__ == "FlashMLABackend" and not hasattr(self, "page_size"):
            self.page_size = 0
            flashinfer.__init__(self, model_runner)
        self.page_size, self.use_mla = 16, True

    flashinfer = sys.modules[FlashInferCall.module].FlashInferMLAAttnBackend
    for call in CALLS:
        monkeypatch.setattr(getattr(sys.modules[call.module], call.owner), "__init__", init, raising=False)
    ranks = SimpleNamespace(get_attention_tp_size=lambda: 2)
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.dp_attention", ranks)
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(decode, "warmup", lambda *args: asked.append(args) or 1)
    return asked


def test_a_backend_is_warmed_once_it_is_built(warmed: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture) -> None:
    edits = [one for one in sglang_decode_backends.targets("0.5.23") if isinstance(one, Edit) and "warmup" in one.name]
    undos = [one.edit(sys.modules[one.module]) for one in edits]
    expected = {
        "fa3": [(16, (torch.int32, torch.int32), True)], "flashinfer": [(0, (torch.int32, torch.int32), True)],
        "flashmla": [(64, (torch.int32, torch.int32), False), (64, (torch.int64, torch.int32), False)],
    }  # fmt: skip
    for name, call in BY_NAME.items():
        owner = getattr(sys.modules[call.module], call.owner)
        owner(Runner(E4M3))
        assert warmed == [("cpu", 16, HALF, E4M3, 6, *rest) for rest in expected[name]], name
        warmed.clear()
        owner(Runner(HALF))
        assert warmed == []  # its calls are declined
        sglang_decode_backends.on_decision("on", True)
        owner(Runner(HALF))
        assert [args[3] for args in warmed] == [HALF] * len(expected[name])
        sglang_decode_backends.on_decision("on", False)
        warmed.clear()
        other = Runner(E4M3)
        other.token_to_kv_pool = SimpleNamespace()
        owner(other)
        assert warmed == []
    for undo in undos:
        undo()
    getattr(sys.modules[Fa3Call.module], Fa3Call.owner)(Runner(E4M3))
    assert warmed == [] and "no warm-up" not in caplog.text


def test_the_runtimes_context_knows_the_ranks_of_later_releases(
    warmed: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.dp_attention", SimpleNamespace())
    context = SimpleNamespace(get_parallel=lambda: SimpleNamespace(attn_tp_size=4))
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
    module = sys.modules[Fa3Call.module]
    backend = module.FlashAttentionBackend(Runner(E4M3))
    told = sglang_backends.warmup_of(Fa3Call, backend, Runner(E4M3))
    assert told is not None and told.heads == 8
    monkeypatch.setattr(module, "get_parallel", lambda: PARALLEL, raising=False)
    assert sglang_backends.warmup_of(Fa3Call, backend, Runner(E4M3)) is None


def test_a_warm_up_by_pages_compiles_what_serving_does(monkeypatch: pytest.MonkeyPatch, real_kernel: None) -> None:
    """Every launch that a warm-up makes has the types of a call's."""
    from mla_patch.kernels.decode import cases

    seen = []
    kernel = cases.mla_decode_paged

    def note(q, kv, out, table, lens, **options):
        seen.append((kv.shape[1], kv.dtype, table.dtype, lens.dtype, [part.shape for part in q]))
        return kernel(q, kv, out, table, lens, **options)

    monkeypatch.setattr(cases, "mla_decode_paged", note)
    cases.warmup("cpu", HEADS, HALF, E4M3, 2, 64, (torch.int64, torch.int32), True)
    parts = [[(batch, HEADS, 512), (batch, HEADS, 64)] for batch in (1, 2)]
    assert seen == [(64, E4M3, torch.int32, torch.int64, shapes) for shapes in parts]


def test_a_compiled_step_reaches_ours(run_python) -> None:
    """As the engine's own disable of its Triton decode: Dynamo breaks its graph there. In a process of its own."""
    code = """
import sys, torch
from types import ModuleType
from mla_patch.compat.sglang.backends import Fa3Call
from mla_patch.dispatch import ArmCode, EntryPoint, FeatureGate
from mla_patch.stand_ins import stand_in
from mla_patch.features import Counts

module = ModuleType(Fa3Call.module)
sys.modules[Fa3Call.module] = module
exec('''
class FlashAttentionBackend:
    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None, sinks=None):
        return q + 1
''', vars(module))
owner = module.FlashAttentionBackend
counts = Counts()
arm = ArmCode(lambda call: call.q + 10, lambda call: None)
gate = FeatureGate(lambda *told: None)
site = EntryPoint("FlashAttentionBackend.forward_decode", Fa3Call, {"patch": arm}, counts, gate)
owner.forward_decode = stand_in(owner.forward_decode, "call", site)
backend = owner()

@torch.compile(backend="eager")
def step(x):
    return backend.forward_decode(x * 2, None, None, None, None, save_kv_cache=False) * 3

print(step(torch.ones(2)).tolist(), step(torch.ones(2)).tolist(), counts.served)
"""
    assert run_python(code, check=True).stdout == "[36.0, 36.0] [36.0, 36.0] 2\n"
