"""The few SVG shapes that the plots of a report consist of. Every text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape


def scale(low: float, high: float, start: float, end: float, log: bool = False) -> Callable[[float], float]:
    """A function from values between ``low`` and ``high`` to coordinates between ``start`` and ``end``."""
    move: Callable[[float], float] = (lambda v: math.log(max(v, 1e-300))) if log else float
    a, b = move(low), move(high)
    return lambda value: start + (end - start) * ((move(value) - a) / (b - a) if b > a else 0.5)


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from ``low`` to ``high``."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 8)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def plot(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def says(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def dot(x: float, y: float, kind: str, hint: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="{kind}"><title>{escape(hint)}</title></circle>'


def path(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'
