"""PyTorch FP32's own error, image by image: the unit that an FP32 engine's errors are measured in.

The truth is PyTorch in FP64. A sound engine rounds as often as PyTorch FP32 does, if elsewhere, so its errors are about
as large as PyTorch's own; a fault adds to them, on every image (a wrong constant) or on some (a bright border cut off).

Letters: N images, M of them scored in FP64 as well, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qfae_runtime.engines.base import Scores

Float64 = npt.NDArray[np.float64]

OUTPUT_STEP = 2.0**-24
"""Half the distance of neighbouring float32 numbers, as a share: what writing an output down costs at the most."""

LEAST_ERROR = 1e-12
"""Of scores and maps: keeps images on which PyTorch makes no error at all from dividing by zero."""


COLUMNS = ("score", "map", "pixel", "reconstruction")
"""Errors of an image: of its score, of its map (RMS over the pixels), of the map's worst pixel, and the share of the
reconstruction's values that differ at all (most do not, since they are rounded to whole grey levels)."""


class Yardstick(NamedTuple):
    """PyTorch FP32's own error on each image: float64 (N, 4), its columns COLUMNS.

    own   as it was measured, against FP64; NaN where it was not
    unit  what single images are held against: `own`, or what is usual for the image's height where that is more, since
          PyTorch may be right by chance; where nobody measured it, the most that it came to on an image of that height
    """

    own: Float64
    unit: Float64

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Of which images PyTorch's own error was measured, bool (N,)."""
        return np.logical_not(np.isnan(self.own).all(axis=1))

    def of(self, images: slice | list[int]) -> Yardstick:
        """Return that of some of the images, in the order given."""
        return Yardstick(self.own[images], self.unit[images])

    @classmethod
    def measured(
        cls, reference: Scores, errors: Sequence[Float64], exact: Sequence[int], groups: Sequence[int]
    ) -> Yardstick:
        """Return the yardstick of N images from errors (M, 4) of several FP32 forms on those numbered `exact`.

        Images of one number in `groups` (N) are alike: what is usual is the median of own error / height over those of
        them that were measured, and the most its maximum. Of a group without any, it is that of all.
        """
        heights, numbers, kinds = heights_of(reference), list(exact), np.asarray(groups)
        error = np.sqrt(np.mean([one**2 for one in errors], axis=0))
        shares = error / np.maximum(heights[numbers], LEAST_ERROR)
        unit = heights * _of_groups(np.max, shares, kinds[numbers], kinds)
        usual = heights * _of_groups(np.median, shares, kinds[numbers], kinds)
        unit[numbers] = np.maximum(error, usual[numbers])
        own = np.full_like(unit, np.nan)
        own[numbers] = error
        return cls(own, unit)

    @classmethod
    def estimated(
        cls,
        reference: Scores,
        groups: Sequence[int],
        known: Yardstick,
        known_scores: Scores,
        known_groups: Sequence[int],
    ) -> Yardstick:
        """Return the yardstick of N images on which nobody measured PyTorch, from others of which it is `known`."""
        measured = known.known
        shares = (known.own / np.maximum(heights_of(known_scores), LEAST_ERROR))[measured]
        unit = heights_of(reference) * _of_groups(
            np.max, shares, np.asarray(known_groups)[measured], np.asarray(groups)
        )
        return cls(np.full_like(unit, np.nan), unit)


def _of_groups(
    statistic: Callable[..., Float64], shares: Float64, of: npt.NDArray[np.int64], groups: npt.NDArray[np.int64]
) -> Float64:
    """Return for images of these groups a statistic of their group's shares, (N, 4); where it has none, of all."""
    found = np.empty((len(groups), shares.shape[1]))
    for group in np.unique(groups):
        mine = of == group
        found[groups == group] = statistic(shares[mine] if mine.any() else shares, axis=0)
    return found


def heights_of(scores: Scores) -> Float64:
    """Return how large outputs are, float64 (N, 4): the score, the RMS of the map, its largest value, and 1."""
    maps = scores.anomaly_map.astype(np.float64)
    score = np.abs(scores.score.astype(np.float64))
    return np.stack([score, np.sqrt((maps**2).mean((1, 2))), np.abs(maps).max((1, 2)), np.ones_like(score)], axis=1)


def steps_of(scores: Scores) -> Float64:
    """Return what writing outputs down may cost, float64 (N, 4): half a step of float32, one value of the pixels."""
    top = OUTPUT_STEP * np.abs(scores.anomaly_map).max((1, 2)).astype(np.float64) + LEAST_ERROR
    one = np.full_like(top, 1 / max(scores.reconstruction[0].size, 1))
    return np.stack([top, top, top, one], axis=1)


def errors_of(reference: Scores, got: Scores) -> Float64:
    """Return the errors that a yardstick measures, float64 (N, 4). Scores and maps may be float64."""
    score = np.abs(got.score.astype(np.float64) - reference.score)
    maps = np.abs(got.anomaly_map.astype(np.float64) - reference.anomaly_map)
    differ = (got.reconstruction != reference.reconstruction).mean((1, 2, 3))
    return np.stack([score, np.sqrt((maps**2).mean((1, 2))), maps.max((1, 2)), differ], axis=1)


def typical_ratios(errors: Float64, own: Float64, steps: Float64) -> Float64:
    """Return by column the geometric mean over the images of error / own error, each (N, 4), the steps forgiven."""
    means: Float64 = np.exp(np.log((errors + steps) / (own + steps)).mean(axis=0))
    return means
