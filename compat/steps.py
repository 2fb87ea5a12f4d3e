"""The protocol between the edits in an engine's step and graph runner and an experiment. Standard library only.

An engine's edits (for SGLang those in ``hooks/sglang/edits``) call ``watcher``, which ``experiment.live`` sets.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol


class RankInfo(NamedTuple):
    """The place of a process in a run."""

    run: str  # the same for all ranks that step together, and different from every other run
    rank: int
    ranks: int
    device: str  # "cuda", "cuda:0", "cpu"


class StepInfo(NamedTuple):
    """The size of one step, from numbers that the engine has in Python."""

    kind: str  # "decode" or "prefill"
    batch: int  # requests
    context: int  # mean length of the requests, in tokens


class Watcher(Protocol):
    """An experiment, as the edits see it. None of its methods raises into the engine.

    A label names the arms of a CUDA graph, such as ``decode=patch``. The label of the engine's own arm is empty.
    """

    draft: bool  # whether decode steps of draft models are part of the experiment
    label: str  # the label of the graphs that this step should replay
    missing: bool  # set by the edits: there is no graph for the label, so the engine's graph was replayed

    def begin(self, rank: Callable[[], RankInfo], step: int) -> None:
        """A forward step of the engine begins. ``rank`` is called once, at the first step."""

    def begin_draft(self) -> None:
        """A draft model decodes, in a graph or eagerly, with the arm of the target model's step before it."""

    def end(self, work: Callable[[], StepInfo | None] | None) -> None:
        """The step has ended.

        ``work`` returns its size, or None if the step is not to be compared. If the step failed, ``work``
        is None.
        """

    def capturing(self, label: str, draft: bool = False) -> AbstractContextManager[dict[str, int]]:
        """A context in which a graph for ``label`` is captured.

        Afterwards the dictionary has the number of our calls in the graph, for each feature.
        """

    def labels(self, draft: bool = False) -> list[str]:
        """The labels other than "" for which each size is captured. Known once one size has been captured."""

    def failed(self, label: str, problem: Exception) -> None:
        """The capture for ``label`` failed, so its arms are not run."""

    def replayed(self, calls: dict[str, int]) -> None:
        """A graph with these calls of ours, by feature, was replayed."""


watcher: Watcher | None = None
