"""Bars as SVG: a row for each system, from zero to its median, with its range."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

from ops.bench.comparison.figures import number

_WIDTH: Final = 460
_LEFT: Final = 180
_ROW: Final = 26
_OURS, _THEIRS, _RANGE = "#1f77b4", "#9aa5b1", "#333"


def bars(title: str, rows: Mapping[str, Sequence[float]]) -> str:
    """The largest first. AgentFlow's have a colour of their own."""
    found = {name: values for name, values in rows.items() if values}
    ordered = sorted(found.items(), key=lambda row: -statistics.median(row[1]))
    most = max(max(values) for values in found.values()) or 1.0
    height = 50 + _ROW * len(ordered)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 90}" height="{height}" font-family="sans-serif"'
        ' font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="22" font-weight="bold">{escape(title)}</text>',
    ]
    for index, (name, values) in enumerate(ordered):
        top = 38 + _ROW * index
        middle = statistics.median(values)
        length, least, largest = (_WIDTH * value / most for value in (middle, min(values), max(values)))
        colour = _OURS if name.startswith("AgentFlow") else _THEIRS
        parts += [
            f'<text x="{_LEFT - 8}" y="{top + 13}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LEFT}" y="{top}" width="{length:.1f}" height="18" fill="{colour}"/>',
            f'<path d="M{_LEFT + least:.1f} {top + 9}H{_LEFT + largest:.1f}" stroke="{_RANGE}" stroke-width="2"/>',
            f'<text x="{_LEFT + largest + 6:.1f}" y="{top + 13}">{number(middle)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
