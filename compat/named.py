"""What "module:function" stands for: declarations name code without importing it. Standard library only."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any


def named(code: Any) -> Any:
    """What ``code`` names: "module:function", "module:Class.method" or "module". What is no string is given back.

    Raises:
        ImportError: there is no such module, or it cannot be imported.
        AttributeError: it has no such attribute.
    """
    if not isinstance(code, str):
        return code
    module, _, attribute = code.partition(":")
    return functools.reduce(getattr, filter(None, attribute.split(".")), import_module(module))
