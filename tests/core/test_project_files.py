"""The pages and settings for contributors name what exists: make targets, files, tools."""

import re

import pytest
from scratch import ROOT

import mla_patch

PAGES = ["docs/architecture.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md"]
FOLDER, NAME = r"(?:[\w.<>*-]+/)", r"[\w.<>*-]+\.(?:md|py|toml|txt|pth|start|json|yml)"
FILE = re.compile(rf"{FOLDER}+[\w.<>*-]*|{NAME}|\.[\w-]+\.yaml|Makefile")


def code_of(page: str) -> list[str]:
    """What stands between backticks on a page, and the lines of its code blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^ *```\w*\n.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [*re.findall(r"`([^`\n]+)`", prose), *(line.strip() for block in blocks for line in block.splitlines())]


def missing_paths(page: str) -> list[str]:
    """Paths between backticks that lead nowhere; ``<name>`` stands for any name."""
    found = [code for code in code_of(page) if FILE.fullmatch(code)]
    assert found, f"{page} names no file: has its form changed?"
    made_by_a_build = ("dist/",)
    return [
        path
        for path in found
        if not path.startswith(made_by_a_build) and not any(ROOT.glob(re.sub(r"<[^>]+>", "*", path).rstrip("/")))
    ]


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_files_and_make_targets_that_exist(page: str) -> None:
    assert missing_paths(page) == []
    called = {target for code in code_of(page) for target in re.findall(r"\bmake ([\w-]+)", code)}
    assert called <= make_targets()
    assert called or page == "SECURITY.md"


def test_a_release_changes_the_version_in_one_place() -> None:
    ours = re.compile(rf"mla[-_]patch[- ]{re.escape(mla_patch.__version__)}\b")
    pages = [path for folder in ("tests", "docs", "examples", ".github") for path in (ROOT / folder).rglob("*")]
    pages += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md", "Makefile")]
    texts = [path for path in pages if path.suffix in (".py", ".md", ".yml", ".toml") or path.name == "Makefile"]
    assert len(texts) > 50
    assert [str(path) for path in texts if ours.search(path.read_text(encoding="utf-8"))] == []


def test_pre_commit_runs_the_tools_of_make_lint() -> None:
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert lint is not None
    tools = re.findall(r"-m (\w+(?: check| format)?)", lint[1])
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"entry: \.venv/bin/python -m (\w+(?: check| format)?)", hooks) == tools
    assert re.findall(r"^ *- repo: (\w+)", hooks, re.MULTILINE) == ["local"]  # no second version pin

    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert {tool.split()[0].removesuffix("_lib") for tool in tools} <= set(pinned)


def test_the_workflow_runs_what_a_person_runs() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert re.findall(r"\brun: (.*)", workflow) == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_a_bug_report_asks_for_what_tells_the_cause() -> None:
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text(encoding="utf-8")
    for command in ("mla-patch doctor --json", "mla-patch status --json"):
        # a field that is required, not a hint
        field = next(part for part in form.split("  - type: ") if f"`{command}" in part)
        assert "required: true" in field
