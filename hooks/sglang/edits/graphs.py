"""SGLang's decode graphs are captured once per arm of an experiment, and each step replays its arm's.

* Where the runner keeps graphs by batch size, each pair of graph and output becomes one pair for each arm, and both
  dicts look up the step's arm.
* Where it keeps them by key, the key's variant_label gets the step's arm, beside what the engine says there. The arms
  and the engine's own attention variants multiply.

Draft models' graph runners are found when they capture, so that their module is nobody's to wait for. Draft extends and
prefill graphs keep the engine's arm in any case.

Each arm is captured with the engine's own method, so from the engine's one memory pool, on its stream, after its
warm-ups.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from mla_patch.compat import gpu, steps
from mla_patch.compat.sglang.graphs import BY_KEY, DRAFT_RUNNER, RUNNER, graph_runners
from mla_patch.compat.types import Edit, Undo
from mla_patch.hooks.editing import checked_method, set_methods, shared_edit
from mla_patch.hooks.sglang.edits.steps import until_end, watch_steps

log = logging.getLogger("mla_patch")


def step_targets(version: str | None) -> tuple[Edit, ...]:
    """The edits that an experiment needs in ``version``; where it is unknown, for every graph runner."""
    graphs = [Edit(home, "graphs", arms_by_key if home == BY_KEY else arms_by_size) for home in graph_runners(version)]
    return Edit(RUNNER, "ModelRunner.step", watch_steps), *graphs


_drafts: dict[type, Undo] = {}  # draft models' graph runners that have been edited, too


def _forget_drafts() -> None:
    while _drafts:
        _drafts.popitem()[1]()


class ByArm(dict[Any, Any]):
    """A runner's graphs, or their outputs, under the engine's keys: reading a key gives that of the step's arm."""

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


@shared_edit(at_end=_forget_drafts)
def arms_by_size(module: ModuleType) -> tuple[type, dict[str, Any]]:
    """0.5.1 - 0.5.13: each batch size is captured once per arm, and replayed for the step's."""
    owner = module.CudaGraphRunner
    return owner, {**_by_size(owner, "bs"), "capture": _with_cost(checked_method(owner, "capture"), _draft_by_size)}


def _draft_by_size(owner: type) -> dict[str, Any]:
    replay = _drafting(checked_method(owner, "replay", "forward_batch"))
    return {**_by_size(owner, "num_seqs", draft=True), "replay": replay}


def _by_size(owner: type, size: str, draft: bool = False) -> dict[str, Any]:
    capture_one = checked_method(owner, "capture_one_batch_size", size, "forward")

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


@shared_edit(at_end=_forget_drafts)
def arms_by_key(module: ModuleType) -> tuple[type, dict[str, Any]]:
    """From 0.5.14: each shape is captured once per arm under a key with the arm in its label."""
    owner = module.DecodeCudaGraphRunner
    return owner, {**_by_key(owner), "capture": _with_cost(checked_method(owner, "capture"), _draft_by_key)}


def _draft_by_key(owner: type) -> dict[str, Any]:
    methods = _by_key(owner, draft=True)
    return {**methods, "execute": _drafting(methods["execute"])}


def _by_key(owner: type, draft: bool = False) -> dict[str, Any]:
    capture_one = checked_method(owner, "capture_one_shape", "size", "forward")
    make_key = checked_method(owner, "_make_graph_key")
    execute_ = checked_method(owner, "execute", "forward_batch")

    def known(self: Any) -> dict[Any, dict[str, int]]:
        """Our keys, with the calls in each graph that our code served."""
        return vars(self).setdefault("_mla_patch_keys", {})

    @functools.wraps(make_key)
    def _make_graph_key(self: Any, *args: Any, **kwargs: Any) -> Any:
        key = make_key(self, *args, **kwargs)
        watcher = _watcher(self, draft)
        if watcher is None:
            return key
        making = vars(self).get("_mla_patch_making")  # a capture: the key is about to exist
        label = watcher.label if making is None else making[0]
        with_arm = dataclasses.replace(key, variant_label=f"{key.variant_label or ''}+{label}") if label else key
        if making is not None:
            making[1].append(with_arm)
        elif label and with_arm not in known(self):
            watcher.missing = True
            with_arm = key
        self._mla_patch_key = with_arm
        return with_arm

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
        return until_end(watcher, original, self, forward_batch, args, kwargs)

    return wrapped


def _edit_draft(runner: Any, edit: Callable[[type], dict[str, Any]]) -> bool:
    """Have a draft model's graph runner choose arms; False where it is not one that decodes, or has changed."""
    owner = next((c for c in type(runner).__mro__ if c.__name__ == DRAFT_RUNNER), None)
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
    """What the captures of one runner took, in seconds and bytes: for the host arm and for the others."""

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
    """Capture one size for the host arm, whose failure is the engine's to handle, then for the others."""

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
            # the engine compiles and allocates while it captures its first graph, which therefore foretells nothing
            first = False
            log.warning(
                "mla-patch: every CUDA graph%s is captured %d more times (%s); the first of these, of the largest "
                "size, took %.1f s and %s",
                " of the draft model" * draft, len(labels), "; ".join(labels), _cost.seconds["more"],
                _mib(_cost.bytes["more"]),
            )  # fmt: skip
    return result


def _with_cost(capture: Callable[..., Any], edit_draft: Callable[[type], dict[str, Any]]) -> Callable[..., Any]:
    """``capture``, which logs its cost: an estimate after the first size, and the sum. Draft runners use it, too."""

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
