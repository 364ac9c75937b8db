"""metrics.json: how well the scores separate, where labels are known. Maps are counted, never kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from qfae_runtime.arrays import Float32, UInt8
from qfae_runtime.layout import UNGOOD
from qfae_runtime.writers.records import OK, Row

# float32 values are binned by their upper 20 bits (sign, exponent, 11 bits of mantissa), keeping their order.
_DROPPED_BITS = 12
_BINS = 1 << (32 - _DROPPED_BITS)
_PENDING_LIMIT = 1 << 21


class PixelRoc:
    """Pixel AUROC of any number of maps from two histograms of 2^20 bins (16 MiB), with its own error bound.

    Two values share a bin only if they differ by less than 0.05 %. Such a pair counts one half, as a tie does, so
    the AUROC is off by at most half the share of pairs that lie in one bin: the error bound, computed exactly.
    """

    def __init__(self) -> None:
        self._histograms = np.zeros((2, _BINS), dtype=np.int64)  # normal, anomalous
        self._pending: list[npt.NDArray[np.uint32]] = []
        self._pending_count = 0
        self.images = 0

    def add(self, anomaly_map: Float32, truth: UInt8) -> None:
        """Count a map float32 (S, S) against its mask uint8 (S, S), 1 where anomalous."""
        keys = _ordered_bins(np.ascontiguousarray(anomaly_map).ravel())
        self._pending.append(keys + np.uint32(_BINS) * (truth.ravel() != 0).astype(np.uint32))
        self._pending_count += keys.size
        self.images += 1
        if self._pending_count >= _PENDING_LIMIT:
            self._flush()

    def result(self) -> tuple[float | None, float | None]:
        """Return (AUROC, error bound); (None, None) where one of the two classes has no pixel."""
        self._flush()
        normal, anomalous = self._histograms
        pairs = float(normal.sum()) * float(anomalous.sum())
        if pairs == 0:
            return None, None
        below = np.cumsum(normal) - normal
        tied = float(np.sum(anomalous.astype(np.float64) * normal))
        wins = float(np.sum(anomalous.astype(np.float64) * below)) + 0.5 * tied
        return wins / pairs, 0.5 * tied / pairs

    def _flush(self) -> None:
        if self._pending:
            keys = np.concatenate(self._pending)
            self._histograms += np.bincount(keys, minlength=2 * _BINS).reshape(2, _BINS)
            self._pending, self._pending_count = [], 0


def _ordered_bins(values: Float32) -> npt.NDArray[np.uint32]:
    # IEEE 754: as unsigned integers, positive floats sort rightly once the sign bit is set, negative inverted.
    bits = (values + np.float32(0)).view(np.uint32)  # the addition turns -0.0 into 0.0
    key = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return np.asarray(key >> np.uint32(_DROPPED_BITS), dtype=np.uint32)


def compute_metrics(rows: Iterable[Row], pixels: PixelRoc | None, pixel_note: str | None) -> dict[str, Any] | None:
    """Compute what metrics.json holds; None where no row has a label. Ungood is the positive class.

    `pixels` is None where pixel truth was not gathered, and `pixel_note` then says why.
    """
    scores: list[float] = []
    positives: list[bool] = []
    unscored = 0
    for row in rows:
        if row.label is None:
            continue
        if row.status != OK or row.score is None:
            unscored += 1
            continue
        scores.append(row.score)
        positives.append(row.label == UNGOOD)
    if not scores and not unscored:
        return None
    notes = [pixel_note] if pixel_note else []
    auroc = precision = None
    if 0 < sum(positives) < len(positives):
        # Imported here: scikit-learn takes a second to import, and most runs have no labels.
        from sklearn.metrics import average_precision_score, roc_auc_score

        auroc = float(roc_auc_score(positives, scores))
        precision = float(average_precision_score(positives, scores))
    else:
        notes.append("image_auroc and image_ap need both good and Ungood images among the scored ones")
    pixel_auroc, bound = pixels.result() if pixels is not None else (None, None)
    if pixels is not None and pixel_auroc is None:
        notes.append("pixel_auroc needs masks with anomalous pixels and pixels outside them")
    return {
        "image_auroc": auroc,
        "image_ap": precision,
        "pixel_auroc": pixel_auroc,
        "pixel_auroc_error_bound": bound,
        "counts": {
            "good": len(positives) - sum(positives),
            "ungood": sum(positives),
            "labelled_but_not_scored": unscored,
            "images_with_pixel_truth": pixels.images if pixels is not None else 0,
        },
        "notes": notes,
    }
