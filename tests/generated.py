#!/usr/bin/env python3
"""Text in the docs that is written from the declarations: ``python tests/generated.py [--write]``."""

import sys
from pathlib import Path

from mla_patch import flags, plugins

ROOT = Path(__file__).resolve().parents[1]


def flag_table() -> str:
    """README's table of variables."""
    rows = ["| variable | values | default | what it does |", "| --- | --- | --- | --- |"]
    for flag in flags.known(plugins.load().features).values():
        switch = flag.values in ("1", "a directory")  # off by not being set
        default = "unset" if switch else f"`{flag.default}`"
        values = flag.values if flag.values in ("a directory", "as the default", "text") else f"`{flag.values}`"
        rows.append(f"| `{flag.name}` | {values} | {default} | {flag.help} |")
    return "\n".join(rows)


def promise_table() -> str:
    """README's table of what becomes of an engine's promises about results."""
    rows = ["| feature | what becomes of it |", "| --- | --- |"]
    for feature in plugins.load().features:
        what, _, how = feature.promises.partition(": ")
        assert what == "deterministic inference", f"{feature.label}: {feature.promises}"
        rows.append(f"| `{feature.name}` | {how} |")
    return "\n".join(rows)


def readme() -> str:
    """README.md as it should be."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, table in (("flags", flag_table()), ("promises", promise_table())):
        head, rest = text.split(f"<!-- {name}:", 1)
        mark, rest = rest.split("\n", 1)
        end = f"<!-- /{name} -->"
        text = f"{head}<!-- {name}:{mark}\n{table}\n{end}{rest.split(end, 1)[1]}"
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    else:
        print(flag_table())
