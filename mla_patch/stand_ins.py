"""What is put in the place of a host's function or kernel: it looks like the original and hands calls to `dispatch`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import wrapt

from mla_patch.compat import dynamo
from mla_patch.dispatch import EntryPoint, prepare_for_dynamo


def _is_method(function: Any) -> bool:
    return "." in getattr(function, "__qualname__", "").rpartition("<locals>.")[2]


class _Named:
    """Copied and pickled as functions are: itself, and by its name. A bare proxy would raise in a host that does it."""

    __slots__ = ()

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        original = self.__wrapped__  # type: ignore[attr-defined]
        return getattr(original, "__qualname__", original.__name__)


class _Opaque:
    """To Dynamo what it is, which nobody can trace, and to all others what it stands for; see `compat.dynamo`."""

    __slots__ = ()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        tracer = dynamo.asks(sys._getframe(1))
        original = self.__wrapped__  # type: ignore[attr-defined]
        if tracer is None:
            return original.__class__
        if not tracer.may_break:
            self._self_entry.counts.trace(tracer.graph)  # type: ignore[attr-defined]
            return original.__class__
        if type(self) is FunctionStandIn and _is_method(original):
            raise dynamo.unsupported(f"mla-patch serves {original.__qualname__}")  # Dynamo would call it unbound
        return type(self)


class _BoundStandIn(_Opaque, wrapt.BoundFunctionWrapper):
    """A `FunctionStandIn` that was got from an instance or a class."""

    __slots__ = ()

    @property
    def _self_entry(self) -> EntryPoint:
        return self._self_parent._self_entry


class FunctionStandIn(_Opaque, _Named, wrapt.FunctionWrapper):
    """Takes the place of a host's function or method; looks like it in every other respect."""

    __bound_function_wrapper__ = _BoundStandIn

    def __init__(self, original: Any, site: EntryPoint) -> None:
        super().__init__(original, site.dispatch)
        self._self_entry = site


class KernelStandIn(_Opaque, _Named, wrapt.CallableObjectProxy):
    """Takes the place of a host's kernel object, launched as ``kernel[grid](...)``.

    ``run``, ``warmup``, ``fn`` and the rest stay the host's.
    """

    def __init__(self, original: Any, site: EntryPoint) -> None:
        super().__init__(original)
        self._self_entry = site

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            return self._self_entry.dispatch(self.__wrapped__[grid], grid, args, kwargs)

        return launch


def is_ours(value: Any) -> bool:
    """Whether ``value`` is a stand-in of ours; asked of anything, so by its real type alone."""
    return issubclass(type(value), (FunctionStandIn, KernelStandIn))


def stand_in(original: Any, kind: str, site: EntryPoint) -> FunctionStandIn | KernelStandIn:
    """What is put in ``original``'s place."""
    prepare_for_dynamo()
    return KernelStandIn(original, site) if kind == "kernel" else FunctionStandIn(original, site)
