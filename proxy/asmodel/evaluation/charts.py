"""The plots of a report as SVG: a score with its interval, how long questions take, and what a score takes in calls.

Plain shapes with classes, which the page colours for light and dark; each says in words what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from asmodel import trace_words as words
from asmodel.evaluation.estimates import percentile

WIDTH = 720
_LEFT = 190
"""For the names."""
_RIGHT = 24
_ROW = 30
_NAME = 26
"""Characters of a name that there is room for."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A value and the ends of its interval."""

    name: str
    value: float
    low: float
    high: float
    shown: str
    """The value in words."""


def scores(bars: Sequence[Bar], *, title: str, proportion: bool) -> str:
    """A row a system: a dot, and a line from end to end of its interval."""
    low, high = (0.0, 1.0) if proportion else _around([b.low for b in bars] + [b.high for b in bars])
    at = _scale(low, high)
    ticks = [low + (high - low) * n / 4 for n in range(5)]
    labels = [f"{100 * t:.0f} %" if proportion else f"{t:.3g}" for t in ticks]
    rows: list[str] = []
    for place, bar in enumerate(bars):
        y = _y(place)
        rows.append(
            f'{_label(bar.name, y)}<line class="whisker" x1="{at(bar.low):.1f}" x2="{at(bar.high):.1f}" y1="{y}" '
            f'y2="{y}"/><circle class="dot" cx="{at(bar.value):.1f}" cy="{y}" r="5"/>'
            f"<title>{_text(bar.name)}: {_text(bar.shown)}</title>"
        )
    return _plot(title, rows, [(at(t), label) for t, label in zip(ticks, labels, strict=True)])


def latencies(rows: Sequence[tuple[str, Sequence[float]]], *, title: str) -> str:
    """A row a system, of its seconds in ascending order: from the 10th to the 90th percentile, the middle half thick,
    the median a gap in it; on a logarithmic scale."""
    floor = 0.001
    values = [max(floor, s) for _, seconds in rows for s in (seconds[0], seconds[-1])]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values) * 1.0001))
    scale = _scale(float(low), float(max(high, low + 1)))

    def at(seconds: float) -> float:
        return scale(math.log10(max(floor, seconds)))

    drawn: list[str] = []
    for place, (name, seconds) in enumerate(rows):
        y = _y(place)
        p10, p25, p50, p75, p90 = (percentile(seconds, share) for share in (0.1, 0.25, 0.5, 0.75, 0.9))
        told = f"{_text(name)}: half within {words.seconds(p50)}, nine of ten within {words.seconds(p90)}"
        drawn.append(
            f'{_label(name, y)}<line class="whisker" x1="{at(p10):.1f}" x2="{at(p90):.1f}" y1="{y}" y2="{y}"/>'
            f'<rect class="box" x="{at(p25):.1f}" y="{y - 7}" width="{max(2.0, at(p75) - at(p25)):.1f}" height="14" '
            f'rx="3"/><line class="median" x1="{at(p50):.1f}" x2="{at(p50):.1f}" y1="{y - 7}" y2="{y + 7}"/>'
            f"<title>{told}</title>"
        )
    ticks = [(scale(float(n)), words.seconds(10.0**n)) for n in range(low, max(high, low + 1) + 1)]
    return _plot(title, drawn, ticks)


def costs(points: Sequence[tuple[Bar, float]], *, title: str, proportion: bool) -> str:
    """A dot a system: its score upwards, with its interval, against calls a question to the right."""
    height, bottom, left = 260, 36, 56
    most = max(calls for _, calls in points) * 1.15 or 1.0
    low, high = (0.0, 1.0) if proportion else _around([b.low for b, _ in points] + [b.high for b, _ in points])

    def x(calls: float) -> float:
        return left + calls / most * (WIDTH - left - _RIGHT - 120)

    def y(value: float) -> float:
        return 12 + (high - value) / ((high - low) or 1.0) * (height - bottom - 12)

    parts: list[str] = []
    for n in range(5):
        value = low + (high - low) * n / 4
        shown = f"{100 * value:.0f} %" if proportion else f"{value:.3g}"
        parts.append(
            f'<line class="grid" x1="{left}" x2="{WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text class="tick" x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{shown}</text>'
        )
    for calls in _round(most):
        parts.append(f'<text class="tick" x="{x(calls):.1f}" y="{height - 14}" text-anchor="middle">{calls:g}</text>')
    above = -math.inf
    for bar, calls in sorted(points, key=lambda point: -point[0].value):
        at = x(calls)
        # Names of dots that are near one another stand below one another.
        above = max(above + 13, y(bar.value) + 4)
        parts.append(
            f'<g><line class="whisker" x1="{at:.1f}" x2="{at:.1f}" y1="{y(bar.low):.1f}" y2="{y(bar.high):.1f}"/>'
            f'<circle class="dot" cx="{at:.1f}" cy="{y(bar.value):.1f}" r="5"/>'
            f'<text class="name" x="{at + 9:.1f}" y="{above:.1f}">{_text(_short(bar.name))}</text>'
            f"<title>{_text(bar.name)}: {_text(bar.shown)}, {calls:.3g} calls a question</title></g>"
        )
    parts.append(f'<text class="tick" x="{WIDTH - _RIGHT}" y="{height - 1}" text-anchor="end">calls a question</text>')
    return _svg(title, height, parts)


def timeline(spans: Sequence[tuple[float, float, str]], whole: float) -> str:
    """Bars on a line that is `whole` seconds long: from, to, and the class of each. One path a class."""
    paths: dict[str, list[str]] = {}
    for begin, end, kind in spans:
        left = min(997.0, max(0.0, 1000 * begin / whole)) if whole else 0.0
        # Even the shortest did happen.
        width = min(1000 - left, max(3.0, 1000 * (end - begin) / whole if whole else 1000.0))
        paths.setdefault(kind, []).append(f"M{left:.0f} 2h{width:.0f}v10h-{width:.0f}z")
    drawn = "".join(f'<path class="{kind}" d="{"".join(path)}"/>' for kind, path in paths.items())
    return f'<svg class="bar" viewBox="0 0 1000 14" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>'


def _scale(low: float, high: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: _LEFT + (value - low) / span * (WIDTH - _LEFT - _RIGHT)


def _round(most: float) -> list[float]:
    """Round numbers from 0 up to `most`: five at least, ten at the most."""
    rough = max(most, 1e-9) / 5
    step = 10.0 ** math.floor(math.log10(rough))
    step *= next((factor for factor in (5, 2) if step * factor <= rough), 1)
    return [step * n for n in range(int(most / step) + 1)]


def _around(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    room = (high - low) * 0.08 or 1.0
    return low - room, high + room


def _y(place: int) -> int:
    return 20 + place * _ROW


def _plot(title: str, rows: Sequence[str], ticks: Sequence[tuple[float, str]]) -> str:
    bottom = 20 + (len(rows) - 1) * _ROW + 16
    grid = [
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom}"/>'
        f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_text(label)}</text>'
        for x, label in ticks
    ]
    return _svg(title, bottom + 24, [*grid, *(f"<g>{row}</g>" for row in rows)])


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    head = f'<svg class="plot" role="img" viewBox="0 0 {WIDTH} {height}"><title>{_text(title)}</title>'
    return f"{head}{''.join(parts)}</svg>"


def _label(name: str, y: int) -> str:
    return f'<text class="name" x="{_LEFT - 14}" y="{y + 4}" text-anchor="end">{_text(_short(name))}</text>'


def _short(name: str) -> str:
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"


def _text(value: str) -> str:
    return escape(words.clean(value))
