"""What image.py and pixels.py hand to measure.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from qfae_runtime.metrics.bootstrap import Interval


@dataclass
class Figures:
    """Numbers by the names they have in metrics.json. What is undefined is absent, and `notes` says why."""

    values: dict[str, float] = field(default_factory=dict)
    error_bounds: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
