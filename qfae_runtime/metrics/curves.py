"""Areas under curves from histograms, and how far the bins can have moved them.

A histogram is float64 (..., K): the weight in each of K bins of rising score. Leading axes are samples measured side by
side; every function returns float64 (...), nan where a class has no weight. Equal scores are one threshold, and so is
one bin: with a bin for each distinct score the areas are exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float64]

FPR_LIMIT = 0.30
"""AUPRO is integrated over false-positive rates from 0 to this one."""


def auroc(normal: Weights, anomalous: Weights) -> Weights:
    """Return the share of pairs (normal, anomalous) in which the anomalous one scores higher; a tie counts half."""
    below = np.cumsum(normal, axis=-1) - 0.5 * normal
    return _ratio(np.sum(anomalous * below, axis=-1), normal.sum(axis=-1) * anomalous.sum(axis=-1))


def auroc_error_bound(normal: Weights, anomalous: Weights) -> Weights:
    """Return how far `auroc` can be off: by one half for each pair that lies in one bin, whose order is unknown."""
    pairs = normal.sum(axis=-1) * anomalous.sum(axis=-1)
    return _ratio(0.5 * np.sum(anomalous * normal, axis=-1), pairs)


def average_precision(normal: Weights, anomalous: Weights) -> Weights:
    """Return the sum over thresholds of (rise in recall) x precision, the step-wise area that scikit-learn defines."""
    true, false = _from_the_top(anomalous), _from_the_top(normal)
    return _ratio(np.sum(anomalous * _ratio(true, true + false, 0), axis=-1), anomalous.sum(axis=-1))


def average_precision_error_bound(normal: Weights, anomalous: Weights) -> Weights:
    """Return how far `average_precision` can be off, whatever the order within the bins.

    Let a bin hold a anomalous weights of one each, with t anomalous and f normal ones from its lower edge up, and g
    normal ones above its upper edge. We count its precision as t / (t + f), for all of a. In truth no threshold within
    it has more than t / (t + g). And the k-th anomalous one has at least p(k) = (t - a + k) / (t - a + k + f), which is
    concave in k, so that the mean over k = 1..a is at least (p(1) + p(a)) / 2, where p(a) is what we count.
    """
    true, false = _from_the_top(anomalous), _from_the_top(normal)
    counted = _ratio(true, true + false, 0)
    most = _ratio(true, true + false - normal, 0)
    first = true - anomalous + 1
    upwards = np.sum(anomalous * (most - counted), axis=-1)
    downwards = np.sum(anomalous * (counted - first / (first + false)) / 2, axis=-1)
    return _ratio(np.maximum(upwards, downwards), anomalous.sum(axis=-1))


def aupro(normal: Weights, overlap: Weights, limit: float = FPR_LIMIT) -> Weights:
    """Return the mean overlap with the regions, averaged over false-positive rates from 0 to `limit`.

    `overlap` weighs each anomalous pixel with 1 / (pixels of its region), so that its sum from a threshold up is the
    overlap summed over the regions (Bergmann et al. 2021, "The MVTec Anomaly Detection Dataset"). The curve
    starts at (0, 0); trapezium rule, linear between the two thresholds around `limit`; divided by `limit`.
    """
    pieces = _pieces(normal, overlap, limit)
    return np.asarray(np.sum(pieces.width * (pieces.low + 0.5 * pieces.rise * pieces.share), axis=-1) / limit)


def aupro_error_bound(normal: Weights, overlap: Weights, limit: float = FPR_LIMIT) -> Weights:
    """Return how far `aupro` can be off, whatever the order within the bins.

    At the edges of a bin the curve is exact, and between them it rises: its area over the bin's width lies between two
    rectangles, of the overlap at its start and at its end.
    """
    pieces = _pieces(normal, overlap, limit)
    return np.asarray(np.sum(pieces.width * pieces.rise * (1 - 0.5 * pieces.share), axis=-1) / limit)


class _Pieces(NamedTuple):
    """The curve between neighbouring thresholds, cut at the limit: `share` of each piece lies before it."""

    width: Weights
    share: Weights
    low: Weights
    rise: Weights


def _pieces(normal: Weights, overlap: Weights, limit: float) -> _Pieces:
    rates = _ratio(_from_the_top(normal), normal.sum(axis=-1, keepdims=True))
    overlaps = _ratio(_from_the_top(overlap), overlap.sum(axis=-1, keepdims=True))
    wholes = _ratio(normal, normal.sum(axis=-1, keepdims=True))
    rise = _ratio(overlap, overlap.sum(axis=-1, keepdims=True))
    width = np.clip(limit - (rates - wholes), 0, wholes)
    return _Pieces(width, _ratio(width, wholes, 0), overlaps - rise, rise)


def _from_the_top(histogram: Weights) -> Weights:
    """Return the weight in each bin and all above it."""
    return np.asarray(np.cumsum(histogram[..., ::-1], axis=-1)[..., ::-1])


def _ratio(above: Any, below: Any, otherwise: float = np.nan) -> Weights:
    """Return above / below, and `otherwise` where below is 0."""
    shape = np.broadcast_shapes(np.shape(above), np.shape(below))
    result: Weights = np.full(shape, otherwise, dtype=np.float64)
    np.divide(above, below, out=result, where=np.asarray(below) != 0)
    return result
