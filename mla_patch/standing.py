"""What stands now where ours was put: asked of the process, never remembered.

The report asks several times a second, from a thread of its own. So nothing here imports, runs code of what it looks
at, or raises: a lazy module stays unloaded, and a proxy is not asked for its ``__class__``.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

_names_of_a_module = vars(types.ModuleType)["__dict__"].__get__
_names_of_a_class = vars(type)["__dict__"].__get__
_mro_of_a_class = vars(type)["__mro__"].__get__
_DEPTH = 64  # objects that are looked at below one wrapper: wrappers can be wound in a circle


def is_a(value: Any, *kinds: type) -> bool:
    """``isinstance`` by the real type alone: what a program keeps may raise when it is asked for its ``__class__``."""
    return issubclass(type(value), kinds)


def names_of(value: Any) -> Mapping[str, Any]:
    """The ``__dict__`` of ``value``, or nothing."""
    if is_a(value, types.ModuleType):
        return _names_of_a_module(value) or {}
    if is_a(value, type):
        return cast(Mapping[str, Any], _names_of_a_class(value))
    names = attribute_of(value, "__dict__")
    return names if is_a(names, dict, types.MappingProxyType) else {}


def own(holder: Any, attribute: str) -> Any:
    """What ``holder`` itself binds to ``attribute``, descriptors untouched."""
    return names_of(holder).get(attribute)


def attribute_of(value: Any, attribute: str) -> Any:
    """An attribute by the interpreter's own look-up, without the type's ``__getattr__``; None for any failure."""
    try:
        return object.__getattribute__(value, attribute)
    except Exception:
        return None


def text_of(value: Any) -> str:
    """``value`` where it is text: modules and classes can be given names and homes of any kind."""
    return value if is_a(value, str) else ""


def find(module: types.ModuleType, path: str) -> tuple[Any, Any]:
    """What holds the last name of ``path`` ("function", "Class.method") in a module, and what is bound to it there."""
    holder: Any = module
    *outer, attribute = path.split(".")
    for name in outer:
        holder = own(holder, name)
    if not is_a(holder, type):
        return holder, own(holder, attribute)
    return holder, next((own(c, attribute) for c in _mro_of_a_class(holder) if attribute in names_of(c)), None)


def is_found(holder: Any) -> bool:
    """Whether a module or class is the one that an import of its name finds now: it may have been imported again."""
    if is_a(holder, types.ModuleType):
        return sys.modules.get(text_of(own(holder, "__name__"))) is holder
    if is_a(holder, type):
        home = sys.modules.get(text_of(own(holder, "__module__")))
        return own(home, vars(type)["__name__"].__get__(holder)) is holder
    return holder is not None


def reaches(value: Any, wanted: Callable[[Any], bool]) -> bool:
    """Whether ``value`` is what is wanted, or calls it as far as can be seen.

    Seen are ``__wrapped__``, what a method, a partial or an instance keeps, a closure, and the global names that a
    function's code loads.
    """
    todo: list[Any] = [value]
    seen: set[int] = set()
    while todo and len(seen) < _DEPTH:
        one = todo.pop(0)
        if wanted(one):
            return True
        if id(one) not in seen:
            seen.add(id(one))
            todo += _below(one)
    return False


def _below(value: Any) -> Iterator[Any]:
    if is_a(value, types.ModuleType, type, str, bytes, int, float, tuple, list, dict, set):
        return
    yield from (attribute_of(value, "__wrapped__"), attribute_of(value, "__func__"))
    if is_a(value, types.MethodType):
        yield value.__self__
    elif is_a(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif is_a(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not filled yet
                continue
        for name in _globals_of(value.__code__):
            yield value.__globals__.get(name)
    else:
        yield from list(names_of(value).values())


@functools.lru_cache(maxsize=64)
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    return tuple({step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"})


def describe(value: Any) -> str:
    """What ``value`` is and where it was written, as "module:name". Wrappers are told by their own code."""
    if value is None:
        return "nothing"
    wrapper = attribute_of(value, "_self_wrapper")  # wrapt's: all else of it is what it wraps
    if wrapper is not None:
        return describe(wrapper)
    value = attribute_of(value, "__func__") or value
    if is_a(value, types.FunctionType):
        code = value.__code__
        # functools.wraps copies the names of what is wrapped, not the code
        copied = code.co_name if "__wrapped__" in names_of(value) else text_of(value.__qualname__)
        return f"{text_of(value.__globals__.get('__name__'))}:{getattr(code, 'co_qualname', copied)}"
    kind = value if is_a(value, type) else type(value)
    home = f"{text_of(attribute_of(kind, '__module__'))}:{attribute_of(kind, '__qualname__')}"
    return home if kind is value else f"an instance of {home}"
