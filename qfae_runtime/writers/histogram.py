"""The score histogram of the report, laid out as plain numbers for an inline SVG.

Good images hang down from the axis and all others stand up, on one scale, so that neither hides the other; with
one kind alone everything stands up. Scores that are products of distances span orders of magnitude; their axis is
logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qfae_runtime.layout import GOOD

BINS = 48

SKEWED = 20.0
"""The axis is logarithmic where the largest score exceeds the median by this factor."""

_LEFT, _RIGHT, _TOP, _SINGLE_HEIGHT, _DOUBLE_HEIGHT, _BELOW = 48.0, 890.0, 12.0, 160.0, 95.0, 44.0


@dataclass(frozen=True)
class _Axes:
    low: float
    high: float
    base: float  # y of the axis between the bars that stand and those that hang
    unit: float  # height of one count
    logarithmic: bool

    def x(self, value: float) -> float:
        low, high, at = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return round(_LEFT + (at - low) / (high - low) * (_RIGHT - _LEFT), 2)

    def y(self, count: float) -> float:
        return round(self.base - count * self.unit, 2)


def layout(scores: Mapping[str, list[float]], threshold: float | None) -> dict[str, Any] | None:
    """Lay out a histogram of scores by label; None without scores."""
    every = [value for values in scores.values() for value in values]
    if not every:
        return None
    low, high = _span(every if threshold is None else [*every, threshold])
    logarithmic = low > 0 and high > SKEWED * float(np.median(every))
    edges = np.geomspace(low, high, BINS + 1) if logarithmic else np.linspace(low, high, BINS + 1)
    edges[0], edges[-1] = low, high  # rounding must not put the extremes outside
    counts = {label: np.histogram(values, edges)[0] for label, values in scores.items()}
    tallest = max(int(count.max()) for count in counts.values())
    mirrored = GOOD in scores and len(scores) > 1
    height = _DOUBLE_HEIGHT if mirrored else _SINGLE_HEIGHT
    axes = _Axes(low, high, _TOP + height, height / tallest, logarithmic)
    bottom = axes.base + (height if mirrored else 0.0)
    levels = [level for level in (_ticks(0, tallest, 3) if tallest > 1 else [1.0]) if level == int(level)]
    ticks = log_ticks(low, high, most_decades=5) if logarithmic else _ticks(low, high, 6)
    signs = (1, -1) if mirrored else (1,)
    return {
        "bars": [
            bar
            for label, count in counts.items()
            for bar in _bars(label, count, edges, axes, mirrored and label == GOOD)
        ],
        "left": _LEFT,
        "right": _RIGHT,
        "top": _TOP,
        "base": axes.base,
        "bottom": bottom,
        "height": bottom + _BELOW,
        "ticks": [{"x": axes.x(value), "text": f"{value:.4g}"} for value in ticks],
        "logarithmic": logarithmic,
        "levels": [{"y": axes.y(sign * level), "text": int(level)} for level in levels if level for sign in signs],
        "threshold": None if threshold is None else axes.x(threshold),
    }


def _span(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    half = max(abs(low), 1e-6) * 0.5  # one single value stands in the middle
    return low - half, high + half


def _bars(label: str, counts: Any, edges: Any, axes: _Axes, hangs: bool) -> list[dict[str, Any]]:
    width = (_RIGHT - _LEFT) / BINS
    return [
        {
            "label": label,
            "x": round(_LEFT + number * width + 0.5, 2),
            "y": axes.base if hangs else axes.y(int(count)),
            "width": round(width - 1, 2),
            "height": round(int(count) * axes.unit, 2),
            "title": f"{int(count)} {label}, score {edges[number]:.4g} to {edges[number + 1]:.4g}",
        }
        for number, count in enumerate(counts)
        if count
    ]


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers between two ends, about as many as wanted."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    return [float(f"{n * step:.12g}") for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float, most_decades: int) -> list[float]:
    """Return the powers of ten between two ends above 0; up to `most_decades` of them, with 2 and 5 between."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= most_decades else (1,)
    values = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
    return [value for value in values if low <= value <= high]
