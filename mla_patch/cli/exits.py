"""Exit statuses, and what a command raises when its command line cannot be acted on."""

from __future__ import annotations

OK, FINDING, MISUSE, ERROR, INTERRUPTED = 0, 1, 2, 3, 130


class Misuse(Exception):
    """The command line cannot be acted on; the text says why."""
