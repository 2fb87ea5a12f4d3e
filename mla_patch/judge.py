"""What an installed host's source says of a feature, before anything of the host is imported."""

from __future__ import annotations

from dataclasses import dataclass, field

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from mla_patch import sources
from mla_patch.compat import gpu
from mla_patch.compat.hosts import Installed
from mla_patch.compat.types import Target, key_targets
from mla_patch.features import Asked, Feature, State
from mla_patch.flags import EXPERIMENTS, Setting

UNKNOWN_GPU = "NVML tells of no GPU: the first call's decides whether the host's own is kept"


@dataclass
class Judgement:
    """What the source of an installed host says of one feature."""

    state: State
    reason: str = ""
    targets: list[Target] = field(default_factory=list)  # one per entry point that is ours to take
    watch: list[str] = field(default_factory=list)  # modules whose import is the moment to complain
    asks: list[Asked] = field(default_factory=list)  # of the first call's device: why the host's own is kept, or None


def judge(
    feature: Feature,
    setting: Setting,
    host: Installed | None,
    *,
    skip_version_check: bool = False,
    skip_finders: tuple[type, ...] = (),
) -> Judgement:
    """The state that this machine would reach, from flags, versions and source alone; imports nothing of the host."""
    if setting.problem:
        return Judgement(State.REFUSED, setting.problem)
    if setting.value == "off":
        return Judgement(State.OFF, f"{setting.name}=off ({setting.source})")
    if setting.value in EXPERIMENTS and feature.steps is None:
        return Judgement(
            State.REFUSED, f"{setting.name}={setting.value}: no arm of the host's to compare with; set on or off"
        )
    name, specifier = feature.requirement()
    if host is None:
        return Judgement(State.ABSENT, f"{name} is not installed")
    notes = [host.note] if host.note else []
    version = host.version
    if version is not None:
        try:
            parsed = Version(version)
        except InvalidVersion:
            notes.append(f"version {version} cannot be read")
            version = None
        else:
            if not SpecifierSet(specifier).contains(parsed, prereleases=True):
                if not skip_version_check:
                    return Judgement(State.ABSENT, f"{name} {version} is outside {specifier}")
                notes.append(f"outside {specifier}: unreviewed, applied on request")
            elif version not in host.host.reviewed and host.host.reviewed:
                notes.append(f"{name} {version} is unreviewed")
            if parsed.is_devrelease:
                version = None  # its code may be either neighbour's
    if version is None:
        notes.append("every known home is tried")
    taken: list[Target] = []
    natives: list[str] = []
    asks: list[Asked] = []
    entries = feature.targets(version)
    if setting.value in EXPERIMENTS and feature.steps is not None:
        entries += feature.steps(version)
    for entry, homes in key_targets(entries).items():
        # an explicit "on" forces ours where the host has its own
        own = feature.native(homes[0], version) if feature.native is not None and not setting.asked_for else None
        if callable(own):
            device = gpu.known()
            if device is None:
                asks.append(own)
            own = own(device) if device is not None else None
        if own is not None:
            natives.append(f"{entry}: {own}")
            continue
        problems = []
        for target in homes:
            problem = _source_problem(target, skip_finders)
            if problem is None:
                taken.append(target)
                break
            problems.append(problem)
        else:
            present = [home.module for home in homes if sources.find_module(home.module, skip_finders)]
            return Judgement(State.DRIFTED, "; ".join(dict.fromkeys(problems)), watch=present)
    if not taken:
        return Judgement(State.NATIVE, "; ".join(natives))
    if feature.hardware is not None:
        device = gpu.known()
        refusal = feature.hardware(device) if device is not None else None
        if refusal:
            return Judgement(State.REFUSED, refusal, watch=[target.module for target in taken])
    asks = list(dict.fromkeys(asks))
    return Judgement(State.ARMED, "; ".join([*notes, *natives, *([UNKNOWN_GPU] if asks else [])]), taken, asks=asks)


def code_of(target: Target) -> str:
    """The code that takes a target's place, as "module:function"."""
    return f"{target.edit.__module__}:{target.edit.__qualname__}" if target.edit is not None else target.serve


def _source_problem(target: Target, skip_finders: tuple[type, ...]) -> str | None:
    path = sources.find_module(target.module, skip_finders)
    if path is None:
        return f"{target.module} does not exist"
    if target.kind == "edit":
        return None
    try:
        module = sources.read_module(path)
    except (OSError, SyntaxError, ValueError) as problem:
        return f"{target.module} cannot be read: {problem}"
    found = module.params.get(target.name)
    if found is None and "." not in target.name:
        return f"{target.module} has no {target.name}"
    if found is None:
        return None  # an inherited method: only the live class can tell
    if target.kind == "kernel" and target.name in module.launched_by:
        return f"{target.name} is called by another kernel, {module.launched_by[target.name]}"
    return difference(target, found)


def difference(target: Target, found: tuple[str, ...]) -> str | None:
    """How the parameters found differ from those reviewed, or None."""
    if found == target.params:
        return None
    gone = [p for p in target.params if p not in found]
    new = [p for p in found if p not in target.params]
    parts = [f"lacks {', '.join(gone)}" if gone else "", f"has the new {', '.join(new)}" if new else ""]
    return (
        f"{target.module}.{target.name} {' and '.join(filter(None, parts)) or 'takes its parameters in another order'}"
    )
