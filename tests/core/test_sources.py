"""Reading a host without importing it."""

import importlib.util
import sys
from pathlib import Path

import pytest

from mla_patch import session, sources


def parsed(folder: Path, text: str) -> sources.Module:
    path = folder / "module.py"
    path.write_text(text)
    return sources.read_module(str(path))


@pytest.mark.parametrize(
    "text, params",
    [
        ("def f(): pass", ()),
        ("def f(a, b=1): pass", ("a", "b")),
        ("def f(a, /, b, *, c, d=1): pass", ("a", "b", "c", "d")),
        ("def f(a, *args, c, **kwargs): pass", ("a", "*args", "c", "**kwargs")),
        ("async def f(a): pass", ("a",)),
        ("if True:\n    def f(a): pass", ("a",)),
        ("try:\n    import nothing\nexcept ImportError:\n    def f(a): pass", ("a",)),
        ("with open('x') as y:\n    def f(a): pass", ("a",)),
        ("for i in range(2):\n    pass\nelse:\n    def f(a): pass", ("a",)),
        ("def g():\n    def f(a): pass", None),
        ("f = 1", None),
        ("@jit\ndef f(a: tl.constexpr, b: tl.constexpr = 4): pass", ("a", "b")),
    ],
)
def test_parameters(text: str, params: tuple[str, ...] | None, tmp_path: Path) -> None:
    assert parsed(tmp_path, text).params.get("f") == params


def test_parameters_are_those_that_python_sees(tmp_path: Path) -> None:
    """The live check writes them in the same way."""
    from mla_patch.confirm import live_params

    text = "def f(a, /, b, *args, c, d=1, **kwargs): pass\nclass C:\n    @staticmethod\n    def s(x): pass\n"
    space: dict = {}
    exec(text, space)
    module = parsed(tmp_path, text)
    assert module.params["f"] == live_params(space["f"])
    assert module.params["C.s"] == live_params(vars(space["C"])["s"])


def test_methods(tmp_path: Path) -> None:
    module = parsed(tmp_path, "class C:\n    def m(self, a): pass\n    async def n(self): pass\n    x = 1\n")
    assert module.params == {"C.m": ("self", "a"), "C.n": ("self",)}


@pytest.mark.parametrize("decorator", ["@jit", "@triton.jit", "@triton.jit(debug=True)", "@tl.core.jit"])
def test_kernels_that_kernels_call(decorator: str, tmp_path: Path) -> None:
    text = "\n".join(f"{decorator}\ndef {name}(x):\n    {body}" for name, body in [("a", "b(x)"), ("b", "a2 = x")])
    module = parsed(tmp_path, text + "\ndef plain(x):\n    a[(1,)](x)\n")
    assert module.launched_by == {"b": "a"}


def test_a_kernel_that_calls_itself_is_its_own(tmp_path: Path) -> None:
    assert parsed(tmp_path, "@jit\ndef a(x):\n    a(x)\n").launched_by == {}


def test_imported_names(tmp_path: Path) -> None:
    module = parsed(tmp_path, "import x\nfrom y.z import a, b as c\nfrom . import d\nif x:\n    from w import e\n")
    assert module.imported == {"a": ("y.z", "a"), "c": ("y.z", "b"), "e": ("w", "e")}


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    import os

    assert "f" in parsed(tmp_path, "def f(): pass").params
    path = tmp_path / "module.py"
    path.write_text("def g(): pass")
    os.utime(path, ns=(1, 1))
    assert list(sources.read_module(str(path)).params) == ["g"]


@pytest.mark.parametrize("content", [b"def f(:", b"\xff\xfe", b"a\0b"])
def test_a_file_that_is_not_python(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_bytes(content)
    with pytest.raises((SyntaxError, ValueError)):
        sources.read_module(str(path))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("treehost/__init__.py", "treehost/a.py", "treehost/space/deep/b.py", "treehost/space/deep/er/c.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise ImportError('nothing here is to be imported')\n")
    (tmp_path / "flat.py").write_text("")
    (tmp_path / "empty").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "module, where",
    [
        ("treehost", "treehost/__init__.py"),
        ("treehost.a", "treehost/a.py"),
        ("treehost.space.deep.b", "treehost/space/deep/b.py"),  # two folders without __init__.py on the way
        ("treehost.space.deep.er.c", "treehost/space/deep/er/c.py"),
        ("flat", "flat.py"),
        ("treehost.none", None),
        ("treehost.a.b", None),
        ("treehost.space", None),
        ("treehost.space.none.b", None),
        ("flat.a", None),
        ("nosuchhost.a", None),
        ("sys", None),
        ("math", None),
    ],
)
def test_modules_are_found_and_not_imported(module: str, where: str | None, tree: Path) -> None:
    found = sources.find_module(module)
    assert found == (str(tree / where) if where else None)
    assert not [name for name in sys.modules if name.startswith("treehost")]


def test_a_folder_without_init_is_no_package(tree: Path) -> None:
    """Python takes any folder beside the program for one."""
    assert importlib.util.find_spec("empty") is not None
    assert sources.find_package("empty") is None and sources.find_package("treehost") is not None
    assert session.find_host("empty") is None and session.find_host("treehost") is not None


def test_own_finders_are_skipped(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Watch:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            raise AssertionError(f"asked for {name}")

    monkeypatch.setattr(sys, "meta_path", [Watch(), object(), *sys.meta_path])
    assert sources.find_module("treehost.a", (Watch,))
    with pytest.raises(AssertionError):
        sources.find_module("treehost.a")
