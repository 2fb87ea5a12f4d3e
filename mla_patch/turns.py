"""Work on one feature, one piece at a time, without a lock that a host's import could hang on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mla_patch.imports import PATIENCE


class Turns:
    """Work on one feature, one piece at a time and in order, without anybody waiting for the work of another.

    An edit of the host may import, and so wait for a thread that is importing something else and wants its own turn
    here. So whoever comes while another thread is at work leaves the work to that thread and goes on. A look imports
    nothing and is short: whoever comes meanwhile waits for its end, or the host's import would go on without ours.
    """

    def __init__(self) -> None:
        self.todo: list[tuple[Callable[[], None], Callable[[], None]]] = []
        self.renew()

    def renew(self) -> None:
        """In a forked child: the thread that was at work is not there."""
        self.busy = threading.Lock()  # somebody is at work, or looks
        self.owner = 0  # the thread that is at work; 0 while somebody looks

    def take(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        """Have ``work`` done in turn, and ``then`` called after it and outside of any turn."""
        if self.owner == threading.get_ident():  # the work itself asks, as an edit that imports the next module does
            work()
            then()
            return
        self.todo.append((work, then))
        self._work()

    def look(self, look: Callable[[], None], then: Callable[[], None]) -> None:
        """Have ``look`` done, and ``then`` called after it, where nobody is at work: who is looks in the end."""
        if not self.busy.acquire(blocking=False):
            return
        try:
            look()
        finally:
            self.busy.release()
        self._work()  # of those who did not wait so long
        then()

    def _work(self) -> None:
        # looked at again after each turn: who has come meanwhile has found the turn taken and is gone
        while self.todo and self.busy.acquire(timeout=0 if self.owner else PATIENCE):
            done: list[Callable[[], None]] = []
            self.owner = threading.get_ident()
            try:
                while self.todo:
                    work, then = self.todo.pop(0)
                    done.append(then)
                    work()
            finally:
                self.owner = 0
                self.busy.release()
            for then in done:
                then()
