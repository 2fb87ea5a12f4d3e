"""How many of our kernels Triton has compiled in this process. Standard library only, since reports read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Compiles:
    """Compiles of our kernels, also those that Triton finds in its cache on disk: either holds up a call.

    ``before`` counts those before the first call was served, and all of a warm-up; ``serving`` counts the others.
    """

    def __init__(self) -> None:
        self.has_served: Callable[[], bool] = lambda: False  # set by whoever counts calls
        self.seen = True  # False where this Triton does not let us count
        self.before = self.serving = 0
        self._warming = 0

    @property
    def total(self) -> int:
        return self.before + self.serving

    def note(self) -> None:
        """One more kernel has been compiled."""
        if self._warming or not self.has_served():
            self.before += 1
        else:
            self.serving += 1

    @contextmanager
    def warming(self) -> Iterator[None]:
        """What is compiled inside holds up no call: a later model's warm-up, say."""
        self._warming += 1
        try:
            yield
        finally:
            self._warming -= 1

    def reset(self) -> None:
        """Start from nothing, as a forked child does."""
        self.before = self.serving = self._warming = 0

    def as_dict(self) -> dict[str, int] | None:
        return {"before": self.before, "serving": self.serving} if self.seen else None


COMPILES = Compiles()
