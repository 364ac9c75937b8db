from __future__ import annotations

import numpy as np
import pytest

from qfae_runtime.contract import Contract, compare, worst_of
from qfae_runtime.engines.base import Scores


def scores(batch: int = 2, size: int = 4) -> Scores:
    rng = np.random.default_rng(1)
    anomaly_map = rng.uniform(0.01, 0.5, (batch, size, size)).astype(np.float32)
    reconstruction = rng.integers(10, 240, (batch, size, size, 3), dtype=np.uint8)
    return Scores(anomaly_map.max(axis=(1, 2)), anomaly_map, reconstruction)


def changed(reference: Scores, name: str, index: tuple[int, ...], value: float) -> Scores:
    array = getattr(reference, name).copy()
    array[index] = value
    return reference._replace(**{name: array})


def test_equal_outputs_pass() -> None:
    comparison = compare(scores(), scores())
    assert comparison
    assert comparison.failures() == []
    assert comparison.outputs["score"].max_abs == 0
    assert comparison.outputs["reconstruction"].max_rel is None


def test_one_pixel_off_is_found_and_named() -> None:
    reference = scores()
    value = float(reference.anomaly_map[1, 2, 3])
    comparison = compare(reference, changed(reference, "anomaly_map", (1, 2, 3), value + 0.01))
    assert not comparison
    assert len(comparison.failures()) == 2
    assert comparison.failures()[0].startswith(
        "anomaly_map: absolute error 0.01 exceeds 0.0001 at image 1, y 2, x 3: expected "
    )
    assert comparison.outputs["score"]


def test_relative_bound_bites_where_the_absolute_one_does_not() -> None:
    reference = changed(scores(), "anomaly_map", (0, 0, 0), 0.01)
    comparison = compare(reference, changed(reference, "anomaly_map", (0, 0, 0), 0.01005))
    assert [sentence.split(" exceeds")[0] for sentence in comparison.failures()] == [
        "anomaly_map: relative error 0.005"
    ]


def test_relative_bound_leaves_tiny_values_alone() -> None:
    reference = changed(scores(), "anomaly_map", (0, 0, 0), 0.0009)
    assert compare(reference, changed(reference, "anomaly_map", (0, 0, 0), 0.00095))


def test_reconstruction_may_be_one_level_off_but_not_two() -> None:
    reference = scores()
    level = int(reference.reconstruction[0, 1, 2, 0])
    assert compare(reference, changed(reference, "reconstruction", (0, 1, 2, 0), level + 1))
    worse = compare(reference, changed(reference, "reconstruction", (0, 1, 2, 0), level - 2))
    assert worse.failures() == [
        f"reconstruction: absolute error 2 exceeds 1 at image 0, y 1, x 2, channel 0: expected {level}, got {level - 2}"
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_fail_on_either_side(value: float) -> None:
    odd = changed(scores(), "score", (1,), value)
    assert compare(scores(), odd).failures() == [
        "score: the engine has 1 values that are not finite, the first at index (1,)"
    ]
    assert compare(odd, scores()).failures()[0].startswith("score: the reference has 1")
    assert not compare(odd, odd)


def test_shapes_and_emptiness_fail() -> None:
    assert compare(scores(2), scores(3)).failures()[0] == "score: expected shape (2,), got (3,)"
    some = scores()
    empty = Scores(some.score[:0], some.anomaly_map[:0], some.reconstruction[:0])
    assert compare(empty, empty).failures()[0] == "score: nothing to compare: the batch is empty"


def test_contract_can_be_wider() -> None:
    reference = scores()
    got = reference._replace(score=reference.score + np.float32(0.001))
    assert not compare(reference, got)
    assert compare(reference, got, Contract(abs=0.01, rel=0.1))


def test_worst_of_keeps_the_worst() -> None:
    reference = scores()
    bad = compare(reference, changed(reference, "anomaly_map", (0, 1, 1), 0.9))
    merged = worst_of([compare(reference, reference), bad])
    assert not merged
    assert merged.failures() == bad.failures()
    assert merged.outputs["score"].elements == 4
    with pytest.raises(ValueError, match="no comparison was given"):
        worst_of([])
