"""Which exceptions end the process, and how strict ends it. Standard library only."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType
from typing import NoReturn

PATIENCE = 1.0  # seconds for what is still to be written, where a thread ends the process


class StrictExit(SystemExit):
    """The end of the process that ``MLA_PATCH_STRICT=1`` asks for; its text is the reason."""


def end(text: str) -> NoReturn:
    """End the process with ``text`` on stderr and exit status 1, from whichever thread.

    The main thread raises StrictExit, so that exit handlers run. Any other thread would swallow that without a word
    and let the engine run on, so it ends the process at once, by os._exit: a signal to the main thread may be caught
    or never seen, and waiting for the main thread, which may be waiting for this import, could hang.

    Raises:
        StrictExit: in the main thread.
    """
    if threading.current_thread() is threading.main_thread():
        raise StrictExit(text)
    try:
        # what the engine has printed so far is not to be lost; a stream that is stuck must not keep the process alive
        writer = threading.Thread(target=_write, args=(text,), daemon=True)
        writer.start()
        writer.join(PATIENCE)
    finally:
        os._exit(1)


def must_pass(problem: BaseException) -> bool:
    """Whether an exception that a plugin's code raised is not the plugin's: Ctrl-C, strict's exit, a signal's exit."""
    if isinstance(problem, (KeyboardInterrupt, StrictExit)):
        return True
    return isinstance(problem, SystemExit) and not _handlers().isdisjoint(_code_of(problem))


def pass_on(problem: BaseException) -> None:
    """Raise an exception again that is not the plugin's whose code has raised it: see must_pass."""
    if must_pass(problem):
        raise problem


def text_of(problem: BaseException, form: Callable[[object], str] = repr) -> str:
    """The words of an exception that a plugin's or an engine's code raised, whatever its own methods do."""
    try:
        return form(problem)
    except BaseException as another:
        pass_on(another)
        return f"{type(problem).__name__}, which cannot be printed"


def _write(text: str) -> None:
    for stream, line in ((sys.stdout, ""), (sys.stderr, f"{text}\n")):
        try:
            stream.write(line)
            stream.flush()
        except Exception:  # closed, or none at all
            pass


def _handlers() -> set[CodeType]:
    """The code of this process's signal handlers: one may run in the middle of any function, and exit."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = [getattr(getattr(one, "__func__", one), "__code__", None) for one in handlers]
    return {code for code in codes if code is not None}


def _code_of(problem: BaseException) -> Iterator[CodeType]:
    step = problem.__traceback__
    while step is not None:
        yield step.tb_frame.f_code
        step = step.tb_next
