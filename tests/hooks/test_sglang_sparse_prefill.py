"""SGLang's sparse prefill: where it is in every release, who serves a layer, and what the edits change."""

from __future__ import annotations

import functools
import os
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version

from mla_patch import flags
from mla_patch.compat import gpu
from mla_patch.compat.generations import bump, generation_of
from mla_patch.compat.sglang import sparse_prefill as compat
from mla_patch.compat.sglang import v4_chunk
from mla_patch.compat.sglang.release import REVIEWED as RELEASES
from mla_patch.compat.types import Gpu, key_targets
from mla_patch.hooks.sglang import sparse_prefill as hook
from mla_patch.hooks.sglang.edits import v4_policy, v4_reach, v4_route, warmup
from mla_patch.hooks.sglang.edits.v4_policy import Route
from mla_patch.kernels.cache import dequantize
from mla_patch.kernels.indices import prefill as prefill_indices
from mla_patch.kernels.sparse import prefill as sparse_prefill

REVIEWED = [version for version in RELEASES if Version(version) >= Version("0.5.5")]
FLASH_MLA = Route.FLASH_MLA.provider
SM90, SM100, SM120 = (9, 0), (10, 0), (12, 0)
ROUTE, WORKSPACE = "MLA_PATCH_SPARSE_PREFILL_ROUTE", "MLA_PATCH_SPARSE_PREFILL_WORKSPACE"
V32 = {compat.V32_PREFILL, compat.V32_DEQUANTIZE, compat.V32_WARMUP}
V4_ROUTE = {
    "combine_topk_swa_indices", "DeepseekV4AttnBackend._forward_prefill_sparse", "DSV4Metadata.copy_",
    "DeepseekV4AttnBackend.forward", "PagedIndexerMetadata", compat.V4_WARMUP,
}  # fmt: skip
DEFAULT = {  # what ours takes the place of without being asked, by the first release of which that holds
    "0.5.5": V32,
    "0.5.13": {*V32, *V4_ROUTE, compat.V4_DEQUANTIZE},
    "0.5.19": {*V32, *V4_ROUTE},
    "0.5.21": V32,
}  # fmt: skip


@pytest.mark.parametrize("version", REVIEWED)
def test_what_is_taken_by_default(version: str) -> None:
    entries = key_targets(hook.targets(version))
    assert all(len(homes) == 1 for homes in entries.values())
    taken = {name for name, (target,) in entries.items() if hook.native(target, version) is None}
    assert taken == DEFAULT[max((v for v in DEFAULT if Version(v) <= Version(version)), key=Version)]
    backport = {name for name, (target,) in entries.items() if hook.is_backport(target, version)}
    assert len(backport) == (6 if version.startswith("0.5.12") else 0)


def test_an_unknown_version_tries_the_homes_of_pieces_and_no_route() -> None:
    entries = key_targets(hook.targets(None))
    assert set(entries) == {
        *V32, compat.V4_DEQUANTIZE, compat.V4_WARMUP, "combine_topk_swa_indices", "build_swa_token_ids",
    }  # fmt: skip
    assert all(hook.native(target, None) is None for homes in entries.values() for target in homes)


def test_the_two_dequantisers_of_one_name_are_two_entry_points() -> None:
    found = [one for one in hook.targets("0.5.18") if one.name == "dequantize_k_cache_paged"]
    assert [one.module.rpartition(".")[0].rpartition(".")[2] for one in found] == ["dsa", "dsv4"]
    assert len({one.entry for one in found}) == 2


# who serves


class Batch(SimpleNamespace):
    seq_lens = torch.tensor([300, 40])
    seq_lens_cpu = torch.tensor([300, 40])
    extend_seq_lens = torch.tensor([4, 2])
    extend_seq_lens_cpu = [4, 2]
    hisparse_coordinator = None


def backend(**more: Any) -> Any:
    metadata = SimpleNamespace(core_attn_metadata=core(), sparse_prefill_cache=None)
    more = {"forward_metadata": metadata} | more
    known = {"page_size": 256, "softmax_scale": 0.1, "hisparse_coordinator": None, "req_to_token": torch.zeros(2, 9)}
    return SimpleNamespace(**known | more)


def core(**more: Any) -> Any:
    known = {"raw_out_loc": torch.zeros(6), "seq_lens_casual": torch.zeros(6), "c4_sparse_raw_indices": torch.zeros(6)}
    known["c4_sparse_page_indices"] = torch.zeros(6, 512)
    return SimpleNamespace(**known | more)


def pool(**more: Any) -> Any:
    known = {
        "swa_kv_pool": SimpleNamespace(kv_cache_total_dim=584), "full_to_swa_index_mapping": torch.zeros(9),
        "get_extra_key_page_size": lambda layer: {1: 64, 2: 2}[layer], "swa_window_size": 128,
    }  # fmt: skip
    return SimpleNamespace(**known | more)


def prompt(ratio: int = 0, heads: int = 64, **more: Any) -> v4_chunk.ChunkCall:
    """One layer of 0.5.13 - 0.5.20; layer numbers go by ratio."""
    given = {"backend": backend(), "batch": Batch(), "pool": pool(), "core": core()} | more
    return v4_chunk.prefill_call(
        given["backend"], torch.zeros(6, 1, heads, 512), {0: 0, 4: 1, 128: 2}.get(ratio, 1), ratio, given["batch"],
        given["pool"], given["core"], None,
    )  # fmt: skip


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_a_prompt_is_ours(ratio: int) -> None:
    call = prompt(ratio)
    assert v4_policy.declines(call) is None and call.q.shape == (6, 64, 512)


def without_positions() -> Any:
    return core(c4_sparse_raw_indices=None)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"backend": backend(hisparse_coordinator=object())}, Route.HISPARSE.value),
        ({"batch": Batch(hisparse_coordinator=object())}, Route.HISPARSE.value),
        ({"core": core(seq_lens_casual=torch.zeros(3))}, Route.PARALLEL.value),
        ({"backend": backend(forward_metadata=SimpleNamespace(sparse_prefill_cache=1))}, Route.AHEAD.value),
        ({"core": without_positions()}, Route.NO_POSITIONS.value),
        ({"pool": pool(swa_kv_pool=SimpleNamespace(kv_cache_total_dim=528))}, Route.OTHER_PAGES.value),
        ({"pool": pool(get_extra_key_page_size=lambda layer: 32)}, Route.OTHER_PAGES.value),
        ({"ratio": 2}, Route.OTHER_PAGES.value),
    ],
)
def test_why_a_prompt_is_the_hosts(change: dict[str, Any], reason: str) -> None:
    call = prompt(**{"ratio": 4} | change)
    assert v4_policy.declines(call) == reason
    assert v4_policy.route(call).value == reason


def test_a_graph_that_is_captured_is_the_hosts(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "capturing", lambda: True)
    assert v4_policy.declines(prompt(4)) == Route.CAPTURED.value


def test_without_positions_other_layers_are_ours() -> None:
    assert v4_policy.declines(prompt(128, core=without_positions())) is None


def forward(
    route: Route | None = None, settled: bool = True, ratio: int = 0, batch: Any = None, **more: Any
) -> v4_chunk.ChunkCall:
    """0.5.12; ``route``: that of its step, None over a workspace."""
    owner = backend()
    if settled:
        setattr(owner.forward_metadata, v4_policy._STEP, route)
    q = torch.zeros(6, 64, 512)
    batch = batch or Batch()
    batch.token_to_kv_pool = pool()
    number = {0: 0, 4: 1, 128: 2}[ratio]
    return v4_chunk.forward_call(owner, q, q, q, SimpleNamespace(layer_id=number), batch, ratio, **more)


def test_the_backport_serves_what_was_routed(monkeypatch) -> None:
    monkeypatch.setenv(ROUTE, "all")
    assert v4_policy.declines(forward()) is None and forward().k is not None
    assert forward(save_kv_cache=False).k is None
    assert v4_policy.declines(forward(settled=False)) == Route.NOT_A_PROMPT.value
    assert v4_policy.declines(forward(Route.FEW)) == Route.FEW.value


@pytest.mark.parametrize(
    "capability, heads, takes, provider",
    [
        (SM90, 64, True, FLASH_MLA), (SM90, 128, True, FLASH_MLA), (SM100, 64, True, FLASH_MLA),
        (SM90, 20, True, hook.OURS), (SM120, 64, True, hook.OURS), (None, 64, True, hook.OURS),
        (SM90, 64, False, hook.OURS),
    ],
)  # fmt: skip
def test_who_attends(monkeypatch, capability, heads, takes, provider) -> None:
    def wrapper() -> None: ...

    monkeypatch.setattr(v4_policy, "capability_of", lambda tensor: capability)
    monkeypatch.setattr(v4_policy.sglang_flash_mla, "prefill_wrapper", lambda module: wrapper if takes else None)
    call = prompt(heads=heads)
    assert v4_policy.route(call).provider == provider
    assert v4_policy.flash_mla(call) is (wrapper if provider == FLASH_MLA else None)


def test_a_wrapper_without_lengths_is_not_used(monkeypatch) -> None:
    flash_mla = v4_policy.sglang_flash_mla
    old = SimpleNamespace(flash_mla_sparse_fwd=lambda q, kv, indices, sm_scale, d_v=512: None)
    new = SimpleNamespace(flash_mla_sparse_fwd=lambda q, kv, indices, sm_scale, topk_length=None: None)
    monkeypatch.setattr(flash_mla, "import_module", {"old": old, "new": new}.__getitem__)
    monkeypatch.setattr(flash_mla, "prefill_arity", lambda module: 7)
    assert flash_mla.prefill_wrapper("old") is None
    assert flash_mla.prefill_wrapper("new") is new.flash_mla_sparse_fwd
    monkeypatch.setattr(flash_mla, "prefill_arity", lambda module: 5)
    assert flash_mla.prefill_wrapper("new") is None


@pytest.mark.parametrize(
    "capability, heads, provider",
    [(SM90, n, hook.HOST) for n in (1, 8, 16, 32, 64, 128)]
    + [(SM90, n, hook.OURS) for n in (20, 40, 96, 192)]
    + [(SM100, n, hook.HOST) for n in (16, 64, 128)]
    + [(SM100, 20, hook.OURS), (SM120, 64, hook.OURS), ((8, 0), 128, hook.OURS)],
)
def test_v32_heads(monkeypatch, capability, heads, provider) -> None:
    monkeypatch.setattr(hook, "capability_of", lambda tensor: capability)
    call = compat.V32Call(None, torch.zeros(2, heads, 576), torch.zeros(9, 1, 576), 512, torch.zeros(2, 128), 0.1)
    assert (hook.declines_v32(call) is None) == (provider == hook.OURS)
    assert next(row.provider for row in hook.V32_PROVIDERS if row.applies(call)) == provider


def test_v32_lengths_of_other_rows_are_left_out_as_the_host_does() -> None:
    for rows, kept in ((2, True), (3, False)):
        args = (torch.zeros(2, 20, 576), torch.zeros(9, 1, 576), 512, torch.zeros(2, 128), 0.1, torch.zeros(rows))
        assert (compat.V32Call(None, *args).topk_length is not None) == kept


def test_other_layouts_are_the_hosts() -> None:
    class Layout(str):
        value = "v41"

    assert hook.declines_dequantize(compat.dequantize_v4(None, None, 64, layout="v4")) is None
    assert hook.declines_dequantize(compat.dequantize_v4(None, None, 64)) is None
    assert hook.declines_dequantize(compat.dequantize_v4(None, None, 64, layout=Layout("v41"))) == "layout v41"
    assert hook.declines_dequantize(compat.dequantize_v32(None, None, 64)) == "a scale for 64 values, not 128"


def test_a_combination_keeps_its_holes_whatever_the_releases_order() -> None:
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([[1, -1, 0, 9]], [0, 1], [8], [4], [100], [200])]
    raw, start, seq, gather, base, swa = ints
    position = torch.tensor([7], dtype=torch.int32)
    older = compat.combine_call(raw, start, seq, gather, base, swa, 4, 4, 4)
    newer = compat.CombineCall(raw, start, position, seq, gather, base, swa, 4, 4, 4)
    for call in (older, newer):
        assert hook.declines_combine(call) is None
        indices, lens = hook.serve_combine(call)
        assert indices[0, :6].tolist() == [101, -1, 200, 201, 202, 203] and lens.tolist() == [6]
    assert hook.declines_combine(compat.CombineCall(raw, *[None] * 9, swa_indices=raw)) is not None


def test_windows_with_and_without_a_total() -> None:
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([5], [2], [0], [list(range(8))])]
    for total in ((), (4,)):
        ids, first, gather, offsets = hook.serve_swa(compat.SwaCall(*ints, torch.arange(8), 3, *total))
        assert (ids.tolist(), first.tolist(), gather.tolist()) == ([1, 2, 3, 4], [1], [4])
        assert offsets.tolist() == [0, 4]


# the route


def step(**more: Any) -> v4_chunk.Prompt:
    """What is known of a prompt before its layers."""
    return v4_chunk.Prompt(backend(), Batch(), core(), 6, torch.device("cpu"), **more)


def of_step() -> Route:
    return v4_policy.route(step(), v4_policy.OF_STEP)


def of_layer(ratio: int = 0) -> Route:
    return v4_policy.route(step(heads=64, ratio=ratio), v4_policy.OF_LAYER)


def test_the_shorter_lists_are_in_the_tables_order() -> None:
    for rows in (v4_policy.OF_STEP, v4_policy.OF_LAYER, v4_policy.OF_CALL):
        assert list(rows) == [one for one in Route if one in rows] and rows[-1] is Route.TRITON
    assert set(v4_policy.OVER_PAGES) < set(v4_policy.OF_LAYER)
    assert [row for row in hook.FEATURE.providers if row[1].startswith("V4: ")] == [
        (one.provider, f"V4: {one.value}") for one in Route
    ]


def test_lengths_are_not_asked_of_the_device_during_a_capture(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "capturing", lambda: True)
    monkeypatch.setattr(v4_chunk, "host_lens", lambda batch: pytest.fail("the device was asked"))
    call = forward(ratio=4, batch=Batch(seq_lens_cpu=None))
    assert v4_policy.declines(call) == Route.CAPTURED.value


@pytest.fixture
def device(monkeypatch):
    """A GPU for so many queries over pages, and a model's window."""

    def set_(most: int | None):
        monkeypatch.setattr(v4_chunk, "most_queries", lambda device: most)

    monkeypatch.setattr(v4_chunk, "window", lambda backend: 128)
    set_(None)
    return set_


# tokens of the windows and of ratio 4: (4 + 127 + 40) + (75 + 10)
BYTES = 256 * 1024


def long(extend: int) -> Any:
    """One request, after 131072 tokens of which a workspace would be made."""
    lens = {"seq_lens": torch.tensor([131072 + extend]), "extend_seq_lens": torch.tensor([extend])}
    return Batch(**lens, seq_lens_cpu=lens["seq_lens"], extend_seq_lens_cpu=[extend])


def test_a_layer_of_few_queries_attends_over_pages(device, monkeypatch) -> None:
    few = Route.FEW.value
    for extend, ratio, reason in ((128, 4, few), (128, 128, None), (16, 128, few), (1024, 4, None)):
        call = forward(ratio=ratio, batch=long(extend))
        assert v4_policy.declines(call) == reason, (extend, ratio)
        assert (v4_policy.route(call) is Route.FEW) == (reason == Route.FEW.value)
    call = forward(ratio=4, batch=long(64))
    monkeypatch.setenv(ROUTE, "all")
    assert v4_policy.declines(forward(ratio=4, batch=long(64))) is None
    monkeypatch.delenv(ROUTE)
    assert v4_policy.declines(call) == few
    bump(call.batch)
    device(5)  # of 6
    assert v4_policy.declines(call) is None


def test_the_answer_of_a_step_is_kept(device, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(v4_policy, "ask_lengths", lambda prompt: asked.append((prompt.heads, prompt.ratio)))
    call = forward(ratio=4)
    for _layer in range(3):
        assert v4_policy.declines(call) is None
    call.ratio, call.layer_id = 128, 2
    v4_policy.declines(call)
    assert asked == [(64, 4), (64, 128)]


def test_the_route_follows_the_variables(device, monkeypatch) -> None:
    assert of_step() is Route.TRITON
    monkeypatch.setenv(ROUTE, "large")
    assert of_layer() is of_step() is Route.FEW
    device(6)
    assert of_layer() is of_step() is Route.FEW
    device(5)  # which pages cannot serve: over a workspace, whatever the variables
    assert of_layer() is of_step() is Route.TRITON
    monkeypatch.setenv(WORKSPACE, "0")
    assert of_layer() is of_step() is Route.TRITON


@pytest.mark.parametrize("bound, fits", [(BYTES, True), (BYTES - 1, False)])
def test_the_bound_is_on_the_workspace(device, monkeypatch, bound: int, fits: bool) -> None:
    monkeypatch.setattr(v4_policy, "workspace_limit", lambda: bound)
    monkeypatch.setenv(ROUTE, "all")
    assert of_layer(4) is of_step() is (Route.TRITON if fits else Route.TOO_LARGE)
    monkeypatch.setenv(ROUTE, "auto")
    assert of_layer(4) is (Route.FEW if fits else Route.TOO_LARGE)  # of 6 queries


def test_the_bound_is_in_mebibytes(monkeypatch) -> None:
    assert v4_policy.workspace_limit() == 4096 << 20
    monkeypatch.setenv(WORKSPACE, " 64 ")
    assert v4_policy.workspace_limit() == 64 << 20


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (WORKSPACE, "4G", "expected a number of MiB"),
        (WORKSPACE, "-1", "expected a number of MiB"),
        (ROUTE, "lagre", "expected one of auto, all, large; did you mean large?"),
    ],
)
def test_a_setting_that_cannot_be_taken_is_told_and_is_the_default(name, value, told, monkeypatch) -> None:
    monkeypatch.setenv(name, value)
    problems = flags.read(os.environ, [hook.FEATURE]).problems
    assert problems == [f"{name}={value}: {told}"]
    assert v4_policy.workspace_limit() == 4096 << 20 and flags.variable(hook.FEATURE, "ROUTE") == "auto"


def test_a_route_may_be_written_in_capitals(monkeypatch) -> None:
    monkeypatch.setenv(ROUTE, "Large")
    assert of_layer(4) is of_step() is Route.FEW


@pytest.mark.parametrize("shared, most", [(227, 11622), (163, 8345), (99, 5068)])
def test_how_many_queries_a_schedule_holds(monkeypatch, shared: int, most: int) -> None:
    """20 bytes of a block's shared memory for each; upstream's 11673 is what a whole SM of an H200 has."""
    monkeypatch.setattr(gpu, "shared_memory", lambda index: shared * 1024)
    assert v4_chunk.most_queries(torch.device("cuda:0")) == most
    assert v4_chunk.most_queries(torch.device("cpu")) is None


def test_lengths_are_asked_of_the_device_where_the_scheduler_has_none() -> None:
    assert v4_chunk.host_lens(Batch()) == ([300, 40], [4, 2])
    assert v4_chunk.host_lens(Batch(seq_lens_cpu=None, extend_seq_lens_cpu=None)) == ([300, 40], [4, 2])


def test_a_generation_is_of_this_step_these_pages_and_this_pool() -> None:
    call = prompt()
    first = v4_chunk.view(call).generation
    assert v4_chunk.view(call).generation == first
    for holder in (call.backend.forward_metadata, call.batch, call.pool):
        before = v4_chunk.view(call).generation
        bump(holder)
        assert v4_chunk.view(call).generation != before
    call.pool.full_to_swa_index_mapping = torch.zeros(9)
    assert v4_chunk.view(call).generation not in (first, before)


# edits


class Metadata:
    def __init__(self) -> None:
        self.core_attn_metadata = core(c4_sparse_page_indices=torch.zeros(6, 64, dtype=torch.int32))
        self.sparse_prefill_cache: Any = "kept"

    def copy_(self, other: Any) -> str:
        return "copied"

    def refresh_for_breakable_cuda_graph_replay_(self, static_metadata: Any) -> str:
        return "refreshed"


class Mode:
    def __init__(self, prompt: bool = True) -> None:
        self.prompt = prompt

    def is_extend_without_speculative(self) -> bool:
        return self.prompt


REFRESH = "refresh_for_breakable_cuda_graph_replay_"


@pytest.fixture
def module() -> Any:
    """The backend's module, made anew for each test: edits change its classes."""
    own = type("DSV4Metadata", (Metadata,), {name: vars(Metadata)[name] for name in ("copy_", REFRESH)})

    class Backend:
        forward_metadata: Any = None

        def forward(self, q, k, v, layer, forward_batch, compress_ratio, save_kv_cache=True, attn_sink=None, **_):
            return "sparse" if forward_batch.forward_mode.is_extend_without_speculative() else "pages", forward_batch

        def init_forward_metadata(self, forward_batch) -> None:
            self.forward_metadata = own()

    envs = SimpleNamespace(SGLANG_OPT_FLASHMLA_SPARSE_PREFILL=Switch())
    return SimpleNamespace(DSV4Metadata=own, DeepseekV4AttnBackend=Backend, envs=envs)


def test_metadata_filled_anew_has_a_new_number(module) -> None:
    undo = v4_route.number_metadata(module)
    one = module.DSV4Metadata()
    for call, result in ((one.copy_, "copied"), (getattr(one, REFRESH), "refreshed")):
        before, one.sparse_prefill_cache = generation_of(one), "stale"
        assert call(None) == result
        assert generation_of(one) != before and one.sparse_prefill_cache is None
    undo()
    before = generation_of(one)
    one.copy_(None)
    assert generation_of(one) == before


Q = torch.zeros(6, 1, 64, 512)


def test_the_host_is_kept_from_its_route(module, device, monkeypatch) -> None:
    over_pages, asked = set(), []

    def ask_lengths(prompt):
        asked.append((prompt.heads, prompt.ratio, v4_chunk.topk(prompt.core, prompt.ratio)))
        return Route.FEW if prompt.ratio in over_pages else None

    monkeypatch.setattr(v4_policy, "ask_lengths", ask_lengths)
    undo = v4_route.route_prompts(module)
    one = module.DeepseekV4AttnBackend()
    one.forward_metadata = module.DSV4Metadata()

    def taken(mode: Any = None) -> list[str]:
        step = Batch(forward_mode=mode or Mode(), out_cache_loc=7)
        routes = []
        for ratio in (4, 128, 4, 128):
            route, seen = one.forward(q=Q, k=None, v=None, layer=None, forward_batch=step, compress_ratio=ratio)
            assert seen.out_cache_loc == 7 and seen.seq_lens is step.seq_lens
            routes.append(route)
        assert routes[:2] == routes[2:]
        return routes[:2]

    assert taken() == ["sparse", "sparse"] and taken(Mode(False)) == ["pages", "pages"]
    assert asked == [(64, 4, 64), (64, 128, None)]  # once for all layers of a kind
    over_pages.add(4)
    assert taken() == ["pages", "sparse"]
    over_pages.clear()
    one.forward_metadata.core_attn_metadata.seq_lens_casual = torch.zeros(3)
    assert taken() == ["pages", "pages"]
    undo()
    assert taken() == ["sparse", "sparse"]


@pytest.mark.parametrize("on", [False, True])
def test_what_pages_cannot_serve_takes_the_releases_route(module, device, monkeypatch, on: bool) -> None:
    """Between what this device's schedule holds and the release's own number, where its switch is off."""
    switch, seen = module.envs.SGLANG_OPT_FLASHMLA_SPARSE_PREFILL, []
    switch.on = on
    monkeypatch.setattr(v4_policy, "ask_lengths", lambda prompt: Route.FEW)
    owner = module.DeepseekV4AttnBackend
    owner.forward = watched(owner.forward, lambda: seen.append(switch.get()))
    v4_route.route_prompts(module)
    one = owner()
    one.forward_metadata = module.DSV4Metadata()
    routes = []
    for most in (6, 5):
        device(most)
        step = Batch(forward_mode=Mode())
        routes.append(one.forward(Q, None, None, None, step, 4)[0])
    assert routes == ["pages", "sparse"] and seen == [on, True] and switch.on == on


@pytest.mark.parametrize("route", ["trtllm", "q8kv8"])
def test_another_route_of_the_releases_is_left(module, device, monkeypatch, route: str) -> None:
    """Over pages of another layout, or with other queries: no layer of it is sent over pages."""
    monkeypatch.setattr(v4_policy, "ask_lengths", lambda prompt: Route.FEW)
    asked = ["auto"]
    module.use_dsv4_q8kv8_sparse_prefill = lambda backend: asked.append(backend) or route == "q8kv8"
    undo = v4_route.route_prompts(module)
    one = module.DeepseekV4AttnBackend()
    one.forward_metadata, one.dsv4_prefill_backend = module.DSV4Metadata(), "given"
    one.trtllm_attn = route == "trtllm"
    step = Batch(forward_mode=Mode())
    found, seen = one.forward(Q, None, None, None, step, 4)
    assert found == "sparse" and seen is step and asked[1:] == (["given"] if route == "q8kv8" else [])
    one.trtllm_attn = False
    module.use_dsv4_q8kv8_sparse_prefill = lambda backend: False
    assert one.forward(Q, None, None, None, step, 4)[0] == "pages"
    undo()


@pytest.mark.parametrize("ratios", [(0, 4, 128), (4,)], ids=str)
def test_what_a_v4_backend_has_compiled(module, monkeypatch, ratios: tuple[int, ...]) -> None:
    seen: list[Any] = []
    for kernel in (dequantize, prefill_indices, sparse_prefill):
        name = kernel.__name__.removeprefix("mla_patch.kernels.")
        monkeypatch.setattr(kernel, "warmup", lambda *given, name=name: seen.append((name, *given)) or 1)
    small = SimpleNamespace(page_size=128, kv_cache_total_dim=584)
    one = SimpleNamespace(
        token_to_kv_pool=SimpleNamespace(page_size=256, swa_kv_pool=small), present_ratios=ratios, trtllm_attn=False
    )
    runner = SimpleNamespace(device="cpu", model_config=SimpleNamespace(num_attention_heads=20))
    monkeypatch.setattr(hook, "capability_of", lambda tensor: SM90)
    asked = v4_reach.v4_shapes(module, one, runner)
    pages = (128, *(256 // ratio for ratio in ratios if ratio))
    assert asked == v4_reach.WarmupShapes("cpu", pages, (20, 64)) and hook.warm(asked) == 3
    # FlashMLA attends with 64 heads there
    prefill = ("sparse.prefill", "cpu", 20, 512, torch.bfloat16, True)
    assert seen == [("cache.dequantize", "cpu", pages), ("indices.prefill", "cpu"), prefill]
    one.trtllm_attn = True
    assert v4_reach.v4_shapes(module, one, runner) is None
    one.trtllm_attn, small.kv_cache_total_dim = False, 640
    assert v4_reach.v4_shapes(module, one, runner) is None
    seen.clear()
    assert hook.warm(v4_reach.WarmupShapes("cpu")) == 1 and seen == [("cache.dequantize", "cpu", ())]  # V3.2's
    seen.clear()
    monkeypatch.setattr(hook.gpu, "from_tensor", lambda tensor: Gpu("AMD Instinct MI300X", (9, 4), cuda=False))
    assert hook.warm(asked) == 0 and not seen


def test_warm_ups_come_once_backends_are_built(module) -> None:
    asked: list[Any] = []

    def warm(shapes: Any) -> int:
        asked.append(shapes)
        return 0

    runner = SimpleNamespace(device="cpu", model_config=SimpleNamespace(num_attention_heads=64))

    class Backend:
        def __init__(self, model_runner: Any, skip_prefill: bool = False) -> None:
            small = SimpleNamespace(page_size=128, kv_cache_total_dim=584)
            self.token_to_kv_pool = SimpleNamespace(page_size=256, swa_kv_pool=small)

    module.DeepseekV4AttnBackend = module.DeepseekSparseAttnBackend = Backend
    undo = v4_reach.warm_v4(warm, module)
    Backend(runner)
    assert asked == [v4_reach.WarmupShapes("cpu", (128, 64, 2), (64,))]
    undo()
    undo = v4_reach.warm_v32(warm, module)
    Backend(runner)
    assert asked[1:] == [v4_reach.WarmupShapes("cpu")]
    undo()
    Backend(runner)
    assert len(asked) == 2


@pytest.mark.parametrize("first", [0, 1])
def test_one_feature_s_warm_up_goes_without_the_other_s(first, monkeypatch) -> None:
    class Backend:
        def __init__(self, model_runner: Any) -> None:
            """The host's own."""

    own, told = Backend.__init__, []
    monkeypatch.setattr(warmup, "warm_up", lambda path, backend, runner, find: told.append(path))
    undo = [warmup.warm_once_built(Backend, path, print) for path in ("one", "other")]
    assert Backend.__init__.__doc__ == own.__doc__
    Backend(None)
    assert told == ["one", "other"]
    undo[first]()
    Backend(None)
    assert told[2:] == [("other", "one")[first]]
    undo[1 - first]()
    assert Backend.__init__ is own
    undo = warmup.warm_once_built(Backend, "again", print)
    Backend.__init__ = foreign = functools.wraps(Backend.__init__)(lambda self, model_runner: None)
    undo()
    assert Backend.__init__ is foreign
    warmup.warm_once_built(Backend, "on top", print)()
    assert Backend.__init__ is foreign


def watched(method: Any, note: Any) -> Any:
    @functools.wraps(method)
    def method_(*args: Any, **kwargs: Any) -> Any:
        note()
        return method(*args, **kwargs)

    return method_


class Switch:
    """One of the host's environment variables."""

    on = False

    def get(self) -> bool:
        return self.on

    @contextmanager
    def override(self, value: bool):
        self.on, before = value, self.on
        yield
        self.on = before


def test_a_routed_prompt_gets_a_place_for_positions(module, monkeypatch) -> None:
    reasons: list[Any] = [None]
    monkeypatch.setattr(v4_policy, "ask_lengths", lambda prompt: reasons[0])
    undo = v4_route.allocate_topk_positions(module)
    one = module.DeepseekV4AttnBackend()

    def made(mode: Any) -> Any:
        one.init_forward_metadata(Batch(forward_mode=mode))
        inner = one.forward_metadata.core_attn_metadata
        return vars(one.forward_metadata).get(v4_policy._STEP), vars(inner.c4_sparse_page_indices).get(
            v4_route._POSITIONS
        )

    route, place = made(Mode())
    assert route is None and place.shape == (6, 64) and bool((place == -1).all())
    assert one.forward_metadata.core_attn_metadata.c4_sparse_raw_indices is place
    assert made(Mode(False)) == (None, None)
    reasons[0] = Route.FEW
    assert made(Mode()) == (Route.FEW, None)
    undo()
    assert made(Mode()) == (None, None)


def test_the_indexer_tells_positions_to_those_who_asked() -> None:
    called: list[str] = []

    def topk_transform_512(scores, seq_lens, page_tables, out_page_indices, page_size, out_raw_indices=None):
        called.append("first")
        if out_raw_indices is not None:
            out_raw_indices.fill_(3)

    def topk_transform_512_v2(scores, seq_lens, page_tables, out_page_indices, page_size, metadata):
        called.append("second")

    def vectorized(scores, seq_lens, page_tables, out_page_indices, page_size, out_raw_indices=None):
        topk_transform_512(scores, seq_lens, page_tables, out_page_indices, page_size, out_raw_indices)

    own = SimpleNamespace(
        __name__="indexer", topk_transform_512=topk_transform_512, topk_transform_512_v2=topk_transform_512_v2,
        topk_transform_512_pytorch_vectorized=vectorized,
    )  # fmt: skip
    undo = v4_route.record_topk_positions(own)
    plain, asked = torch.zeros(2), torch.zeros(2)
    setattr(asked, v4_route._POSITIONS, torch.zeros(2))
    place = vars(asked)[v4_route._POSITIONS]
    own.topk_transform_512_v2(None, None, None, plain, 64, None)
    assert called == ["second"]
    for call in (own.topk_transform_512_v2, own.topk_transform_512, own.topk_transform_512_pytorch_vectorized):
        place.zero_()
        call(None, None, None, asked, 64, None)
        assert place.tolist() == [3, 3]
    theirs = torch.zeros(2)
    place.zero_()
    own.topk_transform_512(None, None, None, asked, 64, theirs)
    assert theirs.tolist() == place.tolist() == [3, 3]
    own.topk_transform_512(None, None, None, plain, 64, theirs)
    undo()
    assert own.topk_transform_512 is topk_transform_512
    own.topk_transform_512 = lambda scores: None
    with pytest.raises(TypeError, match="parameters of topk_transform_512"):
        v4_route.record_topk_positions(own)


def test_many_queries_are_planned_by_the_releases_own_kernel(monkeypatch) -> None:
    switch, seen = Switch(), []

    class PagedIndexerMetadata:
        def __init__(self, queries: int) -> None:
            self.c4_seq_lens = torch.zeros(queries)
            self.__post_init__()

        def __post_init__(self) -> None:
            seen.append(switch.get())

    envs = SimpleNamespace(SGLANG_OPT_USE_JIT_INDEXER_METADATA=switch)
    undo = v4_route.plan_many_queries(SimpleNamespace(PagedIndexerMetadata=PagedIndexerMetadata, envs=envs))
    monkeypatch.setattr(v4_chunk, "most_queries", lambda device: 5)
    PagedIndexerMetadata(5)
    PagedIndexerMetadata(6)
    assert seen == [False, True] and not switch.on
    undo()
    PagedIndexerMetadata(6)
    assert seen == [False, True, False]


@pytest.mark.parametrize("edit", [v4_route.number_metadata, v4_route.route_prompts, v4_route.allocate_topk_positions])
def test_methods_that_take_something_else_are_left(module, edit) -> None:
    module.DeepseekV4AttnBackend.forward = lambda self, batch: None
    module.DeepseekV4AttnBackend.init_forward_metadata = lambda self, step: None
    module.DSV4Metadata.copy_ = lambda me, other: None
    before = dict(vars(module.DeepseekV4AttnBackend))
    with pytest.raises(TypeError, match="takes"):
        edit(module)
    assert dict(vars(module.DeepseekV4AttnBackend)) == before


def test_hardware_and_memory() -> None:
    assert hook.FEATURE.hardware(Gpu("AMD Instinct MI300X", (9, 4), cuda=False)) == "not an NVIDIA GPU"
    assert hook.FEATURE.hardware(Gpu("NVIDIA L4", (8, 9))) is None
    from mla_patch import chunk_cache as sparse_prefill

    assert hook.memory() == sparse_prefill.held()
