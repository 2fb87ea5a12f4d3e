"""Applies features to a host and restores them: all entry points of a feature, or none.

``eligibility`` has checked them from source before anything is imported. When the host imports their module,
``confirm`` checks the live objects, ``keepers`` finds who keeps them, and ``replacing`` puts ours in their place
under every name of ``bindings``. ``displaced`` tells whether ours still stands there.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Iterable

from mla_patch import endings
from mla_patch.active import STANDING, ActiveFeature, Mismatch, declines_nothing
from mla_patch.compat.named import named
from mla_patch.compat.types import PATCH, Arm, Edit, Gpu
from mla_patch.dispatch import ArmCode, ArmSelector, FeatureGate
from mla_patch.displaced import cover, update_state
from mla_patch.eligibility import UNKNOWN_GPU, Eligibility
from mla_patch.features import FIRST_CALLS, Feature, State
from mla_patch.flags import Setting
from mla_patch.imports import is_executed_now, is_initializing, when_executed_again, when_imported
from mla_patch.replacing import take, take_back
from mla_patch.reports import FeatureStatus, TargetStatus
from mla_patch.stand_ins import is_ours

__all__ = ["Patcher", "is_ours"]

log = logging.getLogger("mla_patch")


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
            update_state(run)
            if run.status.state is State.DISPLACED:
                cover(run)
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
        update_state(run)
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
            patch = ArmCode(named(target.serve), named(target.declines) if target.declines else declines_nothing)
            loaded[target.name] = {PATCH: patch}
            for arm in self.arms:
                if run.feature.matches(arm.feature) and (arm.group == target.group if arm.group else target.arms):
                    loaded[target.name][arm.name] = ArmCode(
                        named(arm.serve), named(arm.declines) if arm.declines else patch.declines
                    )
        return loaded

    def _take(
        self, run: ActiveFeature, module: types.ModuleType, arms: dict[str, dict[str, ArmCode]], late: bool
    ) -> None:
        take(run, module, arms, late)
        if run.arms is not None:
            run.switch.set(arms=run.arms)
            run.arms.attach(run.switch, run.status.counts)
        if run.feature.hardware is not None or run.device_checks:
            # the first call may come from another GPU than was expected
            run.switch.set(check=functools.partial(self._first_call, run))
        update_state(run)

    def _undo(self, run: ActiveFeature, everything: bool = False) -> None:
        """Take everything back; see `take_back`."""
        take_back(run, everything)
        # whoever keeps one of the old stand-ins keeps its switch, which stays off
        run.switch = self._switch(run.feature)

    # what stands now, asked whenever somebody wants to know

    def look(self) -> None:
        """Bring all states up to date with what stands in the host; cheap, from any thread, raises nothing."""
        for run in list(self.runs.values()):
            run.turns.look(functools.partial(self._look_quietly, run), functools.partial(self._tell_displaced, run))

    def _look_quietly(self, run: ActiveFeature) -> None:
        if any(is_executed_now(target.module) for target in run.targets):
            return  # halfway, what was there before is gone and ours is not there yet
        try:
            update_state(run)
        except Exception:
            log.debug("mla-patch: the state of %s cannot be read", run.feature.label, exc_info=True)

    def _tell_displaced(self, run: ActiveFeature) -> None:
        """Once each time that something takes the place of what was asked for. Strict ends no engine at work."""
        displaced = run.status.state is State.DISPLACED
        if displaced and not run.told and run.setting.asked_for:
            log.warning(self._complaint(run))
        run.told = displaced


def _without(notes: str, note: str) -> str:
    """``notes`` but for those that end in ``note``."""
    return "; ".join(one for one in notes.split("; ") if not one.endswith(note))
