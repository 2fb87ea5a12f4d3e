"""A last call in a process that ends normally. Nothing can be done for one that is killed, or that calls os._exit.

`atexit` alone does not do: children that multiprocessing forks end by os._exit, after its own finalizers. Those are
used where multiprocessing has been imported; this module never imports it. Both may run: the call must bear that.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import Any

LATE = -100  # multiprocessing runs finalizers of a lower priority later; its own have 0 and more, or -5


class AtExit:
    """Calls ``last`` when this process ends normally, in this process alone: a forked child makes its own.

    Whoever makes one keeps it. What ``last`` raises is dropped, since there is nobody to tell.
    """

    def __init__(self, last: Callable[[], object]) -> None:
        self._last = last
        self._pid = os.getpid()
        self._finalizer: Any = None
        atexit.register(self._run)
        util = sys.modules.get("multiprocessing.util")
        if util is not None:
            # a child of multiprocessing forgets all finalizers when it begins, then calls what is registered here
            util.register_after_fork(self, AtExit._finalize)
            self._finalize()

    def cancel(self) -> None:
        """Do not call; nor in this process's children."""
        self._pid = 0
        atexit.unregister(self._run)
        if self._finalizer is not None:
            self._finalizer.cancel()

    def _finalize(self) -> None:
        if self._pid == os.getpid():
            util = sys.modules["multiprocessing.util"]
            self._finalizer = util.Finalize(None, self._run, exitpriority=LATE)

    def _run(self) -> None:
        if self._pid != os.getpid():
            return
        try:
            self._last()
        except Exception:
            pass
