"""Figures as SVG: bars, a row for each system, from zero to its median, with its range; and lines over the minutes of a run."""

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
_COLOURS: Final = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
_PLOT_WIDTH, _PLOT_HEIGHT, _PLOT_LEFT = 760, 150, 60
#: Of a line: its points, as minute and value.
Line = Sequence[tuple[float, float]]


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


def lines(charts: Sequence[tuple[str, Mapping[str, Line]]], minutes: float) -> str:
    """Small charts below each other, each from zero, all over the same minutes."""
    width, height, left, last = _PLOT_WIDTH, _PLOT_HEIGHT, _PLOT_LEFT, max(1.0, minutes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + left + 180}" height="{(height + 50) * len(charts)}"'
        ' font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number_, (title, found) in enumerate(charts):
        top = number_ * (height + 50) + 30
        most = max((value for points in found.values() for _, value in points), default=0.0) * 1.1 or 1.0
        parts.append(f'<text x="{left}" y="{top - 8}" font-weight="bold">{escape(title)}</text>')
        parts.append(f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#888"/>')
        parts.append(f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">{most:.0f}</text>')
        parts.append(f'<text x="{left - 6}" y="{top + height}" text-anchor="end">0</text>')
        parts.append(f'<text x="{left + width}" y="{top + height + 15}" text-anchor="end">{last:g} min</text>')
        for index, (name, points) in enumerate(found.items()):
            drawn = " ".join(
                f"{left + width * minute / last:.1f},{top + height * (1 - value / most):.1f}"
                for minute, value in points
            )
            colour = _COLOURS[index % len(_COLOURS)]
            parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            parts.append(
                f'<text x="{left + width + 8}" y="{top + 14 + 16 * index}" fill="{colour}">{escape(name)}</text>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"
