"""``mla-patch list``: the features, the releases that they patch, and when they are no longer needed."""

from __future__ import annotations

import argparse

from mla_patch import plugins as plugins_
from mla_patch.cli import show
from mla_patch.cli.exits import FINDING, OK


def list_features(args: argparse.Namespace) -> int:
    plugins = plugins_.load()
    rows = [
        {
            "feature": feature.name,
            "host": feature.host_name,
            "range": feature.requirement()[1],
            "upstream": feature.upstream,
            "drop_when": feature.drop_when,
            "default": feature.default,
        }
        for feature in plugins.features
    ]
    if args.json:
        show.as_json(rows)
        for problem in plugins.problems:  # the rows have no place for it
            show.complain(problem)
    else:
        show.table("features", ["feature", "host", "range", "default", "upstream", "drop_when"], rows)
        show.lines(plugins.problems, "yellow")
    return FINDING if plugins.problems else OK
