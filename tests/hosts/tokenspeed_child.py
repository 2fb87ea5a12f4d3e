"""The tokenspeed backend in one SGLang release, in a process of its own.

    python tests/hosts/tokenspeed_child.py RELEASE OUT.json         with the release on PYTHONPATH

    --provider package    the kernels of the stand-in for tokenspeed_mla, which is for CPUs alone
    --provider example    those of examples/mla_kernels: decode in Triton, prompts in plain torch
    --device cuda         on this machine's GPU, of whatever kind, without TRITON_INTERPRET
    --heads 64            of a rank; 16 unless said

Reads the server's arguments by the release's own parser, builds the release's own backend on a mock runner, and drives
its forward_decode and forward_extend; on a GPU it also captures and replays a decode as a CUDA graph. Writes down what
it saw, prints a line for each step, and ends with 1 where one of them is not as it should be (tokenspeed_runs.faults).
"""

import argparse
import importlib
import json
import logging
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

sys.path.pop(0)  # this folder: a host must not find our modules by their plain names

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INFO = {
    "METADATA": "Metadata-Version: 2.1\nName: mla-kernels\nVersion: 0.1\n",
    "entry_points.txt": "[mla_patch]\nmla_kernels = mla_kernels\n",
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("release")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--provider", choices=["package", "example"], default="package")
    parser.add_argument("--heads", type=int, default=16)
    given = parser.parse_args()
    if given.device == "cuda" and given.provider == "package":
        parser.error("--provider package: the stand-in is for CPUs alone, expected --provider example with cuda")
    return given


def set_up(provider: str) -> None:
    """What a user would have installed and set, before anything of ours is imported."""
    os.environ |= {"MLA_PATCH": "1", "MLA_PATCH_TOKENSPEED": "on"}
    # a checkout will do; the stand-in for the package is looked for even where the example serves
    sys.path += [str(HERE / "standin"), str(ROOT)]
    if provider == "example":
        os.environ |= {"MLA_PATCH_TOKENSPEED_DECODE": "triton", "MLA_PATCH_TOKENSPEED_PREFILL": "torch"}
        folder = tempfile.mkdtemp()
        info = Path(folder, "mla_kernels-0.1.dist-info")
        info.mkdir()
        for file, text in INFO.items():
            (info / file).write_text(text)
        sys.path += [folder, str(ROOT / "examples" / "mla_kernels")]


GIVEN = options()
set_up(GIVEN.provider)

import mla_patch  # noqa: E402
import mla_patch.startup  # noqa: E402

mla_patch.startup.start()

import tokenspeed_mla  # noqa: E402
import torch  # noqa: E402
from packaging.version import Version  # noqa: E402

from mla_patch.compat import gpu  # noqa: E402
from mla_patch.compat.triton import interpreted  # noqa: E402
from mla_patch.compat.types import Gpu  # noqa: E402
from mla_patch.drive import sglang as sglang_trial  # noqa: E402

if GIVEN.device == "cuda" and (interpreted() or not torch.cuda.is_available()):
    sys.exit(f"--device cuda: {'TRITON_INTERPRET is set' if interpreted() else 'torch sees no GPU'}")

E4M3, HEADS, PAGE = torch.float8_e4m3fn, GIVEN.heads, 64
DEVICE = torch.device(GIVEN.device)
LENS = (1, 33, 64, 97, 130)
SCALE = 0.0417


class Said(logging.Handler):
    """What ours said, of any level."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def feature() -> dict:
    return next(row for row in mla_patch.report()["features"] if row["name"] == "tokenspeed")


def failure(call: Any, *args: Any) -> str:
    try:
        call(*args)
    except (ValueError, SystemExit) as problem:
        return str(problem)
    return "none"


def arguments(name: str) -> dict[str, Any]:
    """The release's own command line and its own record of it."""
    owner = importlib.import_module("sglang.srt.server_args").ServerArgs
    parser = argparse.ArgumentParser(exit_on_error=False)
    owner.add_cli_args(parser)
    taking = [
        action.option_strings[0]
        for action in parser._actions
        if action.choices is not None and name in action.choices and "trtllm_mla" in action.choices
    ]
    line = ["--model-path", "dummy", "--attention-backend", name, "--kv-cache-dtype", "fp8_e4m3", "--page-size", "64"]
    parsed = parser.parse_args(line)
    seen: dict[str, Any] = {"options": taking, "parsed": parsed.attention_backend}
    reader = "resolve_once" if hasattr(owner, "resolve_once") else "__post_init__"

    def record(**changes: Any) -> Any:
        given = {"attention_backend": name, "kv_cache_dtype": "fp8_e4m3", "page_size": 64} | changes
        if reader == "resolve_once":
            with mock.patch.object(owner, "__post_init__", lambda self: None):
                return owner(model_path="dummy", **given)
        one = owner.__new__(owner)  # reading it needs the model's files, and a GPU of the right kind
        vars(one).update(given)
        return one

    def read(one: Any) -> Any:
        # the host's own code comes after ours, and has no model to look at
        try:
            getattr(one, reader)()
        except ValueError as problem:
            if any(ours in str(problem) for ours in ("fp8 cache", "page-size", "not both", "compute capability 10.x")):
                raise
        except Exception as problem:
            seen["the host's own"] = f"{type(problem).__name__}: {problem}"[:80]
        return one

    one = read(record())
    seen["backend"], seen["mark"] = one.attention_backend, one._mla_patch_tokenspeed
    if reader == "resolve_once":
        vars(one).pop("_resolution_failed", None)
    again = pickle.loads(pickle.dumps(one))  # as it goes to the schedulers
    seen["mark elsewhere"] = again._mla_patch_tokenspeed
    seen["refused"] = [
        failure(read, record(kv_cache_dtype="auto")),
        failure(read, record(page_size=16)),
        failure(read, record(decode_attention_backend="trtllm_mla")),
    ]
    if GIVEN.provider == "package":
        with mock.patch.object(gpu, "from_nvml", lambda: Gpu("NVIDIA RTX PRO 6000", (12, 0))):
            seen["refused"].append(failure(read, record()))
    seen["not asked"] = hasattr(read(record(attention_backend="trtllm_mla")), "_mla_patch_tokenspeed")
    return seen


def rope(
    q_rope, k_rope, q_nope, k_nope, quantize_dtype, q_rope_out, k_rope_out, q_nope_out, k_nope_out, **rest
) -> None:
    """flashinfer's fused rotation and cast, at position 0, where it is no rotation."""
    for given, out in ((q_rope, q_rope_out), (k_rope, k_rope_out), (q_nope, q_nope_out), (k_nope, k_nope_out)):
        out.copy_(given.to(quantize_dtype))


def _of_flashinfer(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("flashinfer's kernel was called")


def stand_in_flashinfer() -> None:
    """A flashinfer whose attention kernels raise. The release looks for it, and on a CPU would say that it has none."""
    sys.meta_path.insert(0, sglang_trial.StubFinder(["flashinfer"]))
    flashinfer = importlib.import_module("flashinfer")
    for name in ("rope", "decode", "prefill"):
        setattr(flashinfer, name, importlib.import_module(f"flashinfer.{name}"))
    flashinfer.rope.mla_rope_quantize_fp8 = rope
    flashinfer.decode.trtllm_batch_decode_with_kv_cache_mla = _of_flashinfer
    flashinfer.prefill.trtllm_ragged_attention_deepseek = _of_flashinfer
    importlib.import_module("sglang.srt.utils").is_flashinfer_available = lambda: True


def fixup(out: torch.Tensor, lse: torch.Tensor, kv_lens: torch.Tensor, cum_q: torch.Tensor, *rest: Any) -> None:
    """The host's mend of rows without keys, in torch."""
    for b, length in enumerate(kv_lens.tolist()):
        if length == 0:
            out[cum_q[b] : cum_q[b + 1]], lse[cum_q[b] : cum_q[b + 1]] = 0, -torch.inf


class Runner:
    """A model runner as far as the backend's constructor reads it."""

    def __init__(self, batch: Any, pool: Any, mark: str | None, page: int = PAGE, dtype: Any = E4M3) -> None:
        self.device, self.dtype, self.kv_cache_dtype, self.page_size = GIVEN.device, torch.float32, dtype, page
        self.req_to_token_pool = SimpleNamespace(req_to_token=batch.table, size=len(batch.table))
        self.token_to_kv_pool, self.token_to_kv_pool_allocator = pool, None
        self.max_running_requests, self.is_draft_worker = len(batch.table), False
        self.model_config = SimpleNamespace(
            num_attention_heads=HEADS, get_num_kv_heads=lambda size: 1, kv_lora_rank=512, qk_nope_head_dim=128,
            qk_rope_head_dim=64, v_head_dim=128, scaling=SCALE, context_len=256, hf_config=SimpleNamespace(),
        )  # fmt: skip
        self.server_args = SimpleNamespace(speculative_num_draft_tokens=4, disable_chunked_prefix_cache=False)
        if mark is not None:
            self.server_args._mla_patch_tokenspeed = mark


@contextmanager
def one_process(module: ModuleType, batch: Any) -> Iterator[None]:
    """What a server would have published before it builds backends, and no FlashInfer planner behind the backend."""

    def parent(self: Any, runner: Any, skip_prefill: bool = False, *args: Any, **kwargs: Any) -> None:
        made = sglang_trial.bare_backend(
            type(self), batch, page_size=runner.page_size, max_context_len=256, skip_prefill=skip_prefill,
            token_to_kv_pool=runner.token_to_kv_pool, req_to_token_pool=runner.req_to_token_pool,
            device=DEVICE, q_indptr_decode=torch.arange(9, dtype=torch.int32, device=DEVICE), _kernel_page_multiplier=1,
        )  # fmt: skip
        vars(self).update(vars(made))

    parallel = SimpleNamespace(attn_tp_size=1, attn_dcp_size=1, dcp_enabled=False, dcp_size=1, dcp_rank=0, tp_size=1)
    spec = SimpleNamespace(speculative_num_draft_tokens=4, disable_chunked_prefix_cache=False, attn_tp_size=1)
    names = {
        "get_attention_tp_size": lambda: 1,
        "get_global_server_args": lambda: spec,
        "get_server_args": lambda: spec,
        "get_parallel": lambda: parallel,
        "get_schedule": lambda: spec,
        "get_spec": lambda: spec,
        "get_kv_shard_pool": lambda pool: None,
        "get_buffer": lambda name, make: make(),
        "make_persistent_multi_ctas_kv_counter_buffer": lambda *args, **kwargs: None,
        "_jit_fixup_module": lambda dtype: None,
        "can_use_set_mla_kv_concat_q": lambda *args: False,
        "can_use_set_mla_kv_concat_q_fp8": lambda *args: False,
        "fixup_zero_kv_rows": fixup,
        "is_in_piecewise_cuda_graph": lambda: False,
        "is_in_tc_piecewise_cuda_graph": lambda: False,
        "is_in_breakable_cuda_graph": lambda: False,
        "global_server_args_dict": {"disable_chunked_prefix_cache": False},
        "DEFAULT_WORKSPACE_SIZE_MB": 1,
    }
    with ExitStack() as stack:
        stack.enter_context(sglang_trial.one_rank())
        stack.enter_context(mock.patch.object(module.FlashInferMLAAttnBackend, "__init__", parent))
        for name in names.keys() & vars(module).keys():
            stack.enter_context(mock.patch.object(module, name, names[name]))
        yield


class Drive:
    """Latents in the host's own pool, and steps over them."""

    def __init__(self, mark: str | None) -> None:
        self.rng = torch.Generator().manual_seed(0)
        self.module = importlib.import_module("sglang.srt.layers.attention.trtllm_mla_backend")
        self.batch = sglang_trial.make_batch(GIVEN.device, LENS, width=256, page=PAGE)
        pools = importlib.import_module("sglang.srt.mem_cache.memory_pool")
        self.pool = pools.MLATokenToKVPool(
            size=len(self.batch.table) * 256, page_size=PAGE, dtype=E4M3, kv_lora_rank=512, qk_rope_head_dim=64,
            layer_num=1, device=GIVEN.device, enable_memory_saver=False,
        )  # fmt: skip
        self.slots = sglang_trial.expected_token_ids(self.batch, LENS)
        self.store = sglang_trial.pool_bytes(self.pool)
        self.store.fill_(0x7F)  # NaN where nobody stores
        self.latents = self.random(len(self.slots), 576).to(E4M3)
        self.store[self.slots, 0] = self.latents.view(torch.uint8)
        self.pool.set_mla_kv_buffer = self.stored  # some releases' kernels for it do not run in the interpreter
        self.layer = SimpleNamespace(
            layer_id=0, tp_q_head_num=HEADS, tp_k_head_num=1, tp_v_head_num=1, head_dim=576, qk_head_dim=576,
            v_head_dim=512, scaling=SCALE, k_scale=None, k_scale_float=None, v_scale=None, v_scale_float=None,
        )  # fmt: skip
        self.runner = Runner(self.batch, self.pool, mark)
        with one_process(self.module, self.batch):
            self.backend = self.module.TRTLLMMLABackend(self.runner)

    def stored(self, layer: Any, loc: Any, k: torch.Tensor, k_rope: torch.Tensor) -> None:
        row = torch.cat([k.view(-1, 512), k_rope.view(-1, 64)], dim=-1)
        assert row.dtype == E4M3
        self.store[self.at, 0] = row.view(torch.uint8)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng).to(DEVICE)

    def step(self, mode: str, lens: tuple[int, ...], **more: Any) -> Any:
        rows = self.batch.rows[: len(lens)]
        batch = sglang_trial.Batch(torch.tensor(lens, device=DEVICE), rows, self.batch.table, lens)
        step = sglang_trial.forward_batch(batch, mode, self.backend, more.pop("prefix", None))
        vars(step).update(
            token_to_kv_pool=self.pool, out_cache_loc_is_physical=True, mha_return_lse=False,
            positions=torch.zeros(1, dtype=torch.int64, device=DEVICE), attn_attend_prefix_cache=None,
            mha_one_shot=False, **more,
        )  # fmt: skip
        return step

    def rows(self, b: int) -> torch.Tensor:
        """What is stored of request ``b``."""
        start = sum(LENS[:b])
        return self.store[self.slots[start : start + LENS[b]], 0].view(E4M3).double()

    def expected(self, q: torch.Tensor, counts: list[list[int]]) -> torch.Tensor:
        """The definition: query token i of request b over the first counts[b][i] stored tokens."""
        out = []
        flat = iter(q.to(E4M3).double().view(-1, HEADS, 576))
        for b, seen in enumerate(counts):
            for count in seen:
                rows = self.rows(b)[:count]
                out.append((next(flat) @ rows.T * SCALE).softmax(-1) @ rows[:, :512])
        return torch.stack(out)

    def run(self, counts: list[list[int]], q: torch.Tensor, out: torch.Tensor) -> dict[str, Any]:
        got = out.view(-1, HEADS, 512)
        want = self.expected(q, counts)
        return {"error": sglang_trial.relative_error(got, want), "dtype": str(out.dtype), "rows": len(got)}

    def decode(self, again: bool = False) -> dict[str, Any]:
        """Each request's last token, whose latent the host stores itself; ``again``: and then with other queries in the
        same tensor, on a GPU by a CUDA graph."""
        with one_process(self.module, self.batch):
            last = torch.tensor(LENS, device=DEVICE).cumsum(0) - 1
            self.store[self.slots[last]] = 0x7F
            self.at = self.slots[last]
            step = self.step("DECODE", LENS, out_cache_loc=self.at)
            self.backend.init_forward_metadata(step)
            q, k = self.random(len(LENS), HEADS, 576), self.latents[last].float()[:, None]
            table = torch.zeros(1, 64, device=DEVICE)

            def forward() -> torch.Tensor:
                return self.backend.forward_decode(
                    q[..., :512].contiguous(), k[..., :512], k[..., :512].contiguous(), self.layer, step,
                    q_rope=q[..., 512:].contiguous(), k_rope=k[..., 512:], cos_sin_cache=table, is_neox=False,
                )  # fmt: skip

            if not again:
                return self.run([[n] for n in LENS], q, forward())
            replay = captured(forward)
            q.copy_(self.random(*q.shape))
            return self.run([[n] for n in LENS], q, replay())

    def verify(self, tokens: int = 4) -> dict[str, Any]:
        """``tokens`` drafts of each request, the last of its stored tokens."""
        before = tuple(n - tokens for n in LENS[1:])
        with one_process(self.module, self.batch):
            self.backend.num_draft_tokens = tokens
            info = SimpleNamespace(draft_token_num=tokens, ragged_verify_layout=None, num_tokens_per_req=tokens)
            rows = self.batch
            self.batch = sglang_trial.Batch(rows.lens[1:], rows.rows[1:], rows.table, rows.lens_list[1:])
            step = self.step("TARGET_VERIFY", before, spec_info=info)
            self.batch = rows
            self.backend.init_forward_metadata(step)
            ends = torch.tensor(LENS).cumsum(0)[1:]
            at = torch.cat([torch.arange(end - tokens, end) for end in ends.tolist()]).to(DEVICE)
            self.at = step.out_cache_loc = self.slots[at]
            q, k = self.random(len(at), HEADS, 576), self.latents[at].float()[:, None]
            out = self.backend.forward_extend(
                q[..., :512].contiguous(), k[..., :512], k[..., :512].contiguous(), self.layer, step,
                q_rope=q[..., 512:].contiguous(),
                k_rope=k[..., 512:], cos_sin_cache=torch.zeros(1, 64, device=DEVICE), is_neox=False,
            )  # fmt: skip
            counts = [[], *([n - tokens + 1 + i for i in range(tokens)] for n in LENS[1:])]
            return self.run(counts, q, out)

    def draft_extend(self, tokens: tuple[int, ...]) -> dict[str, Any]:
        """Accepted tokens of each request; where their numbers differ the host pads and takes away."""
        modes = importlib.import_module("sglang.srt.model_executor.forward_batch_info").ForwardMode
        mode = "DRAFT_EXTEND" if hasattr(modes, "DRAFT_EXTEND") else "DRAFT_EXTEND_V2"
        with one_process(self.module, self.batch):
            prefix = [n - more for n, more in zip(LENS, tokens, strict=True)]
            step = self.step(mode, LENS, prefix=prefix, spec_info=None)
            self.backend.init_forward_metadata(step)
            q = self.random(sum(tokens), HEADS, 576)
            k = torch.zeros(len(q), 1, 576, device=DEVICE)  # stored before; 0.5.4 looks at its shape
            out = self.backend.forward_extend(
                q.view(len(q), -1), k, k[..., :512].contiguous(), self.layer, step, save_kv_cache=False
            )
            counts = [[n - more + 1 + i for i in range(more)] for n, more in zip(LENS, tokens, strict=True)]
            # a padded query is taken for the last of as many as the longest has
            most = max(tokens)
            if len(set(tokens)) > 1:
                counts = [[min(n, n - more + 1 + i) for i in range(more)] for n, more in zip(LENS, tokens, strict=True)]
            return self.run(counts, q, out) | {"most": most}

    def prompts(self, chunked: bool) -> dict[str, Any]:
        """New tokens of three requests; ``chunked``: after cached prefixes of 5, 0 and 40, in two chunks, which are
        merged by log-sum-exp."""
        news, prefix = (7, 3, 20), (5, 0, 40)
        layer = SimpleNamespace(**vars(self.layer) | {"tp_k_head_num": HEADS, "tp_v_head_num": HEADS, "head_dim": 192})
        layer.v_head_dim, layer.qk_head_dim = 128, 192
        q = self.random(sum(news), HEADS, 192)
        keys = [self.random(old + new, HEADS, 192) for old, new in zip(prefix, news, strict=True)]
        values = [self.random(old + new, HEADS, 128) for old, new in zip(prefix, news, strict=True)]
        lens = tuple(old + new for old, new in zip(prefix, news, strict=True))
        with one_process(self.module, self.batch):
            step = self.step("EXTEND", lens, prefix=list(prefix))
            self.backend.init_forward_metadata(step)
            own = [torch.cat([one[old:] for one, old in zip(of, prefix, strict=True)]) for of in (keys, values)]

            def ask(k: torch.Tensor, v: torch.Tensor, **changes: Any) -> Any:
                vars(step).update(changes)
                return self.backend.forward_extend(
                    q.view(len(q), -1) if changes.get("flat") else q, k, v, layer, step, save_kv_cache=False
                )

            if not chunked:
                alone = ask(*own, attn_attend_prefix_cache=False, mha_return_lse=False)
            parts = [] if not chunked else [ask(*own, attn_attend_prefix_cache=False, mha_return_lse=True)]
            chunks = [[(0, min(24, old)) for old in prefix], [(min(24, old), old) for old in prefix]]
            sizes = [torch.tensor([b - a for a, b in chunk], device=DEVICE) for chunk in chunks]
            vars(step).update(
                prefix_chunk_seq_lens=[size.int() for size in sizes],
                prefix_chunk_cu_seq_lens=[torch.nn.functional.pad(size.cumsum(0), (1, 0)).int() for size in sizes],
                prefix_chunk_max_seq_lens=[int(size.max()) for size in sizes],
                prefix_chunk_has_zero_kv=[bool((size == 0).any()) for size in sizes],
            )
            for i, chunk in enumerate(chunks if chunked else []):
                old = [torch.cat([one[a:b] for one, (a, b) in zip(of, chunk, strict=True)]) for of in (keys, values)]
                parts.append(ask(*old, attn_attend_prefix_cache=True, prefix_chunk_idx=i))
        want, want_own, at = [], [], 0
        for b, (old, new) in enumerate(zip(prefix, news, strict=True)):
            k, v = (of[b].to(E4M3).double() for of in (keys, values))
            scores = torch.einsum("ihd,jhd->ihj", q[at : at + new].to(E4M3).double(), k) * SCALE
            above = torch.ones(new, old + new, device=DEVICE).triu(old + 1).bool()
            scores.masked_fill_(above[:, None], -torch.inf)
            want.append(torch.einsum("ihj,jhd->ihd", scores.softmax(-1), v))
            want_own.append(torch.einsum("ihj,jhd->ihd", scores[..., old:].softmax(-1), v[old:]))
            at += new
        if not chunked:
            error = sglang_trial.relative_error(alone.view(-1, HEADS, 128), torch.cat(want_own))
            return {"error": error, "dtype": str(alone.dtype)}
        outs = torch.stack([out.view(-1, HEADS, 128).double() for out, _ in parts])
        lses = torch.stack([lse.double() for _, lse in parts])
        merged = torch.einsum("pih,pihd->ihd", lses.softmax(0), outs)
        seen = {"error": sglang_trial.relative_error(merged, torch.cat(want)), "dtype": str(parts[0][0].dtype)}
        empty = slice(news[0], news[0] + news[1])  # a request without a prefix
        seen["no key"] = [float(outs[1][empty].abs().max()), float(lses[1][empty].max())]
        return seen


def captured(forward: Any) -> Any:
    """What runs ``forward`` again: a CUDA graph of it, or on a CPU itself."""
    if DEVICE.type == "cpu":
        return forward
    forward()  # what is compiled or allocated at a first call is not for a graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()

    def replay() -> torch.Tensor:
        out.fill_(torch.nan)
        graph.replay()
        return out

    return replay


def draft_backends(drive: Drive) -> list[bool]:
    """Of a multi-step draft backend's steps, which are ours."""
    module = drive.module
    parent = module.TRTLLMMLAMultiStepDraftBackend.__mro__[1]

    def init(self: Any, runner: Any, topk: int, steps: int, *args: Any, **kwargs: Any) -> None:
        self.topk, self.speculative_num_steps = topk, steps
        self.attn_backends = [None] * steps
        self.kv_indptr, self.q_indptr_decode = torch.zeros(steps, 9), torch.arange(9)

    with one_process(module, drive.batch), mock.patch.object(parent, "__init__", init):
        made = module.TRTLLMMLAMultiStepDraftBackend(drive.runner, 1, 3)
    return [type(one) is type(drive.backend) for one in made.attn_backends if one is not None]


def main(release: str, out: Path) -> None:
    said = Said()
    logging.getLogger("mla_patch").addHandler(said)
    logging.getLogger("mla_patch").setLevel(logging.INFO)
    seen: dict[str, Any] = {"release": release, "stubbed": sglang_trial.prepare()}
    importlib.import_module("sglang.srt.server_args")
    name = "tokenspeed_mla" if Version(release) < Version("0.5.12") else "tokenspeed_mla_patch"
    seen["arguments"] = arguments(name)
    stand_in_flashinfer()
    module = importlib.import_module("sglang.srt.layers.attention.trtllm_mla_backend")
    seen["feature"] = feature()
    host = Drive(None).backend
    seen["unmarked"] = type(host) is module.TRTLLMMLABackend
    drive = Drive(name)
    backend = drive.backend
    seen["ours"] = isinstance(backend, module.TRTLLMMLABackend) and type(backend) is not module.TRTLLMMLABackend
    seen["class name"] = type(backend).__name__
    steps = {"decode": drive.decode, "decode again": lambda: drive.decode(again=True)}
    if release != "0.5.1":
        steps["prompts"] = lambda: drive.prompts(False)
    if release not in ("0.5.1", "0.5.2"):
        steps |= {"prefix chunks": lambda: drive.prompts(True), "verify": drive.verify}
    if release not in ("0.5.1", "0.5.2", "0.5.3"):
        steps["draft extend"] = lambda: drive.draft_extend((1, 1, 1, 1, 1))
        if release != "0.5.7":  # which takes equal numbers alone
            steps["draft extend, padded"] = lambda: drive.draft_extend((1, 2, 3, 1, 2))
    for step, run in steps.items():
        del tokenspeed_mla.calls[:]
        before = feature()
        try:
            seen[step] = run()
        except Exception as problem:  # so that a GPU's few minutes tell of all steps
            seen[step] = {"failed": "".join(traceback.format_exception(problem)[-4:])}
        after = feature()
        seen[step] |= {"calls": list(tokenspeed_mla.calls)}
        seen[step] |= {name: after[name] - before[name] for name in ("served", "captured")}
    seen["drafts"] = draft_backends(drive)
    drive.layer.k_scale_float = 0.5
    seen["scaled"] = failure(drive.decode)
    for what, given in {"cache": {"dtype": torch.bfloat16}, "page": {"page": 128}}.items():
        runner = Runner(drive.batch, drive.pool, name, **given)
        with one_process(module, drive.batch):
            seen[f"refused {what}"] = failure(module.TRTLLMMLABackend, runner)
    mla_patch.restore("tokenspeed")
    with one_process(module, drive.batch):
        seen["restored"] = type(module.TRTLLMMLABackend(drive.runner)) is module.TRTLLMMLABackend
    seen["flashinfer restored"] = isinstance(module.flashinfer, ModuleType)
    seen["said"], seen["cuda initialized"] = said.lines, torch.cuda.is_initialized()
    out.write_text(json.dumps(seen, indent=1))


def tell() -> int:
    """What a person reads; 1 where something is not as it should be."""
    sys.path.insert(0, str(HERE))  # the host has imported what it imports
    from tokenspeed_runs import faults

    seen = json.loads(GIVEN.out.read_text())
    for step, row in seen.items():
        if isinstance(row, dict) and "error" in row:
            print(f"{step}: error {row['error']:.2g}, {row['served']} served, {row['captured']} captured")
    found = faults(GIVEN.release, seen, GIVEN.provider, GIVEN.device)
    for fault in found:
        print(f"FAULT: {fault}")
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    print(f"SGLang {GIVEN.release}, {GIVEN.provider}, {HEADS} heads, {where}: {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    main(GIVEN.release, GIVEN.out)
    status = tell()
    sys.stdout.flush()
    os._exit(status)
