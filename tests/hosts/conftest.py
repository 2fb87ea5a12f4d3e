"""Which worker runs which release; and, at the end, which modules of each release were imported or judged by source."""

import os
from pathlib import Path
from typing import Any

import hosts
import pytest


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where answers of processes are kept for this run; with several workers, the folder above all of theirs."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Neighbouring releases import the same packages, and all their processes are forks of one that has done so."""
    ours = [item for item in items if item.path.parent == hosts.HERE]
    mine = {id(item) for item in ours}
    ordered = iter(sorted(ours, key=lambda item: hosts.place_of(item.nodeid)))
    items[:] = [next(ordered) if id(item) in mine else item for item in items]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests that look at one process run in one worker, and other workers have other processes meanwhile.

    Else two workers take neighbouring tests, and one of them waits for the process that the other has started.
    xdist's own groups of marks are lost under pytest 9.2 (pytest-xdist 3.8).
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByProcess(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return hosts.process_of(nodeid)

    return ByProcess(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for group in terminalreporter.stats.values() for r in group if hasattr(r, "user_properties")]
    seen = {value["release"]: value for r in reports for name, value in r.user_properties if name == "sglang"}
    if seen:
        terminalreporter.section("real SGLang releases")
    for release, told in seen.items():
        modules = {row["module"]: row["error"] for row in told["holders"].values()}
        imported = [module.rpartition(".")[2] for module, error in modules.items() if error is None]
        routes = ", ".join(f"{route} ({row['entries']})" for route, row in told["ours"].items())
        terminalreporter.line(f"{release}: {told['seconds']} s, stand-ins for {', '.join(told['stubbed'])}")
        terminalreporter.line(f"    imported and holding: {', '.join(imported)}")
        for module, error in modules.items():
            if error is not None:
                terminalreporter.line(f"    judged by its source: {module}: {error}")
        terminalreporter.line(f"    served, entries: {routes}")
