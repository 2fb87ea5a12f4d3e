"""What an installed host's source says of a feature, before anything of the host is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mla_patch import endings, release, sources
from mla_patch.compat import gpu
from mla_patch.compat.hosts import Installed
from mla_patch.compat.types import Change, Edit, Home, key_targets
from mla_patch.features import DeviceCheck, Feature, State
from mla_patch.flags import EXPERIMENTS, Setting

UNKNOWN_GPU = (
    "the GPU of the first call decides whether the engine's code is kept"  # in a reason, after why it is unknown
)


@dataclass
class Eligibility:
    """What the source of an installed host says of one feature."""

    state: State
    reason: str = ""
    targets: list[Change] = field(default_factory=list)  # one per entry point that is ours to take
    watch: list[str] = field(default_factory=list)  # modules whose import is the moment to complain
    # asked of the first call's device, which may be another than the one that was known before: why the host's own is
    # kept, or None
    device_checks: dict[DeviceCheck, set[str]] = field(
        default_factory=dict
    )  # and whose entry points' first call is looked at


def check(
    feature: Feature,
    setting: Setting,
    host: Installed | None,
    *,
    skip_version_check: bool = False,
) -> Eligibility:
    """The state that this machine would reach, from flags, versions and source alone; imports nothing of the host."""
    try:
        return _judge(feature, setting, host, skip_version_check)
    except BaseException as problem:  # a plugin's declaration; other features and the caller are not to suffer
        endings.pass_on(problem)
        return Eligibility(State.FAILED, endings.text_of(problem))


def by_flag(feature: Feature, setting: Setting) -> Eligibility | None:
    """What the flag alone decides, whatever the host; None: nothing."""
    if setting.problem:
        return Eligibility(State.REFUSED, setting.problem)
    if setting.value == "off":
        return Eligibility(State.OFF, f"{setting.name}=off ({setting.source})")
    if setting.value in EXPERIMENTS and feature.steps is None:
        return Eligibility(
            State.REFUSED, f"{setting.name}={setting.value}: there is no host arm to compare with; set on or off"
        )
    return None


def _judge(feature: Feature, setting: Setting, host: Installed | None, skip_version_check: bool) -> Eligibility:
    decided = by_flag(feature, setting)
    if decided is not None:
        return decided
    if host is None:
        return Eligibility(State.ABSENT, f"{feature.host_name} is not installed")
    found = release.find(feature, host, _source(), skip_version_check)
    if found.outside:
        return Eligibility(State.ABSENT, found.outside)
    notes, version = found.notes, found.version
    taken: list[Change] = []
    natives: dict[str, list[str]] = {}  # why the host keeps its own: which entry points
    lost: dict[str, list[str]] = {}  # groups of entry points that have drifted: how
    device_checks: dict[DeviceCheck, set[str]] = {}
    watch: list[str] = []
    device = gpu.known()
    refusal = feature.refusal(device)
    entries = feature.targets(version)
    if setting.value in EXPERIMENTS and feature.steps is not None:
        entries += feature.steps(version)
    for entry, homes in key_targets(entries).items():
        # an explicit "on" forces ours where the host has its own
        own = (
            feature.native(homes[0], version or found.nearest)
            if feature.native is not None and not setting.asked_for
            else None
        )
        if callable(own):
            ask = own
            own = ask(device) if device is not None and not refusal else None
            if own is None:
                device_checks.setdefault(ask, set()).update(home.name for home in homes)
        if own is not None:
            natives.setdefault(own, []).append(entry)
            continue
        problems, missing = [], []
        for target in homes:
            problem = _source_problem(target)
            if problem is None:
                taken.append(target)
                break
            package = target.module.partition(".")[0]
            if sources.find_package(package) is None:
                missing.append(package)
            else:
                problems.append(problem)
        else:
            if not problems:
                return Eligibility(State.ABSENT, f"{' or '.join(dict.fromkeys(missing))} is not installed")
            present = [home.module for home in homes if sources.find_module(home.module)]
            if not homes[0].group:
                return Eligibility(State.DRIFTED, "; ".join(dict.fromkeys(problems)), watch=present)
            watch += present
            lost.setdefault(homes[0].group, []).extend(problems)
    drifted = list(dict.fromkeys(f"{group}: {problem}" for group, problems in lost.items() for problem in problems))
    taken = [target for target in taken if target.group not in lost]
    if lost and not any(target.group for target in taken):
        return Eligibility(State.DRIFTED, "; ".join(drifted), watch=watch)
    if not taken:
        return Eligibility(State.NATIVE, "; ".join([*notes, *kept(natives)]))
    if refusal:
        return Eligibility(State.REFUSED, refusal, watch=[target.module for target in taken])
    told = [*notes, *kept(natives), *drifted]
    if device_checks and device is None:
        told.append(f"{gpu.why_unknown() or 'the GPU is not known'}: {UNKNOWN_GPU}")
    return Eligibility(State.ARMED, "; ".join(told), taken, device_checks=device_checks)


def kept(natives: Mapping[str, Sequence[str]]) -> list[str]:
    """Why the host keeps its own entry points, each reason once."""
    return [f"{', '.join(entries)}: {reason}" for reason, entries in natives.items()]


def release_here(feature: Feature, host: Installed) -> str | None:
    """The release that ``feature`` meets in an installed host, by its version or its source; None: it is outside."""
    found = release.find(feature, host, _source())
    return found.version or found.nearest


def _source() -> release.Source:
    return release.Source(lambda module: sources.find_module(module) is not None, _source_problem)


def nothing_active(hosts: Sequence[Installed], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For ``doctor``: the installed hosts on which MLA_PATCH=1 would leave nothing active, why, and the ways out.

    ``rows`` are features as reports have them. A host on which all is switched off, or has all of it itself, is as
    somebody wants it.
    """
    active = {row["host"] for row in rows if row["state"] in (State.ARMED, State.APPLIED)}
    found = []
    for host in hosts:
        name, mine = host.host.name, [row for row in rows if row["host"] == host.host.name]
        if not mine and not active:
            found.append(f"no feature exists for {name}: MLA_PATCH=1 changes nothing in it")
        if name in active or all(row["state"] in (State.OFF, State.NATIVE) for row in mine):
            continue
        reasons: dict[str, list[str]] = {}
        for row in mine:
            reasons.setdefault(f"{row['state']}, {row['reason']}", []).append(row["name"])
        why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        text = f"MLA_PATCH=1 leaves nothing active on {name} {host.version or 'of an unknown version'} ({why})"
        found.append(f"{text}. Options: {', or '.join(_ways_out(name, mine))}")
    return found


def _ways_out(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a person can do where no feature of a host is active."""
    ways = [f"another release of {name} (`mla-patch list` says which)"]
    if any(" is outside " in row["reason"] for row in rows if row["state"] == State.ABSENT):
        ways.insert(0, "MLA_PATCH_SKIP_VERSION_CHECK=1, which patches entry points that match the reviewed ones")
    ways += [f"{row['flag']}=on, which replaces the engine's code" for row in rows if row["state"] == State.NATIVE]
    ways += [f"{row['flag']} unset" for row in rows if row["state"] == State.OFF]
    return ways


def code_of(change: Change) -> str:
    """Our code, as "module:function"."""
    code = change.edit if isinstance(change, Edit) else change.serve
    return code if isinstance(code, str) else f"{code.__module__}:{code.__qualname__}"


def _source_problem(target: Change) -> str | None:
    path = sources.find_module(target.module)
    if path is None:
        return f"{target.module} does not exist"
    if isinstance(target, Edit):
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


def difference(target: Home, found: tuple[str, ...]) -> str | None:
    """How the parameters found differ from those reviewed, or None."""
    if found == target.params:
        return None
    gone = [p for p in target.params if p not in found]
    new = [p for p in found if p not in target.params]
    parts = [f"lacks {', '.join(gone)}" if gone else "", f"has the new {', '.join(new)}" if new else ""]
    return (
        f"{target.module}.{target.name} {' and '.join(filter(None, parts)) or 'takes its parameters in another order'}"
    )
