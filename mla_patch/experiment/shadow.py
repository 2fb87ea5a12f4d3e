"""Measures how far the results of two arms differ: reduced on the device, fetched without a sync.

Tensors of a `Ring`, all on the device:

    rows   [slots, 7] float64   sequence number, step, tag (the layer), max |d|, norm of d, norm of the engine's result,
                                number of bad elements
    count  [1] int64            rows written so far; on the device, so that a replayed graph continues the count
    step   [1] float64          written before the step, outside any graph

d is our result minus the engine's, over the elements in which both are finite; norms are Frobenius norms. An element is
bad if it is NaN or infinite in our result and finite in the engine's. Elements that are not finite in the engine's
result are ignored.

A comparison allocates by shapes alone, so it can be captured in a CUDA graph. A `Drain` copies the rows to pinned
memory on a side stream, and the count both before and after them. Rows below the first count are complete. Rows that
may have been overwritten according to the second count are dropped. ``Drain.poll`` must be called from the engine's
thread, because querying an event invalidates a graph that another thread is capturing. ``Drain.take`` does not touch
the device and may be called from any thread.
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
    """A ring buffer on one device for the comparisons of one feature."""

    def __init__(self, device: Any, slots: int = 1024) -> None:
        import torch

        self.slots = slots
        self.rows = torch.zeros(slots, 7, dtype=torch.float64, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.float64, device=device)
        self.ended = 0  # shadow steps so far

    def begin(self, step: int) -> None:
        """Call before a shadow step, eager or replayed."""
        self.step.fill_(step)

    def end(self) -> None:
        """Call after a shadow step. The drain then has something to fetch."""
        self.ended += 1

    def compare(self, host: torch.Tensor, ours: torch.Tensor, tag: int = 0) -> None:
        """Compare two results and write one row.

        Padding of a graph's batch is compared as well, since both arms have computed it.

        Raises:
            ValueError: the shapes differ.
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
    """An event for the CPU, where a copy is complete when it returns."""

    def query(self) -> bool:
        return True


class Drain:
    """Fetches the rows of a ring: call ``poll`` at every step, and ``take`` when you want the rows."""

    def __init__(
        self, ring: Ring, feature: str, *, capturing: Callable[[], bool] = gpu.capturing, copy: Any = None
    ) -> None:
        """``copy(targets, sources) -> event`` replaces the copy on a side stream, for tests."""
        import torch

        self.ring = ring
        self.feature = feature
        self.lost = 0  # rows overwritten before they were fetched
        self.problem = ""  # the last error of the device
        cuda = ring.rows.is_cuda
        self._host = [
            torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=cuda)
            for tensor in (ring.count, ring.rows, ring.count)
        ]
        self._stream = torch.cuda.Stream(ring.rows.device) if cuda else None
        self._copy = copy or (self._copy_aside if cuda else _copy_now)
        self._capturing = capturing
        self._event: Any = None
        self._ready = False  # whether a copy has arrived that ``take`` has not read
        self._fetched = 0  # shadow steps of which a copy was started
        self._next = 0  # sequence number of the next row to take

    def poll(self) -> None:
        """Start a copy, or check whether one has arrived. Never waits and never raises."""
        if self._ready or (self._event is None and self._fetched == self.ring.ended) or self._capturing():
            return
        try:
            if self._event is None:
                ring = self.ring
                self._fetched = ring.ended
                self._event = self._copy(self._host, (ring.count, ring.rows, ring.count))
            elif self._event.query():
                self._event, self._ready = None, True
        except Exception as problem:  # an error of the device: the engine meets it as well and raises it
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
        """The comparisons that have arrived and were not taken before, oldest first."""
        if not self._ready:
            return []
        before, table, after = self._host
        end = int(before[0])
        first = max(self._next, int(after[0]) - self.ring.slots + 1)  # the row before it may be half written
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
