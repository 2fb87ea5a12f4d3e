"""The demonstration's verdict: what it measures is told, and what is wrong is not called equal."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import mla_patch
from mla_patch.drive import demo


@pytest.mark.parametrize(("spoiled", "equal"), [(0.0, True), (0.001, True), (0.01, False), (torch.nan, False)])
def test_an_error_over_the_limit_is_not_equal(spoiled: float, equal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    want, arm = torch.ones(2, 16, 512, dtype=torch.float64), []
    monkeypatch.setattr(mla_patch, "apply", lambda *names: arm.append("ours"), raising=False)
    monkeypatch.setattr(mla_patch, "restore", lambda *names: arm.append("host"), raising=False)
    step = SimpleNamespace(
        decode=lambda: want * (1 + (spoiled if arm[-1] == "ours" else 0.05)), expected=lambda: want
    )  # the host's own error is told, and is no measure of ours
    row = demo.decode(step, "e4m3", "cpu")
    assert (row["equal"], row["error"]["host"]) == (equal, 0.05)
    told = demo.result("SGLang 0", "cpu", [], 0, [row, {"equal": True, "us_host": 1.0, "us_ours": 2.0}], [])
    assert (told["equal"], told["us"]) == (equal, {"host": 1.0, "ours": 2.0})


@pytest.mark.parametrize("cache", demo.CACHES)
def test_alone(cache: str) -> None:
    row = demo.decode_alone(cache, "cpu")
    # float16 out of the interpreter, which rounds right there
    assert row["equal"] and row["error"]["host"] is None and 0 < row["error"]["ours"] < 5e-4
