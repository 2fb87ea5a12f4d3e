"""Times steps on the device with pairs of events, which are read later, when the device has passed them.

``begin`` and ``end`` record the events of a step. ``harvest`` reads the oldest pairs that the device has passed and
never waits. The pool is bounded. If no pair is free, a step is not timed. If the device does not reach a pair for many
steps, the pair is given up. Both cases are counted. During stream capture the pool neither records nor queries events,
since either would invalidate the graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from mla_patch.compat import gpu


class Event(Protocol):
    """The methods of ``torch.cuda.Event(enable_timing=True)`` that we call."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def elapsed_time(self, end_event: Any, /) -> float: ...


def device_event() -> Event:
    """An event of the current device. ``record`` puts it into the current stream."""
    import torch

    return torch.cuda.Event(enable_timing=True)


class EventPool:
    """Times one span per step. ``about`` says what is timed; it is returned with the time, unchanged."""

    __slots__ = (
        "_begun", "_capturing", "_free", "_make", "_open", "_pending", "_room", "dropped", "patience", "untimed"
    )  # fmt: skip

    def __init__(
        self,
        make: Callable[[], Event] = device_event,
        *,
        capacity: int = 256,
        patience: int = 8192,
        capturing: Callable[[], bool] = gpu.capturing,
    ) -> None:
        """``capacity``: pairs at most. ``patience``: steps after which a pair that is not done is given up."""
        self.patience = patience
        self.untimed = 0  # steps for which no pair was free
        self.dropped = 0  # pairs that were begun and gave no time
        self._make = make
        self._room = capacity  # pairs that may still be created
        self._capturing = capturing
        self._free: list[tuple[Event, Event]] = []
        self._pending: deque[tuple[int, Any, tuple[Event, Event]]] = deque()
        self._open: tuple[Event, Event] | None = None
        self._begun = 0

    def begin(self) -> None:
        if self._capturing():
            return
        self._begun += 1
        if self._open is not None:  # the engine left the step before it ended
            self.dropped += 1
            self._free.append(self._open)
            self._open = None
        if self._free:
            pair = self._free.pop()
        elif self._room:
            self._room -= 1
            pair = self._make(), self._make()
        else:
            self.untimed += 1
            return
        pair[0].record()
        self._open = pair

    def end(self, about: Any) -> None:
        if self._open is not None and not self._capturing():
            pair, self._open = self._open, None
            pair[1].record()
            self._pending.append((self._begun, about, pair))

    def harvest(self, limit: int = 4) -> list[tuple[Any, float]]:
        """``(about, microseconds)`` of up to ``limit`` pairs that the device has passed, oldest first."""
        done: list[tuple[Any, float]] = []
        if self._capturing():
            return done
        for _ in range(limit):
            if not self._pending:
                break
            begun, about, pair = self._pending[0]
            try:
                if not pair[1].query():
                    if self._begun - begun <= self.patience:
                        break
                    self._give_up()
                    continue
                done.append((about, pair[0].elapsed_time(pair[1]) * 1e3))
            except Exception:  # an error of the device: the engine meets it as well and raises it
                self._give_up()
                continue
            self._pending.popleft()
            self._free.append(pair)
        return done

    def _give_up(self) -> None:
        self._pending.popleft()  # its events are not reused, since the device may still reach them
        self._room += 1
        self.dropped += 1
