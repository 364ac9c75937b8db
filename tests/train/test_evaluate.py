"""Evaluation in PyTorch: every image counts, once; anomalous ones without a mask only for the image metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from qfae_runtime.metrics import Bootstrap
from qfae_train.autoencoder import AnomalyScorer, build
from qfae_train.data import Split, load_split
from qfae_train.evaluate import evaluate

from . import tiny


@pytest.fixture(scope="module")
def scorer(weights: Path) -> AnomalyScorer:
    torch.manual_seed(0)
    return build(tiny.config(weights))[0].eval()


@pytest.fixture(scope="module")
def seven(weights: Path, data: Path) -> Split:
    """Four anomalous images and three normal ones."""
    whole = load_split(data, "valid", tiny.config(weights).preprocess_spec(), quiet=True)
    chosen = torch.tensor([0, 1, 2, 3, 6, 7, 8])
    return Split(*(part[chosen] for part in (whole.images, whole.anomalous, whole.masks, whole.has_truth)))


def outputs(scorer: AnomalyScorer, split: Split) -> tuple[Tensor, Tensor]:
    result = scorer(split.rgb(slice(None)))
    return result.score, result.anomaly_map


def test_the_incomplete_last_batch_counts(scorer: AnomalyScorer, seven: Split) -> None:
    metrics = evaluate(scorer, seven, batch_size=4)
    scores, maps = outputs(scorer, seven)
    assert metrics.counts == {
        "good": 3,
        "ungood": 4,
        "images_with_pixel_truth": 7,
        "images_without_pixel_truth": 0,
        "anomalous_regions": 4,
    }
    torch.testing.assert_close(torch.from_numpy(metrics.scores), scores)
    assert metrics.image_auroc == pytest.approx(roc_auc_score(seven.anomalous, scores))
    assert metrics.image_ap == pytest.approx(average_precision_score(seven.anomalous, scores))
    assert metrics.pixel_auroc == pytest.approx(roc_auc_score(seven.masks.ravel(), maps.ravel()), abs=1e-3)
    assert metrics.pixel_ap == pytest.approx(average_precision_score(seven.masks.ravel(), maps.ravel()), abs=1e-3)
    # Without the last batch there are four anomalous images and nothing to hold them against.
    assert evaluate(scorer, part_of(seven, slice(4)), batch_size=4).image_auroc is None


def part_of(split: Split, part: slice) -> Split:
    return Split(split.images[part], split.anomalous[part], split.masks[part], split.has_truth[part])


def test_an_anomalous_image_without_a_mask_is_not_all_normal(scorer: AnomalyScorer, seven: Split) -> None:
    masks, has_truth = seven.masks.clone(), seven.has_truth.clone()
    masks[:2], has_truth[:2] = 0, False
    some = evaluate(scorer, replace(seven, masks=masks, has_truth=has_truth), batch_size=4)
    maps = outputs(scorer, seven)[1][2:]
    assert (some.counts["images_with_pixel_truth"], some.counts["images_without_pixel_truth"]) == (5, 2)
    assert some.notes == ("2 images without a usable mask are left out of the pixel metrics",)
    assert some.pixel_auroc == pytest.approx(roc_auc_score(masks[2:].ravel(), maps.ravel()), abs=1e-3)
    assert some.image_auroc == evaluate(scorer, seven, batch_size=4).image_auroc
    # With no mask at all there is nothing to say about pixels.
    none = evaluate(scorer, replace(seven, masks=masks * 0, has_truth=~seven.anomalous), batch_size=4)
    assert (none.pixel_auroc, none.pixel_ap, none.aupro_30) == (None, None, None)
    assert none.notes == (
        "pixel_auroc, pixel_ap and aupro_30 are undefined: no pixel of the 3 images with pixel truth is anomalous",
        "4 images without a usable mask are left out of the pixel metrics",
    )


def test_intervals_are_computed_on_request_only(scorer: AnomalyScorer, seven: Split) -> None:
    assert evaluate(scorer, seven, batch_size=4).intervals_95 == {}
    metrics = evaluate(scorer, seven, batch_size=4, bootstrap=Bootstrap(resamples=40, seed=2))
    for name, interval in metrics.intervals_95.items():
        assert interval is not None, name
        assert 0 <= interval[0] <= getattr(metrics, name) <= interval[1] <= 1
    values = metrics.to_dict()
    assert values["bootstrap"]["resamples"] == 40
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_the_mode_of_the_scorer_is_kept(scorer: AnomalyScorer, seven: Split) -> None:
    for training in (True, False):
        scorer.train(training)
        evaluate(scorer, seven, batch_size=7)
        assert scorer.training is training
