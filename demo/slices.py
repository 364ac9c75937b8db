"""Axial brain slices from the MNI152 template: normal variation, lesions and their masks.

The anatomy is the MNI152 T1 template that `nilearn` carries (skull-stripped, 1 mm). One slice is the template sampled
on a smoothly bent, slightly tilted and rotated plane, so that the folding of the cortex differs from slice to slice,
then given its own contrast, receiver bias and noise. A lesion is a blob with an irregular border whose tissue is
darker than its surroundings (oedema), with a still darker core (necrosis) and, in half of the lesions, a thin bright
rim (enhancement). Everything is a function of an integer seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

FloatImage = NDArray[np.float32]

SIZE = 240
"""Pixels per side, 1 mm each: the frame of a BraTS slice."""

Z_RANGE_MM = (-4.0, 34.0)
"""Planes drawn from, in MNI millimetres: basal ganglia to the centrum semiovale, the depth BraTS slices cover."""


@dataclass(frozen=True)
class Variation:
    """How strongly normal slices differ from the template and from each other."""

    warp_mm: float = 2.2
    """Standard deviation of the in-plane bending."""
    warp_z_mm: float = 1.2
    """Standard deviation of the bending through the plane."""
    warp_scale_mm: float = 30.0
    """Correlation length of the bending."""
    tilt_degrees: float = 3.0
    rotation_degrees: float = 4.0
    shift_mm: float = 3.0
    scale: float = 0.04
    bias: float = 0.10
    """Half range of the receiver bias over the slice, as a fraction of the intensity."""
    bias_scale_mm: float = 70.0
    gamma: float = 0.12
    gain: float = 0.08
    noise: tuple[float, float] = (0.008, 0.025)
    """Range of the noise's standard deviation, as a fraction of white matter."""


@dataclass(frozen=True)
class LesionRange:
    """Size and contrast of inserted lesions. Gliomas in BraTS are commonly 15 to 30 mm in radius; these are smaller."""

    radius_mm: tuple[float, float] = (9.0, 22.0)
    oedema: tuple[float, float] = (0.20, 0.42)
    """Relative darkening of the lesion."""
    core: tuple[float, float] = (0.45, 0.70)
    """Relative darkening of the core, which takes the inner 55 % of the radius."""
    rim: tuple[float, float] = (0.10, 0.30)
    """Relative brightening of the rim, where there is one."""
    rim_probability: float = 0.5


@lru_cache(maxsize=1)
def template() -> FloatImage:
    """Return the MNI152 T1 template, float32 (197, 233, 189), brain only, white matter near 0.85."""
    from nilearn.datasets import load_mni152_template

    volume = load_mni152_template(resolution=1)
    return np.ascontiguousarray(volume.get_fdata(), dtype=np.float32)


_ORIGIN_MM = (-98.0, -134.0, -72.0)
"""MNI coordinates of voxel (0, 0, 0); the axes are aligned and 1 mm apart."""


def smooth_field(rng: np.random.Generator, scale_mm: float) -> FloatImage:
    """Return a smooth random field (SIZE, SIZE) with zero mean, unit variance and the given correlation length."""
    step = scale_mm / 3.0
    coarse = int(np.ceil(SIZE / step)) + 8
    knots = ndimage.gaussian_filter(rng.standard_normal((coarse, coarse)), 1.5)
    knots /= knots.std()
    at = np.arange(SIZE) / step + 3.0
    grid = np.meshgrid(at, at, indexing="ij")
    field: FloatImage = ndimage.map_coordinates(knots, grid, order=3, mode="nearest").astype(np.float32)
    return field


def normal_slice(seed: int | list[int], variation: Variation = Variation()) -> FloatImage:
    """Return a normal slice, float32 (240, 240), anterior up, intensities of the template with its variation."""
    rng = np.random.default_rng(seed)
    half = (SIZE - 1) / 2.0
    rows, cols = np.meshgrid(np.arange(SIZE) - half, np.arange(SIZE) - half, indexing="ij")
    angle = np.deg2rad(rng.uniform(-1, 1) * variation.rotation_degrees)
    scale_y, scale_x = 1.0 + rng.uniform(-1, 1, 2) * variation.scale
    shift_y, shift_x = rng.uniform(-1, 1, 2) * variation.shift_mm
    y = (np.cos(angle) * rows - np.sin(angle) * cols) * scale_y + shift_y
    x = (np.sin(angle) * rows + np.cos(angle) * cols) * scale_x + shift_x
    tilt_y, tilt_x = np.tan(np.deg2rad(rng.uniform(-1, 1, 2) * variation.tilt_degrees))
    z = rng.uniform(*Z_RANGE_MM) + tilt_y * y + tilt_x * x
    y = y + variation.warp_mm * smooth_field(rng, variation.warp_scale_mm)
    x = x + variation.warp_mm * smooth_field(rng, variation.warp_scale_mm)
    z = z + variation.warp_z_mm * smooth_field(rng, variation.warp_scale_mm)

    # The brain's centre in the template is near (0, -18) mm; rows run from anterior to posterior.
    at = (x - _ORIGIN_MM[0], -18.0 - y - _ORIGIN_MM[1], z - _ORIGIN_MM[2])
    tissue: FloatImage = ndimage.map_coordinates(template(), at, order=1, mode="constant")
    return _appearance(tissue, rng, variation)


def _appearance(tissue: FloatImage, rng: np.random.Generator, variation: Variation) -> FloatImage:
    """Apply contrast and receiver bias; noise comes last (`finish`), so that lesions carry it too."""
    gamma = np.exp(rng.uniform(-1, 1) * variation.gamma)
    gain = 1.0 + rng.uniform(-1, 1) * variation.gain
    bias = 1.0 + variation.bias * np.clip(smooth_field(rng, variation.bias_scale_mm) / 2.0, -1, 1)
    image: FloatImage = (gain * np.clip(tissue, 0, 1) ** gamma * bias).astype(np.float32)
    return image


def add_lesion(
    image: FloatImage,
    seed: int | list[int],
    lesion: LesionRange = LesionRange(),
) -> tuple[FloatImage, NDArray[np.bool_]]:
    """Insert one lesion into the tissue of `image`.

    Returns the slice with the lesion, float32 (240, 240), and the lesion's mask, bool (240, 240). The lesion lies in
    the brain: its centre is at least 60 % of its radius away from the brain's border, and the mask stops at it.
    """
    rng = np.random.default_rng(seed)
    brain = ndimage.binary_fill_holes(ndimage.gaussian_filter(image, 1.0) > 0.15)
    depth = ndimage.distance_transform_edt(brain)
    radius = rng.uniform(*lesion.radius_mm)
    places = np.argwhere(depth > 0.6 * radius)
    row, col = places[rng.integers(len(places))]

    stretch, angle = rng.uniform(0.75, 1.33), rng.uniform(0, np.pi)
    rows, cols = np.meshgrid(np.arange(SIZE) - row, np.arange(SIZE) - col, indexing="ij")
    along = (np.cos(angle) * rows + np.sin(angle) * cols) * stretch
    across = (-np.sin(angle) * rows + np.cos(angle) * cols) / stretch
    # Relative distance from the centre, bent so that the border is lobed: 1 at the border, below 1 inside.
    distance = np.hypot(along, across) / radius + 0.16 * smooth_field(rng, max(8.0, 0.9 * radius))

    softness = 1.2 / radius
    inside = _ramp(1.0 - distance, softness) * brain
    core = _ramp(rng.uniform(0.45, 0.65) - distance, softness)
    factor = 1.0 - inside * rng.uniform(*lesion.oedema)
    factor = factor * (1.0 - core) + core * (1.0 - rng.uniform(*lesion.core))
    if rng.random() < lesion.rim_probability:
        ring = np.exp(-(((distance - 0.62) / 0.12) ** 2)) * inside
        factor = factor + ring * (1.0 + rng.uniform(*lesion.rim) - factor)
    texture = 1.0 + 0.05 * inside * smooth_field(rng, 6.0)
    # A lesion replaces the folds of the tissue under it: half of its texture is smoothed away.
    smoothed = ndimage.gaussian_filter(image, 4.0)
    tissue = image + 0.5 * inside * (smoothed - image)
    result: FloatImage = (tissue * factor * texture).astype(np.float32)
    return result, (inside > 0.5)


def _ramp(signed: NDArray[np.float64], softness: float) -> NDArray[np.float64]:
    """Return a step from 0 to 1 with a soft edge of the given width around zero."""
    return 1.0 / (1.0 + np.exp(-np.clip(signed / (0.5 * softness), -40, 40)))


def finish(image: FloatImage, seed: int | list[int], variation: Variation = Variation()) -> NDArray[np.uint8]:
    """Add the noise of a magnitude image (Rician) and return 8-bit grey, uint8 (240, 240)."""
    rng = np.random.default_rng(seed)
    sigma = rng.uniform(*variation.noise) * 0.85
    real, imaginary = rng.standard_normal((2, SIZE, SIZE)) * sigma
    # Outside the head BraTS slices are exactly zero; so are these.
    brain = ndimage.gaussian_filter(image, 1.0) > 0.03
    magnitude = np.hypot(image + real, imaginary) * brain
    grey: NDArray[np.uint8] = np.clip(np.rint(magnitude * 215.0), 0, 255).astype(np.uint8)
    return grey
