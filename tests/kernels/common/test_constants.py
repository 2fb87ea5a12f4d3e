"""Sizes that several kernels share are written down once: in kernels/common/constants.py, and in device code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from scratch import ROOT

from mla_patch.kernels.common import constants

KERNELS = ROOT / "mla_patch" / "kernels"
# values of a key and bytes of a token. A 512 may be a number of threads or of programs as well as the latent values.
NAMED = {constants.WIDTH, constants.V32_TOKEN_BYTES, constants.V4_TOKEN_BYTES}


def is_device_code(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def on_the_host(node: ast.AST) -> Iterator[ast.AST]:
    """A module's nodes, without the device functions, and without definitions, which spell out every byte."""
    if isinstance(node, ast.FunctionDef) and (node.name.endswith("_ref") or is_device_code(node)):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from on_the_host(child)


def literals(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in on_the_host(tree) if isinstance(node, ast.Constant) and node.value in NAMED]
    return [f"{path.relative_to(ROOT)}:{node.lineno} says {node.value}" for node in found]


def test_host_code_names_the_sizes() -> None:
    files = [path for path in KERNELS.rglob("*.py") if path.name != "constants.py"]
    assert len(files) > 30
    assert not [place for path in files for place in literals(path)]


def test_a_literal_is_found_on_the_host_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "kernel.py"
    path.write_text('"""576"""\n@triton.jit\ndef k(x):\n    return x + 576\ndef launch(x):\n    return k(x, 584)\n')
    assert literals(path) == ["kernel.py:6 says 584"]
