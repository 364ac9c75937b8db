"""The bootstrap over images: its draws, and intervals of known distributions."""

from __future__ import annotations

from math import erf, sqrt

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from qfae_runtime.arrays import Bool
from qfae_runtime.metrics import Bootstrap, measure
from qfae_runtime.metrics.bootstrap import classes_of, interval_of, resample
from qfae_runtime.metrics.curves import auroc, average_precision

Scores = npt.NDArray[np.float64]


def binormal(normal: int, anomalous: int, shift: float, seed: int) -> tuple[Scores, Bool]:
    """Scores N(0, 1) and N(shift, 1); their true AUROC is the normal distribution's Phi(shift / sqrt(2))."""
    labels = np.arange(normal + anomalous) >= normal
    return np.random.default_rng(seed).normal(size=len(labels)) + shift * labels, labels


def delong_error(scores: Scores, labels: Bool) -> float:
    """The standard error of an AUROC after DeLong, DeLong and Clarke-Pearson (1988)."""
    wins = (scores[labels][:, None] > scores[~labels]) + 0.5 * (scores[labels][:, None] == scores[~labels])
    return float(sqrt(sum(wins.mean(axis=axis).var(ddof=1) / wins.shape[1 - axis] for axis in (0, 1))))


@pytest.mark.parametrize(("normal", "anomalous", "shift"), [(100, 100, 1.9), (640, 3075, 2.2), (60, 300, 0.5)])
def test_interval_of_a_known_distribution(normal: int, anomalous: int, shift: float) -> None:
    scores, labels = binormal(normal, anomalous, shift, seed=1)
    interval = measure(scores, labels, bootstrap=Bootstrap()).intervals_95["image_auroc"]
    assert interval is not None
    low, high = interval
    assert low < (1 + erf(shift / 2)) / 2 < high
    assert (high - low) / (2 * 1.96) == pytest.approx(delong_error(scores, labels), rel=0.20)


def test_most_intervals_hold_the_true_value() -> None:
    held = 0
    for seed in range(60):
        interval = measure(*binormal(50, 50, 1.0, seed), bootstrap=Bootstrap(200)).intervals_95["image_auroc"]
        assert interval is not None
        held += interval[0] < (1 + erf(0.5)) / 2 < interval[1]
    assert held >= 51  # of 60 at 95 %, fewer than that happen once in a hundred thousand


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    scores, labels = binormal(40, 80, 1.0, seed=3)
    scores = np.round(scores, 1)  # with ties
    intervals = measure(scores, labels, bootstrap=Bootstrap()).intervals_95
    rng = np.random.default_rng(17)
    found = []
    for _ in range(1000):
        drawn = np.concatenate([rng.integers(0, 40, 40), rng.integers(40, 120, 80)])
        found.append(
            (roc_auc_score(labels[drawn], scores[drawn]), average_precision_score(labels[drawn], scores[drawn]))
        )
    for name, values in zip(("image_auroc", "image_ap"), zip(*found, strict=True), strict=True):
        low, high = np.quantile(values, (0.025, 0.975))
        assert intervals[name] == pytest.approx((low, high), abs=0.12 * (high - low))


def test_areas_of_a_resample_are_those_of_the_drawn_images() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 9, 30), rng.integers(0, 2, 30)
    drawn = rng.integers(0, 30, (4, 30))
    histograms = np.zeros((2, 4, 9))
    for row, images in enumerate(drawn):
        np.add.at(histograms, (labels[images], row, scores[images]), 1)
    for function, reference in ((auroc, roc_auc_score), (average_precision, average_precision_score)):
        expected = [reference(labels[images], scores[images]) for images in drawn]
        np.testing.assert_allclose(function(*histograms), expected, rtol=1e-12)


def test_neither_the_order_of_the_images_nor_ties_matter() -> None:
    scores, labels = binormal(30, 50, 1.0, seed=4)
    scores = np.round(scores, 1)
    order = np.random.default_rng(1).permutation(len(scores))
    one = measure(scores, labels, bootstrap=Bootstrap(100))
    other = measure(scores[order], labels[order], bootstrap=Bootstrap(100))
    assert one.intervals_95 == other.intervals_95


def test_the_interval_holds_95_of_100_resamples() -> None:
    values = np.append(np.arange(1001) / 1000, np.nan)
    assert interval_of(values) == pytest.approx((0.025, 0.975))


def test_the_seed_decides() -> None:
    case = binormal(30, 50, 1.0, seed=4)
    one, again, other = (measure(*case, bootstrap=Bootstrap(100, seed)).intervals_95 for seed in (0, 0, 1))
    assert one == again
    assert one["image_auroc"] != other["image_auroc"]


def test_draws_stay_within_their_class_and_do_not_depend_on_blocks() -> None:
    labels = np.array([True, False, False, True, False, False, True])
    classes = classes_of(labels, np.array([6, 5, 4, 3, 2, 1, 0]))
    assert [members.tolist() for members in classes] == [[6, 3, 0], [5, 4, 2, 1]]
    whole = np.concatenate(list(resample(classes, Bootstrap(200), 10**6)))
    blocks = list(resample(classes, Bootstrap(200), 21))
    assert {len(block) for block in blocks} == {3, 2}
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert whole.shape == (200, 7)
    assert (whole[:, labels].sum(axis=1) == 3).all()
    assert (whole[:, ~labels].sum(axis=1) == 4).all()
    assert whole.mean(axis=0) == pytest.approx(np.ones(7), abs=0.25)
