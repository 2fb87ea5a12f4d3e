"""Wakes the plugin when a host appears. Imported at interpreter start: nothing heavy at module level.

Nothing here takes a lock. Plugins, hosts and hooks import, and a thread that imports may wait for any other: a lock
around that would hang the process. Threads that come at once do the same work twice where they must, and all go on
with what the first of them has published.
"""

import os
import sys

from mla_patch.compat import HOST_PACKAGES
from mla_patch.imports import before, is_namespace

TYPE_CHECKING = False  # typing itself would cost a millisecond in every interpreter
if TYPE_CHECKING:
    from typing import Any

    from mla_patch.session import Session


_published: "dict[str, Session]" = {}
_started: "dict[str, object]" = {}
_directory: "str | None" = None  # in which this process started, as far as can be told


def start() -> None:
    """Watch for the hosts; at once if one is here already. Idempotent, and cheap: no host, no work."""
    own = object()
    if _started.setdefault("by", own) is not own:  # atomic, as every single operation of a dict
        return
    _note_directory()
    for name in HOST_PACKAGES:
        before(name, on_host_import)
    for name in HOST_PACKAGES:
        module = sys.modules.get(name)
        if module is not None and not is_namespace(getattr(module, "__spec__", None)):
            on_host_import(name)


def _note_directory() -> None:
    global _directory
    try:
        _directory = _directory or os.getcwd()
    except OSError:  # it has been removed
        pass


def started() -> bool:
    return bool(_started)


def on_host_import(package: str) -> None:
    """A host is being imported: load plugins, judge features, wait for its modules.

    Raises:
        StrictExit: ``MLA_PATCH_STRICT=1``, and an asked-for feature cannot be had or a flag is bad.
    """
    try:
        from mla_patch import endings
    except Exception as problem:
        _unpatched(package, problem)
        return
    try:
        _get_session().on_host_import(package)
    except BaseException as problem:
        endings.pass_on(problem)
        _unpatched(package, problem)


def _unpatched(package: str, problem: BaseException) -> None:
    try:
        sys.stderr.write(f"mla-patch: {package} runs unpatched: {problem!r}\n")
    except Exception:  # a daemon may have closed it, or never had it
        pass


def apply(*features: str) -> None:
    """Apply features ("kv_indices" or "kv_indices@sglang"), or with no name all that their flags leave on.

    Works before and after the host is imported. A feature that cannot be had is told in ``report()``
    and in a warning.

    Raises:
        ValueError: a name that is no feature; says the nearest one.
        SystemExit: ``MLA_PATCH_STRICT=1``, and a feature cannot be had.
    """
    session = _get_session()
    session.check(features)
    session.activate(dict.fromkeys(features, "on"), "apply()", lambda f: not features or any(map(f.matches, features)))


def restore(*features: str) -> None:
    """Give back to the host what ``features`` (none: all) took. What somebody still holds passes calls on.

    Raises:
        ValueError: a name that is no feature; says the nearest one.
    """
    session = _get_session()
    session.check(features)
    for label, run in session.patcher.runs.copy().items():
        if not features or any(map(run.feature.matches, features)):
            session.patcher.restore(label)


def report() -> "dict[str, Any]":
    """This process's report, as it stands in its file under MLA_PATCH_REPORT."""
    return _get_session().report.as_dict()


def _get_session() -> "Session":
    session = _published.get("session")
    if session is None:
        from mla_patch import plugins
        from mla_patch.session import Session

        _note_directory()
        made = Session(plugins.load(), os.environ, _directory)
        session = _published.setdefault("session", made)  # a thread may have been faster
        if session is made:
            made.begin()
    return session
