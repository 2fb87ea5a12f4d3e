"""The pages for people: every link leads somewhere, and the index lists every page."""

import re
from pkgutil import resolve_name

from scratch import ROOT

PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_leads_somewhere():
    broken = []
    for page in PAGES:
        for link in LINK.findall(CODE.sub("`", page.read_text(encoding="utf-8"))):
            path, _, anchor = link.partition("#")
            if "://" in link:
                continue
            target = (page.parent / path).resolve() if path else page
            missing = not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8")))
            if missing:
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


def test_the_index_lists_every_page():
    index = ROOT / "docs" / "README.md"
    listed = {link.partition("#")[0] for link in LINK.findall(index.read_text(encoding="utf-8"))}
    assert {page.name for page in index.parent.glob("*.md")} - {index.name} <= listed


def test_every_named_file_exists():
    folders = "|".join(("tests", "bench", "docs", "examples", "hooks", "compat", "mla_patch"))
    path = re.compile(rf"`(?:[^`\n]* )?((?:{folders})/[\w./-]+)[^`\n]*`")
    named = [(page, name) for page in PAGES for name in path.findall(page.read_text(encoding="utf-8"))]
    assert len(named) > 20
    assert [f"{page.relative_to(ROOT)}: {name}" for page, name in named if not (ROOT / name).exists()] == []


def test_every_named_object_exists():
    name = re.compile(r"`(mla_patch(?:\.\w+)+)\b")
    named = {(page, one) for page in PAGES for one in name.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 20
    missing = []
    for page, one in sorted(named):
        try:
            resolve_name(one)
        except (ImportError, AttributeError):
            if not (ROOT / one).exists():  # mla_patch.pth
                missing.append(f"{page.relative_to(ROOT)}: {one}")
    assert missing == []
