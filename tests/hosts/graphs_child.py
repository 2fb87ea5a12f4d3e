"""One SGLang release's own graph runner on a CPU: its capture loop, its keys and its replay, with arms under test.

    python graphs_child.py RELEASE OUT.json    with the release on PYTHONPATH, MLA_PATCH=1, MLA_PATCH_DECODE=ab+shadow

torch's graphs are stood in for, and what surrounds them in the runner: its buffers, its distributed state. Its model
decodes one layer through the release's own Triton backend; after each step EAGLE's own runner drafts. Judges nothing:
it writes down what it saw.
"""

import contextlib
import importlib
import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.pop(0)  # this folder: a host must not find our modules by their plain names

import mla_patch
import mla_patch.startup

mla_patch.startup.start()

BY_SIZE = "sglang.srt.model_executor.cuda_graph_runner"
EAGLE = "sglang.srt.speculative.eagle_draft_cuda_graph_runner"
BY_KEY = "sglang.srt.model_executor.runner.decode_cuda_graph_runner"
STEPS = 48
CODES = ("host", "patch", "shadow")
SIZES = (4, 8)


class Nothing:
    """Whatever the runner asks for: false, empty, callable, a context."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__.setdefault(name, Nothing())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def __getitem__(self, key: Any) -> Any:
        return Nothing()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __iter__(self) -> Any:
        return iter(())


def holding(**values: Any) -> Nothing:
    made = Nothing()
    vars(made).update(values)
    return made


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    open = False
    made = 0

    def __init__(self) -> None:
        Graph.made += 1

    def replay(self) -> None:
        pass

    def pool(self) -> Any:
        return 0, 1


@contextlib.contextmanager
def recording(*args: Any, **kwargs: Any) -> Any:
    Graph.open = True
    try:
        yield
    finally:
        Graph.open = False


def build(owner: type, live: Any, layer: Any) -> Any:
    """A runner whose __init__ has not run, with what its methods read."""
    import torch

    logits = importlib.import_module("sglang.srt.layers.logits_processor").LogitsProcessorOutput

    def forward(input_ids: Any, positions: Any, forward_batch: Any, **kwargs: Any) -> Any:
        arm = live.experiments["decode"].arm
        layer.decode()
        return logits(next_token_logits=torch.full((8, 1), CODES.index(arm)), hidden_states=None)

    class Runner(owner):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            return self.__dict__.setdefault(name, Nothing())

    runner = Runner()
    slots = SimpleNamespace(slice_for=lambda bs, tokens: torch.zeros(tokens, dtype=torch.int64))
    registry = SimpleNamespace(get_slot=lambda name: slots, has_slot=lambda name: False, fill_from=Nothing())
    tensors = ("input_ids", "req_pool_indices", "seq_lens", "seq_lens_cpu", "out_cache_loc", "positions")
    buffers = holding(**{name: torch.zeros(64, dtype=torch.int64) for name in tensors})
    vars(buffers).update(mamba_track_indices=None, mamba_track_mask=None, rids_int=None, bootstrap_room_ids_int=None)
    vars(buffers).update(ngram_embedding_info=None, mrope_positions=torch.zeros(3, 64), next_token_logits_buffer=None)
    vars(buffers).update(next_token_logits_buffer=torch.zeros(64, 1), aux_hidden_states=None)
    vars(runner).update(
        graphs={}, output_buffers={}, capture_bs=list(SIZES), compile_bs=[], num_tokens_per_bs=1, captured_req_width=1,
        buffers=buffers, buffer_registry=registry, pp_size=1, stream=None, max_bs=8, attention_graph_variants=None,
        record_nolora_graph=False, dllm_config=None, capture_forward_mode=Nothing(), seq_len_fill_value=1,
        num_dp_ranks=1, in_graph_metadata_prep_done=None,
    )  # fmt: skip
    runner.model_runner = holding(
        is_draft_worker=False, hisparse_coordinator=None, device_timer=None, canary_manager=None
    )
    runner.model_runner.capture_tail_hooks = []
    runner.device_module = SimpleNamespace(
        graph=recording,
        synchronize=lambda: None,
        graph_pool_handle=lambda: (0, 1),
        Event=Nothing,
        is_current_stream_capturing=lambda: False,
    )
    runner.layer, runner.forward_, runner.warmup, runner.model_context = layer, forward, Nothing(), Nothing()
    if hasattr(owner, "capture_one_shape"):
        runner.capture_prepare = lambda size, *args, **kwargs: (holding(batch_size=size), Nothing(), None)
        home = importlib.import_module("sglang.srt.model_executor.runner_backend.full_cuda_graph_backend")
        runner.backend = object.__new__(home.FullCudaGraphBackend)
        vars(runner.backend).update(
            _graphs={}, _outputs={}, _pool=(0, 1), _cuda_graph_runner=runner, _device_module=runner.device_module,
            _tp_group=Nothing(), _capture_stream=None, _memory_saver_adapter=None, _precarve=Nothing(),
            _reuse_output_buffer=False, _output_buffer=None,
        )  # fmt: skip
    return runner


def build_eagle(owner: type, live: Any, layer: Any, draft: Any) -> Any:
    """EAGLE's: all it has of its own is what goes in and the worker that drafts, here one token."""
    import torch

    runner = build(owner, live, layer)
    runner.model_runner.is_draft_worker = True
    ours = {name: torch.zeros(64, dtype=torch.int64) for name in ("extend_seq_lens", "topk_index")}
    ours |= {"topk_p": torch.zeros(64), "hidden_states": torch.zeros(64, 8)}
    ours |= dict.fromkeys(("draft_probs", "dsa_seed_topk", "sampling_seed"))
    vars(runner.buffers).update(ours)
    vars(runner).update(vars(runner.buffers))  # to 0.5.10 they were the runner's own
    vars(runner).update(
        speculative_num_steps=1, topk=1, temperatures=torch.zeros(64, 1), top_ks=torch.zeros(64, dtype=torch.int32),
        extend_seq_lens_cpu=[1] * 64, require_mlp_tp_gather=False, require_gathered_buffer=False,
        require_attn_tp_gather=False,
    )  # fmt: skip
    runner.eagle_worker = holding(draft_forward=draft, speculative_num_steps=1)
    runner.model_runner.draft_attn_backend = runner.draft_attn_backend = Nothing()
    return runner


def around(module: Any, runner: Any) -> contextlib.ExitStack:
    """What the capture loop and the replay take from their module's globals, stood in for."""
    stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def patched_model(*args: Any, **kwargs: Any) -> Any:
        yield runner.forward_

    parallel = holding(tp_rank=1)
    instead = {
        "get_tensor_model_parallel_rank": lambda: 1, "get_available_gpu_memory": lambda *args, **kwargs: 1.0,
        "patch_model": patched_model, "graph_capture": lambda *args, **kwargs: contextlib.nullcontext(Nothing()),
        "freeze_gc": lambda *args: contextlib.nullcontext(), "get_parallel": lambda: parallel,
        "set_dp_buffer_len": Nothing(), "set_is_extend_in_batch": Nothing(), "set_graph_pool_id": Nothing(),
        "get_flags": Nothing(), "get_exec": Nothing(), "forward_context": Nothing(),
        "torch_compile_decoration": SimpleNamespace(patch_model=patched_model), "graph_pool_capture_scope": Nothing(),
        "maybe_flashinfer_autotune_speculative_draft": Nothing(),
        "get_or_create_global_graph_capture_stream": Nothing(),
        "device_timer_ctx": lambda *args: contextlib.nullcontext(), "graph_pool_replay_scope": Nothing(),
        "get_schedule": Nothing(), "enable_num_token_non_padded": lambda *args: False,
        "DpPaddingMode": Nothing(), "TorchMemorySaverAdapter": Nothing(),
        "get_spec": lambda: holding(speculative_use_rejection_sampling=True),
    }  # fmt: skip
    homes = [module, *([sys.modules[type(runner.backend).__module__]] if type(runner.backend) is not Nothing else [])]
    for home in homes:
        for name, value in instead.items():
            if hasattr(home, name):
                stack.enter_context(mock.patch.object(home, name, value))
    return stack


def main(release: str, out: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    from mla_patch.drive import sglang as sglang_trial

    sglang_trial.prepare()
    import torch

    from mla_patch.compat import gpu

    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, recording  # type: ignore[misc]
    torch.cuda.synchronize = lambda *args: None  # type: ignore[assignment]
    gpu.capturing = lambda: Graph.open
    model_runner = importlib.import_module("sglang.srt.model_executor.model_runner")
    try:
        module = importlib.import_module(BY_KEY)
    except ImportError:
        module = importlib.import_module(BY_SIZE)
    seen: dict[str, Any] = {"release": release}
    live = mla_patch.startup._get_session().experiments
    assert live is not None
    layer = sglang_trial.DecodeTrial("float16", lens=(3, 2), heads=2)  # few: 60 steps
    small = sglang_trial.DecodeTrial("float16", lens=(1,), heads=2)  # the draft model's
    runner = build(getattr(module, "CudaGraphRunner", None) or module.DecodeCudaGraphRunner, live, layer)
    row = lambda: next(r for r in mla_patch.report()["features"] if r["name"] == "decode")  # noqa: E731
    seen["feature"] = row()

    def keys(runner: Any) -> list[str]:
        found = runner.graphs or getattr(runner.backend, "_graphs", {})
        return [f"{getattr(key, 'size', key)}{getattr(key, 'variant_label', None) or ''}" for key in found]

    with around(module, runner):
        runner.capture()
        seen |= {"graphs": Graph.made, "keys": keys(runner), "captured": row()["captured"]}
        seen["labels"] = live.labels()

        class Target(model_runner.ModelRunner):
            def __init__(self) -> None:
                vars(self).update(forward_pass_id=0, is_draft_worker=False, device="cpu", dist_port=1)
                vars(self).update(server_args=holding(nnodes=1), msprobe_debugger=None, canary_manager=None)
                self.maybe_recover_ep_ranks = Nothing()

            def __getattr__(self, name: str) -> Any:
                if name.startswith("__"):
                    raise AttributeError(name)
                return Nothing()

            def _forward_raw(self, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
                if self.is_draft_worker:
                    return SimpleNamespace(logits=small.decode(), can_run_graph=False, expert_distribution_metrics=None)
                replay = getattr(runner, "replay", None) if hasattr(type(runner), "replay") else runner.execute
                return SimpleNamespace(
                    logits=replay(forward_batch), can_run_graph=True, expert_distribution_metrics=None
                )

        def prepare(*args: Any, **kwargs: Any) -> None:
            runner.bs, runner.raw_bs, runner.raw_num_token = 4, 3, 3

        target = Target()
        if hasattr(type(runner), "replay_prepare"):
            runner.replay_prepare = prepare
        prepare()
        mode = SimpleNamespace(
            is_idle=lambda: False, is_decode=lambda: True, is_target_verify=lambda: False, name="DECODE",
            is_extend=lambda *args, **kwargs: False,
        )  # fmt: skip
        batch = holding(
            forward_mode=mode, batch_size=3, seq_lens_sum=99, input_ids=torch.zeros(3, dtype=torch.int64),
            positions=torch.zeros(3, dtype=torch.int64), lora_ids=None, spec_info=None, out_cache_loc=None,
        )  # fmt: skip
        # four requests, so that the runner pads nothing
        parts = ("input_ids", "positions", "seq_lens", "seq_lens_cpu", "req_pool_indices", "out_cache_loc")
        given = {name: torch.zeros(4, dtype=torch.int64) for name in parts}
        info = holding(num_tokens_per_req=1, topk_p=torch.zeros(4), topk_index=torch.zeros(4, dtype=torch.int64))
        info.hidden_states, info.draft_probs, info.dsa_topk_indices = torch.zeros(4, 8), None, None
        spoken = holding(
            forward_mode=mode, batch_size=4, seq_lens_sum=132, spec_info=info, mrope_positions=None,
            sampling_info=holding(is_all_greedy=True, temperatures=torch.zeros(4, 1), top_ks=torch.zeros(4)),
            rids_int=None, bootstrap_room_ids_int=None, **given,
        )  # fmt: skip
        drafter = Target()
        drafter.is_draft_worker = True

        def draft(forward_batch: Any) -> Any:
            arm = live.experiments["decode"].arm
            drafter.forward(forward_batch)
            return tuple(torch.full((8, 1), CODES.index(arm)) for _ in range(3))

        ran, drafted = [], []
        context = holding(moe=holding(elastic_ep_backend=None))
        outer = sys.modules[model_runner.ModelRunner.__module__]
        with contextlib.ExitStack() as stack:
            for name in (
                "get_global_expert_distribution_recorder",
                "get_global_experts_capturer",
                "dumper",
                "get_schedule",
                "get_exec",
            ):
                if hasattr(outer, name):
                    stack.enter_context(mock.patch.object(outer, name, context))
            home = importlib.import_module(EAGLE)
            seen["eagle graphs"] = {}
            for name, asked in (("not asked", False), ("asked", True)):
                live.draft = asked
                eagle = build_eagle(home.EAGLEDraftCudaGraphRunner, live, layer, draft)
                stack.enter_context(around(home, eagle))
                made = Graph.made
                eagle.capture()
                seen["eagle graphs"][name] = Graph.made - made
            seen["eagle keys"] = keys(eagle)
            replay = eagle.replay if "replay" in vars(home.EAGLEDraftCudaGraphRunner) else eagle.execute
            for _ in range(STEPS):
                output = target.forward(batch)
                ran.append(CODES[int(output.logits.next_token_logits[0, 0])])
                drafted.append(CODES[int(replay(spoken)[0][0, 0])])
        # a draft model's runner is captured as the host does it
        made = Graph.made
        runner.model_runner.is_draft_worker = True
        getattr(runner.backend, "_graphs", {}).clear()
        runner.capture()
        seen["draft graphs"] = Graph.made - made
    live.close()
    seen |= {"ran": ran, "drafted": drafted, "row": row(), "cuda initialized": torch.cuda.is_initialized()}
    Path(out).write_text(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # what a release leaves running at exit is not on trial
