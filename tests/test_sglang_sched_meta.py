"""FlashMLA's wrappers in SGLang: what every release's call means to us, and who serves it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version

from mla_patch import flash_mla
from mla_patch.compat import sglang_flash_mla as compat
from mla_patch.compat.types import Gpu
from mla_patch.hooks import sglang_sched_meta as hook

SM90, SM100, SM120 = (9, 0), (10, 0), (12, 0)


@pytest.fixture
def machine(monkeypatch):
    """A GPU of some capability, and a FlashMLA build with the operators of the older and the newer API."""

    def set_(capability=SM90, older=True, newer=True):
        monkeypatch.setattr(hook, "capability_of", lambda tensor: capability)
        monkeypatch.setattr(compat, "operators", lambda module: (older, newer))
        monkeypatch.setattr(compat, "prefill_arity", lambda module: 7 if newer else 5 if older else 0)

    set_()
    return set_


def targets(version: str, name: str) -> list[Any]:
    return [one for one in compat.flash_mla_targets(version) if one.name.endswith(name)]


def sparse(width: int = 576, heads: int = 64, topk: int = 64, batch: int = 2, **more: Any) -> dict[str, Any]:
    bytes_ = {576: 656, 512: 584}[width]
    return {
        "q": torch.zeros(batch, 1, heads, width), "k_cache": torch.zeros(1, 64, 1, bytes_, dtype=torch.uint8),
        "block_table": None, "cache_seqlens": None, "head_dim_v": 512, "is_fp8_kvcache": True,
        "tile_scheduler_metadata": torch.zeros(1, 8), "num_splits": torch.zeros(3), "softmax_scale": 0.5,
        "indices": torch.zeros(batch, 1, topk, dtype=torch.int32),
    } | more  # fmt: skip


def dense(page: int = 64, **more: Any) -> dict[str, Any]:
    call = sparse(**more) | {"k_cache": torch.zeros(1, page, 1, 576)}
    return {name: value for name, value in call.items() if name not in ("indices", "is_fp8_kvcache")}


META = {"tile_scheduler_metadata": flash_mla.FlashMLASchedMeta(), "num_splits": None}
LENGTHS = {"topk_length": torch.zeros(2, dtype=torch.int32)}


def kept(arguments: dict[str, Any], version: str = "0.5.13") -> str | None:
    """Why the host keeps a call, or None."""
    last = Version(version) >= Version("0.5.13") or version == "0.5.4"
    one = targets(version, "flash_mla_with_kvcache")[-1 if last else 0]
    return hook.declines_kvcache(one.bind(**arguments))


OWN = "the host's own CUDA operator serves it"


@pytest.mark.parametrize(
    "arguments, kept_by",
    [
        (sparse(), OWN),
        (sparse(heads=128, topk=2048), OWN),
        (sparse(**META), OWN),
        (sparse(512, **META, **LENGTHS, attn_sink=torch.zeros(64)), OWN),
        (sparse(512, **META, extra_indices_in_kvcache=torch.zeros(2, 1, 64), extra_k_cache=torch.zeros(1)), OWN),
        (dense(heads=20), OWN),
        (dense(heads=20, **META), OWN),
        (sparse(heads=16), None),
        (sparse(topk=0), None),
        (sparse(topk=100), None),
        (sparse(batch=0), None),
        (sparse(**META, **LENGTHS), None),
        (sparse(512), None),
        (sparse(512, **META, extra_indices_in_kvcache=torch.zeros(2, 1, 33), extra_k_cache=torch.zeros(1)), None),
        (dense(page=32), None),
    ],
)
def test_who_serves_on_an_h200(arguments, kept_by, machine):
    assert kept(arguments) == kept_by


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
    assert kept(sparse(512), "0.5.9") is None
    machine(older=False, newer=False)
    assert kept(sparse(), "0.5.9") is None


@pytest.mark.parametrize(
    "arguments",
    [
        sparse(**META, kv_format="V41"),
        sparse(**META, use_legacy=False),
        sparse(**META) | {"k_cache": torch.zeros(1, 64, 1, 528, dtype=torch.uint8)},
        sparse(512, **META) | {"k_cache": torch.zeros(1, 64, 1, 288, dtype=torch.uint8)},
    ],
)
def test_unknown_layouts_are_the_hosts_on_any_gpu(arguments, machine):
    machine(SM120, False, False)
    assert kept(arguments, "0.5.23") == hook.PROVIDERS[0].when


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
    def kept_by(*arguments):
        return hook.declines_metadata(targets("0.5.9", "get_mla_metadata")[0].bind(torch.ones(2), *arguments))

    assert kept_by(20, 1) == kept_by(64, 1, 64, True, 2048) == kept_by(256, 1, 128, True, 64) == OWN
    assert kept_by(16, 1, 16, True, 2048) is kept_by(64, 1, 64, True, 100) is None
    machine(SM100)
    assert kept_by(64, 1, 64, True, 2048) == OWN and kept_by(20, 1) is None
    machine(SM120)
    assert kept_by(64, 1, 64, True, 2048) is kept_by(20, 1) is None


def test_metadata_is_of_the_class_that_callers_test_for(machine, monkeypatch):
    module = ModuleType(compat.SGL_KERNEL)
    monkeypatch.setitem(sys.modules, compat.SGL_KERNEL, module)
    call = targets("0.5.9", "get_mla_metadata")[0].bind()
    assert hook.declines_metadata(call) is None
    undo = compat.add_sched_meta(module)
    assert module.FlashMLASchedMeta is flash_mla.FlashMLASchedMeta
    assert hook.declines_metadata(call) is None
    assert type(hook.serve_metadata(call)[0]) is module.FlashMLASchedMeta
    undo()
    assert not hasattr(module, "FlashMLASchedMeta")
    module.FlashMLASchedMeta = own = type("FlashMLASchedMeta", (), {"__module__": compat.SGL_KERNEL})
    assert hook.declines_metadata(call) == "the host has a FlashMLASchedMeta of its own"
    compat.add_sched_meta(module)()
    assert module.FlashMLASchedMeta is own


@pytest.mark.parametrize("version", ["0.5.4", "0.5.5", "0.5.12", "0.5.13", "0.5.23"])
def test_every_parameter_reaches_ours(version, machine, monkeypatch):
    """By place and by name, in the order of each wrapper that a release may have."""
    machine(SM120)
    seen: dict[str, Any] = {}

    def record(*args: Any) -> None:
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


def prefill(heads=64, topk=128, width=576, queries=2, **more):
    q, ids = torch.zeros(queries, heads, width), torch.zeros(queries, 1, topk)
    return {"q": q, "kv": torch.zeros(3, 1, width), "indices": ids, "sm_scale": 0.1} | more


def prefill_kept(arguments, version="0.5.13"):
    """Why the host keeps a call, or None."""
    one = targets(version, "flash_mla_sparse_fwd")[0 if version == "0.5.9" else -1]
    return hook.declines_prefill(one.bind(**arguments))


def test_who_serves_sparse_prefill(machine):
    own = hook.PREFILL_PROVIDERS[-1].when
    more = ({"attn_sink": torch.zeros(64)}, {"topk_length": torch.zeros(2)})
    for call in (prefill(), prefill(128, 2048), prefill(64, 640, 512), *(prefill(**one) for one in more)):
        assert prefill_kept(call) == own
    for call in (prefill(16), prefill(20), prefill(topk=64), prefill(topk=0), prefill(queries=0)):
        assert prefill_kept(call) is None
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


def test_homes(monkeypatch):
    def homes(version):
        return {(one.module, one.name) for one in compat.flash_mla_targets(version)}

    monkeypatch.setattr(compat, "has_package", lambda: False)
    names = ("get_mla_metadata", "flash_mla_with_kvcache", "flash_mla_sparse_fwd", "FlashMLASchedMeta")
    kernel = {(compat.SGL_KERNEL, name) for name in names}
    for version in ("0.5.5", "0.5.12", "0.5.13", "0.5.22"):
        assert homes(version) == kernel
    assert {module for module, _ in homes("0.5.4")} == {compat.PACKAGE}
    assert {module for module, _ in homes("0.5.23")} == {compat.INTERFACE}
    monkeypatch.setattr(compat, "has_package", lambda: True)
    assert homes("0.5.12.post1") - kernel == {
        ("flash_mla", f"flash_mla_interface.{name}") for name in ("get_mla_metadata", "flash_mla_with_kvcache")
    }
    assert homes("0.5.11") == homes("0.5.13") == kernel
    assert homes(None) >= kernel


def test_operators_are_asked_of_torch():
    assert compat.operators.__wrapped__(compat.SGL_KERNEL) == (False, False)
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("fwd_kvcache_mla(Tensor q) -> Tensor")
    assert compat.operators.__wrapped__(compat.SGL_KERNEL) == (True, False)
    library.define("sparse_decode_fwd(Tensor q) -> Tensor")
    assert compat.operators.__wrapped__(compat.SGL_KERNEL) == (True, True)
    assert compat.operators.__wrapped__(compat.INTERFACE) == ("flash_mla" in sys.modules,) * 2


def test_hardware():
    assert hook.hardware(Gpu("AMD Instinct MI300X", (9, 4))) == "not an NVIDIA GPU"
    assert hook.hardware(Gpu("NVIDIA H200", SM90)) is None
