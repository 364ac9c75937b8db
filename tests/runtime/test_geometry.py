"""Maps back to the image, masks along to the square: for both kinds of preprocessing, for any box and place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qfae_runtime.arrays import Bool
from qfae_runtime.geometry import Box, Geometry
from qfae_runtime.preprocess import PreprocessSpec, preprocess


@st.composite
def liver_geometries(draw: st.DrawFn) -> Geometry:
    """What liver preprocessing says of an image with one bright box anywhere in it."""
    height, width, size = draw(st.integers(1, 90)), draw(st.integers(1, 90)), draw(st.integers(8, 40))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    rows, columns = draw(st.integers(1, height - top)), draw(st.integers(1, width - left))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[top : top + rows, left : left + columns] = 100
    return preprocess(pixels, PreprocessSpec("liver", size)).geometry


def box_of(geometry: Geometry) -> Box:
    assert geometry.box is not None
    return geometry.box


def extent(mask: Bool) -> list[int]:
    """First and last row, first and last column of what is set."""
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    return [int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 40))
def test_resize_goes_straight_there_and_back(height: int, width: int, size: int) -> None:
    rng = np.random.default_rng(height)
    geometry = preprocess(np.zeros((height, width, 3), np.uint8), PreprocessSpec(image_size=size)).geometry
    values = rng.random((size, size), dtype=np.float32)
    expected = np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))
    assert geometry.map_back(values).tobytes() == expected.tobytes()
    mask = rng.random((height, width)) > 0.5
    nearest = Image.fromarray(mask.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    assert geometry.warp_mask(mask).tobytes() == np.asarray(nearest).tobytes()


@settings(max_examples=100, deadline=None)
@given(liver_geometries())
def test_liver_maps_come_back_into_the_box_alone(geometry: Geometry) -> None:
    box, place = box_of(geometry), geometry.place
    square = np.full((geometry.size, geometry.size), 7, np.float32)  # what must not come back
    square[place.window] = 0.25
    back = geometry.map_back(square)
    assert back.shape == (geometry.height, geometry.width)
    assert back.dtype == np.float32
    outside = np.ones(back.shape, np.bool_)
    outside[box.window] = False
    assert (back[outside] == 0).all()
    np.testing.assert_allclose(back[box.window], 0.25, rtol=1e-6)
    picture = geometry.image_back(np.repeat((square * 4).astype(np.uint8)[:, :, None], 3, axis=2))
    assert picture.shape == (*back.shape, 3)
    assert (picture[outside] == 0).all()
    assert (picture[box.window] == 1).all()


@settings(max_examples=100, deadline=None)
@given(liver_geometries(), st.data())
def test_a_mask_goes_and_comes_back_to_where_it_was(geometry: Geometry, data: st.DataObject) -> None:
    box, place = box_of(geometry), geometry.place
    top, left = data.draw(st.integers(0, box.height - 1)), data.draw(st.integers(0, box.width - 1))
    mask = np.zeros((geometry.height, geometry.width), np.bool_)
    mask[box.window][top:, left:] = True
    warped = geometry.warp_mask(mask)
    assert set(np.unique(warped)) <= {0, 1}
    inner = warped.copy()
    inner[place.window] = 0
    assert not inner.any()
    back = geometry.map_back(warped.astype(np.float32))
    if (place.height, place.width) == (box.height, box.width):
        np.testing.assert_array_equal(back, mask)  # unscaled: exactly
    elif warped.any():
        step = max(box.height / place.height, box.width / place.width)
        there, again = extent(mask), extent(back >= 0.5)
        assert max(abs(a - b) for a, b in zip(there, again, strict=True)) <= step
        assert again[1::2] == there[1::2]  # corners of the box stay corners


@settings(max_examples=50, deadline=None)
@given(liver_geometries())
def test_masks_take_the_pixel_at_the_centre(geometry: Geometry) -> None:
    box, place = box_of(geometry), geometry.place
    mask = np.random.default_rng(box.height).random((geometry.height, geometry.width)) > 0.5
    down = (np.arange(place.height) + 0.5) * box.height / place.height
    across = (np.arange(place.width) + 0.5) * box.width / place.width
    expected = mask[np.ix_(down.astype(int) + box.top, across.astype(int) + box.left)]
    # A centre on the edge of two pixels may take either.
    clear = np.ix_(np.abs(down - np.rint(down)) > 1e-6, np.abs(across - np.rint(across)) > 1e-6)
    np.testing.assert_array_equal(geometry.warp_mask(mask)[place.window][clear], expected[clear])


@settings(max_examples=100, deadline=None)
@given(liver_geometries(), st.integers(1, 60), st.integers(1, 60))
def test_a_thumbnail_has_the_box_where_the_image_has_it(geometry: Geometry, height: int, width: int) -> None:
    before, small = box_of(geometry), geometry.at_size(height, width)
    box = box_of(small)
    assert (small.height, small.width, small.place) == (height, width, geometry.place)
    for start, length, was, was_length, new, old in (
        (box.top, box.height, before.top, before.height, height, geometry.height),
        (box.left, box.width, before.left, before.width, width, geometry.width),
    ):
        assert length >= 1
        assert 0 <= start < start + length <= new
        assert abs(start - was * new / old) <= 1
        assert abs(start + length - (was + was_length) * new / old) <= (1 if length > 1 else 1.5)
        assert (start == 0) or was > 0
        assert (start + length == new) or was + was_length < old
    whole = Geometry.whole(geometry.height, geometry.width, 8).at_size(height, width)
    assert whole == Geometry.whole(height, width, 8)
    black = Geometry(geometry.height, geometry.width, 8, None, Box(0, 0, 0, 0)).at_size(height, width)
    assert black == Geometry(height, width, 8, None, Box(0, 0, 0, 0))


def test_images_come_back_smooth() -> None:
    ramp = np.repeat(np.arange(0, 200, 50, dtype=np.uint8)[None, :, None].repeat(4, axis=0), 3, axis=2)
    back = Geometry.whole(16, 16, 4).image_back(ramp)
    assert len(np.unique(back)) > 8
    assert (np.diff(back[:, 2:14, 0].astype(int), axis=1) > 0).all()


def test_mask_of_another_size_is_refused() -> None:
    for geometry in (Geometry.whole(10, 20, 8), Geometry(10, 20, 8, Box(2, 3, 4, 5), Box(2, 1, 4, 5))):
        with pytest.raises(ValueError, match=r"expected \(H, W\) = \(10, 20\), got \(20, 10\)"):
            geometry.warp_mask(np.zeros((20, 10), np.bool_))
