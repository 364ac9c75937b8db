"""All of it at once: what metrics.json holds, and what training validates on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qfae_runtime.arrays import Bool
from qfae_runtime.metrics.bootstrap import Bootstrap, Interval
from qfae_runtime.metrics.image import image_figures
from qfae_runtime.metrics.pixels import PixelMetrics

TITLES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro_30": "AUPRO at 30 % FPR",
}
"""The metrics by their names in metrics.json, and what they are called."""


@dataclass(frozen=True, eq=False)
class Metrics:
    """Areas from 0 to 1, None where undefined, and then `notes` says why.

    `scores` and `anomalous` (N,) are what was measured. `error_bounds` are how far the histograms can have moved a
    pixel area, `intervals_95` what another sample of images of this size may give; both hold None where there is none,
    and `intervals_95` is empty without a bootstrap.
    """

    scores: npt.NDArray[np.floating]
    anomalous: Bool
    image_auroc: float | None
    image_ap: float | None
    pixel_auroc: float | None
    pixel_ap: float | None
    aupro_30: float | None
    error_bounds: dict[str, float | None]
    intervals_95: dict[str, Interval | None]
    bootstrap: Bootstrap | None
    counts: dict[str, int]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without `scores` and `anomalous`."""
        values: dict[str, Any] = {}
        for name in TITLES:
            values[name] = getattr(self, name)
            if name in self.error_bounds:
                values[f"{name}_error_bound"] = self.error_bounds[name]
        return {
            **values,
            "intervals_95": {name: list(ends) if ends else None for name, ends in self.intervals_95.items()},
            "bootstrap": self.bootstrap.to_dict() if self.bootstrap else None,
            "counts": dict(self.counts),
            "notes": list(self.notes),
        }


def measure(
    scores: npt.NDArray[np.floating],
    anomalous: Bool,
    pixels: PixelMetrics | None = None,
    *,
    bootstrap: Bootstrap | None = None,
    notes: Sequence[str] = (),
) -> Metrics:
    """Measure finite scores (N,) against labels bool (N,), and what `pixels` has counted.

    `bootstrap` None saves the intervals. `pixels` is None where maps were not counted; `notes` then say why.

    Raises:
        ValueError: scores and labels differ in number, or `pixels` kept no images for the bootstrap.

    """
    if scores.shape != anomalous.shape:
        raise ValueError(f"anomalous: got the shape {anomalous.shape}, expected that of the scores, {scores.shape}")
    image = image_figures(scores, anomalous, bootstrap)
    pixel = pixels.figures(bootstrap) if pixels is not None else None
    said = [*notes, *image.notes]
    values, intervals, bounds = dict(image.values), dict(image.intervals), {}
    if pixels is not None and pixel is not None:
        said += pixel.notes
        values |= pixel.values
        intervals |= pixel.intervals
        bounds = pixel.error_bounds
        if pixels.without_truth and pixels.images:
            said.append(f"{pixels.without_truth} images without a usable mask are left out of the pixel metrics")
    points = [name for name, (low, high) in intervals.items() if low == high]
    if points:
        # Where scores separate perfectly, the bootstrap cannot tell how far other images might fall short.
        said.append(f"every resample gives the same {' and '.join(points)}: the interval is a point, and no assurance")
    return Metrics(
        scores=scores,
        anomalous=anomalous,
        **{name: values.get(name) for name in TITLES},
        error_bounds={name: bounds.get(name) for name in TITLES if name.startswith(("pixel", "aupro"))},
        intervals_95={name: intervals.get(name) for name in TITLES} if bootstrap else {},
        bootstrap=bootstrap,
        counts={
            "good": int((~anomalous).sum()),
            "ungood": int(anomalous.sum()),
            "images_with_pixel_truth": pixels.images if pixels is not None else 0,
            "images_without_pixel_truth": pixels.without_truth if pixels is not None else 0,
            "anomalous_regions": pixels.regions if pixels is not None else 0,
        },
        notes=tuple(said),
    )
