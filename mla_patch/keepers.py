"""Who keeps an object of the host where no name can be rebound: a search through the garbage collector's objects."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mla_patch.active import Mismatch, declines_nothing, ours_below
from mla_patch.bindings import loaded_modules
from mla_patch.compat.types import Target
from mla_patch.features import Counts, State
from mla_patch.stand_ins import is_ours
from mla_patch.standing import attribute_of, is_a, names_of, own, text_of


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


@contextmanager
def all_that_lives() -> Iterator[None]:
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


def cached_references(target: Target, value: Any, counts: Counts) -> Iterator[CachedReference]:
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
        pattern = held.within(declines_nothing) if instances and held.within is not None else None
        for instance in instances:
            bound = own(instance, attribute)
            if bound is None or ours_below(bound, target.name, counts) is not None:
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


def other_referrer(value: Any, kept: list[CachedReference], package: str, holder: Any) -> str | None:
    """Somebody who keeps ``value`` where no name can be rebound, or None. ``holder`` is where it is looked up.

    No closure may be made over ``value`` here: it would be found, too.
    """
    machinery = type(value).__module__.partition(".")[0]  # a kernel object's own parts refer to it
    module_dicts = {id(names) for _, names in loaded_modules()}
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
    """Whether ``bindings_of`` comes by this class."""
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
