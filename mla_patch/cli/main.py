"""mla-patch: check what the plugin would do on this machine, see what it did in an engine, and compare kernels.

Exit status: 0 fine, 1 a finding, 2 misuse, 3 an error of mla-patch itself, 130 interrupted by Ctrl-C.
Every command has ``--json``.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from mla_patch.cli import show
from mla_patch.cli.exits import ERROR, FINDING, INTERRUPTED, MISUSE, OK, Misuse
from mla_patch.cli.parser import make_parser

__all__ = ["ERROR", "FINDING", "INTERRUPTED", "MISUSE", "OK", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Nothing but argparse's own exit leaves it as an exception."""
    _open_streams()
    args = None
    try:
        args = make_parser().parse_args(argv)
        status = int(args.command(args))
        sys.stdout.flush()  # a full disk or a closed pipe is told here, not by the interpreter's last words
        return status
    except Misuse as problem:
        show.complain(str(problem))
        return MISUSE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # who read has read enough
        _drop_stdout()
        return OK
    except OSError as problem:  # of a disk, a descriptor, a child: the machine's
        show.complain(f"{args.name if args else ''}: {problem}")
        _drop_stdout()
        return ERROR
    except BaseException as problem:
        if args is None:  # argparse has said it
            with suppress(OSError):
                sys.stdout.flush()
                raise
            _drop_stdout()
            raise
        show.complain(f"{args.name}: {type(problem).__name__}: {problem}")
        if args.traceback:
            for line in traceback.format_exc().splitlines():
                show.complain(line)
        else:
            show.complain(f"this is an error of mla-patch itself; `mla-patch --traceback {args.name} ...` shows where")
        return ERROR


def _open_streams() -> None:
    """Streams that take any text, also where a caller has closed them, lest the next file gets their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # for the process's life
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_stdout() -> None:
    """Lose what stdout still holds: the interpreter would complain of it at its end."""
    with suppress(OSError, ValueError):
        stdout = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stdout)
        os.close(nowhere)
