"""Does the runtime's resize do what training's library does? An engine is only as right as the pixels it is given.

Engine and reference are given the same prepared pixels, so a fault of the preparation would never show between them.
"""

from __future__ import annotations

import numpy as np
import torch
from torchvision.transforms import v2

from qfae_export.errors import ExportError
from qfae_runtime.arrays import UInt8
from qfae_runtime.preprocess import PreprocessSpec, preprocess

# Larger and smaller than any square in use, wide and tall; sides that a resize without antialiasing would sample.
_SHAPES = ((240, 240), (512, 385), (61, 97), (97, 640))


def check_resize(spec: PreprocessSpec) -> None:
    """Hold the preprocessing of coloured patterns against torchvision's antialiased resize, bit for bit.

    Raises:
        ExportError: they differ.

    """
    size = spec.image_size
    whole = PreprocessSpec("resize", size)
    for height, width in _SHAPES:
        pattern = _pattern(height, width)
        got = preprocess(pattern, whole).image
        chw = torch.from_numpy(pattern).permute(2, 0, 1)
        want = v2.functional.resize(chw, [size, size], antialias=True).permute(1, 2, 0).numpy()
        levels = np.abs(got.astype(int) - want)
        if levels.any():
            raise ExportError(
                f"preprocessing: an image of {height} x {width} resized to {size} x {size} differs from torchvision's "
                f"by {int(levels.max())} grey levels at most, {(levels > 0).mean():.1%} of the values; expected none: "
                "an engine would be given other pixels than the model was trained on; reinstall qfae and numpy, or "
                "report the versions"
            )


def _pattern(height: int, width: int) -> UInt8:
    """Edges, ramps and noise in three different channels: no two channels, axes or neighbours are alike."""
    noise = np.random.default_rng(height).integers(0, 256, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    bands = np.stack([(x // 3 % 2) * 255, y * 255 // height, (x + 2 * y) % 256], axis=2)
    return np.where((x // 40 + y // 40)[..., None] % 2, noise, bands).astype(np.uint8)
