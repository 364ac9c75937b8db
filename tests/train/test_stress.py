"""The stress images: the same everywhere, all different, and each what its name says."""

from __future__ import annotations

import numpy as np
import pytest

from qfae_runtime.arrays import UInt8
from qfae_train.stress import stress_images
from tests.export.tiny import pictures

SIZES = (32, 112, 224)
COUNT = 14


def of(size: int) -> dict[str, UInt8]:
    pixels, names = stress_images(size, pictures(5, size))
    return {name.removeprefix("stress image: "): one for name, one in zip(names, pixels, strict=True)}


@pytest.mark.parametrize("size", SIZES)
def test_fourteen_different_images(size: int) -> None:
    pixels, names = stress_images(size, pictures(5, size))
    assert pixels.shape == (COUNT, size, size, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert len(set(names)) == len({one.tobytes() for one in pixels}) == COUNT
    assert all(name.startswith("stress image: ") for name in names)


@pytest.mark.parametrize("size", SIZES)
def test_the_same_again(size: int) -> None:
    np.random.seed(1)  # noqa: NPY002 - a global state that they must not hang on
    one = stress_images(size, pictures(5, size))
    np.random.seed(2)  # noqa: NPY002
    other = stress_images(size, pictures(5, size))
    assert one[1] == other[1]
    np.testing.assert_array_equal(one[0], other[0])


@pytest.mark.parametrize("size", [8, 14, 28, 56, 100, 518])
def test_any_size_and_one_image_will_do(size: int) -> None:
    pixels, _ = stress_images(size, pictures(1, 32)[:, :1, :1].repeat(size, 1).repeat(size, 2))
    assert pixels.shape == (COUNT, size, size, 3)
    assert len({one.tobytes() for one in pixels}) >= COUNT - 1


@pytest.mark.parametrize("size", SIZES)
def test_what_they_hold(size: int) -> None:
    images = of(size)
    assert images["black"].max() == 0
    assert images["white"].min() == 255
    assert set(np.unique(images["checkerboard"])) == {0, 255}
    corners = {tuple(colour) for colour in images["saturated colours"].reshape(-1, 3)}
    assert corners == {(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)}
    assert len(np.unique(images["noise in colours"])) == 256
    ramp = images["grey ramp"]
    assert (ramp[..., 0] == ramp[..., 1]).all()
    assert (ramp.min(), ramp.max()) == (0, 255)


@pytest.mark.parametrize("size", SIZES)
def test_no_order_of_the_channels_is_the_same_image(size: int) -> None:
    images = of(size)
    for name in ("saturated colours", "colour ramps", "noise in colours"):
        orders = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
        assert len({images[name][..., list(order)].tobytes() for order in orders}) == 6, name


@pytest.mark.parametrize("size", SIZES)
def test_every_corner_and_every_border_has_something_bright(size: int) -> None:
    pixels, names = stress_images(size, np.zeros((3, size, size, 3), np.uint8))
    marked = [one == 255 for one, name in zip(pixels, names, strict=True) if "with bright marks" in name]
    assert len(marked) == 4
    middle = (size - 1) // 2
    corners = ((0, 0), (0, -1), (-1, 0), (-1, -1))
    borders = ((0, middle), (middle, 0), (-1, middle), (middle, -1))
    for place in (*corners, *borders):
        assert sum(bool(one[place].all()) for one in marked) == 1, place
    assert all(one.mean() < 0.01 for one in marked), "small: the rest is a picture that is rebuilt well"


def test_some_are_made_of_the_parity_images() -> None:
    like = pictures(5, 32)
    images = of(32)
    np.testing.assert_array_equal(images["a parity image inverted"], 255 - like[2])
    faint = images["a parity image mirrored and faint"].astype(float)
    mirrored = like[-1][:, ::-1].astype(float)
    assert np.corrcoef(faint.ravel(), mirrored.ravel())[0, 1] > 0.9
    assert faint.std() == pytest.approx(mirrored.std() / 16, rel=0.05)
    assert faint.mean() == pytest.approx(mirrored.mean(), abs=0.1)
