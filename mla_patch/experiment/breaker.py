"""Back to the host: this rank at once, the others at a step that the control file states."""

from __future__ import annotations

import math
from collections.abc import Callable

from mla_patch.experiment.record import Error


class Breaker:
    """One feature's, in one rank. Trips once and stays tripped.

    ``stop(reason)`` sends this rank to the host and says so once (`Switch.trip`); ``publish(reason)`` tells the
    other ranks (`Control.trip` with the feature).
    """

    __slots__ = ("_publish", "_stop", "reason", "tolerance")

    def __init__(
        self, tolerance: float, stop: Callable[[str], None], publish: Callable[[str], None] | None = None
    ) -> None:
        self.tolerance = tolerance
        self.reason = ""  # why it tripped
        self._stop = stop
        self._publish = publish

    def trip(self, reason: str, *, told: bool = False) -> None:
        """``told``: by another rank, which has published it."""
        if self.reason:
            return
        self.reason = reason
        self._stop(reason)
        if self._publish is not None and not told:
            self._publish(reason)

    def check(self, error: Error) -> None:
        """Judge one shadow comparison."""
        if error.nan:
            problem = f"{error.nan} NaN or infinite elements that the host does not have"
        elif not error.relative <= self.tolerance:  # a NaN is no pass
            problem = f"error {error.relative:.3g}, tolerance {self.tolerance:g}"
            if not math.isfinite(error.relative):
                problem = f"error {error.relative}, expected at most {self.tolerance:g}"
        else:
            return
        self.trip(f"shadow check at step {error.step}, layer {error.tag}: {problem}")
