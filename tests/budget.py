"""What each test file may take, in CPU seconds of its own and of the processes that it starts.

A file may take ``DEFAULT`` seconds, or what its constant ``CPU_SECONDS`` says. CPU time, unlike time on the clock, does
not depend on what else a machine does. A slower machine gets more: beside each test a small piece of work is timed.
The run fails, and names the file, where a file takes more.
"""

import os
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

DEFAULT = 50.0
WORK = 0.0125  # CPU seconds of `work` on the machine that the budgets were measured on

_START = pytest.StashKey[float]()
_TAKEN = pytest.StashKey["Taken"]()


class Taken:
    """What all files have taken."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.budgets: dict[str, float] = {}
        self.work: list[float] = []

    def add(self, file: str, seconds: float, budget: float, took: float) -> None:
        self.seconds[file] += seconds
        self.budgets[file] = budget
        self.work.append(took)

    @property
    def slowness(self) -> float:
        """1 on the machine of the budgets, 2 on one that takes twice as long; no less than 1."""
        return max(1.0, statistics.mean(self.work) / WORK) if self.work else 1.0

    def over(self) -> list[str]:
        """A line for each file that took more than it may."""
        return [
            f"{file}: {seconds:.1f} CPU seconds, of which it may take {self.budgets[file]:g} x {self.slowness:.1f}"
            for file, seconds in self.seconds.most_common()
            if seconds > self.budgets[file] * self.slowness
        ]


def work() -> float:
    """CPU seconds that a fixed piece of work takes."""
    start, total = time.process_time(), 0
    for number in range(150_000):
        total += number * number % 7
    return time.process_time() - start


def cpu_seconds() -> float:
    """Of this process, of its children that have ended, and of forks that a running child tells of."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    told = sys.modules.get("preloaded")
    return sum(one.ru_utime + one.ru_stime for one in both) + (told.cpu_seconds() if told is not None else 0)


def is_kept() -> bool:
    """Budgets are of what CI runs: the interpreter, and a release of every era."""
    return os.environ.get("TRITON_INTERPRET") != "0" and (os.environ.get("HOSTS") or "spread") == "spread"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TAKEN] = Taken()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_START] = cpu_seconds()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    result = yield
    if call.when == "teardown" and _START in item.stash:
        seconds = cpu_seconds() - item.stash[_START]
        budget = getattr(getattr(item, "module", None), "CPU_SECONDS", DEFAULT)
        row = [item.nodeid.partition("::")[0], seconds, budget, work()]
        result.get_result().user_properties.append(("cpu", row))


_config: list[pytest.Config] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    _config[:] = [session.config]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of every worker's tests, in the process that starts them."""
    if report.when == "teardown":
        for name, row in report.user_properties:
            if name == "cpu":
                _config[0].stash[_TAKEN].add(*row)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    taken = session.config.stash[_TAKEN]
    if is_kept() and taken.over() and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    taken = config.stash[_TAKEN]
    if len(taken.seconds) > 1:
        terminalreporter.section("CPU seconds by file")
        for file, seconds in taken.seconds.most_common(15):
            terminalreporter.line(f"{seconds:7.1f} of {taken.budgets[file]:g}  {file}")
        terminalreporter.line(f"{sum(taken.seconds.values()):7.1f} in all, on a machine of {taken.slowness:.1f}")
    if is_kept() and taken.over():
        terminalreporter.section("files over their budget", red=True)
        for line in taken.over():
            terminalreporter.line(line, red=True)
