"""Bilinear resizing with antialias of 8-bit images, bit for bit as torchvision's `Resize` does it on the CPU.

The method's published numbers were made with that kernel, and a grey level in a few pixels moves a score's fourth
digit. Pillow's filter is the same but for the precision of its weights and, by version, the order of its two passes.
This one is exact for every size: weights are rounded to 16 bits, both passes are sums of whole numbers, and the
products run in floating point that holds them without error.

Letters: n, m pixels before and after along one axis; H, W height and width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qfae_runtime.arrays import UInt8

_WEIGHT_BITS = 15
"""Weights are signed 16-bit numbers."""

_MOST_BITS = 22
_AT_ONCE = 1 << 18
"""Input pixels converted at a time: they stay in the processor's cache, and large images cost little memory."""

_MOST_WORK = 1 << 18
"""Multiplications in one product. OpenBLAS takes several threads for more of them, and those of pictures that are
decoded side by side get into each other's way: one of 512 x 512 pixels then takes many times as long."""

_BAND = 16
"""Output pixels computed in one product: few enough that they need neighbouring input pixels only."""


class _Band(NamedTuple):
    """Output pixels `start:stop` from input pixels `low:high` by `weights` (stop - start, high - low)."""

    start: int
    stop: int
    low: int
    high: int
    weights: npt.NDArray[Any]


class _Kernel(NamedTuple):
    bands: tuple[_Band, ...]
    bits: int
    dtype: type[np.floating[Any]]
    """A type in which every sum is exact."""

    @property
    def work_of_row(self) -> int:
        """The most multiplications that a row takes in one product."""
        return max(band.weights.size for band in self.bands)


def resize(pixels: UInt8, height: int, width: int) -> UInt8:
    """Resize uint8 (H, W, 3) to uint8 (height, width, 3); the aspect is not kept, the result owns its memory."""
    grey = bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())
    planes = np.ascontiguousarray(pixels[..., :1] if grey else pixels).transpose(2, 0, 1)  # [1 or 3, H, W]
    across = _along_rows(planes, width)
    done = _along_rows(across.transpose(0, 2, 1), height).transpose(2, 1, 0)  # [height, width, 1 or 3]
    return np.repeat(done, 3, axis=2) if grey else np.array(done, order="C")


def _along_rows(planes: UInt8, size: int) -> UInt8:
    """Resize the last axis of uint8 (P, R, n) to `size`: uint8 (P, R, size)."""
    if planes.shape[2] == size:
        return planes
    kernel = _kernel(planes.shape[2], size)
    rows = planes.reshape(-1, planes.shape[2])
    done = np.empty((len(rows), size), dtype=np.uint8)
    step = max(1, min(_AT_ONCE // planes.shape[2], _MOST_WORK // kernel.work_of_row))
    for start in range(0, len(rows), step):
        part = np.asarray(rows[start : start + step], dtype=kernel.dtype, order="C")
        sums = np.empty((len(part), size), dtype=kernel.dtype)
        for band in kernel.bands:
            np.matmul(part[:, band.low : band.high], band.weights.T, out=sums[:, band.start : band.stop])
        sums += 1 << (kernel.bits - 1)  # rounds half up
        sums *= 2.0**-kernel.bits
        done[start : start + step] = sums.clip(0, 255, out=sums)  # the cast cuts off what is behind the point
    return done.reshape(*planes.shape[:2], size)


@lru_cache(maxsize=256)
def _kernel(before: int, after: int) -> _Kernel:
    """Return the weights from `before` to `after` pixels: a triangle, widened by the scale where it shrinks."""
    scale = before / after
    support = max(scale, 1.0)
    centre = scale * (np.arange(after) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int64), before) - first
    taps = np.arange(int(count.max()))
    distance = np.abs((taps + (first - centre)[:, None] + 0.5) * (1.0 / support))
    weights = np.where((distance < 1.0) & (taps < count[:, None]), 1.0 - distance, 0.0)
    # Summed one after another, as the original does: another order can turn a rounding.
    weights /= np.cumsum(weights, axis=1)[:, -1:]
    bits = 0
    while bits < _MOST_BITS and int(0.5 + float(weights.max()) * 2 ** (bits + 1)) < 1 << _WEIGHT_BITS:
        bits += 1
    whole = np.floor(0.5 + weights * 2**bits)
    largest = float(whole.sum(axis=1).max()) * 255 + 2 ** (bits - 1)
    dtype = np.float32 if largest < 2**24 else np.float64
    bands = [_band(start, min(start + _BAND, after), first, count, whole, dtype) for start in range(0, after, _BAND)]
    return _Kernel(tuple(bands), bits, dtype)


def _band(
    start: int,
    stop: int,
    first: npt.NDArray[np.int64],
    count: npt.NDArray[np.int64],
    whole: npt.NDArray[np.float64],
    dtype: type[np.floating[Any]],
) -> _Band:
    low, high = int(first[start:stop].min()), int((first + count)[start:stop].max())
    weights = np.zeros((stop - start, high - low), dtype=dtype)
    for row in range(start, stop):
        at = first[row] - low
        weights[row - start, at : at + count[row]] = whole[row, : count[row]]
    return _Band(start, stop, low, high, weights)
