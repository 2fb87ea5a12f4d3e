"""Tells when a host's modules are imported. Read at interpreter start: imports nothing.

CPython asks finders under the one lock that every import of the process needs. A finder that imports, waits or runs a
plugin there holds up all other threads, for good where one of them has what it waits for. So `HostFinder` only finds,
and wraps the loader of what it has found. The wrapper works when the module is executed: its thread holds the lock of
that module then, as all code of the module does, and no other.

Nothing here takes a lock: a registration and the end of an import meet in lists and dicts, whose single operations are
atomic.
"""

import sys

TYPE_CHECKING = False  # typing itself would cost a millisecond in every interpreter
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_before: "dict[str, Callable[[str], None]]" = {}  # module -> what is called before it is executed
_after: "dict[str, list[Callable[[ModuleType], None]]]" = {}  # module -> what is called once, when it has been executed
_executing: "dict[str, ModuleType]" = {}
_executed: "dict[str, ModuleType]" = {}  # its code has run, and what waits for that is being called
_installed: "dict[str, HostFinder]" = {}
PATIENCE = 1.0  # seconds


class HostFinder:
    """Finds what the finders behind it find, and nothing but modules that somebody here waits for."""

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "ModuleSpec | None":
        if name not in _before and name not in _after:
            return None
        finders = list(sys.meta_path)  # those before this one have been asked
        own = next((at for at, finder in enumerate(finders) if finder is self), -1)
        for finder in finders[own + 1 :]:
            find = None if type(finder) is HostFinder else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find is not None else None
            if spec is None:
                continue
            loader: Any = spec.loader
            # a namespace package has no code, and is no engine
            if hasattr(loader, "exec_module") and not is_namespace(spec) and type(loader) is not _Loader:
                spec.loader = _Loader(loader)  # type: ignore[assignment]
            return spec
        return None


class _Loader:
    """A module's own loader, that tells when the module is executed. All else it passes on."""

    def __init__(self, loader: "Any") -> None:
        self._own = loader

    def __getattr__(self, name: str) -> "Any":
        if name == "_own":  # not there yet, as when this is unpickled
            raise AttributeError(name)
        return getattr(self._own, name)

    __class__ = property(lambda self: type(self._own))  # for isinstance()

    def exec_module(self, module: "ModuleType") -> None:
        name = module.__name__
        _executing[name] = module  # before the wrapper goes: see when_imported
        # the module, its code and whoever looks at it see the loader that they would see without us
        if module.__dict__.get("__loader__") is self:
            module.__loader__ = self._own
        spec: Any = module.__dict__.get("__spec__")
        if getattr(spec, "loader", None) is self:
            spec.loader = self._own
        try:
            if name in _before:
                _before[name](name)
            self._own.exec_module(module)
        finally:
            _executing.pop(name, None)
        _executed[name] = module
        try:
            _call(name, module)
        finally:
            _executed.pop(name, None)


def before(name: str, act: "Callable[[str], None]") -> None:
    """Have ``act(name)`` called each time that the module is executed, before its own code."""
    _before[name] = act
    _install()


def when_imported(name: str, act: "Callable[[ModuleType], None]") -> None:
    """Have ``act(module)`` called once: at the end of the module's import, or now where it has been imported.

    Where another thread is in the middle of that import, ``act`` runs when it has ended; the caller waits a second at
    most, since that thread may be waiting for the caller.
    """
    calls = _after.setdefault(name, [])
    _install()
    calls.append(act)
    # Asked in this order: whoever executes the module has put it into _executing before the wrapper goes, and looks
    # for calls once it is out of there. So either the call is seen there, or the end of the execution is seen here.
    module = sys.modules.get(name)
    if module is None or type(getattr(_spec(module), "loader", None)) is _Loader:
        return
    if name in _executing:
        return
    if is_initializing(module):
        _call_later(name, act)
    else:
        _call_one(name, act, module)


def when_executed_again(name: str, act: "Callable[[ModuleType], None]") -> None:
    """Have ``act(module)`` called once, when the module is executed next: reloaded, or dropped and imported again."""
    calls = _after.setdefault(name, [])
    if act not in calls:
        calls.append(act)


def is_executed_now(name: str) -> bool:
    """Whether a module that somebody here waits for is being executed, the first time or again."""
    return name in _executing or name in _executed


def is_initializing(module: "Any") -> bool:
    """Whether the import system is still at work on ``module``, so that nobody can have kept a thing of it."""
    if any(one is module for one in list(_executed.values())):
        return True  # importlib.reload() does not say so of its modules
    return bool(getattr(_spec(module), "_initializing", False))


def is_namespace(spec: "ModuleSpec | None") -> bool:
    """Whether a package has no code of its own: a folder without an ``__init__``."""
    return spec is not None and (spec.loader is None or "NamespaceLoader" in type(spec.loader).__name__)


def _spec(module: "Any") -> "Any":
    """The module's ``__spec__``; a lazy module is not made to load for it, and other objects may be found there."""
    try:
        return object.__getattribute__(module, "__dict__").get("__spec__")
    except Exception:
        return None


def _install() -> None:
    finder = HostFinder()
    if _installed.setdefault("finder", finder) is finder:
        sys.meta_path.insert(0, finder)


def _call(name: str, module: "ModuleType") -> None:
    calls = _after.get(name, [])
    for _ in range(len(calls)):  # what is called may ask for the next time
        try:
            act = calls.pop(0)
        except IndexError:
            return
        try:
            act(module)
        except BaseException:  # an end of the process that somebody may swallow: the next import must meet it again
            calls.insert(0, act)
            raise


def _call_one(name: str, act: "Callable[[ModuleType], None]", module: "ModuleType") -> None:
    """Of those who wait only this one: the others are there for the module's next execution."""
    calls = _after[name]
    try:
        calls.remove(act)
    except ValueError:  # whoever executed the module has called it
        return
    try:
        act(module)
    except BaseException:  # as above
        calls.insert(0, act)
        raise


def _call_later(name: str, act: "Callable[[ModuleType], None]") -> None:
    """The module was found before anybody waited for it, so that its loader is not ours: wait for its import."""
    import threading
    from importlib import import_module

    def wait() -> None:
        try:
            import_module(name)
        except BaseException:  # the host's own, told where the host imports it
            return
        _call_one(name, act, sys.modules[name])

    thread = threading.Thread(target=wait, name="mla-patch-import", daemon=True)
    thread.start()
    thread.join(PATIENCE)
