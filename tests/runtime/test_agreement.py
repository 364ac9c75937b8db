"""Every quantity against a value computed otherwise, and every way of not being comparable."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from qfae_runtime.agreement import Reference, Scale, measure_agreement
from qfae_runtime.engines.base import Scores
from qfae_runtime.quantities import LEAST_DISTANCE, QUANTITIES
from qfae_runtime.yardstick import Yardstick

from .tiny import yardstick_of


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


OWN = ("score_typical", "score_worst", "map_typical", "map_worst", "map_pixel")
OWN_OF_PIXELS = ("reconstruction_typical", "reconstruction_worst")


def test_equal_outputs() -> None:
    values = measure_agreement(scores(), scores()).values
    assert list(values) == list(QUANTITIES)
    undefined = {name for name, value in values.items() if value is None}
    # Nobody said which are anomalous, nor what PyTorch's own error is.
    assert undefined == {"auroc_change", "flips_beyond", *OWN, *OWN_OF_PIXELS}
    for name in set(values) - undefined:
        assert values[name] == pytest.approx(1.0 if QUANTITIES[name].larger_is_better else 0.0, abs=1e-12)


def test_every_quantity_against_another_computation() -> None:
    want, got = scores(), noisy(scores(), 0.03)
    labels = [number % 2 == 0 for number in range(12)]
    stress, factors = [3, 8], 3
    real = [number for number in range(12) if number not in stress]
    yardstick = yardstick_of(want)
    scale = Scale.of(want.of(real), [labels[number] for number in real], factors=factors)
    values = Reference(want, scale, yardstick, tuple(stress)).compare(got, labels).values
    every = [one.astype(float) for one in (want.score, got.score, want.anomaly_map, got.anomaly_map)]
    own_errors = [
        np.abs(every[1] - every[0]),
        np.sqrt(((every[3] - every[2]) ** 2).mean((1, 2))),
        np.abs(every[3] - every[2]).max((1, 2)),
        (got.reconstruction != want.reconstruction).mean((1, 2, 3)),
    ]
    # The step of float32 under the largest value of a map, and one value of a reconstruction.
    steps = [every[2].max((1, 2)) * 2.0**-24 + 1e-12] * 3 + [np.full(12, 1 / 48)]
    typical, largest = [], []
    for column, (one, step) in enumerate(zip(own_errors, steps, strict=True)):
        own = yardstick.own[:, column]
        ratios = (one + step) / (own + step)
        means = [np.prod(ratios[kind]) ** (1 / len(kind)) for kind in (real, stress)]
        typical.append(max(means))
        largest.append((one / np.maximum(own, step)).max())
    all_levels = np.abs(got.reconstruction.astype(float) - want.reconstruction.astype(float))
    roots = [np.cbrt(np.maximum(one, 0)) for one in every]
    angles = np.sqrt(((np.sqrt(2 * roots[3]) - np.sqrt(2 * roots[2])) ** 2).mean((1, 2)))
    moved = np.abs(roots[1] - roots[0])
    all_error, all_maps = own_errors[0], np.abs(every[3] - every[2])
    want, got, labels = want.of(real), got.of(real), [labels[number] for number in real]
    error = np.abs(got.score.astype(float) - want.score.astype(float))
    levels = np.abs(got.reconstruction.astype(float) - want.reconstruction.astype(float))
    iqr = np.percentile(want.score.astype(float), 75) - np.percentile(want.score.astype(float), 25)
    all_cosines = [
        np.dot(a.ravel(), b.ravel()) / np.sqrt(np.dot(a.ravel(), a.ravel()) * np.dot(b.ravel(), b.ravel()))
        for a, b in zip(every[2], every[3], strict=True)
    ]
    cosines = [all_cosines[number] for number in real]
    normal = want.score.astype(float)[[not label for label in labels]]
    threshold = np.percentile(normal, 95)
    flipped = (want.score > threshold) != (got.score > threshold)
    expected = {
        "score_typical": typical[0],
        "score_worst": largest[0],
        "score_abs": all_error.max(),
        "score_p999": np.percentile(error, 99.9),
        "score_iqr": np.percentile(error, 99.9) / iqr,
        "score_distance": moved[real].mean(),
        "score_distance_max": moved[real].max(),
        "spearman": spearmanr(want.score, got.score).statistic,
        "flips": flipped.sum(),
        "flips_share": flipped.mean(),
        "flips_beyond": (flipped & (np.abs(want.score - threshold) > 30 * yardstick.unit[real, 0])).sum(),
        "auroc_change": abs(roc_auc_score(labels, want.score) - roc_auc_score(labels, got.score)),
        "map_typical": typical[1],
        "map_worst": largest[1],
        "map_pixel": largest[2],
        "map_abs": all_maps.max(),
        "map_angle": angles[real].mean(),
        "map_angle_max": angles[real].max(),
        "map_cosine_p1": np.percentile(cosines, 1),
        "map_cosine_min": min(cosines),
        "reconstruction_typical": typical[3],
        "reconstruction_worst": largest[3],
        "reconstruction_levels": all_levels.max(),
        "reconstruction_p999": np.percentile(levels, 99.9),
        "stress_distance": moved[stress].max(),
        "stress_share": (moved / np.maximum(roots[0], LEAST_DISTANCE))[stress].max(),
        "stress_angle": angles[stress].max(),
        "stress_cosine": min(all_cosines[number] for number in stress),
        "stress_reconstruction": all_levels[stress].mean((1, 2, 3)).max(),
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
    own = np.full((12, 4), 1e-4)
    values = measure_agreement(reference, near, scale=scale, yardstick=Yardstick(own, own)).values
    assert (values["flips"], values["flips_beyond"]) == (1.0, 0.0)
    own = own / 40  # the score is as far from the threshold as forty times that
    values = measure_agreement(reference, near, scale=scale, yardstick=Yardstick(own, own)).values
    assert (values["flips"], values["flips_beyond"]) == (1.0, 1.0)
    assert measure_agreement(reference, near, scale=scale).values["flips_beyond"] is None


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
    assert Scale.of(whole, threshold=0.5) == Scale(scale.score_iqr, 0.5, "calibrated")


def test_where_the_worst_is() -> None:
    reference = scores()
    value = float(reference.anomaly_map[1, 2, 3])
    worst = measure_agreement(reference, changed(reference, "anomaly_map", (1, 2, 3), value + 0.01)).worst["map_abs"]
    assert worst.index == (1, 2, 3)
    assert (worst.error, worst.reference, worst.got) == pytest.approx((0.01, value, value + 0.01), rel=1e-4)


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


def test_pytorchs_own_error_is_the_rms_of_its_forms_and_never_below_what_is_usual() -> None:
    truth = scores(6)
    heights = np.stack(
        [
            truth.score.astype(float),
            np.sqrt((truth.anomaly_map.astype(float) ** 2).mean((1, 2))),
            truth.anomaly_map.astype(float).max((1, 2)),
            np.ones(6),
        ],
        axis=1,
    )
    shares = np.array([1.0, 2.0, 3.0, 40.0])[:, None]
    exact, groups = [0, 1, 2, 5], [0, 0, 0, 0, 0, 1]
    forms = [np.sqrt(2) * 1e-6 * shares * heights[exact], np.zeros((4, 4))]
    found = Yardstick.measured(truth, forms, exact, groups)
    own = 1e-6 * shares * heights[exact]
    np.testing.assert_allclose(found.own[exact], own)
    assert found.known.tolist() == [True, True, True, False, False, True]
    # Of group 0 the median share is 2 millionths and the largest 3, of group 1 it is its only one.
    np.testing.assert_allclose(found.unit[:3], np.maximum(own[:3], 2e-6 * heights[:3]))
    np.testing.assert_allclose(found.unit[3:5], 3e-6 * heights[3:5])
    np.testing.assert_allclose(found.unit[5], own[3])
    others = scores(3, seed=9)
    guessed = Yardstick.estimated(others, [0, 0, 1], found, truth, groups)
    np.testing.assert_allclose(guessed.unit[0, 0], 3e-6 * float(others.score[0]), rtol=1e-6)
    np.testing.assert_allclose(guessed.unit[2, 0], 4e-5 * float(others.score[2]), rtol=1e-6)
    assert not guessed.known.any()


def test_a_group_of_which_nothing_was_measured_has_what_is_usual_of_all() -> None:
    truth = scores(4)
    found = Yardstick.measured(truth, [np.full((2, 4), 1e-6)], [0, 1], [0, 0, 1, 1])
    expected = np.max(1e-6 / truth.score[:2].astype(float)) * truth.score[2:].astype(float)
    np.testing.assert_allclose(found.unit[2:, 0], expected)


def test_a_reference_of_some_images_keeps_what_belongs_to_them() -> None:
    whole = Reference(scores(), Scale.of(scores()), yardstick_of(scores()), (10, 11))
    some = whole.of([11, 2, 11])
    np.testing.assert_array_equal(some.scores.score, scores().score[[11, 2, 11]])
    assert some.yardstick is not None
    np.testing.assert_array_equal(some.yardstick.unit, yardstick_of(scores()).unit[[11, 2, 11]])
    assert (some.stress, some.scale, len(some)) == ((0, 2), whole.scale, 3)


def test_where_the_worst_in_pytorchs_own_error_is() -> None:
    """An error of a millionth on the image with the lowest score is worse than a larger one on the highest."""
    reference = scores()
    maps = reference.anomaly_map.copy()
    maps[0, 2, 3] += 1e-4
    maps[11, 1, 1] += 3e-4
    got = reference._replace(anomaly_map=maps)
    agreement = measure_agreement(reference, got, yardstick=yardstick_of(reference))
    assert agreement.worst["map_pixel"].index == (0, 2, 3)
    assert agreement.worst["map_pixel"].error == agreement.values["map_pixel"]
    assert agreement.worst["map_abs"].index == (11, 1, 1)
