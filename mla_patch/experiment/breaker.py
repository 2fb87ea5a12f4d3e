"""Sends a feature back to the engine's own kernel: this rank at once, other ranks at a step in the control file."""

from __future__ import annotations

import math
from collections.abc import Callable

from mla_patch.experiment.record import Error


class Breaker:
    """The breaker of one feature in one rank. Trips once and stays tripped.

    ``stop(reason)`` makes this rank run the engine's kernel and logs the reason once. ``publish(reason)`` tells the
    other ranks.
    """

    __slots__ = ("_publish", "_stop", "reason", "tolerance")

    def __init__(
        self, tolerance: float, stop: Callable[[str], None], publish: Callable[[str], None] | None = None
    ) -> None:
        self.tolerance = tolerance
        self.reason = ""  # why it tripped; empty while it has not
        self._stop = stop
        self._publish = publish

    def trip(self, reason: str, *, told: bool = False) -> None:
        """Trip, unless tripped already. ``told``: another rank tripped first and has published the reason."""
        if self.reason:
            return
        self.reason = reason
        self._stop(reason)
        if self._publish is not None and not told:
            self._publish(reason)

    def check(self, error: Error) -> None:
        """Trip if one shadow comparison found NaN or infinite elements, or too large an error."""
        if error.nan:
            problem = f"{error.nan} elements are NaN or infinite in our result and finite in the engine's"
        elif not error.relative <= self.tolerance:  # written so that a NaN trips
            problem = f"error {error.relative:.3g}, tolerance {self.tolerance:g}"
            if not math.isfinite(error.relative):
                problem = f"error {error.relative}, expected at most {self.tolerance:g}"
        else:
            return
        self.trip(f"shadow check at step {error.step}, layer {error.tag}: {problem}")
