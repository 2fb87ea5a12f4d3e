"""SGLang: where a forward step begins and ends, and how its decode graphs are captured and found, per release.

A step is a call of ``ModelRunner.forward``, numbered by its ``forward_pass_id`` in all releases.

    0.5.1 - 0.5.13    srt.model_executor.cuda_graph_runner.CudaGraphRunner
                      capture_one_batch_size returns (graph, output). capture() files them in self.graphs and
                      self.output_buffers under a key of its own, under which replay() reads both.
    from 0.5.14       srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner
                      capture_one_shape, can_run_graph and load_batch take their key from _make_graph_key, a frozen
                      ShapeKey with a free variant_label. LoRA uses it, and so do attention variants (0.5.18, 0.5.20).

EAGLE's and stand-alone draft models decode in graphs of srt.speculative.eagle_draft_cuda_graph_runner, all their steps
in one. Up to and including 0.5.13 that is a class beside the above whose capture() calls CudaGraphRunner's, later a
subclass. From 0.5.23 it captures each size twice, with and without the proposal's distribution.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from mla_patch.compat import processes, steps
from mla_patch.compat.eras import Eras, era_of

RUNNER = "sglang.srt.model_executor.model_runner"
BY_SIZE = "sglang.srt.model_executor.cuda_graph_runner"
BY_KEY = "sglang.srt.model_executor.runner.decode_cuda_graph_runner"
DRAFT_RUNNER = "EAGLEDraftCudaGraphRunner"  # the class
_GRAPH_RUNNERS: Eras[str] = (("0.5.14", BY_KEY), ("0.5.1", BY_SIZE))


def graph_runners(version: str | None) -> list[str]:
    """The module of the graph runner in ``version``; both where it is unknown."""
    return era_of(_GRAPH_RUNNERS, version)


def step_info(batch: Any) -> steps.StepInfo | None:
    """What a batch was; None for an idle one. Python numbers, no tensor."""
    mode, count = batch.forward_mode, batch.batch_size
    if mode.is_idle() or not count:
        return None
    total = batch.seq_lens_sum  # None if the engine plans ahead and does not know it yet
    kind = "decode" if mode.is_decode() or mode.is_target_verify() else "prefill"
    return steps.StepInfo(kind, count, (total or 0) // count)


def rank_info(runner: Any) -> steps.RankInfo:
    """This process's place. The ranks that step together have one parent and one port between them."""
    rank, ranks = 0, 1
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    args = getattr(runner, "server_args", None)
    parent = f"{os.getppid()}-{processes.start_ticks(os.getppid()) or 0}"
    if getattr(args, "nnodes", 1) > 1:  # what all nodes know
        parent = "".join(c if c.isalnum() else "-" for c in str(getattr(args, "dist_init_addr", "")))
    port = getattr(runner, "dist_port", None)
    return steps.RankInfo(f"sglang-{parent}-{port}", rank, ranks, str(getattr(runner, "device", "cpu")))
