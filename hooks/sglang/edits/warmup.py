"""Our kernels are compiled once one of SGLang's backends is built, before it captures graphs or serves."""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable
from typing import Any

from mla_patch.compat.named import named
from mla_patch.compat.types import Undo
from mla_patch.hooks.editing import Undoing, say_once, set_methods

log = logging.getLogger("mla_patch")


class _Warming:
    """An ``__init__`` with warm-ups at its end: those of all features, so that each can be taken back alone."""

    def __init__(self, owner: type) -> None:
        original = vars(owner)["__init__"]
        if tuple(inspect.signature(original).parameters)[:2] != ("self", "model_runner"):
            raise TypeError(f"{owner.__qualname__}.__init__ does not take (model_runner, ...)")
        self.asked: list[tuple[str | Callable[[Any], int], Callable[[Any, Any], Any]]] = []

        @functools.wraps(original)
        def init(backend: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
            original(backend, model_runner, *args, **kwargs)
            for warm, find in tuple(self.asked):
                warm_up(warm, backend, model_runner, find)

        self.init = init
        self.put_back = set_methods(owner, {"__init__": init})


_warming: dict[type, _Warming] = {}  # by the class that a module has


def warm_once_built(owner: type, warm: str | Callable[[Any], int], find: Callable[[Any, Any], Any]) -> Undo:
    """Have instances of ``owner`` warmed up at the end of their ``__init__``; see ``warm_up``."""
    if owner not in _warming or vars(owner)["__init__"] is not _warming[owner].init:
        _warming[owner] = _Warming(owner)
    shared, asked = _warming[owner], (warm, find)
    shared.asked.append(asked)

    def undo() -> None:
        shared.asked.remove(asked)
        if not shared.asked:
            shared.put_back()

    return Undoing(undo, shared.put_back.places)


def warm_up(warm: str | Callable[[Any], int], backend: Any, runner: Any, find: Callable[[Any, Any], Any]) -> None:
    """Call ``warm`` with what ``find`` says that ``backend`` can be asked; None: nothing. It says how many it compiled.

    Nothing in it may fail the engine.
    """
    try:
        asked = find(backend, runner)
        if asked:
            start = time.perf_counter()
            compiled = named(warm)(asked)
            if compiled:
                log.info("mla-patch: %d kernels compiled in %.1f s", compiled, time.perf_counter() - start)
    except Exception as problem:
        say_once("warmup", "no warm-up, so kernels compile at their first calls: %r", problem)
