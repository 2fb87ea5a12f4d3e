"""compat.eras: which row of a table holds for a release."""

from __future__ import annotations

import pytest
from packaging.version import InvalidVersion

from mla_patch.compat.eras import Eras, between, era_of, since, value_at

TABLE: Eras[str] = (("0.5.12", "new"), ("0.5.10", "odd"), ("0.5.1", "new"), ("0.4.8", "old"))


@pytest.mark.parametrize(
    "version, value",
    [
        ("0.5.23", "new"), ("0.5.12", "new"), ("0.5.12.post1", "new"), ("0.5.12rc1", "odd"), ("0.5.10", "odd"),
        ("0.5.9", "new"), ("0.5.1", "new"), ("0.5.0", "old"), ("0.4.6", "old"),
    ],
)  # fmt: skip
def test_a_row_holds_up_to_the_row_above(version: str, value: str) -> None:
    assert (value_at(TABLE, version), era_of(TABLE, version)) == (value, [value])


def test_an_unknown_version() -> None:
    assert (value_at(TABLE, None), era_of(TABLE, None)) == ("new", ["new", "odd", "old"])
    assert [since(None, "0.5.1", unknown=one) for one in (False, True)] == [False, True]
    assert [between(None, "0.5.1", "0.5.2", unknown=one) for one in (False, True)] == [False, True]


def test_both_ends_of_a_span() -> None:
    assert [between(one, "0.5.3", "0.5.10") for one in ("0.5.2", "0.5.3", "0.5.9", "0.5.10")] == [
        False,
        True,
        True,
        False,
    ]


def test_what_is_no_version() -> None:
    with pytest.raises(InvalidVersion):
        since("main", "0.5.1")
