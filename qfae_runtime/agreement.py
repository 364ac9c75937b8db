"""How far an engine's outputs are from the reference's: every quantity that a contract may bound, and the worst place.

Nothing here says what is good enough; `contract.py` does. Each quantity is the least bound that would have passed.

Letters: N images, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qfae_runtime.engines.base import OUTPUT_NAMES, Scores

Float64 = npt.NDArray[np.float64]

REL_FLOOR = 1e-3
"""Relative errors of single values count where |reference| exceeds this; below it the other quantities watch."""


class Quantity(NamedTuple):
    """What is measured: the words for it, and whether larger is better."""

    title: str
    larger_is_better: bool = False


QUANTITIES = {
    "score_abs": Quantity("score error, largest"),
    "score_rel": Quantity("score error, relative"),
    "score_p999": Quantity("score error, p99.9"),
    "score_median": Quantity("score error, median / IQR"),
    "score_iqr": Quantity("score error, p99.9 / IQR"),
    "spearman": Quantity("score ranks, Spearman", larger_is_better=True),
    "flips": Quantity("decisions flipped"),
    "flips_share": Quantity("decisions flipped / images"),
    "flips_beyond": Quantity("flips beyond the score error"),
    "auroc_change": Quantity("AUROC, change"),
    "map_abs": Quantity("map error, largest"),
    "map_rel": Quantity("map error, relative"),
    "map_p999": Quantity("map error, p99.9"),
    "map_share": Quantity("map error, p99.9 / p99.9 of maps"),
    "map_pixel": Quantity("map error, largest pixel"),
    "map_cosine_p1": Quantity("map cosine, p1", larger_is_better=True),
    "map_cosine_min": Quantity("map cosine, least", larger_is_better=True),
    "reconstruction_levels": Quantity("reconstruction, grey levels"),
    "reconstruction_p999": Quantity("reconstruction, p99.9 grey levels"),
}
"""What is measured, in the order of tables.

Errors are absolute differences from the reference, in float64. Relative ones count where |reference| > REL_FLOOR. pN is
the Nth percentile: of the images for scores and for the cosines of their maps, of all pixels for maps and
reconstructions. The largest pixel's error is held against its own value, or against the maps' p99.9 where that is more:
percentiles and cosines do not see a single bright pixel. IQR is the interquartile range of the reference's scores. A
decision is score >= threshold; a flip lies beyond the score error if the reference is farther from the threshold
than score_p999.
"""


OF_ALL_IMAGES = ("score_median", "spearman", "flips", "flips_share", "flips_beyond", "auroc_change")
"""Quantities of a whole set of images, which say little about a few of them."""


@dataclass(frozen=True)
class Worst:
    """The largest error of one kind: its size, where it is, and both values there."""

    error: float
    index: tuple[int, ...]
    reference: float
    got: float


@dataclass(frozen=True)
class Scale:
    """What errors are held against, from the reference's outputs on all images of a measurement.

    score_iqr       interquartile range of the scores
    map_p999        99.9th percentile of the maps' values
    threshold       decision threshold on the score
    threshold_from  where the threshold comes from, in words
    """

    score_iqr: float
    map_p999: float
    threshold: float
    threshold_from: str

    @classmethod
    def of(cls, reference: Scores, labels: Sequence[bool | None] = (), threshold: float | None = None) -> Scale:
        """Return the scale of reference outputs; `labels` (True: anomalous) stand in the images' order."""
        scores = reference.score.astype(np.float64)
        quarter, three_quarters = np.percentile(scores, [25, 75])
        if threshold is not None:
            where = "calibrated"
        else:
            normal = scores[[label is False for label in labels]] if len(labels) else scores[:0]
            where = (
                f"95th percentile of the {len(normal) or len(scores)} {'normal ' if len(normal) else ''}images' scores"
            )
            threshold = float(np.percentile(normal if len(normal) else scores, 95))
        maps = float(np.percentile(reference.anomaly_map, 99.9))
        return cls(float(three_quarters - quarter), maps, threshold, where)


@dataclass(frozen=True)
class Agreement:
    """Every quantity of QUANTITIES (None: undefined, e.g. AUROC without labels), and where single values are worst.

    `fault` is set when the outputs could not be compared at all; then there are no values.
    """

    images: int
    scale: Scale | None
    values: dict[str, float | None]
    worst: dict[str, Worst]
    fault: str | None = None

    def summary(self) -> str:
        """One line of the measured errors, e.g. for a log."""
        if self.fault is not None:
            return self.fault
        value = {name: number if number is not None else float("nan") for name, number in self.values.items()}
        return (
            f"score {value['score_abs']:.2g} abs, {value['score_iqr']:.2g} of the interquartile range; "
            f"anomaly_map {value['map_abs']:.2g} abs, cosine {value['map_cosine_p1']:.6f}; "
            f"reconstruction {value['reconstruction_levels']:g} levels"
        )


def measure_agreement(
    reference: Scores, got: Scores, labels: Sequence[bool | None] = (), scale: Scale | None = None
) -> Agreement:
    """Measure outputs on N images against the reference's, in float64.

    `scale` is that of these very reference outputs unless it is given (for a part of the images of a measurement).
    Values that are not finite on either side, differing shapes and an empty batch make a fault.
    """
    if fault := incomparable(reference, got):
        return Agreement(len(reference.score), scale, {}, {}, fault)
    scale = scale or Scale.of(reference, labels)
    want, have = reference.score.astype(np.float64), got.score.astype(np.float64)
    error = np.abs(have - want)
    p999 = float(np.percentile(error, 99.9))
    values: dict[str, float | None] = {"score_p999": p999, "score_iqr": _ratio(p999, scale.score_iqr)}
    values["score_median"] = _ratio(float(np.median(error)), scale.score_iqr)
    values["spearman"] = _spearman(want, have)
    flipped = (want >= scale.threshold) != (have >= scale.threshold)
    values["flips"], values["flips_share"] = float(flipped.sum()), float(flipped.mean())
    values["flips_beyond"] = float((flipped & (np.abs(want - scale.threshold) > p999)).sum())
    values["auroc_change"] = _auroc_change(want, have, labels)
    worst: dict[str, Worst] = {}
    _single_values("score", want, have, error, values, worst)
    _maps(reference, got, scale, values, worst)
    _reconstruction(reference, got, values, worst)
    return Agreement(len(want), scale, {name: values[name] for name in QUANTITIES}, worst)


def incomparable(reference: Scores, got: Scores) -> str | None:
    """Say why the outputs cannot be compared: shapes, emptiness, values that are not finite; None if they can."""
    for name in OUTPUT_NAMES:
        want, have = np.asarray(getattr(reference, name)), np.asarray(getattr(got, name))
        if want.shape != have.shape:
            return f"{name}: expected shape {want.shape}, got {have.shape}"
        if want.dtype != have.dtype:
            return f"{name}: expected {want.dtype}, got {have.dtype}"
        if want.size == 0:
            return f"{name}: nothing to compare: the batch is empty"
        for side, array in (("the reference", want), ("the engine", have)):
            odd = ~np.isfinite(array)
            if odd.any():
                index = tuple(int(i) for i in np.argwhere(odd)[0])
                return f"{name}: {side} has {int(odd.sum())} values that are not finite, the first at index {index}"
    return None


def _maps(
    reference: Scores, got: Scores, scale: Scale, values: dict[str, float | None], worst: dict[str, Worst]
) -> None:
    want, have = reference.anomaly_map.astype(np.float64), got.anomaly_map.astype(np.float64)
    error = np.abs(have - want)
    _single_values("map", want, have, error, values, worst)
    p999 = float(np.percentile(error, 99.9))
    values["map_p999"], values["map_share"] = p999, _ratio(p999, scale.map_p999)
    against = np.maximum(np.abs(want), scale.map_p999)
    shares = np.divide(error, against, out=np.where(error > 0, np.inf, 0.0), where=against > 0)
    worst["map_pixel"] = _worst(shares, want, have)
    values["map_pixel"] = worst["map_pixel"].error if np.isfinite(shares).all() else None
    cosines = np.array([_cosine(a.ravel(), b.ravel()) for a, b in zip(want, have, strict=True)])
    values["map_cosine_p1"] = float(np.percentile(cosines, 1))
    values["map_cosine_min"] = float(cosines.min())
    lowest = int(cosines.argmin())
    worst["map_cosine_p1"] = Worst(float(cosines[lowest]), (lowest,), 1.0, float(cosines[lowest]))


def _reconstruction(reference: Scores, got: Scores, values: dict[str, float | None], worst: dict[str, Worst]) -> None:
    want, have = reference.reconstruction.astype(np.float64), got.reconstruction.astype(np.float64)
    error = np.abs(have - want)
    values["reconstruction_levels"] = float(error.max())
    values["reconstruction_p999"] = float(np.percentile(error, 99.9))
    worst["reconstruction_levels"] = worst["reconstruction_p999"] = _worst(error, want, have)


def _single_values(
    name: str, want: Float64, have: Float64, error: Float64, values: dict[str, float | None], worst: dict[str, Worst]
) -> None:
    worst[f"{name}_abs"] = _worst(error, want, have)
    values[f"{name}_abs"] = worst[f"{name}_abs"].error
    counts = np.abs(want) > REL_FLOOR
    relative = np.divide(error, np.abs(want), out=np.zeros_like(error), where=counts)
    worst[f"{name}_rel"] = _worst(relative, want, have)
    values[f"{name}_rel"] = worst[f"{name}_rel"].error
    worst[f"{name}_p999"] = worst[f"{name}_iqr"] = worst[f"{name}_share"] = worst[f"{name}_abs"]


def _worst(error: Float64, want: Float64, have: Float64) -> Worst:
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(error)), error.shape))
    return Worst(float(error[index]), index, float(want[index]), float(have[index]))


def _ratio(error: float, scale: float) -> float | None:
    """Return error / scale; None where the scale is 0 and an error therefore cannot be judged."""
    if scale > 0:
        return error / scale
    return 0.0 if error == 0 else None


def _cosine(want: Float64, have: Float64) -> float:
    norm = float(np.linalg.norm(want) * np.linalg.norm(have))
    if norm == 0:
        return 1.0 if np.array_equal(want, have) else 0.0
    return float(want @ have) / norm


def _spearman(want: Float64, have: Float64) -> float | None:
    """Return the correlation of ranks, ties sharing theirs; None where all scores of one side are equal."""
    a, b = (_ranks(values) for values in (want, have))
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norm == 0:
        return 1.0 if np.array_equal(want, have) else None
    return float(a @ b) / norm


def _ranks(values: Float64) -> Float64:
    """Return ranks from 1, equal values sharing the mean of theirs; SciPy's takes half a second to import."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Float64 = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def _auroc_change(want: Float64, have: Float64, labels: Sequence[bool | None]) -> float | None:
    known = np.array([label is not None for label in labels], dtype=bool)
    truth = np.array([bool(label) for label in labels], dtype=bool)
    if not known.any() or truth[known].all() or not truth[known].any():
        return None
    from sklearn.metrics import roc_auc_score

    before, after = (float(roc_auc_score(truth[known], one[known])) for one in (want, have))
    return abs(after - before)
