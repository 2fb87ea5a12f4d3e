"""``mla-patch explain``: where a feature goes, and what becomes of it on a release and a GPU that need not be here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from packaging.specifiers import SpecifierSet

from mla_patch import flags as flags_
from mla_patch.cli import here, show
from mla_patch.cli.exits import OK, Misuse
from mla_patch.cli.show import Line
from mla_patch.compat import gpu, hosts
from mla_patch.compat.types import Edit, Gpu, key_targets
from mla_patch.eligibility import UNKNOWN_GPU, by_flag, code_of, kept, release_here
from mla_patch.features import MEANING, Feature, State
from mla_patch.flags import Setting
from mla_patch.session import find_host


def explain(args: argparse.Namespace) -> int:
    plugins, flags = here.read_flags([])
    features = [feature for feature in plugins.features if feature.matches(args.feature)]
    if not features:
        names = [name for feature in plugins.features for name in (feature.name, feature.label)]
        raise Misuse(f"{args.feature!r} is not a feature{flags_.nearest(args.feature, names)}")
    places = [row for feature in features for row in routes(feature)]
    states = [here.would_be(feature, flags, plugins) for feature in features]
    for row in states:
        row["meaning"] = MEANING[State(row["state"])]
    providers = [
        {"feature": feature.label, "provider": provider, "when": when}
        for feature in features
        for provider, when in feature.providers
    ]
    verdicts, servers = _elsewhere(features, flags, args)
    promises = [{"feature": feature.label, "text": feature.promises} for feature in features if feature.promises]
    if args.json:
        told: dict[str, Any] = {"feature": args.feature, "routes": places, "states": states}
        more = {"providers": providers, "verdicts": verdicts, "serves": servers, "promises": promises}
        show.as_json(told | {name: rows for name, rows in more.items() if rows})
        return OK
    for feature in features:
        show.show(Line(f" {feature.why}", head=feature.label))
        show.lines(filter(None, [f"from {feature.upstream}", f"needed until {feature.drop_when}", feature.promises]))
    show.table("routes", ["host", "releases", "module", "name", "kind", "replaced_by"], places)
    if providers:
        show.table("who serves a call (the first row that applies)", ["provider", "when"], providers)
    if verdicts:
        show.table("on that release and GPU", ["host", "release", "sm", "state", "reason"], verdicts)
    if servers:
        title = f"who serves by default, on {servers[0]['host']} {servers[0]['release']} and {servers[0]['sm']}"
        show.table(title, ["heads", "what", "who"], by_heads(servers))
    elif not (args.release and args.sm):
        show.lines(["for another release and GPU, pass both, such as --release 0.5.18 --sm 90"])
    show.table("on this machine", ["host", "flag", "value", "source", "state", "reason", "meaning"], states)
    return OK


def _elsewhere(
    features: Sequence[Feature], flags: flags_.Flags, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What becomes of the features on the release and GPU that are named, this machine's where one is not."""
    verdicts: list[dict[str, Any]] = []
    servers: list[dict[str, Any]] = []
    device = Gpu(f"sm_{args.sm[0]}{args.sm[1]}", args.sm) if args.sm else gpu.for_engines()[0]
    for feature in features:
        found = find_host(feature.host_name)
        installed = release_here(feature, found) if found else None
        release: str | None = installed if args.release is None else args.release
        if args.release is not None and not in_range(args.release, feature):
            raise Misuse(f"--release {args.release}: expected a version that is {feature.requirement()[1]}")
        if release is None:
            continue
        setting = flags.feature(feature)
        if args.release is not None or args.sm:
            verdicts.append(verdict(feature, setting, release, device))
        if device is not None and in_range(release, feature):
            servers += serves(feature, setting, release, device, args.heads)
    return verdicts, servers


def in_range(version: str, feature: Feature) -> bool:
    try:
        return SpecifierSet(feature.requirement()[1]).contains(version, prereleases=True)
    except ValueError:  # no version at all
        return False


def verdict(feature: Feature, setting: Setting, release: str, device: Gpu | None) -> dict[str, Any]:
    """What becomes of ``feature`` in an engine of ``release``; ``device`` None: no GPU is named.

    The rules are those of `eligibility`, for a host that need not be installed: its release stands for its source.
    """
    state, reason = _decide(feature, setting, release, device)
    row = {"feature": feature.name, "host": feature.host_name, "release": release, "sm": device.sm if device else None}
    return row | {"state": str(state), "reason": reason}


def _decide(feature: Feature, setting: Setting, release: str, device: Gpu | None) -> tuple[State, str]:
    decided = by_flag(feature, setting)
    if decided is not None:
        return decided.state, decided.reason
    if not in_range(release, feature):
        return State.ABSENT, f"{feature.host_name} {release} is outside {feature.requirement()[1]}"
    refusal = feature.refusal(device)
    ours, open_ = False, False
    natives: dict[str, list[str]] = {}
    for entry, homes in key_targets(feature.targets(release)).items():
        own = feature.native(homes[0], release) if feature.native is not None and not setting.asked_for else None
        if callable(own):
            open_ = open_ or device is None
            own = own(device) if device is not None else None
        if own is None:
            ours = True
        else:
            natives.setdefault(own, []).append(entry)
    if not ours:
        return State.NATIVE, "; ".join(kept(natives))
    if refusal:
        return State.REFUSED, refusal
    return State.APPLIED, "; ".join([*kept(natives), *([UNKNOWN_GPU] if open_ else [])])


def serves(feature: Feature, setting: Setting, release: str, device: Gpu, heads: Sequence[int]) -> list[dict[str, Any]]:
    """Who serves, for each number of heads, where a feature chooses by it."""
    if feature.serves is None:
        return []
    asked = setting.asked_for and setting.value == "on"
    return [
        {"host": feature.host_name, "release": release, "sm": device.sm, "heads": count, "what": what, "who": who}
        for count in heads
        for what, who in feature.serves(release, device.capability, count, asked)
    ]


def by_heads(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `serves` says, for people: numbers of heads of which it says the same share a row."""
    heads: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        heads.setdefault((row["what"], row["who"]), []).append(str(row["heads"]))
    return [{"heads": ", ".join(counts), "what": what, "who": who} for (what, who), counts in heads.items()]


def routes(feature: Feature) -> list[dict[str, Any]]:
    """Where the feature goes, one row per entry point and run of releases with the same home and parameters."""
    name, specifier = feature.requirement()
    reviewed = [version for version in hosts.host(name).reviewed if in_range(version, feature)]
    rows: list[dict[str, Any]] = []
    versions: list[str | None] = [*reviewed] or [None]
    for before, version in zip([None, *versions], versions, strict=False):
        for target in feature.targets(version):
            params = [] if isinstance(target, Edit) else list(target.params)
            entry = (target.name, target.module, params)
            alike = (row for row in rows if (row["name"], row["module"], row["params"]) == entry)
            same = next((row for row in alike if row["releases"].rpartition(" - ")[2] == before), None)
            if same:
                same["releases"] = f"{same['releases'].partition(' - ')[0]} - {version}"
                continue
            rows.append({
                "host": name, "releases": version or specifier or "any", "module": target.module, "name": target.name,
                "kind": target.kind, "params": params, "replaced_by": code_of(target),
            })  # fmt: skip
    return sorted(rows, key=lambda row: row["name"])
