"""Every environment variable of ours: where a value came from, and whether it can be taken."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import mla_patch
from mla_patch import endings
from mla_patch.features import Feature, Variable

PREFIX = "MLA_PATCH"
EXPERIMENTS = ("ab", "shadow", "ab+shadow")
MODES = ("on", "off", *EXPERIMENTS)
_REPORT = "each process writes its report there; no other user may have write access"
ON = ("1", "on", "true", "yes", "enable", "enabled", "y", "t")
_SWITCH = dict.fromkeys(ON, "on") | dict.fromkeys(mla_patch.OFF, "off")
_SWITCHED = {"NO", "NOT", "OFF", "ON", "USE", "DISABLE", "DISABLED", "ENABLE", "ENABLED"}  # in NAME_OFF, DISABLE_NAME


@dataclass(frozen=True)
class Setting:
    """One variable's value and where it came from."""

    name: str
    value: str
    source: str  # "default", "environment", "command line", "apply()"
    problem: str = ""  # why the value cannot be taken

    @property
    def asked_for(self) -> bool:
        return self.source != "default"


@dataclass
class Flags:
    """All settings of this process. A bad one is in ``problems``, and nothing is lost by it."""

    settings: dict[str, Setting] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def feature(self, feature: Feature) -> Setting:
        """The mode of one feature on one host: the more special name wins, and each host has its own default."""
        setting = self.settings.get(feature.label) or self.settings[feature.flag]
        return setting if setting.asked_for else replace(setting, value=feature.default)

    def on(self, name: str) -> bool:
        return self.settings[name].value == "on"

    def text(self, name: str) -> str:
        return self.settings[name].value


@dataclass(frozen=True)
class Known:
    """A variable that exists: its default, how its text is read, and what to say of it."""

    name: str
    default: str
    read: Callable[[str], str]  # raises ValueError with what was expected
    values: str
    help: str


def known(features: Iterable[Feature], start: str | None = None) -> dict[str, Known]:
    """Every variable that means something to this set of features, by name; ``start`` as `read` takes it."""
    fixed = [
        Known(PREFIX, "off", _read_master, "1", "turns the plugin on; otherwise none of it is imported"),
        Known("MLA_PATCH_STRICT", "off", _read_switch, "1", "ends the process if a requested feature is unavailable"),
        Known("MLA_PATCH_REPORT", "", partial(_read_directory, start), "a directory", _REPORT),
        Known("MLA_PATCH_AB", "block=64,ratio=0.5,seed=0,warmup=128", _read_ab, "as the default", "schedule of A/B"),
        Known("MLA_PATCH_SHADOW", "every=64,tolerance=0.02", _read_shadow, "as the default", "shadow checks"),
        Known("MLA_PATCH_SKIP_VERSION_CHECK", "off", _read_switch, "1", "also patches unreviewed releases"),
    ]
    flags = {flag.name: flag for flag in fixed}
    for feature in features:
        flags[feature.flag] = _mode(feature, flags.get(feature.flag))
        for one in feature.variables:
            own = _own(feature.flag, one)
            flags[own.name] = own
    return flags


def _mode(feature: Feature, other: Known | None) -> Known:
    """The flag of ``feature``; ``other``: what a feature of that name on another host has made of it."""
    modes = (
        MODES if feature.steps is not None or (other is not None and other.values == ", ".join(MODES)) else MODES[:2]
    )
    return Known(feature.flag, feature.default, partial(_read_mode, modes), ", ".join(modes), feature.why)


def _own(flag: str, one: Variable) -> Known:
    read = _one_of(one.values) if one.values else one.read
    return Known(f"{flag}_{one.name}", one.default, read, ", ".join(one.values) or "text", one.help)


def read(
    environ: Mapping[str, str],
    features: Iterable[Feature],
    chosen: Mapping[str, str] | None = None,
    chosen_by: str = "command line",
    start: str | None = None,
) -> Flags:
    """Settings from ``chosen`` (feature -> mode; "decode" or "decode@sglang"), the environment and the defaults.

    ``start``: the directory in which this process started, where relative paths begin; None: it is in it still.
    """
    features = list(features)
    flags = Flags()
    table = known(features, start)
    for name, flag in table.items():
        raw = environ.get(name)
        setting = Setting(name, flag.default, "default") if raw is None else _take(flag, raw, "environment")
        flags.settings[name] = setting
    switches = dict.fromkeys(feature.flag for feature in features)
    for name in sorted(environ):
        if name in table:
            continue
        meant = meant_feature(name, switches, table)
        if meant is not None:
            # it may have been a switch-off: what it looks like is withheld
            problem = f"{name} is not a variable of mla-patch; did you mean {meant}?"
            flags.settings[meant] = Setting(meant, table[meant].default, "environment", problem)
        elif name.startswith(PREFIX + "_"):
            flags.problems.append(f"{name} is not a variable of mla-patch{nearest(name, table)}")
    names = [name for feature in features for name in (feature.name, feature.label)]
    for name, raw in (chosen or {}).items():
        if name not in names:
            flags.problems.append(f"{name!r} is not a feature{nearest(name, names)}")
            continue
        for feature in features:
            if feature.matches(name):
                flag = table[feature.flag]
                key = feature.label if "@" in name else feature.flag
                flags.settings[key] = _take(flag, raw, chosen_by)
    flags.problems += [setting.problem for setting in flags.settings.values() if setting.problem]
    return flags


def variable(feature: Feature, name: str) -> str:
    """The value of ``MLA_PATCH_<FEATURE>_<NAME>`` now; the default where what is set cannot be taken, as was told."""
    return value(feature.flag, next(one for one in feature.variables if one.name == name))


def value(flag: str, one: Variable) -> str:
    """The value now of a variable below ``flag``, "MLA_PATCH_<FEATURE>", for who does not know the feature itself."""
    own = _own(flag, one)
    raw = os.environ.get(own.name)
    return own.default if raw is None else _take(own, raw, "environment").value


def _take(flag: Known, raw: str, source: str) -> Setting:
    try:
        return Setting(flag.name, flag.read(raw), source)
    except ValueError as problem:
        return Setting(flag.name, flag.default, source, f"{flag.name}={raw}: {problem}")
    except BaseException as problem:  # a plugin's own way to read it; the other variables are not to suffer
        endings.pass_on(problem)
        return Setting(flag.name, flag.default, source, f"{flag.name}={raw}: {endings.text_of(problem)}")


def meant_feature(name: str, switches: Collection[str], names: Collection[str]) -> str | None:
    """The one feature's flag among ``switches`` that an unknown variable looks like, or None.

    It looks like a flag where little is misspelt or left out of it, or where a word such as DISABLE is added. Where
    another of ``names`` is as close, it looks like that one.
    """
    text = "_".join(word for word in name.upper().split("_") if word not in _SWITCHED)
    if not text.startswith("MLA"):
        return None
    prefixed = text.startswith(PREFIX + "_")
    common = len(PREFIX) + 1 if prefixed else 0  # what all have in common tells nothing

    def likeness(flag: str) -> float:
        if prefixed and len(text) > common + 1 and flag in switches and flag.startswith(text):
            return 1.0  # MLA_PATCH_SPARSE, for one
        return difflib.SequenceMatcher(None, text[common:], flag[common:], autojunk=False).ratio()

    first, second = sorted(((likeness(flag), flag) for flag in names), reverse=True)[:2]
    unlike = first[0] < (0.6 if prefixed else 0.9) or first[0] == second[0]
    return None if unlike or first[1] not in switches else first[1]


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean X?" for the name closest to ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _one_of(values: tuple[str, ...]) -> Callable[[str], str]:
    def read_value(raw: str) -> str:
        text = raw.strip().lower()
        if text not in values:
            raise ValueError(f"expected one of {', '.join(values)}{nearest(text, values)}")
        return text

    return read_value


def _read_mode(modes: tuple[str, ...], raw: str) -> str:
    text = raw.strip().lower()
    if text in _SWITCH:
        return _SWITCH[text]
    if text in MODES and text not in modes:
        raise ValueError(f"there is no host arm to compare with; expected one of {', '.join(modes)}")
    return _one_of(modes)(text)


def _read_switch(raw: str) -> str:
    text = raw.strip().lower()
    if text not in _SWITCH:
        raise ValueError("expected 1 or 0")
    return _SWITCH[text]


def _read_master(raw: str) -> str:
    # the door has let any other value in, so it means on
    return _SWITCH.get(raw.strip().lower(), "on")


def _read_directory(start: str | None, raw: str) -> str:
    """An absolute path: an engine may change its directory later, and no shell has seen a ~ that comes from YAML."""
    if not raw:
        return ""
    try:
        path = os.path.expanduser(raw)
        return os.path.abspath(path if start is None else os.path.join(start, path))
    except OSError:
        raise ValueError("the working directory is gone, expected an absolute path") from None


def _read_ab(raw: str) -> str:
    # nothing of experiments is imported where none is asked for
    from mla_patch.experiment.schedule import MIN_STEPS, parse_ab

    block = parse_ab(raw).block
    if block < MIN_STEPS:
        raise ValueError(f"block={block}: expected {MIN_STEPS} or more: shorter blocks are not compared")
    return raw.strip()


def _read_shadow(raw: str) -> str:
    from mla_patch.experiment.schedule import parse_shadow

    parse_shadow(raw)
    return raw.strip()
