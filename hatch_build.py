"""An editable install has no site-packages copy of the start-up files unless it is asked for."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StartFiles(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            # this replaces the wheel's force-include, which would lay a stale copy of hooks and compat in the way
            build_data["force_include_editable"] = {name: name for name in ("mla_patch.pth", "mla_patch.start")}
