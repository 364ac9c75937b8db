"""The conformal guarantee itself, and its numbers against countings that share no code with it."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qfae_runtime import conformal


@pytest.mark.parametrize(("fpr", "least"), [(0.05, 19), (0.1, 9), (0.01, 99), (0.5, 1), (0.3, 3), (0.001, 999)])
def test_the_least_number_of_images(fpr: float, least: int) -> None:
    assert conformal.least_images(fpr) == least
    assert conformal.rank_of_threshold(least, fpr) == least  # the largest score
    assert conformal.rank_of_threshold(least - 1, fpr) == least  # beyond the scores
    with pytest.raises(ValueError, match=rf"^{least - 1} scores give no threshold for {fpr}; {least} are needed$"):
        conformal.threshold_of(np.zeros(least - 1), fpr)


def test_the_rate_is_kept_over_all_orders() -> None:
    """Of every order of 6 scores, take the last for the new one: at most the promised share exceeds the threshold."""
    for values in ((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (1.0, 1.0, 2.0, 3.0, 3.0, 3.0)):
        orders = list(itertools.permutations(values))
        for fpr in (0.2, 0.25, 0.4, 0.5, 0.9):
            above = sum(order[-1] > conformal.threshold_of(np.array(order[:-1]), fpr) for order in orders)
            p_small = sum(conformal.p_value(np.sort(order[:-1]), order[-1]) <= fpr for order in orders)
            assert above == p_small
            assert Fraction(above, len(orders)) <= Fraction(str(fpr))
    distinct = list(itertools.permutations(range(6)))
    above = sum(order[-1] > conformal.threshold_of(np.array(order[:-1], float), 0.5) for order in distinct)
    assert Fraction(above, len(distinct)) == Fraction(1, 2)  # without ties it is used up: the bound is not idle


@given(
    st.lists(st.integers(0, 12), min_size=19, max_size=60),
    st.integers(-1, 13),
    st.sampled_from([0.05, 0.1, 0.2, 0.35]),
)
def test_threshold_and_p_value_say_the_same(scores: list[int], new: int, fpr: float) -> None:
    values = np.array(sorted(scores), dtype=np.float64)
    p = conformal.p_value(values, new)
    assert p == (1 + sum(score >= new for score in scores)) / (len(scores) + 1)
    at_most = Fraction(1 + sum(score >= new for score in scores), len(scores) + 1) <= Fraction(str(fpr))
    assert (new > conformal.threshold_of(values, fpr)) == at_most


def test_the_interval_of_the_true_rate_is_what_a_simulation_finds() -> None:
    rng = np.random.default_rng(5)
    # Uniform scores: the true rate of a threshold t is 1 - t.
    rates = [1 - conformal.threshold_of(rng.uniform(size=60), 0.1) for _ in range(4000)]
    low, high = conformal.rate_interval(60, 0.1)
    assert np.quantile(rates, [0.025, 0.975]) == pytest.approx([low, high], rel=0.08)
    assert np.mean(rates) <= 0.1 + 0.002
