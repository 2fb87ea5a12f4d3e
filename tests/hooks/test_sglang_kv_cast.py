"""Which calls of FA3's and FlashInfer's backends are ours to cast for, on objects that stand in for the host's."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mla_patch.compat import gpu
from mla_patch.compat.sglang import kv_cast as compat
from mla_patch.compat.sglang.backends import pool_of as the_pool
from mla_patch.compat.sglang.kv_cast import Fa3Extend, FlashInferExtend
from mla_patch.compat.types import Target
from mla_patch.hooks.sglang import kv_cast as hook
from mla_patch.hooks.sglang.kv_cast import declines, serve

E4M3 = torch.float8_e4m3fn
SLOTS = 64


class Pool:
    def __init__(self, dtype: torch.dtype = E4M3, shape: tuple[int, ...] = (SLOTS, 1, 576)) -> None:
        self.dtype, self.reads = dtype, 0
        self.buffer = torch.randn(shape).to(dtype)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        self.reads += 1
        return self.buffer


Pool.__module__, Pool.__qualname__ = "sglang.srt.mem_cache.memory_pool", "MLATokenToKVPool"


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two backends' own, which may say that decode is divided over ranks."""
    for call in (Fa3Extend, FlashInferExtend):
        monkeypatch.setitem(sys.modules, call.home.module, ModuleType("a backend's"))


def mode(verify: bool = False) -> Any:
    return SimpleNamespace(is_target_verify=lambda: verify)


def layer(**changes: Any) -> Any:
    usual = {"layer_id": 0, "head_dim": 576, "v_head_dim": 512, "tp_k_head_num": 1, "is_cross_attention": False}
    return SimpleNamespace(**usual | {"sliding_window_size": None} | changes)


def ints(*rows: Any) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def fa3(
    pool: Any = None, batch: dict[str, Any] | None = None, of_layer: dict[str, Any] | None = None, q: Any = None,
    metadata: dict[str, Any] | None = None, **backend: Any,
) -> Fa3Extend:  # fmt: skip
    """Two requests of 2 and 1 tokens."""
    told = {"page_table": ints([5, 9], [40, 0]), "cache_seqlens_int32": ints(2, 1)}
    usual = {"use_mla": True, "topk": 1, "page_size": 1, "token_to_kv_pool": pool or Pool()}
    usual |= {"forward_metadata": SimpleNamespace(**told | (metadata or {}))}
    step = SimpleNamespace(**{"forward_mode": mode(), "seq_lens_sum": 3} | (batch or {}))
    q = torch.zeros(3, 2 * 512, dtype=torch.float16) if q is None else q
    return Fa3Extend(SimpleNamespace(**usual | backend), q, None, None, layer(**of_layer or {}), step)


class Wrapper:
    def __init__(self, **changes: Any) -> None:
        usual = {"_kv_indices_buf": ints(5, 9, 40), "_use_cuda_graph": False, "_page_size": 1}
        vars(self).update(usual | {"_kv_indptr_buf": ints(0, 2, 3)} | changes)

    def run(self, cache: torch.Tensor) -> torch.Tensor:
        return cache[self._kv_indices_buf.long()]


def flashinfer(wrapper: Any = None, ragged: bool = False, batch: dict[str, Any] | None = None) -> FlashInferExtend:
    metadata = SimpleNamespace(prefill_wrapper=wrapper or Wrapper(), use_ragged=ragged)
    backend = SimpleNamespace(forward_metadata=metadata, token_to_kv_pool=Pool())
    q = torch.zeros(3, 2 * 512, dtype=torch.float16)
    return FlashInferExtend(backend, q, None, None, layer(), SimpleNamespace(**{"seq_lens_sum": 3} | (batch or {})))


CALLS = {
    "served fa3": (fa3, None),
    "served flashinfer": (flashinfer, None),
    "16 bits": (lambda: fa3(Pool(torch.bfloat16)), "a cache of bfloat16: nothing to cast"),
    "MHA": (lambda: fa3(of_layer={"head_dim": 192, "v_head_dim": 128}), compat.NOT_ABSORBED),
    "two heads": (lambda: fa3(of_layer={"tp_k_head_num": 2}), compat.NOT_ABSORBED),
    "no MLA": (lambda: fa3(use_mla=False), compat.NOT_ABSORBED),
    "an fp8 query": (lambda: fa3(q=torch.zeros(3, 1024, dtype=E4M3)), compat.NOT_16_BIT),
    "a float32 query": (lambda: fa3(q=torch.zeros(3, 1024)), compat.NOT_16_BIT),
    "a window": (lambda: fa3(of_layer={"sliding_window_size": 0}), compat.WINDOW),
    "an encoder": (lambda: fa3(of_layer={"is_cross_attention": True}), compat.WINDOW),
    "chunks": (lambda: fa3(of_layer={"use_irope": True}), compat.WINDOW),
    "prefill CP": (lambda: fa3(batch={"attn_cp_metadata": object()}), compat.PARALLEL),
    "two pools": (lambda: fa3(batch={"token_to_kv_pool": Pool()}), compat.OTHER_POOL),
    "a pool of another class": (lambda: fa3(SimpleNamespace(dtype=E4M3)), compat.OTHER_POOL),
    "another pool": (lambda: fa3(Pool(shape=(SLOTS, 1, 656))), compat.OTHER_POOL),
    "a pool in pages": (lambda: fa3(Pool(shape=(SLOTS, 576))), compat.OTHER_POOL),
    "an int64 table": (lambda: fa3(metadata={"page_table": ints([1]).long()}), compat.OTHER_TABLE),
    "pages that do not divide": (lambda: fa3(page_size=48), compat.OTHER_TABLE),
    "a tree over pages": (lambda: fa3(batch={"forward_mode": mode(True)}, topk=2, page_size=16), compat.SLOTS_IN_PAGES),
    "no request": (lambda: fa3(metadata={"page_table": ints().view(0, 4)}), compat.NOTHING),
    "more than the pool": (lambda: fa3(batch={"seq_lens_sum": SLOTS + 1}), compat.MANY),
    "ragged": (lambda: flashinfer(ragged=True), compat.RAGGED),
    "not planned": (lambda: flashinfer(Wrapper(_kv_indices_buf=None)), compat.OTHER_TABLE),
    "another wrapper": (lambda: flashinfer(SimpleNamespace()), compat.OTHER_TABLE),
    "DFLASH": (
        lambda: flashinfer(
            Wrapper(_use_cuda_graph=True),
            batch={"spec_info": SimpleNamespace(spec_input_type=SimpleNamespace(name="DFLASH_VERIFY"))},
        ),
        compat.NO_LENGTHS,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_declined(name: str) -> None:
    make, reason = CALLS[name]
    assert declines(make()) == reason


def test_decode_context_parallelism() -> None:
    call = flashinfer()
    vars(sys.modules[call.home.module])["dcp_enabled"] = lambda: True
    assert declines(call) == compat.PARALLEL


def test_a_16_bit_pool_is_not_looked_at() -> None:
    """Every layer of every prompt of most servers comes here."""
    pool = Pool(torch.bfloat16)
    declines(fa3(pool))
    assert pool.reads == 0


def read_fa3(backend: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """The host's method, as far as it reads: each request's rows in 16 bits."""
    pool = getattr(batch, "token_to_kv_pool", None) or backend.token_to_kv_pool
    table, lens = backend.forward_metadata.page_table, backend.forward_metadata.cache_seqlens_int32.tolist()
    cache = pool.get_key_buffer(layer.layer_id).to(q.dtype)
    return [cache[table[b, :length].long(), 0] for b, length in enumerate(lens)], len(cache), args, kwargs


@pytest.mark.parametrize("pool_of", ["backend", "batch"])
def test_the_hosts_method_reads_a_workspace(pool_of: str) -> None:
    call = fa3()
    pool = the_pool(call)
    if pool_of == "batch":
        call.batch.token_to_kv_pool, call.backend.token_to_kv_pool = pool, None
    call.args, call.kwargs = (True,), {"q_rope": 7}
    before = dict(vars(call.backend.forward_metadata))
    rows, held, args, kwargs = serve(read_fa3, call)
    want = pool.buffer.to(torch.float16)[:, 0]
    assert torch.equal(rows[0], want[[5, 9]]) and torch.equal(rows[1], want[[40]])
    assert (held, args, kwargs) == (4, (True,), {"q_rope": 7})
    # nothing of the host's has been changed
    assert vars(call.backend.forward_metadata) == before and the_pool(call) is pool


def test_tables_wider_than_the_pool_keep_their_numbers() -> None:
    wide = torch.full((2, SLOTS), 99, dtype=torch.int32)
    wide[:, :2] = ints([5, 9], [40, 0])
    call = fa3(metadata={"page_table": wide})
    rows, held, *_ = serve(read_fa3, call)
    assert torch.equal(rows[0], the_pool(call).buffer.to(torch.float16)[[5, 9], 0]) and held == SLOTS


def test_flashinfers_list_is_another_while_it_runs() -> None:
    call = flashinfer()
    wrapper = call.backend.forward_metadata.prefill_wrapper
    planned = wrapper._kv_indices_buf

    def read(backend: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any) -> Any:
        cache = backend.token_to_kv_pool.get_key_buffer(0)
        return backend.forward_metadata.prefill_wrapper.run(cache), len(cache)

    rows, held = serve(read, call)
    assert torch.equal(rows, the_pool(call).buffer.to(torch.float16)[[5, 9, 40]]) and held == 3
    assert wrapper._kv_indices_buf is planned
    wrapper.run = lambda cache: 1 / 0
    with pytest.raises(ZeroDivisionError):
        serve(read, call)
    assert wrapper._kv_indices_buf is planned


def test_a_graphs_buffer_counts_up_to_its_indptr() -> None:
    """What lies behind is of other requests, or of none."""
    buffer = torch.full((9,), 63, dtype=torch.int32)
    buffer[:3] = ints(5, 9, 40)
    call = flashinfer(Wrapper(_use_cuda_graph=True, _kv_indices_buf=buffer))
    table = call.tables()[0]
    assert (table.ids.shape, table.lens.tolist(), table.page_size) == ((1, 9), [3], 1)
    call.backend.forward_metadata.prefill_wrapper._kv_indptr_buf.copy_(ints(0, 4, 8))  # a replay's
    assert table.lens.tolist() == [8]


def runner(**changes: Any) -> Any:
    config = SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64)
    usual = {"model_config": config, "kv_cache_dtype": E4M3, "device": "cpu", "dtype": torch.bfloat16}
    return SimpleNamespace(**usual | changes)


def test_what_a_backend_can_ask() -> None:
    backend = SimpleNamespace(use_mla=True, page_size=64)
    assert compat.warmup_of(backend, runner()) == compat.CastWarmup("cpu", torch.bfloat16, E4M3, (1, 64))
    assert compat.warmup_of(SimpleNamespace(page_size=1), runner()).page_sizes == (1,)  # FlashInfer's says no use_mla
    assert compat.warmup_of(SimpleNamespace(use_mla=False, page_size=1), runner()) is None
    assert compat.warmup_of(backend, runner(kv_cache_dtype=torch.bfloat16)) is None
    assert (
        compat.warmup_of(backend, runner(model_config=SimpleNamespace(kv_lora_rank=256, qk_rope_head_dim=64))) is None
    )
    assert compat.warmup_of(backend, runner(model_config=SimpleNamespace())) is None


def test_warming(monkeypatch: pytest.MonkeyPatch) -> None:
    from mla_patch.kernels.cache import kv_cast

    asked = compat.CastWarmup("cpu", torch.bfloat16, E4M3, (1, 64))
    assert hook.warm(asked) == 0
    warmed: list[Any] = []
    monkeypatch.setattr(gpu, "on_nvidia", lambda tensor: True)
    monkeypatch.setattr(kv_cast, "warmup", lambda *what: warmed.append(what) or 4)
    assert hook.warm(asked) == 8
    assert warmed == [("cpu", torch.bfloat16, E4M3, 1), ("cpu", torch.bfloat16, E4M3, 64)]


def test_targets_without_a_version_are_those_of_all() -> None:
    every = {(one.module, one.name, one.params) for one in hook.targets(None) if isinstance(one, Target)}
    releases = ("0.5.1", "0.5.16", "0.5.23")
    known = [one for release in releases for one in hook.targets(release) if isinstance(one, Target)]
    some = {(one.module, one.name, one.params) for one in known}
    assert every == some
