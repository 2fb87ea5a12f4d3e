"""SGLang: where a forward step begins and ends, and how its decode graphs are captured once per arm.

A step is a call of ``ModelRunner.forward``, numbered by its ``forward_pass_id`` in all releases. Draft models' are no
steps: they keep the host's arm, unless it is asked for that their decodes run that of the target model's step before
them. Their extends keep it in any case, as do prefill graphs.

    0.5.1 - 0.5.13    srt.model_executor.cuda_graph_runner.CudaGraphRunner
                      capture_one_batch_size returns (graph, output), which capture() files under a key of its own in
                      self.graphs and self.output_buffers; replay() reads both under the key. So the pair becomes one
                      pair for each arm, and both dicts look up the step's arm.
    from 0.5.14       srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner
                      capture_one_shape, can_run_graph and load_batch take their key from _make_graph_key, a frozen
                      ShapeKey with a free variant_label (LoRA's). So the key's label gets the step's arm, beside what
                      the host says there, and beside its own attention variants (0.5.18, 0.5.20): they multiply.

EAGLE's and stand-alone draft models decode in graphs of srt.speculative.eagle_draft_cuda_graph_runner, all their steps
in one: to 0.5.13 a class beside the above whose capture() calls CudaGraphRunner's, later a subclass. Both are found
when they capture, so that their module is nobody's to wait for.

Each arm is captured with the host's own method, so from the host's one memory pool, on its stream, after its warm-ups.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from packaging.version import Version

from mla_patch.compat import gpu, processes, steps
from mla_patch.compat.types import Edit, Undo
from mla_patch.hooks.editing import Undoing, set_methods

log = logging.getLogger("mla_patch")

_RUNNER = "sglang.srt.model_executor.model_runner"
_BY_SIZE = "sglang.srt.model_executor.cuda_graph_runner"
_BY_KEY = "sglang.srt.model_executor.runner.decode_cuda_graph_runner"


def step_targets(version: str | None) -> tuple[Edit, ...]:
    """The edits that an experiment needs in ``version``; where it is unknown, in whichever home there is."""
    steps_ = Edit(_RUNNER, "ModelRunner.step", watch_steps)
    by_key = Edit(_BY_KEY, "graphs", arms_by_key)
    by_size = Edit(_BY_SIZE, "graphs", arms_by_size)
    if version is None:
        return steps_, by_key, by_size
    return steps_, by_key if Version(version) >= Version("0.5.14") else by_size


_edited: dict[type, tuple[int, Undoing]] = {}  # features under test at the same time share the edits
_drafts: dict[type, Undo] = {}  # draft models' graph runners that have been edited, too


def _shared(edit: Callable[[ModuleType], tuple[type, dict[str, Any]]]) -> Callable[[ModuleType], Undo]:
    """An edit of a class's methods, made for the first feature that asks and undone after the last."""

    @functools.wraps(edit)
    def edit_once(module: ModuleType) -> Undo:
        owner, ours = edit(module)
        if owner not in _edited:
            _edited[owner] = (0, set_methods(owner, ours))
        count, undo = _edited[owner]
        _edited[owner] = (count + 1, undo)

        def give_back() -> None:
            count, undo = _edited.pop(owner)
            if count > 1:
                _edited[owner] = (count - 1, undo)
                return
            undo()
            while _drafts:
                _drafts.popitem()[1]()

        return Undoing(give_back, undo.places)

    return edit_once


def _method(owner: type, name: str, *params: str) -> Callable[..., Any]:
    """``owner``'s own method, which must begin with these parameters."""
    method = vars(owner).get(name)
    found = tuple(inspect.signature(method).parameters) if method is not None else ()
    if found[: len(params) + 1] != ("self", *params):
        told = f"takes ({', '.join(found)})" if method is not None else "does not exist"
        raise TypeError(f"{owner.__qualname__}.{name} {told}, expected (self, {', '.join((*params, '...'))})")
    assert method is not None
    return method


# steps


@_shared
def watch_steps(module: ModuleType) -> tuple[type, dict[str, Any]]:
    """Tell the experiment of each forward step of the target model."""
    owner = module.ModelRunner
    original = _method(owner, "forward", "forward_batch")

    @functools.wraps(original)
    def forward(self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        watcher = steps.watcher
        if watcher is None:
            return original(self, forward_batch, *args, **kwargs)
        if not self.is_draft_worker:
            watcher.begin(functools.partial(rank_info, self), self.forward_pass_id + 1)
        elif watcher.draft and forward_batch.forward_mode.is_decode():
            watcher.begin_draft()
        else:
            return original(self, forward_batch, *args, **kwargs)
        return _until_end(watcher, original, self, forward_batch, args, kwargs)

    return owner, {"forward": forward}


def _until_end(
    watcher: steps.Watcher, original: Callable[..., Any], runner: Any, batch: Any, args: Any, kwargs: Any
) -> Any:
    """What has begun, to its end."""
    work = None
    try:
        output = original(runner, batch, *args, **kwargs)
        work = functools.partial(step_info, batch)
        return output
    finally:
        watcher.end(work)


def step_info(batch: Any) -> steps.StepInfo | None:
    """What a batch was; None for an idle one. Python numbers, no tensor."""
    mode, count = batch.forward_mode, batch.batch_size
    if mode.is_idle() or not count:
        return None
    total = batch.seq_lens_sum  # None where the host plans ahead and has not been told yet
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


# graphs


class ByArm(dict[Any, Any]):
    """A runner's graphs, or their outputs, under the host's keys: what is read is the one of the step's arm."""

    def __getitem__(self, key: Any) -> Any:
        value = dict.__getitem__(self, key)
        return value.pick() if isinstance(value, _Variants) else value


class _Variants:
    """One size's graphs or outputs, by label."""

    __slots__ = ("by_label",)

    def __init__(self, by_label: dict[str, Any]) -> None:
        self.by_label = by_label

    def pick(self) -> Any:
        watcher = steps.watcher
        if watcher is None or not watcher.label:
            return self.by_label[""]
        found = self.by_label.get(watcher.label)
        if found is None:
            watcher.missing = True
            return self.by_label[""]
        return found


class _Counted:
    """A graph that says when it is replayed."""

    def __init__(self, graph: Any, calls: dict[str, int]) -> None:
        self._graph = graph
        self._calls = calls

    def replay(self) -> None:
        self._graph.replay()
        if steps.watcher is not None:
            steps.watcher.replayed(self._calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)


def _watcher(runner: Any, draft: bool) -> steps.Watcher | None:
    """Who chooses among a runner's graphs; nobody where it is a draft model's, unless that is asked for."""
    watcher = steps.watcher
    if watcher is None or bool(runner.model_runner.is_draft_worker) != draft or (draft and not watcher.draft):
        return None
    return watcher


@_shared
def arms_by_size(module: ModuleType) -> tuple[type, dict[str, Any]]:
    """0.5.1 - 0.5.13: each batch size is captured once per arm, and replayed for the step's."""
    owner = module.CudaGraphRunner
    return owner, {**_by_size(owner, "bs"), "capture": _told(_method(owner, "capture"), _draft_by_size)}


def _draft_by_size(owner: type) -> dict[str, Any]:
    replay = _drafting(_method(owner, "replay", "forward_batch"))
    return {**_by_size(owner, "num_seqs", draft=True), "replay": replay}


def _by_size(owner: type, size: str, draft: bool = False) -> dict[str, Any]:
    capture_one = _method(owner, "capture_one_batch_size", size, "forward")

    @functools.wraps(capture_one)
    def capture_one_batch_size(self: Any, bs: int, *args: Any, **kwargs: Any) -> Any:
        watcher = _watcher(self, draft)
        if watcher is None:
            return capture_one(self, bs, *args, **kwargs)
        for name in ("graphs", "output_buffers"):
            if type(getattr(self, name)) is dict:
                setattr(self, name, ByArm(getattr(self, name)))
        graphs, outputs = {}, {}

        def one(label: str) -> None:
            with watcher.capturing(label, draft) as calls:
                graph, output = capture_one(self, bs, *args, **kwargs)
            graphs[label], outputs[label] = _Counted(graph, calls), output

        _capture_all(watcher, one, draft)
        return _Variants(graphs), _Variants(outputs)

    return {"capture_one_batch_size": capture_one_batch_size}


@_shared
def arms_by_key(module: ModuleType) -> tuple[type, dict[str, Any]]:
    """From 0.5.14: each shape is captured once per arm under a key with the arm in its label."""
    owner = module.DecodeCudaGraphRunner
    return owner, {**_by_key(owner), "capture": _told(_method(owner, "capture"), _draft_by_key)}


def _draft_by_key(owner: type) -> dict[str, Any]:
    ours = _by_key(owner, draft=True)
    return {**ours, "execute": _drafting(ours["execute"])}


def _by_key(owner: type, draft: bool = False) -> dict[str, Any]:
    capture_one = _method(owner, "capture_one_shape", "size", "forward")
    make_key = _method(owner, "_make_graph_key")
    execute_ = _method(owner, "execute", "forward_batch")

    def known(self: Any) -> dict[Any, dict[str, int]]:
        """Our keys, with the calls of ours in each graph."""
        return vars(self).setdefault("_mla_patch_keys", {})

    @functools.wraps(make_key)
    def _make_graph_key(self: Any, *args: Any, **kwargs: Any) -> Any:
        key = make_key(self, *args, **kwargs)
        watcher = _watcher(self, draft)
        if watcher is None:
            return key
        making = vars(self).get("_mla_patch_making")  # a capture: the key is about to exist
        label = watcher.label if making is None else making[0]
        ours = dataclasses.replace(key, variant_label=f"{key.variant_label or ''}+{label}") if label else key
        if making is not None:
            making[1].append(ours)
        elif label and ours not in known(self):
            watcher.missing = True
            ours = key
        self._mla_patch_key = ours
        return ours

    @functools.wraps(capture_one)
    def capture_one_shape(self: Any, size: int, *args: Any, **kwargs: Any) -> Any:
        watcher = _watcher(self, draft)
        if watcher is None:
            return capture_one(self, size, *args, **kwargs)

        def one(label: str) -> Any:
            keys: list[Any] = []
            self._mla_patch_making = label, keys
            try:
                with watcher.capturing(label, draft) as calls:
                    result = capture_one(self, size, *args, **kwargs)
            finally:
                self._mla_patch_making = None
            # 0.5.23 captures a draft model's size twice, with and without its proposal's distribution: alike to us
            each = {name: count // max(len(keys), 1) for name, count in calls.items()}
            known(self).update(dict.fromkeys(keys, each))
            return result

        return _capture_all(watcher, one, draft)

    @functools.wraps(execute_)
    def execute(self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = execute_(self, forward_batch, *args, **kwargs)
        watcher = _watcher(self, draft)
        if watcher is not None:
            # a draft model's runner keeps its key to itself
            key = vars(self).get("_mla_patch_key") if draft else self._replay_graph_key
            watcher.replayed(known(self).get(key, {}))
        return output

    return {"capture_one_shape": capture_one_shape, "_make_graph_key": _make_graph_key, "execute": execute}


def _drafting(original: Callable[..., Any]) -> Callable[..., Any]:
    """A replay of a draft model's graph, as one that begins and ends."""

    @functools.wraps(original)
    def wrapped(self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        watcher = _watcher(self, draft=True)
        if watcher is None:
            return original(self, forward_batch, *args, **kwargs)
        watcher.begin_draft()
        return _until_end(watcher, original, self, forward_batch, args, kwargs)

    return wrapped


def _edit_draft(runner: Any, edit: Callable[[type], dict[str, Any]]) -> bool:
    """Have a draft model's graph runner choose arms; False where it is not one that decodes, or has changed."""
    owner = next((c for c in type(runner).__mro__ if c.__name__ == "EAGLEDraftCudaGraphRunner"), None)
    if owner is None:
        return False
    if owner not in _drafts:
        try:
            _drafts[owner] = set_methods(owner, edit(owner))
        except Exception as problem:
            log.warning("mla-patch: the draft model's graphs keep the host's arm: %s", problem)
            return False
    return True


class _Cost:
    """What the captures of one runner took: seconds and bytes, the host's arm and the others'."""

    def __init__(self) -> None:
        self.seconds = {"host": 0.0, "more": 0.0}
        self.bytes = {"host": 0, "more": 0}
        self.graphs = {"host": 0, "more": 0}

    def add(self, which: str, seconds: float, taken: int) -> None:
        self.seconds[which] += seconds
        self.bytes[which] += taken
        self.graphs[which] += 1

    def text(self) -> str:
        h, m = "host", "more"
        return (
            f"{self.graphs[h]} graphs of the host's arm in {self.seconds[h]:.1f} s and {_mib(self.bytes[h])}, "
            f"{self.graphs[m]} of other arms in {self.seconds[m]:.1f} s and {_mib(self.bytes[m])}"
        )


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


_cost: _Cost | None = None  # of the capture that is under way


def _capture_all(watcher: steps.Watcher, one: Callable[[str], Any], draft: bool) -> Any:
    """Capture one size for the host's arm, whose failure is the host's, then for the others."""

    def timed(which: str, label: str) -> Any:
        free, start = gpu.free_memory(), time.perf_counter()
        try:
            return one(label)
        finally:
            if _cost is not None:
                _cost.add(which, time.perf_counter() - start, max(free - gpu.free_memory(), 0))

    first = _cost is not None and not _cost.graphs["host"]
    result = timed("host", "")
    labels = watcher.labels(draft)
    for label in labels:
        try:
            timed("more", label)
        except Exception as problem:
            watcher.failed(label, problem)
        if first and _cost is not None:
            # of the host's first graph the host's own compiles and allocations are a part: it foretells nothing
            first = False
            log.warning(
                "mla-patch: every CUDA graph%s is captured %d more times (%s); the first of these, of the largest "
                "size, took %.1f s and %s",
                " of the draft model" * draft, len(labels), "; ".join(labels), _cost.seconds["more"],
                _mib(_cost.bytes["more"]),
            )  # fmt: skip
    return result


def _told(capture: Callable[..., Any], edit_draft: Callable[[type], dict[str, Any]]) -> Callable[..., Any]:
    """``capture``, with its cost told before, by the first size, and after. Draft models' runners come here, too."""

    @functools.wraps(capture)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _cost
        draft = bool(self.model_runner.is_draft_worker)
        if _watcher(self, draft) is None or _cost is not None or (draft and not _edit_draft(self, edit_draft)):
            return capture(self, *args, **kwargs)
        _cost = cost = _Cost()
        try:
            result = capture(self, *args, **kwargs)
        finally:
            _cost = None
        if cost.graphs["more"]:
            log.warning("mla-patch: captured %s", cost.text())
        return result

    return wrapped
