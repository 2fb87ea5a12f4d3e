"""What "module:function" stands for."""

from __future__ import annotations

import json

import pytest

from mla_patch.compat.named import named


def test_functions_modules_and_what_is_no_name() -> None:
    assert named("json:dumps") is json.dumps and named("json") is json
    assert named("json:JSONEncoder.encode") is json.JSONEncoder.encode
    assert named(json.dumps) is json.dumps and named(None) is None


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        named("json:nothing")
    with pytest.raises(ImportError, match="nowhere"):
        named("nowhere_at_all:function")
