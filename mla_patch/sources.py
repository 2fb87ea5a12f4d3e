"""Reads a host's source without importing it: where a module lies, what its functions take."""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from mla_patch.imports import HostFinder, is_namespace


@dataclass
class Module:
    """A module's top level, as its source tells it."""

    path: str
    params: dict[str, tuple[str, ...]] = field(default_factory=dict)  # "function" or "Class.method"
    launched_by: dict[str, str] = field(default_factory=dict)  # kernel -> another kernel that calls it
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)  # name here -> (module, name there)


def find_package(name: str, skip: tuple[type, ...] = (HostFinder,)) -> ModuleSpec | None:
    """A top package's spec, asked of every finder but those of the types in ``skip``; imports nothing.

    A folder without an ``__init__`` is a package to Python, and none here: any folder of that name is one, wherever the
    program was started.
    """
    for finder in sys.meta_path:
        if isinstance(finder, skip) or not hasattr(finder, "find_spec"):
            continue
        spec = finder.find_spec(name, None)
        if spec is not None:
            return None if is_namespace(spec) else spec
    return None


def find_module(name: str, skip: tuple[type, ...] = (HostFinder,)) -> str | None:
    """The source file of a module, or None; packages on the way are not imported."""
    head, *rest = name.split(".")
    spec = find_package(head, skip)
    for i, part in enumerate(rest):
        if spec is None or spec.submodule_search_locations is None:
            return None
        places = _places(spec)
        dotted = ".".join([head, *rest[: i + 1]])
        try:
            spec = PathFinder.find_spec(dotted, places)
            namespace = is_namespace(spec)
        except KeyError:  # a namespace package's own path asks sys.modules for its parent, which is not imported
            namespace = True
        if namespace:
            spec = ModuleSpec(dotted, None, is_package=True)
            spec.submodule_search_locations = [
                os.path.join(p, part) for p in places if os.path.isdir(os.path.join(p, part))
            ]
    return spec.origin if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _places(spec: ModuleSpec) -> list[str]:
    places: Any = spec.submodule_search_locations
    return list(getattr(places, "_path", None) or places)


@lru_cache(maxsize=256)
def _read(path: str, stamp: int) -> Module:
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read(), path)
    module = Module(path)
    kernels: dict[str, ast.FunctionDef] = {}
    for node in _top_level(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            module.params[node.name] = _params(node)
            if isinstance(node, ast.FunctionDef) and any(_is_jit(d) for d in node.decorator_list):
                kernels[node.name] = node
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    module.params[f"{node.name}.{item.name}"] = _params(item)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                module.imported[alias.asname or alias.name] = (node.module, alias.name)
    for name, node in kernels.items():
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and inner.id in kernels and inner.id != name:
                module.launched_by.setdefault(inner.id, name)
    return module


def read_module(path: str) -> Module:
    """Parse one source file; kept until the file changes.

    Raises:
        OSError, SyntaxError, UnicodeDecodeError: a file that cannot be read as Python.
    """
    return _read(path, os.stat(path).st_mtime_ns)


def _top_level(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements of a module, those under if, try and with among them."""
    found = []
    for node in body:
        found.append(node)
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found += _top_level(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            found += _top_level(handler.body)
    return found


def _params(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...]:
    a = node.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args)]
    if a.vararg:
        names.append(f"*{a.vararg.arg}")
    names += [arg.arg for arg in a.kwonlyargs]
    if a.kwarg:
        names.append(f"**{a.kwarg.arg}")
    return tuple(names)


def _is_jit(decorator: ast.expr) -> bool:
    node = decorator.func if isinstance(decorator, ast.Call) else decorator
    return (node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")) == "jit"
