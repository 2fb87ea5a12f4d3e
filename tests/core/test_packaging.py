"""What is shipped, and that it comes and goes without a trace."""

import configparser
import email
import importlib.metadata
import json
import pkgutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from scratch import DEPENDENCIES, ROOT, Scratch, build, copy_tree, fake_wheel

import mla_patch

CPU_SECONDS = 90  # see budget.py

pytestmark = pytest.mark.xdist_group("scratch")  # one worker, so that the wheel is built once

# A release of the host that has the two builders where 0.5.11 has them; nothing here is ever launched.
HOST = {
    "sglang/__init__.py": "__version__ = '0.5.11'\n",
    "sglang/srt/__init__.py": "",
    "sglang/srt/layers/__init__.py": "",
    "sglang/srt/layers/attention/__init__.py": "",
    "sglang/srt/layers/attention/utils.py": """
import triton
import triton.language as tl


@triton.jit
def create_flashinfer_kv_indices_triton(
    req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_indptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride: tl.constexpr,
):
    pass


@triton.jit
def create_flashmla_kv_indices_triton(
    req_to_token_ptr, req_pool_indices_ptr, page_kernel_lens_ptr, kv_start_idx, kv_indices_ptr,
    req_to_token_ptr_stride: tl.constexpr, kv_indices_ptr_stride: tl.constexpr, PAGED_SIZE: tl.constexpr = 64,
):
    pass
""",
    "sglang-0.5.11.dist-info/METADATA": "Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.11\n",
}

# Prints the states that a process reaches by importing the host and nothing else of anyone's.
STATES = """
import sys, json
import sglang
assert "torch" not in sys.modules and "triton" not in sys.modules
if "mla_patch" in sys.modules:
    import mla_patch
    print(json.dumps({f["name"]: f["state"] for f in mla_patch.report()["features"] if f["host"].startswith("sglang")}))
else:
    print("{}")
"""


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


def add_host(scratch: Scratch) -> None:
    for name, text in HOST.items():
        path = scratch.site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(scope="module")
def from_sdist(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of this tree, and the wheel built from that sdist alone."""
    out = tmp_path_factory.mktemp("sdist")
    wheel = build(ROOT, out)
    return next(out.glob("*.tar.gz")), wheel


def test_the_wheel_holds_the_package_and_two_start_files(wheel: Path) -> None:
    names = contents(wheel)
    info = f"mla_patch-{mla_patch.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"mla_patch", "mla_patch.pth", "mla_patch.start", info}
    assert wheel.name == f"mla_patch-{mla_patch.__version__}-py3-none-any.whl"
    for folder in ("hooks", "compat", "mla_patch"):
        for source in (ROOT / folder).rglob("*.py"):
            where = source.relative_to(ROOT).as_posix()
            inside = where if folder == "mla_patch" else f"mla_patch/{where}"
            assert names[inside] == source.read_bytes(), inside
    assert names["mla_patch/py.typed"] == b""  # without it, a plugin author's type checker ignores our annotations
    strays = [name for name in names if name.endswith((".pyc", ".so")) or "test" in name]
    assert not strays


def test_the_sdist_builds_the_same_wheel(wheel: Path, from_sdist: tuple[Path, Path]) -> None:
    assert contents(from_sdist[1]) == contents(wheel)


def test_the_sdist_holds_the_tree(from_sdist: tuple[Path, Path]) -> None:
    with tarfile.open(from_sdist[0]) as packed:
        paths = {name.split("/", 1)[1] for name in packed.getnames() if "/" in name}
    top = {path.split("/")[0] for path in paths}
    assert top >= {"mla_patch", "hooks", "compat", "tests", "pyproject.toml", "hatch_build.py", "LICENSE", "README.md"}
    assert top >= {"mla_patch.pth", "mla_patch.start", "Makefile", "constraints.txt"}
    # the tests read these, and somebody who packages the sdist runs them
    assert top >= {".ci", ".codespellrc", ".github", ".pre-commit-config.yaml", "RELEASING.md", "SECURITY.md"}
    # once each: a folder and a link to it must not both be followed
    assert not [path for path in paths if path.startswith(("mla_patch/hooks/", "mla_patch/compat/"))]
    assert not [path for path in paths if path.endswith(".pyc") or ".venv" in path]


def test_the_metadata_moves_nobodys_torch_or_triton(wheel: Path) -> None:
    info = f"mla_patch-{mla_patch.__version__}.dist-info"
    metadata = email.message_from_bytes(contents(wheel)[f"{info}/METADATA"])
    assert (metadata["Name"], metadata["License-Expression"]) == ("mla-patch", "Apache-2.0")
    assert metadata["Requires-Python"] == ">=3.10"
    links = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL", []))
    assert set(links) == {"Homepage", "Documentation", "Changelog", "Issues"}
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    assert {need.name for need in needs if need.marker is None} == {*DEPENDENCIES, "torch"}
    # a bound above, or an exact pin, is what would make pip move an engine's own release
    assert {spec.operator for need in needs for spec in need.specifier} == {">="}
    assert [need.name for need in needs if need.marker is not None] == ["triton"]

    doors = configparser.ConfigParser()
    doors.read_string(contents(wheel)[f"{info}/entry_points.txt"].decode())
    assert doors["console_scripts"]["mla-patch"] == "mla_patch.__main__:main"
    for group in ("sglang.srt.plugins", "vllm.general_plugins"):
        assert dict(doors[group]) == {"mla_patch": "mla_patch._autostart:run"}


def test_every_entry_point_leads_somewhere() -> None:
    entries = importlib.metadata.distribution("mla-patch").entry_points
    assert {entry.group for entry in entries} >= {"console_scripts", "mla_patch"}
    for entry in entries:
        assert pkgutil.resolve_name(entry.value) is not None


@pytest.mark.parametrize("source", ["wheel", "sdist"])
def test_install_activate_uninstall(source: str, wheel: Path, from_sdist: tuple[Path, Path], tmp_path: Path) -> None:
    scratch = Scratch.make(tmp_path / "env", links=DEPENDENCIES)
    add_host(scratch)
    before = scratch.files()

    scratch.pip("install", "--no-deps", "--no-index", wheel if source == "wheel" else from_sdist[1])
    assert (scratch.site / "mla_patch.pth").is_file()
    assert (scratch.site / "mla_patch.start").is_file()
    assert (scratch.root / "bin" / "mla-patch").is_file()
    for name in ("hooks", "compat", "tests"):
        assert scratch.run("-c", f"import {name}").returncode == 1

    off = scratch.run("-c", STATES)
    assert (off.stdout, off.stderr, off.returncode) == ("{}\n", "", 0)
    on = scratch.run("-c", STATES, env={"MLA_PATCH": "1"})
    assert on.returncode == 0 and on.stderr.startswith("mla-patch ") and on.stderr.count("\n") == 1  # its one line
    assert json.loads(on.stdout)["kv_indices"] == "armed"

    scratch.pip("uninstall", "--yes", "mla-patch")
    assert scratch.files() == before
    gone = scratch.run(
        "-c", "import sglang, sys; print(sorted(m for m in sys.modules if 'mla_patch' in m))", env={"MLA_PATCH": "1"}
    )
    assert (gone.stdout, gone.stderr, gone.returncode) == ("[]\n", "", 0)


def test_an_editable_install_reads_the_tree(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    scratch = Scratch.make(tmp_path / "env", links=[*DEPENDENCIES, "hatchling", "editables"])
    add_host(scratch)
    before = scratch.files()

    scratch.pip("install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", tree)
    on = scratch.run("-c", STATES, env={"MLA_PATCH": "1"})
    assert on.returncode == 0 and on.stderr.startswith("mla-patch ") and on.stderr.count("\n") == 1  # its one line
    assert json.loads(on.stdout)["kv_indices"] == "armed"
    for name in ("hooks", "compat"):
        assert scratch.run("-c", f"import {name}").returncode == 1
        (tree / name / "written_later.py").write_text("SEEN = True\n")
        code = f"import mla_patch.{name}.written_later as m; print(m.SEEN, m.__file__)"
        assert scratch.run("-c", code).stdout == f"True {tree}/mla_patch/{name}/written_later.py\n"

    scratch.pip("uninstall", "--yes", "mla-patch")
    assert scratch.files() == before


@pytest.mark.parametrize("extra", ["", "[triton]"])
@pytest.mark.parametrize("options", [(), ("--upgrade",)], ids=["install", "upgrade"])
def test_an_engines_torch_and_triton_stay(extra: str, options: tuple[str, ...], wheel: Path, tmp_path: Path) -> None:
    """Newer ones are on offer; what the engine has must stay."""
    scratch = Scratch.make(tmp_path / "env", links=DEPENDENCIES)
    offers = tmp_path / "offers"
    offers.mkdir()
    for torch, triton in (("2.8.0", "3.4.0"), ("2.99.0", "3.99.0")):
        fake_wheel(offers, "torch", torch, [f"triton=={triton}"])
        fake_wheel(offers, "triton", triton)
    scratch.pip("install", "--no-index", "--find-links", offers, "torch==2.8.0")
    scratch.pip("install", "--no-index", "--find-links", offers, *options, f"mla-patch{extra} @ {wheel.as_uri()}")
    found = scratch.run("-c", "import mla_patch, torch, triton; print(torch.__version__, triton.__version__)")
    assert (found.stdout, found.stderr) == ("2.8.0 3.4.0\n", "")
