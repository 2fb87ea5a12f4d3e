"""Puts our stand-ins and edits in a host's module, all of a feature's or none, and takes them out again."""

from __future__ import annotations

import functools
import logging
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from mla_patch import endings
from mla_patch.active import ActiveFeature, Around, Taken, ours_below
from mla_patch.bindings import Binding, bindings_of, going_on
from mla_patch.compat.types import Edit, Target, Undo
from mla_patch.confirm import ConfirmedTarget, find_live
from mla_patch.dispatch import ArmCode, EntryPoint
from mla_patch.displaced import hiders, stands
from mla_patch.keepers import all_that_lives
from mla_patch.stand_ins import is_ours, stand_in
from mla_patch.standing import is_a, names_of, own, text_of

log = logging.getLogger("mla_patch")


def take(run: ActiveFeature, module: types.ModuleType, arms: dict[str, dict[str, ArmCode]], late: bool) -> None:
    """Put ours in all entry points of ``module`` and make its edits; ``arms`` by entry point.

    Raises:
        Mismatch: the live module is not what was reviewed, or cannot be changed; nothing of it has been touched.
    """
    mine = {
        at: target
        for at, target in enumerate(run.targets)
        if target.module == module.__name__ and target.group not in run.lost
    }
    entries = {at: one for at, one in mine.items() if isinstance(one, Target) and not stands(run, at)}
    # all are looked at before one is touched
    with all_that_lives() if late and entries else nullcontext():
        found = [find_live(run, at, target, module, late) for at, target in entries.items()]
    for one in found:
        put_stand_in(run, one, arms[one.target.name])
    for at, target in mine.items():
        if isinstance(target, Target):
            run.taken[at] = Taken(target, module, own(module, "__spec__"))
        elif target.name not in run.undos or (at in run.taken and hiders(run, run.taken[at])):
            run.taken[at] = Taken(target, module, own(module, "__spec__"), make_edit(run, target, module))
        elif at not in run.taken:  # it has outlived restore()
            run.taken[at] = Taken(target, module, own(module, "__spec__"), run.undos[target.name][1])
    if run.arms is not None:
        run.switch.set(arms=run.arms)
        run.arms.attach(run.switch, run.status.counts)


def make_edit(run: ActiveFeature, target: Edit, module: types.ModuleType) -> Undo:
    """Make one edit; where it was made before and has been displaced since, on top of what is left of that."""
    undo = target.edit(module, *((run.status.counts,) if target.counts_calls else ()))
    _, before = run.undos.get(target.name, (target, None))
    run.undos[target.name] = (target, undo if before is None else functools.partial(call_all, undo, before))
    return undo


def put_stand_in(run: ActiveFeature, found: ConfirmedTarget, arms: dict[str, ArmCode]) -> None:
    """Put a stand-in under every name of one entry point; one of ours from before ``restore`` serves again."""
    target = found.target
    if found.ours is not None:
        inherited = found.attribute not in names_of(found.holder)
        run.bind(Binding(found.holder, found.attribute, found.value, found.ours, inherited))
        return
    ours = ours_below(found.value, target.name, run.status.counts)
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
        run.bind(Binding(found.holder, found.attribute, original, ours, inherited))
    if isinstance(found.holder, type):
        return  # a method is looked up on its class at every call
    package = found.target.module.partition(".")[0]
    for holder, attribute, before, after in bindings_of(original, ours, package):
        run.bind(Binding(holder, attribute, before, after))
    for one in found.kept:
        after = ours if one.within is None else one.within(ours)
        # a backend that the engine drops is not to live on in our books
        run.bind(Binding(weakref.ref(one.instance), one.attribute, one.bound, after))


def take_back(run: ActiveFeature, everything: bool = False) -> None:
    """Give the host its own back and leave the switch off.

    Edits of what is stored are taken back only with ``everything``, while nothing is stored yet.
    """
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
        with going_on(place.attribute, place.holder):
            place.put_back()
    since: dict[tuple[int, str], tuple[Any, Any]] = {}  # modules imported since have taken ours by name
    for place in run.places:
        if is_ours(place.ours) and is_a(place.holder, types.ModuleType):
            package = text_of(own(place.holder, "__name__")).partition(".")[0]
            for holder, attribute, _, after in bindings_of(place.ours, place.before, package):
                since.setdefault((id(holder), attribute), (holder, after))
    for (_, attribute), (holder, after) in since.items():
        with going_on(attribute, holder):
            setattr(holder, attribute, after)
    run.places, run.taken = [], {}
    for status in run.status.targets:
        status.replaced_by = None


def call_all(*calls: Callable[[], None]) -> None:
    for call in calls:
        call()
