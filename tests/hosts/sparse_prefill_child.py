"""One SGLang release's sparse prefill of DeepSeek V4 and V3.2, in a process of its own, on a made-up model.

    python sparse_prefill_child.py RELEASE OUT.json      with the release on PYTHONPATH, and any flags of ours

    --device cuda    on this machine's GPU, without TRITON_INTERPRET; with a flash_mla on PYTHONPATH
    --heads 20       of a rank; on a GPU 64 unless said, else 3

Requests go through the release's own DeepseekV4AttnBackend in three chunks, some without new tokens, with layers of all
three kinds over fp8 pages that hold the whole prompts already. What the release calls as FlashMLA's sparse prefill is
the package's own on a GPU, for the heads that it takes; for others, and on a CPU, ours stands in for it. On a GPU the
first chunk has more queries than FlashMLA can make a schedule for.
"""

import argparse
import functools
import importlib
import inspect
import json
import os
import re
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.pop(0)  # this folder: a host must not find our modules by their plain names

import torch
from torch.nn import functional

import mla_patch
from mla_patch import _autostart
from mla_patch.compat import generations
from mla_patch.compat.sglang import v4_chunk
from mla_patch.compat.sglang.flash_mla import before_v41
from mla_patch.compat.triton import interpreted
from mla_patch.drive import sglang as sglang_trial
from mla_patch.drive.sglang import Batch
from mla_patch.hooks.sglang.edits import v4_policy
from mla_patch.kernels.cache import dequantize
from mla_patch.kernels.cache.layouts import V4, V32, new_pages
from mla_patch.kernels.cache.quantize import quantize
from mla_patch.kernels.sparse import mla_sparse_prefill, mla_sparse_prefill_ref
from mla_patch.patcher import is_ours


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("release")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--heads", type=int)
    given = parser.parse_args()
    if given.device == "cuda" and (interpreted() or not torch.cuda.is_available()):
        parser.error(f"--device cuda: {'TRITON_INTERPRET is set' if interpreted() else 'torch sees no GPU'}")
    return given


GIVEN = options()
DEVICE = torch.device(GIVEN.device)
ON_GPU = DEVICE.type == "cuda"
HEADS = GIVEN.heads or (64 if ON_GPU else 3)
FLASH_MLA = ON_GPU and HEADS in (64, 128)  # it attends
PAGE, WINDOW, SWA_PAGE, TOPK, SCALE = 256, 128, 128, 512, 0.06
if ON_GPU:
    LENS = (14000, 3000, 700)
    CHUNKS = [
        ((12400, 1500, 300), (12000, 100, 300)),
        ((14000, 1500, 600), (1600, 0, 300)),
        ((14000, 3000, 600), (0, 1500, 0)),
    ]
    AGAIN = ((12500, 1400, 400), (12000, 100, 300))
else:
    LENS = (263, 40, 9)
    CHUNKS = [((260, 38, 5), (2, 1, 3)), ((263, 38, 7), (3, 0, 2)), ((263, 40, 7), (0, 2, 0))]
    AGAIN = ((262, 40, 8), (2, 1, 3))  # other prompts in the shapes of the first chunk
FEW = (5, 0, 3)  # queries behind LENS
BLOCK = 256  # queries whose keys are gathered at once
LAYERS = (4, 0, 128, 4)  # ratios
OWN_WORKSPACES = {
    "sparse_prefill_workspace": "SparsePrefillWorkspace",
    "sparse_prefill_kv_buffer": "SparsePrefillKVBuffer",
}


def pool_bytes(slots: int, page: int, rng: torch.Generator) -> torch.Tensor:
    pages = -(-slots // page)
    cache = torch.zeros(pages, V4.page_bytes(page), dtype=torch.uint8, device=DEVICE)
    tokens = cache[:, : page * 576].view(pages, page, 576)
    values = torch.randn(pages, page, 448, generator=rng, device=DEVICE) * 64
    tokens[:, :, :448] = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    tokens[:, :, 448:] = torch.randn(pages, page, 64, generator=rng, device=DEVICE).bfloat16().view(torch.uint8)
    scales = torch.randint(120, 123, (pages, page * 8), generator=rng, device=DEVICE)
    cache[:, page * 576 : page * 584] = scales.to(torch.uint8)
    return cache


def read_back(cache: torch.Tensor, slots: torch.Tensor, page: int) -> torch.Tensor:
    """The definition, in float64; a bfloat16 holds each of its values."""
    used = cache[:, : page * V4.bytes].view(len(cache), page, 1, V4.bytes)
    return dequantize.dequantize_ref(used, slots)


def ints(values: Any) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


class Step(sglang_trial.PrefillMetadata, sglang_trial.ForwardBatch):
    """What a scheduler hands the backend; what is not given is None."""


class Anything:
    """Stands in for the host's helpers that plan for other kernels: whatever is called gives None."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class Trial:
    """The release's backend, its pool and what the model gives it."""

    def __init__(self, release: str) -> None:
        self.without_indexer = release != "0.5.12"
        self.shell = release in ("0.5.21", "0.5.23")  # whose metadata is made in more steps
        rng = self.rng = torch.Generator(DEVICE).manual_seed(1)
        random = {"generator": rng, "device": DEVICE}
        self.module = importlib.import_module("sglang.srt.layers.attention.deepseek_v4_backend")
        pools = importlib.import_module("sglang.srt.mem_cache.deepseek_v4_memory_pool")
        blocks = -(-max(LENS) // PAGE) + 1
        self.pages = torch.randperm(len(LENS) * blocks, **random).view(len(LENS), blocks)
        table = (self.pages[:, :, None] * PAGE + torch.arange(PAGE, device=DEVICE)).view(len(LENS), -1).int()
        slots = table.numel()
        self.swa = [pool_bytes(slots, SWA_PAGE, rng) for _ in LAYERS]
        self.compressed = [pool_bytes(slots // one, PAGE // one, rng) if one else None for one in LAYERS]
        last = torch.zeros(PAGE + 1, dtype=torch.int64, device=DEVICE)
        last[-1] = -1
        self.to_swa = torch.cat([torch.randperm(slots, **random), last])
        trial = self

        class Pool(pools.DeepSeekV4TokenToKVPool):
            request_window = None

            def get_swa_key_buffer_radix(self, layer_id: int) -> torch.Tensor:
                return trial.swa[layer_id]

            def get_extra_key_buffer(self, layer_id: int) -> Any:
                return trial.compressed[layer_id]

            def get_extra_key_page_size(self, layer_id: int) -> int:
                return PAGE // LAYERS[layer_id]

            def get_swa_key_page_size(self) -> int:
                return SWA_PAGE

            def get_swa_key_bytes_per_token(self) -> int:
                return 584

            def get_extra_key_bytes_per_token(self, layer_id: int) -> int:
                return 584

            def get_swa_key_layout(self) -> str:
                return "v4"

            def get_extra_key_layout(self, layer_id: int) -> str:
                return "v4"

        pool = self.pool = object.__new__(Pool)
        small = SimpleNamespace(kv_cache_total_dim=584, page_size=SWA_PAGE)
        sizes = re.findall(r"self\.(swa_\w+_size) = swa_page_size", inspect.getsource(pools.DeepSeekV4TokenToKVPool))
        vars(pool).update(
            dict.fromkeys(sizes, SWA_PAGE), page_size=PAGE, swa_kv_pool=small, full_to_swa_index_mapping=self.to_swa
        )
        self.batch = Batch(ints(LENS), ints(range(len(LENS))), table, LENS)
        self.backend = self.new_backend()
        self.q = [[torch.randn(n, HEADS, 512, **random).bfloat16() for n in LENS] for _ in LAYERS]
        self.sink = torch.randn(HEADS, **random)

    def new_backend(self) -> Any:
        owner, device = self.module.DeepseekV4AttnBackend, self.batch.device
        known = {
            "page_size": PAGE, "swa_page_size": SWA_PAGE, "softmax_scale": SCALE, "head_dim_v": 512, "c4_topk": TOPK,
            "index_topk": TOPK,
            "token_to_kv_pool": self.pool, "mtp_enabled": False, "hisparse_coordinator": None, "topk": 0,
            "cuda_int32_kwargs": {"device": device, "dtype": torch.int32}, "forward_metadata": None,
            "MAX_SEQ_LEN_FOR_CAPTURE": self.batch.table.shape[1], "speculative_num_steps": 0,
            "present_ratios": (0, 4, 128), "low_ratios": (), "has_c4": True, "has_c128": True,
            "online_c128_mtp": Anything(), "req_to_token_pool": SimpleNamespace(req_to_token=self.batch.table),
        }  # fmt: skip
        for name, kind in OWN_WORKSPACES.items():
            if hasattr(self.module, kind):
                known[name] = getattr(self.module, kind)(device)
        return sglang_trial.bare_backend(owner, self.batch, **known)

    def forward_batch(self, seq: tuple[int, ...], ext: tuple[int, ...]) -> Any:
        modes = importlib.import_module("sglang.srt.model_executor.forward_batch_info").ForwardMode
        slots = [row[s - e : s] for row, s, e in zip(self.batch.table, seq, ext, strict=True)]
        return Step(
            forward_mode=modes.EXTEND, actual_forward_mode=modes.EXTEND, capture_forward_mode=modes.EXTEND,
            seq_lens=ints(seq), seq_lens_cpu=torch.tensor(seq), batch_size=len(seq),
            extend_seq_lens=ints(ext).int(), extend_seq_lens_cpu=list(ext), extend_start_loc=None, spec_info=None,
            req_pool_indices=ints(range(len(seq))), out_cache_loc=torch.cat(slots), token_to_kv_pool=self.pool,
            req_to_token_pool=SimpleNamespace(req_to_token=self.batch.table), hisparse_coordinator=None,
        )  # fmt: skip

    def rows(self, per_request: list[torch.Tensor], seq: tuple[int, ...], ext: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([x[s - e : s] for x, s, e in zip(per_request, seq, ext, strict=True)])

    def metadata(self, seq: tuple[int, ...], ext: tuple[int, ...]) -> Any:
        """The step's metadata, by the release's own init_forward_metadata, and its forward batch."""
        batch = self.forward_batch(seq, ext)
        with ExitStack() as stack:
            # the compressor's plan and FlashMLA's schedule are CUDA's
            for name in ("create_paged_compressor_data", "_create_flashmla_metadata"):
                stack.enter_context(mock.patch.object(self.module, name, lambda *args, **kwargs: None))
            if self.without_indexer:
                planned = mock.patch.object(type(self.backend), "init_forward_metadata_indexer", Anything().plan)
                stack.enter_context(planned)
            if self.shell:
                self.backend.forward_metadata = self.backend._build_forward_metadata(batch)
            else:
                self.backend.init_forward_metadata(batch)
        return batch

    @functools.cache  # noqa: B019, one trial in a process
    def chosen(self, layer: int, request: int) -> torch.Tensor:
        """Compressed tokens that each token's query attends to, -1 for none; of ratio 4 some, in any order."""
        length, ratio = LENS[request], LAYERS[layer]
        if not ratio:
            return torch.empty(length, 0, dtype=torch.int64, device=DEVICE)
        known = torch.arange(1, length + 1, device=DEVICE)[:, None] // ratio
        token = torch.arange(length // ratio, device=DEVICE)[None]
        if ratio != 4:
            return torch.where(token < known, token, -1)
        order = torch.rand(length, token.numel(), generator=self.rng, device=DEVICE).masked_fill_(token >= known, 2)
        picked = order.argsort(1)[:, :TOPK]
        return torch.where((picked < known) & (picked % 5 > 0), picked, -1)

    def positions(self, layer: int, seq: tuple[int, ...], ext: tuple[int, ...], width: int) -> torch.Tensor:
        chosen = [self.chosen(layer, r) for r in range(len(seq))]
        chosen = [functional.pad(one, (0, width - one.shape[1]), value=-1) for one in chosen]
        return self.rows(chosen, seq, ext).int()

    @functools.cache  # noqa: B019, one trial in a process
    def keys(self, layer: int, request: int) -> torch.Tensor:
        """A prompt's keys, then its compressed ones."""
        slots = self.to_swa[self.batch.table[request, : LENS[request]].long()]
        keys = [read_back(self.swa[layer], slots, SWA_PAGE)]
        if LAYERS[layer]:
            size = PAGE // LAYERS[layer]
            token = torch.arange(LENS[request] // LAYERS[layer], device=DEVICE)
            keys.append(
                read_back(self.compressed[layer], self.pages[request][token // size] * size + token % size, size)
            )
        return torch.cat(keys)

    def expected(self, layer: int, seq: tuple[int, ...], ext: tuple[int, ...]) -> torch.Tensor:
        """The definition over the whole prompt, in float64: each query with keys of its own."""
        out = []
        for r, (s, e) in enumerate(zip(seq, ext, strict=True)):
            for at in torch.arange(s - e, s, device=DEVICE).split(BLOCK) if e else ():
                window = (at[:, None] - torch.arange(WINDOW, device=DEVICE)).clamp(min=-1)
                more = self.chosen(layer, r)[at]
                ids = torch.cat([window, torch.where(more >= 0, more + LENS[r], -1)], 1)
                keys = self.keys(layer, r)[ids]  # -1 is the last; what it gives has no weight
                scores = self.q[layer][r][at].double() @ keys.mT * SCALE
                scores.masked_fill_((ids < 0)[:, None], -torch.inf)
                sink = self.sink.double()[None, :, None].expand(len(at), -1, 1)
                out.append(torch.cat([scores, sink], 2).softmax(2)[..., :-1] @ keys)
        return torch.cat(out)

    def layer(self, number: int, batch: Any, seq: tuple[int, ...], ext: tuple[int, ...], **more: Any) -> torch.Tensor:
        """One layer of a step, through the release's forward."""
        q = self.rows(self.q[number], seq, ext)
        k = torch.zeros(len(q), 512, device=DEVICE)
        layer = SimpleNamespace(layer_id=number, v_head_dim=512)
        given = {"save_kv_cache": False, "attn_sink": self.sink} | more
        return self.backend.forward(q, k, k, layer, batch, compress_ratio=LAYERS[number], **given)


def feature(name: str = "sparse_prefill") -> dict[str, Any]:
    return next(row for row in mla_patch.report()["features"] if row["name"] == name)


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want).norm() / want.norm())


def provide(release: str) -> list[int]:
    """FlashMLA's sparse prefill, where the release's backends look for it; the heads of each call."""
    calls: list[int] = []
    serves: Any = mla_sparse_prefill
    homes = ["sglang.kernels.ops.attention.flash_mla_interface" if release == "0.5.23" else "sgl_kernel.flash_mla"]
    if FLASH_MLA:
        serves = before_v41(importlib.import_module("flash_mla").flash_mla_sparse_fwd)
        homes.append("flash_mla")  # which V4 of 0.5.12 attends with
        # ours asks the operator behind sgl_kernel's wrapper how much it takes
        library = torch.library.Library("sgl_kernel", "FRAGMENT")
        library.define(OPERATOR)
        LIBRARIES.append(library)

    def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None, **more):  # type: ignore
        calls.append(q.shape[1])
        return serves(q, kv, indices, sm_scale, d_v, attn_sink, topk_length)

    for name in homes:
        importlib.import_module(name).flash_mla_sparse_fwd = flash_mla_sparse_fwd
    return calls


OPERATOR = "sparse_prefill_fwd(Tensor q, Tensor kv, Tensor i, float s, int d_v, Tensor? sink, Tensor? n) -> Tensor[]"
LIBRARIES: list[Any] = []  # what is declared lasts as long as they


def run(trial: Trial, chunks: Any) -> list[dict[str, Any]]:
    """Chunks through the release's backend: who served each, and how far it is from the definition."""
    rows = []
    for seq, ext in chunks:
        batch = trial.metadata(seq, ext)
        layers = range(len(LAYERS) - bool(rows))
        rows.append(counted(lambda: [one(trial, number, batch, seq, ext) for number in layers]))  # noqa: B023
    return rows


def one(trial: Trial, number: int, batch: Any, seq: tuple[int, ...], ext: tuple[int, ...]) -> float:
    """A layer's error, after its indexer has chosen."""
    raw = getattr(trial.backend.forward_metadata.core_attn_metadata, "c4_sparse_raw_indices", None)
    if LAYERS[number] == 4 and raw is not None:
        raw.copy_(trial.positions(number, seq, ext, raw.shape[1]))
    return error(trial.layer(number, batch, seq, ext), trial.expected(number, seq, ext))


def counted(call: Any) -> dict[str, Any]:
    """What a call gave, and what was served and declined meanwhile."""
    before, built = feature(), len(BUILT)
    result = call()
    now = feature()
    declined = {k: n - before["declined"].get(k, 0) for k, n in now["declined"].items()}
    return {
        "result": result, "served": now["served"] - before["served"], "built": len(BUILT) - built,
        "declined": {k: n for k, n in declined.items() if n}, "memory": now["memory"],
    }  # fmt: skip


BUILT: list[int] = []


def watch_builds() -> None:
    make = v4_chunk.ChunkView.inputs

    def inputs(view: Any) -> dict[str, Any]:
        BUILT.append(1)
        return make(view)

    v4_chunk.ChunkView.inputs = inputs  # type: ignore[method-assign]


def refilled(trial: Trial, method: str) -> dict[str, Any] | None:
    """Metadata that is filled anew, as a replayed graph's is: the same objects, other prompts."""
    if not hasattr(trial.module.DSV4Metadata, method):
        return None
    (seq, ext), (later, same) = CHUNKS[0], AGAIN
    batch = trial.metadata(seq, ext)
    metadata = trial.backend.forward_metadata
    trial.layer(1, batch, seq, ext)
    now = trial.metadata(later, same)
    getattr(metadata, method)(trial.backend.forward_metadata)
    trial.backend.forward_metadata = metadata
    number = generations.generation_of(batch)
    vars(batch).update(vars(now))
    vars(batch)[generations._MARK] = number
    return counted(lambda: [one(trial, 0, batch, later, same)])


def over_pages(
    trial: Trial, release: str, change: Any = lambda trial: None, chunk: Any = CHUNKS[1], **flags: str
) -> dict[str, Any]:
    """A prompt that the host has to attend to over pages: whether its kernel was called, and who said so."""
    seq, ext = chunk
    calls: list[int] = []

    def flash_mla_with_kvcache(q: torch.Tensor, **given: Any) -> Any:
        calls.append(len(q))
        return torch.zeros(*q.shape[:3], 512, device=q.device), None

    importlib.import_module(PAGED[release == "0.5.12"]).flash_mla_with_kvcache = flash_mla_with_kvcache
    with mock.patch.dict(os.environ, {f"MLA_PATCH_SPARSE_PREFILL_{name}": value for name, value in flags.items()}):
        batch = trial.metadata(seq, ext)
        change(trial)
        row = counted(lambda: float(trial.layer(1, batch, seq, ext).abs().max()))
    return row | {"calls": calls, "queries": sum(ext)}


PAGED = ("sgl_kernel.flash_mla", "flash_mla")


def deterministic() -> Any:
    """The release's batch-invariant operators are on, as far as anybody can ask."""
    operators = importlib.import_module("sglang.srt.batch_invariant_ops.batch_invariant_ops")
    return mock.patch.object(operators, "_batch_invariant_MODE", True)


def other_routes(trial: Trial) -> dict[str, Any]:
    """0.5.19 and 0.5.20: few queries by a route of the release's that ours has nothing to do with; the mode it saw."""
    seq, ext = LENS, FEW
    seen: dict[str, Any] = {}

    def route(name: str) -> Any:
        def taken(q: torch.Tensor, forward_batch: Any, **given: Any) -> torch.Tensor:
            seen[name] = bool(forward_batch.forward_mode.is_extend_without_speculative())
            return torch.zeros(len(q), HEADS, 512, device=DEVICE)

        return taken

    owner = type(trial.backend)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"MLA_PATCH_SPARSE_PREFILL_ROUTE": "auto"}))
        batch = trial.metadata(seq, ext)
        if hasattr(owner, "_forward_prefill_sparse_q8kv8"):
            stack.enter_context(mock.patch.object(trial.backend, "_forward_prefill_sparse_q8kv8", route("q8kv8")))
            with mock.patch.dict(os.environ, {"SGLANG_DSV4_Q8KV8_PREFILL": "1"}):
                trial.layer(1, batch, seq, ext)
        if hasattr(owner, "trtllm_attn"):
            # a method of the subclass for those kernels, which inherits this forward
            method = mock.patch.object(trial.backend, "_forward_trtllm", route("trtllm"), create=True)
            stack.enter_context(method)
            stack.enter_context(mock.patch.object(trial.backend, "trtllm_attn", True))
            trial.layer(1, batch, seq, ext)
    return seen


def every_other(trial: Trial) -> None:
    """Context parallelism: this rank has picked its queries out."""
    core = trial.backend.forward_metadata.core_attn_metadata
    core.seq_lens_casual = core.seq_lens_casual[::2]


def indexer(trial: Trial) -> dict[str, Any]:
    """0.5.12: positions, as the release's own indexer leaves them."""
    seq, ext = CHUNKS[1]
    batch = trial.metadata(seq, ext)
    core, rows = trial.backend.forward_metadata.core_attn_metadata, sum(ext)
    module = importlib.import_module("sglang.srt.layers.attention.dsv4.indexer")
    given = [torch.zeros(*shape, device=DEVICE) for shape in ((rows, 4, 128), (rows, 4, 1), (9, 64 * 132))]
    given[2] = given[2].byte()
    width = max(256, trial.batch.table.shape[1] // 4)
    scores = torch.rand(rows, width, generator=trial.rng, device=DEVICE).argsort(1).float()  # none twice in a row
    with ExitStack() as stack:
        prepared = mock.patch.object(trial.backend, "_forward_prepare_normal", lambda **kwargs: given, create=True)
        stack.enter_context(prepared)
        stack.enter_context(mock.patch.object(module, "fp8_paged_mqa_logits_torch", lambda *args: scores))
        stack.enter_context(mock.patch.object(module, "get_global_indexer_capturer", lambda: None))
        trial.backend.debug_use_external_c4_sparse_indices = False
        trial.backend.forward_c4_indexer(None, None, SimpleNamespace(layer_id=0), batch)
    raw, slots = core.c4_sparse_raw_indices, core.c4_sparse_page_indices
    lens = torch.cat([torch.arange(s - e, s, device=DEVICE) + 1 for s, e in zip(seq, ext, strict=True)])[:, None] // 4
    known = torch.arange(width, device=DEVICE) < lens
    best = scores.masked_fill(~known, -torch.inf).topk(min(TOPK, width)).indices
    want = torch.zeros_like(known).scatter_(1, best, True) & known
    found = torch.zeros(rows, width + 1, dtype=torch.bool, device=DEVICE)
    found.scatter_(1, torch.where(raw >= 0, raw, width).long(), True)
    at = core.page_table.gather(1, raw.clamp(min=0).long() // 64) * 64 + raw.clamp(min=0) % 64
    return {
        "positions": bool(torch.equal(found[:, :-1], want) and torch.equal((raw >= 0).sum(1), want.sum(1))),
        "slots": bool(torch.equal(torch.where(raw >= 0, at, -1), slots)),
        "stored": stored(trial, batch, seq, ext),
    }


def stored(trial: Trial, batch: Any, seq: tuple[int, ...], ext: tuple[int, ...]) -> list[Any]:
    """What the host's store is given, before our attention reads."""
    calls: list[Any] = []
    with mock.patch.object(trial.backend, "store_cache", lambda *args: calls.append(args[0]), create=True):
        trial.layer(1, batch, seq, ext, save_kv_cache=True)
    return calls


def plans() -> list[str]:
    """Who plans the indexer of as many queries as a schedule can hold, and of one more."""
    module = importlib.import_module("sglang.srt.layers.attention.dsv4.metadata")
    seen: list[str] = []
    homes = dict.fromkeys(
        ("sglang.jit_kernel.deepseek_v4", "sglang.jit_kernel.dsv4", "sglang.kernels.ops.attention.dsv4"), "own"
    )
    modules = {}
    for name, whose in {**homes, "deep_gemm": "DeepGEMM's"}.items():
        plan = lambda *args, whose=whose: seen.append(whose) or torch.zeros(1)  # noqa: E731
        modules[name] = SimpleNamespace(
            get_paged_mqa_logits_metadata=plan, get_num_sms=lambda: 1, plan_topk_v2=lambda lens: lens
        )
    flags = {"SGLANG_FP8_PAGED_MQA_LOGITS_TORCH": "0", "SGLANG_OPT_USE_JIT_INDEXER_METADATA": "0"}
    most = v4_chunk.most_queries(DEVICE)
    owner = module.PagedIndexerMetadata
    fixed = {"page_size": 256, "compressed_page_size": 64, "use_topk_v2": False}
    fixed = {name: value for name, value in fixed.items() if name in owner.__annotations__}
    name = "c4_seq_lens" if "c4_seq_lens" in owner.__annotations__ else "compressed_seq_lens"
    with mock.patch.dict(sys.modules, modules), mock.patch.dict(os.environ, flags):
        for count in (most, most + 1):
            lens = torch.ones(count, dtype=torch.int32, device=DEVICE)
            owner(page_table=lens[:, None], **{name: lens}, **fixed)
    return seen


def many_queries(trial: Trial, release: str) -> dict[str, Any]:
    """More queries than a schedule can hold take our route whatever the flags; so does the indexer's plan."""
    seq, ext = CHUNKS[0]
    with ExitStack() as stack:
        if not ON_GPU:  # which would tell
            stack.enter_context(mock.patch.object(v4_chunk, "most_queries", lambda device: 4))
        told: dict[str, Any] = {"plans": plans()}
        if release == "0.5.12":
            stack.enter_context(mock.patch.dict(os.environ, {"MLA_PATCH_SPARSE_PREFILL_ROUTE": "large"}))
            batch = trial.metadata(seq, ext)
            told["many"] = counted(lambda: [one(trial, 0, batch, seq, ext)])
            trial.metadata(CHUNKS[2][0], CHUNKS[2][1])
            told["few"] = vars(trial.backend.forward_metadata)[v4_policy._STEP].value
    return told


def v32(release: str) -> dict[str, Any]:
    """V3.2's attention through the release's own method, with heads that it cannot pad, and its dequantiser."""
    name = "nsa" if release == "0.5.12" else "dsa"
    module = importlib.import_module(f"sglang.srt.layers.attention.{name}_backend")
    owner = getattr(module, {"nsa": "NativeSparseAttnBackend", "dsa": "DeepseekSparseAttnBackend"}[name])
    random: dict[str, Any] = {"generator": torch.Generator(DEVICE).manual_seed(3), "device": DEVICE}
    q, kv = (torch.randn(2, 20, 576, **random) / 4).bfloat16(), torch.randn(90, 1, 576, **random).bfloat16()
    rows = torch.randint(-1, 90, (2, 128), **random).int()
    backend = SimpleNamespace(device_sm_major=9, _sink_pad_cache={})
    out = counted(lambda: owner._forward_flashmla_sparse(backend, q, kv, 512, rows, 0.05))
    with deterministic():
        alone = owner._forward_flashmla_sparse(backend, q[:1], kv, 512, rows[:1], 0.05)
        differs = int((alone != owner._forward_flashmla_sparse(backend, q, kv, 512, rows, 0.05)[:1]).sum())
    want = mla_sparse_prefill_ref(q, kv, rows[:, None], 0.05)[0]
    cache = new_pages(V32, 2, 8, DEVICE)
    quantize(torch.randn(16, 576, **random), cache, ints(range(16)))
    slots = ints([3, 15, 0, 3]).int()
    read = getattr(module, "dequantize_k_cache_paged" + ("_dsa" if release == "0.5.23" else ""))
    rows_ = counted(lambda: read(cache.view(torch.float8_e4m3fn).view(2, 8, 1, 656), slots))
    got = rows_.pop("result")
    exact = torch.equal(got.cpu(), dequantize.dequantize_k_cache_paged_ref(cache.view(-1, 656), slots))
    told = {"error": error(out.pop("result"), want), "heads": out, "exact": exact, "read": rows_}
    return told | {"alone differs": differs}


def served(release: str) -> bool:
    """Whether V4 is ours to serve here, by the flags and the release."""
    return "MLA_PATCH" in os.environ and (release != "0.5.12" or "MLA_PATCH_SPARSE_PREFILL" in os.environ)


def names(module: Any) -> dict[str, bool]:
    """Which of the release's V4 methods are not its own now."""
    owner, metadata = module.DeepseekV4AttnBackend, module.DSV4Metadata
    found = {name: vars(owner)[name] for name in ("forward", "init_forward_metadata", "_forward_prefill_sparse")
             if name in vars(owner)} | {"copy_": vars(metadata)["copy_"]}  # fmt: skip
    return {
        name: is_ours(method) or not method.__code__.co_filename.endswith("deepseek_v4_backend.py")
        for name, method in found.items()
    }


def main(release: str, out: Path) -> None:
    started = time.perf_counter()
    os.environ |= {"SGLANG_FP8_PAGED_MQA_LOGITS_TORCH": "1", "SGLANG_TOPK_TRANSFORM_512_TORCH": "1"}
    os.environ |= {"SGLANG_OPT_USE_TOPK_V2": "0", "SGLANG_OPT_FLASHMLA_SPARSE_PREFILL": "1"}
    _autostart.run()  # as the start-up file does, which looks at MLA_PATCH
    sglang_trial.STUBS |= {"cutlass": {}, "cuda": {}}
    if ON_GPU:  # where the release imports more
        os.environ["SGLANG_IS_FLASHINFER_AVAILABLE"] = "false"
        sglang_trial.STUBS |= {"deep_gemm": {}, "flashinfer": {"__version__": "0.0"}}
    stubbed = sglang_trial.prepare()
    if FLASH_MLA and "flash_mla" in stubbed:
        sys.exit(f"--heads {HEADS}: flash_mla is not there or cannot be imported")
    importlib.import_module("sglang")
    if interpreted():  # whose time goes by programs
        dequantize.dequantize_config = lambda: {"TOKENS": 64, "num_warps": 2}
    where = torch.cuda.get_device_name() if ON_GPU else "cpu"
    seen: dict[str, Any] = {"release": release, "device": where, "heads": HEADS, "flash_mla": FLASH_MLA}
    calls = provide(release)
    trial = Trial(release)
    seen["touched"] = names(trial.module)
    if "MLA_PATCH" in os.environ:
        seen["v32"] = v32(release)
        seen["state"] = {key: feature()[key] for key in ("state", "reason", "targets")}
    if served(release):
        watch_builds()
        os.environ["MLA_PATCH_SPARSE_PREFILL_ROUTE"] = "all"  # these prompts are shorter than those it is meant for
        before = len(calls)  # V3.2's
        seen["chunks"] = run(trial, CHUNKS)
        seen["calls"] = len(calls) - before
        if not trial.shell:
            seen["refilled"] = {name: refilled(trial, name) for name in REFILLS}
            seen["strided"] = over_pages(trial, release, every_other)
            seen["too large"] = over_pages(trial, release, WORKSPACE="0")
            seen["few"] = over_pages(trial, release, chunk=(LENS, FEW), ROUTE="auto")
            with deterministic():
                seen["deterministic"] = over_pages(trial, release)
            seen["other routes"] = other_routes(trial)
            seen["many"] = many_queries(trial, release)
        if release == "0.5.12":
            seen["indexer"] = indexer(trial)
        mla_patch.restore("sparse_prefill")
        seen["restored"] = names(trial.module)
    seen["seconds"] = time.perf_counter() - started
    out.write_text(json.dumps(seen, indent=1))


REFILLS = ("copy_", "refresh_for_breakable_cuda_graph_replay_")


if __name__ == "__main__":
    main(GIVEN.release, GIVEN.out)
    sys.stdout.flush()
    os._exit(0)  # what a release leaves running at exit is not on trial
