"""One SGLang release's FlashAttention-3, FlashInfer MLA and FlashMLA on a CPU, built by their own constructors.

    python backends_child.py RELEASE OUT.json    with the release on PYTHONPATH and MLA_PATCH=1

The release's attention kernels are stood in for, in float64, and what surrounds its backends: a model runner, the
process-wide settings. Its metadata builders run, and so do its own pool and its own writes. Each backend decodes
eagerly, as at a graph's capture and as at its replay, once by the release's method and once by ours. Judges nothing: it
writes down what it saw.
"""

import importlib
import importlib.util
import json
import logging
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cuda_on_cpu

sys.path.pop(0)  # this folder: a host must not find our modules by their plain names

import mla_patch
import mla_patch.startup

mla_patch.startup.start()

ATTENTION = "sglang.srt.layers.attention"
HEADS, SCALE, CONTEXT, SLOTS, FILL = 2, 0.07, 320, 1024, 1  # FILL: the lengths at which the engine captures
REQUESTS = (2, 5, 1)  # their rows of the table; row 0 is what padded requests have
LENS = {"eager": (5, 70, 33), "replay": (66, 9, FILL)}
# Triton's interpreter takes no mask that a scalar makes, which their pools' kernel for two parts has
UNWRITTEN = ("0.5.15", "0.5.16", "0.5.17", "0.5.18", "0.5.19", "0.5.20", "0.5.21")
OWNERS = {
    "fa3": ("flashattention_backend", "FlashAttentionBackend"),
    "flashinfer": ("flashinfer_mla_backend", "FlashInferMLAAttnBackend"),
    "flashmla": ("flashmla_backend", "FlashMLABackend"),
}


class Bag:
    """Settings: those that are named, and None for all others."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def answers(value: Any) -> Any:
    return lambda *args, **kwargs: value


def attend(q: Any, keys: Any) -> Any:
    """[heads, 576] over [keys, 576], in float64."""
    keys = keys.double()
    return (q.double() @ keys.T * SCALE).softmax(-1) @ keys[:, :512]


class Kernels:
    """The release's attention kernels, and what they were given last."""

    def __init__(self) -> None:
        self.converted = 0  # values of the last call's cache
        self.descale: Any = None

    def flash_attention(self, q: Any, k_cache: Any, v_cache: Any, **given: Any) -> Any:
        import torch

        nope, table, lens = given["qv"], given["page_table"], given["cache_seqlens"]
        self.converted = v_cache.numel() if v_cache.dtype == q.dtype else 0
        size, out = k_cache.shape[1], nope.new_empty(nope.shape)
        for b, length in enumerate(lens.tolist()):
            t = torch.arange(length)
            pages = table[b][t // size].long()
            keys = torch.cat([v_cache[pages, t % size, 0], k_cache[pages, t % size, 0]], -1)
            out[b] = attend(torch.cat([nope[b], q[b]], -1), keys)
        return out

    def flash_mla(self, q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any, **given: Any) -> Any:
        import torch

        self.descale = None if given.get("descale_k") is None else float(given["descale_k"])
        assert (k_cache.element_size() == 1) == (self.descale is not None) and block_table.dtype == torch.int32
        out = torch.empty(len(q), 1, q.shape[2], 512, dtype=torch.float16)
        for b, length in enumerate(cache_seqlens.tolist()):
            t = torch.arange(length)
            keys = k_cache[block_table[b][t // 64].long(), t % 64, 0].float() * (self.descale or 1.0)
            out[b, 0] = attend(q[b, 0].float() * (float(given["descale_q"]) if self.descale else 1.0), keys)
        return out, torch.zeros(len(q), q.shape[2], 1)

    @staticmethod
    def flash_mla_metadata(lens: Any, *args: Any, **given: Any) -> Any:
        import torch

        return torch.zeros(78, 8, dtype=torch.int32), torch.zeros(len(lens) + 1, dtype=torch.int32)


class Wrapper:
    """FlashInfer's: ``run`` attends by the last plan. In a graph it keeps copies, which a fast plan leaves alone."""

    def __init__(self, workspace: Any, use_cuda_graph: bool = False, **buffers: Any) -> None:
        self._graph, self._kv_indices_buf = use_cuda_graph, buffers.get("kv_indices")
        given = buffers.get("kv_indptr")
        self._kv_indptr_buf = None if given is None else given.clone()
        self._float_workspace_buffer = self._int_workspace_buffer = self._pin_memory_int_workspace_buffer = None
        fast = type("Plan", (), {"__call__": lambda _, *args: self.fast(*args)})()
        type(fast).default = property(lambda _: self.fast)
        self._cached_module = SimpleNamespace(plan=fast)
        self.planned: Any = None
        self.converted = 0

    def plan(self, qo_indptr: Any, kv_indptr: Any, kv_indices: Any, *args: Any, **named: Any) -> None:
        if self._graph:
            self._kv_indptr_buf.copy_(kv_indptr)
            self._kv_indices_buf[: len(kv_indices)].copy_(kv_indices)
        else:
            self._kv_indptr_buf, self._kv_indices_buf = kv_indptr, kv_indices
        self.planned = kv_indptr.tolist()

    def fast(self, *args: Any) -> None:
        """What a replay's plan is given: workspaces, then the queries' indptr and the keys', both on the CPU."""
        self.planned = args[4].tolist()

    def run(self, nope: Any, rope: Any, latents: Any, ropes: Any, out: Any, **more: Any) -> Any:
        import torch

        self.converted = latents.numel() if latents.dtype == nope.dtype else 0
        keys = torch.cat([latents, ropes], -1)[:, 0]
        for b in range(len(nope)):
            mine = self._kv_indices_buf[self.planned[b] : self.planned[b + 1]].long()
            out[b] = attend(torch.cat([nope[b], rope[b]], -1), keys[mine])
        return out


class Engine:
    """What surrounds a backend in this release."""

    def __init__(self, release: str) -> None:
        import torch

        self.release = release
        self.kernels = Kernels()
        arch = importlib.import_module("sglang.srt.configs.model_config").AttentionArch.MLA
        self.mode = importlib.import_module("sglang.srt.model_executor.forward_batch_info").ForwardMode
        self.kind = importlib.import_module("sglang.srt.layers.radix_attention").AttentionType.DECODER
        text = SimpleNamespace(num_attention_heads=HEADS)
        self.model = Bag(
            is_encoder_decoder=False, context_len=CONTEXT, attention_arch=arch, head_dim=576, num_attention_heads=HEADS,
            kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, scaling=SCALE,
            hf_text_config=text, hf_config=Bag(num_attention_heads=HEADS, architectures=["DeepseekV3ForCausalLM"]),
            get_num_kv_heads=answers(1), is_hybrid_swa=False, is_local_attention_model=False,
        )  # fmt: skip
        self.settings = Bag(
            kv_cache_dtype="fp8_e4m3", enable_deterministic_inference=False, disaggregation_mode="null",
            flashinfer_mla_disable_ragged=False, disable_chunked_prefix_cache=True, disable_cuda_graph=False,
            speculative_attention_mode="prefill",
        )  # fmt: skip
        self.ranks = Bag(
            attn_tp_size=1, attn_dcp_size=1, dcp_enabled=False, attn_cp_size=1, tp_size=1, attn_dp_enabled=False,
            enable_prefill_cp=False, attn_dcp_rank=0,
        )  # fmt: skip
        self.table = torch.zeros(8, CONTEXT, dtype=torch.int32)
        self.modules = {name: importlib.import_module(f"{ATTENTION}.{home}") for name, (home, _) in OWNERS.items()}
        self.hybrid = importlib.import_module(f"{ATTENTION}.hybrid_attn_backend")
        self._stand_in()

    def _stand_in(self) -> None:
        """In the modules, under the names by which they call: settings, kernels, and "cuda" where they say so."""
        import torch

        values = {
            "get_parallel": self.ranks, "get_spec": Bag(speculative_attention_mode="prefill"), "get_memory": Bag(),
            "get_exec": Bag(
                deterministic=Bag(enable_deterministic_inference=False), dllm=Bag(),
                kernel=Bag(flashinfer_mla_disable_ragged=False),
            ),
            "get_model": Bag(is_embedding=False), "get_disagg": Bag(disaggregation_mode="null"),
            "get_schedule": Bag(chunked_prefill_size=8192, disable_chunked_prefix_cache=True, page_size=1),
            "get_platform": Bag(is_sm100=False), "get_global_server_args": self.settings,
            "get_server_args": self.settings, "get_attention_tp_size": 1, "get_attention_dp_size": 1,
            "is_dp_attention_enabled": False, "is_sm100_supported": False, "is_dcp_enabled": False,
            "dcp_enabled": False, "cuda_graph_fully_disabled": False, "get_attention_dcp_world_size": 1,
            "get_dcp_world_size": 1, "get_device_capability": (9, 0), "get_attention_cp_size": 1,
        }  # fmt: skip
        own = {
            "get_buffer": lambda name, make: torch.empty(1),
            "get_cuda_graph_max_batch_size": lambda count: count,
            "flash_attn_with_kvcache": self.kernels.flash_attention,
            "flash_mla_with_kvcache": self.kernels.flash_mla,
            "get_mla_metadata": self.kernels.flash_mla_metadata,
            "scaled_fp8_quant": lambda x, scale: ((x.float() / scale).to(torch.float8_e4m3fn), scale),
        }
        own |= {name: answers(value) for name, value in values.items()}
        for module in (*self.modules.values(), self.hybrid):
            for name, value in own.items():
                if hasattr(module, name):
                    setattr(module, name, value)
        flashinfer = self.modules["flashinfer"]
        flashinfer.BatchMLAPagedAttentionWrapper = Wrapper
        flashinfer.BatchPrefillWithRaggedKVCacheWrapper = answers(SimpleNamespace())
        for module in list(sys.modules.values()):  # read far from the backends, too
            if getattr(module, "__name__", "").startswith("sglang.") and "get_parallel" in vars(module):
                module.get_parallel = answers(self.ranks)
        ranks = sys.modules.get("sglang.srt.layers.dp_attention")
        if hasattr(ranks, "get_attention_tp_size"):
            ranks.get_attention_tp_size = answers(1)
        torch.cuda.get_device_properties = answers(SimpleNamespace(multi_processor_count=132))
        cuda_on_cpu.install()

    def pool(self, dtype: Any, page: int) -> Any:
        import torch

        made = importlib.import_module("sglang.srt.mem_cache.memory_pool").MLATokenToKVPool(
            size=SLOTS - page, page_size=page, dtype=dtype, kv_lora_rank=512, qk_rope_head_dim=64, layer_num=1,
            device="cpu", enable_memory_saver=False,
        )  # fmt: skip
        if self.release in UNWRITTEN:
            made.set_mla_kv_buffer = _stores(made)
        values = torch.randn(SLOTS, 1, 576, generator=torch.Generator().manual_seed(3)).to(dtype)
        made.get_key_buffer(0).view(torch.uint8).copy_(values.view(torch.uint8))
        return made

    def runner(self, pool: Any, page: int) -> Any:
        from mla_patch.drive import sglang as sglang_trial

        self.translator = sglang_trial.translator(SimpleNamespace(table=self.table, device="cpu"), page)
        import torch

        return Bag(
            ps=Bag(tp_size=1, attn_cp_size=1, attn_tp_size=1, attn_dcp_size=1), tp_size=1, model_config=self.model,
            device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=self.table, size=8, device="cpu"),
            token_to_kv_pool=pool, kv_cache_dtype=pool.dtype, kv_cache_dtype_str="fp8_e4m3", page_size=page,
            is_hybrid=False, is_draft_worker=False, server_args=self.settings, kv_index_translator=self.translator,
            dtype=torch.float16, is_hybrid_swa=False, use_mla_backend=True, prefill_aware_swa=False,
            max_running_requests=8, spec_algorithm=Bag(),
        )  # fmt: skip

    def place(self, lens: tuple[int, ...], page: int) -> None:
        """Give each request pages anywhere in the pool; row 0, of padded requests, is slot 0."""
        import torch

        free = (torch.randperm(SLOTS // page - 1, generator=torch.Generator().manual_seed(7)) + 1).tolist()
        self.table.zero_()
        for row, length in zip(REQUESTS, lens, strict=True):
            pages = torch.tensor([free.pop() for _ in range(-(-length // page))])
            self.table[row, :length] = (pages[:, None] * page + torch.arange(page)).view(-1)[:length].int()

    def batch(self, lens: tuple[int, ...], rows: tuple[int, ...], pool: Any) -> Any:
        import torch

        counts, requests = torch.tensor(lens), torch.tensor(rows)
        reads = {"req_pool_indices": requests, "seq_lens": counts, "seq_lens_cpu": counts.clone()}
        # from 0.5.22 a step's reads are planned once
        plan = getattr(self.translator, "plan", None)
        return Bag(
            **reads, batch_size=len(lens), seq_lens_sum=sum(lens), positions=counts - 1, forward_mode=self.mode.DECODE,
            kv_loc_plan=plan(**reads, write_virtual=None) if plan is not None else None, token_to_kv_pool=pool,
            out_cache_loc=self.table[requests, counts - 1].long(), out_cache_loc_is_physical=False,
            req_to_token_pool=SimpleNamespace(req_to_token=self.table),
        )  # fmt: skip

    def layer(self, k_scale: float | None = None) -> Any:
        import torch

        scale = None if k_scale is None else torch.tensor(k_scale)
        return Bag(
            layer_id=0, tp_q_head_num=HEADS, tp_k_head_num=1, tp_v_head_num=1, head_dim=576, v_head_dim=512,
            scaling=SCALE, logit_cap=0.0, is_cross_attention=False, attn_type=self.kind, k_scale=scale, v_scale=scale,
            k_scale_float=k_scale,
        )  # fmt: skip


def _stores(pool: Any) -> Any:
    """What the pool's own writer does, which launches a kernel."""
    import torch

    def set_mla_kv_buffer(layer: Any, loc: Any, k: Any, k_rope: Any) -> None:
        assert torch.is_tensor(loc)
        rows = torch.cat([k.view(-1, 1, 512), k_rope.reshape(-1, 1, 64)], -1).to(pool.dtype)
        pool.get_key_buffer(layer.layer_id).view(torch.uint8)[loc] = rows.view(torch.uint8)

    return set_mla_kv_buffer


def feature() -> dict[str, Any]:
    return next(row for row in mla_patch.report()["features"] if row["name"] == "decode")


def switch() -> Any:
    return mla_patch.startup._get_session().patcher.runs["decode@sglang"].switch


class Driven:
    """One backend of the release, and its steps by either arm."""

    def __init__(self, engine: Engine, name: str, dtype: Any, page: int) -> None:
        import torch

        self.engine, self.name, self.page = engine, name, page
        self.pool = engine.pool(dtype, page)
        engine.place(LENS["eager"], page)
        runner = engine.runner(self.pool, page)
        self.backend = getattr(engine.modules[name], OWNERS[name][1])(runner)
        self.layer = engine.layer()
        g = torch.Generator().manual_seed(1)
        count = len(REQUESTS)
        nope = torch.randn(HEADS, count, 512, generator=g).half().transpose(0, 1)  # as a batched product leaves it
        rope = torch.randn(count, HEADS, 192, generator=g).half()[..., 128:]
        k, k_rope = (torch.randn(count, 1, width, generator=g).half() for width in (512, 64))
        self.q = torch.cat([nope, rope], -1)
        self.args, self.more = (nope, k, k), {"q_rope": rope, "k_rope": k_rope}
        if name == "flashmla":  # its models concatenate
            self.args, self.more = (self.q, torch.cat([k, k_rope], -1), k), {}

    def forward(self, batch: Any, **more: Any) -> Any:
        return self.backend.forward(*self.args, self.layer, batch, **self.more, **more)

    def both(self, batch: Any) -> dict[str, Any]:
        """The same step by the engine's method and by ours, from the same pool."""
        import torch

        bytes_ = self.pool.get_key_buffer(0).view(torch.uint8)
        bytes_[batch.out_cache_loc] = 0x33  # or what was stored before would do
        before = bytes_.clone()
        switch().set(off=True)
        host = self.forward(batch)
        stored = bytes_.clone()
        bytes_.copy_(before)
        switch().set(off=False)
        was = feature()
        ours = self.forward(batch)
        now = feature()
        count = batch.batch_size
        rows = zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True)
        cache = self.pool.get_key_buffer(0)[:, 0]
        slots = [self.engine.table[row, :length].long() for row, length in rows]
        want = torch.stack([attend(q, cache[ids]) for q, ids in zip(self.q, slots, strict=True)]).view(count, -1)
        return {
            "served": now["served"] - was["served"],
            "declined": {why: n for why, n in now["declined"].items() if n != was["declined"].get(why, 0)},
            "error": {"ours": error(ours, want), "host": error(host, want)}, "apart": error(ours, host.double()),
            "alike": [list(ours.shape), str(ours.dtype)] == [list(host.shape), str(host.dtype)],
            "stored": not torch.equal(before, stored), "pools differ": int((stored != bytes_).sum()),
        }  # fmt: skip

    def capture(self) -> Any:
        """The metadata that a graph of this size is captured with."""
        import torch

        backend, count = self.backend, len(REQUESTS)
        backend.init_cuda_graph_state(4, 4)
        batch = self.engine.batch((FILL,) * count, REQUESTS, self.pool)
        if hasattr(backend, "init_forward_metadata_out_graph"):
            backend.init_forward_metadata_out_graph(batch, in_capture=True)
        else:
            one = torch.ones(count, dtype=batch.seq_lens.dtype)
            backend.init_forward_metadata_capture_cuda_graph(
                count, count, batch.req_pool_indices, one, None, self.engine.mode.DECODE, None
            )
        return batch

    def replay(self) -> Any:
        """The metadata of a replay with other lengths, the last request padded."""
        lens = LENS["replay"]
        self.engine.place(lens, self.page)
        batch = self.engine.batch(lens, (*REQUESTS[:-1], 0), self.pool)
        if hasattr(self.backend, "init_forward_metadata_out_graph"):
            self.backend.init_forward_metadata_out_graph(batch, in_capture=False)
        else:
            self.backend.init_forward_metadata_replay_cuda_graph(
                batch.batch_size, batch.req_pool_indices, batch.seq_lens, batch.seq_lens_sum, None,
                self.engine.mode.DECODE, None, batch.seq_lens_cpu,
            )  # fmt: skip
        return batch


def error(out: Any, want: Any) -> float:
    return float((out.double() - want).norm() / want.norm())


def steps(driven: Driven) -> dict[str, Any]:
    """Eager, at capture's lengths, at a replay; and what the traps of each backend look like."""
    import torch

    backend, seen = driven.backend, {}
    driven.engine.place(LENS["eager"], driven.page)
    batch = driven.engine.batch(LENS["eager"], REQUESTS, driven.pool)
    backend.init_forward_metadata(batch)
    seen["eager"] = driven.both(batch)
    seen["converted"] = driven.engine.kernels.converted
    if driven.name == "flashinfer":
        seen["converted"] = backend.forward_metadata.decode_wrapper.converted
    seen["capture"] = driven.both(driven.capture())
    table = getattr(backend.forward_metadata, "block_kv_indices", None)
    batch = driven.replay()
    seen["replay"] = driven.both(batch)
    if table is not None and driven.pool.dtype.itemsize == 1:  # the capture's own view is what a graph keeps
        full = driven.forward(batch)
        backend.forward_metadata.block_kv_indices = table
        seen["captured table"] = {
            "columns": table.shape[1], "equal": torch.equal(driven.forward(batch), full),
        }  # fmt: skip
    if driven.name == "flashinfer":
        wrapper = backend.forward_metadata.decode_wrapper
        seen["stale"] = wrapper._kv_indptr_buf[: len(REQUESTS) + 1].tolist()
        seen["lengths"] = backend.kv_indptr[: len(REQUESTS) + 1].tolist()
    return seen


def drafts(driven: Driven) -> dict[str, Any]:
    """A draft step of one token a request, and what several would be."""
    backend = driven.backend
    driven.engine.place(tuple(length + 3 for length in LENS["eager"]), driven.page)
    batch = driven.engine.batch(LENS["eager"], REQUESTS, driven.pool)
    batch.spec_info = SimpleNamespace(ragged_verify_layout=None)
    seen: dict[str, Any] = {}
    if driven.name == "fa3":
        backend.topk, backend.speculative_step_id, backend.speculative_num_steps = 1, 1, 3
        backend.init_forward_metadata(batch)
        seen["lengths"] = backend.forward_metadata.cache_seqlens_int32.tolist()
        batch.seq_lens = backend.forward_metadata.cache_seqlens_int32.clone()  # which the definition reads
        seen["one token"] = driven.both(batch)
        backend.topk = 2
        from mla_patch.hooks.sglang.decode_backends import declines

        seen["two tokens"] = declines(driven_call(driven, batch))
        backend.topk = 0
    else:
        backend.init_forward_metadata(batch)
        seen["one token"] = driven.both(batch)
    return seen


def draft_graphs(engine: Engine) -> dict[str, Any] | None:
    """FlashInfer's draft steps under graphs: their indptr and ids are rows of buffers that all steps share."""
    import torch

    made = Driven(engine, "flashinfer", torch.float8_e4m3fn, 1)
    module = engine.modules["flashinfer"]
    several = module.FlashInferMLAMultiStepDraftBackend(engine.runner(made.pool, 1), topk=1, speculative_num_steps=3)
    eagle = [
        vars(one).get("EagleDraftInput") for name, one in sys.modules.items() if name.startswith("sglang.srt.spec")
    ]
    inputs = next(filter(None, eagle), None)  # what releases to 0.5.21 or so look for
    seen = {}
    several.init_cuda_graph_state(4, 4)
    for phase, lens in (("capture", (FILL,) * 3), ("replay", LENS["replay"])):
        engine.place(tuple(length + 3 for length in lens), 1)
        batch = engine.batch(lens, REQUESTS, made.pool)
        batch.positions = batch.seq_lens.clone()  # of the drafts
        batch.spec_info = object.__new__(inputs) if inputs is not None else Bag(is_draft_input=answers(True))
        if hasattr(several, "init_forward_metadata_out_graph"):
            several.init_forward_metadata_out_graph(batch, in_capture=phase == "capture")
        elif phase == "capture":
            several.init_forward_metadata_capture_cuda_graph(batch)
        else:
            several.init_forward_metadata_replay_cuda_graph(batch, len(lens))
        for step in (0, 1):
            made.backend = several.attn_backends[step]
            # a draft step reads the drafts before it, too
            step_batch = engine.batch(tuple(length + step + 1 for length in lens), REQUESTS, made.pool)
            step_batch.spec_info = batch.spec_info
            wrapper = made.backend.forward_metadata.decode_wrapper
            wrapper.planned = made.backend.kv_indptr[:4].tolist()  # which no release plans a replay with
            seen[f"{phase}, step {step}"] = made.both(step_batch) | {
                "lengths": made.backend.kv_indptr[:4].diff().tolist()
            }
    return seen


def driven_call(driven: Driven, batch: Any, **more: Any) -> Any:
    from mla_patch.compat.sglang import backends as sglang_backends

    kind = {call.name: call for call in sglang_backends.CALLS}[driven.name]
    return kind(driven.backend, *driven.args, driven.layer, batch, **driven.more, **more)


def hybrids(driven: Driven) -> dict[str, Any]:
    """Through the backends that hold one inside and pass save_kv_cache by position."""
    import torch

    engine, backend = driven.engine, driven.backend
    engine.place(LENS["eager"], driven.page)
    batch = engine.batch(LENS["eager"], REQUESTS, driven.pool)
    backend.init_forward_metadata(batch)
    runner = engine.runner(driven.pool, driven.page)
    named = [runner] if "model_runner" in engine.hybrid.HybridAttnBackend.__init__.__code__.co_varnames else []
    outer = {"HybridAttnBackend": engine.hybrid.HybridAttnBackend(*named, Bag(), backend)}
    try:
        module: Any = importlib.import_module(f"{ATTENTION}.hybrid_linear_attn_backend")
    except ImportError as problem:
        module, reason = None, f"{type(problem).__name__}: {problem}"
    if module is not None:
        with mock.patch.object(module, "check_cuda_graph_backend", answers(False), create=True):
            outer["HybridLinearAttnBackend"] = module.HybridLinearAttnBackend(backend, Bag(), [0])
    seen: dict[str, Any] = {}
    bytes_ = driven.pool.get_key_buffer(0).view(torch.uint8)
    for name, one in outer.items():
        bytes_[batch.out_cache_loc] = 0x33  # or what was stored before would do
        before, pool = feature()["served"], bytes_.clone()
        for save in (False, True):
            given = dict(zip(("q", "k", "v"), driven.args, strict=True)) | driven.more
            one.forward_decode(layer=driven.layer, forward_batch=batch, save_kv_cache=save, **given)
            seen.setdefault(name, []).append([feature()["served"] - before, not torch.equal(pool, bytes_)])
    if module is None:
        seen["HybridLinearAttnBackend"] = reason
    return seen


def mixed(engine: Engine) -> dict[str, str]:
    """--prefill-attention-backend fa3 --decode-attention-backend triton: which of the two each mode's step reaches."""

    class Named(Bag):
        def forward(self, *args: Any, **kwargs: Any) -> str:
            return self.name

        forward_decode = forward_extend = forward

    prefill, decode = Named(name="fa3"), Named(name="triton")
    owner = engine.hybrid.HybridAttnBackend
    runner = Bag(server_args=engine.settings, model_config=engine.model)
    named = [runner] if "model_runner" in owner.__init__.__code__.co_varnames else []
    both = owner(*named, prefill, decode)
    layer, seen = Bag(tp_q_head_num=1, v_head_dim=1), {}
    for name in ("DECODE", "EXTEND", "MIXED", "TARGET_VERIFY"):
        batch = Bag(forward_mode=getattr(engine.mode, name))
        seen[name] = both.forward(None, None, None, layer, batch)
    return seen


def main(release: str, out: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    import torch

    from mla_patch.drive import sglang as sglang_trial

    stubbed = sglang_trial.prepare()
    if importlib.util.find_spec("cutlass") is None:  # of kernels that 0.5.15 imports beside its hybrid backend
        sys.meta_path.insert(0, sglang_trial.StubFinder(["cutlass", "cuda"]))
    if release in ("0.5.1", "0.5.3", "0.5.5"):
        importlib.import_module("sglang.srt.layers.quantization")  # else its modules import one another in a ring
    from mla_patch.hooks.sglang import decode_backends as sglang_decode_backends

    warmed: list[Any] = []
    sglang_decode_backends.warm = lambda capacity: warmed.append([str(one) for one in capacity]) or 0
    engine = Engine(release)
    imported = time.process_time()
    e4m3, half = torch.float8_e4m3fn, torch.float16
    seen: dict[str, Any] = {"release": release, "stubbed": stubbed, "backends": {}}
    pages = {"fa3": (64, 1), "flashinfer": (1 if release == "0.5.1" else 64, 1), "flashmla": (64, 64)}
    driven = {name: Driven(engine, name, e4m3, pages[name][0]) for name in OWNERS}
    seen["warmed"] = list(warmed)
    for name, one in driven.items():
        seen["backends"][name] = {"e4m3": steps(one)}
    sixteen = {name: Driven(engine, name, half, pages[name][1]) for name in OWNERS}
    fa3 = sixteen["fa3"]
    engine.place(LENS["eager"], fa3.page)
    batch = engine.batch(LENS["eager"], REQUESTS, fa3.pool)
    fa3.backend.init_forward_metadata(batch)
    seen["by default"] = fa3.both(batch)
    mla_patch.apply("decode")  # asked for by now: 16-bit caches, too
    for name, one in sixteen.items():
        seen["backends"][name]["float16"] = steps(one)
    seen["drafts"] = {name: drafts(one) for name, one in driven.items()}
    seen["draft graphs"] = draft_graphs(engine)
    seen["hybrids"] = hybrids(driven["fa3"])
    seen["mixed"] = mixed(engine)
    flashmla = driven["flashmla"]
    flashmla.layer = engine.layer(k_scale=0.5)
    engine.place(LENS["eager"], 64)
    batch = engine.batch(LENS["eager"], REQUESTS, flashmla.pool)
    flashmla.backend.init_forward_metadata(batch)
    seen["scaled"] = flashmla.both(batch) | {"descale": engine.kernels.descale}
    row = feature()
    seen["feature"] = {key: row[key] for key in ("state", "reason", "served", "served_by", "declined", "targets")}
    mla_patch.restore("decode")
    before = feature()["served"]
    seen["restored"] = {}
    for name, one in driven.items():
        engine.place(LENS["eager"], one.page)
        batch = engine.batch(LENS["eager"], REQUESTS, one.pool)
        one.backend.init_forward_metadata(batch)
        one.forward(batch)
        method = vars(type(one.backend))["forward_decode"]
        seen["restored"][name] = [feature()["served"] - before, f"{method.__module__}.{method.__qualname__}"]
    seen["cuda initialized"] = torch.cuda.is_initialized()
    seen["seconds"] = {"import": round(imported, 1), "steps": round(time.process_time() - imported, 1)}
    assert not math.isnan(seen["scaled"]["error"]["ours"])
    Path(out).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
