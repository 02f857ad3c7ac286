"""The results as one picture, for a README: plain SVG, for light pages and dark ones."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape

from .harness import OURS, Row, Section

WIDTH, PANEL, LEFT, RIGHT = 800, 400, 132, 66  # of the picture, a panel, its names, its numbers
LINE, BAR, TOP = 20, 12, 40  # heights of a row, of its bar, of a panel's head

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328; }
.title { font-weight: 600; font-size: 13px; }
.unit { fill: #656d76; font-size: 11px; }
.bar { fill: #afb8c1; }
.ours { fill: #1f6feb; }
text.ours { fill: #0a58ca; font-weight: 600; }
.cut { stroke: #fff; stroke-width: 3; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .unit { fill: #9198a1; }
  .bar { fill: #59636e; }
  .ours { fill: #4493f8; }
  text.ours { fill: #79b8ff; }
  .cut { stroke: #0d1117; }
}
"""


def svg(sections: Sequence[Section]) -> str:
    """All panels, two in a row."""
    panels, height = [], 8.0
    shown = [section for section in sections if section.plot and values(section)]
    for left, right in zip(shown[::2], [*shown[1::2], None], strict=False):
        for x, section in ((0, left), (PANEL, right)):
            if section is not None:
                panels.append(f'<g transform="translate({x} {height:g})">{panel(section)}</g>')
        rows = max(len(values(section)) for section in (left, right) if section is not None)
        height += TOP + rows * LINE + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">'
        f"<title>Measurements beside the peers; shorter is better</title><style>{STYLE}</style>"
        f"{''.join(panels)}</svg>\n"
    )


def values(section: Section) -> list[tuple[Row, float]]:
    """The bars of a panel, in rising order: what was compared, else what was taken."""
    compared = any(row.compared for row in section.rows)
    spreads = [(row, row.compared if compared else row.taken) for row in section.rows]
    found = [(row, spread.median) for row, spread in spreads if spread is not None]
    return sorted(
        ((row, value) for row, value in found if not row.way.startswith("`import ")),
        key=lambda pair: pair[1],
    )


def panel(section: Section) -> str:
    """Bars with names and numbers; what is far longer than most is cut."""
    bars = values(section)
    compared = any(row.compared for row in section.rows)
    unit, number = section.compared if compared else section.taken
    room = PANEL - LEFT - RIGHT
    longest = max(value for _, value in bars)
    most = min(longest, 6 * max(statistics.median(value for _, value in bars), 1e-9))
    parts = [
        f'<text class="title" x="8" y="14">{escape(section.plot)}</text>',
        f'<text class="unit" x="8" y="30">{escape(unit.replace("`", ""))}</text>',
    ]
    for index, (row, value) in enumerate(bars):
        y = TOP + index * LINE
        width = max(1.0, room * min(1.0, value / most))
        kind = "ours" if row.way.startswith(OURS) else "bar"
        mark = " class='ours'" if kind == "ours" else ""
        name = row.way.replace("`", "").replace("eager_sync_model", "eager").replace("_model", "")
        name = name.replace(f"{OURS}, ", "template, ")
        parts.append(f'<text{mark} x="{LEFT - 6}" y="{y + 10}" text-anchor="end">{name}</text>')
        parts.append(
            f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2"/>'
        )
        if value > most:
            cut = LEFT + width - 14
            parts.append(f'<path class="cut" d="M{cut} {y + BAR + 2}l5 {-BAR - 4}"/>')
        text = f"{value:{number}}"
        parts.append(f'<text{mark} x="{LEFT + width + 5:.1f}" y="{y + 10}">{text}</text>')
    return "".join(parts)
