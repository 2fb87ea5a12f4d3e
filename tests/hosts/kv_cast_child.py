"""One SGLang release's prefix hits, target verify and draft extend over an fp8 cache, in a process of its own.

    python kv_cast_child.py RELEASE OUT.json      with the release on PYTHONPATH, MLA_PATCH=1 and TRITON_INTERPRET=1

FlashAttentionBackend and FlashInferMLAAttnBackend are built by their own constructors on a made-up runner. Their own
metadata methods run eagerly and as for CUDA graphs: captured at one length, replayed at others. What stands in for the
two libraries attends in float32 to the rows that its tables name. Each step is run by the release's own method and by
ours, over the same pool; every tensor that either allocates is noted.
"""

import importlib
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_on_cpu

sys.path.pop(0)  # this folder: a host must not find our modules by their plain names

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import mla_patch
from mla_patch import _autostart
from mla_patch.compat import gpu
from mla_patch.drive import sglang as sglang_trial
from mla_patch.kernels.cache import kv_cast

RELEASE, OUT = sys.argv[1], Path(sys.argv[2])
HEADS, SCALE, CONTEXT, DRAFTS, PAGE = 2, 0.07, 400, 4, 64
SIZE = 1024  # of the pool, which has a page more; CONTEXT of three requests is more than that, and of one is less
LENS, ROWS = (70, 130, 5), (2, 5, 1)
WIDTHS = {"tp_size": 1, "attn_tp_size": 1, "attn_cp_size": 1, "attn_dcp_size": 1}


class Bag(SimpleNamespace):
    """What is not said is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class Noted(TorchDispatchMode):
    """Notes how many values each new tensor has, and poisons workspaces, so that a row that nobody wrote is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.workspaces = 0, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = [one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)]
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, one.numel())
                if function is torch.ops.aten.empty.memory_format and one.shape[1:] == (1, 576):
                    one.fill_(float("nan"))
                    self.workspaces.append(one)
        return out


def unnoted() -> Any:
    """What stands in for a library, or for a compiled kernel, allocates as it likes."""
    return _disable_current_modes()


def attend(q: torch.Tensor, rows: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One request's queries, [tokens, heads, 576], the last at the last row: out and the natural log-sum-exp."""
    keys, tokens = rows.float(), len(q)
    scores = torch.einsum("thd,ld->thl", q.float(), keys) * SCALE
    if causal:
        last = torch.arange(len(rows) - tokens, len(rows))
        scores.masked_fill_(torch.arange(len(rows)) > last[:, None, None], -torch.inf)
    return torch.einsum("thl,ld->thd", scores.softmax(-1), keys[:, :512]), scores.logsumexp(-1)


CALLS: list[dict[str, Any]] = []  # what the libraries were given


def fa3(*, q, qv, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q, causal, return_softmax_lse=False, **more):
    with unnoted():
        assert q.dtype == qv.dtype == k_cache.dtype == v_cache.dtype and k_cache.shape[-1] == 64
        assert page_table.dtype == cache_seqlens.dtype == cu_seqlens_q.dtype == torch.int32
        pages, size = k_cache.shape[:2]
        out, lse = torch.zeros(qv.shape, dtype=qv.dtype), torch.zeros(qv.shape[1], len(qv))
        starts = cu_seqlens_q.tolist()
        CALLS.append({"pages": pages, "width": page_table.shape[1]})
        for b, length in enumerate(cache_seqlens.tolist()):
            t = torch.arange(length)
            page = page_table[b, t // size].long()
            rows = torch.cat([v_cache[page, t % size, 0], k_cache[page, t % size, 0]], -1)
            mine = slice(starts[b], starts[b + 1])
            out[mine], sums = attend(torch.cat([qv[mine], q[mine]], -1), rows, causal)
            lse[:, mine] = sums.T
        return (out, lse) if return_softmax_lse else out


class FlashInfer:
    """BatchMLAPagedAttentionWrapper, with the attributes that its own `run` reads."""

    def __init__(self, workspace, use_cuda_graph=False, qo_indptr=None, kv_indptr=None, kv_indices=None,
                 kv_len_arr=None, backend="auto"):  # fmt: skip
        self._use_cuda_graph = use_cuda_graph
        self._buffers = qo_indptr, kv_indptr, kv_indices, kv_len_arr
        self._qo_indptr_buf, self._kv_indptr_buf, self._kv_indices_buf, self._kv_len_arr_buf = self._buffers
        self._float_workspace_buffer = self._int_workspace_buffer = self._pin_memory_int_workspace_buffer = None
        self._cached_module = SimpleNamespace(plan=self._plan)

    def _plan(self, *args: Any) -> None:
        """The module's own, which the host's fast plans call with numbers on the CPU."""
        self._planned = args[3].clone(), args[4].clone()

    def plan(self, *args: Any, **kwargs: Any) -> None:
        names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr", "num_heads", "head_dim_ckv", "head_dim_kpe",
                 "page_size", "causal", "sm_scale")  # fmt: skip
        given = dict(zip(names, args, strict=False)) | kwargs
        if self._use_cuda_graph:
            self._qo_indptr_buf.copy_(given["qo_indptr"])
            self._kv_indptr_buf.copy_(given["kv_indptr"])
            self._kv_indices_buf[: len(given["kv_indices"])].copy_(given["kv_indices"])
        else:
            self._qo_indptr_buf, self._kv_indptr_buf = given["qo_indptr"], given["kv_indptr"]
            self._kv_indices_buf = given["kv_indices"]
        self._planned = given["qo_indptr"].clone(), given["kv_indptr"].clone()
        self._page_size, self._causal = given["page_size"], given["causal"]

    def run(self, q_nope, q_pe, ckv, kpe, out=None, return_lse=False):
        with unnoted():
            assert self._page_size == ckv.shape[1] == 1 and ckv.dtype == q_nope.dtype
            assert self._kv_indices_buf.dtype == torch.int32
            starts, bounds = (one.tolist() for one in self._planned)
            CALLS.append({"pages": len(ckv), "width": len(self._kv_indices_buf)})
            for b in range(len(starts) - 1):
                slots = self._kv_indices_buf[bounds[b] : bounds[b + 1]].long()
                rows = torch.cat([ckv[slots, 0], kpe[slots, 0]], -1)
                mine = slice(starts[b], starts[b + 1])
                out[mine] = attend(torch.cat([q_nope[mine], q_pe[mine]], -1), rows, self._causal)[0]
        return out


def merge(one, one_lse, other, other_lse):
    """merge_state_v2: two parts of one softmax."""
    with unnoted():
        both = torch.stack([one_lse, other_lse])
        weight = both.softmax(0)[..., None].to(one.dtype)
        return one * weight[0] + other * weight[1], both.logsumexp(0)


def module_of(name: str) -> Any:
    """A backend's module, in which a server's settings and both libraries are what this file says."""
    module = importlib.import_module(f"sglang.srt.layers.attention.{name}")
    arguments = Bag(kv_cache_dtype="fp8_e4m3", disaggregation_mode="null", disable_chunked_prefix_cache=True,
                    enable_deterministic_inference=False, flashinfer_mla_disable_ragged=False,
                    speculative_num_draft_tokens=DRAFTS)  # fmt: skip
    parallel = Bag(dcp_enabled=False, enable_prefill_cp=False, attn_dp_enabled=False, **WIDTHS)
    execution = Bag(deterministic=Bag(enable_deterministic_inference=False), kernel=Bag(), dllm=Bag())
    told = {
        "get_parallel": parallel, "get_spec": Bag(speculative_num_draft_tokens=DRAFTS), "get_exec": execution,
        "get_model": Bag(is_embedding=False), "get_schedule": Bag(disable_chunked_prefix_cache=True, page_size=1),
        "get_memory": Bag(), "get_disagg": Bag(disaggregation_mode="null"), "get_platform": Bag(is_sm100=False),
        "get_global_server_args": arguments, "get_server_args": arguments, "get_attention_tp_size": 1,
        "get_attention_dp_size": 1, "is_dp_attention_enabled": False, "get_device_capability": (9, 0),
        "is_sm100_supported": False, "dcp_enabled": False, "is_dcp_enabled": False, "cuda_graph_fully_disabled": False,
        "get_attention_dcp_world_size": 1, "get_dcp_world_size": 1, "is_cp_active": False,
    }  # fmt: skip
    for name_, value in told.items():
        if hasattr(module, name_):
            setattr(module, name_, lambda *args, value=value, **kwargs: value)
    given = {"get_buffer": lambda name, make: torch.empty(1), "get_cuda_graph_max_batch_size": lambda count: count,
             "BatchMLAPagedAttentionWrapper": FlashInfer, "merge_state_v2": merge,
             "BatchPrefillWithRaggedKVCacheWrapper": lambda *args, **kwargs: Bag()}  # fmt: skip
    for name_ in vars(module).keys() & {n for n in vars(module) if n.startswith("flash_attn_with_kvcache")}:
        setattr(module, name_, fa3)
    for name_, value in given.items():
        setattr(module, name_, value)
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").startswith("sglang.srt") and "get_parallel" in vars(other):
            other.get_parallel = lambda: parallel
    return module


class World:
    """A pool, requests and a backend that was built by its own constructor."""

    def __init__(self, which: str, page: int, cache: torch.dtype, dtype: torch.dtype, topk: int = 1) -> None:
        from sglang.srt.configs.model_config import AttentionArch
        from sglang.srt.layers.radix_attention import AttentionType

        rng = torch.Generator().manual_seed(page)
        self.page, self.dtype, self.rng = page, dtype, rng
        pool = importlib.import_module("sglang.srt.mem_cache.memory_pool").MLATokenToKVPool
        self.pool = pool(
            size=SIZE, page_size=PAGE, dtype=cache, kv_lora_rank=512, qk_rope_head_dim=64, layer_num=1, device="cpu",
            enable_memory_saver=False,
        )  # fmt: skip
        self.pool.set_mla_kv_buffer = self.store
        self.bytes.copy_(torch.randn(SIZE + PAGE, 1, 576, generator=rng).to(cache).view(torch.uint8))
        pages = (torch.randperm(SIZE // page, generator=rng) + PAGE // page) * page
        some = torch.arange(3 * CONTEXT // page + 3).remainder(len(pages))
        slots = (pages[some][:, None] + torch.arange(page)).view(-1)
        self.table = torch.zeros(8, CONTEXT, dtype=torch.int32)
        for at, row in enumerate(ROWS):
            first = at * (len(slots) // 3 // page) * page
            self.table[row] = slots[first : first + CONTEXT]
        module = module_of("flashattention_backend" if which == "fa3" else "flashinfer_mla_backend")
        self.owner = module.FlashAttentionBackend if which == "fa3" else module.FlashInferMLAAttnBackend
        config = SimpleNamespace(
            is_encoder_decoder=False, context_len=CONTEXT, attention_arch=AttentionArch.MLA, head_dim=576,
            num_attention_heads=HEADS, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
            scaling=SCALE, is_local_attention_model=False, hf_text_config=Bag(num_attention_heads=HEADS),
            hf_config=Bag(num_attention_heads=HEADS, architectures=["DeepseekV3ForCausalLM"]),
            get_num_kv_heads=lambda ranks: 1, is_hybrid_swa=False,
        )  # fmt: skip
        requests = SimpleNamespace(req_to_token=self.table, size=8, device="cpu")
        arguments = Bag(kv_cache_dtype="fp8_e4m3", enable_deterministic_inference=False,
                        speculative_num_draft_tokens=DRAFTS, disaggregation_mode="null", dp_size=1,
                        disable_chunked_prefix_cache=True)  # fmt: skip
        self.translator = sglang_trial.translator(
            sglang_trial.Batch(torch.tensor(LENS), torch.tensor(ROWS), self.table, LENS), page
        )
        runner = Bag(
            ps=Bag(**WIDTHS), **WIDTHS, model_config=config,
            device="cpu", req_to_token_pool=requests, token_to_kv_pool=self.pool, kv_cache_dtype=cache,
            kv_cache_dtype_str="fp8_e4m3", page_size=page, is_hybrid=False, is_draft_worker=False, dtype=dtype,
            server_args=arguments, kv_index_translator=self.translator, is_hybrid_swa=False, use_mla_backend=True,
            prefill_aware_swa=False, max_running_requests=8, spec_algorithm=Bag(),
        )  # fmt: skip
        self.backend = self.owner(runner)
        self.backend.topk, self.backend.speculative_num_draft_tokens = topk, DRAFTS
        self.layer = Bag(
            layer_id=0, tp_q_head_num=HEADS, tp_k_head_num=1, tp_v_head_num=1, head_dim=576, v_head_dim=512,
            scaling=SCALE, logit_cap=0.0, is_cross_attention=False, attn_type=AttentionType.DECODER,
        )  # fmt: skip

    def store(self, layer: Any, loc: Any, k: torch.Tensor, k_rope: torch.Tensor) -> None:
        """As the pool's own method does, by a kernel that asks for process groups in some releases."""
        with unnoted():
            rows = torch.cat([k.view(-1, 1, 512), k_rope.reshape(-1, 1, 64)], -1).to(self.pool.dtype)
            self.bytes[getattr(loc, "loc", loc)] = rows.view(torch.uint8)

    @property
    def bytes(self) -> torch.Tensor:
        return self.pool.get_key_buffer(0).view(torch.uint8)

    def batch(self, mode: str, lens: tuple[int, ...], new: tuple[int, ...], ends: tuple[int, ...], spec: Any) -> Any:
        """``lens`` as the scheduler says them; ``new`` tokens of each request up to ``ends`` are stored."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        rows = torch.tensor(ROWS[: len(lens)])
        seq = torch.tensor(lens)
        loc = torch.cat([self.table[r, e - n : e] for r, e, n in zip(ROWS, ends, new, strict=False)]).long()
        prefix = [length - count for length, count in zip(lens, new, strict=True)]
        reads = {"req_pool_indices": rows, "seq_lens": seq, "seq_lens_cpu": seq.clone()}
        plan = getattr(self.translator, "plan", None)
        return sglang_trial.ForwardBatch(**vars(Bag(
            forward_mode=getattr(ForwardMode, mode), batch_size=len(lens), seq_lens_sum=sum(lens), out_cache_loc=loc,
            extend_prefix_lens=torch.tensor(prefix), extend_prefix_lens_cpu=prefix, spec_info=spec, encoder_lens=None,
            extend_seq_lens=torch.tensor(new), extend_seq_lens_cpu=list(new), positions=torch.zeros(sum(new)),
            req_to_token_pool=SimpleNamespace(req_to_token=self.table), attn_attend_prefix_cache=None,
            attn_cp_metadata=None, attn_dcp_metadata=None, encoder_out_cache_loc=None, mha_return_lse=False,
            extend_num_tokens=sum(new), out_cache_loc_is_physical=True, mha_one_shot=False, dcp_kv_mask=None,
            kv_loc_plan=plan(**reads, write_virtual=None) if plan is not None else None,
            **({"token_to_kv_pool": self.pool} if HAS_POOL else {}), **reads,
        )))  # fmt: skip

    def run(self, batch: Any, host: bool, save: bool = True) -> dict[str, Any]:
        """One layer of a step, by the release's own method or by what stands there now."""
        tokens = len(batch.out_cache_loc)
        rng = torch.Generator().manual_seed(1)

        def some(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=rng).to(self.dtype)

        q, rope = some(HEADS, tokens, 512).transpose(0, 1), some(tokens, HEADS, 192)[..., 128:]
        k, k_rope = some(tokens, 1, 512), some(tokens, 1, 64)
        method = vars(self.owner)["forward_extend"]
        method = getattr(method, "__wrapped__", method) if host else method
        before, noted = self.bytes.clone(), Noted()
        CALLS.clear()
        with noted, torch.no_grad():
            out = method.__get__(self.backend)(q, k, k, self.layer, batch, save, q_rope=rope, k_rope=k_rope)
        stored = self.bytes.clone()
        self.bytes.copy_(before)
        written = [int((~one.isnan()).all(-1).sum()) for one in noted.workspaces]
        rows = [len(one) for one in noted.workspaces]
        told = {"largest": noted.largest, "written": written, "rows": rows, "calls": list(CALLS)}
        return {"out": out, "stored": stored, "told": told}

    def compare(self, name: str, batch: Any) -> None:
        """A step that has been planned: both ways."""
        host = self.run(batch, host=True)
        status = report()
        served, declined = status["served"], status["declined"]
        ours = self.run(batch, host=False)
        status = report()
        TOLD["steps"][name] = {
            "served": status["served"] - served,
            "declined": [why for why, count in status["declined"].items() if count != declined.get(why, 0)],
            "equal": torch.equal(host["out"], ours["out"]) and bool(host["out"].isfinite().all()),
            "same pool": torch.equal(host["stored"], ours["stored"]),
            "host": host["told"],
            "ours": ours["told"],
        }

    def eager(self, name: str, batch: Any) -> None:
        self.backend.init_forward_metadata(batch)
        self.compare(name, batch)

    def replayed(self, name: str, captured: Any, batch: Any) -> None:
        """Metadata captured for one batch and replayed for another, into the tensors that the capture had."""
        backend = self.backend
        backend.init_cuda_graph_state(4, 4 * DRAFTS)
        if hasattr(backend, "init_forward_metadata_out_graph"):
            backend.init_forward_metadata_out_graph(captured, in_capture=True)
            metadata = backend.forward_metadata
            backend.init_forward_metadata_out_graph(batch, in_capture=False)
            in_graph = getattr(backend, "init_forward_metadata_in_graph", None)
            if in_graph is not None:
                in_graph(batch)  # what the graph itself does, where it does
        else:
            tokens = len(captured.out_cache_loc)
            backend.init_forward_metadata_capture_cuda_graph(
                captured.batch_size, tokens, captured.req_pool_indices, captured.seq_lens, None,
                captured.forward_mode, captured.spec_info,
            )  # fmt: skip
            metadata = backend.forward_metadata
            more = {"out_cache_loc": batch.out_cache_loc}
            replay = backend.init_forward_metadata_replay_cuda_graph
            known = inspect.signature(replay).parameters
            replay(
                batch.batch_size, batch.req_pool_indices, batch.seq_lens, batch.seq_lens_sum, None, batch.forward_mode,
                batch.spec_info, batch.seq_lens_cpu, **{n: v for n, v in more.items() if n in known},
            )  # fmt: skip
        backend.forward_metadata = metadata  # which the captured kernels read
        gpu.capturing = lambda: True
        try:
            self.compare(name, batch)
        finally:
            gpu.capturing = CAPTURING


CAPTURING = gpu.capturing
TOLD: dict[str, Any] = {"release": RELEASE, "steps": {}}


def report() -> dict[str, Any]:
    return next(row for row in mla_patch.report()["features"] if row["name"] == "kv_cast")


def verify_input(lens: tuple[int, ...] = LENS, tree: bool = False) -> Any:
    """EagleVerifyInput of a chain of drafts; with ``tree`` each draft token sees itself and the first one."""
    for home in ("eagle_info", "eagle_utils"):
        try:
            module = importlib.import_module(f"sglang.srt.speculative.{home}")
        except ModuleNotFoundError:
            continue
        if hasattr(module, "EagleVerifyInput"):
            break
    spec = object.__new__(module.EagleVerifyInput)
    mask = torch.eye(DRAFTS, dtype=torch.bool) if tree else torch.ones(DRAFTS, DRAFTS, dtype=torch.bool).tril()
    mask[:, 0] = True
    masks = [torch.cat([torch.ones(DRAFTS, length, dtype=torch.bool), mask], 1).view(-1) for length in lens]
    vars(spec).update(draft_token_num=DRAFTS, custom_mask=torch.cat(masks),
                      ragged_verify_layout=None, positions=torch.zeros(3 * DRAFTS), topk=2 if tree else 1)  # fmt: skip
    if not hasattr(type(spec), "spec_input_type"):
        vars(spec)["spec_input_type"] = Bag(name="EAGLE_VERIFY")
    return spec


def ends(lens: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length + DRAFTS for length in lens)


def drive(which: str, page: int, cache: torch.dtype, dtype: torch.dtype) -> World:
    name, four = f"{which} page {page}", (DRAFTS,) * 3
    world = World(which, page, cache, dtype)
    world.eager(f"{name} prompt", world.batch("EXTEND", LENS, (3, 2, 1), LENS, None))
    world.eager(f"{name} verify", world.batch("TARGET_VERIFY", LENS, four, ends(LENS), verify_input()))
    captured = world.batch("TARGET_VERIFY", (1, 1, 1), four, ends((1, 1, 1)), verify_input((1, 1, 1)))
    again = world.batch("TARGET_VERIFY", (130, 1, 66), four, ends((130, 1, 66)), verify_input((130, 1, 66)))
    world.replayed(f"{name} replayed verify", captured, again)
    if which == "fa3":
        modes = sys.modules["sglang.srt.model_executor.forward_batch_info"].ForwardMode
        draft = "DRAFT_EXTEND" if hasattr(modes, "DRAFT_EXTEND") else "DRAFT_EXTEND_V2"
        world.eager(f"{name} draft extend", world.batch(draft, LENS, (2, 2, 2), LENS, Bag()))
    if page == 1:
        declined(name, world)
    return world


def one_request(world: World, name: str) -> None:
    """A graph of one request, whose table names less than the pool has: its pages are packed."""
    captured = world.batch("TARGET_VERIFY", (1,), (DRAFTS,), (1 + DRAFTS,), verify_input((1,)))
    again = world.batch("TARGET_VERIFY", (130,), (DRAFTS,), (134,), verify_input((130,)))
    world.replayed(name, captured, again)


def tree(world: World, name: str) -> None:
    """topk 2: the prefix by one table, the drafts that a token descends from by another."""
    world.backend.topk = 2
    batch = world.batch("TARGET_VERIFY", LENS, (DRAFTS,) * 3, ends(LENS), verify_input(LENS, tree=True))
    batch.spec_algorithm = Bag(is_uno=lambda: False)
    world.eager(name, batch)
    world.backend.topk = 1


def declined(name: str, world: World) -> None:
    """Calls of which the host's own method makes what it always does."""

    def batch() -> Any:
        return world.batch("EXTEND", LENS, (3, 2, 1), LENS, None)

    prompt = batch()
    prompt.attn_cp_metadata = Bag()
    world.eager(f"{name} declined parallel", prompt)
    many = batch()
    world.backend.init_forward_metadata(many)
    many.seq_lens_sum = SIZE + PAGE + 1
    world.compare(f"{name} declined many", many)
    world.layer.sliding_window_size = 127
    world.eager(f"{name} declined window", batch())
    world.layer.sliding_window_size = None


def main() -> None:
    global HAS_POOL
    torch.set_num_threads(1)
    sglang_trial.prepare()
    cuda_on_cpu.install()
    torch.cuda.get_device_properties = lambda device=None: Bag(multi_processor_count=132)
    _autostart.run()
    try:
        importlib.import_module("sglang.srt.layers.quantization")  # of some releases, before what needs it
    except Exception:
        pass
    try:
        attention = importlib.import_module("sglang.srt.layers.dp_attention")
        for name in ("get_attention_tp_size", "get_attention_cp_size", "get_attention_dp_size"):
            if hasattr(attention, name):
                setattr(attention, name, lambda: 1)
    except ImportError:
        pass
    if importlib.util.find_spec("sglang.srt.runtime_context") is not None:
        real = importlib.import_module("sglang.srt.runtime_context").get_parallel()
        known = {name: value for name, value in {**WIDTHS, "dcp_enabled": False}.items() if hasattr(type(real), name)}
        real.override(**known).__enter__()  # for as long as this process lasts
    fields = importlib.import_module("sglang.srt.model_executor.forward_batch_info").ForwardBatch.__annotations__
    HAS_POOL = "token_to_kv_pool" in fields
    kernel = kv_cast._cast_kernel

    class Unnoted:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                with unnoted():
                    kernel[grid](*args, **kwargs)

            return launch

    kv_cast._cast_kernel = Unnoted()
    # the interpreter's time goes with the number of programs
    kv_cast.cast_config = lambda: {"ROWS": 64, "PROGRAMS": 4, "MIN_PROGRAMS": 2, "num_warps": 4}
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    slots = drive("fa3", 1, e4m3, torch.float16)
    drive("fa3", 16, e5m2, torch.bfloat16)
    tokens = drive("flashinfer", 1, e4m3, torch.float16)
    one_request(slots, "fa3 page 1 one request")
    tree(slots, "fa3 page 1 tree")  # over larger pages the host reads outside the pool
    TOLD["state"] = report()
    own = World("fa3", 1, torch.float16, torch.float16)
    own.eager("fa3 page 1 declined 16 bits", own.batch("EXTEND", LENS, (3, 2, 1), LENS, None))
    mla_patch.restore("kv_cast")
    before, TOLD["restored"] = report()["served"], []
    for world in (slots, tokens):
        batch = world.batch("EXTEND", LENS, (3, 2, 1), LENS, None)
        world.backend.init_forward_metadata(batch)
        TOLD["restored"].append(world.run(batch, host=False)["told"]["largest"])
    TOLD["served after restore"] = report()["served"] - before
    OUT.write_text(json.dumps(TOLD))


if __name__ == "__main__":
    main()
