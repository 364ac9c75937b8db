"""Pixel metrics: against scikit-learn on all pixels, against AUPRO written plainly, and their intervals."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from qfae_runtime.arrays import Float32, UInt8
from qfae_runtime.metrics import Bootstrap, PixelMetrics
from qfae_runtime.metrics.curves import aupro
from qfae_runtime.metrics.per_image import ImageHistograms, Keys

NAMES = ("pixel_auroc", "pixel_ap", "aupro_30")


def counted(maps: npt.ArrayLike, masks: npt.ArrayLike, *, keep_images: bool = False) -> PixelMetrics:
    pixels = PixelMetrics(keep_images=keep_images)
    for anomaly_map, mask in zip(np.array(maps, np.float32), np.array(masks, np.uint8), strict=True):
        pixels.add(anomaly_map, mask)
    return pixels


def plain_aupro(maps: Float32, masks: UInt8, limit: float = 0.30) -> float:
    """Integrate the mean overlap threshold by threshold, every region by itself."""
    regions = []
    for number, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [maps[number][labels == label] for label in range(1, count + 1)]
    normal = maps[masks == 0]
    area = 0.0
    before = 0.0, 0.0
    for threshold in np.unique(maps)[::-1]:
        rate = float(np.mean(normal >= threshold))
        overlap = float(np.mean([np.mean(region >= threshold) for region in regions]))
        if rate > limit:
            at_limit = before[1] + (overlap - before[1]) * (limit - before[0]) / (rate - before[0])
            area += (limit - before[0]) * (before[1] + at_limit) / 2
            break
        area += (rate - before[0]) * (before[1] + overlap) / 2
        before = rate, overlap
    return area / limit


def random_case(seed: int, shift: float, unit: float, ties: bool) -> tuple[Float32, UInt8]:
    rng = np.random.default_rng(seed)
    masks = (ndimage.gaussian_filter(rng.normal(size=(5, 20, 20)), (0, 1.5, 1.5)) > 0.2).astype(np.uint8)
    masks[0] = 0
    maps = rng.normal(size=masks.shape) + shift * masks
    return ((np.round(maps, 1) if ties else maps) * unit).astype(np.float32), masks


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 3), st.sampled_from([1e-6, 1.0, 1e6]), st.booleans())
def test_values_lie_within_their_bounds_of_independent_ones(seed: int, shift: float, unit: float, ties: bool) -> None:
    maps, masks = random_case(seed, shift, unit, ties)
    figures = counted(maps, masks).figures()
    expected = {
        "pixel_auroc": float(roc_auc_score(masks.ravel(), maps.ravel())),
        "pixel_ap": float(average_precision_score(masks.ravel(), maps.ravel())),
        "aupro_30": plain_aupro(maps, masks),
    }
    for name in NAMES:
        assert abs(figures.values[name] - expected[name]) <= figures.error_bounds[name] + 1e-9, name
        assert ties or figures.error_bounds[name] < 1e-2, name


def test_values_that_share_no_bin_are_exact() -> None:
    rng = np.random.default_rng(0)
    masks = random_case(0, 1, 1, ties=False)[1]
    maps = (rng.integers(1, 512, masks.shape) + 100 * masks).astype(np.float32)  # bins are narrower than 1 up to 2048
    values = counted(maps, masks).figures().values
    assert values["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    assert values["pixel_ap"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-12)
    assert values["aupro_30"] == pytest.approx(plain_aupro(maps, masks), abs=1e-12)


def test_smooth_maps_agree_with_scikit_learn_to_a_ten_thousandth() -> None:
    rng = np.random.default_rng(2)
    masks = np.zeros((6, 112, 112), np.uint8)
    masks[1:, 30:60, 20:70] = 1
    smooth = ndimage.gaussian_filter(rng.normal(size=masks.shape), (0, 3, 3)) * 6
    maps = np.exp(smooth + masks - 5).astype(np.float32)
    figures = counted(maps, masks).figures()
    assert figures.values["pixel_ap"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-4)
    assert figures.values["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-4)


def test_a_constant_map_tells_nothing() -> None:
    masks = random_case(0, 1, 1, ties=False)[1]
    values = counted(np.full(masks.shape, 0.25), masks).figures().values
    assert values["pixel_auroc"] == 0.5
    assert values["pixel_ap"] == pytest.approx(masks.mean())
    assert values["aupro_30"] == pytest.approx(0.15)  # the diagonal: 0.30 * 0.30 / 2 / 0.30


def test_order_of_signs_and_zeros() -> None:
    values, truth = [[[-2.0, -1.0, -0.0, 0.0, 1.0, 2.0]]], [[[0, 0, 0, 1, 1, 1]]]
    assert counted(values, truth).figures().values["pixel_auroc"] == pytest.approx(17 / 18)


# Two regions: 9 alone, and the four others. Ten normal pixels.
BY_HAND_MASK = [[1, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        # (rate, overlap): (0, 0.5), (0.1, 0.5), (0.1, 0.75), (0.1, 0.875), (0.3, 0.875), (0.3, 1), (1, 1)
        # Area to 0.3: 0.1 * 0.5 + 0.2 * 0.875 = 0.225
        ([[9, 8, 1, 7, 7], [5, 5, 1, 6, 2], [1, 1, 1, 1, 1]], 0.225 / 0.3),
        # (0, 0.5), (0.1, 0.5), (0.1, 0.75), (0.1, 0.875), (0.5, 1): at 0.3 half of the rise is done, 0.9375
        # Area to 0.3: 0.1 * 0.5 + 0.2 * (0.875 + 0.9375) / 2 = 0.23125
        ([[9, 8, 5, 7, 7], [5, 5, 5, 6, 5], [1, 1, 1, 1, 1]], 0.23125 / 0.3),
    ],
)
def test_aupro_by_hand(scores: list[list[int]], expected: float) -> None:
    pixels = counted([scores], [BY_HAND_MASK])
    assert pixels.regions == 2
    assert pixels.figures().values["aupro_30"] == pytest.approx(expected, abs=1e-12)


def test_every_region_weighs_the_same_whatever_its_size_and_image() -> None:
    masks = np.zeros((2, 10, 10), np.uint8)
    masks[0, :5, :5] = 1  # found
    masks[1, 0, 0] = masks[1, 9, 9] = masks[1, 0, 9] = 1  # missed
    maps = np.zeros(masks.shape)
    maps[0, :5, :5] = 2
    maps[masks == 0] = 1
    values = counted(maps, masks).figures().values
    assert values["aupro_30"] == pytest.approx(0.25 + 0 * 0.75)
    assert values["pixel_auroc"] == pytest.approx(25 / 28)


def test_pixels_that_touch_at_a_corner_are_one_region() -> None:
    assert counted(np.zeros((1, 3, 3)), [np.eye(3)]).regions == 1
    assert counted(np.zeros((1, 3, 3)), [[[1, 0, 1], [0, 0, 0], [1, 0, 255]]]).regions == 4


def test_what_is_undefined_says_why() -> None:
    undefined = "pixel_auroc, pixel_ap and aupro_30 are undefined: "
    for pixels, reason in (
        (
            counted([np.ones((4, 4))] * 2, [np.zeros((4, 4))] * 2),
            "no pixel of the 2 images with pixel truth is anomalous",
        ),
        (counted([np.ones((4, 4))], [np.ones((4, 4))]), "every pixel of the 1 images with pixel truth is anomalous"),
    ):
        figures = pixels.figures(Bootstrap(20))
        assert (figures.values, figures.error_bounds, figures.intervals) == ({}, {}, {})
        assert figures.notes == [undefined + reason]


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"truth: got the shape \(3, 4\), expected that of the map, \(4, 4\)"):
        PixelMetrics().add(np.zeros((4, 4), np.float32), np.zeros((3, 4), np.uint8))


def many(images: int = 40, seed: int = 5) -> tuple[Float32, UInt8]:
    """Images that differ: some lesions are plain, some hidden, some images noisy."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((images, 16, 16), np.uint8)
    for mask in masks[images // 4 :]:
        row, column = rng.integers(0, 11, 2)
        mask[row : row + 5, column : column + 5] = 1
    shift, level = rng.normal(1.2, 0.8, (images, 1, 1)), rng.normal(0, 0.4, (images, 1, 1))
    return np.exp(rng.normal(size=masks.shape) + shift * masks + level).astype(np.float32), masks


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    maps, masks = many()
    figures = counted(maps, masks, keep_images=True).figures(Bootstrap())
    rng = np.random.default_rng(11)
    anomalous = masks.any(axis=(1, 2))
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    values, bins = np.unique(maps, return_inverse=True)
    bins = bins.reshape(maps.shape)
    for _ in range(400):
        drawn = np.concatenate(
            [rng.choice(np.flatnonzero(anomalous == kind), size=int((anomalous == kind).sum())) for kind in (0, 1)]
        )
        found["pixel_auroc"].append(float(roc_auc_score(masks[drawn].ravel(), maps[drawn].ravel())))
        found["pixel_ap"].append(float(average_precision_score(masks[drawn].ravel(), maps[drawn].ravel())))
        normal = np.bincount(bins[drawn][masks[drawn] == 0], minlength=len(values)).astype(np.float64)
        overlap = np.bincount(bins[drawn][masks[drawn] == 1], minlength=len(values)) / 25  # one square of 5 x 5 each
        found["aupro_30"].append(float(aupro(normal, overlap)))
    for name in NAMES:
        expected = np.quantile(found[name], (0.025, 0.975))
        width = expected[1] - expected[0]
        assert np.abs(figures.intervals[name] - expected).max() < 0.15 * width, name


def test_coarser_bins_hardly_move_the_intervals() -> None:
    maps, masks = many()
    fine = counted(maps, masks, keep_images=True)
    coarse = PixelMetrics()
    coarse.histograms = ImageHistograms(most_bins=40)
    for anomaly_map, mask in zip(maps, masks, strict=True):
        coarse.add(anomaly_map, mask)
    assert fine.histograms is not None
    assert coarse.histograms.shift >= fine.histograms.shift + 4
    one, other = (pixels.figures(Bootstrap()) for pixels in (fine, coarse))
    assert one.values == other.values
    for name in NAMES:
        low, high = one.intervals[name]
        assert np.abs(np.subtract(one.intervals[name], other.intervals[name])).max() < 0.05 * (high - low), name


def test_intervals_do_not_depend_on_the_order_of_the_images() -> None:
    maps, masks = many()
    order = np.random.default_rng(0).permutation(len(maps))
    one = counted(maps, masks, keep_images=True).figures(Bootstrap(100))
    other = counted(maps[order], masks[order], keep_images=True).figures(Bootstrap(100))
    for name in NAMES:
        assert other.values[name] == pytest.approx(one.values[name], abs=1e-12)
        assert other.intervals[name] == pytest.approx(one.intervals[name], abs=1e-6)


def test_the_seed_decides_the_intervals() -> None:
    pixels = counted(*many(), keep_images=True)
    one, again, other = (pixels.figures(Bootstrap(50, seed)).intervals for seed in (3, 3, 4))
    assert one == again
    assert all(one[name] != other[name] for name in NAMES)


def test_all_images_anomalous_or_one_alone() -> None:
    maps, masks = many()
    every = counted(maps[10:], masks[10:], keep_images=True).figures(Bootstrap(50))
    assert set(every.intervals) == set(NAMES)
    assert np.isfinite(list(every.intervals.values())).all()
    single = counted(maps[:11], masks[:11], keep_images=True).figures(Bootstrap(50))
    assert set(single.values) == set(NAMES)
    assert single.intervals == {}
    assert single.notes == [
        "95 % intervals of pixel_auroc, pixel_ap and aupro_30 need 2 images with anomalous pixels or more, "
        "and not just 1 without"
    ]


def keys_of(rng: np.random.Generator, images: int, spread: int) -> list[tuple[Keys, Keys, npt.NDArray[np.float64]]]:
    result = []
    for _ in range(images):
        normal, anomalous = (rng.integers(2**19, 2**19 + spread, n).astype(np.uint32) for n in (60, 4))
        result.append((normal, anomalous, rng.integers(1, 8, 4) / 8))
    return result


@pytest.mark.parametrize(("images", "spread"), [(3, 50), (512, 1 << 12), (1300, 1 << 17)])
def test_weighted_sums_of_image_histograms(images: int, spread: int) -> None:
    rng = np.random.default_rng(images)
    kept = ImageHistograms(most_bins=100)
    cases = keys_of(rng, images, spread)
    for case in cases:
        kept.add(*case)
    assert len(kept) == images
    counts = rng.integers(0, 4, (5, images)).astype(np.uint32)
    dense = np.zeros((3, images, (1 << 20) >> kept.shift))
    for number, (normal, anomalous, weights) in enumerate(cases):
        np.add.at(dense[0, number], normal >> kept.shift, 1)
        np.add.at(dense[1, number], anomalous >> kept.shift, 1)
        np.add.at(dense[2, number], anomalous >> kept.shift, weights)
    occupied = dense.any(axis=(0, 1))
    assert 40 <= occupied.sum() <= 100
    for got, expected in zip(kept.sums(counts), dense, strict=True):
        np.testing.assert_allclose(got, counts @ expected[:, occupied], rtol=1e-6)


def test_memory_for_many_images_is_bounded() -> None:
    rng = np.random.default_rng(0)
    kept, free = ImageHistograms(most_bytes=400_000), ImageHistograms()
    for number, case in enumerate(keys_of(rng, 4 * 512, 1 << 14), start=1):
        kept.add(*case)
        free.add(*case)
        if number % 512 == 0:
            assert kept.nbytes <= 400_000
    assert free.nbytes > 800_000
    assert free.shift < kept.shift < 11
