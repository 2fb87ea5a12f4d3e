"""Experiments on a GPU: CUDA graphs of one pool, device events, and torch's own detection of synchronisation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import fake_engine
import pytest
import torch
from fake_engine import ERROR, LAYERS, ByKey, BySize, batch
from test_experiment_live import Running, planned

from mla_patch.experiment.record import Error, Timing
from mla_patch.experiment.schedule import Sampling

pytestmark = pytest.mark.gpu


class CudaTape:
    """`fake_engine.Tape` with CUDA graphs."""

    pool: Any = None

    def __init__(self) -> None:
        CudaTape.pool = CudaTape.pool or torch.cuda.graph_pool_handle()
        self.graph = torch.cuda.CUDAGraph()

    def __enter__(self) -> None:
        self.context = torch.cuda.graph(self.graph, pool=CudaTape.pool)
        self.context.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.context.__exit__(*exc)

    def replay(self) -> None:
        self.graph.replay()


@pytest.mark.parametrize("runner", [None, BySize, ByKey])
def test_arms_errors_and_times(tmp_path: Path, runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_engine, "Tape", CudaTape)
    with torch.device("cuda"):
        one = Running(tmp_path, "ab+shadow", "block=4,warmup=4", "every=8,tolerance=0.02", runner)
        one.runner.device = "cuda"
        outs = [one.runner.forward(batch()).clone()]  # the first step opens files
        given = batch()
        torch.cuda.set_sync_debug_mode("error")
        try:
            outs += [one.runner.forward(given).clone() for _ in range(63)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        due = [step for step in range(1, 65) if Sampling(8).due(step)]
        want = ["host" if step in due else arm for step, arm in enumerate(planned(1, 65), 1)]
        assert [one.engine.whose(out) for out in outs] == want
        for _ in range(100):  # until pending results have arrived
            one.runner.forward(given)
            torch.cuda.synchronize()
            time.sleep(0.01)
            one.live.read()
    for undo in one.undo:
        undo()
    rows = one.rows()
    errors = [row for row in rows if isinstance(row, Error)]
    assert {row.step for row in errors if row.step < 65} == set(due) and {row.tag for row in errors} == set(
        range(LAYERS)
    )
    assert all(abs(row.relative - ERROR) < 1e-5 and row.nan == 0 for row in errors)
    times = {row.step: row for row in rows if isinstance(row, Timing)}
    assert [times[step].arm for step in range(1, 65) if step not in due] == [
        arm for step, arm in enumerate(want, 1) if step not in due
    ]
    assert all(row.us > 0 and row.bucket.startswith("graph" if runner else "eager") for row in times.values())
    if runner is not None:
        assert one.engine.counts.captured == 2 * 2 * LAYERS and one.engine.counts.replayed
