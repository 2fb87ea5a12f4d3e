import pytest
from generated import ROOT, TABLES, page


@pytest.mark.parametrize("path", TABLES)
def test_the_written_tables_are_current(path):
    assert (ROOT / path).read_text(encoding="utf-8") == page(path), "run: python tests/generated.py --write"
