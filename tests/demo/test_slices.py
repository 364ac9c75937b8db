"""The demo's images: real anatomy, deterministic, with lesions that are where their masks say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from demo.slices import SIZE, LesionRange, Variation, add_lesion, finish, normal_slice, smooth_field, template

STILL = Variation(
    warp_mm=0, warp_z_mm=0, tilt_degrees=0, rotation_degrees=0, shift_mm=0, scale=0, bias=0, gamma=0, gain=0
)


def test_without_variation_a_slice_is_a_plane_of_the_template() -> None:
    image = normal_slice(3, STILL)
    # Rows of the slice run from front to back and columns from left to right, as axes 1 and 0 of the template do.
    planes = [np.flipud(template()[:, :, z].T) for z in range(60, 115)]
    found = max(np.corrcoef(image.ravel(), _framed(plane).ravel())[0, 1] for plane in planes)

    assert image.shape == (SIZE, SIZE)
    assert found > 0.97


def _framed(plane: np.ndarray) -> np.ndarray:
    """Put a template plane (233, 189) where `normal_slice` has it: x = 0 and y = -18 mm in the middle, 1 mm a pixel."""
    frame = np.zeros((SIZE, SIZE))
    # y of row r (from the front): 98 - r; it stands at -18 - y + 119.5. x of column c: c - 98, at x + 119.5.
    frame[3 : 3 + plane.shape[0], 21 : 21 + plane.shape[1]] = plane[: SIZE - 3]
    return frame


def test_a_slice_is_a_function_of_its_seed() -> None:
    first, again, other = normal_slice([0, 1]), normal_slice([0, 1]), normal_slice([0, 2])

    assert first.tobytes() == again.tobytes()
    assert np.abs(first - other).mean() > 0.01


def test_neighbouring_seeds_differ_as_much_as_distant_ones() -> None:
    slices = [normal_slice([0, n]) for n in (0, 1, 2, 50, 51)]
    away = [np.abs(a - b).mean() for n, a in enumerate(slices) for b in slices[n + 1 :]]

    assert min(away) > 0.2 * max(away)


def test_smooth_fields_have_unit_variance_and_the_asked_length() -> None:
    fields = [smooth_field(np.random.default_rng(seed), 30.0) for seed in range(20)]
    stacked = np.stack(fields)
    near = np.mean(stacked[:, :, 5:] * stacked[:, :, :-5])
    far = np.mean(stacked[:, :, 90:] * stacked[:, :, :-90])

    assert abs(stacked.mean()) < 0.2
    assert 0.7 < stacked.std() < 1.3
    assert near > 0.7
    assert abs(far) < 0.25


@pytest.mark.parametrize("seed", range(12))
def test_a_lesion_darkens_what_its_mask_covers_and_little_else(seed: int) -> None:
    image = normal_slice([seed, 0])

    result, mask = add_lesion(image, [seed, 1])

    brain = ndimage.binary_fill_holes(ndimage.gaussian_filter(image, 1.0) > 0.15)
    radius = np.sqrt(mask.sum() / np.pi)
    assert result.dtype == np.float32
    assert mask.dtype == np.bool_
    assert not mask[~brain].any()
    assert 0.4 * LesionRange().radius_mm[0] < radius < 1.4 * LesionRange().radius_mm[1]
    assert result[mask].mean() < 0.92 * image[mask].mean()
    away = ~ndimage.binary_dilation(mask, iterations=10)
    assert np.abs(result - image)[away].max() < 0.05  # its border is soft


def test_lesions_differ_from_slice_to_slice() -> None:
    image = normal_slice(0)
    centres = [ndimage.center_of_mass(add_lesion(image, [n])[1]) for n in range(20)]
    sizes = [add_lesion(image, [n])[1].sum() for n in range(20)]

    assert np.ptp([row for row, _ in centres]) > 60
    assert np.ptp([col for _, col in centres]) > 60
    assert max(sizes) > 2 * min(sizes)


def test_noise_is_deterministic_and_the_background_is_black() -> None:
    image = normal_slice(1)

    first, again, other = finish(image, 5), finish(image, 5), finish(image, 6)

    assert first.dtype == np.uint8
    assert first.tobytes() == again.tobytes()
    assert (first != other).any()
    assert first[:10].max() == 0
    assert 120 < np.percentile(first[first > 0], 90) < 256


def test_the_template_is_a_symmetric_brain_with_dark_ventricles() -> None:
    volume = template()
    plane = volume[:, :, 92]  # z = 20 mm: bodies of the lateral ventricles beside the midline, near y = 0

    assert volume.shape == (197, 233, 189)
    assert np.corrcoef(plane[:98].ravel(), plane[:98:-1].ravel())[0, 1] > 0.9
    assert plane[84:92, 130:140].min() < 0.4 < 0.7 < plane[60:70, 130:140].max()
    assert 0.7 < np.percentile(volume[volume > 0.1], 75) < 0.95
