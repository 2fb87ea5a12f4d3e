"""The one road from a host's call to a kernel: bind, decline, pick an arm, serve, count, guard.

A hook says what a call is, which calls are not ours and how ours are served. Everything else
about a call happens here, so that counting, the breaker and experiments are the same for all.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mla_patch import endings, imports
from mla_patch.compat import dynamo, gpu
from mla_patch.compat.types import HOST, PATCH, SHADOW, Gpu
from mla_patch.failures import fields_of, is_out_of_memory, made_up, odd_argument, passes
from mla_patch.features import CallRejected, Counts, State

log = logging.getLogger("mla_patch")

Serve = Callable[[Any], Any]
Declines = Callable[[Any], "str | None"]
ShadowClone = Callable[[Any], "tuple[Any, list[tuple[Any, Any]] | None]"]


# How much the breaker bears before it gives a feature up in this process. A served call starts the first two anew.
MALFORMED = 32  # calls in a row at which `bind` or `declines` raises the same error: that is no odd call, that is us
IN_A_ROW = 3  # failures of `serve` that can pass, such as an out-of-memory
AN_HOUR = 16  # of these, whatever was served between them
PAUSE = 1.0  # seconds in which the host serves after an out-of-memory: one step's layers would fail one after the other
PAUSED = "left to the engine for one second after an out-of-memory"

_compiled: Callable[[], Any] = type(None)  # whether this thread runs what torch.compile has made
_outside: Callable[..., Any] | None = None  # `EntryPoint.dispatch`, with nothing of it compiled
_waits: list[Any] = []  # what Dynamo is to leave alone once it is imported


class ArmSelector(Protocol):
    """Who chooses, call by call, among the arms of a site. An experiment implements it."""

    candidate: str  # the arm that a shadow check runs beside the host's

    def choose(self, site: EntryPoint, call: Any) -> str:
        """The arm that serves ``call``: ``host``, ``patch``, a name in ``site.arms``, or ``shadow``."""

    def compare(self, pairs: list[tuple[Any, Any]]) -> None:
        """What the host's and the candidate made of the same call: (host's, ours), tensors."""

    def attach(self, switch: FeatureGate, counts: Counts) -> None:
        """The feature is in place, with this switch."""

    def stopped(self, reason: str) -> None:
        """The host serves from here on."""


@dataclass(frozen=True)
class ArmCode:
    """One arm of a site, resolved."""

    serve: Serve
    declines: Declines


class FeatureGate:
    """What holds for all entry points of one feature in this process; read at every call."""

    __slots__ = (
        "arms",
        "check",
        "failed",
        "fast_path",
        "in_a_row",
        "malformed",
        "off",
        "on_idle",
        "on_stop",
        "pause",
        "stopped",
    )

    def __init__(
        self, on_stop: Callable[[str, State], None], on_idle: Callable[[str], None] = lambda reason: None
    ) -> None:
        self.off = False  # restored: whoever still holds ours reaches the host
        self.stopped = ""  # the breaker's reason, or what the first call's device decided against ours
        self.arms: ArmSelector | None = None
        # asked at the first call, then never again: the state that this device means for the feature at the entry point
        # of that name, or None
        self.check: Callable[[Gpu, str], tuple[State, str] | None] | None = None
        self.on_stop = on_stop  # (reason, state)
        self.on_idle = on_idle  # (reason): none of the first calls was served, all for this one reason
        self.malformed = "", 0, 0  # the last error of `bind` or `declines`, calls served by then, how often in a row
        self.in_a_row = 0, 0  # calls served when `serve` last failed in passing, how often in a row
        self.failed: deque[float] = deque(maxlen=AN_HOUR)  # when it did, time.monotonic()
        self.pause = 0.0  # the host serves until then, time.monotonic(); 0: ours does
        self.fast_path = True  # none of the above: one test on the fast path

    def set(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self, name, value)
        self.fast_path = not (self.off or self.stopped or self.arms or self.check or self.pause)

    def trip(self, reason: str) -> None:
        """The breaker: from now on the host serves; said once."""
        if not self.stopped:
            self.set(stopped=reason)
            self.on_stop(reason, State.FAILED)

    def bears_malformed(self, text: str, served: int) -> bool:
        """Whether an error of `bind` or `declines` is still the call's fault rather than ours."""
        last, then, times = self.malformed
        times = times + 1 if (last, then) == (text, served) else 1
        self.malformed = text, served, times
        return times < MALFORMED

    def bears_failure(self, served: int) -> bool:
        """Whether a failure of `serve` that can pass is within the limits."""
        then, times = self.in_a_row
        times = times + 1 if then == served else 1
        self.in_a_row = served, times
        now = time.monotonic()
        self.failed.append(now)
        return times < IN_A_ROW and (len(self.failed) < AN_HOUR or now - self.failed[0] > 3600)

    def is_paused(self) -> bool:
        """Whether the pause after an out-of-memory lasts. A graph is captured with ours: it would keep the host's."""
        if time.monotonic() < self.pause:
            return not gpu.capturing()
        self.set(pause=0.0)
        return False


class EntryPoint:
    """One entry point of a host in which ours has been put."""

    __slots__ = ("arms", "bind", "counts", "declines", "name", "serve", "shadow_clone", "switch")

    def __init__(
        self,
        name: str,
        bind: Callable[..., Any],
        arms: dict[str, ArmCode],
        counts: Counts,
        switch: FeatureGate,
        shadow_clone: ShadowClone | None = None,
    ):
        self.name = name
        self.bind = bind
        self.arms = arms
        self.serve, self.declines = arms[PATCH].serve, arms[PATCH].declines
        self.counts = counts
        self.switch = switch
        self.shadow_clone = (
            shadow_clone  # a call -> the same with outputs of its own, and (host's, ours) to compare; see `Target`
        )

    def dispatch(self, host: Callable[..., Any], first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve one call of the host's, or hand it to ``host``.

        ``first`` goes before ``args`` when the call is bound: the instance of a method, the grid of
        a kernel, None for a function. ``host`` has it already.
        """
        if _compiled():
            # no function of ours between the two: its frame would be compiled
            return (_outside or _leave_dynamo())(self, host, first, args, kwargs)
        switch, counts = self.switch, self.counts
        if switch.off or switch.stopped:
            return host(*args, **kwargs)
        try:
            call = self.bind(*args, **kwargs) if first is None else self.bind(first, *args, **kwargs)
        except TypeError as problem:
            self._decline(_unbound(problem))
            return host(*args, **kwargs)
        except BaseException as problem:
            endings.pass_on(problem)
            self._malformed("bind", problem)
            return host(*args, **kwargs)
        serve, declines = self.serve, self.declines
        if not switch.fast_path:
            if switch.pause and switch.is_paused():
                self._decline(PAUSED)
                return host(*args, **kwargs)
            try:
                if switch.check is not None:
                    self._check_hardware(call)
                name = switch.arms.choose(self, call) if switch.arms is not None else PATCH
                arm = None if name in (HOST, SHADOW) or switch.stopped else self.arms.get(name)
            except BaseException as problem:
                endings.pass_on(problem)
                switch.trip(f"{self.name}: choosing an arm: {endings.text_of(problem)}")
                return host(*args, **kwargs)
            if arm is None:
                if name == SHADOW and not switch.stopped:
                    return self._shadow(host, call, args, kwargs)
                if name != HOST and not switch.stopped:
                    self._decline(_without_arm(name))
                return host(*args, **kwargs)
            serve, declines = arm.serve, arm.declines
        try:
            reason = declines(call)
        except BaseException as problem:  # nothing has been launched: the host can still serve, under capture too
            endings.pass_on(problem)
            self._malformed("declines", problem, call)
            return host(*args, **kwargs)
        if reason is not None:
            self._decline(reason)
            return host(*args, **kwargs)
        try:
            result = serve(call)
        except ValueError as problem:  # a launcher's refusal, before its launch
            self._decline(endings.text_of(problem, str))
            return host(*args, **kwargs)
        except CallRejected as final:
            self._decline(endings.text_of(final, str))
            raise final.refusal from None
        except BaseException as problem:
            endings.pass_on(problem)
            self._failed(problem, call)
        else:
            counts.serve(self.name)
            if gpu.capturing():
                counts.captured += 1
            return result
        # out of the handler: it kept alive what ours had allocated, of which the host may have need
        return host(*args, **kwargs)

    def _shadow(self, host: Callable[..., Any], call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the candidate beside the host's on the same inputs; what the model gets is the host's."""
        switch, counts, arms = self.switch, self.counts, self.switch.arms
        assert arms is not None and self.shadow_clone is not None  # or nobody would have chosen it
        reason: str | None = None
        pairs: list[tuple[Any, Any]] | None = []
        own: Any = None
        failed = False
        try:
            arm = self.arms.get(arms.candidate)
            reason = _without_arm(arms.candidate) if arm is None else arm.declines(call)
            if arm is not None and reason is None:
                # ours first: a host that works in place would change what ours reads
                ours, pairs = self.shadow_clone(call)
                own = arm.serve(ours)
        except (ValueError, CallRejected) as problem:
            reason = endings.text_of(problem, str)
        except BaseException as problem:
            endings.pass_on(problem)
            self._failed(problem, call)
            failed = True
        result = host(*args, **kwargs)
        if failed:
            return result
        if reason is not None:
            self._decline(reason)
            return result
        counts.serve(self.name)
        if gpu.capturing():
            counts.captured += 1
        try:
            arms.compare([(result, own)] if pairs is None else pairs)
        except BaseException as problem:
            endings.pass_on(problem)
            if gpu.capturing():
                raise
            switch.trip(f"{self.name}: comparing: {endings.text_of(problem)}")
        return result

    def _decline(self, reason: str) -> None:
        if self.counts.decline(reason):
            self.switch.on_idle(reason)

    def _malformed(self, where: str, problem: BaseException, call: Any = None) -> None:
        """`bind` or `declines` has raised: nothing was launched, and more often than not the call is an odd one."""
        reason = odd_argument(call)
        text = f"{where}: {endings.text_of(problem)}"
        if reason is None and not self.switch.bears_malformed(text, self.counts.served):
            self.switch.trip(f"{self.name}: {text}, at {MALFORMED} calls in a row")
            return
        self._decline(reason or text)

    def _failed(self, problem: BaseException, call: Any) -> None:
        """`serve` has raised what is no refusal: decline this call, or stop.

        Raises:
            the problem itself, under capture.
        """
        if gpu.capturing():
            # part of ours may be in the graph already: the host must not record over it
            raise problem
        reason = odd_argument(call) if isinstance(problem, (TypeError, AttributeError)) else made_up(call)
        if reason is not None:
            self._decline(reason)
        elif not passes(problem):
            self.switch.trip(f"{self.name}: {endings.text_of(problem)}")
        elif not self.switch.bears_failure(self.counts.served):
            self.switch.trip(f"{self.name}: {endings.text_of(problem)}, repeatedly")
        else:
            # At most AN_HOUR of these lines in an hour. As text: a record that is kept would keep what ours allocated
            text = f"the engine serves this call, and ours is tried again: {endings.text_of(problem)}"
            log.warning("mla-patch: %s: %s", self.name, text)
            self._decline(f"failed in passing: {type(problem).__name__}")
            if is_out_of_memory(problem):
                self.switch.set(pause=time.monotonic() + PAUSE)

    def _check_hardware(self, call: Any) -> None:
        for name in fields_of(call):
            value = getattr(call, name, None)
            if getattr(value, "is_cuda", False):
                device = gpu.from_tensor(value)
                switch, check = self.switch, self.switch.check
                verdict = check(device, self.name) if check is not None and device is not None else None
                switch.set(check=None, stopped=verdict[1] if verdict else switch.stopped)
                if verdict:
                    switch.on_stop(verdict[1], verdict[0])
                return


def prepare_for_dynamo() -> None:
    """Have torch.compile leave `EntryPoint.dispatch` alone; called before the first stand-in is put in place."""
    global _compiled
    _compiled = dynamo.callback()
    if not _waits:
        _waits.append(EntryPoint.dispatch)
        imports.when_imported("torch._dynamo", lambda module: dynamo.leave_alone(module, EntryPoint.dispatch))


def _leave_dynamo() -> Callable[..., Any]:
    global _outside
    _outside = dynamo.outside(EntryPoint.dispatch)
    return _outside


def _without_arm(name: str) -> str:
    return f"the arm {name} has no code for this entry point"


def _unbound(problem: TypeError) -> str:
    """What is wrong with the arguments, in words that do not change from call to call."""
    text = endings.text_of(problem, str)
    _, found, rest = text.partition("unexpected keyword argument ")
    # newer Pythons go on: 'scal'. Did you mean 'scale'?
    name = rest.strip("'").partition("'")[0]
    return f"unknown argument {name}" if found else f"arguments: {text}"
