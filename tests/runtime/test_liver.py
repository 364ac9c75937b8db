"""Liver preprocessing against plain numpy readings of its steps, and on the oddest inputs there are."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qfae_runtime.arrays import UInt8
from qfae_runtime.errors import ManifestError
from qfae_runtime.geometry import Box, Geometry
from qfae_runtime.preprocess import Prepared, PreprocessSpec, preprocess
from qfae_runtime.readers import read_image

REACH = 4  # of a bilateral filter of diameter 9


def fit(grey: UInt8, size: int) -> Prepared:
    return preprocess(np.repeat(grey[:, :, None], 3, axis=2), PreprocessSpec("liver", size))


def lone_box(height: int, width: int, box: Box, low: int = 1) -> UInt8:
    """A black image with noise of at least `low` in one box."""
    grey = np.zeros((height, width), np.uint8)
    grey[box.window] = np.random.default_rng(box.top).integers(low, 256, (box.height, box.width))
    return grey


def plain_bilinear(grey: UInt8, height: int, width: int) -> UInt8:
    """Interpolate between the centres of the two nearest pixels in either direction, without antialias."""

    def along(count: int, length: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        at = ((np.arange(count) + 0.5) * length / count - 0.5).clip(0, length - 1)
        first = np.floor(at).astype(np.intp)
        return first, np.minimum(first + 1, length - 1), at - first

    values = grey.astype(np.float64)
    top, bottom, down = along(height, grey.shape[0])
    left, right, across = along(width, grey.shape[1])
    rows = values[top] * (1 - down)[:, None] + values[bottom] * down[:, None]
    return np.asarray(np.rint(rows[:, left] * (1 - across) + rows[:, right] * across), np.uint8)


def plain_bilateral(grey: UInt8) -> npt.NDArray[np.float64]:
    """The filter's definition: weights fall with distance and with difference, in a circle of radius 4."""
    values, total, weights = grey.astype(np.float64), np.zeros(grey.shape), np.zeros(grey.shape)
    padded = np.pad(values, REACH, mode="reflect")
    height, width = grey.shape
    for y in range(2 * REACH + 1):
        for x in range(2 * REACH + 1):
            distance = (y - REACH) ** 2 + (x - REACH) ** 2
            if distance > REACH**2:
                continue
            there = padded[y : y + height, x : x + width]
            weight = np.exp(-(distance + (there - values) ** 2) / (2 * 75.0**2))
            total += weight * there
            weights += weight
    return np.asarray(total / weights)


def test_what_fits_is_pasted_unscaled_and_smoothed() -> None:
    box = Box(30, 5, 21, 34)
    grey = lone_box(64, 50, box)
    canvas = np.zeros((40, 40), np.uint8)
    canvas[9:30, 3:37] = grey[30:51, 5:39]
    prepared = fit(grey, 40)
    assert prepared.geometry == Geometry(64, 50, 40, box, Box(9, 3, 21, 34))
    assert prepared.image.dtype == np.uint8
    assert (prepared.image == prepared.image[..., :1]).all()
    assert np.abs(prepared.image[..., 0] - plain_bilateral(canvas)).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(100, 60), (41, 40), (37, 90)])
def test_what_does_not_fit_is_shrunk_with_its_aspect(height: int, width: int) -> None:
    noise = lone_box(height, width, Box(0, 0, height, width), low=60)
    grey = np.pad(noise, ((3, 2), (0, 7)))
    scale = min(40 / height, 40 / width)
    inner_height, inner_width = int(height * scale), int(width * scale)
    place = Box((40 - inner_height) // 2, (40 - inner_width) // 2, inner_height, inner_width)
    canvas = np.zeros((40, 40), np.uint8)
    canvas[place.window] = plain_bilinear(grey[3 : 3 + height, :width], inner_height, inner_width)
    prepared = fit(grey, 40)
    assert prepared.geometry == Geometry(height + 5, width + 7, 40, Box(3, 0, height, width), place)
    # One level from rounding after the resize, one from rounding after the filter.
    assert np.abs(prepared.image[..., 0] - plain_bilateral(canvas)).max() <= 2


def test_sizes_are_truncated_in_floating_point() -> None:
    assert 224 / 277 * 277 < 224
    assert fit(np.full((277, 554), 90, np.uint8), 224).geometry.place == Box(56, 0, 111, 223)
    assert fit(np.full((277, 100), 90, np.uint8), 224).geometry.place == Box(0, 72, 223, 80)


def test_grey_is_the_luma_and_equal_channels_stay_equal() -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [13, 200, 77], [90, 91, 250]], np.uint8)
    for red, green, blue in colours.astype(int).tolist():
        flat = preprocess(np.full((12, 12, 3), (red, green, blue), np.uint8), PreprocessSpec("liver", 12)).image
        assert (flat == (red * 9798 + green * 19235 + blue * 3735 + 2**14) >> 15).all()
    for level in range(256):
        assert (fit(np.full((12, 12), level, np.uint8), 12).image == level).all()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_box_anywhere(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    size = data.draw(st.integers(1, 40))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = Box(top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left)))
    image, geometry = fit(lone_box(height, width, box), size)
    place = geometry.place
    assert (geometry.height, geometry.width, geometry.size, geometry.box) == (height, width, size, box)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert image.flags.owndata
    if box.height <= size and box.width <= size:
        assert (place.height, place.width) == (box.height, box.width)
    else:
        longer = max(box.height, box.width)
        assert max(place.height, place.width) in (size - 1, size) or size == 1
        for side, was in ((place.height, box.height), (place.width, box.width)):
            assert max(1, was * size // longer - 1) <= side <= max(1, was * size // longer)
    assert 0 <= size - place.height - 2 * place.top <= 1
    assert 0 <= size - place.width - 2 * place.left <= 1
    near = np.zeros((size, size), np.bool_)
    near[max(0, place.top - REACH) : place.top + place.height + REACH, :] = True
    near[:, : max(0, place.left - REACH)] = False
    near[:, place.left + place.width + REACH :] = False
    assert not image[~near].any()


@pytest.mark.parametrize("side", [(1, 1), (7, 300), (500, 500)])
def test_black_stays_black(side: tuple[int, int]) -> None:
    image, geometry = fit(np.zeros(side, np.uint8), 32)
    assert geometry == Geometry(*side, 32, None, Box(0, 0, 0, 0))
    assert image.shape == (32, 32, 3)
    assert not image.any()
    assert geometry.map_back(np.ones((32, 32), np.float32)).tolist() == np.zeros(side).tolist()
    assert not geometry.image_back(np.full((32, 32, 3), 9, np.uint8)).any()
    assert not geometry.warp_mask(np.ones(side, np.bool_)).any()


def test_single_pixels_and_thin_lines() -> None:
    for place in ((0, 0), (0, 49), (29, 0), (29, 49), (11, 22)):
        grey = np.zeros((30, 50), np.uint8)
        grey[place] = 200
        image, geometry = fit(grey, 32)
        assert (geometry.box, geometry.place) == (Box(*place, 1, 1), Box(15, 15, 1, 1))
        assert int(image[..., 0].argmax()) == 15 * 32 + 15
    for shape, place_of in (((1, 5000), Box(111, 0, 1, 224)), ((5000, 1), Box(0, 111, 224, 1))):
        image, geometry = fit(np.full(shape, 255, np.uint8), 224)
        assert geometry.place == place_of
        assert image[place_of.window].min() > 0


def test_the_number_of_threads_changes_nothing() -> None:
    before = cv2.getNumThreads()
    grey = lone_box(700, 900, Box(10, 20, 600, 800))
    try:
        seen = []
        for threads in (1, 2, 5):
            cv2.setNumThreads(threads)
            seen.append(fit(grey, 512).image.tobytes())
    finally:
        cv2.setNumThreads(before)
    assert len(set(seen)) == 1


def test_files_in_colour_and_16_bit(tmp_path: Path) -> None:
    spec = PreprocessSpec("liver", 32)
    grey = lone_box(60, 80, Box(40, 10, 20, 50))
    expected = fit(grey, 32)
    files = {
        "grey.png": Image.fromarray(grey),
        "colour.png": Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2)),
        "sixteen.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "sixteen.tiff": Image.fromarray(grey.astype(np.uint16) * 256),
    }
    for name, picture in files.items():
        picture.save(tmp_path / name)
        read = preprocess(read_image(tmp_path / name).pixels, spec)
        assert read.geometry == expected.geometry, name
        assert read.image.tobytes() == expected.image.tobytes(), name


def test_the_specification_of_liver_states_its_steps() -> None:
    spec = PreprocessSpec("liver", 224)
    stored = spec.to_dict()
    assert stored["bilateral"] == {"d": 9, "sigma_colour": 75, "sigma_space": 75}
    assert PreprocessSpec.from_dict(stored) == spec
    assert spec.sha256() != PreprocessSpec("resize", 224).sha256()
    assert "bilateral: None -> {'d': 9, 'sigma_colour': 75, 'sigma_space': 75}" in spec.diff(PreprocessSpec())
    assert "kind: 'liver' -> 'resize'" in PreprocessSpec().diff(spec)
    with pytest.raises(ManifestError, match=r"bilateral: got {'d': 5}, this version of qfae knows only {'d': 9, "):
        PreprocessSpec.from_dict({**stored, "bilateral": {"d": 5}})
    with pytest.raises(ManifestError, match="unknown key 'bilateral'"):
        PreprocessSpec.from_dict({**PreprocessSpec().to_dict(), "bilateral": {"d": 9}})
