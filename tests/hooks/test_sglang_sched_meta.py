"""FlashMLA's wrappers in SGLang: what every release's call means to us, and who serves it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from scratch import TESTS, clean_env

from mla_patch import flash_mla
from mla_patch.compat import gpu
from mla_patch.compat.sglang import flash_mla as compat
from mla_patch.compat.triton import interpreted
from mla_patch.compat.types import Gpu
from mla_patch.dispatch import ArmCode, EntryPoint, FeatureGate
from mla_patch.features import Counts
from mla_patch.hooks.sglang import flash_mla_providers as providers
from mla_patch.hooks.sglang import sched_meta as hook
from mla_patch.hooks.sglang.edits import flash_mla_package
from mla_patch.hooks.sglang.edits import flash_mla_reach as reach
from mla_patch.kernels.cache.layouts import V4, new_pages
from mla_patch.kernels.sparse import decode as sparse_decode
from mla_patch.kernels.sparse import dense as dense_decode
from mla_patch.kernels.sparse import prefill as sparse_prefill
from mla_patch.stand_ins import stand_in

SM90, SM100, SM120 = (9, 0), (10, 0), (12, 0)
CPU = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1: tensors lie on the CPU")


@pytest.fixture
def machine(monkeypatch):
    """A GPU of some capability, and a FlashMLA build with the operators of the older and the newer API."""

    def set_(capability=SM90, older=True, newer=True):
        monkeypatch.setattr(providers, "capability_of", lambda tensor: capability)
        monkeypatch.setattr(compat, "operators", lambda module: (older, newer))
        monkeypatch.setattr(compat, "prefill_arity", lambda module: 7 if newer else 5 if older else 0)

    set_()
    return set_


def targets(version: str, name: str) -> list[Any]:
    return [one for one in hook.targets(version) if one.name.endswith(name)]


def sparse(width: int = 576, heads: int = 64, topk: int = 64, batch: int = 2, **more: Any) -> dict[str, Any]:
    bytes_ = {512: 584}.get(width, 656)
    return {
        "q": torch.zeros(batch, 1, heads, width), "k_cache": torch.zeros(1, 64, 1, bytes_, dtype=torch.uint8),
        "block_table": None, "cache_seqlens": None, "head_dim_v": 512, "is_fp8_kvcache": True,
        "tile_scheduler_metadata": torch.zeros(1, 8), "num_splits": torch.zeros(3), "softmax_scale": 0.5,
        "indices": torch.zeros(batch, 1, topk, dtype=torch.int32),
    } | more  # fmt: skip


def dense(width: int = 576, page: int = 64, **more: Any) -> dict[str, Any]:
    call = sparse(width, **more) | {"k_cache": torch.zeros(1, page, 1, width)}
    return {name: value for name, value in call.items() if name not in ("indices", "is_fp8_kvcache")}


META = {"tile_scheduler_metadata": flash_mla.FlashMLASchedMeta(), "num_splits": None}
LENGTHS = {"topk_length": torch.zeros(2, dtype=torch.int32)}
E4M3 = {"q": torch.zeros(2, 1, 64, 576).to(torch.float8_e4m3fn)}
DESCALES = {"descale_q": torch.ones(1), "descale_k": torch.ones(1)}
PAGES_OF_32 = {"k_cache": torch.zeros(1, 32, 1, 656, dtype=torch.uint8)}


def kept(arguments: dict[str, Any], version: str = "0.5.13") -> str | None:
    """Why the host keeps a call, or None."""
    last = Version(version) >= Version("0.5.13") or version == "0.5.4"
    one = targets(version, "flash_mla_with_kvcache")[-1 if last else 0]
    return hook.declines_kvcache(one.bind(**arguments))


OWN = "every other call: the engine's CUDA operator serves it"


@pytest.mark.parametrize(
    "arguments, kept_by",
    [
        (sparse(), OWN),
        (sparse(heads=128, topk=2048), OWN),
        (sparse(**META), OWN),
        (sparse(512, **META, **LENGTHS, attn_sink=torch.zeros(64)), OWN),
        (sparse(512, **META, extra_indices_in_kvcache=torch.zeros(2, 1, 64), extra_k_cache=torch.zeros(1)), OWN),
        (sparse(**META) | PAGES_OF_32, OWN),
        (dense(heads=20), OWN),
        (dense(heads=20, **META), OWN),
        (dense(**E4M3, **DESCALES), OWN),
        (sparse() | PAGES_OF_32, OWN),
        (sparse(512), OWN),
        (dense(512), None),  # an assertion ends the process
        (dense(512, **META), None),
        (dense(**E4M3, **DESCALES, **META), None),
        (dense(**E4M3), None),
        (dense(**E4M3, descale_q=torch.ones(1)), None),
        (dense(q=torch.zeros(2, 0, 64, 576)), None),
        (sparse(q=torch.zeros(2, 0, 64, 576)), None),
        (sparse(heads=16), None),
        (sparse(topk=0), None),
        (sparse(topk=100), None),
        (sparse(batch=0), None),
        (sparse(**META, **LENGTHS), None),
        (sparse(512, **META, extra_indices_in_kvcache=torch.zeros(2, 1, 33), extra_k_cache=torch.zeros(1)), None),
        (dense(page=32), None),
    ],
)
def test_who_serves_on_an_h200(arguments, kept_by, machine):
    assert kept(arguments) == kept_by


def test_who_serves_over_sgl_flash_mla(machine):
    for call in (dense(), dense(512), dense(512, **META), dense(**E4M3, **DESCALES), sparse(512), sparse(**META)):
        assert kept(call, "0.5.23") == OWN
    # refused there, ignored by the others
    for given in (DESCALES, {"descale_k": torch.ones(1)}):
        assert kept(dense(**given), "0.5.23") is None and kept(dense(**given)) == OWN
    assert kept(dense(320), "0.5.23") is None
    assert kept(dense(512, q=torch.zeros(2, 1, 64, 512).to(torch.float8_e4m3fn)), "0.5.23") is None


@pytest.mark.parametrize(
    "version, widths",
    [("0.4.4", (576,)), ("0.4.5", (576, 512)), ("0.4.10", (576, 512)), (None, (576,)), ("unknown", (576,))],
)
def test_dense_widths_are_the_installed_wheels(version, widths, machine, monkeypatch):
    def told(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", told)
    compat.dense_widths.cache_clear()
    for call in (dense(512), dense(512, **META)):
        assert (kept(call, "0.5.18") == OWN) == (512 in widths) and kept(dense(), "0.5.18") == OWN
    assert kept(dense(512), "0.5.4") is None
    compat.dense_widths.cache_clear()


@pytest.mark.parametrize("capability", [SM120, (8, 9), (8, 0), None])
def test_other_gpus_are_ours(capability, machine):
    machine(capability)
    for call in (sparse(), sparse(512, **META), dense()):
        assert kept(call) is None
        assert kept(call, "0.5.9") is None
    machine(SM100)
    assert kept(sparse()) == OWN and kept(dense()) is None


def test_the_older_api(machine):
    """sgl-kernel to 0.4.2.post2: what its operators take stays its own, what they lack is ours."""
    machine(older=True, newer=False)
    assert kept(sparse(), "0.5.9") == kept(dense(), "0.5.12") == OWN
    for newer in (META, {"attn_sink": torch.zeros(64)}, LENGTHS, {"extra_k_cache": torch.zeros(1)}):
        assert kept(sparse(**newer), "0.5.9") is None
    assert kept(sparse(512), "0.5.9") == OWN
    machine(older=False, newer=False)
    assert kept(sparse(), "0.5.9") is None


def test_descales_that_the_package_lacks(machine):
    """Releases to 0.5.4 call it so for e4m3 caches, where it raises a TypeError."""
    assert kept(dense(**DESCALES), "0.5.4") is None and kept(dense(), "0.5.4") == OWN
    assert kept(dense(**DESCALES), "0.5.9") == kept(dense(**DESCALES)) == OWN


@pytest.mark.parametrize(
    "arguments",
    [
        sparse(**META, kv_format="V41"),
        sparse(512, **META, kv_format="V32"),
        sparse(**META, use_legacy=False),
        sparse(**META) | {"k_cache": torch.zeros(1, 64, 1, 528, dtype=torch.uint8)},
        sparse(512, **META) | {"k_cache": torch.zeros(1, 64, 1, 288, dtype=torch.uint8)},
    ],
)
def test_unknown_layouts_are_the_hosts_on_any_gpu(arguments, machine):
    machine(SM120, False, False)
    assert kept(arguments, "0.5.23") == providers.PROVIDERS[0].when


def test_the_format_that_0522_and_0523_name(machine):
    machine(SM120)
    assert kept(sparse(kv_format="V32"), "0.5.23") is None
    machine()
    assert kept(sparse(kv_format="V32"), "0.5.23") == OWN


def test_tensors_of_ours_reach_no_operator(machine):
    """Where a call of any kind is the host's, so is the metadata that it came with."""
    for capability in (SM90, SM100, SM120, None):
        for older in (True, False):
            machine(capability, older, False)
            for heads in (16, 64, 128):
                for topk in (None, 0, 64, 100):
                    arguments = dense(heads=heads) if topk is None else sparse(heads=heads, topk=topk)
                    made = targets("0.5.9", "get_mla_metadata")[0].bind(torch.ones(2), heads, 1, heads, False, topk)
                    if kept(arguments, "0.5.9") is not None:
                        assert hook.declines_metadata(made) is not None, (capability, older, heads, topk)


def test_who_makes_tensors(machine):
    def kept_by(*arguments, batch=2):
        return hook.declines_metadata(targets("0.5.9", "get_mla_metadata")[0].bind(torch.ones(batch), *arguments))

    assert kept_by(20, 1) == kept_by(64, 1, 64, True, 2048) == kept_by(256, 1, 128, True, 64) == OWN
    assert kept_by(16, 1, 16, True, 2048) is kept_by(64, 1, 64, True, 100) is None
    # what their calls are for is nothing, and FlashMLA divides by it
    assert kept_by(0, 1) is kept_by(0, 1, 64, True, 2048) is kept_by(20, 1, batch=0) is None
    machine(SM100)
    assert kept_by(64, 1, 64, True, 2048) == OWN and kept_by(20, 1) is None
    machine(SM120)
    assert kept_by(64, 1, 64, True, 2048) is kept_by(20, 1) is None


def test_metadata_is_of_the_class_that_callers_test_for(machine, monkeypatch):
    module = ModuleType(compat.SGL_KERNEL)
    monkeypatch.setitem(sys.modules, compat.SGL_KERNEL, module)
    call = targets("0.5.9", "get_mla_metadata")[0].bind()
    assert hook.declines_metadata(call) is None
    undo = flash_mla_package.add_sched_meta(module)
    assert module.FlashMLASchedMeta is flash_mla.FlashMLASchedMeta
    assert hook.declines_metadata(call) is None
    assert type(hook.serve_metadata(call)[0]) is module.FlashMLASchedMeta
    undo()
    assert not hasattr(module, "FlashMLASchedMeta")
    module.FlashMLASchedMeta = own = type("FlashMLASchedMeta", (), {"__module__": compat.SGL_KERNEL})
    assert hook.declines_metadata(call) == "the engine has its own FlashMLASchedMeta"
    flash_mla_package.add_sched_meta(module)()
    assert module.FlashMLASchedMeta is own


@pytest.mark.parametrize("version", ["0.5.13", "0.5.22", "0.5.23"])
def test_where_operators_did_not_load_metadata_are_ours_of_the_hosts_class(version, machine, monkeypatch):
    """The wrapper has the class, and raises an ImportError."""
    home = compat.INTERFACE if version == "0.5.23" else compat.SGL_KERNEL
    module = ModuleType(home)
    module.FlashMLASchedMeta = own = type("FlashMLASchedMeta", (), {"__module__": home})
    monkeypatch.setitem(sys.modules, home, module)
    call = targets(version, "get_mla_metadata")[0].bind()
    assert hook.declines_metadata(call) == "the engine has its own FlashMLASchedMeta"
    machine(older=True, newer=False)
    assert hook.declines_metadata(call) is None
    made, nothing = hook.serve_metadata(call)
    assert type(made) is own and nothing is None


def test_a_wrapper_that_gave_up_serves_nothing(monkeypatch):
    """Whoever else registered operators under these names: the wrapper raises before it looks for them."""
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    for name in ("sparse_decode_fwd", "sparse_prefill_fwd"):
        library.define(f"{name}(Tensor q) -> Tensor")
    module = ModuleType(compat.SGL_KERNEL)
    monkeypatch.setitem(sys.modules, compat.SGL_KERNEL, module)
    ask = compat.operators.__wrapped__, compat.prefill_arity.__wrapped__
    module._flashmla_import_error = None
    assert [one(compat.SGL_KERNEL) for one in ask] == [(True, True), 1]
    module._flashmla_import_error = ImportError("undefined symbol")
    assert [one(compat.SGL_KERNEL) for one in ask] == [(False, False), 0]


@pytest.mark.parametrize("version", ["0.5.4", "0.5.5", "0.5.12", "0.5.13", "0.5.23"])
def test_every_parameter_reaches_ours(version, machine, monkeypatch):
    """By place and by name, in the order of each wrapper that a release may have."""
    machine(SM120)
    seen: dict[str, Any] = {}

    def record(*args: Any, enable_batch_invariant: bool) -> None:
        names = ("q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits",
                 "softmax_scale", "causal", "descale_q", "descale_k", "is_fp8_kvcache", "indices", "attn_sink",
                 "extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length")  # fmt: skip
        seen.update(zip(names, args, strict=True))

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", record)
    for target in targets(version, "flash_mla_with_kvcache"):
        values = {name: object() for name in target.params if name not in ("kv_format", "use_legacy")}
        for call in (target.bind(*values.values()), target.bind(**values)):
            seen.clear()
            hook.serve_kvcache(call)
            assert {name: seen[name] for name in values} == values
        with pytest.raises(TypeError, match="unexpected keyword argument 'new'"):
            target.bind(**values, new=1)


class Wrapped:
    """0.5.9's wrapper with ours in its place, as its caller sees it; the host's fails on what is newer."""

    def __init__(self, name: str) -> None:
        kind = {"flash_mla_with_kvcache": "kvcache", "get_mla_metadata": "metadata"}.get(name, "prefill")
        code = ArmCode(getattr(hook, f"serve_{kind}"), getattr(hook, f"declines_{kind}"))
        self.counts, self.stops = Counts(), []
        switch = FeatureGate(lambda *stop: self.stops.append(stop))
        site = EntryPoint(name, targets("0.5.9", name)[0].bind, {"patch": code}, self.counts, switch)
        self.call = stand_in(self.host, "call", site)

    @staticmethod
    def host(*args: Any, **named: Any) -> Any:
        raise TypeError(f"unexpected keyword {[*named][-1:]}")


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


V4_CALL = sparse(512, q=half(2, 1, 64, 512), softmax_scale=None)


def v4_call(**changes: Any) -> dict[str, Any]:
    meta = flash_mla.FlashMLASchedMeta()
    return V4_CALL | {"k_cache": new_pages(V4, 2, 64), "tile_scheduler_metadata": meta, "num_splits": None} | changes


@CPU
def test_what_the_host_cannot_serve_either_is_told_the_caller(machine):
    machine(newer=False)
    wrapped = Wrapped("flash_mla_with_kvcache")
    ids = V4_CALL["indices"].long()
    with pytest.raises(ValueError, match=r"^indices: torch.int64, shape \(2, 1, 64\), expected torch.int32"):
        wrapped.call(**v4_call(indices=ids, attn_sink=torch.zeros(64)))
    assert [*wrapped.counts.declined] == ["indices: torch.int64, shape (2, 1, 64), expected torch.int32, [2, 1, topk]"]
    for name, arguments, message in (
        ("flash_mla_sparse_fwd", prefill(dtype=torch.bfloat16, attn_sink=torch.zeros(3)), "attn_sink: torch.float32"),
        ("get_mla_metadata", {"cache_seqlens": torch.ones(2).int(), "topk": 3}, "num_q_tokens_per_head_k: None"),
    ):
        other = Wrapped(name)
        with pytest.raises(ValueError, match=f"^{message}"):
            other.call(**arguments)
        assert sum(other.counts.declined.values()) == 1 and not other.stops
    assert not wrapped.stops


@pytest.mark.parametrize("version", ["0.5.4", "0.5.9", "0.5.12", "0.5.13", "0.5.23"])
def test_every_parameter_of_metadata_reaches_ours(version, monkeypatch):
    """By place and by name, for each parameter list that a release may have."""
    monkeypatch.setattr(compat, "has_package", lambda: True)
    seen: list[Any] = []
    monkeypatch.setattr(flash_mla, "get_mla_metadata", lambda *args: seen.append(args))
    for target in targets(version, "get_mla_metadata"):
        names = compat._META if target.params == ("*args", "**kwargs") else target.params
        values = {name: object() for name in names}
        for call in (target.bind(*values.values()), target.bind(**values)):
            hook.serve_metadata(call)
            assert seen.pop()[: len(values)] == tuple(values.values())


NOTHING, POINT, LINE = None, torch.zeros(()), torch.zeros(584)


@pytest.mark.parametrize("changes", [
    {"q": NOTHING}, {"q": POINT}, {"q": LINE}, {"q": torch.zeros(2, 512)}, {"k_cache": NOTHING}, {"k_cache": POINT},
    {"k_cache": LINE}, {"indices": POINT}, {"indices": LINE}, {"indices": [3]}, {"topk_length": [1, 2]},
    {"extra_indices_in_kvcache": POINT}, {"extra_k_cache": LINE}, {"softmax_scale": "x"},
])  # fmt: skip
@pytest.mark.parametrize("capability", [SM90, SM120])
@CPU
def test_shapes_that_nobody_takes(changes, capability, machine):
    """Of an argument that decides who serves: a refusal, and the next call is served as ever."""
    machine(capability, newer=False)
    wrapped = Wrapped("flash_mla_with_kvcache")
    for call in (v4_call(), dense(q=half(2, 1, 64, 576))):
        with pytest.raises((ValueError, TypeError)) as raised:
            wrapped.call(**call | changes)
        assert not wrapped.stops and sum(wrapped.counts.declined.values()), raised.value
        wrapped.counts.reset()
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}: .*, expected "):
        wrapped.call(**v4_call() | changes)


@CPU
def test_shapes_of_the_others_that_nobody_takes(machine):
    for name, calls in (
        (
            "flash_mla_sparse_fwd",
            [prefill() | {one: wrong} for one in ("q", "indices") for wrong in (POINT, LINE, [3])],
        ),
        ("get_mla_metadata", [{"cache_seqlens": lens, "num_q_tokens_per_head_k": 64} for lens in (POINT, [1, 2])]),
    ):
        wrapped = Wrapped(name)
        for call in calls:
            with pytest.raises(ValueError, match=r": .*, expected "):
                wrapped.call(**call)
        assert sum(wrapped.counts.declined.values()) == len(calls) and not wrapped.stops


def test_another_kind_of_device_is_the_hosts_after_a_refusal(machine):
    machine(None, False, False)
    for name, call in (
        ("flash_mla_with_kvcache", v4_call(head_dim_v=3)),
        ("flash_mla_sparse_fwd", prefill(d_v=3)),
        ("get_mla_metadata", {"cache_seqlens": torch.ones(2)}),
    ):
        wrapped = Wrapped(name)
        with pytest.raises(TypeError, match="unexpected keyword"):
            wrapped.call(**call)
        assert sum(wrapped.counts.declined.values()) == 1 and not wrapped.stops


@CPU
@pytest.mark.parametrize("field", flash_mla._CONFIG_FIELDS)
def test_a_sched_meta_of_another_call_is_told_the_caller(field, machine):
    machine(newer=False)
    wrapped, call = Wrapped("flash_mla_with_kvcache"), v4_call()
    used = flash_mla.FlashMLASchedMeta.Config(2, 1, 64, 64, 1, False, True, 64, None, None)
    setattr(used, field, 3)
    call["tile_scheduler_metadata"].config, call["tile_scheduler_metadata"].have_initialized = used, True
    with pytest.raises(flash_mla.MetadataMismatch, match=f"tile_scheduler_metadata: made for {field} 3, called with"):
        wrapped.call(**call)
    assert sum(wrapped.counts.declined.values()) == 1 and not wrapped.stops


def prefill(heads=64, topk=128, width=576, queries=2, dtype=torch.bfloat16, **more):
    q, ids = torch.zeros(queries, heads, width, dtype=dtype), torch.zeros(queries, 1, topk, dtype=torch.int32)
    return {"q": q, "kv": torch.zeros(3, 1, width, dtype=dtype), "indices": ids, "sm_scale": 0.1} | more


def prefill_kept(arguments, version="0.5.13"):
    """Why the host keeps a call, or None."""
    one = targets(version, "flash_mla_sparse_fwd")[0 if version == "0.5.9" else -1]
    return hook.declines_prefill(one.bind(**arguments))


def test_who_serves_sparse_prefill(machine):
    own = providers.PREFILL_PROVIDERS[-1].when
    more = ({"attn_sink": torch.zeros(64)}, {"topk_length": torch.zeros(2)})
    for call in (prefill(), prefill(128, 2048), prefill(64, 640, 512), *(prefill(**one) for one in more)):
        assert prefill_kept(call) == own
    for call in (prefill(16), prefill(20), prefill(topk=64), prefill(topk=0), prefill(queries=0)):
        assert prefill_kept(call) is None
    for name in ("q", "kv"):
        assert prefill_kept(prefill() | {name: prefill()[name].half()}) is None
    machine(SM100)
    assert prefill_kept(prefill(topk=64)) == prefill_kept(prefill(128, 64, 512)) == own
    assert prefill_kept(prefill(128, 64)) is prefill_kept(prefill(128, 1344, 512)) is None
    for capability in (SM120, (8, 9), (8, 0), None):
        machine(capability)
        assert prefill_kept(prefill()) is prefill_kept(prefill(), "0.5.9") is None
    machine(newer=False)
    assert prefill_kept(prefill(), "0.5.9") == own
    for one in more:
        # by the operator, and by the wrapper above it
        assert prefill_kept(prefill(**one), "0.5.9") is prefill_kept(prefill(**one)) is None
    machine()
    assert prefill_kept(prefill(**more[0]), "0.5.9") is None
    machine(older=False, newer=False)
    assert prefill_kept(prefill()) is prefill_kept(prefill(), "0.5.9") is None


def test_the_wrappers_own_order():
    """The newest release's, but for what is asked for by name, among it what only FlashMLA itself has."""
    wanted = (*compat._INTERFACE[0][0], "enable_batch_invariant")
    assert tuple(inspect.signature(flash_mla.flash_mla_with_kvcache).parameters) == wanted
    assert tuple(inspect.signature(flash_mla.get_mla_metadata).parameters) == compat._META
    assert tuple(inspect.signature(flash_mla.flash_mla_sparse_fwd).parameters)[:7] == compat._PREFILL_NEWER


@pytest.mark.parametrize("version", ["0.5.5", "0.5.13", "0.5.23"])
def test_every_parameter_of_sparse_prefill_reaches_ours(version, monkeypatch):
    seen: dict[str, Any] = {}

    def record(*args: Any, use_legacy: Any) -> None:
        names = ("q", "kv", "indices", "sm_scale", "d_v", "attn_sink", "topk_length")
        seen.update(zip(names, args, strict=True), use_legacy=use_legacy)

    monkeypatch.setattr(flash_mla, "flash_mla_sparse_fwd", record)
    for target in targets(version, "flash_mla_sparse_fwd"):
        values = {name: object() for name in target.params}
        last = {name: values[name] for name in values if name == "use_legacy"}
        placed = [values[name] for name in values if name != "use_legacy"]
        for call in (target.bind(*placed, **last), target.bind(**values)):
            seen.clear()
            hook.serve_prefill(call)
            # without the parameter the release's statistics are to the base 2
            assert seen["use_legacy"] is (last.get("use_legacy", True))
            assert {name: seen[name] for name in values} == values


def test_the_prefill_operator_is_asked_of_torch():
    ask = compat.prefill_arity.__wrapped__
    assert ask(compat.SGL_KERNEL) == 0 and ask(compat.INTERFACE) == 7 * ("flash_mla" in sys.modules)
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("sparse_prefill_fwd(Tensor q, Tensor kv, Tensor indices, float sm_scale, int d_v) -> Tensor")
    assert ask(compat.SGL_KERNEL) == 5


@pytest.mark.parametrize("package, has", [(None, False), ({}, True), ({"has_legacy": True}, True)])
@pytest.mark.parametrize("module", [compat.INTERFACE, compat.PACKAGE])
def test_the_package_is_asked_of_python(package, has, module, monkeypatch):
    monkeypatch.delitem(sys.modules, "flash_mla", raising=False)
    if package is not None:
        flags = {name: lambda value=value: value for name, value in package.items()}
        monkeypatch.setitem(sys.modules, "flash_mla", SimpleNamespace(**flags))
    assert compat.operators.__wrapped__(module) == (has, has) and compat.prefill_arity.__wrapped__(module) == 7 * has


def test_a_wheel_without_the_kernels_that_our_calls_ask_for(monkeypatch):
    """sgl-flash-mla whose second extension could not be loaded: all is ours."""
    monkeypatch.setitem(sys.modules, "flash_mla", SimpleNamespace(has_legacy=lambda: False))
    monkeypatch.setattr(providers, "capability_of", lambda tensor: SM90)
    compat.operators.cache_clear()
    compat.prefill_arity.cache_clear()
    for call in (dense(), sparse(), sparse(512, **META)):
        assert kept(call, "0.5.23") is None
    assert prefill_kept(prefill(), "0.5.23") is None
    compat.operators.cache_clear()
    compat.prefill_arity.cache_clear()


def test_homes(monkeypatch):
    def homes(version):
        return {(one.module, one.name) for one in hook.targets(version) if one.kind != "edit"}

    def edits(version):
        found = [one for one in hook.targets(version) if one.kind == "edit"]
        return {(one.module.rpartition(".")[2], one.edit.__name__) for one in found}

    monkeypatch.setattr(compat, "has_package", lambda: False)
    names = ("get_mla_metadata", "flash_mla_with_kvcache", "flash_mla_sparse_fwd")
    kernel = {(compat.SGL_KERNEL, name) for name in names}
    for version in ("0.5.5", "0.5.12", "0.5.13", "0.5.22"):
        assert homes(version) == kernel
    assert {module for module, _ in homes("0.5.4")} == {compat.PACKAGE}
    assert {module for module, _ in homes("0.5.23")} == {compat.INTERFACE}
    dense, nsa, dsa = (("flashmla_backend", "warm_dense"), ("nsa_backend", "warm_v32"), ("dsa_backend", "warm_v32"))
    v4, ours = ("deepseek_v4_backend", "warm_v4"), ("flash_mla", "add_sched_meta")
    assert edits("0.5.4") == {dense, nsa} and edits("0.5.5") == edits("0.5.11") == {dense, nsa, ours}
    assert edits("0.5.12") == {dense, nsa, v4, ours, ("deepseek_v4_backend", "install_flash_mla_shim")}
    assert edits("0.5.13") == edits("0.5.22") == {dense, dsa, v4, ours} and edits("0.5.23") == {dense, dsa, v4}
    assert edits(None) == {dense, nsa, dsa, ours}
    monkeypatch.setattr(compat, "has_package", lambda: True)
    assert homes("0.5.12.post1") - kernel == {
        ("flash_mla", f"flash_mla_interface.{name}") for name in ("get_mla_metadata", "flash_mla_with_kvcache")
    }
    assert edits("0.5.12.post1") == {dense, nsa, v4, ours}
    assert homes("0.5.11") == homes("0.5.13") == kernel
    assert homes(None) >= kernel


# the package that 0.5.12's DeepSeek V4 imports


def test_the_package_where_there_is_none(monkeypatch, caplog):
    caplog.set_level("INFO")
    for name in ("flash_mla", compat.PACKAGE):
        monkeypatch.delitem(sys.modules, name, raising=False)
    counts = Counts()
    undo = flash_mla_package.install_flash_mla_shim(ModuleType("deepseek_v4_backend"), counts)
    import flash_mla as package  # as the release does
    from flash_mla.flash_mla_interface import FlashMLASchedMeta

    made, nothing = package.get_mla_metadata()
    assert type(made) is FlashMLASchedMeta is flash_mla.FlashMLASchedMeta and nothing is None
    assert (counts.served, counts.captured) == (1, 0)
    with pytest.raises(ValueError, match="head_dim_v: 3, expected 512"):
        package.flash_mla_with_kvcache(torch.zeros(1), torch.zeros(1), None, None, 3, made)
    assert counts.served == 1  # what was refused is not served
    assert find_spec("flash_mla") is package.__spec__  # others may ask, too
    assert "flash_mla is not installed: DeepSeek V4's attention runs on our Triton kernels" in caplog.text
    undo()
    assert not {"flash_mla", compat.PACKAGE} & set(sys.modules)


@CPU
def test_the_package_is_called_in_its_own_order(monkeypatch):
    """Which is without descales."""
    for name in ("flash_mla", compat.PACKAGE):
        monkeypatch.delitem(sys.modules, name, raising=False)
    undo = flash_mla_package.install_flash_mla_shim(ModuleType("deepseek_v4_backend"), Counts())
    package, made = sys.modules["flash_mla"], flash_mla.FlashMLASchedMeta()
    placed = (half(2, 1, 4, 512), new_pages(V4, 1, 4), None, None, 512, made, None, 0.5, False, True)
    ids = torch.zeros(2, 1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="causal: True, expected False beside indices"):
        package.flash_mla_with_kvcache(*placed[:8], True, True, ids)
    out, lse = package.flash_mla_with_kvcache(*placed, ids, torch.zeros(4))
    named = package.flash_mla_with_kvcache(*placed, indices=ids, attn_sink=torch.zeros(4))
    assert out.shape == (2, 1, 4, 512) and torch.equal(out, named[0]) and torch.equal(lse, named[1])
    with pytest.raises(TypeError, match="missing"):
        package.flash_mla_with_kvcache(placed[0])
    undo()


def test_the_package_where_it_is_is_left_alone(monkeypatch):
    theirs = ModuleType("flash_mla")
    monkeypatch.setitem(sys.modules, "flash_mla", theirs)
    undo = flash_mla_package.install_flash_mla_shim(ModuleType("deepseek_v4_backend"), Counts())
    assert sys.modules["flash_mla"] is theirs and compat.PACKAGE not in sys.modules
    undo()
    assert sys.modules["flash_mla"] is theirs


# what is compiled once a backend is built


@pytest.fixture
def warmed(monkeypatch):
    """What our kernels were warmed for, over a FlashMLA with the newer API."""
    calls: list[tuple[Any, ...]] = []
    module = ModuleType(compat.SGL_KERNEL)
    module.FlashMLASchedMeta = type("FlashMLASchedMeta", (), {"__module__": compat.SGL_KERNEL})
    monkeypatch.setitem(sys.modules, "sgl_kernel", ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, compat.SGL_KERNEL, module)
    for kernel in (dense_decode, sparse_decode, sparse_prefill):
        name = kernel.__name__.removeprefix("mla_patch.kernels.")
        monkeypatch.setattr(kernel, "warmup", lambda *args, name=name: calls.append((name, *args[1:])) or 1)
    return calls


def runner(**changes: Any) -> SimpleNamespace:
    config = SimpleNamespace(num_attention_heads=128)
    return SimpleNamespace(**{"device": "cpu", "model_config": config} | changes)


class FlashMLABackend:
    def __init__(self, model_runner: Any, skip_prefill: bool = False) -> None:
        self.kv_lora_rank, self.qk_rope_head_dim, self.num_q_heads = 512, 64, 16
        self.data_type, self.q_data_type = model_runner.cache, torch.bfloat16


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float8_e4m3fn])
def test_flashmla_is_warmed_where_ours_serves(cache, machine, warmed):
    module = ModuleType("flashmla_backend")
    module.FlashMLABackend = type("FlashMLABackend", (FlashMLABackend,), dict(vars(FlashMLABackend)))
    before = dict(vars(module.FlashMLABackend))
    undo = reach.warm_dense(compat.SGL_KERNEL, hook.warm, module)
    module.FlashMLABackend(runner(cache=cache))
    assert not warmed  # on an H200 FlashMLA serves
    machine(SM120)
    assert module.FlashMLABackend(runner(cache=cache), skip_prefill=True).num_q_heads == 16
    assert warmed == [("sparse.dense", 16, cache, 64)]
    undo()
    assert dict(vars(module.FlashMLABackend)) == before


def test_e4m3_of_the_package_is_warmed_on_an_h200_too(machine, warmed, monkeypatch):
    """Calls come with descales, which only the package does not take."""
    monkeypatch.setattr(reach, "_build", lambda home: compat.Build(home, False))
    backend = FlashMLABackend(runner(cache=torch.float8_e4m3fn))
    for home in (compat.SGL_KERNEL, compat.PACKAGE):
        hook.warm(reach.dense_calls(home, backend, runner()))
    assert warmed == [("sparse.dense", 16, torch.float8_e4m3fn, 64)]


class Backend(SimpleNamespace):
    """Of a class whose module may hold names, as older releases' does."""


def v32(**changes: Any) -> Backend:
    """A backend of 0.5.13 and later, on eight ranks."""
    given = {"num_q_heads": 16, "flashmla_kv_num_q_heads": 64, "device_sm_major": 12, "dsa_index_topk": 2048}
    given |= {"dsa_prefill_impl": "tilelang", "dsa_decode_impl": "fa3", "qk_rope_head_dim": 64}
    return Backend(**given | changes)


def warm_v32(backend: Any, home: str = compat.SGL_KERNEL) -> int:
    return hook.warm(reach.v32_calls(home, backend, runner()))


PREFILLS = [("sparse.prefill", 128, 576, torch.bfloat16, False, lens) for lens in (False, True)]


def test_v32_is_warmed_for_its_implementations(machine, warmed, monkeypatch):
    machine(SM120)
    assert warm_v32(v32()) == 0 and warm_v32(v32(dsa_decode_impl="flashmla_kv", qk_rope_head_dim=0)) == 0
    assert warm_v32(v32(dsa_decode_impl="flashmla_kv")) == 1 and warmed == [("sparse.decode", 64)]
    warmed.clear()
    assert warm_v32(v32(dsa_prefill_impl="flashmla_auto")) == 3
    assert warmed == [("sparse.decode", 64), *PREFILLS]
    warmed.clear()
    warm_v32(v32(dsa_prefill_impl="flashmla_sparse", device_sm_major=8, num_q_heads=128))
    assert warmed == PREFILLS
    warmed.clear()
    # 0.5.5: names in the module, no padding, the older API
    older = Backend(num_q_heads=20, nsa_index_topk=2048)
    del sys.modules[compat.SGL_KERNEL].FlashMLASchedMeta
    monkeypatch.setitem(globals(), "NSA_PREFILL_IMPL", "flashmla_sparse")
    monkeypatch.setitem(globals(), "NSA_DECODE_IMPL", "flashmla_kv")
    warm_v32(older)
    assert warmed == [("sparse.decode", 20), ("sparse.prefill", 20, 576, torch.bfloat16, False, False)]


def test_v32_on_an_h200_is_warmed_for_what_flashmla_has_no_build_for(machine, warmed):
    both = {"dsa_decode_impl": "flashmla_kv", "dsa_prefill_impl": "flashmla_sparse", "device_sm_major": 9}
    assert warm_v32(v32(**both)) == 0
    del both["device_sm_major"]
    without = v32(**both, nsa_index_topk=2048)
    del without.flashmla_kv_num_q_heads, without.device_sm_major
    assert warm_v32(without) == 3
    assert [call[:2] for call in warmed] == [("sparse.decode", 16), *[("sparse.prefill", 16)] * 2]


def v4(**changes: Any) -> SimpleNamespace:
    pool = SimpleNamespace(page_size=256, swa_kv_pool=SimpleNamespace(page_size=128, kv_cache_total_dim=584))
    return SimpleNamespace(**{"token_to_kv_pool": pool, "_forward_prefill_sparse": None} | changes)


def test_v4_is_warmed_for_each_of_its_caches(machine, warmed):
    machine((8, 9))
    compiled = hook.warm(reach.v4_calls(compat.SGL_KERNEL, v4(), runner()))
    both = [("sparse.decode", (128,), extra) for extra in ((), (64,), (2,))]
    both += [("sparse.prefill", 512, torch.bfloat16, True, True)]
    assert warmed == [(name, heads, *rest) for heads in (64, 128) for name, *rest in both] and compiled == 8
    warmed.clear()
    # a model of V4.1's has other ratios
    hook.warm(reach.v4_calls(compat.SGL_KERNEL, v4(present_ratios=(1, 4)), runner()))
    assert {call[3] for call in warmed if call[0] == "sparse.decode"} == {(), (64,)}
    warmed.clear()
    other = SimpleNamespace(page_size=256, swa_kv_pool=SimpleNamespace(page_size=128, kv_cache_total_dim=528))
    for backend in (v4(token_to_kv_pool=other), v4(trtllm_attn=True)):
        assert reach.v4_calls(compat.SGL_KERNEL, backend, runner()) == []
    machine()
    assert hook.warm(reach.v4_calls(compat.SGL_KERNEL, v4(), runner())) == 0


def test_v4_on_sm_120_is_the_hosts_from_0513(monkeypatch, warmed):
    monkeypatch.setattr(gpu, "capability", lambda index: SM120)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    assert reach.v4_calls(compat.SGL_KERNEL, v4(), runner()) == []
    monkeypatch.setattr(gpu, "capability", lambda index: (8, 9))
    assert reach.v4_calls(compat.SGL_KERNEL, v4(), runner())


def test_v4_of_0512_is_warmed_where_the_package_is_ours(machine, warmed, monkeypatch):
    for name in ("flash_mla", compat.PACKAGE):
        monkeypatch.delitem(sys.modules, name, raising=False)
    undo = flash_mla_package.install_flash_mla_shim(ModuleType("deepseek_v4_backend"), Counts())
    backend = v4()
    del backend._forward_prefill_sparse
    hook.warm(reach.v4_calls(compat.PACKAGE, backend, runner()))  # on an H200
    undo()
    assert {call[:2] for call in warmed} == {("sparse.decode", 64), ("sparse.decode", 128)}


SERVE = """
import sys
sys.path.insert(0, TESTS)
import fake_chip
import torch
from types import ModuleType, SimpleNamespace
from mla_patch.compat import gpu
from mla_patch.compat.sglang import flash_mla as compat
from mla_patch.compat.compiles import COMPILES
from mla_patch.flash_mla import get_mla_metadata
from mla_patch.hooks.sglang import flash_mla_providers as providers
from mla_patch.hooks.sglang import sched_meta as hook
from mla_patch.hooks.sglang.edits import flash_mla_package
from mla_patch.hooks.sglang.edits import flash_mla_reach as reach
from mla_patch.kernels.cache.layouts import V4, V32, new_pages
fake_chip.install()
gpu.from_tensor = lambda tensor: None
for name in ("sgl_kernel", compat.SGL_KERNEL):
    sys.modules[name] = ModuleType(name)
sys.modules[compat.SGL_KERNEL].FlashMLASchedMeta = type("FlashMLASchedMeta", (), {"__module__": compat.SGL_KERNEL})
COMPILES.has_served = lambda: True
half, fp8, home = torch.bfloat16, torch.float8_e4m3fn, compat.SGL_KERNEL
runner = SimpleNamespace(device="cpu", model_config=SimpleNamespace(num_attention_heads=128))
pool = SimpleNamespace(page_size=256, swa_kv_pool=SimpleNamespace(page_size=128, kv_cache_total_dim=584))
build = compat.Build(home, True)

def ids(rows, topk):
    return torch.zeros(rows, 1, topk).int()

def tell(what, compiled):
    print(what, compiled == COMPILES.before, COMPILES.serving)

def dense(dtype):
    backend = SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64, num_q_heads=16, data_type=dtype, q_data_type=half)
    compiled = hook.warm(reach.dense_calls(home, backend, runner))
    for rows, queries, width in ((1, 1, 1), (3, 1, 2600), (16, 4, 40), (200, 1, 3)):
        q = torch.zeros(rows * queries, 16, 576).to(dtype).view(rows, queries, 16, 576)
        cache, scale = torch.zeros(9 * 64, 1, 576).to(dtype).view(-1, 64, 1, 576), torch.ones(1)
        scales = (scale, scale) if dtype is fp8 else (None, None)
        table = torch.zeros(rows + 5, width).int()[:rows]
        made = torch.zeros(8, 8).int(), torch.zeros(rows + 1).int()
        hook.serve_kvcache(compat.KvCacheCall(
            build, q, cache, table, torch.ones(rows).int(), 512, *made, 0.1, True, *scales))
    return compiled

def v32():
    backend = SimpleNamespace(num_q_heads=16, dsa_index_topk=2048, dsa_prefill_impl="flashmla_auto")
    backend.flashmla_kv_num_q_heads = 64
    backend.device_sm_major = 8
    compiled = hook.warm(reach.v32_calls(home, backend, runner))
    for rows in (1, 2, 16, 77):
        q = torch.zeros(rows, 1, 64, 576).to(half)
        cache, lens = new_pages(V32, 9, 64), torch.ones(rows).int()
        made = torch.zeros(8, 8).int(), torch.zeros(rows + 1).int()
        hook.serve_kvcache(compat.KvCacheCall(
            build, q, cache, torch.zeros(rows, 0).int(), lens, 512, *made, 0.1, is_fp8_kvcache=True,
            indices=ids(rows, 2048), kv_format="V32"))
        for more in ({}, {"topk_length": lens}):
            kv = torch.zeros(rows + 99, 1, 576).to(half)
            hook.serve_prefill(compat.PrefillCall(build, q[:, 0], kv, ids(rows, 2048), 0.1, 512, **more))
    return compiled

def v4(heads):
    backend = SimpleNamespace(token_to_kv_pool=pool, _forward_prefill_sparse=None)
    compiled = hook.warm(reach.v4_calls(home, backend, runner))
    for rows in (1, 2, 16, 77):
        q, sink, lens = torch.zeros(rows, 1, heads, 512).to(half), torch.zeros(heads), torch.ones(rows).int()
        more = {"is_fp8_kvcache": True, "indices": ids(rows, 128), "attn_sink": sink, "topk_length": lens}
        for extra, topk in ((0, 0), (64, 512), (2, 4096)):
            if extra:
                more |= {"extra_k_cache": new_pages(V4, 7, extra), "extra_indices_in_kvcache": ids(rows, topk)}
                more |= {"extra_topk_length": lens}
            hook.serve_kvcache(compat.KvCacheCall(
                build, q, new_pages(V4, 9, 128), None, None, 512, get_mla_metadata()[0], None, 0.1, **more))
        kv = torch.zeros(rows + 999, 1, 512).to(half)
        hook.serve_prefill(compat.PrefillCall(
            build, q[:, 0], kv, ids(rows, 640), 0.1, 512, attn_sink=sink, topk_length=lens))
    return compiled

for fake_chip.SM in (80, 89, 120):
    providers.capability_of = lambda tensor: (fake_chip.SM // 10, fake_chip.SM % 10)
    work = {"dense": lambda: dense(half), "dense fp8": lambda: dense(fp8), "v3.2": v32}
    if fake_chip.SM != 120:
        work |= {"v4, 64": lambda: v4(64), "v4, 128": lambda: v4(128)}
    for what, do in work.items():
        COMPILES.reset()
        tell(f"{fake_chip.SM} {what}", do())
"""


def test_what_releases_call_compiles_nothing_more():
    code = SERVE.replace("TESTS", repr(str(TESTS)))
    env = clean_env({"TRITON_INTERPRET": "0"})
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert len(rows) == 13 and not [row for row in rows if not row.endswith(" True 0")], rows


def test_an_amd_gpu_is_not_warmed(machine, warmed, monkeypatch):
    machine((9, 4), False, False)
    monkeypatch.setattr(gpu, "from_tensor", lambda tensor: Gpu("AMD Instinct MI300X", (9, 4), cuda=False))
    assert hook.warm(reach.v4_calls(compat.SGL_KERNEL, v4(), runner())) == 0 and not warmed


def test_operators_are_asked_of_torch():
    assert compat.operators.__wrapped__(compat.SGL_KERNEL) == (False, False)
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("fwd_kvcache_mla(Tensor q) -> Tensor")
    assert compat.operators.__wrapped__(compat.SGL_KERNEL) == (True, False)
    library.define("sparse_decode_fwd(Tensor q) -> Tensor")
    assert compat.operators.__wrapped__(compat.SGL_KERNEL) == (True, True)
    assert compat.operators.__wrapped__(compat.INTERFACE) == ("flash_mla" in sys.modules,) * 2


def test_hardware():
    assert hook.FEATURE.hardware(Gpu("AMD Instinct MI300X", (9, 4), cuda=False)) == "not an NVIDIA GPU"
    assert hook.FEATURE.hardware(Gpu("NVIDIA H200", SM90)) is None
