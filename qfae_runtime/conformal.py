"""Split-conformal decisions: a threshold and p-values from the scores of normal images alone.

Let n scores of normal images be given and one more score s of a normal image, all exchangeable (drawn in the same way,
in no particular order). Then s is as likely to be the smallest of the n + 1 as any other, whatever its distribution:

    p = (1 + number of the n scores that are >= s) / (n + 1)         P(p <= a) <= a for every a
    threshold = the k-th smallest of the n scores, k = n + 1 - floor(a (n + 1))
    s > threshold  exactly where  p <= a                             P(s > threshold) <= a

(Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005; Lei et al., JASA 113, 2018.) The probability is
over calibration images and the new one together. Once the n are drawn, the rate of false positives is fixed, and
unknown: without ties it is distributed as Beta(n + 1 - k, k) (Vovk, 2012), which `rate_interval` reads.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]


def least_images(fpr: float) -> int:
    """Return how many images a threshold for the false positive rate `fpr` (0 < fpr < 1) takes at the least."""
    return math.ceil(1 / _exact(fpr)) - 1


def rank_of_threshold(count: int, fpr: float) -> int:
    """Return k: the threshold is the k-th smallest of `count` scores; `count` + 1 where there are too few."""
    return count + 1 - math.floor(_exact(fpr) * (count + 1))


def threshold_of(scores: Scores, fpr: float) -> float:
    """Return the threshold of scores (n,), in any order; more than it is anomalous.

    Raises:
        ValueError: they are fewer than `least_images`.

    """
    rank = rank_of_threshold(len(scores), fpr)
    if rank > len(scores):
        raise ValueError(f"{len(scores)} scores give no threshold for {fpr}; {least_images(fpr)} are needed")
    return float(np.partition(scores, rank - 1)[rank - 1])


def p_value(ascending: Scores, score: float) -> float:
    """Return the conformal p-value, in (0, 1], of a score beside n scores of normal images in ascending order."""
    above = len(ascending) - int(np.searchsorted(ascending, score, side="left"))
    return (1 + above) / (len(ascending) + 1)


def rate_interval(count: int, fpr: float, share: float = 0.95) -> tuple[float, float]:
    """Return the central interval that holds the threshold's true false positive rate with probability `share`."""
    from scipy import stats  # half a second to import; a run without a calibration need not wait

    rank = rank_of_threshold(count, fpr)
    low, high = stats.beta(count + 1 - rank, rank).ppf([(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def _exact(rate: float) -> Fraction:
    # 0.05 is meant as it is written: in binary it is a little more, and 0.05 * 20 must not be 0 or 2 images.
    return Fraction(repr(float(rate)))
