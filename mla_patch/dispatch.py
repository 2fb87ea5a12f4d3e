"""The one road from a host's call to a kernel: bind, decline, pick an arm, serve, count, guard.

A hook says what a call is, which calls are not ours and how ours are served. Everything else
about a call happens here, so that counting, the breaker and experiments are the same for all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import wrapt

from mla_patch.compat import gpu
from mla_patch.compat.types import Gpu
from mla_patch.features import Counts, Final, State

log = logging.getLogger("mla_patch")

HOST, PATCH = "host", "patch"
SHADOW = "shadow"  # not an arm: the host's serves, and ours runs beside it on the same inputs
Serve = Callable[[Any], Any]
Declines = Callable[[Any], "str | None"]
Twin = Callable[[Any], "tuple[Any, list[tuple[Any, Any]]]"]


class Arms(Protocol):
    """Who chooses, call by call, among the arms of a site. An experiment implements it."""

    candidate: str  # the arm that a shadow check runs beside the host's

    def choose(self, site: Site, call: Any) -> str:
        """The arm that serves ``call``: ``host``, ``patch``, a name in ``site.arms``, or ``shadow``."""

    def compare(self, pairs: list[tuple[Any, Any]]) -> None:
        """What the host's and the candidate made of the same call: (host's, ours), tensors."""

    def attach(self, switch: Switch, counts: Counts) -> None:
        """The feature is in place, with this switch."""

    def stopped(self, reason: str) -> None:
        """The host serves from here on."""


@dataclass(frozen=True)
class ArmCode:
    """One arm of a site, resolved."""

    serve: Serve
    declines: Declines


class Switch:
    """What holds for all entry points of one feature in this process; read at every call."""

    __slots__ = ("arms", "check", "off", "on_stop", "plain", "stopped")

    def __init__(self, on_stop: Callable[[str, State], None]) -> None:
        self.off = False  # restored: whoever still holds ours reaches the host
        self.stopped = ""  # the breaker's reason, or what the first call's device decided against ours
        self.arms: Arms | None = None
        # asked at the first call, then never again: the state that this device means for the feature, or None
        self.check: Callable[[Gpu], tuple[State, str] | None] | None = None
        self.on_stop = on_stop  # (reason, state)
        self.plain = True  # none of the above: one test on the fast path

    def set(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self, name, value)
        self.plain = not (self.off or self.stopped or self.arms or self.check)

    def trip(self, reason: str) -> None:
        """The breaker: from now on the host serves; said once."""
        if not self.stopped:
            self.set(stopped=reason)
            self.on_stop(reason, State.FAILED)


class Site:
    """One entry point of a host in which ours has been put."""

    __slots__ = ("arms", "bind", "counts", "declines", "name", "serve", "switch", "twin")

    def __init__(
        self,
        name: str,
        bind: Callable[..., Any],
        arms: dict[str, ArmCode],
        counts: Counts,
        switch: Switch,
        twin: Twin | None = None,
    ):
        self.name = name
        self.bind = bind
        self.arms = arms
        self.serve, self.declines = arms[PATCH].serve, arms[PATCH].declines
        self.counts = counts
        self.switch = switch
        self.twin = twin  # a call -> the same with outputs of its own, and (host's, ours) to compare

    def dispatch(self, host: Callable[..., Any], first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve one call of the host's, or hand it to ``host``.

        ``first`` goes before ``args`` when the call is bound: the instance of a method, the grid of
        a kernel, None for a function. ``host`` has it already.
        """
        switch, counts = self.switch, self.counts
        if switch.off or switch.stopped:
            return host(*args, **kwargs)
        try:
            call = self.bind(*args, **kwargs) if first is None else self.bind(first, *args, **kwargs)
        except TypeError as problem:
            counts.decline(_unbound(problem))
            return host(*args, **kwargs)
        except Exception as problem:
            switch.trip(f"{self.name}: bind: {problem!r}")
            return host(*args, **kwargs)
        serve, declines = self.serve, self.declines
        if not switch.plain:
            try:
                if switch.check is not None:
                    self._check_hardware(call)
                name = switch.arms.choose(self, call) if switch.arms is not None else PATCH
                arm = None if name in (HOST, SHADOW) or switch.stopped else self.arms[name]
            except Exception as problem:
                switch.trip(f"{self.name}: choosing an arm: {problem!r}")
                return host(*args, **kwargs)
            if arm is None:
                if name == SHADOW and not switch.stopped:
                    return self._shadow(host, call, args, kwargs)
                return host(*args, **kwargs)
            serve, declines = arm.serve, arm.declines
        try:
            reason = declines(call)
        except Exception as problem:  # nothing has been launched: the host can still serve, under capture too
            switch.trip(f"{self.name}: declines: {problem!r}")
            return host(*args, **kwargs)
        if reason is not None:
            counts.decline(reason)
            return host(*args, **kwargs)
        try:
            result = serve(call)
        except ValueError as problem:  # a launcher's refusal, before its launch
            counts.decline(str(problem))
            return host(*args, **kwargs)
        except Final as final:
            counts.decline(str(final))
            raise final.refusal from None
        except Exception as problem:
            if gpu.capturing():
                # part of ours may be in the graph already: the host must not record over it
                raise
            switch.trip(f"{self.name}: {problem!r}")
            return host(*args, **kwargs)
        counts.served += 1
        if gpu.capturing():
            counts.captured += 1
        return result

    def _shadow(self, host: Callable[..., Any], call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the candidate beside the host's on the same inputs; what the model gets is the host's."""
        switch, counts, arms = self.switch, self.counts, self.switch.arms
        assert arms is not None and self.twin is not None  # or nobody would have chosen it
        reason: str | None = None
        pairs: list[tuple[Any, Any]] = []
        try:
            arm = self.arms[arms.candidate]
            reason = arm.declines(call)
            if reason is None:
                # ours first: a host that works in place would change what ours reads
                ours, pairs = self.twin(call)
                arm.serve(ours)
        except (ValueError, Final) as problem:
            reason = str(problem)
        except Exception as problem:
            if gpu.capturing():
                raise
            switch.trip(f"{self.name}: {problem!r}")
            return host(*args, **kwargs)
        result = host(*args, **kwargs)
        if reason is not None:
            counts.decline(reason)
            return result
        counts.served += 1
        if gpu.capturing():
            counts.captured += 1
        try:
            arms.compare(pairs)
        except Exception as problem:
            if gpu.capturing():
                raise
            switch.trip(f"{self.name}: comparing: {problem!r}")
        return result

    def _check_hardware(self, call: Any) -> None:
        for name in getattr(type(call), "__slots__", None) or vars(call):
            value = getattr(call, name)
            if getattr(value, "is_cuda", False):
                device = gpu.from_tensor(value)
                switch, check = self.switch, self.switch.check
                verdict = check(device) if check is not None and device is not None else None
                switch.set(check=None, stopped=verdict[1] if verdict else switch.stopped)
                if verdict:
                    switch.on_stop(verdict[1], verdict[0])
                return


def _unbound(problem: TypeError) -> str:
    """What is wrong with the arguments, in words that do not change from call to call."""
    _, found, rest = str(problem).partition("unexpected keyword argument ")
    # newer Pythons go on: 'scal'. Did you mean 'scale'?
    name = rest.strip("'").partition("'")[0]
    return f"unknown argument {name}" if found else f"arguments: {problem}"


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


class FunctionStandIn(_Named, wrapt.FunctionWrapper):
    """Takes the place of a host's function or method; looks like it in every other respect."""

    def __init__(self, original: Any, site: Site) -> None:
        super().__init__(original, site.dispatch)
        self._self_site = site


class KernelStandIn(_Named, wrapt.CallableObjectProxy):
    """Takes the place of a host's kernel object, launched as ``kernel[grid](...)``.

    ``run``, ``warmup``, ``fn`` and the rest stay the host's.
    """

    def __init__(self, original: Any, site: Site) -> None:
        super().__init__(original)
        self._self_site = site

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            return self._self_site.dispatch(self.__wrapped__[grid], grid, args, kwargs)

        return launch


def is_ours(value: Any) -> bool:
    """Whether ``value`` is a stand-in of ours; asked of anything, so by its real type alone."""
    return issubclass(type(value), (FunctionStandIn, KernelStandIn))


def stand_in(original: Any, kind: str, site: Site) -> FunctionStandIn | KernelStandIn:
    """What is put in ``original``'s place."""
    return KernelStandIn(original, site) if kind == "kernel" else FunctionStandIn(original, site)
