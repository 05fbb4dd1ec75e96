"""The picture of a run: each scenario's figure against its floor, and the others' beside it. SVG, written by hand.

Floors have different units, so each row has its own scale: the floor is the line in the middle, and twice as good as
the floor is the right edge. Colours follow the reader's light or dark setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tests.bench.report import Row, shown

LEFT, TRACK, RIGHT = 350, 360, 190
"""Widths of the names, of the bars, and of the figures."""
LINE, TOP, FOOT = 26, 58, 46
EDGE = 2.0
"""How many times as good as the floor the right edge is."""
MARKS = ("#c2410c", "#7c3aed", "#0e7490", "#a16207", "#be185d")

STYLE = """
  .ground { fill: #ffffff } text { fill: #1f2328; font: 13px system-ui, sans-serif }
  .title { font-size: 16px; font-weight: 600 } .small { font-size: 11px; fill: #59636e }
  .track { fill: #eff2f5 } .met { fill: #1a7f37 } .short { fill: #bf8700 } .floor { stroke: #1f2328; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117 } text { fill: #f0f6fc } .small { fill: #9198a1 } .track { fill: #21262d }
    .met { fill: #3fb950 } .short { fill: #d29922 } .floor { stroke: #f0f6fc }
  }
"""


def goodness(row: Row, value: float) -> float:
    """How many times as good as the floor a value is: 1 is the floor itself, more is better."""
    assert row.floor is not None
    if row.floor.at_least:
        return value / row.floor.limit
    # What costs nothing, or less than nothing by the noise, is as good as can be.
    return row.floor.limit / value if value > 0 else EDGE


def drawn(rows: Sequence[Row], caption: str) -> str:
    """The SVG of the rows that have a floor and a value."""
    shown_rows = [row for row in rows if row.floor is not None and row.value is not None]
    others = list(dict.fromkeys(name for row in shown_rows for name, value in row.others.items() if value is not None))
    width, height = LEFT + TRACK + RIGHT, TOP + LINE * len(shown_rows) + FOOT
    middle = LEFT + TRACK / EDGE
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="asmodel against its floors">',
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{width}" height="{height}" rx="6"/>',
        '<text class="title" x="16" y="26">asmodel against its floors</text>',
        f'<text class="small" x="{middle}" y="{TOP - 8}" text-anchor="middle">floor</text>',
        f'<text class="small" x="{LEFT + TRACK}" y="{TOP - 8}" text-anchor="end">twice as good</text>',
    ]
    for number, row in enumerate(shown_rows):
        assert row.floor is not None
        assert row.value is not None
        y = TOP + LINE * number
        length = _length(goodness(row, row.value))
        sign = "≥" if row.floor.at_least else "≤"
        kind = "met" if row.floor.met(row.value) else "short"
        out += [
            f'<text x="16" y="{y + 16}">{escape(_named(row))}</text>',
            f'<rect class="track" x="{LEFT}" y="{y + 4}" width="{TRACK}" height="16" rx="3"/>',
            f'<rect class="{kind}" x="{LEFT}" y="{y + 4}" width="{length:.1f}" height="16" rx="3"/>',
            f'<text x="{LEFT + TRACK + 12}" y="{y + 16}">{escape(shown(row.figure, row.value))}'
            f'<tspan class="small" dx="8">{sign} {escape(shown(row.figure, row.floor.limit))}</tspan></text>',
        ]
        for name, value in row.others.items():
            if value is not None:
                x = LEFT + _length(goodness(row, value))
                title = f"<title>{escape(name)}: {escape(shown(row.figure, value))}</title>"
                mark = f'cx="{x:.1f}" cy="{y + 12}" r="4.5" fill="{_mark(others, name)}"'
                out.append(f"<circle {mark}>{title}</circle>")
    bottom = TOP + LINE * len(shown_rows)
    out.append(f'<line class="floor" x1="{middle}" y1="{TOP}" x2="{middle}" y2="{bottom}"/>')
    x = 16.0
    for name in others:
        out.append(f'<circle cx="{x + 5}" cy="{bottom + 16}" r="4.5" fill="{_mark(others, name)}"/>')
        out.append(f'<text class="small" x="{x + 15}" y="{bottom + 20}">{escape(name)}</text>')
        x += 30 + 7 * len(name)
    out += [f'<text class="small" x="16" y="{bottom + 38}">{escape(caption)}</text>', "</svg>", ""]
    return "\n".join(out)


def _named(row: Row) -> str:
    if row.scenario == "server":
        return row.figure
    return row.scenario if row.figure == "memory growth" else f"{row.scenario}: {row.figure}"


def _length(good: float) -> float:
    return max(2.0, min(good, EDGE) / EDGE * TRACK)


def _mark(others: Sequence[str], name: str) -> str:
    return MARKS[others.index(name) % len(MARKS)]
