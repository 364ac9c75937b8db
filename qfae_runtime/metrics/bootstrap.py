"""The stratified bootstrap over images (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13).

Images are drawn with replacement, as many as there are, within each class: every resample holds both classes in the
numbers that were there. The interval runs from the 2.5 to the 97.5 percentile of what the resamples give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qfae_runtime.arrays import Bool

Counts = npt.NDArray[np.uint32]
Members = npt.NDArray[np.int64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Bootstrap:
    """How often images are drawn anew, and the seed of the draws: the same images give the same intervals."""

    resamples: int = 1000
    seed: int = 0

    def to_dict(self) -> dict[str, int | str]:
        """Return plain JSON values."""
        method = "percentile, images drawn with replacement within each class"
        return {"resamples": self.resamples, "seed": self.seed, "method": method}


def classes_of(labels: Bool, order: Members) -> tuple[Members, Members]:
    """Return the images of either class, labels bool (N,), listed in `order`, int64 (N,)."""
    return order[labels[order]], order[~labels[order]]


def can_be_drawn(classes: Sequence[Members]) -> bool:
    """Tell whether draws can differ in every class: from a single image they are always the same."""
    return all(len(members) != 1 for members in classes)


def resample(classes: Sequence[Members], bootstrap: Bootstrap, most_counts: int) -> Iterator[Counts]:
    """Yield how often each resample holds each of N images, in blocks uint32 (R, N) of about `most_counts` counts.

    `classes` list the images, which are drawn by their place in the lists: where that comes from their content, the
    draws do not depend on the order of the images. They do not depend on the size of the blocks.
    """
    draws = np.random.default_rng(bootstrap.seed)
    images = sum(len(members) for members in classes)
    rows = max(1, most_counts // max(1, images))
    for start in range(0, bootstrap.resamples, rows):
        counts = np.zeros((min(rows, bootstrap.resamples - start), images), dtype=np.uint32)
        for row in counts:
            for members in classes:
                row[members] = np.bincount(draws.integers(len(members), size=len(members)), minlength=len(members))
        yield counts


def interval_of(values: npt.NDArray[np.float64]) -> Interval:
    """Return the 95 % interval of resampled values (R,); nan stands for a resample in which they are undefined."""
    low, high = np.nanquantile(values, (0.025, 0.975))
    return float(low), float(high)
