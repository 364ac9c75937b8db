"""How far an engine's outputs are from the reference's: every quantity of quantities.py, and the worst place.

Nothing here says what is good enough; `contract.py` does. Each quantity is the least bound that would have passed.

Letters: N images, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import OUTPUT_NAMES, Scores
from qfae_runtime.quantities import LEAST_DISTANCE, QUANTITIES
from qfae_runtime.yardstick import Float64, Yardstick, errors_of, steps_of, typical_ratios


@dataclass(frozen=True)
class Worst:
    """The largest error of one kind: its size, where it is, and both values there."""

    error: float
    index: tuple[int, ...]
    reference: float
    got: float


@dataclass(frozen=True)
class Scale:
    """What else errors are held against, from the reference's outputs on the real images of a measurement.

    score_iqr       interquartile range of the scores
    threshold       decision threshold on the score
    threshold_from  where the threshold comes from, in words
    factors         cosine distances that are multiplied in a score
    """

    score_iqr: float
    threshold: float
    threshold_from: str
    factors: int = 1

    @classmethod
    def of(
        cls,
        reference: Scores,
        labels: Sequence[bool | None] = (),
        threshold: float | None = None,
        factors: int = 1,
    ) -> Scale:
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
        return cls(float(three_quarters - quarter), threshold, where, factors)


@dataclass(frozen=True)
class Reference:
    """What engines are compared with, on N images.

    scores     FP64's outputs where they were computed, rounded to float32; else PyTorch FP32's
    scale      what else errors are held against
    yardstick  PyTorch FP32's own error; None: nobody measured it, and what needs it is undefined
    stress     numbers of the stress images
    """

    scores: Scores
    scale: Scale
    yardstick: Yardstick | None = None
    stress: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.scores.score)

    def of(self, images: Sequence[int]) -> Reference:
        """Return the reference of some of the images, in the order given."""
        numbers = list(images)
        known = set(self.stress)
        stress = tuple(place for place, number in enumerate(numbers) if number in known)
        yardstick = None if self.yardstick is None else self.yardstick.of(numbers)
        return Reference(self.scores.of(numbers), self.scale, yardstick, stress)

    def compare(self, got: Scores, labels: Sequence[bool | None] = ()) -> Agreement:
        """Measure outputs on these images; `labels` (True: anomalous) stand in their order."""
        return measure_agreement(self.scores, got, labels, self.scale, self.yardstick, self.stress)

    def typical(self, got: Scores) -> dict[str, float | None]:
        """Return what is typical of comparable outputs on these images, and no other quantity of `compare`."""
        if self.yardstick is None:
            return dict.fromkeys(TYPICAL)
        known = set(self.stress)
        kinds = [[number for number in range(len(self)) if (number in known) == stress] for stress in (False, True)]
        return {**_typical(errors_of(self.scores, got), steps_of(self.scores), kinds, self.yardstick)}


@dataclass(frozen=True)
class Agreement:
    """Every quantity of QUANTITIES (None: undefined, e.g. AUROC without labels), and where single values are worst.

    `fault` is set when the outputs could not be compared at all; then there are no values. `fault_image` is the number
    of the image at which they could not, if there is one.
    """

    images: int
    scale: Scale | None
    values: dict[str, float | None]
    worst: dict[str, Worst]
    fault: str | None = None
    fault_image: int | None = None

    def summary(self) -> str:
        """One line of the measured errors, e.g. for a log."""
        if self.fault is not None:
            return self.fault
        value = {name: number if number is not None else float("nan") for name, number in self.values.items()}
        own = "" if self.values["score_worst"] is None else f", {value['score_worst']:.2g} times PyTorch's own"
        return (
            f"score {value['score_abs']:.2g} abs{own}; "
            f"anomaly_map {value['map_abs']:.2g} abs, cosine {value['map_cosine_p1']:.6f}; "
            f"reconstruction {value['reconstruction_levels']:g} levels"
        )


FLIP_REACH = 30.0
"""A decision may change where the score is no farther from the threshold than so many times PyTorch's own error: as far
as FP32's contract lets any one score be off."""

TYPICAL = {"score_typical": 0, "map_typical": 1, "reconstruction_typical": 3}
"""Quantities of what is typical in units of PyTorch's own error, and the yardstick's column of each."""


def measure_agreement(
    reference: Scores,
    got: Scores,
    labels: Sequence[bool | None] = (),
    scale: Scale | None = None,
    yardstick: Yardstick | None = None,
    stress: Sequence[int] = (),
) -> Agreement:
    """Measure outputs on N images against the reference's, in float64.

    `scale` is that of these very reference outputs unless it is given (for a part of the images of a measurement).
    Values that are not finite on either side, differing shapes and an empty batch make a fault.
    """
    if found := _fault(reference, got):
        return Agreement(len(reference.score), scale, {}, {}, *found)
    left_out = set(stress)
    real = [number for number in range(len(reference.score)) if number not in left_out]
    scale = scale or Scale.of(reference.of(real), [labels[number] for number in real] if len(labels) else ())
    values: dict[str, float | None] = {}
    worst: dict[str, Worst] = {}
    _against_own(reference, got, [real, sorted(left_out)], yardstick, values, worst)
    known = [labels[number] for number in real] if len(labels) else []
    _scores(reference, got, real, known, scale, yardstick, values, worst)
    _maps(reference, got, real, scale, values, worst)
    _reconstruction(reference, got, real, values, worst)
    _stress(reference, got, list(stress), scale, values, worst)
    return Agreement(len(reference.score), scale, {name: values[name] for name in QUANTITIES}, worst)


def incomparable(reference: Scores, got: Scores) -> str | None:
    """Say why the outputs cannot be compared: shapes, emptiness, values that are not finite; None if they can."""
    found = _fault(reference, got)
    return None if found is None else found[0]


def _fault(reference: Scores, got: Scores) -> tuple[str, int | None] | None:
    """Return why the outputs cannot be compared, and the image's number where it is one."""
    for name in OUTPUT_NAMES:
        want, have = np.asarray(getattr(reference, name)), np.asarray(getattr(got, name))
        if want.shape != have.shape:
            return f"{name}: expected shape {want.shape}, got {have.shape}", None
        if want.dtype != have.dtype:
            return f"{name}: expected {want.dtype}, got {have.dtype}", None
        if want.size == 0:
            return f"{name}: nothing to compare: the batch is empty", None
        for side, array in (("the reference", want), ("the engine", have)):
            odd = ~np.isfinite(array)
            if odd.any():
                index = tuple(int(i) for i in np.argwhere(odd)[0])
                said = f"{name}: {side} has {int(odd.sum())} values that are not finite, the first at index {index}"
                return said, index[0]
    return None


def distance(values: Float64, factors: int) -> Float64:
    """Return scores or maps as cosine distances, 0..2: the root of as many factors as were multiplied."""
    roots: Float64 = np.maximum(values, 0) ** (1 / factors)
    return roots


def angle(values: Float64, factors: int) -> Float64:
    """Return scores or maps as angles between features, in radians, small ones exactly: 1 - cos x is about x^2 / 2."""
    angles: Float64 = np.sqrt(2 * distance(values, factors))
    return angles


def _against_own(
    reference: Scores,
    got: Scores,
    kinds: Sequence[list[int]],
    yardstick: Yardstick | None,
    values: dict[str, float | None],
    worst: dict[str, Worst],
) -> None:
    largest = ("score_worst", "map_worst", "map_pixel", "reconstruction_worst")
    values |= dict.fromkeys((*TYPICAL, *largest))
    if yardstick is None:
        return
    errors, steps = errors_of(reference, got), steps_of(reference)
    values |= _typical(errors, steps, kinds, yardstick)
    shares = errors / np.maximum(yardstick.unit, steps)
    for column, name in enumerate(largest):
        number = int(shares[:, column].argmax())
        values[name] = share = float(shares[number, column])
        output = "score" if column == 0 else "reconstruction" if column == 3 else "anomaly_map"
        want, have = (np.asarray(getattr(one, output)[number], np.float64) for one in (reference, got))
        place = _worst(np.abs(have - want), want, have)
        worst[name] = replace(place, error=share, index=(number, *place.index))


def _typical(errors: Float64, steps: Float64, kinds: Sequence[list[int]], yardstick: Yardstick) -> dict[str, float]:
    """Return how far outputs typically are from the reference, on the images where PyTorch was measured, if any.

    By kind of image, and the worst of the kinds, for a fault may spare one.
    """
    known = yardstick.known
    own = yardstick.own if known.any() else yardstick.unit
    of_kinds = [[number for number in kind if known[number] or not known.any()] for kind in kinds]
    ratios = np.max([typical_ratios(errors[kind], own[kind], steps[kind]) for kind in of_kinds if kind], axis=0)
    return {name: float(ratios[column]) for name, column in TYPICAL.items()}


def _scores(
    reference: Scores,
    got: Scores,
    real: list[int],
    labels: Sequence[bool | None],
    scale: Scale,
    yardstick: Yardstick | None,
    values: dict[str, float | None],
    worst: dict[str, Worst],
) -> None:
    every = reference.score.astype(np.float64), got.score.astype(np.float64)
    worst["score_abs"] = _worst(np.abs(every[1] - every[0]), *every)
    values["score_abs"] = worst["score_abs"].error
    values |= dict.fromkeys(("score_p999", "score_iqr", "spearman", "auroc_change"))
    values |= dict.fromkeys(("score_distance", "score_distance_max", "flips", "flips_share"), 0.0)
    values["flips_beyond"] = None if yardstick is None else 0.0
    if not real:
        return
    want, have = every[0][real], every[1][real]
    error = np.abs(have - want)
    p999 = float(np.percentile(error, 99.9))
    values["score_p999"], values["score_iqr"] = p999, _ratio(p999, scale.score_iqr)
    moved = np.abs(distance(have, scale.factors) - distance(want, scale.factors))
    values["score_distance"] = float(moved.mean())
    worst["score_distance_max"] = _renumbered(_worst(moved, want, have), real)
    values["score_distance_max"] = worst["score_distance_max"].error
    values["spearman"] = _spearman(want, have)
    flipped = (want > scale.threshold) != (have > scale.threshold)
    values["flips"], values["flips_share"] = float(flipped.sum()), float(flipped.mean())
    if yardstick is not None:
        reach = FLIP_REACH * yardstick.unit[real, 0]
        values["flips_beyond"] = float((flipped & (np.abs(want - scale.threshold) > reach)).sum())
    values["auroc_change"] = _auroc_change(want, have, labels)


def _maps(
    reference: Scores,
    got: Scores,
    real: list[int],
    scale: Scale,
    values: dict[str, float | None],
    worst: dict[str, Worst],
) -> None:
    every = reference.anomaly_map.astype(np.float64), got.anomaly_map.astype(np.float64)
    worst["map_abs"] = _worst(np.abs(every[1] - every[0]), *every)
    values["map_abs"] = worst["map_abs"].error
    values |= {"map_angle": 0.0, "map_angle_max": 0.0, "map_cosine_p1": 1.0, "map_cosine_min": 1.0}
    if not real:
        return
    want, have = every[0][real], every[1][real]
    angles = _angles(want, have, scale.factors)
    values["map_angle"], values["map_angle_max"] = float(angles.mean()), float(angles.max())
    worst["map_angle_max"] = _of_image(angles, real)
    cosines = np.array([_cosine(a.ravel(), b.ravel()) for a, b in zip(want, have, strict=True)])
    values["map_cosine_p1"] = float(np.percentile(cosines, 1))
    values["map_cosine_min"] = float(cosines.min())
    worst["map_cosine_p1"] = worst["map_cosine_min"] = _of_image(-cosines, real)


def _angles(want: Float64, have: Float64, factors: int) -> Float64:
    """Return by how much maps (N, S, S) differ as angles, RMS over the pixels, (N,)."""
    rms: Float64 = np.sqrt(((angle(have, factors) - angle(want, factors)) ** 2).mean((1, 2)))
    return rms


def _reconstruction(
    reference: Scores, got: Scores, real: list[int], values: dict[str, float | None], worst: dict[str, Worst]
) -> None:
    want, have = reference.reconstruction, got.reconstruction
    error = np.where(have > want, have - want, want - have)
    values["reconstruction_levels"] = float(error.max())
    worst["reconstruction_levels"] = _worst(error, want, have)
    values["reconstruction_p999"] = 0.0
    if real:
        values["reconstruction_p999"] = _percentile_of_levels(error[real], 0.999)
        worst["reconstruction_p999"] = _renumbered(_worst(error[real], want[real], have[real]), real)


def _percentile_of_levels(levels: UInt8, share: float) -> float:
    """Return np.percentile of uint8 values without sorting them, which is most of a comparison's time."""
    ends = np.cumsum(np.bincount(levels.ravel(), minlength=256))
    place = share * (levels.size - 1)
    lower, upper = np.searchsorted(ends, [np.floor(place), np.ceil(place)], side="right")
    return float(lower + (upper - lower) * (place - np.floor(place)))


def _stress(
    reference: Scores,
    got: Scores,
    stress: list[int],
    scale: Scale,
    values: dict[str, float | None],
    worst: dict[str, Worst],
) -> None:
    values |= dict.fromkeys(("stress_distance", "stress_share", "stress_angle", "stress_reconstruction"), 0.0)
    values["stress_cosine"] = 1.0
    if not stress:
        return
    want, have = (one.of(stress) for one in (reference, got))
    scores = want.score.astype(np.float64), have.score.astype(np.float64)
    expected = distance(scores[0], scale.factors)
    moved = np.abs(distance(scores[1], scale.factors) - expected)
    for name, errors in (("stress_distance", moved), ("stress_share", moved / np.maximum(expected, LEAST_DISTANCE))):
        worst[name] = _renumbered(_worst(errors, *scores), stress)
        values[name] = worst[name].error
    maps = want.anomaly_map.astype(np.float64), have.anomaly_map.astype(np.float64)
    angles = _angles(*maps, scale.factors)
    cosines = np.array([_cosine(a.ravel(), b.ravel()) for a, b in zip(*maps, strict=True)])
    values["stress_cosine"], worst["stress_cosine"] = float(cosines.min()), _of_image(-cosines, stress)
    levels = np.abs(have.reconstruction.astype(np.float64) - want.reconstruction).mean((1, 2, 3))
    for name, errors in (("stress_angle", angles), ("stress_reconstruction", levels)):
        values[name] = float(errors.max())
        worst[name] = _of_image(errors, stress)


def _of_image(errors: Float64, numbers: list[int]) -> Worst:
    """Return where the largest error of whole images is; no single value is responsible for it."""
    place = int(errors.argmax())
    return Worst(float(errors[place]), (numbers[place],), 0.0, float(errors[place]))


def _renumbered(worst: Worst, numbers: list[int]) -> Worst:
    return Worst(worst.error, (numbers[worst.index[0]], *worst.index[1:]), worst.reference, worst.got)


def _worst(error: Float64 | UInt8, want: Float64 | UInt8, have: Float64 | UInt8) -> Worst:
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
