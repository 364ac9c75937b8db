"""From seconds to what a table says, with how sure it is.

A round is one visit to every candidate in turn, so what slows the machine for minutes slows them alike. Calls of one
visit are alike, rounds are not: intervals are over rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval; `low` and `high` are None of fewer than two rounds."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def over(cls, values: Sequence[float]) -> Interval:
        """Return the mean of independent values with Student's interval."""
        mean = float(np.mean(values))
        if len(values) < 2:
            return cls(mean)
        half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
        return cls(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Visit:
    """The seconds of a candidate's timed calls with one batch size in one round."""

    candidate: str
    batch: int
    round: int
    seconds: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.batch * len(self.seconds) / sum(self.seconds)


def latency(visits: Sequence[Visit]) -> dict[str, float]:
    """Return percentiles of the seconds a batch takes, over all calls, in milliseconds."""
    seconds = [one for visit in visits for one in visit.seconds]
    return {f"p{q}": 1e3 * float(np.percentile(seconds, q)) for q in (50, 90, 99)}


def throughput(visits: Sequence[Visit]) -> Interval:
    """Return images per second over rounds."""
    return Interval.over([visit.rate for visit in visits])


def speed_up(visits: Sequence[Visit], baseline: Sequence[Visit]) -> Interval | None:
    """Return how many times the baseline's rate a candidate reaches, paired by round; None without a common round."""
    before = {visit.round: visit.rate for visit in baseline}
    ratios = [visit.rate / before[visit.round] for visit in visits if visit.round in before]
    return Interval.over(ratios) if ratios else None
