from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from qfae_runtime.writers.metrics import PixelRoc, compute_metrics
from qfae_runtime.writers.records import Row, error_row, scored_row


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 3), st.sampled_from([1e-6, 1.0, 1e6]), st.booleans())
def test_pixel_auroc_lies_within_its_bound_of_scikit_learn(seed: int, shift: float, unit: float, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    truth = (rng.uniform(size=(4, 16, 16)) < 0.2).astype(np.uint8)
    truth[0, 0, :2] = 0, 1
    maps = (rng.normal(size=truth.shape) + shift * truth) * unit
    maps = (np.round(maps / unit, 1) * unit if ties else maps).astype(np.float32)
    roc = PixelRoc()
    for one_map, one_truth in zip(maps, truth, strict=True):
        roc.add(one_map, one_truth)
    auroc, bound = roc.result()
    assert auroc is not None
    assert bound is not None
    assert abs(auroc - float(roc_auc_score(truth.ravel(), maps.ravel()))) <= bound + 1e-9
    assert ties or bound < 1e-3


def test_pixel_auroc_order_of_signs_and_zeros() -> None:
    roc = PixelRoc()
    values = np.array([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0], np.float32)
    roc.add(values, np.array([0, 0, 0, 1, 1, 1], np.uint8))
    auroc, _ = roc.result()
    assert auroc == pytest.approx(roc_auc_score([0, 0, 0, 1, 1, 1], values))


def test_pixel_auroc_of_one_class_is_unknown() -> None:
    roc = PixelRoc()
    assert roc.result() == (None, None)
    roc.add(np.ones((4, 4), np.float32), np.zeros((4, 4), np.uint8))
    assert roc.result() == (None, None)


def rows_of(scores: list[float], labels: list[str | None]) -> list[Row]:
    return [
        scored_row(str(n), None, np.float32(s), None, label)
        for n, (s, label) in enumerate(zip(scores, labels, strict=True))
    ]


def test_image_metrics_are_those_of_scikit_learn() -> None:
    scores = [0.1, 0.4, 0.35, 0.8]
    rows = [*rows_of(scores, ["good", "good", "Ungood", "Ungood"]), error_row("x", None, "broken", "good")]
    rows += rows_of([9.0], [None])
    metrics = compute_metrics(rows, None, "because")
    assert metrics is not None
    assert metrics["image_auroc"] == pytest.approx(roc_auc_score([0, 0, 1, 1], scores))
    assert metrics["image_ap"] == pytest.approx(average_precision_score([0, 0, 1, 1], scores))
    assert metrics["pixel_auroc"] is None
    assert metrics["notes"] == ["because"]
    assert metrics["counts"] == {
        "good": 2,
        "ungood": 2,
        "labelled_but_not_scored": 1,
        "images_with_pixel_truth": 0,
    }


def test_one_class_alone_gives_null_and_a_note() -> None:
    metrics = compute_metrics(rows_of([0.1, 0.2], ["good", "good"]), PixelRoc(), None)
    assert metrics is not None
    assert (metrics["image_auroc"], metrics["image_ap"], metrics["pixel_auroc"]) == (None, None, None)
    assert len(metrics["notes"]) == 2


def test_no_labels_no_metrics() -> None:
    assert compute_metrics(rows_of([0.1], [None]), None, None) is None
