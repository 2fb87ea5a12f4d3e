"""Whether ours still stands in the host: what hides it, and how it is put back on top."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable
from typing import Any

from mla_patch.active import STANDING, ActiveFeature, Around, Taken
from mla_patch.bindings import Binding, name_of
from mla_patch.compat.types import Edit, Target
from mla_patch.eligibility import code_of
from mla_patch.features import State
from mla_patch.stand_ins import is_ours
from mla_patch.standing import attribute_of, describe, find, is_a, is_found, own, reaches


def update_state(run: ActiveFeature) -> None:
    """Write into the feature's status what stands in the host now."""
    status = run.status
    if status.state not in STANDING or not run.taken:
        return
    hiding: list[tuple[str, Any]] = []
    waiting = set()
    # of an engine's groups of entry points one may be all that it imports
    begun = {taken.target.group for taken in run.taken.values()} - {""}
    homes = entry_homes(run)
    edits_alone = all(isinstance(target, Edit) for target in run.targets)
    is_there = any_stands = False
    for at, (target, entry) in enumerate(zip(run.targets, status.targets, strict=True)):
        taken = run.taken.get(at)
        if taken is None or sys.modules.get(target.module) is None:
            entry.replaced_by = None
            if target.group not in run.lost and (not target.group or not begun or target.group in begun):
                waiting.add(target.module)
            continue
        found = hiders(run, taken)
        hiding += found
        entry.replaced_by = code_of(target) if not found else describe_object(found[0][1]) if found[0][1] else None
        is_there = is_there or edits_alone or isinstance(target, Target)
        if isinstance(target, Target):
            value = find(sys.modules[target.module], target.name)[1]
            any_stands = any_stands or not found
            if not found and not serving_stand_in(run)(attribute_of(value, "__func__") or value):
                entry.replaced_by = f"{describe_object(value)} over {code_of(target)}"
    for place in run.places:
        holder = place.where()
        value = own(holder, place.attribute)
        if value is None or not is_found(holder) or (id(holder), place.attribute) in homes:
            continue
        if value is place.ours or reaches(value, serving_stand_in(run)):
            any_stands = True
        else:
            hiding.append(hidden(f"{name_of(holder)}.{place.attribute}", value))
    notes = [note for note in run.notes.split("; ") if note]
    notes += [f"waiting for {name}" for name in sorted(waiting)]
    notes += [text for text, _ in hiding]
    reached = is_reached(run, [] if any_stands else [id(value) for _, value in hiding])
    if reached:
        notes.append("calls still reach our code")
    displaced = bool(hiding) and not reached
    status.reason = "; ".join(dict.fromkeys(notes))
    status.state = State.DISPLACED if displaced else State.APPLIED if is_there else State.ARMED


def entry_homes(run: ActiveFeature) -> set[tuple[int, str]]:
    """What holds the entry points of a feature now, by id, and their names there."""
    targets = [one.target for one in run.taken.values() if isinstance(one.target, Target)]
    modules = [(sys.modules.get(target.module), target.name) for target in targets]
    return {(id(find(module, name)[0]), name.rpartition(".")[2]) for module, name in modules if module is not None}


def is_reached(run: ActiveFeature, hiders: list[int]) -> bool:
    """Whether calls have come since these were first seen in all places of ours: then they hand calls on to it."""
    counts = run.status.counts
    calls = counts.served + sum(list(counts.declined.values()))
    if run.hidden_by[0] != hiders:
        run.hidden_by = hiders, calls
    return bool(hiders) and calls > run.hidden_by[1]


def cover(run: ActiveFeature) -> None:
    """Put ours back under the names that others have bound to something else since.

    `replacing.take` puts the entry points themselves back.
    """
    homes = entry_homes(run)
    for place in list(run.places):
        holder = place.where()
        if (id(holder), place.attribute) in homes:
            continue
        value = own(holder, place.attribute)
        covered = not (value is place.ours or reaches(value, serving_stand_in(run)))
        if value is not None and covered and is_found(holder):
            run.bind(Binding(place.holder, place.attribute, value, place.ours))


def serving_stand_in(run: ActiveFeature, name: str = "") -> Callable[[Any], bool]:
    """A test of an object: is it a stand-in of this feature that serves (at the entry point ``name``, if given)?"""

    def is_one(value: Any) -> bool:
        if not is_ours(value):
            return False
        entry = value._self_entry
        return entry.counts is run.status.counts and entry.switch is run.switch and name in ("", entry.name)

    return is_one


def stands(run: ActiveFeature, at: int) -> bool:
    """Whether a target that ours has taken is ours still, as far as can be seen."""
    taken = run.taken.get(at)
    return taken is not None and taken.is_current() and not hiders(run, taken)


def hiders(run: ActiveFeature, taken: Taken) -> list[tuple[str, Any]]:
    """(words, what stands there) for each name that a target has put ours under and that is not ours any more."""
    target = taken.target
    if isinstance(target, Target):
        module = sys.modules.get(target.module)
        value = find(module, target.name)[1] if module is not None else None
        is_ours_still = reaches(value, serving_stand_in(run, target.name))
        return [] if is_ours_still else [hidden(f"{target.module}.{target.name}", value)]
    if not taken.is_current():
        return [(f"{target.name} is undone, because {target.module} was executed again", None)]
    places = getattr(taken.undo, "places", None)
    rows = places() if places is not None else []
    return [
        hidden(f"{name_of(holder)}.{attribute}", value)
        for holder, attribute, ours in rows
        for value in [holder.get(attribute) if is_a(holder, dict) else own(holder, attribute)]
        if not reaches(value, functools.partial(operator.is_, ours))
    ]


def hidden(where: str, value: Any) -> tuple[str, Any]:
    return f"{where} is {describe_object(value)}", value


def describe_object(value: Any) -> str:
    """What ``value`` is, as "module:name"; of a stand-in of ours, what serves there."""
    if not is_ours(value):
        return describe(value)
    serve = value._self_entry.serve
    return describe(serve.serve if is_a(serve, Around) else serve)
