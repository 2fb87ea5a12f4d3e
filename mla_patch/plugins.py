"""Finds the plugins and asks them what they bring. Our own hooks come in like a stranger's."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import metadata

import pluggy

from mla_patch import endings, hookspecs
from mla_patch.compat.named import named
from mla_patch.compat.types import HOST, PATCH, Arm, MlaKernel
from mla_patch.features import Feature
from mla_patch.flags import known

GROUP = "mla_patch"
# where the distribution's metadata is missing (a source tree on PYTHONPATH), these stand in for it
OWN_HOOKS = {
    "decode": "mla_patch.hooks.sglang.decode",
    "kv_cast": "mla_patch.hooks.sglang.kv_cast",
    "kv_indices": "mla_patch.hooks.sglang.kv_indices",
    "tokenspeed": "mla_patch.hooks.sglang.tokenspeed",
    "sched_meta": "mla_patch.hooks.sglang.sched_meta",
    "sparse_prefill": "mla_patch.hooks.sglang.sparse_prefill",
}


@dataclass
class Plugins:
    """What the plugins of this process offer, and which of them could not be used."""

    features: list[Feature] = field(default_factory=list)
    arms: list[Arm] = field(default_factory=list)
    kernels: list[MlaKernel] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    manager: pluggy.PluginManager = field(default_factory=lambda: pluggy.PluginManager(hookspecs.PROJECT), repr=False)

    def begin(self) -> list[str]:
        """Tell the plugins of this process what they all offer. Returns what went wrong, a line for each plugin."""
        problems = []
        for name, plugin in self.manager.list_name_plugin():
            try:
                others = [other for other in self.manager.get_plugins() if other is not plugin]
                self.manager.subset_hook_caller("mla_patch_begin", others)(kernels=self.kernels)
            except BaseException as problem:
                endings.pass_on(problem)
                problems.append(f"plugin {name}, mla_patch_begin: {endings.text_of(problem)}")
        return problems


def load() -> Plugins:
    """Load every plugin of the group; one that fails is named in ``problems`` and left out."""
    found = Plugins()
    manager = found.manager
    manager.add_hookspecs(hookspecs)
    for name, value in _entry_points():
        try:
            plugin = named(value)
            hash(plugin)  # pluggy puts all plugins into sets, later, when nobody can tell which one is to blame
            manager.register(plugin, name)
            manager.check_pending()
        except BaseException as problem:
            endings.pass_on(problem)
            if manager.has_plugin(name):
                manager.unregister(name=name)
            found.problems.append(f"plugin {name} ({value}) was left out: {endings.text_of(problem)}")
    # asked one by one, so that one plugin's error costs only its own offer
    for name, plugin in manager.list_name_plugin():
        try:
            one = manager.subset_hook_caller
            others = [p for p in manager.get_plugins() if p is not plugin]
            features = [f for offer in one("mla_patch_features", others)() for f in offer]
            arms = [a for offer in one("mla_patch_arms", others)() for a in offer]
            kernels = [k for offer in one("mla_patch_mla_kernels", others)() for k in offer]
            _check(features, arms)
            _check_kernels(kernels, found.kernels)
            labels = [f.label for f in (*found.features, *features)]
            clash = sorted({label for label in labels if labels.count(label) > 1})
            if clash:
                raise ValueError(f"feature {', '.join(clash)} is declared already")
        except BaseException as problem:
            endings.pass_on(problem)
            found.problems.append(f"plugin {name} was left out: {endings.text_of(problem)}")
            continue
        found.features += features
        found.arms += arms
        found.kernels += kernels
    names = [name for f in found.features for name in (f.name, f.label)]
    for arm in [arm for arm in found.arms if arm.feature not in names]:
        found.arms.remove(arm)
        found.problems.append(f"arm {arm.name} was left out: no feature is called {arm.feature}")
    found.features.sort(key=lambda f: f.label)
    return found


def _entry_points() -> list[tuple[str, str]]:
    """Name and value of every plugin. Distributions choose names alone, so one taken twice is told apart."""
    points = {point.value: point.name for point in metadata.entry_points(group=GROUP)}
    if not set(OWN_HOOKS.values()) & set(points):
        points |= {value: name for name, value in OWN_HOOKS.items()}
    names = list(points.values())
    return sorted((f"{name} of {value}" if names.count(name) > 1 else name, value) for value, name in points.items())


def _check(features: list[Feature], arms: list[Arm]) -> None:
    for feature in features:
        if not isinstance(feature, Feature):
            raise TypeError(f"mla_patch_features offered {feature!r}, expected a Feature")
        if feature.flag in known([]):
            raise ValueError(f"feature name {feature.name!r} is taken: {feature.flag} is a variable of its own")
        if not feature.name.replace("_", "").isalnum() or feature.name != feature.name.lower():
            raise ValueError(f"feature name {feature.name!r}: expected lower-case letters, digits and underscores")
    for arm in arms:
        if not isinstance(arm, Arm):
            raise TypeError(f"mla_patch_arms offered {arm!r}, expected an Arm")
        if arm.name in (HOST, PATCH):
            raise ValueError(f"arm name {arm.name!r} is taken")


def _check_kernels(kernels: list[MlaKernel], others: list[MlaKernel]) -> None:
    names = ["host", *(kernel.name for kernel in others)]
    for kernel in kernels:
        if not isinstance(kernel, MlaKernel):
            raise TypeError(f"mla_patch_mla_kernels offered {kernel!r}, expected an MlaKernel")
        if not (kernel.decode or kernel.prefill):
            raise ValueError(f"kernel {kernel.name!r} has neither decode nor prefill")
        if kernel.name in names:
            raise ValueError(f"kernel name {kernel.name!r} is taken")
        names.append(kernel.name)
