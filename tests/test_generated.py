"""What the docs say of flags is what the declarations say."""

from generated import ROOT, readme


def test_readme_has_the_flags_of_the_declarations():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run: python tests/generated.py --write"
