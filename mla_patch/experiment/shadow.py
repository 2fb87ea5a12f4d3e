"""How far two arms are apart, reduced on the device and fetched without a sync.

    rows   [slots, 7] float64   sequence, step, tag, max abs d, norm of d, norm of the host, elements bad in ours
    count  [1] int64            rows written so far, on the device: a replayed graph writes on where it left off
    step   [1] float64          set before the step, outside any graph

d is ours less the host's where both are finite. An element is bad where ours is NaN or infinite and the host's is
not; where the host's is not finite, nothing is said.

A comparison allocates by shapes alone and can be captured. `Drain` copies rows and count to pinned memory on a
stream of its own, the count before and after: rows below the first count are whole, and those which the second
count says may be overwritten are dropped. Its ``poll`` is for the step path, not for a thread, since asking after
an event spoils a graph that another thread captures; ``take`` touches no device and is for a thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mla_patch.compat import gpu
from mla_patch.experiment.record import Error

if TYPE_CHECKING:
    import torch

_, STEP, TAG, MAX_ABS, DIFF, REF, BAD = range(7)


class Ring:
    """Where one feature's comparisons go on one device."""

    def __init__(self, device: Any, slots: int = 1024) -> None:
        import torch

        self.slots = slots
        self.rows = torch.zeros(slots, 7, dtype=torch.float64, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.float64, device=device)
        self.ended = 0  # shadow steps

    def begin(self, step: int) -> None:
        """Before a shadow step, eager or replayed."""
        self.step.fill_(step)

    def end(self) -> None:
        """After it; the drain then has something to fetch."""
        self.ended += 1

    def compare(self, host: torch.Tensor, ours: torch.Tensor, tag: int = 0) -> None:
        """Write one row. What a graph's batch is padded with is compared, too: both arms have computed it.

        Raises:
            ValueError: shapes that differ.
        """
        import torch

        if host.shape != ours.shape:
            raise ValueError(f"ours: shape {tuple(ours.shape)}, expected the host's {tuple(host.shape)}")
        if not host.numel():
            return
        wide = torch.float32 if host.is_floating_point() and host.dtype != torch.float64 else torch.float64
        h, o = host.detach().to(wide), ours.detach().to(wide)
        known, fine = h.isfinite(), o.isfinite()
        d = (o - h).masked_fill_(~(known & fine), 0)
        row = [
            self.count.view(()).double(),
            self.step.view(()),
            torch.full((), tag, dtype=torch.float64, device=h.device),
            d.abs().amax().double(),
            torch.linalg.vector_norm(d, dtype=torch.float64),
            torch.linalg.vector_norm(h.masked_fill(~known, 0), dtype=torch.float64),
            (known & ~fine).sum().double(),
        ]
        self.rows.index_copy_(0, self.count % self.slots, torch.stack(row).unsqueeze(0))
        self.count.add_(1)


class _Now:
    """The event of a device that has done everything when it returns."""

    def query(self) -> bool:
        return True


class Drain:
    """Fetches a ring's rows: ``poll`` at each step, ``take`` wherever they are wanted."""

    def __init__(
        self, ring: Ring, feature: str, *, capturing: Callable[[], bool] = gpu.capturing, copy: Any = None
    ) -> None:
        """``copy(targets, sources) -> event``: for tests; as it is, a copy on a side stream."""
        import torch

        self.ring = ring
        self.feature = feature
        self.lost = 0  # rows that were overwritten before they were fetched
        self.problem = ""
        cuda = ring.rows.is_cuda
        self._host = [
            torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=cuda)
            for tensor in (ring.count, ring.rows, ring.count)
        ]
        self._stream = torch.cuda.Stream(ring.rows.device) if cuda else None
        self._copy = copy or (self._copy_aside if cuda else _copy_now)
        self._capturing = capturing
        self._event: Any = None
        self._ready = False
        self._fetched = 0  # shadow steps that are on their way or taken
        self._next = 0  # the row to take next

    def poll(self) -> None:
        """Start a copy, or see whether one has arrived; waits for nothing, never raises."""
        if self._ready or (self._event is None and self._fetched == self.ring.ended) or self._capturing():
            return
        try:
            if self._event is None:
                ring = self.ring
                self._fetched = ring.ended
                self._event = self._copy(self._host, (ring.count, ring.rows, ring.count))
            elif self._event.query():
                self._event, self._ready = None, True
        except Exception as problem:  # the device's error is the engine's to raise
            self._event, self.problem = None, repr(problem)

    def _copy_aside(self, targets: list[torch.Tensor], sources: tuple[torch.Tensor, ...]) -> Any:
        import torch

        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            assert self._stream is not None
            self._stream.wait_stream(torch.cuda.current_stream(sources[0].device))
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            event.record()
        return event

    def take(self) -> list[Error]:
        """The comparisons that have arrived, oldest first."""
        if not self._ready:
            return []
        before, table, after = self._host
        end = int(before[0])
        first = max(self._next, int(after[0]) - self.ring.slots + 1)  # the one before may be in the making
        numbers = range(first, end)
        table = table[[number % self.ring.slots for number in numbers]].tolist()
        found = [_error(self.feature, row) for number, row in zip(numbers, table, strict=True) if row[0] == number]
        self.lost += end - self._next - len(found)
        self._next = end
        self._ready = False
        return found


def _copy_now(targets: list[torch.Tensor], sources: tuple[torch.Tensor, ...]) -> Any:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
    return _Now()


def _error(feature: str, row: list[float]) -> Error:
    if row[REF] > 0:
        relative = row[DIFF] / row[REF]
    else:
        relative = 0.0 if row[DIFF] == 0 else math.inf
    return Error(int(row[STEP]), feature, int(row[TAG]), row[MAX_ABS], relative, int(row[BAD]))
