"""Anomaly maps against masks, pixel by pixel: AUROC, average precision, AUPRO. Maps are counted, never kept."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from qfae_runtime.arrays import Float32, UInt8
from qfae_runtime.metrics import curves
from qfae_runtime.metrics.bootstrap import Bootstrap, can_be_drawn, classes_of, interval_of, resample
from qfae_runtime.metrics.curves import Weights
from qfae_runtime.metrics.figures import Figures
from qfae_runtime.metrics.per_image import KEY_BITS, ImageHistograms, Keys

# float32 values are binned by their upper bits (sign, exponent, 11 bits of mantissa), keeping their order: two values
# share a bin only if they differ by less than 0.05 %.
_DROPPED_BITS = 32 - KEY_BITS
_BINS = 1 << KEY_BITS
_PENDING_LIMIT = 1 << 21
_BLOCK = 1 << 22  # counts at a time in the bootstrap

_NAMES = "pixel_auroc, pixel_ap and aupro_30"


class PixelMetrics:
    """Counts any number of maps into three histograms of 2^20 bins (24 MiB), whose areas carry their error bounds.

    Masks are counted as they are given, in the square of S x S pixels that the engine sees. `keep_images` also keeps a
    coarse histogram of each image (see per_image.py), without which there are no intervals.

    `images` is the number counted, `without_truth` that of the images left out, `regions` the connected anomalous
    regions, whose pixels touch by an edge or a corner.
    """

    def __init__(self, *, keep_images: bool = True) -> None:
        self.images = self.without_truth = self.regions = 0
        self.histograms = ImageHistograms() if keep_images else None
        self._normal = np.zeros(_BINS, dtype=np.int64)
        self._anomalous = np.zeros(_BINS, dtype=np.int64)
        self._overlap = np.zeros(_BINS)
        self._pending: list[tuple[Keys, Keys, Weights]] = []
        self._pending_count = 0
        self._has_anomaly: list[bool] = []
        self._digests: list[int] = []

    def add(self, anomaly_map: Float32, truth: UInt8 | None) -> None:
        """Count a map float32 (S, S) against its mask uint8 (S, S), not 0 where anomalous; None leaves it out.

        Raises:
            ValueError: map and mask differ in shape.

        """
        if truth is None:
            self.without_truth += 1
            return
        if truth.shape != anomaly_map.shape:
            raise ValueError(f"truth: got the shape {truth.shape}, expected that of the map, {anomaly_map.shape}")
        mask = truth != 0
        keys = _ordered_bins(anomaly_map)
        weights, regions = _region_weights(mask)
        normal, anomalous = keys[~mask], keys[mask]
        self._pending.append((normal, anomalous, weights))
        self._pending_count += keys.size
        self.images += 1
        self.regions += regions
        if self.histograms is not None:
            self.histograms.add(normal, anomalous, weights)
            self._has_anomaly.append(regions > 0)
            self._digests.append(zlib.crc32(mask.tobytes(), zlib.crc32(anomaly_map.tobytes())))
        if self._pending_count >= _PENDING_LIMIT:
            self._flush()

    def figures(self, bootstrap: Bootstrap | None = None) -> Figures:
        """Return pixel_auroc, pixel_ap and aupro_30 with error bounds, and 95 % intervals if a bootstrap is given.

        The bounds are of the bins alone: how far the values can lie from those of the maps at full precision.

        Raises:
            ValueError: a bootstrap is asked for, and the images were not kept.

        """
        self._flush()
        figures = Figures()
        if reason := self._undefined():
            figures.notes.append(f"{_NAMES} are undefined: {reason}")
            return figures
        occupied = np.flatnonzero(self._normal + self._anomalous)  # an empty bin changes nothing
        histograms = tuple(part[occupied].astype(np.float64) for part in (self._normal, self._anomalous, self._overlap))
        for name, (area, bound) in _AREAS.items():
            figures.values[name] = float(area(*histograms))
            figures.error_bounds[name] = float(bound(*histograms))
        if bootstrap is not None:
            self._add_intervals(figures, bootstrap)
        return figures

    def _undefined(self) -> str | None:
        if not self.images:
            return "no image has pixel truth; masks belong into label/ or anomaly_mask/ beside the images"
        if not self._anomalous.any():
            return f"no pixel of the {self.images} images with pixel truth is anomalous"
        if not self._normal.any():
            return f"every pixel of the {self.images} images with pixel truth is anomalous"
        return None

    def _add_intervals(self, figures: Figures, bootstrap: Bootstrap) -> None:
        if self.histograms is None:
            raise ValueError("bootstrap: the images were not kept; make PixelMetrics with keep_images=True")
        has_anomaly = np.array(self._has_anomaly)
        # Images are listed in an order that their content decides, so that the draws do not depend on theirs.
        classes = classes_of(has_anomaly, np.argsort(np.array(self._digests), kind="stable"))
        if not can_be_drawn(classes):
            figures.notes.append(
                f"95 % intervals of {_NAMES} need 2 images with anomalous pixels or more, and not just 1 without"
            )
            return
        whole = self.histograms.sums(np.ones((1, self.images), dtype=np.uint32))
        found: dict[str, list[Weights]] = {name: [] for name in _AREAS}
        for counts in resample(classes, bootstrap, _BLOCK):
            sums = self.histograms.sums(counts)
            for name, (area, _) in _AREAS.items():
                found[name].append(area(*sums))
        for name, (area, _) in _AREAS.items():
            # Coarse bins shift a resample's area and the whole sample's alike. The difference of the two is what the
            # draw has changed, and it is this that is added to the value from the fine bins.
            changes = interval_of(np.concatenate(found[name]) - area(*whole))
            low, high = np.clip(figures.values[name] + np.array(changes), 0, 1)
            figures.intervals[name] = float(low), float(high)

    def _flush(self) -> None:
        if not self._pending:
            return
        normal, anomalous, weights = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
        self._normal += np.bincount(normal, minlength=_BINS)
        self._anomalous += np.bincount(anomalous, minlength=_BINS)
        self._overlap += np.bincount(anomalous, weights, minlength=_BINS)
        self._pending, self._pending_count = [], 0


_Area = Callable[[Weights, Weights, Weights], Weights]
_AREAS: dict[str, tuple[_Area, _Area]] = {
    "pixel_auroc": (
        lambda normal, anomalous, _: curves.auroc(normal, anomalous),
        lambda normal, anomalous, _: curves.auroc_error_bound(normal, anomalous),
    ),
    "pixel_ap": (
        lambda normal, anomalous, _: curves.average_precision(normal, anomalous),
        lambda normal, anomalous, _: curves.average_precision_error_bound(normal, anomalous),
    ),
    "aupro_30": (
        lambda normal, _, overlap: curves.aupro(normal, overlap),
        lambda normal, _, overlap: curves.aupro_error_bound(normal, overlap),
    ),
}
"""Each area and its error bound, from histograms of normal pixels, of anomalous ones, and of these by region."""


def _ordered_bins(values: Float32) -> Keys:
    # IEEE 754: as unsigned integers, positive floats sort rightly once the sign bit is set, negative inverted.
    bits = (np.ascontiguousarray(values, dtype=np.float32) + np.float32(0)).view(np.uint32)  # turns -0.0 into 0.0
    key = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return np.asarray(key >> np.uint32(_DROPPED_BITS), dtype=np.uint32)


def _region_weights(mask: npt.NDArray[np.bool_]) -> tuple[Weights, int]:
    """Return 1 / (pixels of its region) for each anomalous pixel of a mask, float64 (a,), and the number of regions."""
    if not mask.any():
        return np.zeros(0), 0
    # Imported here, as it is needed only where there are masks.
    from scipy import ndimage

    labels, regions = ndimage.label(mask, structure=np.ones((3, 3), dtype=np.int8))
    of_pixels = labels[mask]
    return 1.0 / np.bincount(of_pixels)[of_pixels], int(regions)
