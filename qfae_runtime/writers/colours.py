"""The colour table of anomaly maps: dark violet over red and orange to pale yellow, lightness strictly rising.

Made by an own recipe in OKLab (Ottosson, 2020): lightness rises in equal steps, so that equal differences of the
map look equally large, in grey print too; the hue turns from violet to yellow while chroma swells and fades.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from qfae_runtime.arrays import Float32, UInt8

_TO_LMS = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_TO_LINEAR_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


@lru_cache(maxsize=1)
def colour_table() -> UInt8:
    """Return the table, uint8 (256, 3) sRGB; read-only, shared."""
    t = np.linspace(0.0, 1.0, 256)
    lightness = 0.16 + 0.80 * t
    hue = np.deg2rad(np.interp(t, [0.0, 0.35, 0.7, 1.0], [295.0, 355.0, 410.0, 465.0]))
    chroma = np.interp(t, [0.0, 0.25, 0.55, 0.8, 1.0], [0.06, 0.17, 0.185, 0.15, 0.08])
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
    linear = ((lab @ _TO_LMS.T) ** 3 @ _TO_LINEAR_RGB.T).clip(0.0, 1.0)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    table = np.asarray(np.round(srgb * 255.0), dtype=np.uint8)
    table.setflags(write=False)
    return table


def position_on_scale(anomaly_map: Float32, low: float, high: float) -> npt.NDArray[np.float64]:
    """Bring a map onto the colour scale: low -> 0, high -> 1, clipped outside."""
    return np.asarray(((anomaly_map.astype(np.float64) - low) / (high - low)).clip(0.0, 1.0))


def overlay(image: UInt8, anomaly_map: Float32, low: float, high: float) -> UInt8:
    """Lay a map float32 (S, S) over its image uint8 (S, S, 3); higher values are more opaque."""
    place = position_on_scale(anomaly_map, low, high)
    colours = colour_table()[np.round(place * 255).astype(np.intp)].astype(np.float64)
    opacity = (0.85 * np.sqrt(place))[:, :, None]
    mixed = image.astype(np.float64) * (1.0 - opacity) + colours * opacity
    return np.asarray(np.round(mixed), dtype=np.uint8)
