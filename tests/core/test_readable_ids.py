"""Ids of parametrised cases say what a case is."""

from types import SimpleNamespace
from typing import Any

import pytest
import readable_ids
import torch


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "name=None"),
        (16, "name=16"),
        (True, "name=True"),
        ("", "name="),
        ("e4m3", "e4m3"),
        (torch.bfloat16, "bfloat16"),
        ((8, None), "8,None"),
        ((), "()"),
        ({"heads": 16}, "heads=16"),
        (SimpleNamespace(sm=90), "sm=90"),
        (torch.zeros(2, 64), "float32[2,64]"),
        (ValueError("why"), "ValueError(why)"),
        (torch.zeros, "zeros"),
        ("two\nlines", "two lines"),
        ("x" * 81, "x" * 77 + "..."),
        (lambda: None, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_described(value: Any, says: str | None, request: pytest.FixtureRequest) -> None:
    assert readable_ids.pytest_make_parametrize_id(request.config, value, "name") == says


def test_a_number_in_place_of_an_object_is_found() -> None:
    def item(identifier: str, **params: object) -> Any:
        return SimpleNamespace(
            nodeid=f"test_it.py::test_it[{identifier}]", callspec=SimpleNamespace(id=identifier, params=params)
        )

    assert readable_ids.numbered([item("table3-e4m3", table={}, cache="")]) == ["test_it.py::test_it[table3-e4m3]"]
    assert readable_ids.numbered([item("heads=16-float16", heads=16, dtype=0)]) == []


def test_no_case_is_numbered(request: pytest.FixtureRequest) -> None:
    """Of all tests of this run; what has no description gets one by `ids` or `pytest.param(..., id=...)`."""
    assert readable_ids.numbered(request.session.items) == []
