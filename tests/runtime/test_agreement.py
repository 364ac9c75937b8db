"""Every quantity against a value computed otherwise, and every way of not being comparable."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from qfae_runtime.agreement import QUANTITIES, Scale, measure_agreement
from qfae_runtime.engines.base import Scores


def scores(batch: int = 12, size: int = 4, seed: int = 1) -> Scores:
    rng = np.random.default_rng(seed)
    anomaly_map = rng.uniform(0.01, 0.5, (batch, size, size)).astype(np.float32)
    anomaly_map *= np.linspace(0.2, 2, batch, dtype=np.float32)[:, None, None]
    reconstruction = rng.integers(10, 240, (batch, size, size, 3), dtype=np.uint8)
    return Scores(anomaly_map.max(axis=(1, 2)), anomaly_map, reconstruction)


def noisy(reference: Scores, noise: float, seed: int = 2) -> Scores:
    rng = np.random.default_rng(seed)
    return Scores(
        (reference.score + rng.normal(0, noise, reference.score.shape)).astype(np.float32),
        (reference.anomaly_map + rng.normal(0, noise, reference.anomaly_map.shape)).astype(np.float32),
        np.clip(reference.reconstruction + rng.integers(-3, 4, reference.reconstruction.shape), 0, 255).astype(
            np.uint8
        ),
    )


def changed(reference: Scores, name: str, index: tuple[int, ...], value: float) -> Scores:
    array = getattr(reference, name).copy()
    array[index] = value
    return reference._replace(**{name: array})


def test_equal_outputs() -> None:
    values = measure_agreement(scores(), scores()).values
    assert list(values) == list(QUANTITIES)
    assert values["auroc_change"] is None  # nobody said which are anomalous
    for name, quantity in QUANTITIES.items():
        if name != "auroc_change":
            assert values[name] == pytest.approx(1.0 if quantity.larger_is_better else 0.0, abs=1e-12)


def test_every_quantity_against_another_computation() -> None:
    want, got = scores(), noisy(scores(), 0.03)
    labels = [number % 2 == 0 for number in range(12)]
    values = measure_agreement(want, got, labels).values
    error = np.abs(got.score.astype(float) - want.score.astype(float))
    map_error = np.abs(got.anomaly_map.astype(float) - want.anomaly_map.astype(float))
    levels = np.abs(got.reconstruction.astype(float) - want.reconstruction.astype(float))
    iqr = np.percentile(want.score.astype(float), 75) - np.percentile(want.score.astype(float), 25)
    cosines = [
        np.dot(a.ravel(), b.ravel()) / np.sqrt(np.dot(a.ravel(), a.ravel()) * np.dot(b.ravel(), b.ravel()))
        for a, b in zip(want.anomaly_map.astype(float), got.anomaly_map.astype(float), strict=True)
    ]
    normal = want.score.astype(float)[1::2]
    threshold = np.percentile(normal, 95)
    flipped = (want.score >= threshold) != (got.score >= threshold)
    expected = {
        "score_abs": error.max(),
        "score_rel": (error / want.score).max(),
        "score_p999": np.percentile(error, 99.9),
        "score_median": np.percentile(error, 50) / iqr,
        "score_iqr": np.percentile(error, 99.9) / iqr,
        "spearman": spearmanr(want.score, got.score).statistic,
        "flips": flipped.sum(),
        "flips_share": flipped.mean(),
        "flips_beyond": (flipped & (np.abs(want.score - threshold) > np.percentile(error, 99.9))).sum(),
        "auroc_change": abs(roc_auc_score(labels, want.score) - roc_auc_score(labels, got.score)),
        "map_abs": map_error.max(),
        "map_rel": (map_error / want.anomaly_map)[want.anomaly_map > 1e-3].max(),
        "map_p999": np.percentile(map_error, 99.9),
        "map_share": np.percentile(map_error, 99.9) / np.percentile(want.anomaly_map, 99.9),
        "map_pixel": (map_error / np.maximum(want.anomaly_map, np.percentile(want.anomaly_map, 99.9))).max(),
        "map_cosine_p1": np.percentile(cosines, 1),
        "map_cosine_min": min(cosines),
        "reconstruction_levels": levels.max(),
        "reconstruction_p999": np.percentile(levels, 99.9),
    }
    assert values == pytest.approx(expected, rel=1e-5)


def test_ranks_of_equal_scores() -> None:
    want, got = scores(), noisy(scores(), 0.03)
    want, got = (one._replace(score=np.round(one.score, 1)) for one in (want, got))
    assert len(np.unique(want.score)) < 12
    measured = measure_agreement(want, got).values["spearman"]
    assert measured == pytest.approx(spearmanr(want.score, got.score).statistic)


def test_a_flip_is_seen_and_near_ones_are_told_from_far_ones() -> None:
    reference = scores()
    scale = Scale.of(reference, threshold=float(reference.score[3]) - 1e-4)
    near = changed(reference, "score", (3,), float(reference.score[3]) - 2e-4)
    values = measure_agreement(reference, near, scale=scale).values
    assert (values["flips"], values["flips_beyond"]) == (1.0, 0.0)
    # Its own error is the largest of all; only an error above the 99.9th percentile can flip a decision from afar.
    many = reference.of([number for number in range(12) for _ in range(200)])
    far = changed(many, "score", (5,), float(scale.threshold) - 0.1 if many.score[5] >= scale.threshold else 9.0)
    values = measure_agreement(many, far, scale=scale).values
    assert (values["flips"], values["flips_beyond"]) == (1.0, 1.0)


def test_the_scale_is_the_references_or_a_larger_measurements() -> None:
    whole = scores(40)
    scale = Scale.of(whole)
    assert scale.threshold == pytest.approx(np.percentile(whole.score, 95))
    assert scale.threshold_from == "95th percentile of the 40 images' scores"
    part, got = whole.of([3, 4]), noisy(whole, 0.01).of([3, 4])
    values = measure_agreement(part, got, scale=scale).values
    assert values["score_p999"] is not None
    assert values["score_iqr"] == pytest.approx(values["score_p999"] / scale.score_iqr)
    labelled = Scale.of(whole, [None, True, *[False] * 38])
    assert labelled.threshold_from == "95th percentile of the 38 normal images' scores"
    assert Scale.of(whole, threshold=0.5) == Scale(scale.score_iqr, scale.map_p999, 0.5, "calibrated")


def test_where_the_worst_is() -> None:
    reference = scores()
    value = float(reference.anomaly_map[1, 2, 3])
    worst = measure_agreement(reference, changed(reference, "anomaly_map", (1, 2, 3), value + 0.01)).worst["map_abs"]
    assert worst.index == (1, 2, 3)
    assert (worst.error, worst.reference, worst.got) == pytest.approx((0.01, value, value + 0.01), rel=1e-4)


def test_relative_errors_of_tiny_values_do_not_count() -> None:
    reference = changed(scores(), "anomaly_map", (0, 0, 0), 0.0009)
    values = measure_agreement(reference, changed(reference, "anomaly_map", (0, 0, 0), 0.00095)).values
    assert values["map_rel"] == 0


def test_scores_that_do_not_differ_leave_quantities_undefined() -> None:
    same = scores()._replace(score=np.full(12, 0.5, np.float32))
    values = measure_agreement(same, changed(same, "score", (0,), 0.6)).values
    assert (values["score_iqr"], values["spearman"]) == (None, None)
    assert measure_agreement(same, same).values["spearman"] == 1.0
    black = scores()._replace(anomaly_map=np.zeros((12, 4, 4), np.float32))
    values = measure_agreement(black, changed(black, "anomaly_map", (0, 0, 0), 0.1)).values
    assert values["map_cosine_min"] == 0.0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_a_fault_on_either_side(value: float) -> None:
    odd = changed(scores(), "score", (1,), value)
    assert measure_agreement(scores(), odd).fault == (
        "score: the engine has 1 values that are not finite, the first at index (1,)"
    )
    assert str(measure_agreement(odd, scores()).fault).startswith("score: the reference has 1")
    assert measure_agreement(odd, odd).fault is not None


def test_shapes_types_and_emptiness_are_faults() -> None:
    assert measure_agreement(scores(2), scores(3)).fault == "score: expected shape (2,), got (3,)"
    empty = scores().of([])
    assert measure_agreement(empty, empty).fault == "score: nothing to compare: the batch is empty"
    floats = scores()._replace(reconstruction=scores().reconstruction.astype(np.float32))
    assert measure_agreement(scores(), floats).fault == "reconstruction: expected uint8, got float32"
