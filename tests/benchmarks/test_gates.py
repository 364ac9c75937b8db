from __future__ import annotations

import numpy as np
import pytest

from benchmarks.gate_catalogue import FAULTS
from benchmarks.gate_faults import Fault, at, greyed, weaken
from benchmarks.gates import Gates, share_table, shares_of
from qfae_export.images import from_checkpoint
from qfae_runtime.agreement import Agreement
from qfae_runtime.preprocess import PreprocessSpec
from tests.export.tiny import config_of, pictures, scorer_of


@pytest.fixture(scope="module")
def gates() -> Gates:
    spec = PreprocessSpec("resize", 32)
    own, others = (from_checkpoint(pictures(count), spec, "made up") for count in (32, 40))
    return Gates(scorer_of(config_of()), own.with_stress(), {"others": others})


def test_an_engine_without_a_fault_passes_and_does_no_harm(gates: Gates) -> None:
    verdict = gates.judge(Fault("none", "none"))
    assert not verdict.parity
    assert not verdict.self_test
    assert verdict.harm < 0.5


@pytest.mark.parametrize(
    ("fault", "by_self_test"),
    [
        (Fault("batch", "1 % off in batches of 8", after=at(8, weaken)), True),
        (Fault("batch", "1 % off in batches of 32", after=at(32, weaken)), False),  # no run at batch 16 meets one
        (Fault("colour", "strong colours made grey", before=lambda images: greyed(images, 60)), True),
        (
            Fault("range", "NaN where an image is black", after=lambda images, got, state: black_is_nan(images, got)),
            True,
        ),
    ],
)
def test_a_fault_is_refused(gates: Gates, fault: Fault, *, by_self_test: bool) -> None:
    verdict = gates.judge(fault)
    assert verdict.parity
    assert bool(verdict.self_test) == by_self_test


def black_is_nan(images: np.ndarray, got: object) -> None:
    weaken(got, ~images.any((1, 2, 3)), np.nan)  # type: ignore[arg-type]


def test_the_table_counts_by_kind(gates: Gates) -> None:
    verdicts = [gates.judge(Fault("batch", "", after=at(32, weaken))), gates.judge(Fault("none", ""))]
    assert share_table(verdicts)[2:] == ["| batch | 1 | 1 | 0 |", "| none | 1 | 0 | 0 |", "| all | 2 | 1 | 0 |"]


def test_shares_of_bounds() -> None:
    values = dict.fromkeys(shares_of(Agreement(1, None, {}, {})), 0.0)
    shares = shares_of(
        Agreement(1, None, {**values, "score_typical": 10.0, "spearman": 0.9995, "flips_beyond": 1.0}, {})
    )
    assert shares["score_typical"] == 2
    assert shares["spearman"] == pytest.approx(0.5)
    assert shares["flips_beyond"] == np.inf
    assert shares["map_typical"] == 0


def test_faults_have_names_of_their_own() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 100
