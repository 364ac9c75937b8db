"""The preprocessing of liver CT (supplement 2.1): the body cut out of the black around it, centred and smoothed.

The steps are those of the authors' released script, with one deviation: a side that shrinks to less than a pixel
becomes one pixel, where the script leaves it out and with it the whole image.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.geometry import Box, Geometry

_DIAMETER, _SIGMA_COLOUR, _SIGMA_SPACE = 9, 75, 75

LIVER_FACTS: dict[str, Any] = {
    "grey": "opencv-luma",
    "box": "grey above 0",
    "resampling": "opencv-linear, only to shrink",
    "bilateral": {"d": _DIAMETER, "sigma_colour": _SIGMA_COLOUR, "sigma_space": _SIGMA_SPACE},
}
"""What a preprocessing specification stores of these steps."""


def fit_liver(pixels: UInt8, size: int) -> tuple[UInt8, Geometry]:
    """Turn pixels uint8 (H, W, 3) into a grey square uint8 (S, S, 3) of three equal channels, and say how.

    The box of all pixels whose grey is above 0 is shrunk if it is larger than S x S (aspect kept, bilinear without
    antialias) and pasted centred on black; then a bilateral filter smooths the square. Black stays black. Nothing
    here depends on the number of threads OpenCV uses.
    """
    grey = np.asarray(cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    canvas = np.zeros((size, size), dtype=np.uint8)
    box = _bounding_box(grey)
    place = _place(box, size) if box is not None else Box(0, 0, 0, 0)
    if box is not None:
        part = grey[box.window]
        if (place.height, place.width) != (box.height, box.width):
            side = (place.width, place.height)
            part = np.asarray(cv2.resize(part, side, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
        canvas[place.window] = part
        canvas = np.asarray(cv2.bilateralFilter(canvas, _DIAMETER, _SIGMA_COLOUR, _SIGMA_SPACE), dtype=np.uint8)
    height, width = grey.shape
    return np.repeat(canvas[:, :, None], 3, axis=2), Geometry(height, width, size, box, place)


def _bounding_box(grey: UInt8) -> Box | None:
    rows, columns = (np.flatnonzero(grey.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return None
    top, left = int(rows[0]), int(columns[0])
    return Box(top, left, int(rows[-1]) - top + 1, int(columns[-1]) - left + 1)


def _place(box: Box, size: int) -> Box:
    height, width = box.height, box.width
    if height > size or width > size:
        scale = min(size / height, size / width)
        # Truncated, as the script does: 224 / 277 * 277 is just below 224, so 277 pixels become 223.
        height, width = max(1, int(height * scale)), max(1, int(width * scale))
    return Box((size - height) // 2, (size - width) // 2, height, width)
