"""Renders a report as one HTML page: no script, no external resources, light and dark, and fit for printing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mla_patch.compat.types import HOST, PATCH
from mla_patch.experiment import analysis, svg
from mla_patch.experiment.analysis import MIN_GROUPS, RESOLUTION
from mla_patch.experiment.stats import ALPHA

# the policy forbids every request, so that even a mistake in the page cannot reach the network
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
"""
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #5d6673; --line: #d5dae1; --wash: #f4f6f8;
  --c0: #7a8594; --c1: #0b7a75; --c2: #b4540a; --c3: #6d4bc3; --good: #0b7a3b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e6e9ee; --soft: #9aa5b3; --line: #333a44;
  --wash: #1c2127; --c0: #97a3b3; --c1: #3cc2ba; --c2: #f0944a; --c3: #a990f0; --good: #5ccf88; --bad: #ff8a80; } }
body { margin: 2rem auto; padding: 0 1rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p.note, figcaption, footer { color: var(--soft); font-size: .87rem; } figure { margin: 0 0 1.2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; } code { font-size: .84rem; }
.faster { color: var(--good); font-weight: 600; } .slower, .drifting { color: var(--bad); font-weight: 600; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem; }
svg { display: block; width: 100%; height: auto; background: var(--wash); border-radius: 6px; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg text.ink { fill: var(--ink); }
.grid { stroke: var(--line); } .one { stroke: var(--soft); stroke-dasharray: 4 3; } .limit { stroke: var(--bad); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c0, .c1, .c2, .c3 { stroke: var(--c); fill: var(--c); } polyline { fill: none !important; stroke-width: 1.5; }
svg text.c0, svg text.c1, svg text.c2, svg text.c3 { stroke: none; fill: var(--c); font-weight: 600; }
@media print { :root { --page: #fff; --ink: #000; --soft: #444; --line: #bbb; --wash: #fff; --c0: #777; --c1: #0b7a75;
  --c2: #b4540a; --c3: #6d4bc3; --good: #0b7a3b; --bad: #b3261e; color-scheme: light; }
  body { margin: 0; max-width: none; font-size: 11px; } figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  svg { border: 1px solid var(--line); } }
"""


def report_html(report: Mapping[str, Any], processes: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of one run. ``report`` is what `analysis.analyse` returns, ``processes`` are the process reports."""
    title = f"Kernel experiment {report['run']}".strip()
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(_summary(report))}</p>',
        _verdicts(report["comparisons"]),
        _ratios(report["comparisons"]),
        _latencies(report["comparisons"]),
        _shadow(report["shadow"], report.get("tolerance")),
        _notes(report["notes"]),
        _patched(processes),
        f"<footer>{_READING}</footer>",
    ]
    return (
        f"{_HEAD}<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


_READING = f"""<h2>How to read this</h2>
<p>A ratio is the arm's time divided by the time of <code>host</code>, the engine's own kernel: below 1 is faster. Times
are of whole steps, not of the kernels alone. Each group of blocks of steps ran every arm in a balanced order and gives
one ratio. The reported ratio is their trimmed mean, and its 95% interval is bootstrapped over the groups.</p>
<p>&ldquo;Faster&rdquo; and &ldquo;slower&rdquo; need an interval that keeps {RESOLUTION:.1%} away from 1, and a
signed-rank p value below {ALPHA:g} after Holm's adjustment for all comparisons on this page: if no arm differs, at most
one page in {1 / ALPHA:.0f} names a difference. Fewer than {MIN_GROUPS} groups give no verdict. &ldquo;No difference
found&rdquo; does not prove that there is none: the interval shows how large an unseen difference can be.
&ldquo;Drifting&rdquo; means that the ratio changed between the two halves of the run. All of this holds for one look.
Somebody who looks repeatedly until a verdict appears will see false ones more often.</p>"""


def _summary(report: Mapping[str, Any]) -> str:
    parts = [
        f"{report['steps']} steps of {len(report['ranks'])} rank(s)",
        f"{report['outside']} in no comparison",
    ]
    parts += [f"{report['differed']} left out because the ranks ran different arms"] if report["differed"] else []
    parts += [f"{report['lost']} rows lost"] if report["lost"] else []
    parts += [f"{report['damaged']} damaged lines dropped"] if report["damaged"] else []
    return "; ".join(parts) + "."


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], classes: Mapping[str, str] | None = None) -> str:
    """A table with numbers aligned to the right. ``classes`` maps the text of a cell to its CSS class."""

    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
        kind = "n" if _is_number(value) else (classes or {}).get(text, "")
        return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"

    numbers = [_is_number(value) for value in rows[0]]
    top = "".join(
        f'<th class="n">{escape(name)}</th>' if number else f"<th>{escape(name)}</th>"
        for name, number in zip(head, numbers, strict=True)
    )
    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{lines}</tbody></table></div>'


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, str) and value.replace(".", "", 1).isdecimal())


def _verdicts(comparisons: Sequence[Mapping[str, Any]]) -> str:
    if not comparisons:
        return "<h2>Verdicts</h2><p>No recorded step is part of a comparison.</p>"
    comparisons, few = analysis.by_groups(comparisons)
    rest = f'<p class="note">{escape(analysis.in_few_groups(few))}</p>' if few else ""
    if not comparisons:
        return f"<h2>Verdicts</h2>{rest}"
    head = f"feature|bucket|arm|verdict|{HOST}, us|arm, us|ratio|95% interval|by half|p|groups".split("|")
    rows = []
    for one in comparisons:
        ratio = interval = halves = None
        if one["ratio"]:
            ratio = f"{one['ratio']:.3f}"
            interval = "{:.3f}\u00a0–\u00a0{:.3f}".format(*one["interval"])
            halves = f"{one['drift']['first']:.3f}\u00a0→\u00a0{one['drift']['second']:.3f}"
        rows.append([one["feature"], bucket_text(one["bucket"]), one["arm"], one["verdict"], float(one["host_us"])])
        rows[-1] += [float(one["arm_us"]), ratio, interval, halves, one["p_adjusted"], one["groups"]]
    return "<h2>Verdicts</h2>" + _table(head, rows, {name: name for name in ("faster", "slower", "drifting")}) + rest


def bucket_text(bucket: str) -> str:
    """``graph/16/8192`` in words."""
    mode, batch, context = _split(bucket)
    return f"{mode}, batch {batch}, context {context}" if batch else bucket


def _split(bucket: str) -> tuple[str, int, int]:
    parts = bucket.split("/")
    if len(parts) == 3 and parts[1].isdecimal() and parts[2].isdecimal():
        return parts[0], int(parts[1]), int(parts[2])
    return bucket, 0, 0


def _colours(comparisons: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    arms = [HOST, PATCH, *sorted({one["arm"] for one in comparisons} - {PATCH})]
    return {arm: f"c{min(i, 3)}" for i, arm in enumerate(arms)}


def _ratios(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """A plot of all ratios with their intervals, beside a line at 1."""
    shown = [one for one in comparisons if one["interval"]]
    if not shown:
        return ""
    colours = _colours(comparisons)
    widest = max(max(abs(math.log(end)) for end in one["interval"]) for one in shown)
    reach = math.exp(min(max(widest * 1.1, 0.02), 5))
    left, right, row = 300, 700, 24
    x = svg.scale(1 / reach, reach, left, right, log=True)
    height = 44 + row * len(shown)
    parts = []
    for tick in svg.ticks(1 / reach, reach):
        if 1 / reach <= tick <= reach:
            parts.append(svg.line(x(tick), 24, x(tick), height - 16, "one" if tick == 1 else "grid"))
            parts.append(svg.says(x(tick), 16, f"{tick:g}", "middle"))
    for i, one in enumerate(shown):
        y, kind = 40 + row * i, colours[one["arm"]]
        low, ratio, high = (min(max(x(v), left), right) for v in (one["interval"][0], one["ratio"], one["interval"][1]))
        name = f"{one['feature']} {one['arm']}: {bucket_text(one['bucket'])}"
        parts.append(svg.says(left - 12, y + 4, name, "end", "ink"))
        parts.append(svg.line(low, y, high, y, kind) + svg.dot(ratio, y, kind, one["text"]))
        parts.append(svg.says(right + 12, y + 4, f"{one['ratio']:.3f}  {one['verdict']}", "start", "ink"))
    plot = svg.plot(880, height, "Ratio of times with interval, by bucket", parts)
    caption = f"The arm's time divided by that of {HOST}, with 95% intervals; left of 1 is faster."
    return f"<h2>Ratio of times</h2>{_figure(plot, caption)}"


def _figure(plot: str, caption: str) -> str:
    return f"<figure>{plot}<figcaption>{escape(caption)}</figcaption></figure>"


def _latencies(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Plots of step time by context length, one panel per feature, mode and batch size."""
    panels: dict[tuple[str, str, int], dict[str, dict[int, float]]] = {}
    for one in comparisons:
        mode, batch, context = _split(one["bucket"])
        arms = panels.setdefault((one["feature"], mode, batch), {})
        for arm, us in ((HOST, one["host_us"]), (one["arm"], one["arm_us"])):
            if us:
                arms.setdefault(arm, {})[context] = float(us)
    colours = _colours(comparisons)
    drawn = [_panel(*key, arms, colours) for key, arms in sorted(panels.items()) if arms]
    if not drawn:
        return ""
    return f'<h2>Step time by context</h2><div class="panels">{"".join(drawn)}</div>'


def _panel(
    feature: str, mode: str, batch: int, arms: Mapping[str, Mapping[int, float]], colours: Mapping[str, str]
) -> str:
    contexts = sorted({max(context, 1) for values in arms.values() for context in values})
    top = max(us for values in arms.values() for us in values.values()) * 1.08
    x, y = svg.scale(contexts[0], contexts[-1], 62, 290, log=True), svg.scale(0, top, 196, 30)
    parts = []
    for tick in svg.ticks(0, top):
        parts += [svg.line(50, y(tick), 312, y(tick), "grid"), svg.says(44, y(tick) + 4, f"{tick:g}", "end")]
    for context in contexts[:: -(-len(contexts) // 5)]:
        parts.append(svg.says(x(context), 212, f"{context}", "middle"))
    for i, (arm, values) in enumerate(sorted(arms.items(), key=lambda item: item[0] != HOST)):
        points = [(x(max(context, 1)), y(us)) for context, us in sorted(values.items())]
        kind = colours[arm]
        parts.append(svg.path(points, kind))
        for (px, py), (context, us) in zip(points, sorted(values.items()), strict=True):
            parts.append(svg.dot(px, py, kind, f"{arm}: {us:.1f} us at context {context}"))
        parts.append(svg.says(56 + 84 * i, 18, arm[:14], "start", kind))
    name = f"{feature}: {mode}, batch {batch}" if batch else f"{feature}: {mode}"
    plot = svg.plot(320, 220, f"{name}, step time in us by context", parts)
    return _figure(plot, f"{name}; us, by context")


def _shadow(shadow: Sequence[Mapping[str, Any]], tolerance: float | None) -> str:
    if not shadow:
        return ""
    head = ["feature", "comparisons", "steps", "median", "90%", "99%", "worst", "largest element", "NaN or infinite"]
    rows = [
        [one["feature"], one["comparisons"], one["steps"], *one["relative"].values(), one["max_abs"]["1.0"], one["nan"]]
        for one in shadow
    ]
    plots = "".join(_errors(one, tolerance) for one in shadow if one["over_time"])
    note = "Both arms ran on the same inputs. Errors are relative, in the Frobenius norm."
    return f'<h2>Shadow checks</h2><p class="note">{note}</p>{_table(head, rows)}{plots}'


def _errors(one: Mapping[str, Any], tolerance: float | None) -> str:
    """A plot of the worst errors over the steps, on a logarithmic scale."""
    points = [(step, max(error, 1e-9)) for step, error in one["over_time"]]
    values = [error for _, error in points] + ([tolerance] if tolerance else [])
    low = 10 ** math.floor(math.log10(min(values)))
    high = 10 ** (math.floor(math.log10(max(values))) + 1)
    x, y = svg.scale(points[0][0], points[-1][0], 62, 860), svg.scale(low, high, 176, 14, log=True)
    parts = []
    exponents = range(round(math.log10(low)), round(math.log10(high)) + 1)
    for exponent in exponents[:: -(-len(exponents) // 6)]:
        at = y(10.0**exponent)
        parts += [svg.line(54, at, 868, at, "grid"), svg.says(48, at + 4, f"1e{exponent}", "end")]
    if tolerance:
        parts += [
            svg.line(54, y(tolerance), 868, y(tolerance), "limit"),
            svg.says(866, y(tolerance) - 4, "tolerance", "end"),
        ]
    for step in (points[0][0], points[-1][0]):
        parts.append(
            svg.says(
                x(step),
                192,
                f"step {step}",
                "middle" if len(points) == 1 else "start" if step == points[0][0] else "end",
            )
        )
    parts.append(svg.path([(x(step), y(error)) for step, error in points], "c1"))
    parts += [svg.dot(x(step), y(error), "c1", f"step {step}: {error:.3g}") for step, error in points[:400]]
    plot = svg.plot(880, 200, f"{one['feature']}: relative error by step", parts)
    return _figure(plot, f"{one['feature']}: worst relative error of a step")


def _notes(notes: Sequence[Mapping[str, Any]]) -> str:
    if not notes:
        return ""
    rows = [[note["step"], note["feature"], note["what"], note["text"]] for note in notes[:200]]
    more = f'<p class="note">{len(notes) - 200} more.</p>' if len(notes) > 200 else ""
    return "<h2>Events</h2>" + _table(["step", "feature", "what", ""], rows) + more


def _patched(processes: Sequence[Mapping[str, Any]]) -> str:
    """A table of the entry points that were replaced, from the process reports."""
    rows = []
    for process in processes:
        for feature in process.get("features", ()):
            counts = [feature.get(name) for name in ("served", "captured", "replayed")]
            for target in feature.get("targets") or [{}]:
                place = ".".join(filter(None, (target.get("module"), target.get("name"))))
                rows.append(
                    [process.get("engine"), process.get("pid"), feature.get("name"), feature.get("state"), place]
                )
                rows[-1] += [target.get("replaced_by"), *counts]
    if not rows:
        return ""
    head = ["engine", "process", "feature", "state", "entry point", "served by", "served", "captured", "replayed"]
    return "<h2>What was replaced where</h2>" + _table(head, rows)
