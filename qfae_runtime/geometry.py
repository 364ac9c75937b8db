"""Where the square an engine sees lies on the image it was made from: maps go back, masks go along.

Letters: H, W height and width of an image as read; S the engine's `image_size`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from qfae_runtime.arrays import Bool, Float32, UInt8


class Box(NamedTuple):
    """A rectangle of whole pixels in an image or a square."""

    top: int
    left: int
    height: int
    width: int

    @property
    def window(self) -> tuple[slice, slice]:
        """The slices that cut this rectangle out of an array (H, W, ...)."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


@dataclass(frozen=True)
class Geometry:
    """How the (S, S) square an engine sees lies on the (H, W) image it was made from.

    The image's `box` was brought to the square's `place`. The engine saw nothing of the image outside the box, and
    the square outside the place is no part of the image. `box` is None where the engine was shown nothing.
    """

    height: int
    width: int
    size: int
    box: Box | None
    place: Box

    @classmethod
    def whole(cls, height: int, width: int, size: int) -> Geometry:
        """Say that the whole image was brought to the whole square."""
        return cls(height, width, size, Box(0, 0, height, width), Box(0, 0, size, size))

    def map_back(self, anomaly_map: Float32) -> Float32:
        """Bring a map float32 (S, S) to the original float32 (H, W), bilinear; values keep their unit.

        Outside the box it is 0: nothing was scored there. What the map holds outside the place is dropped, so its
        largest value, which may be the image's score, need not come back.
        """
        back = np.zeros((self.height, self.width), dtype=np.float32)
        self._lay(np.asarray(anomaly_map, dtype=np.float32), back, Image.Resampling.BILINEAR)
        return back

    def image_back(self, image: UInt8) -> UInt8:
        """Bring an image uint8 (S, S, 3) to the original (H, W, 3), bicubic; black outside the box."""
        back = np.zeros((self.height, self.width, 3), dtype=np.uint8)
        self._lay(image, back, Image.Resampling.BICUBIC)
        return back

    def warp_mask(self, mask: Bool | UInt8) -> UInt8:
        """Bring a mask (H, W), non-zero where anomalous, to uint8 (S, S) of 0 and 1, nearest neighbour.

        Outside the place it is 0.

        Raises:
            ValueError: the mask does not have the image's height and width.

        """
        if mask.shape != (self.height, self.width):
            raise ValueError(f"mask: expected (H, W) = {(self.height, self.width)}, got {mask.shape}")
        warped = np.zeros((self.size, self.size), dtype=np.uint8)
        if self.box is not None:
            part = Image.fromarray((np.asarray(mask)[self.box.window] != 0).astype(np.uint8))
            side = (self.place.width, self.place.height)
            warped[self.place.window] = np.asarray(part.resize(side, Image.Resampling.NEAREST))
        return warped

    def at_size(self, height: int, width: int) -> Geometry:
        """Return the same for a copy of the image resized to `height` x `width`; the box keeps at least a pixel."""
        if self.box is None:
            return replace(self, height=height, width=width)
        top, rows = _rescaled(self.box.top, self.box.height, self.height, height)
        left, columns = _rescaled(self.box.left, self.box.width, self.width, width)
        return replace(self, height=height, width=width, box=Box(top, left, rows, columns))

    def _lay(
        self, square: npt.NDArray[np.generic], onto: npt.NDArray[np.generic], resampling: Image.Resampling
    ) -> None:
        if self.box is not None:
            part = Image.fromarray(np.ascontiguousarray(square[self.place.window]))
            onto[self.box.window] = np.asarray(part.resize((self.box.width, self.box.height), resampling))


def _rescaled(start: int, length: int, old: int, new: int) -> tuple[int, int]:
    # Both edges are rounded, not the length: boxes that touch the border still do.
    first = min(round(start * new / old), new - 1)
    last = max(round((start + length) * new / old), first + 1)
    return first, last - first
