"""The few lines that run at interpreter start, from mla_patch.pth or mla_patch.start."""

import os

import mla_patch


def run() -> None:
    """Start the plugin where ``MLA_PATCH`` is on; never raises into the interpreter."""
    if os.environ.get("MLA_PATCH", "").strip().lower() in mla_patch.OFF:
        return
    try:
        from mla_patch import startup

        startup.start()
    except Exception as problem:  # a broken plugin must not take Python down with it
        import sys

        if sys.stderr is not None:  # a daemon may have closed it
            sys.stderr.write(f"mla-patch: not started: {problem!r}\n")
