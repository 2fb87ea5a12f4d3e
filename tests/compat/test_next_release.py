"""SGLang's next release adds a parameter to decode: what somebody has to write for it, and that it is enough.

The tables of two files get a row, compat/sglang/{decode,release}.py. No hook and nothing of the core is touched.
"""

from __future__ import annotations

import inspect
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mla_patch import eligibility, plugins
from mla_patch.compat.hosts import Installed
from mla_patch.compat.sglang import decode, release
from mla_patch.compat.types import Target
from mla_patch.features import State
from mla_patch.flags import Setting
from mla_patch.hooks.sglang import decode as hook

NEXT, AFTER = "0.5.24", "0.5.25"


class NextCall(decode.DecodeCall):
    """What `DecodeCall` becomes: it knows the parameter, and leaves other values than its default to the engine."""

    __slots__ = ()

    def __init__(self, *args: Any, kv_layout: str = "NHD", **more: Any) -> None:
        super().__init__(*args, **more)
        self.extra = self.extra or (None if kv_layout == "NHD" else "kv_layout")


@pytest.fixture
def reviewed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The decode hook, as it is declared when the two files know the next release."""
    (_, (params, _)), *_ = decode._DECODE
    monkeypatch.setattr(decode, "_DECODE", ((NEXT, ((*params, "kv_layout"), NextCall)), *decode._DECODE))
    monkeypatch.setattr(release, "REVIEWED", (*release.REVIEWED, NEXT))
    monkeypatch.setattr(release, "UNTIL", AFTER)
    spec = util.spec_from_file_location("hook_of_the_next_release", hook.__file__)
    assert spec is not None and spec.loader is not None
    again = util.module_from_spec(spec)  # a second copy, so that other tests keep the first
    spec.loader.exec_module(again)
    return again


def source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release with decode as the next one has it, in the newest release's home."""
    (home,) = decode.homes(NEXT)
    for module, text in (
        (home.module, f"def decode_attention_fwd({', '.join(home.params)}): ...\n"),
        (decode.BACKEND, ""),
    ):
        path = folder.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for parent in path.relative_to(folder).parents[:-1]:
            folder.joinpath(parent, "__init__.py").touch()
    monkeypatch.syspath_prepend(str(folder))


def check(feature: Any) -> eligibility.Eligibility:
    host = Installed(release.HOST, NEXT, "")
    return eligibility.check(feature, Setting("MLA_PATCH_DECODE", "on", "environment"), host)


def test_two_files_teach_the_next_release(
    reviewed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLA_PATCH_DECODE_BACKENDS", "triton")
    source(tmp_path, monkeypatch)
    found = check(reviewed.FEATURE)
    assert found.state is State.ARMED, found.reason
    (target,) = (one for one in found.targets if isinstance(one, Target))
    assert target.params[-1] == "kv_layout" and target.bind is NextCall

    signature = inspect.signature(decode.DecodeCall)
    given = {name: 0 for name, one in signature.parameters.items() if one.default is one.empty} | {"has_mla": True}
    assert reviewed.declines(target.bind(**given, kv_layout="HND")) == "kv_layout"
    assert target.bind(**given).extra is None


def test_without_them_the_engine_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(hook.FEATURE).reason == f"sglang {NEXT} is outside >=0.5.1,<0.5.24"


def test_all_ranges_end_where_the_review_ends() -> None:
    ranges = {feature.host for feature in plugins.load().features}
    assert {one.rpartition("<")[2] for one in ranges} == {release.UNTIL}
    assert {one for one in ranges if one == release.supported()}
