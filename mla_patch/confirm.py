"""A target's live object, held against what was reviewed, once the host has imported its module."""

from __future__ import annotations

import inspect
import logging
import types
from dataclasses import dataclass
from typing import Any

from mla_patch.active import ActiveFeature, Mismatch, ours_below
from mla_patch.compat.types import Target
from mla_patch.displaced import describe_object
from mla_patch.eligibility import difference
from mla_patch.features import State
from mla_patch.keepers import CachedReference, cached_references, other_referrer
from mla_patch.stand_ins import is_ours
from mla_patch.standing import find, own

log = logging.getLogger("mla_patch")


@dataclass
class ConfirmedTarget:
    """A target's live object, confirmed."""

    target: Target
    holder: Any
    attribute: str
    value: Any
    kept: list[CachedReference]
    ours: Any = None  # what stood there, where something that cannot be confirmed stands there now


def find_live(run: ActiveFeature, at: int, target: Target, module: types.ModuleType, late: bool) -> ConfirmedTarget:
    """A target's live object, confirmed. Where somebody has put something else since, what stood there: ours."""
    taken = run.taken.get(at)
    holder, value = find(module, target.name)
    ours = run.made.get(target.entry or target.name)
    if taken is None or not taken.is_current() or not any(holder is place.where() for place in run.places):
        return confirm(run, target, module, late)
    log.warning(
        "mla-patch: %s.%s was %s; our code is back in place", target.module, target.name, describe_object(value)
    )
    return ConfirmedTarget(target, holder, target.name.rpartition(".")[2], value, [], ours)


def confirm(run: ActiveFeature, target: Target, module: types.ModuleType, late: bool) -> ConfirmedTarget:
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
    change = live_difference(target, value)
    if change is not None:
        somebody = describe_object(value)
        home = somebody.rpartition(" ")[2].partition(":")[0]
        # the source has been read, and was right; of a number or the like nobody can say where it is from
        if home.partition(".")[0] not in (target.module.partition(".")[0], "builtins"):
            raise Mismatch(f"{where} was wrapped or replaced by {somebody} before we patched it", State.REFUSED)
        raise Mismatch(change)
    ours = ours_below(value, target.name, run.status.counts)
    if not late or (ours is not None and ours._self_entry.switch is run.switch):
        return ConfirmedTarget(target, holder, attribute, value, [])
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    kept = list(cached_references(target, function if ours is None else ours.__wrapped__, run.status.counts))
    # whoever keeps what has ours below it reaches ours: an edit of ours that outlives restore(), for one
    reached = ours is not None or is_ours(value)
    keeper = None if reached else other_referrer(function, kept, target.module.partition(".")[0], holder)
    if keeper is not None:
        raise Mismatch(f"{where} was imported before and is kept by {keeper}", State.REFUSED)
    return ConfirmedTarget(target, holder, attribute, value, kept)


def live_difference(target: Target, value: Any) -> str | None:
    """How the live object differs from what was reviewed, or None."""
    where = f"{target.module}.{target.name}"
    if target.kind == "kernel" and not hasattr(type(value), "__getitem__"):
        return f"{where} is not a kernel that is launched as kernel[grid](...)"
    try:
        return difference(target, live_params(value))
    except (TypeError, ValueError) as problem:
        return f"{where} has no signature: {problem}"


def live_params(value: Any) -> tuple[str, ...]:
    names = getattr(value, "arg_names", None)
    if names is not None:
        return tuple(names)
    marks: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    return tuple(marks.get(p.kind, "") + p.name for p in inspect.signature(function).parameters.values())
