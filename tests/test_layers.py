"""Who may import whom. Arrows point down only, so that the core knows no engine and kernels know no patches."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from scratch import ROOT

# file or folder -> what of ours it may import; a folder stands for all its files
MAY = {
    "__init__": {"startup"},
    "__main__": {"cli"},
    "_door": {"startup"},
    "endings": set(),
    "imports": set(),
    "bootstrap": {"_door"},
    "features": {"compat"},
    "files": set(),
    "at_exit": set(),
    "redact": set(),
    "sources": {"imports"},
    "standing": set(),
    "hookspecs": {"features", "compat"},
    "flags": {"endings", "experiment", "features"},
    "plugins": {"endings", "features", "flags", "hookspecs", "compat"},
    "reports": {"endings", "files", "at_exit", "redact", "features", "compat"},
    "survey": {"files", "redact", "reports", "compat"},
    "dispatch": {"endings", "imports", "features", "compat"},
    "release": {"features", "compat"},
    "judge": {"endings", "release", "sources", "flags", "features", "compat"},
    "patcher": {"standing", "dispatch", "endings", "imports", "judge", "reports", "flags", "features", "compat"},
    "session": {"patcher", "judge", "reports", "experiment", "flags", "sources", "features", "plugins", "imports"}
    | {"endings", "compat"},
    "startup": {"session", "plugins", "imports", "endings", "compat"},
    "experiment": {"files", "at_exit", "dispatch", "reports", "features", "kernels", "compat"},
    "flash_mla": {"kernels", "compat"},
    "sparse_prefill": {"kernels", "compat"},
    "kernels": {"kernels", "compat"},
    "compat": {"compat"},
    "hooks": {"features", "flags", "hookspecs", "flash_mla", "sparse_prefill", "kernels", "compat"},
}
ABOVE = {
    "ab",
    "cli",
    "demo",
    "bench",
    "explain",
    "show",
    "status",
    "warmup",
}  # what a person runs may import anything of ours
ENGINES = {"sglang", "vllm", "sgl_kernel", "flash_mla"}


def files() -> list[Path]:
    """Ours, each once: the links in mla_patch are followed at their ends."""
    found = [path for path in sorted((ROOT / "mla_patch").rglob("*.py")) if not linked(path)]
    return found + sorted((ROOT / "hooks").rglob("*.py")) + sorted((ROOT / "compat").rglob("*.py"))


def linked(path: Path) -> bool:
    return path.relative_to(ROOT / "mla_patch").parts[0] in ("hooks", "compat")


def part(path: Path) -> str:
    """Which row of the table a file belongs to."""
    first, *rest = path.relative_to(ROOT).with_suffix("").parts
    return rest[0] if first == "mla_patch" else first


def imports(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports, wherever in it; ``from a import b`` is ``a.b``."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: say the full name, hooks and compat have two places"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_file_has_its_place() -> None:
    assert {part(path) for path in files()} <= set(MAY) | ABOVE
    assert len(files()) > 15


@pytest.mark.parametrize("path", files(), ids=ids)
def test_arrows_point_down(path: Path) -> None:
    if part(path) in ABOVE:
        return
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "mla_patch" and rest:
            assert rest[0] in MAY[part(path)] | {part(path)}, f"{ids(path)} imports {name}"


def test_the_table_has_no_circle() -> None:
    seen: list[str] = []

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way, name])
        if name not in seen:
            for below in MAY[name] - {name} - ABOVE:
                visit(below, (*way, name))
            seen.append(name)

    for name in MAY:
        visit(name, ())


@pytest.mark.parametrize("path", files(), ids=ids)
def test_engines_are_imported_in_compat_alone(path: Path) -> None:
    if part(path) not in ("compat", "demo"):
        assert not {name for name in imports(path) if name.split(".")[0] in ENGINES}


@pytest.mark.parametrize("path", files(), ids=ids)
def test_nobody_imports_a_second_copy(path: Path) -> None:
    assert not {name for name in imports(path) if name.split(".")[0] in ("hooks", "compat", "tests", "bench")}


DECLARING = ["features", "sources", "hookspecs", "flags", "plugins", "reports", "judge", "startup", "hooks", "_door"]
DECLARING += ["session", "experiment", "files", "at_exit", "redact", "survey", "release"]


@pytest.mark.parametrize("path", [path for path in files() if part(path) in DECLARING], ids=ids)
def test_declaring_needs_no_torch(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name for name in names if name.split(".")[0] in ("torch", "triton", "numpy")}
        assert not [name for name in names if name.startswith("mla_patch.kernels")]


VERSION = re.compile(r"(?<![\d.])\d+\.\d+\.\d+")


def strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Strings that a program can act on: not docstrings."""
    docs = [
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
        if isinstance(node.body[0], ast.Expr)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
            yield node


@pytest.mark.parametrize("path", [path for path in files() if part(path) not in ("compat", *ABOVE)], ids=ids)
def test_versions_are_compats(path: Path) -> None:
    """A host's version stands in compat, and in a hook's range; ours stands in __init__."""
    tree = ast.parse(path.read_text())
    allowed: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Feature" and part(path) == "hooks":
            allowed += [keyword.value for keyword in node.keywords if keyword.arg == "host"]
        if isinstance(node, ast.Assign) and part(path) == "__init__":
            allowed.append(node.value)
    assert not [s.value for s in strings(tree) if VERSION.search(s.value) and s not in allowed]


def test_every_range_is_closed() -> None:
    from mla_patch import plugins

    for feature in plugins.load().features:
        assert "<" in feature.requirement()[1], feature.label
