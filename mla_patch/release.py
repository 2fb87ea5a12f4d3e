"""Which reviewed release an installed host's source is, as far as one feature is concerned.

A version is what somebody called the code, at times before it was written: source builds are called after older tags or
0.0.0, and a release candidate is not the release yet. Only a reviewed release's own number is believed at once.
Anything else is a hint. The source decides: by the modules that a release was the first to have (``Host.marks``), and
for each feature by its entry points, which must all look as they do in that release.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from mla_patch.compat.eras import between, since
from mla_patch.compat.hosts import Installed
from mla_patch.compat.types import Change, Host, key_targets
from mla_patch.features import Feature

EVERY_HOME = "every known home is tried"


@dataclass(frozen=True)
class Source:
    """What can be asked of an installed host's source; nothing of the host is imported."""

    has: Callable[[str], bool]  # (module) -> whether it exists
    problem: Callable[[Change], str | None]  # (target) -> how it differs from what was reviewed, or None

    def floor(self, host: Host) -> str | None:
        """The newest release of which all marks are there; None where no release's are."""
        return next((version for version, modules in host.marks if all(map(self.has, modules))), None)

    def fits(self, feature: Feature, package: str, version: str) -> bool:
        """Whether the host's entry points of ``feature`` are those of ``version``. Other packages tell nothing."""
        for mark in feature.marks:
            if self.has(mark.module) != between(version, mark.first, mark.until):
                return False
        for homes in key_targets(feature.targets(version)).values():
            own = [home for home in homes if home.module.partition(".")[0] == package]
            if own and all(self.problem(home) is not None for home in own):
                return False
        return True


@dataclass
class Release:
    """What a feature is asked about."""

    version: str | None  # for ``Feature.targets``; None: every known home
    nearest: str | None  # the reviewed release that the source resembles most; None: nothing tells
    notes: list[str] = field(default_factory=list)
    outside: str = ""  # why the feature is absent


def find(feature: Feature, host: Installed, source: Source, skip_version_check: bool = False) -> Release:
    """The release that ``feature`` meets in an installed host."""
    known, (name, specifier) = host.host, feature.requirement()
    called = f"{name} {host.version or 'of an unknown version'}"
    outside = f"{called} is outside {specifier}"
    notes = [host.note] if host.note else []
    parsed = _parsed(host.version)
    if host.version is not None and parsed is None:
        notes.append(f"version {host.version} cannot be read")

    def is_inside(version: str) -> bool:
        return skip_version_check or SpecifierSet(specifier).contains(version, prereleases=True)

    number = _published(parsed)
    if number is not None and not is_inside(number):
        return Release(None, None, outside=outside)
    is_reviewed = host.version in known.reviewed
    if number is not None and not SpecifierSet(specifier).contains(number, prereleases=True):
        notes.append(f"outside {specifier}: unreviewed, applied on request")
    elif number is not None and number == host.version and known.reviewed and not is_reviewed:
        notes.append(f"{called} is unreviewed")
    if number is not None and (not known.reviewed or (is_reviewed and not host.note)):
        return Release(number, number, notes)

    floor = source.floor(known)
    # a version file may be older than the code beside it; what an index or a wheel's metadata calls a release is not
    if number is not None and not (host.note and floor) and source.fits(feature, known.package, number):
        if number != host.version:
            notes.append(f"{called}: taken for {number} by its source")
        return Release(number, number, notes)
    if floor is not None and not is_inside(floor):
        return Release(None, None, outside=f"{outside}: by its source it is {floor}")
    for version in _from(known.reviewed, floor or number):
        if is_inside(version) and source.fits(feature, known.package, version):
            taken = "taken for" if host.version is None else f"{called}: taken for"
            return Release(version, version, [*notes, f"{taken} {version} by its source"])
    if number is not None:
        return Release(number, number, notes)
    if parsed is not None and not is_inside(str(parsed)):
        unlike = ", and its source matches no reviewed release" if known.reviewed else ""
        return Release(None, None, outside=outside + unlike)
    return Release(None, floor, [*notes, EVERY_HOME])


def _parsed(version: str | None) -> Version | None:
    try:
        return None if version is None else Version(version)
    except InvalidVersion:
        return None


def _published(version: Version | None) -> str | None:
    """The number that somebody has published, a candidate's being its release's; None of a build in between."""
    if version is None or version.is_devrelease:
        return None
    return version.base_version if version.is_prerelease else str(version)


def _from(reviewed: tuple[str, ...], version: str | None) -> list[str]:
    """All releases, the nearest to ``version`` first; None: the newest first."""
    if version is None:
        return list(reversed(reviewed))
    at = max((i for i, one in enumerate(reviewed) if since(version, one)), default=0)
    return sorted(reviewed, key=lambda one: abs(reviewed.index(one) - at))
