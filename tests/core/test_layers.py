"""Who may know whom. Arrows point down only, so that the core knows no engine and kernels know no patches.

An arrow is an import, wherever it stands in a file, or a dotted name of ours in a string, because we import by such
names, too. A room is a prefix of dotted names; the longest prefix that fits a module is its room.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from scratch import ROOT

CORE = {"features", "flags", "hookspecs", "plugins", "sources", "eligibility", "release", "patcher", "dispatch"}
CORE |= {"failures", "stand_ins"}
CORE |= {"active", "bindings", "confirm", "displaced", "keepers", "replacing", "turns", "standing", "reports", "survey"}
CORE |= {"endings", "files", "at_exit", "redact", "imports", "session"}
CORE |= {"startup", "_autostart", "bootstrap", "__init__"}
FAMILIES = {"decode", "sparse", "indices"}
# what a kernel needs to know of devices and of Triton
DEVICES = {"compat.gpu", "compat.triton", "compat.compiles"}
KERNELS_BELOW = {"kernels.common", "kernels.cache", "kernels.sm90"} | DEVICES
SHARED = {"compat", "compat.eras"} | DEVICES | {"compat.hosts"}
# what a call of the host passes through
CALLS = {"dispatch", "stand_ins"} | SHARED

# room -> the rooms that it may know besides itself
MAY: dict[str, set[str]] = {
    "compat": {"compat.compiles"},
    "compat.eras": set(),
    "compat.gpu": {"compat"},
    "compat.triton": {"compat", "compat.gpu", "compat.compiles"},
    "compat.compiles": set(),
    "compat.sglang": {"compat", "compat.eras", "compat.sglang.release"} | DEVICES,
    "compat.sglang.release": {"compat"},
    "compat.hosts": {"compat", "compat.sglang.release"},
    "kernels.common": set(DEVICES),
    "kernels.sm90": {"kernels.common"} | DEVICES,
    "kernels.cache": {"kernels.common"} | DEVICES,
    **{f"kernels.{family}": set(KERNELS_BELOW) for family in FAMILIES},
    "kernels": {"kernels.cache", *(f"kernels.{family}" for family in FAMILIES)},  # documented import paths
    "flash_mla": {"kernels", "kernels.decode", "kernels.sparse"} | KERNELS_BELOW | SHARED,
    "chunk_cache": {"kernels", "kernels.sparse", "kernels.indices"} | KERNELS_BELOW | SHARED,
    "sparse_prefill": {"chunk_cache"},  # a documented import path
    "hooks": set(SHARED) | {"hooks.sglang"},  # documented import paths
    "hooks.editing": set(SHARED),
    "hooks.sglang": {"hooks.editing", "compat.sglang", "compat.sglang.release", "flash_mla", "chunk_cache"}
    | {"features", "flags", "hookspecs", "kernels", *(f"kernels.{family}" for family in FAMILIES)}
    | KERNELS_BELOW
    | SHARED,
    # the core, from below
    "endings": set(),
    "imports": set(),
    "files": set(),
    "at_exit": set(),
    "redact": set(),
    "standing": set(),
    "sources": {"imports"},
    "features": set(SHARED),
    "hookspecs": {"features"} | SHARED,
    "flags": {"endings", "experiment", "features"},
    # the list of our own hooks, as the entry points in pyproject.toml have it
    "plugins": {"endings", "features", "flags", "hookspecs", "hooks.sglang"} | SHARED,
    "reports": {"endings", "files", "at_exit", "redact", "features"} | SHARED,
    "survey": {"files", "redact", "reports"} | SHARED,
    "release": {"features"} | SHARED,
    "eligibility": {"endings", "release", "sources", "flags", "features"} | SHARED,
    "failures": {"endings"},
    "dispatch": {"endings", "failures", "imports", "features"} | SHARED,
    "stand_ins": {"dispatch"} | SHARED,
    "turns": {"imports"},
    "bindings": {"standing"},
    "active": {"bindings", "turns", "standing", "reports", "flags", "features"} | CALLS,
    "keepers": {"active", "bindings", "standing", "features"} | CALLS,
    "displaced": {"active", "bindings", "standing", "eligibility", "features"} | CALLS,
    "confirm": {"active", "keepers", "displaced", "standing", "eligibility", "features"} | CALLS,
    "replacing": {"active", "bindings", "confirm", "displaced", "keepers", "standing", "endings"} | CALLS,
    "experiment": {"files", "at_exit", "dispatch", "reports", "survey", "features"} | SHARED,
    "patcher": {"active", "displaced", "replacing", "endings", "imports", "eligibility", "reports", "flags", "features"}
    | CALLS,
    "session": {"patcher", "eligibility", "reports", "experiment", "flags", "sources", "features", "plugins"}
    | {"imports", "endings"}
    | SHARED,
    "startup": {"session", "plugins", "imports", "endings", "compat"},
    "_autostart": {"startup"},
    "bootstrap": {"_autostart"},
    "__init__": {"startup"},
    "__main__": {"cli"},
}
ABOVE = {"cli", "drive"}  # what a person or a test runs may know anything of ours, and nothing else knows it
ENGINES = {"sglang", "vllm", "sgl_kernel", "flash_mla"}

# Arrows that are wrong, and go as the house is rebuilt. May only shrink.
WRONG: set[tuple[str, str]] = set()


def files() -> list[Path]:
    """Ours, each once: the links in mla_patch are followed at their ends."""
    found = [path for path in sorted((ROOT / "mla_patch").rglob("*.py")) if not linked(path)]
    return found + sorted((ROOT / "hooks").rglob("*.py")) + sorted((ROOT / "compat").rglob("*.py"))


def linked(path: Path) -> bool:
    return path.relative_to(ROOT / "mla_patch").parts[0] in ("hooks", "compat")


def dotted(path: Path) -> str:
    """A file's name below mla_patch: "hooks.sglang.decode"; a package has its folder's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "mla_patch" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room(name: str) -> str:
    """The longest prefix of ``name`` in the table; empty where there is none."""
    parts = name.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in MAY or prefix in ABOVE), "")


PARSED = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files()}
MODULES = {dotted(path) for path in PARSED}


def where(path: Path, node: ast.AST | None = None) -> str:
    return f"{path.relative_to(ROOT)}" + (f":{node.lineno}" if node is not None else "")  # type: ignore[attr-defined]


def constants(tree: ast.Module) -> dict[str, str]:
    """Strings that module-level names stand for."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.update({target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)})
    return found


def strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Strings that a program can act on: not docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body
        if isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node


def imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Every dotted name that a file imports; ``from a import b`` is ``a.b``."""
    tree = PARSED[path]
    named = constants(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node, argument.value
                elif isinstance(argument, ast.Name) and argument.id in named:
                    yield node, named[argument.id]


OURS = re.compile(r"mla_patch((?:\.\w+)+)")


def arrows(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """What of ours a file knows, by import or by a name in a string, below mla_patch."""
    for node, name in imports(path):
        if name.startswith("mla_patch."):
            yield node, name.removeprefix("mla_patch.")
    for node in strings(PARSED[path]):
        for found in OURS.finditer(node.value):
            name = found[1].removeprefix(".")
            if any(name == module or name.startswith(f"{module}.") for module in MODULES):
                yield node, name


def wrong_arrows() -> dict[tuple[str, str], str]:
    """(room, room that it must not know) -> the first place."""
    found: dict[tuple[str, str], str] = {}
    for path in PARSED:
        own = room(dotted(path))
        if own in ABOVE:
            continue
        for node, name in arrows(path):
            other = room(name)
            if other != own and other not in MAY[own]:
                found.setdefault((own, other), f"{where(path, node)} knows {name}")
    return found


def test_every_file_has_its_room() -> None:
    assert not [where(path) for path in PARSED if not room(dotted(path))]
    assert len(PARSED) > 60


def test_arrows_point_down() -> None:
    found = wrong_arrows()
    assert not {place for pair, place in found.items() if pair not in WRONG}
    assert not WRONG - set(found), "these are right by now: take them out of WRONG"


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


def test_imports_are_of_the_one_copy_and_engines_are_imported_beside_their_facts() -> None:
    """``import hooks`` would be a second copy of ours. An engine may be missing, so that few files import one."""
    wrong = []
    for path in PARSED:
        for node, name in imports(path):
            top = name.split(".")[0]
            if not top or top in ("hooks", "compat", "tests", "bench"):
                wrong.append(f"{where(path, node)} imports {name}: say the full name below mla_patch")
            if top in ENGINES and not room(dotted(path)).startswith(("compat", "hooks.sglang", "cli", "drive")):
                wrong.append(f"{where(path, node)} imports the engine's {name}")
    assert not wrong


DECLARING = CORE | {"experiment", "hooks.sglang"}
HEAVY = ("torch", "triton", "numpy")


def test_declaring_needs_no_torch() -> None:
    """Listing features is data: neither torch nor a kernel at the top of these files."""
    wrong = []
    for path in PARSED:
        if room(dotted(path)) not in DECLARING:
            continue
        for node in PARSED[path].body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if [n for n in names if n.split(".")[0] in HEAVY or n.startswith("mla_patch.kernels")]:
                wrong.append(where(path, node))
    assert not wrong


VERSION = re.compile(r"(?<![\d.])\d+\.\d+\.\d+")


def test_versions_are_data_of_a_host() -> None:
    """A host's version stands under compat/<host> and in a feature's range; ours stands in __init__."""
    wrong = []
    for path, tree in PARSED.items():
        name = dotted(path)
        # Triton's and torch's versions are compat's, too
        if room(name) in ABOVE or name.startswith("compat."):
            continue
        allowed: set[int] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Feature" and name.startswith("hooks."):
                hosts = [keyword.value for keyword in node.keywords if keyword.arg == "host"]
                allowed |= {id(part) for host in hosts for part in ast.walk(host)}
            if isinstance(node, ast.Assign) and name == "__init__":
                allowed.add(id(node.value))
        wrong += [where(path, s) for s in strings(tree) if VERSION.search(s.value) and id(s) not in allowed]
    assert not wrong


# Files that compare versions themselves, instead of by a table of compat.eras. May only shrink.
COMPARES: set[str] = set()


def test_versions_are_compared_in_one_file() -> None:
    found = {}
    for path, tree in PARSED.items():
        if dotted(path) == "compat.eras" or room(dotted(path)) in ABOVE:
            continue
        for compared in (node for node in ast.walk(tree) if isinstance(node, ast.Compare)):
            calls = [one for one in ast.walk(compared) if isinstance(one, ast.Call)]
            if [one for one in calls if getattr(one.func, "id", "") == "Version"]:
                found.setdefault(dotted(path), where(path, compared))
    left = {place for name, place in found.items() if name not in COMPARES}
    assert not left, "use a table, or `since`, of compat.eras"
    assert not COMPARES - set(found), "these have tables by now: take them out of COMPARES"


def test_every_range_is_closed() -> None:
    from mla_patch import plugins

    for feature in plugins.load().features:
        assert "<" in feature.requirement()[1], feature.label


LONG = 400
# Files with more lines than that. A number may only fall; a file that is not in here may not get there.
LONG_FILES: dict[str, int] = json.loads((ROOT / "tests" / "long_files.json").read_text())


def test_no_file_grows_long() -> None:
    """A file that does one thing is short. Device code is exempt by its numbers in long_files.json."""
    lines = {where(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PARSED}
    long = {name: count for name, count in lines.items() if count > LONG}
    grown = {name: count for name, count in long.items() if count > LONG_FILES.get(name, LONG)}
    assert not grown, "split these"
    fallen = {name: long.get(name, 0) for name, count in LONG_FILES.items() if long.get(name, 0) < count}
    assert not fallen, "write the smaller numbers into tests/long_files.json, so that they stay"
