"""The only file that changes a host: it takes all entry points of a feature or none, and gives them back.

Entry points are judged from source before anything is imported (``judge``), confirmed on the live
object when their module is imported, and replaced together with every name that points at them.
"""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import operator
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from mla_patch import endings
from mla_patch.compat.types import Arm, Change, Code, Edit, Gpu, Target, Undo
from mla_patch.dispatch import PATCH, ArmCode, ArmSelector, EntryPoint, FeatureGate, is_ours, stand_in
from mla_patch.eligibility import UNKNOWN_GPU, Eligibility, code_of, difference
from mla_patch.features import FIRST_CALLS, Counts, DeviceCheck, Feature, State
from mla_patch.flags import Setting
from mla_patch.imports import PATIENCE, is_executed_now, is_initializing, when_executed_again, when_imported
from mla_patch.reports import FeatureStatus, TargetStatus
from mla_patch.standing import attribute_of, describe, find, is_a, is_found, names_of, own, reaches, text_of

__all__ = ["Patcher", "is_ours"]

log = logging.getLogger("mla_patch")


# ours stands in the host, or will once its modules are imported, or has been put aside by somebody: asked, see `look`
STANDING = frozenset({State.ARMED, State.APPLIED, State.DISPLACED})


class Mismatch(Exception):
    """The live host is not what was reviewed; the text says where."""

    def __init__(self, text: str, state: State = State.DRIFTED) -> None:
        super().__init__(text)
        self.state = state


@dataclass
class Binding:
    """A name that was bound to the host's object and is bound to ours now."""

    holder: Any  # a module, a class, or a weak reference to an instance
    attribute: str
    before: Any
    ours: Any
    inherited: bool = False  # the holder had no such attribute of its own

    def where(self) -> Any:
        """The holder itself; None where it was an instance that is gone."""
        return self.holder() if is_a(self.holder, weakref.ref) else self.holder

    def put_back(self) -> None:
        """Undo, unless somebody has put something else there since."""
        holder = self.where()
        if own(holder, self.attribute) is not self.ours:
            return
        if self.inherited:
            delattr(holder, self.attribute)
        else:
            setattr(holder, self.attribute, self.before)


class Around:
    """An arm's serve(original, call), called as serve(call). What stood there is asked of the stand-in: whoever else
    keeps it is taken for one of the host's."""

    __slots__ = ("serve", "stand_in")

    def __init__(self, serve: Callable[..., Any]) -> None:
        self.serve = serve
        self.stand_in: Any = None

    def __call__(self, call: Any) -> Any:
        return self.serve(self.stand_in.__wrapped__, call)


@dataclass(slots=True)
class CachedReference:
    """A living instance that keeps a target's function in an attribute that can be set."""

    instance: Any
    attribute: str
    bound: Any
    within: Callable[[Any], Any] | None  # what the host has put the function in

    def parts(self) -> list[Any]:
        """What refers to the function or its wrapper, and is accounted for."""
        inside = [] if self.within is None else [vars(self.bound), *(self.bound.__closure__ or ())]
        return [self, self.instance, vars(self.instance), *inside]


@dataclass
class ConfirmedTarget:
    """A target's live object, confirmed."""

    target: Target
    holder: Any
    attribute: str
    value: Any
    kept: list[CachedReference]
    ours: Any = None  # what stood there, where something that cannot be confirmed stands there now


@dataclass
class Taken:
    """A target or an edit that is in place, in one execution of its module."""

    target: Change
    module: types.ModuleType
    spec: Any  # the module's: importlib.reload() gives it another
    undo: Undo | None = None  # of an edit

    def is_current(self) -> bool:
        """Whether the module has been neither dropped nor executed again since."""
        return sys.modules.get(self.target.module) is self.module and own(self.module, "__spec__") is self.spec


@dataclass
class ActiveFeature:
    """One feature on one host in this process: what was decided, and what was done."""

    feature: Feature
    setting: Setting
    status: FeatureStatus
    switch: FeatureGate
    arms: ArmSelector | None = None  # the experiment that chooses; None: ours serves
    targets: list[Change] = field(default_factory=list)
    # (gpu) -> why the host's own is kept, or None; and at which entry points that is a question
    device_checks: dict[DeviceCheck, set[str]] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)  # entry point -> stand-in; somebody may keep it over restore()
    places: list[Binding] = field(default_factory=list)
    undos: dict[str, tuple[Edit, Undo]] = field(default_factory=dict)  # an edit's name -> how to take it back
    taken: dict[int, Taken] = field(default_factory=dict)  # by the target's place in `targets`
    lost: set[str] = field(default_factory=set)  # groups of targets that the live host has otherwise than reviewed
    notes: str = ""  # the reason, as long as ours stands
    warned: bool = False
    told: bool = False  # that ours has been displaced
    # what hid ours when that was seen first, and how many calls had come by then; by id, so that ours keeps nothing
    hidden_by: tuple[list[int], int] = field(default_factory=lambda: ([], 0))
    again: dict[str, Callable[[types.ModuleType], None]] = field(default_factory=dict)  # by module: what takes it
    turns: Turns = field(default_factory=lambda: Turns())


class Turns:
    """Work on one feature, one piece at a time and in order, without anybody waiting for the work of another.

    An edit of the host may import, and so wait for a thread that is importing something else and wants its own turn
    here. So whoever comes while another thread is at work leaves the work to that thread and goes on. A look imports
    nothing and is short: whoever comes meanwhile waits for its end, or the host's import would go on without ours.
    """

    def __init__(self) -> None:
        self.todo: list[tuple[Callable[[], None], Callable[[], None]]] = []
        self.renew()

    def renew(self) -> None:
        """In a forked child: the thread that was at work is not there."""
        self.busy = threading.Lock()  # somebody is at work, or looks
        self.owner = 0  # the thread that is at work; 0 while somebody looks

    def take(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        """Have ``work`` done in turn, and ``then`` called after it and outside of any turn."""
        if self.owner == threading.get_ident():  # the work itself asks, as an edit that imports the next module does
            work()
            then()
            return
        self.todo.append((work, then))
        self._work()

    def look(self, look: Callable[[], None], then: Callable[[], None]) -> None:
        """Have ``look`` done, and ``then`` called after it, where nobody is at work: who is looks in the end."""
        if not self.busy.acquire(blocking=False):
            return
        try:
            look()
        finally:
            self.busy.release()
        self._work()  # of those who did not wait so long
        then()

    def _work(self) -> None:
        # looked at again after each turn: who has come meanwhile has found the turn taken and is gone
        while self.todo and self.busy.acquire(timeout=0 if self.owner else PATIENCE):
            done: list[Callable[[], None]] = []
            self.owner = threading.get_ident()
            try:
                while self.todo:
                    work, then = self.todo.pop(0)
                    done.append(then)
                    work()
            finally:
                self.owner = 0
                self.busy.release()
            for then in done:
                then()


class Patcher:
    """Applies features to their hosts and restores them. One per process.

    Each may be asked for by any thread at any time. Where another thread is at work on the same feature, that thread
    does it next, and the caller goes on at once: see Turns.
    """

    def __init__(
        self, arms: Iterable[Arm] = (), strict: bool = False, changed: Callable[[], None] = lambda: None
    ) -> None:
        self.arms = list(arms)
        self.strict = strict
        self.changed = changed
        self.runs: dict[str, ActiveFeature] = {}

    def apply(self, feature: Feature, setting: Setting, checked: Eligibility, arms: ArmSelector | None = None) -> None:
        """Act on what was checked: wait for the host's modules, or replace at once in those imported already.

        Raises:
            SystemExit: strict, and an asked-for feature cannot be had.
        """
        run = self.runs.get(feature.label)
        if run is None:
            status = FeatureStatus(feature.name, feature.host_name, feature.flag, setting.value, setting.source)
            status.memory = feature.memory
            # atomic: all threads get the one that came first
            run = self.runs.setdefault(feature.label, ActiveFeature(feature, setting, status, self._switch(feature)))
        decided: list[str] = []
        run.turns.take(
            functools.partial(self._decide, run, setting, checked, arms, decided),
            functools.partial(self._watch, run, decided),
        )

    def _decide(
        self, run: ActiveFeature, setting: Setting, checked: Eligibility, arms: ArmSelector | None, modules: list[str]
    ) -> None:
        """Take over what was checked; fills ``modules`` with those to wait for."""
        if run.feature.on_decision is not None:
            try:
                run.feature.on_decision(setting.value, setting.asked_for)
            except BaseException as problem:  # a plugin's; its hook goes on as it was
                endings.pass_on(problem)
                log.warning("mla-patch: %s raised when it was told its flag", run.feature.label, exc_info=True)
        if run.status.state in STANDING and checked.state is State.ARMED:
            if run.device_checks and not checked.device_checks:  # asked for by now: ours serves whatever the device
                run.device_checks, run.setting = {}, setting
                run.status.value, run.status.source = setting.value, setting.source
                self._forget_unknown_gpu(run)
            self._look(run)
            if run.status.state is State.DISPLACED:
                self._cover(run)
                modules += dict.fromkeys(one.target.module for one in run.taken.values())
            return
        self._undo(run)
        run.setting, run.arms = setting, arms
        run.warned = bool(setting.problem)  # said with the other flags
        run.status.value, run.status.source = setting.value, setting.source
        run.status.state, run.status.reason, run.notes = checked.state, checked.reason, checked.reason
        run.targets, run.device_checks, run.lost = checked.targets, checked.device_checks, set()
        run.status.targets = [TargetStatus(t.module, t.name, t.kind) for t in checked.targets]
        modules += dict.fromkeys([target.module for target in run.targets] or checked.watch)

    def _watch(self, run: ActiveFeature, modules: list[str]) -> None:
        self.changed()
        for module in modules:
            when_imported(module, run.again.setdefault(module, functools.partial(self._imported, run)))
        if not modules:
            self._complain(run)

    def restore(self, label: str) -> None:
        """Put back what is still ours, newest first; whoever keeps ours all the same reaches the host through it."""
        run = self.runs[label]

        def work() -> None:
            self._undo(run)
            run.status.state, run.status.reason = State.OFF, "restored"

        run.turns.take(work, self.changed)

    def forked(self) -> None:
        """This is a forked child: other threads of the parent's are not there."""
        for run in list(self.runs.values()):
            run.turns.renew()

    def _switch(self, feature: Feature) -> FeatureGate:
        return FeatureGate(
            functools.partial(self._stopped, feature.label), functools.partial(self._served_none, feature.label)
        )

    def _served_none(self, label: str, reason: str) -> None:
        """The first calls were all left to the host for one reason: another model than ours is for, say."""
        level = logging.WARNING if self.runs[label].setting.asked_for else logging.INFO
        log.log(level, "mla-patch: %s served none of its first %d calls: %s", label, FIRST_CALLS, reason)

    def _complain(self, run: ActiveFeature) -> None:
        """Warn once of an asked-for feature that cannot be had, and of one that fails; strict ends the process."""
        status, setting = run.status, run.setting
        if run.warned or status.satisfied or status.state is State.OFF:
            return
        if not setting.asked_for and status.state is not State.FAILED:  # an error is told whoever asked
            return
        if self.strict and setting.asked_for:
            endings.end(self._complaint(run))  # again where somebody has swallowed it and imports once more
        run.warned = True
        log.warning(self._complaint(run))

    def _complaint(self, run: ActiveFeature) -> str:
        asked = f"{run.setting.name}={run.setting.value}, {run.setting.source}"
        return f"mla-patch: {run.feature.label} ({asked}) is {run.status.state}: {run.status.reason}"

    def _first_call(self, run: ActiveFeature, device: Gpu, name: str) -> tuple[State, str] | None:
        """What the device of the first call, at the entry point ``name``, decides; None: ours serves.

        An engine calls one group of entry points, so what is a question for another group alone is none here.
        """
        asks = [(State.REFUSED, run.feature.hardware)]
        asks += [(State.NATIVE, ask) for ask, names in run.device_checks.items() if name in names]
        for state, ask in asks:
            reason = ask(device) if ask is not None else None
            if reason is not None:
                return state, reason
        self._forget_unknown_gpu(run)
        self.changed()
        return None

    def _forget_unknown_gpu(self, run: ActiveFeature) -> None:
        run.notes, run.status.reason = _without(run.notes, UNKNOWN_GPU), _without(run.status.reason, UNKNOWN_GPU)

    def _stopped(self, label: str, reason: str, state: State) -> None:
        """The breaker, or a device that cannot or need not, seen at a call: the host serves from here on."""
        run = self.runs[label]

        def work() -> None:
            if state is not State.FAILED:
                self._undo(run)
            run.status.state, run.status.reason = state, reason

        def then() -> None:
            self.changed()
            if state is State.FAILED:
                run.warned = True
                log.warning("mla-patch: %s stopped; the engine's code serves from now on: %s", label, reason)
            else:
                self._complain(run)

        if run.arms is not None:
            run.arms.stopped(reason)
        run.turns.take(work, then)  # in turn: a look that has begun would say that ours still serves

    # what follows runs inside the host's import

    def _imported(self, run: ActiveFeature, module: types.ModuleType) -> None:
        """A module of the host has been imported; nothing of ours may fail that import, strict apart."""
        arms: dict[str, dict[str, ArmCode]] = {}
        problem: BaseException | None = None
        if run.status.state in STANDING:
            try:
                arms = self._load_arms(run, module.__name__)
            except BaseException as raised:
                endings.pass_on(raised)
                problem = raised

        def work() -> None:
            # meanwhile another thread may have restored it, or met a module that drifted
            if run.status.state not in STANDING:
                return
            try:
                if problem is not None:
                    raise problem
                self._take(run, module, arms, late=not is_initializing(module))
            except BaseException as raised:
                endings.pass_on(raised)
                if not self._leave_group(run, module.__name__, raised):
                    self._leave(run, raised)

        def then() -> None:
            self.changed()
            self._complain(run)

        when_executed_again(module.__name__, run.again[module.__name__])
        run.turns.take(work, then)

    def _leave_group(self, run: ActiveFeature, module: str, problem: BaseException) -> bool:
        """Whether the host keeps its own code in one group of entry points alone, of which ours has taken nothing."""
        groups = {target.group for target in run.targets if target.module == module}
        others = {target.group for target in run.targets} - groups - run.lost - {""}
        touched = any(taken.target.group in groups for taken in run.taken.values())
        drifted = isinstance(problem, Mismatch) and problem.state is State.DRIFTED
        if not drifted or "" in groups or touched or not others:
            return False  # what cannot be had at this moment is a matter of the whole feature, and of its state
        run.lost |= groups
        text = f"{', '.join(sorted(groups))}: {problem}"
        run.notes = run.status.reason = "; ".join(filter(None, (run.notes, text)))
        if run.setting.asked_for:
            log.warning("mla-patch: %s leaves %s", run.feature.label, text)
        self._look(run)
        return True

    def _leave(self, run: ActiveFeature, problem: BaseException) -> None:
        """The host keeps its own code: it is not what was reviewed, or ours has failed."""
        self._undo(run, everything=True)
        if isinstance(problem, Mismatch):
            run.status.state, run.status.reason = problem.state, str(problem)
        else:
            run.status.state, run.status.reason = State.FAILED, endings.text_of(problem)
            run.warned = not (self.strict and run.setting.asked_for)
            log.warning("mla-patch: %s failed; the engine keeps its own code", run.feature.label, exc_info=problem)

    def _load_arms(self, run: ActiveFeature, module: str) -> dict[str, dict[str, ArmCode]]:
        """Entry point -> its arms' code. Imported before the turn: an import may take long."""
        loaded: dict[str, dict[str, ArmCode]] = {}
        for target in run.targets:
            if target.module != module or isinstance(target, Edit):
                continue
            if target.bind is None:
                raise TypeError(f"{target.module}.{target.name}: a target of kind {target.kind!r} needs bind")
            patch = ArmCode(_named(target.serve), _named(target.declines) if target.declines else _declines_nothing)
            loaded[target.name] = {PATCH: patch}
            for arm in self.arms:
                if run.feature.matches(arm.feature) and (arm.group == target.group if arm.group else target.arms):
                    loaded[target.name][arm.name] = ArmCode(
                        _named(arm.serve), _named(arm.declines) if arm.declines else patch.declines
                    )
        return loaded

    def _take(
        self, run: ActiveFeature, module: types.ModuleType, arms: dict[str, dict[str, ArmCode]], late: bool
    ) -> None:
        mine = {
            at: target
            for at, target in enumerate(run.targets)
            if target.module == module.__name__ and target.group not in run.lost
        }
        entries = {at: one for at, one in mine.items() if isinstance(one, Target) and not self._stands(run, at)}
        # all are looked at before one is touched
        with _all_that_lives() if late and entries else nullcontext():
            found = [self._find(run, at, target, module, late) for at, target in entries.items()]
        for one in found:
            self._replace(run, one, arms[one.target.name])
        for at, target in mine.items():
            if isinstance(target, Target):
                run.taken[at] = Taken(target, module, own(module, "__spec__"))
            elif target.name not in run.undos or (at in run.taken and self._hiders(run, run.taken[at])):
                run.taken[at] = Taken(target, module, own(module, "__spec__"), self._edit(run, target, module))
            elif at not in run.taken:  # it has outlived restore()
                run.taken[at] = Taken(target, module, own(module, "__spec__"), run.undos[target.name][1])
        if run.arms is not None:
            run.switch.set(arms=run.arms)
            run.arms.attach(run.switch, run.status.counts)
        if (
            run.feature.hardware is not None or run.device_checks
        ):  # the first call may come from another GPU than was expected
            run.switch.set(check=functools.partial(self._first_call, run))
        self._look(run)

    def _edit(self, run: ActiveFeature, target: Edit, module: types.ModuleType) -> Undo:
        """Make one edit; where it was made before and has been displaced since, on top of what is left of that."""
        undo = target.edit(module, *((run.status.counts,) if target.counts_calls else ()))
        _, before = run.undos.get(target.name, (target, None))
        run.undos[target.name] = (target, undo if before is None else functools.partial(_call_all, undo, before))
        return undo

    def _find(
        self, run: ActiveFeature, at: int, target: Target, module: types.ModuleType, late: bool
    ) -> ConfirmedTarget:
        """A target's live object, confirmed. Where somebody has put something else since, what stood there: ours."""
        taken = run.taken.get(at)
        holder, value = find(module, target.name)
        ours = run.made.get(target.entry or target.name)
        if taken is None or not taken.is_current() or not any(holder is place.where() for place in run.places):
            return self._confirm(run, target, module, late)
        log.warning("mla-patch: %s.%s was %s; our code is back in place", target.module, target.name, self._tell(value))
        return ConfirmedTarget(target, holder, target.name.rpartition(".")[2], value, [], ours)

    # what stands now, asked whenever somebody wants to know

    def look(self) -> None:
        """Bring all states up to date with what stands in the host; cheap, from any thread, raises nothing."""
        for run in list(self.runs.values()):
            run.turns.look(functools.partial(self._look_quietly, run), functools.partial(self._tell_displaced, run))

    def _look_quietly(self, run: ActiveFeature) -> None:
        if any(is_executed_now(target.module) for target in run.targets):
            return  # halfway, what was there before is gone and ours is not there yet
        try:
            self._look(run)
        except Exception:
            log.debug("mla-patch: the state of %s cannot be read", run.feature.label, exc_info=True)

    def _tell_displaced(self, run: ActiveFeature) -> None:
        """Once each time that something takes the place of what was asked for. Strict ends no engine at work."""
        displaced = run.status.state is State.DISPLACED
        if displaced and not run.told and run.setting.asked_for:
            log.warning(self._complaint(run))
        run.told = displaced

    def _look(self, run: ActiveFeature) -> None:
        status = run.status
        if status.state not in STANDING or not run.taken:
            return
        hiders: list[tuple[str, Any]] = []
        waiting = set()
        # of an engine's groups of entry points one may be all that it imports
        begun = {taken.target.group for taken in run.taken.values()} - {""}
        homes = self._homes(run)
        edits_alone = all(isinstance(target, Edit) for target in run.targets)
        is_there = stands = False
        for at, (target, told) in enumerate(zip(run.targets, status.targets, strict=True)):
            taken = run.taken.get(at)
            if taken is None or sys.modules.get(target.module) is None:
                told.replaced_by = None
                if target.group not in run.lost and (not target.group or not begun or target.group in begun):
                    waiting.add(target.module)
                continue
            found = self._hiders(run, taken)
            hiders += found
            told.replaced_by = code_of(target) if not found else self._tell(found[0][1]) if found[0][1] else None
            is_there = is_there or edits_alone or isinstance(target, Target)
            if isinstance(target, Target):
                value = find(sys.modules[target.module], target.name)[1]
                stands = stands or not found
                if not found and not self._wanted(run)(attribute_of(value, "__func__") or value):
                    told.replaced_by = f"{self._tell(value)} over {code_of(target)}"
        for place in run.places:
            holder = place.where()
            value = own(holder, place.attribute)
            if value is None or not is_found(holder) or (id(holder), place.attribute) in homes:
                continue
            if value is place.ours or reaches(value, self._wanted(run)):
                stands = True
            else:
                hiders.append(self._hidden(f"{_name_of(holder)}.{place.attribute}", value))
        notes = [note for note in run.notes.split("; ") if note]
        notes += [f"waiting for {name}" for name in sorted(waiting)]
        notes += [text for text, _ in hiders]
        reached = self._is_reached(run, [] if stands else [id(value) for _, value in hiders])
        if reached:
            notes.append("calls still reach our code")
        displaced = bool(hiders) and not reached
        status.reason = "; ".join(dict.fromkeys(notes))
        status.state = State.DISPLACED if displaced else State.APPLIED if is_there else State.ARMED

    def _homes(self, run: ActiveFeature) -> set[tuple[int, str]]:
        """What holds the entry points of a feature now, by id, and their names there."""
        targets = [one.target for one in run.taken.values() if isinstance(one.target, Target)]
        modules = [(sys.modules.get(target.module), target.name) for target in targets]
        return {(id(find(module, name)[0]), name.rpartition(".")[2]) for module, name in modules if module is not None}

    def _is_reached(self, run: ActiveFeature, hiders: list[int]) -> bool:
        """Whether calls have come since these were first seen in all places of ours: then they hand calls on to it."""
        counts = run.status.counts
        calls = counts.served + sum(list(counts.declined.values()))
        if run.hidden_by[0] != hiders:
            run.hidden_by = hiders, calls
        return bool(hiders) and calls > run.hidden_by[1]

    def _cover(self, run: ActiveFeature) -> None:
        """Put ours back under the names that others have bound to something else since. Entry points are `_take`'s."""
        homes = self._homes(run)
        for place in list(run.places):
            holder = place.where()
            if (id(holder), place.attribute) in homes:
                continue
            value = own(holder, place.attribute)
            stands = value is place.ours or reaches(value, self._wanted(run))
            if value is not None and not stands and is_found(holder):
                self._bind(run, Binding(place.holder, place.attribute, value, place.ours))

    def _wanted(self, run: ActiveFeature, name: str = "") -> Callable[[Any], bool]:
        """What is a stand-in of this feature's that serves."""

        def wanted(value: Any) -> bool:
            if not is_ours(value):
                return False
            site = value._self_entry
            return site.counts is run.status.counts and site.switch is run.switch and name in ("", site.name)

        return wanted

    def _stands(self, run: ActiveFeature, at: int) -> bool:
        """Whether a target that ours has taken is ours still, as far as can be seen."""
        taken = run.taken.get(at)
        return taken is not None and taken.is_current() and not self._hiders(run, taken)

    def _hiders(self, run: ActiveFeature, taken: Taken) -> list[tuple[str, Any]]:
        """(words, what stands there) for each name that a target has put ours under and that is not ours any more."""
        target = taken.target
        if isinstance(target, Target):
            module = sys.modules.get(target.module)
            value = find(module, target.name)[1] if module is not None else None
            stands = reaches(value, self._wanted(run, target.name))
            return [] if stands else [self._hidden(f"{target.module}.{target.name}", value)]
        if not taken.is_current():
            return [(f"{target.name} is undone, because {target.module} was executed again", None)]
        places = getattr(taken.undo, "places", None)
        rows = places() if places is not None else []
        return [
            self._hidden(f"{_name_of(holder)}.{attribute}", value)
            for holder, attribute, ours in rows
            for value in [holder.get(attribute) if is_a(holder, dict) else own(holder, attribute)]
            if not reaches(value, functools.partial(operator.is_, ours))
        ]

    def _hidden(self, where: str, value: Any) -> tuple[str, Any]:
        return f"{where} is {self._tell(value)}", value

    def _tell(self, value: Any) -> str:
        if not is_ours(value):
            return describe(value)
        serve = value._self_entry.serve
        return describe(serve.serve if is_a(serve, Around) else serve)

    def _confirm(self, run: ActiveFeature, target: Target, module: types.ModuleType, late: bool) -> ConfirmedTarget:
        """The live object and where it is bound.

        Raises:
            Mismatch: it is not what was reviewed, or somebody keeps it where it cannot be replaced.
        """
        holder: Any = module
        *path, attribute = target.name.split(".")
        for name in path:
            holder = getattr(holder, name, None)
        value = inspect.getattr_static(holder, attribute, None) if isinstance(holder, type) else own(holder, attribute)
        where = f"{target.module}.{target.name}"
        if value is None:
            raise Mismatch(f"{where} does not exist")
        change = _live_difference(target, value)
        if change is not None:
            somebody = self._tell(value)
            home = somebody.rpartition(" ")[2].partition(":")[0]
            # the source has been read, and was right; of a number or the like nobody can say where it is from
            if home.partition(".")[0] not in (target.module.partition(".")[0], "builtins"):
                raise Mismatch(f"{where} was wrapped or replaced by {somebody} before we patched it", State.REFUSED)
            raise Mismatch(change)
        ours = _ours_below(value, target.name, run.status.counts)
        if not late or (ours is not None and ours._self_entry.switch is run.switch):
            return ConfirmedTarget(target, holder, attribute, value, [])
        function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        kept = list(_cached_references(target, function if ours is None else ours.__wrapped__, run.status.counts))
        # whoever keeps what has ours below it reaches ours: an edit of ours that outlives restore(), for one
        reached = ours is not None or is_ours(value)
        keeper = None if reached else _other_referrer(function, kept, target.module.partition(".")[0], holder)
        if keeper is not None:
            raise Mismatch(f"{where} was imported before and is kept by {keeper}", State.REFUSED)
        return ConfirmedTarget(target, holder, attribute, value, kept)

    def _replace(self, run: ActiveFeature, found: ConfirmedTarget, arms: dict[str, ArmCode]) -> None:
        target = found.target
        if found.ours is not None:
            inherited = found.attribute not in names_of(found.holder)
            self._bind(run, Binding(found.holder, found.attribute, found.value, found.ours, inherited))
            return
        ours = _ours_below(found.value, target.name, run.status.counts)
        if ours is not None and ours._self_entry.switch is run.switch:
            return  # a second import hook of the same application
        kept = run.made.get(target.entry or target.name)
        if ours is None and kept is not None and kept.__wrapped__ is found.value:
            ours = kept
        if ours is not None:
            # ours from before restore(), kept by an instance or under somebody else's wrapper: it serves again
            ours._self_entry.switch = run.switch
        else:
            assert target.bind is not None  # or its arms would not have been loaded
            if target.around:
                arms = {name: ArmCode(Around(code.serve), code.declines) for name, code in arms.items()}
            site = EntryPoint(target.name, target.bind, arms, run.status.counts, run.switch, target.shadow_clone)
            ours = run.made[target.entry or target.name] = stand_in(found.value, target.kind, site)
            if target.around:
                for code in arms.values():
                    code.serve.stand_in = ours  # type: ignore[attr-defined]
        original = ours.__wrapped__
        if found.value is original or found.value is ours:
            inherited = isinstance(found.holder, type) and found.attribute not in vars(found.holder)
            self._bind(run, Binding(found.holder, found.attribute, original, ours, inherited))
        if isinstance(found.holder, type):
            return  # a method is looked up on its class at every call
        package = found.target.module.partition(".")[0]
        for holder, attribute, before, after in _bindings(original, ours, package):
            self._bind(run, Binding(holder, attribute, before, after))
        for one in found.kept:
            after = ours if one.within is None else one.within(ours)
            # a backend that the engine drops is not to live on in our books
            self._bind(run, Binding(weakref.ref(one.instance), one.attribute, one.bound, after))

    def _bind(self, run: ActiveFeature, place: Binding) -> None:
        run.places.append(place)
        setattr(place.where(), place.attribute, place.ours)

    def _undo(self, run: ActiveFeature, everything: bool = False) -> None:
        """Take everything back; edits of what is stored only with ``everything``, while nothing is stored yet."""
        run.switch.set(off=True)
        for name, (target, undo) in reversed(list(run.undos.items())):
            if target.survives_restore and not everything:
                continue
            del run.undos[name]
            try:
                undo()
            except BaseException as problem:
                endings.pass_on(problem)
                log.warning("mla-patch: the edit %s of %s could not be undone", name, target.module, exc_info=True)
        for place in reversed(run.places):
            with _going_on(place.attribute, place.holder):
                place.put_back()
        since: dict[tuple[int, str], tuple[Any, Any]] = {}  # modules imported since have taken ours by name
        for place in run.places:
            if is_ours(place.ours) and is_a(place.holder, types.ModuleType):
                package = text_of(own(place.holder, "__name__")).partition(".")[0]
                for holder, attribute, _, after in _bindings(place.ours, place.before, package):
                    since.setdefault((id(holder), attribute), (holder, after))
        for (_, attribute), (holder, after) in since.items():
            with _going_on(attribute, holder):
                setattr(holder, attribute, after)
        run.places, run.taken = [], {}
        # whoever keeps one of the old stand-ins keeps its switch, which stays off
        run.switch = self._switch(run.feature)
        for status in run.status.targets:
            status.replaced_by = None


@contextmanager
def _going_on(attribute: str, holder: Any) -> Iterator[None]:
    """One name that cannot be given back must not keep the others."""
    try:
        yield
    except Exception:
        what = text_of(attribute_of(holder, "__name__")) or f"a {type(holder).__name__}"
        log.warning("mla-patch: %s of %s could not be restored", attribute, what, exc_info=True)


def _call_all(*calls: Callable[[], None]) -> None:
    for call in calls:
        call()


def _name_of(holder: Any) -> str:
    """A module's or a class's name, or what an instance is."""
    if is_a(holder, types.ModuleType):
        return text_of(own(holder, "__name__"))
    if is_a(holder, type):
        return describe(holder).replace(":", ".")
    return "sys.modules" if holder is sys.modules else describe(holder)


def _without(notes: str, note: str) -> str:
    """``notes`` but for those that end in ``note``."""
    return "; ".join(one for one in notes.split("; ") if not one.endswith(note))


def _declines_nothing(call: Any) -> None:
    return None


def _named(path: Code) -> Any:
    """The function itself, or what "module:function" names."""
    if not isinstance(path, str):
        return path
    module, _, name = path.partition(":")
    return functools.reduce(getattr, name.split("."), import_module(module))


def _live_difference(target: Target, value: Any) -> str | None:
    """How the live object differs from what was reviewed, or None."""
    where = f"{target.module}.{target.name}"
    if target.kind == "kernel" and not hasattr(type(value), "__getitem__"):
        return f"{where} is not a kernel that is launched as kernel[grid](...)"
    try:
        return difference(target, _live_params(value))
    except (TypeError, ValueError) as problem:
        return f"{where} has no signature: {problem}"


def _live_params(value: Any) -> tuple[str, ...]:
    names = getattr(value, "arg_names", None)
    if names is not None:
        return tuple(names)
    marks: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    return tuple(marks.get(p.kind, "") + p.name for p in inspect.signature(function).parameters.values())


def _modules() -> Iterator[tuple[types.ModuleType, Mapping[str, Any]]]:
    for module in list(sys.modules.values()):
        if is_a(module, types.ModuleType):  # some programs keep other objects there
            yield module, names_of(module)


def _bindings(value: Any, instead: Any, package: str) -> list[tuple[Any, str, Any, Any]]:
    """Every module-level name, and every class attribute in ``package``, that is ``value`` itself.

    Rows of (holder, attribute, bound now, what to bind instead).
    """
    found: list[tuple[Any, str, Any, Any]] = []
    for module, names in _modules():
        home = text_of(names.get("__name__"))
        inside = home.partition(".")[0] == package
        for name, bound in list(names.items()):
            if bound is value:
                found.append((module, name, bound, instead))
            elif inside and is_a(bound, type) and text_of(own(bound, "__module__")) == home:
                found += _class_bindings(bound, value, instead)
    return found


def _class_bindings(owner: type, value: Any, instead: Any) -> Iterator[tuple[Any, str, Any, Any]]:
    for name, bound in list(names_of(owner).items()):
        if bound is value:
            yield owner, name, bound, instead
        elif is_a(bound, staticmethod, classmethod) and bound.__func__ is value:
            yield owner, name, bound, type(bound)(instead)


@contextmanager
def _all_that_lives() -> Iterator[None]:
    """For a search through the collector's objects: nothing dead is found, and nothing that was frozen is missed.

    SGLang calls gc.freeze() once its model is up.
    """
    gc.collect()
    frozen = gc.get_freeze_count() > 0
    if frozen:
        gc.unfreeze()
    try:
        yield
    finally:
        if frozen:
            gc.freeze()


def _cached_references(target: Target, value: Any, counts: Counts) -> Iterator[CachedReference]:
    """Living instances in ``target.cached_on`` that keep ``value``.

    Raises:
        Mismatch: one keeps what is neither the host's nor ours, or is beyond change.
    """
    where = f"{target.module}.{target.name}"
    for held in target.cached_on:
        module, _, path = held.place.partition(":")
        name, _, attribute = path.partition(".")
        owner = getattr(sys.modules.get(module), name, None)
        if not isinstance(owner, type):
            continue
        kinds = {id(kind) for kind in _subclasses(owner)}  # a type need not be hashable
        instances = [one for one in gc.get_objects() if id(type(one)) in kinds]
        pattern = held.within(_declines_nothing) if instances and held.within is not None else None
        for instance in instances:
            bound = own(instance, attribute)
            if bound is None or _ours_below(bound, target.name, counts) is not None:
                continue
            # of the same make, and around the same function: somebody's functools.wraps copies all but the code
            made = isinstance(bound, types.FunctionType) and bound.__code__ is getattr(pattern, "__code__", None)
            if bound is not value and not (made and getattr(bound, "__wrapped__", None) is value):
                what = f"{type(bound).__name__} {getattr(bound, '__qualname__', '')}".strip()
                raise Mismatch(f"a living {name} has a {what} for its {attribute}, not {where}", State.REFUSED)
            problem = held.fixed(instance) if held.fixed is not None else None
            if problem is not None:
                raise Mismatch(f"{where} is kept by attribute {attribute} of a {name}: {problem}", State.REFUSED)
            yield CachedReference(instance, attribute, bound, held.within if made else None)


def _subclasses(owner: type) -> set[type]:
    return {owner}.union(*map(_subclasses, type.__subclasses__(owner)))


def _other_referrer(value: Any, kept: list[CachedReference], package: str, holder: Any) -> str | None:
    """Somebody who keeps ``value`` where no name can be rebound, or None. ``holder`` is where it is looked up.

    No closure may be made over ``value`` here: it would be found, too.
    """
    machinery = type(value).__module__.partition(".")[0]  # a kernel object's own parts refer to it
    module_dicts = {id(names) for _, names in _modules()}
    known = {id(part) for one in kept for part in one.parts()}
    for one in kept:
        for name in {*_names_for(one.instance, value), *_names_for(one.instance, one.bound)} - {one.attribute}:
            return f"attribute {name} of a {type(one.instance).__qualname__}"
    refs = gc.get_referrers(value)
    for one in kept:
        if one.within is not None:
            refs += gc.get_referrers(one.bound)  # one by one: a tuple of them would be found, too
    for ref in refs:
        if id(ref) in module_dicts or id(ref) in known or is_ours(ref) or is_a(ref, types.FrameType):
            continue
        owner = _owner(ref)
        if is_a(owner, type):
            # a method is found on its class, or on the one that it is inherited from
            bases = holder.__mro__ if isinstance(holder, type) else ()
            if not any(base is owner for base in bases) and not _rebindable(owner, package):
                return f"a class {attribute_of(owner, '__qualname__')}"
            continue
        if is_ours(owner):
            continue
        module = is_a(owner, types.ModuleType)
        named = own(owner, "__name__") if module else attribute_of(owner, "__module__")
        home = text_of(named or attribute_of(type(owner), "__module__"))
        if machinery != "builtins" and home.partition(".")[0] == machinery:
            continue
        names = _names_for(owner, value)
        what = f"attribute {names[0]} of " if names else ""
        name = home if module else text_of(attribute_of(owner, "__qualname__"))
        return f"{what}a {attribute_of(type(owner), '__name__')} {name}".strip()
    return None


def _rebindable(owner: type, package: str) -> bool:
    """Whether ``_bindings`` comes by this class."""
    home = text_of(own(owner, "__module__"))
    return home.partition(".")[0] == package and own(sys.modules.get(home), attribute_of(owner, "__name__")) is owner


def _owner(ref: Any) -> Any:
    """Whose a dict, a cell, a tuple or a staticmethod is: the class or instance, the function with that closure."""
    if is_a(ref, dict):
        # without its C extension, wrapt keeps what it wraps in a dict that is not the proxy's __dict__
        owners = [o for o in gc.get_referrers(ref) if is_ours(o) or is_a(o, type) or names_of(o) is ref]
        return owners[0] if owners else _collector(ref)
    if is_a(ref, staticmethod, classmethod):
        holders = [_owner(names) for names in gc.get_referrers(ref) if is_a(names, dict)]
        return next((holder for holder in holders if is_a(holder, type)), ref)
    if is_a(ref, types.CellType):
        closures = [closure for closure in gc.get_referrers(ref) if is_a(closure, tuple)]
        return _owner(closures[0]) if closures else ref
    if type(ref) is tuple:  # a function's closure, or its defaults
        return next((f for f in gc.get_referrers(ref) if is_a(f, types.FunctionType)), ref)
    return ref


def _collector(ref: Any) -> Any:
    """The module or instance that has the container ``ref`` as an attribute, else ``ref``."""
    for holder in gc.get_referrers(ref):
        holder = next((o for o in gc.get_referrers(holder) if names_of(o) is holder), holder)
        if not is_a(holder, dict) and any(bound is ref for bound in names_of(holder).values()):
            return holder
    return ref


def _names_for(owner: Any, value: Any) -> list[str]:
    return [name for name, bound in names_of(owner).items() if bound is value]


def _ours_below(value: Any, name: str, counts: Counts) -> Any:
    """The stand-in of the feature that counts in ``counts`` for its entry point ``name``, in what ``value`` wraps."""
    for _ in range(32):  # wrappers can be wound in a circle
        if is_ours(value) and value._self_entry.name == name and value._self_entry.counts is counts:
            return value
        value = getattr(value, "__wrapped__", None)
        if value is None:
            break
    return None
