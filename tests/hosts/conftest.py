"""Tells at the end which modules of each release were imported, and which were judged by their source alone."""

import pytest


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
