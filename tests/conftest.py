"""Set before any test module imports Triton or us, and shared by all of them."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import budget
import pytest
import readable_ids
from scratch import ROOT, build, clean_env

# Triton reads this when it is imported. A run on a GPU sets it to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")
# A flag in the caller's shell is not part of any test.
for _name in [name for name in os.environ if name.startswith("MLA_PATCH")]:
    del os.environ[_name]

from mla_patch.compat import interpreter  # noqa: E402
from mla_patch.compat.triton import interpreted  # noqa: E402

if interpreted():
    interpreter.quicken()


def pytest_configure(config: pytest.Config) -> None:
    for plugin in (budget, readable_ids):
        if not config.pluginmanager.is_registered(plugin):
            config.pluginmanager.register(plugin)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The compile tier first: its tests are the longest, and the last of them would leave a worker without any."""
    items.sort(key=lambda item: item.path.name != "test_compile.py")


RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Run code in a fresh interpreter, in the test's own folder; ``env`` adds names, and removes those given None.

    ``run_python("import x", env={"MLA_PATCH": "1"}, cwd=..., args=("-X", "importtime"), check=True)``
    """

    def run(
        code: str,
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        args: tuple[str, ...] = (),
        python: str = sys.executable,
        check: bool = False,
        timeout: float = 120,
    ) -> "subprocess.CompletedProcess[str]":
        command = [python, *args, "-c", code]
        done = subprocess.run(
            command, env=clean_env(env), cwd=cwd or tmp_path, capture_output=True, text=True, timeout=timeout
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(autouse=True)
def launches_are_not_kept() -> None:
    """A test that changes what a kernel's launcher goes by must not find launches of a test before it."""
    module = sys.modules.get("mla_patch.kernels.decode.remembered")
    if module is not None:
        module.KNOWN.clear()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that this tree builds."""
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")
