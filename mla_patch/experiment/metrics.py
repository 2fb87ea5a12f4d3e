"""Prometheus metrics of an experiment, for an engine that exposes metrics.

Engines with several processes set PROMETHEUS_MULTIPROC_DIR. If it is set and prometheus_client is installed, our
metrics go to the same directory, and the engine's own endpoint shows them. The engine's thread only appends to a
bounded queue; a thread of ours does the rest.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from typing import Any

from mla_patch.experiment.record import Error, Note, Row, Timing

log = logging.getLogger("mla_patch")
VARIABLES = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
ERRORS = (1e-5, 1e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 1)
ROWS = 8192  # rows that may wait to be counted; when there are more, the oldest are dropped


class Metrics:
    """The metrics of this process. ``add`` is for the engine's thread, ``count`` for a thread of ours."""

    def __init__(self, client: Any, registry: Any = None) -> None:
        more = {} if registry is None else {"registry": registry}
        self._step = client.Histogram(
            "mla_patch_step_seconds",
            "Device time of a forward step",
            ("feature", "arm", "mode"),
            buckets=SECONDS,
            **more,
        )
        self._error = client.Histogram(
            "mla_patch_shadow_error", "Relative error of a shadow comparison", ("feature",), buckets=ERRORS, **more
        )
        self._nan = client.Counter(
            "mla_patch_shadow_nan", "Elements that are NaN or infinite in our result alone", ("feature",), **more
        )
        self._trips = client.Counter(
            "mla_patch_breaker_trips", "Features sent back to the engine's kernel", ("feature",), **more
        )
        self._rows: deque[Row] = deque(maxlen=ROWS)

    def add(self, row: Row) -> None:
        self._rows.append(row)

    def count(self) -> None:
        for _ in range(len(self._rows)):
            row = self._rows.popleft()
            if isinstance(row, Timing):
                mode = row.bucket.partition("/")[0]
                self._step.labels(row.feature, row.arm, mode).observe(row.us / 1e6)
            elif isinstance(row, Error):
                self._error.labels(row.feature).observe(row.relative)
                self._nan.labels(row.feature).inc(row.nan)
            elif isinstance(row, Note) and row.what == "breaker":
                self._trips.labels(row.feature).inc()


_made: Metrics | None = None  # prometheus_client accepts each name once per process


def metrics() -> Metrics | None:
    """The metrics of this process, or None if the engine exposes none."""
    global _made
    if _made is None and any(os.environ.get(name) for name in VARIABLES):
        try:
            import prometheus_client

            _made = Metrics(prometheus_client)
        except Exception as problem:
            log.warning("mla-patch: no metrics: %r", problem)
    return _made
