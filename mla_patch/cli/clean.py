"""``mla-patch clean``: remove the releases that ``--fetch`` has downloaded, and nothing else."""

from __future__ import annotations

import argparse

from mla_patch.cli import show
from mla_patch.cli.exits import OK, Misuse
from mla_patch.drive import sglang_fetch


def clean(args: argparse.Namespace) -> int:
    """Remove the cache of fetched releases, which an uninstall leaves."""
    try:
        told = sglang_fetch.clean()
    except RuntimeError as problem:
        raise Misuse(f"clean: {problem}") from None
    if args.json:
        show.as_json(told)
        return OK
    if not told["removed"]:
        show.lines([f"nothing to remove in {told['directory']}"])
    else:
        many = f"{len(told['removed'])} folders" if len(told["removed"]) > 1 else "1 folder"
        show.lines([f"removed {many}, {told['bytes'] / 1e6:.0f} MB, from {told['directory']}"])
    if told["left"]:
        show.lines([f"kept, because it is not from mla-patch: {', '.join(told['left'])}"])
    return OK
