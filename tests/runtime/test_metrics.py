"""What is measured from one score per image, all of it together, and metrics.json."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from qfae_runtime.arrays import Float32, UInt8
from qfae_runtime.metrics import Bootstrap, PixelMetrics, measure
from qfae_runtime.writers.metrics import compute_metrics
from qfae_runtime.writers.records import Row, error_row, scored_row

FEW = Bootstrap(resamples=50)


def rows_of(scores: list[float], labels: list[str | None]) -> list[Row]:
    return [
        scored_row(str(n), None, np.float32(s), None, label)
        for n, (s, label) in enumerate(zip(scores, labels, strict=True))
    ]


def labelled(scores: list[float], anomalous: list[int]) -> tuple[np.typing.NDArray[np.float64], Any]:
    return np.array(scores), np.array(anomalous, dtype=np.bool_)


def maps_and_masks(images: int, seed: int = 0) -> tuple[Float32, UInt8]:
    rng = np.random.default_rng(seed)
    masks = np.zeros((images, 12, 12), np.uint8)
    masks[images // 2 :, 3:7, 4:9] = 1
    shift = rng.normal(1, 0.5, (images, 1, 1))
    return (np.exp(rng.normal(size=masks.shape) + shift * masks)).astype(np.float32), masks


def counted(maps: Float32, masks: UInt8, **options: bool) -> PixelMetrics:
    pixels = PixelMetrics(**options)
    for anomaly_map, mask in zip(maps, masks, strict=True):
        pixels.add(anomaly_map, mask)
    return pixels


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
        "masks_unusable": 0,
        "images_with_pixel_truth": 0,
        "images_without_pixel_truth": 0,
        "anomalous_regions": 0,
    }


def test_the_keys_of_metrics_json() -> None:
    maps, masks = maps_and_masks(8)
    rows = rows_of(maps.max(axis=(1, 2)).tolist(), [*["good"] * 4, *["Ungood"] * 4])
    metrics = compute_metrics(rows, counted(maps, masks), None)
    assert metrics is not None
    areas = ["image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro_30"]
    assert list(metrics) == [
        *("image_auroc", "image_ap"),
        *("pixel_auroc", "pixel_auroc_error_bound", "pixel_ap", "pixel_ap_error_bound"),
        *("aupro_30", "aupro_30_error_bound"),
        *("intervals_95", "bootstrap", "counts", "notes"),
    ]
    assert list(metrics["intervals_95"]) == areas
    for name in areas:
        low, high = metrics["intervals_95"][name]
        assert 0 <= low <= metrics[name] <= high <= 1, name
    assert metrics["bootstrap"] == {
        "resamples": 1000,
        "seed": 0,
        "method": "percentile, images drawn with replacement within each class",
    }
    assert metrics["counts"]["anomalous_regions"] == 4
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([], "no labelled image was scored"),
        (["good", "good"], "all 2 scored images are normal, and it takes both normal and anomalous ones"),
        (["Ungood"], "all 1 scored images are anomalous, and it takes both normal and anomalous ones"),
    ],
)
def test_one_class_alone_gives_null_and_a_note(labels: list[str | None], says: str) -> None:
    rows = [*rows_of([0.5] * len(labels), labels), error_row("x", None, "broken", "good")]
    metrics = compute_metrics(rows, PixelMetrics(), None)
    assert metrics is not None
    for name in ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro_30"):
        assert metrics[name] is None
        assert metrics["intervals_95"][name] is None
    assert metrics["notes"] == [
        f"image_auroc and image_ap are undefined: {says}",
        "pixel_auroc, pixel_ap and aupro_30 are undefined: no image has pixel truth; masks belong into label/ or "
        "anomaly_mask/ beside the images",
    ]


def test_no_labels_no_metrics() -> None:
    assert compute_metrics(rows_of([0.1], [None]), None, None) is None


def test_without_a_bootstrap_there_are_values_alone() -> None:
    maps, masks = maps_and_masks(8)
    scores, anomalous = labelled(maps.max(axis=(1, 2)).tolist(), [0] * 4 + [1] * 4)
    plain = measure(scores, anomalous, counted(maps, masks, keep_images=False))
    full = measure(scores, anomalous, counted(maps, masks), bootstrap=FEW)
    assert (plain.intervals_95, plain.bootstrap) == ({}, None)
    assert plain.to_dict()["bootstrap"] is None
    for name in ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro_30"):
        assert getattr(plain, name) == getattr(full, name)
    with pytest.raises(ValueError, match="the images were not kept; make PixelMetrics with keep_images=True"):
        measure(scores, anomalous, counted(maps, masks, keep_images=False), bootstrap=FEW)


def test_an_interval_that_is_a_point_is_no_assurance() -> None:
    metrics = measure(*labelled([1, 2, 3, 4], [0, 0, 1, 1]), bootstrap=FEW)
    assert metrics.intervals_95["image_auroc"] == (1.0, 1.0)
    assert metrics.notes == (
        "every resample gives the same image_auroc and image_ap: the interval is a point, and no assurance",
    )


def test_one_image_of_a_class_has_values_without_intervals() -> None:
    metrics = measure(*labelled([1, 2, 3], [0, 1, 0]), bootstrap=FEW)
    assert metrics.image_auroc == 0.5
    assert metrics.intervals_95["image_auroc"] is None
    assert metrics.notes == ("95 % intervals of image_auroc and image_ap need at least 2 images of each class",)


def test_images_without_pixel_truth_are_counted_and_left_out() -> None:
    maps, masks = maps_and_masks(8)
    scores, anomalous = labelled(maps.max(axis=(1, 2)).tolist(), [0] * 4 + [1] * 4)
    whole = measure(scores, anomalous, counted(maps, masks))
    pixels = counted(maps, masks)
    for anomaly_map in maps[:3]:
        pixels.add(anomaly_map, None)
    metrics = measure(scores, anomalous, pixels)
    assert metrics.pixel_auroc == whole.pixel_auroc
    assert (metrics.counts["images_with_pixel_truth"], metrics.counts["images_without_pixel_truth"]) == (8, 3)
    assert metrics.notes == ("3 images without a usable mask are left out of the pixel metrics",)


def test_a_score_without_a_label_is_refused() -> None:
    with pytest.raises(ValueError, match=r"anomalous: got the shape \(1,\), expected that of the scores, \(2,\)"):
        measure(np.zeros(2), np.zeros(1, dtype=np.bool_))
