"""The page: complete, without external resources, and safe against any name."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mla_patch.compat.types import HOST, PATCH
from mla_patch.experiment import analysis, html, svg
from mla_patch.experiment.html import report_html
from mla_patch.experiment.merge import Merged
from mla_patch.experiment.record import Error, Note, Timing
from mla_patch.experiment.schedule import Plan, Schedule

VOID = {"meta", "br", "link", "img", "input"}


class Page(HTMLParser):
    """Checks that elements are closed in the right order; keeps text, names and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def sample(feature: str = "decode", tried: str = PATCH, groups: int = 12) -> Merged:
    draw = random.Random(1)
    schedule = Schedule(Plan(block=8, warmup=0))
    timings = []
    for i, context in enumerate((1024, 8192, 131072)):
        for step in range(i * 10**6, i * 10**6 + groups * 32):
            assignment = schedule.assignment(step)
            us = (
                (1000 + context / 50) * math.exp(draw.gauss(0, 0.01)) * (1 if assignment.arm == HOST else 0.9 + 0.1 * i)
            )
            arm = assignment.arm if assignment.arm == HOST else tried
            timings.append(Timing(step, feature, arm, assignment.block, assignment.group, f"graph/16/{context}", us))
    errors = [Error(step, feature, 0, 0.1, 10 ** draw.uniform(-4, -2), 0) for step in range(0, 6400, 64)]
    return Merged("run-1", timings, errors, [Note(640, feature, "command", "arm patch")], [0, 1], differed=3, lost=4)


PROCESSES = [
    {
        "engine": "sglang",
        "pid": 4711,
        "features": [
            {
                "name": "decode",
                "state": "applied",
                "served": 7,
                "captured": 5,
                "replayed": None,
                "targets": [{"module": "sglang.x", "name": "decode_attention_fwd", "replaced_by": "mla_patch.y:serve"}],
            },
            {"name": "kv_indices", "state": "absent", "targets": []},
        ],
    }
]


def plots(page: str) -> list[ElementTree.Element]:
    """Every svg of the page, parsed as strict XML."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.S)]


def numbers(element: ElementTree.Element) -> list[float]:
    names = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy")
    found = [float(value) for node in element.iter() for name, value in node.attrib.items() if name in names]
    for node in element.iter("polyline"):
        found += [float(part) for part in re.split("[ ,]", node.attrib["points"]) if part]
    return found


def test_a_whole_page() -> None:
    report = analysis.analyse(sample()) | {"tolerance": 0.02}
    text = report_html(json.loads(json.dumps(report)), PROCESSES)  # as read from a file
    page = Page(text)
    assert text.startswith("<!doctype html>")
    said = " ".join(page.text)
    for part in ("run-1", "1152 steps of 2 rank(s)", "3 left out because the ranks ran different arms", "4 rows lost",
                 "faster",
                 "no difference found", "graph, batch 16, context 131072", "tolerance", "arm patch",
                 "decode_attention_fwd", "mla_patch.y:serve", "4711", "absent"):  # fmt: skip
        assert part in said, part
    ratio, latency, error = plots(text)
    assert len(ratio.findall("circle")) == 3
    assert len(latency.findall("circle")) == 6 and len(latency.findall("polyline")) == 2
    assert len(error.findall("circle")) == 100
    for plot in (ratio, latency, error):
        _, _, width, height = map(float, plot.attrib["viewBox"].split())
        assert plot.attrib["aria-label"]
        assert all(0 <= number <= max(width, height) for number in numbers(plot))


def test_a_faster_arm_lies_left_of_1() -> None:
    one = analysis.analyse(sample())["comparisons"][0]
    (ratio, *_) = plots(report_html(analysis.analyse(sample())))
    middle = next(float(line.attrib["x1"]) for line in ratio.iter("line") if line.attrib["class"] == "one")
    dots = [float(dot.attrib["cx"]) for dot in ratio.iter("circle")]
    assert one["verdict"] == "faster" and dots[0] < middle - 20
    bar = next(line for line in ratio.iter("line") if line.attrib["class"] == "c1")
    assert float(bar.attrib["x1"]) < dots[0] < float(bar.attrib["x2"]) < middle


def test_slower_contexts_are_drawn_higher() -> None:
    _, latency, *_ = plots(report_html(analysis.analyse(sample())))
    host = next(line for line in latency.iter("polyline") if line.attrib["class"] == "c0")
    heights = [float(point.split(",")[1]) for point in host.attrib["points"].split()]
    assert heights == sorted(heights, reverse=True) and heights[0] > heights[2] + 50


def test_nothing_is_fetched_and_nothing_runs() -> None:
    page = Page(report_html(analysis.analyse(sample()), PROCESSES))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    for tag, attributes in page.tags:
        assert not {"src", "href", "xlink:href", "action", "srcset"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert not re.search(r"https?:|url\(|@import", html._STYLE)
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_light_dark_and_paper() -> None:
    assert "prefers-color-scheme: dark" in html._STYLE
    assert "@media print" in html._STYLE
    used = set(re.findall(r"var\((--\w+)\)", html._STYLE))
    light, dark, paper = re.findall(r":root \{(.*?)\}", html._STYLE, re.S)
    for scheme in (light, dark, paper):
        assert set(re.findall(r"(--\w+):", scheme)) >= used - {"--c"}


def test_an_effect_that_changes_is_shown_by_half() -> None:
    merged = sample(groups=40)
    merged.timings = [
        row._replace(us=row.us * (1 if row.arm == HOST or row.step % 10**6 < 640 else 1.5)) for row in merged.timings
    ]
    report = analysis.analyse(merged)
    one = report["comparisons"][0]
    assert one["verdict"] == "drifting"
    first, second = one["drift"]["first"], one["drift"]["second"]
    said = " ".join(Page(report_html(report)).text)
    assert f"{first:.3f}\u00a0→\u00a0{second:.3f}" in said and second > first + 0.3


EVIL = "<script>alert('&\"1\"')</script>"


def test_every_string_is_escaped() -> None:
    merged = sample(feature=EVIL, tried=EVIL)
    merged.run = EVIL
    merged.timings += [row._replace(bucket=EVIL) for row in merged.timings[:400]]
    merged.notes = [Note(1, EVIL, EVIL, EVIL)]
    feature = {"name": EVIL, "state": EVIL, "targets": [{"module": EVIL, "name": EVIL, "replaced_by": EVIL}]}
    process = {"engine": EVIL, "pid": EVIL, "features": [feature | {"served": EVIL}]}
    text = report_html(analysis.analyse(merged), [process])
    page = Page(text)
    assert page.count("script") == 0
    assert sum(EVIL in part for part in page.text) > 10
    assert len(plots(text)) == 4  # and still well-formed


@pytest.mark.parametrize(
    "merged", [Merged("empty"), sample(groups=3), Merged("e", errors=[Error(1, "decode", 0, math.inf, math.nan, 9)])]
)
def test_a_page_about_little_or_nothing(merged: Merged) -> None:
    report = analysis.analyse(merged)
    page = Page(report_html(report))
    said = " ".join(page.text)
    assert ("No recorded step is part of a comparison" in said) == (not report["comparisons"])
    assert ("not enough blocks" in said) == bool(report["comparisons"])
    assert page.count("title") >= 1


@pytest.mark.parametrize("ratio", [1.0, 1.0001, 0.01, 80.0, 1e6])
def test_extreme_ratios_stay_in_the_picture(ratio: float) -> None:
    merged = sample()
    merged.timings = [row._replace(us=100.0 * (1 if row.arm == HOST else ratio)) for row in merged.timings]
    plot, *_ = plots(report_html(analysis.analyse(merged)))
    assert all(0 <= number <= 880 for number in numbers(plot))


@pytest.mark.parametrize("low, high", [(0, 1), (0, 3127.5), (0.97, 1.03), (0.2, 5), (0, 1e-9)])
def test_ticks(low: float, high: float) -> None:
    ticks = svg.ticks(low, high)
    assert 3 <= len(ticks) <= 9
    assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in ticks)


def test_a_page_is_small(tmp_path: Path) -> None:
    merged = sample()
    merged.errors = [Error(step, "decode", 0, 0.1, 0.001, 0) for step in range(10**5)]
    merged.notes = merged.notes * 5000
    assert len(report_html(analysis.analyse(merged))) < 200_000
