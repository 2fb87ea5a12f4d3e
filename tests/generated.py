#!/usr/bin/env python3
"""Tables in the docs that are written from the declarations: ``python tests/generated.py [--write]``."""

import json
import sys
from pathlib import Path

from packaging.specifiers import SpecifierSet

from mla_patch import flags, plugins

ROOT = Path(__file__).resolve().parents[1]


def flag_table() -> str:
    """Every environment variable."""
    features = plugins.load().features
    switches = {feature.flag: feature.name for feature in features}
    rows = ["| variable | values | default | meaning |", "| --- | --- | --- | --- |"]
    for flag in flags.known(features).values():
        switch = flag.values in ("1", "a directory")  # off by not being set
        default = "unset" if switch else f"`{flag.default}`"
        values = flag.values if flag.values in ("a directory", "as the default", "text") else f"`{flag.values}`"
        meaning = f"`{switches[flag.name]}`: {flag.help}" if flag.name in switches else flag.help
        rows.append(f"| `{flag.name}` | {values} | {default} | {meaning} |")
    return "\n".join(rows)


def promise_table() -> str:
    """What each feature does where the engine promises deterministic inference."""
    rows = ["| feature | in this mode |", "| --- | --- |"]
    for feature in plugins.load().features:
        what, _, how = feature.promises.partition(": ")
        assert what == "deterministic inference", f"{feature.label}: {feature.promises}"
        rows.append(f"| `{feature.name}` | {how} |")
    return "\n".join(rows)


def entry_point_table() -> str:
    """Where each feature's entry points live in the reviewed releases, as the wheels were read."""
    read = json.loads((ROOT / "tests" / "hosts" / "reviewed.json").read_text(encoding="utf-8"))
    releases = list(read["pins"])
    places: dict[tuple[str, str, str], list[str]] = {}
    for feature in plugins.load().features:
        asked = SpecifierSet(feature.requirement()[1])
        for release in filter(asked.contains, releases):
            for target in feature.targets(release):
                eras = read["functions"].get(f"{target.module}:{target.name}", ())
                if target.kind != "edit" and any(release in era["releases"].split() for era in eras):
                    places.setdefault((feature.name, target.name, target.module), []).append(release)
    rows = ["| feature | entry point | module | SGLang |", "| --- | --- | --- | --- |"]
    for (feature, name, module), there in sorted(places.items(), key=lambda one: one[0][:2]):
        rows.append(f"| `{feature}` | `{name}` | `{module}` | {spans(there, releases)} |")
    return "\n".join(rows)


def spans(some: list[str], every: list[str]) -> str:
    """Releases as ranges that include both ends: "0.5.1 - 0.5.3, 0.5.5"."""
    runs: list[list[str]] = []
    for release in some:
        follows = runs and every.index(release) == every.index(runs[-1][-1]) + 1
        runs[-1].append(release) if follows else runs.append([release])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} - {run[-1]}" for run in runs)


TABLES = {
    "docs/flags.md": ("flags", flag_table),
    "docs/deterministic-inference.md": ("promises", promise_table),
    "docs/support-matrix.md": ("entry points", entry_point_table),
}


def page(path: str) -> str:
    """The page as it should be: its table is written between two comments."""
    name, table = TABLES[path]
    head, rest = (ROOT / path).read_text(encoding="utf-8").split(f"<!-- {name}:", 1)
    mark, rest = rest.split("\n", 1)
    end = f"<!-- /{name} -->"
    return f"{head}<!-- {name}:{mark}\n{table()}\n{end}{rest.split(end, 1)[1]}"


if __name__ == "__main__":
    for path in TABLES:
        if "--write" in sys.argv:
            (ROOT / path).write_text(page(path), encoding="utf-8")
        else:
            print(page(path))
