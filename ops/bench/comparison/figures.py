"""Figures of several rounds: medians and ranges."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Round = dict[str, Any]


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest of the values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def values_of(rounds: Sequence[Round], name: str) -> list[float]:
    return [float(each[name]) for each in rounds if isinstance(each.get(name), int | float)]


def ratios(ours: Sequence[Round], theirs: Sequence[Round], name: str) -> list[float]:
    """Of each round with the same round's other: machines drift, and what ran next to each other compares best."""
    pairs = zip(ours, theirs, strict=False)
    return [a[name] / b[name] for a, b in pairs if a.get(name) and b.get(name)]


def shown(values: Sequence[float]) -> str:
    """Median, and in brackets least, most and how many."""
    if not values:
        return "–"
    middle = number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))}–{number(max(values))}, {len(values)})"


def number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
