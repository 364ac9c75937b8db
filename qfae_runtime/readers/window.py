"""From stored values to grey levels: the windows of DICOM, and percentiles where there is none.

The three functions of a window with center c and width w are those of PS3.3 C.11.2.1. Levels are rounded to the
nearest, halves upwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qfae_runtime.arrays import UInt8

Values = npt.NDArray[Any]

LOW_PERCENTILE, HIGH_PERCENTILE = 0.5, 99.5
LINEAR, LINEAR_EXACT, SIGMOID = "LINEAR", "LINEAR_EXACT", "SIGMOID"
_STRIP = 2**20
FUNCTIONS = (LINEAR, LINEAR_EXACT, SIGMOID)


@dataclass(frozen=True)
class Window:
    """A window: `center` and `width` in the unit of the values, the function, and where it came from in words."""

    center: float
    width: float
    function: str = LINEAR
    origin: str = "file"

    def levels(self, values: Values) -> UInt8:
        """Return values (H, W) as grey levels uint8 (H, W), 0 below the window and 255 above; NaN is 0."""
        return _in_strips(values, self._share)

    def _share(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self.function == SIGMOID:
            with np.errstate(over="ignore"):
                return 1.0 / (1.0 + np.exp(-4.0 * (x - self.center) / self.width))
        if self.function == LINEAR_EXACT:
            return (x - self.center) / self.width + 0.5
        if self.width <= 1.0:  # a step: the formula would divide by zero
            return np.where(x > self.center - 0.5, 1.0, 0.0)
        return (x - (self.center - 0.5)) / (self.width - 1.0) + 0.5

    def usable(self) -> bool:
        """Say whether the standard allows this window."""
        return bool(np.isfinite([self.center, self.width]).all()) and (
            self.width >= 1.0 if self.function == LINEAR else self.width > 0.0
        )

    def __str__(self) -> str:
        name = "" if self.function == LINEAR else f" {self.function.lower().replace('_', '-')}"
        return f"window {self.center:.6g},{self.width:.6g}{name} ({self.origin})"


@dataclass(frozen=True)
class Range:
    """The values that become black and white; what lies between grows evenly. `origin` says in words whence."""

    low: float
    high: float
    origin: str

    @classmethod
    def of(cls, values: Values, whole: str) -> Range:
        """Take the range of percentiles 0.5 and 99.5 of the finite values; `whole` names what they are all of.

        Where the two are equal, because nearly everything has one value, the smallest and the largest are taken.
        """
        # Volumes are large: they are copied once for this, and not in another order.
        known = values.ravel(order="K")
        copied = known.dtype.kind == "f"
        if copied:
            known = known[np.isfinite(known)]
        if known.size == 0:
            return cls(0.0, 0.0, f"no finite value in the {whole}")
        ends = np.percentile(known, (LOW_PERCENTILE, HIGH_PERCENTILE), overwrite_input=copied)
        low, high = (float(one) for one in ends)
        if low < high:
            return cls(low, high, f"percentiles {LOW_PERCENTILE} and {HIGH_PERCENTILE} of the {whole}")
        return cls(float(known.min()), float(known.max()), f"least and largest of the {whole}")

    def levels(self, values: Values) -> UInt8:
        """Return values (H, W) as grey levels uint8 (H, W); all 0 where low and high are equal; NaN is 0."""
        if not self.low < self.high:
            return np.zeros(values.shape, np.uint8)
        return _in_strips(values, lambda x: (x - self.low) / (self.high - self.low))

    def __str__(self) -> str:
        return f"range {self.low:.6g}..{self.high:.6g} ({self.origin})"


def to_levels(share: npt.NDArray[np.float64]) -> UInt8:
    """Return shares of white, where 1 is 255, as grey levels uint8."""
    with np.errstate(invalid="ignore"):
        levels = np.floor(np.clip(share, 0.0, 1.0) * 255.0 + 0.5)
    return np.nan_to_num(levels, nan=0.0).astype(np.uint8)


def _in_strips(values: Values, share: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> UInt8:
    """Return the levels of `share(values)`, some rows at a time: in float64 a large picture takes half a gigabyte."""
    levels = np.empty(values.shape, np.uint8)
    rows = max(1, _STRIP // max(1, values.shape[1]))
    for top in range(0, len(values), rows):
        levels[top : top + rows] = to_levels(share(values[top : top + rows].astype(np.float64)))
    return levels


def grey(levels: UInt8) -> UInt8:
    """Return grey levels uint8 (H, W) as RGB uint8 (H, W, 3)."""
    return np.repeat(np.ascontiguousarray(levels)[:, :, None], 3, axis=2)
