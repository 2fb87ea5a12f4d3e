"""The page in a real browser: drawn correctly, without complaints in its console, and without any request."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from browser import NAMES, Browser, find
from test_experiment_html import PROCESSES, sample

from mla_patch.experiment import analysis
from mla_patch.experiment.html import report_html

PROGRAM = find()
# CI sets NEED_BROWSER=1, so that a missing browser is a failure there and no skip
NEEDED = os.environ.get("NEED_BROWSER") == "1"
pytestmark = pytest.mark.skipif(
    PROGRAM is None and not NEEDED, reason="THE REPORT'S PAGE WAS NOT LOOKED AT: no Chromium (apt install chromium)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.fail(f"NEED_BROWSER=1, and none of {', '.join(NAMES)} is installed (apt install chromium)")
    with Browser(PROGRAM, tmp_path_factory.mktemp("browser") / "profile") as one:
        yield one


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    report = json.loads(json.dumps(analysis.analyse(sample()) | {"tolerance": 0.02}))
    path.write_text(report_html(report, PROCESSES), encoding="utf-8")
    return path


def asked(browser: Browser) -> list[str]:
    return list(browser.requests.values())


BOXES = """
[...document.querySelectorAll(%r)].map(node => {
    const box = node.getBoundingClientRect();
    return [box.left, box.top, box.right, box.bottom];
})
"""


def test_the_page_is_drawn_and_requests_nothing(browser: Browser, page: Path) -> None:
    browser.load(page)
    assert asked(browser) == [page.as_uri()]
    assert browser.complaints == []
    assert browser.evaluate("document.title") == "Kernel experiment run-1"
    assert browser.evaluate("document.compatMode") == "CSS1Compat"

    width = browser.evaluate("document.documentElement.clientWidth")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width  # wide tables scroll by themselves
    plots, tables = browser.evaluate(BOXES % "svg"), browser.evaluate(BOXES % "table")
    assert len(plots) == 3 and len(tables) == 4  # verdicts, shadow checks, events, entry points
    for left, top, right, bottom in plots:
        assert right - left > 200 and bottom - top > 40
    for left, _, right, _ in (*plots, *browser.evaluate(BOXES % ".wide")):
        assert left >= 0 and right <= width
    blocks = sorted(box[1::2] for box in (*plots, *tables))
    assert all(below[0] >= above[1] for above, below in pairwise(blocks))  # no plot covers another

    assert browser.evaluate("document.querySelectorAll('svg circle').length") == 3 + 6 + 100
    assert browser.evaluate("document.querySelectorAll('tbody tr').length") == 3 + 1 + 1 + 2
    assert "patch" in browser.evaluate("document.querySelector('table').innerText")
    # the style sheet applies, so the policy allows it
    colour = "getComputedStyle(document.querySelector('svg circle.c1')).fill"
    assert browser.evaluate(colour) == "rgb(11, 122, 117)"


@pytest.mark.parametrize(
    "media, page_colour",
    [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)"), ("print", "rgb(255, 255, 255)")],
)
def test_light_dark_and_paper_differ(browser: Browser, page: Path, media: str, page_colour: str) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "light" if media == "light" else "dark"}
    browser.ask("Emulation.setEmulatedMedia", media="print" if media == "print" else "screen", features=[scheme])
    browser.load(page)
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == page_colour
    shot = browser.screenshot()
    assert shot.startswith(b"\x89PNG") and len(shot) > 20_000  # a blank screenshot has 5000 bytes
    assert browser.complaints == [] and asked(browser) == [page.as_uri()]


def test_the_policy_stops_requests_and_the_test_detects_them(browser: Browser, page: Path) -> None:
    """The checks above can fail: they detect a page that fetches and runs code, and the policy stops both."""
    text, image = page.read_text(encoding="utf-8"), "http://127.0.0.1:9/image"
    bad = f'<img src="{image}"><script>document.title = "ran"; console.log("ran")</script></body>'
    text = text.replace("</body>", bad)
    page.write_text(text, encoding="utf-8")
    browser.load(page)
    assert browser.stopped == {image: "csp"} and browser.evaluate("document.title") == "Kernel experiment run-1"
    assert len([line for line in browser.complaints if "Content Security Policy" in line]) == 2

    policy = next(line for line in text.splitlines() if "Content-Security-Policy" in line)
    page.write_text(text.replace(policy, ""), encoding="utf-8")
    browser.load(page)
    assert asked(browser) == [page.as_uri(), image] and browser.stopped == {image: "net::ERR_INTERNET_DISCONNECTED"}
    assert browser.evaluate("document.title") == "ran" and "ran" in browser.complaints
