"""A small engine with the steps and graph runners of SGLang's releases, and with graphs that work without a GPU.

A graph is a tape of the operators that torch dispatched during the capture. A replay runs them again on the same
tensors. The attention of a layer is twice the query. Ours is off by ``ERROR``, so that a result shows which arm ran.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mla_patch.compat import gpu
from mla_patch.dispatch import ArmCode, EntryPoint, FeatureGate
from mla_patch.features import Counts, State
from mla_patch.stand_ins import stand_in

LAYERS, WIDTH, ERROR = 3, 8, 1e-3


class Tape(TorchDispatchMode):
    """Replaces torch.cuda.CUDAGraph and its context."""

    open: list[Tape] = []

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []

    def __enter__(self) -> Any:
        Tape.open.append(self)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        Tape.open.remove(self)
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.ops:
            again = func(*args, **kwargs)
            if isinstance(out, torch.Tensor) and again.data_ptr() != out.data_ptr():
                out.copy_(again)


class Mode:
    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, asked: str) -> Callable[[], bool]:
        return lambda: asked == f"is_{self.name}"


class Call:
    __slots__ = ("out", "q")

    def __init__(self, q: torch.Tensor, out: torch.Tensor) -> None:
        self.q = q
        self.out = out


def host_decode(q: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(q * 2)


def shadow_clone(call: Call) -> tuple[Call, list[tuple[Any, Any]]]:
    ours = Call(call.q, call.out.clone())
    return ours, [(call.out, ours.out)]


@dataclass(frozen=True)
class ShapeKey:
    size: int
    stream_idx: int | None = None
    variant_label: str | None = None


class BySize:
    """The runner of SGLang 0.5.1 - 0.5.13."""

    name = "CudaGraphRunner"

    def __init__(self, model_runner: Any) -> None:
        self.model_runner = model_runner
        self.graphs: dict[Any, Any] = {}
        self.output_buffers: dict[Any, Any] = {}
        self.buffer = torch.ones(8, WIDTH)
        self.capture()

    def capture(self) -> None:
        for bs in (8, 4):
            self.graphs[bs], self.output_buffers[bs] = self.capture_one_batch_size(bs, self.model_runner.model)

    def capture_one_batch_size(self, bs: int, forward: Any, stream_idx: Any = None) -> Any:
        graph = Tape()
        for _ in range(2):
            forward(self.buffer[:bs])
        with graph:
            out = forward(self.buffer[:bs])
        return graph, out

    def replay(self, batch: Any) -> torch.Tensor:
        self.bs = 4 if batch.batch_size <= 4 else 8
        self.buffer[: batch.batch_size].copy_(batch.q)
        self.graphs[self.bs].replay()
        return self.output_buffers[self.bs][: batch.batch_size]


class ByKey:
    """The runner of SGLang 0.5.14 and later."""

    name = "DecodeCudaGraphRunner"

    def __init__(self, model_runner: Any) -> None:
        self.model_runner = model_runner
        self.graphs: dict[Any, Any] = {}
        self.buffer = torch.ones(8, WIDTH)
        self.capture()

    def _make_graph_key(self, size: int, stream_idx: Any = None, variant_label: Any = None) -> ShapeKey:
        return ShapeKey(size, stream_idx, variant_label)

    def capture(self) -> None:
        for size in (8, 4):
            self.capture_one_shape(size, self.model_runner.model, None, "nolora")

    def capture_one_shape(self, size: int, forward: Any, stream_idx: Any = None, variant_label: Any = None) -> None:
        key = self._make_graph_key(size, stream_idx, variant_label)
        assert key not in self.graphs
        graph = Tape()
        for _ in range(2):
            forward(self.buffer[:size])
        with graph:
            out = forward(self.buffer[:size])
        self.graphs[key] = graph, out

    def execute(self, forward_batch: Any) -> torch.Tensor:
        self._replay_graph_key = self._make_graph_key(4 if forward_batch.batch_size <= 4 else 8, None, "nolora")
        self.buffer[: forward_batch.batch_size].copy_(forward_batch.q)
        graph, out = self.graphs[self._replay_graph_key]
        graph.replay()
        return out[: forward_batch.batch_size]

    def replay(self, batch: Any) -> torch.Tensor:
        return self.execute(batch)


class DraftBySize(BySize):
    """EAGLE's runner of 0.5.1 - 0.5.13. It is not a subclass of the other runner, but uses its capture loop."""

    name = "EAGLEDraftCudaGraphRunner"

    def capture(self) -> None:
        self.model_runner.engine.module.CudaGraphRunner.capture(self)

    def capture_one_batch_size(self, num_seqs: int, forward: Any, stream_idx: Any = 0) -> Any:
        return BySize.capture_one_batch_size(self, num_seqs, self.model_runner.draft, stream_idx)

    def replay(self, forward_batch: Any) -> torch.Tensor:
        return BySize.replay(self, forward_batch)


class DraftByKey(ByKey):
    """EAGLE's runner of 0.5.14 and later. It captures each size twice, as 0.5.23 does when it samples drafts."""

    name = "EAGLEDraftCudaGraphRunner"

    def _make_graph_key(self, bs: int, stream_idx: Any = None, variant_label: Any = None) -> ShapeKey:
        return ShapeKey(bs, variant_label=variant_label)

    def capture_one_shape(self, size: int, forward: Any, stream_idx: Any = None, variant_label: Any = None) -> None:
        for variant in (None, "greedy"):
            ByKey.capture_one_shape(self, size, self.model_runner.draft, None, variant)

    def execute(self, forward_batch: Any) -> torch.Tensor:
        key = self._make_graph_key(4 if forward_batch.batch_size <= 4 else 8, variant_label="greedy")
        self.buffer[: forward_batch.batch_size].copy_(forward_batch.q)
        graph, out = self.graphs[key]
        graph.replay()
        return out[: forward_batch.batch_size]


class Engine:
    """One rank. ``runner`` is a graph runner's class, or None for eager steps alone."""

    def __init__(self, error: Any = ERROR, **arms: Any) -> None:
        self.served: list[str] = []
        self.error = error
        self.counts = Counts()
        self.stops: list[tuple[str, State]] = []
        codes = {"patch": self.serve, **arms}
        declines = lambda call: "declined" if self.declining else None  # noqa: E731
        self.declining = False
        self.switch = FeatureGate(self._stopped)
        sites = {name: ArmCode(serve, declines) for name, serve in codes.items()}
        site = EntryPoint("decode", Call, sites, self.counts, self.switch, shadow_clone)
        self.decode = stand_in(host_decode, "call", site)
        self.module = ModuleType("engine")
        # new classes for each engine, since the edits change them
        self.module.ModelRunner = type("ModelRunner", (_ModelRunner,), dict(vars(_ModelRunner)))
        for runner in (BySize, ByKey):
            setattr(self.module, runner.name, type(runner.name, (runner,), dict(vars(runner))))
        # EAGLE's runners use or extend these
        self.drafts = {
            BySize: type(DraftBySize.name, (DraftBySize,), dict(vars(DraftBySize))),
            ByKey: type(DraftByKey.name, (self.module.DecodeCudaGraphRunner,), dict(vars(DraftByKey))),
        }

    def _stopped(self, reason: str, state: State) -> None:
        self.stops.append((reason, state))
        if self.switch.arms is not None:
            self.switch.arms.stopped(reason)  # as the patcher does it

    def serve(self, call: Call) -> None:
        if self.error == "raise" or (self.error == "raise in a graph" and Tape.open):
            raise RuntimeError("boom")
        call.out.copy_(call.q * (2 * (1 + (ERROR if isinstance(self.error, str) else self.error))))

    def model(self, q: torch.Tensor) -> torch.Tensor:
        for _ in range(LAYERS):
            out = torch.empty_like(q)
            self.decode(q, out)
            q = out
        return q

    def start(self, runner: type | None = None, draft: bool = False) -> Any:
        made = self.module.ModelRunner(self, draft)
        if runner is not None:
            made.graph_runner = getattr(self.module, runner.name)(made)
        return made

    def start_eagle(self, runner: type) -> Any:
        """A draft model whose decode steps are replayed from its own graphs."""
        made = self.module.ModelRunner(self, True)
        made.eagle = self.drafts[runner](made)
        return made

    def whose(self, out: torch.Tensor) -> str:
        """The arm that produced the result of a step."""
        ratio = float(out.flatten()[0]) / 2**LAYERS
        return "host" if ratio == 1 else "patch" if abs(ratio - (1 + self.error) ** LAYERS) < 1e-5 else f"? {ratio}"


class _ModelRunner:
    def __init__(self, engine: Engine, draft: bool) -> None:
        self.engine = engine
        self.model = engine.model
        self.is_draft_worker = draft
        self.forward_pass_id = 0
        self.graph_runner: Any = None
        self.device = "cpu"
        self.dist_port = 1234

    def draft(self, q: torch.Tensor) -> torch.Tensor:
        """All steps of a draft (here one). The model is called as outside graphs."""
        return self.forward(SimpleNamespace(forward_mode=Mode("decode"), batch_size=len(q), seq_lens_sum=len(q), q=q))

    def forward(self, forward_batch: Any, pp_proxy_tensors: Any = None) -> torch.Tensor:
        self.forward_pass_id += 1
        if self.graph_runner is not None and forward_batch.forward_mode.is_decode():
            return self.graph_runner.replay(forward_batch)
        return self.model(forward_batch.q)


def batch(size: int = 3, mode: str = "decode", context: int = 100) -> Any:
    return SimpleNamespace(
        forward_mode=Mode(mode), batch_size=size, seq_lens_sum=size * context, q=torch.ones(size, WIDTH)
    )


@pytest.fixture(autouse=True)
def tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "capturing", lambda: bool(Tape.open))
