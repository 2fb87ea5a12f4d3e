#!/usr/bin/env python3
"""Tables in the docs that are written from the declarations: ``python tests/generated.py [--write]``."""

import sys
from pathlib import Path

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


TABLES = {"docs/flags.md": ("flags", flag_table), "docs/deterministic-inference.md": ("promises", promise_table)}


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
