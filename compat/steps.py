"""What a host's step and graph runner tell an experiment, and what it tells them. Standard library only.

The edits in a host's own file (``sglang_graphs``) call ``watcher``, which ``experiment.live`` sets.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol


class Rank(NamedTuple):
    """Which process of which run this is."""

    run: str  # the same for the ranks that step together, and for no others
    rank: int
    ranks: int
    device: str  # "cuda", "cuda:0", "cpu"


class Work(NamedTuple):
    """What one step does, from numbers that the host has in Python."""

    kind: str  # "decode" or "prefill"
    batch: int  # requests
    context: int  # their mean length


class Watcher(Protocol):
    """An experiment, as the edits see it. Nothing of it raises into the host but what a captured graph raises."""

    draft: bool  # draft models' decode steps are under test, too
    label: str  # the graphs that this step is to replay; "" for the host's arm
    missing: bool  # this step's label has no graph, so the host's was replayed

    def begin(self, rank: Callable[[], Rank], step: int) -> None:
        """A forward step of the host begins; ``rank`` is asked once."""

    def begin_draft(self) -> None:
        """A draft model decodes, in a graph or not, with the arm of the target model's step before it."""

    def end(self, work: Callable[[], Work | None] | None) -> None:
        """It has ended; ``work`` says what it was, None that it was nothing to compare, no ``work`` that it failed."""

    def capturing(self, label: str, draft: bool = False) -> AbstractContextManager[dict[str, int]]:
        """A graph is captured for ``label``; what comes back is, once it is, the calls of ours in it, by feature."""

    def labels(self, draft: bool = False) -> list[str]:
        """What each size is captured for beside "", known once one size has been."""

    def failed(self, label: str, problem: Exception) -> None:
        """A further capture failed: its arms are not run."""

    def replayed(self, calls: dict[str, int]) -> None:
        """A graph with these calls of ours was replayed."""


watcher: Watcher | None = None
