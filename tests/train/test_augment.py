"""Augmentations: what they are, what they keep, and that a seed decides them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from qfae_train.augment import (
    BACKGROUND,
    PASTE_BRIGHTNESS,
    PASTE_OPACITY,
    PASTE_RADIUS,
    Augmentation,
    augmentation,
    centres,
    ellipses,
    paste,
)
from qfae_train.config import Augment

STILL = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "rotation": 0.0, "vertical_flip": 0.0, "jitter": 0.0}


def made(**options: object) -> Augmentation:
    found = augmentation(Augment(**(STILL | options)), 32)  # type: ignore[arg-type]
    assert found is not None
    return found


def image() -> Tensor:
    rows, cols = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    return torch.stack([rows * 6 + 30, cols * 6 + 30, rows + cols], dim=-1).to(torch.uint8)


def test_off() -> None:
    assert augmentation(Augment(enabled=False), 32) is None


def test_size_and_type_are_kept_and_the_seed_decides() -> None:
    change = augmentation(Augment(), 32)
    assert change is not None

    def series(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [change(image()) for _ in range(4)]

    for one, again, other in zip(series(1), series(1), series(2), strict=True):
        assert one.shape == (32, 32, 3)
        assert one.dtype == torch.uint8
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
    assert not torch.equal(series(1)[0], series(1)[1])


PUBLISHED_ORDER = ("RandomResizedCrop", "RandomRotation", "RandomVerticalFlip", "ColorJitter")


def test_the_published_steps_in_their_order_with_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Supplement 1.4; the image comes resized and is normalised afterwards."""
    seen: list[tuple[str, Any]] = []

    def spied(name: str) -> type:
        original: Any = getattr(v2, name)

        class Spy(original):  # type: ignore[misc]
            def forward(self, *inputs: Any) -> Any:
                seen.append((name, self))
                return super().forward(*inputs)

        return Spy

    for name in PUBLISHED_ORDER:
        monkeypatch.setattr(v2, name, spied(name))
    change = augmentation(Augment(), 224)
    assert change is not None
    change(torch.zeros(224, 224, 3, dtype=torch.uint8))

    assert tuple(name for name, _ in seen) == PUBLISHED_ORDER
    crop, rotation, flip, jitter = (step for _, step in seen)
    assert (tuple(crop.size), crop.scale, crop.ratio) == ((224, 224), (0.9, 1.0), (0.8, 1.2))
    assert list(rotation.degrees) == [-10, 10]
    assert flip.p == 0.5
    assert (jitter.brightness, jitter.contrast) == (pytest.approx((0.9, 1.1)), pytest.approx((0.9, 1.1)))
    assert jitter.saturation is jitter.hue is None


def test_nothing_to_do_changes_nothing() -> None:
    assert torch.equal(made()(image()), image())


def test_the_flip_is_vertical() -> None:
    assert torch.equal(made(vertical_flip=1.0)(image()), image().flip(0))


def test_the_crop_enlarges_a_part() -> None:
    torch.manual_seed(0)
    change = made(crop_scale=(0.5, 0.5))
    for _ in range(5):
        rows = change(image())[:, :, 0].float()
        # Half of the area is 0.71 of the side, spread over all of it: the ramp of 6 a row becomes one of 4.2.
        assert float((rows[28] - rows[4]).mean()) / 24 == pytest.approx(6 * 0.5**0.5, rel=0.1)


def test_the_rotation_stays_within_its_range() -> None:
    torch.manual_seed(0)
    change = augmentation(Augment(**(STILL | {"rotation": 10.0})), 128)  # type: ignore[arg-type]
    assert change is not None
    ramp = torch.arange(60, 188, dtype=torch.uint8)[:, None, None].expand(128, 128, 3)
    angles = []
    for _ in range(40):
        centre = change(ramp)[32:96, 32:96, 0].float()
        down, right = centre[-8:].mean() - centre[:8].mean(), centre[:, -8:].mean() - centre[:, :8].mean()
        angles.append(float(torch.rad2deg(torch.atan2(right, down))))
    assert max(abs(angle) for angle in angles) < 10.5
    assert min(angles) < -8
    assert max(angles) > 8


def test_brightness_and_contrast_change_by_at_most_their_range() -> None:
    torch.manual_seed(0)
    change = made(jitter=0.1)
    flat = torch.full((32, 32, 3), 100, dtype=torch.uint8)
    levels = [int(change(flat)[0, 0, 0]) for _ in range(60)]  # contrast leaves a flat image alone
    assert 89 <= min(levels) < 94
    assert 106 < max(levels) <= 111


def test_pasting_changes_one_soft_region_and_no_more() -> None:
    torch.manual_seed(0)
    images = torch.zeros(64, 40, 40, 3, dtype=torch.uint8)
    images[1::2] = 200

    seen = paste(images, 1.0)

    changed = (seen.int() - images.int()).abs()
    assert seen.shape == images.shape
    assert seen.dtype == torch.uint8
    # At most the brightened 240 at full opacity, at least half of the darkened 160 in the middle of what is pasted.
    assert changed.max() <= 240
    largest = changed.flatten(1).amax(dim=1)
    assert (largest > 75).float().mean() > 0.9
    share = (changed[..., 0] > 20).float().mean(dim=(1, 2))
    assert share.max() < math.pi * (PASTE_RADIUS[1] + 2.5 / 40) ** 2  # the edge is soft over some pixels
    assert share.mean() > 0.01


def test_pasting_follows_its_probability_and_the_seed() -> None:
    images = torch.randint(0, 256, (200, 16, 16, 3), dtype=torch.uint8)

    def pasted(probability: float) -> Tensor:
        torch.manual_seed(3)
        return paste(images, probability)

    assert paste(images, 0.0) is images
    assert torch.equal(pasted(0.5), pasted(0.5))
    assert not torch.equal(paste(images, 0.5), pasted(0.5))  # the generator went on
    share = (pasted(0.5) != images).flatten(1).any(dim=1).float().mean()
    assert 0.35 < share < 0.6


def test_what_is_pasted_comes_from_another_image_at_another_place() -> None:
    torch.manual_seed(1)
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    images[1, ..., 0] = 240  # only the second image is red

    seen = paste(images, 1.0)

    assert seen[0, ..., 0].max() > 100
    assert seen[0, ..., 1:].max() == 0
    assert seen[1, ..., 0].min() < 140


def centre_changed(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Where a white image's pasted region lies: the middle of its bounding box."""
    rows, columns = torch.nonzero((before.int() - after.int()).abs().amax(dim=-1) > 40, as_tuple=True)
    return float(rows.min() + rows.max()) / 2, float(columns.min() + columns.max()) / 2


def test_the_centre_lies_where_both_images_show_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image shows a square, of another brightness; the background is not quite black."""
    drawn: list[Tensor] = []

    def spied(allowed: Tensor) -> Tensor:
        drawn.append(centres(allowed))
        return drawn[-1]

    monkeypatch.setattr("qfae_train.augment.centres", spied)
    torch.manual_seed(4)
    images = torch.randint(0, BACKGROUND + 1, (300, 48, 48, 3), dtype=torch.uint8)
    images[0::2, 4:34, 6:36] = 120
    images[1::2, 14:44, 10:40] = 250

    seen = paste(images, 1.0)

    rows, columns = (drawn[0] * 48 - 0.5).round().long().unbind(dim=1)
    here = images[torch.arange(300), rows, columns].amax(dim=-1) > BACKGROUND
    assert here.float().mean() > 0.98  # two squares of 30 in 48, moved around the edge, nearly always overlap
    # The foreign square is there, too: 120 <-> 250 changed by at least half of the distance that brightness leaves.
    change = (seen.int() - images.int())[torch.arange(300), rows, columns, 0]
    assert (change[0::2] > (250 * PASTE_BRIGHTNESS[0] - 120) * PASTE_OPACITY[0] * 0.9)[here[0::2]].all()
    assert (change[1::2] < (120 * PASTE_BRIGHTNESS[1] - 250) * PASTE_OPACITY[0] * 0.9)[here[1::2]].all()
    assert (change[1::2] > -250 + 120 * PASTE_BRIGHTNESS[0])[here[1::2]].all()  # not the background's 0 to 8


def test_centres_are_every_allowed_pixel_and_no_other() -> None:
    torch.manual_seed(0)
    allowed = torch.zeros(4000, 4, 4, dtype=torch.bool)
    allowed[:2000, 1, 2] = allowed[:2000, 3, 0] = True

    drawn = centres(allowed)

    assert drawn.dtype == torch.float32
    pixels, counts = (drawn[:2000] * 4).unique(dim=0, return_counts=True)
    assert pixels.tolist() == [[1.5, 2.5], [3.5, 0.5]]
    assert counts.min() > 900
    pixels, counts = (drawn[2000:] * 4).unique(dim=0, return_counts=True)  # nothing allowed: anywhere
    assert len(pixels) == 16
    assert 80 < counts.min() < counts.max() < 180


def test_black_images_are_pasted_into_anywhere() -> None:
    torch.manual_seed(0)
    black = torch.zeros(40, 32, 32, 3, dtype=torch.uint8)
    assert torch.equal(paste(black, 1.0), black)
    assert torch.equal(paste(black[:1], 1.0), black[:1])
    grey = black.clone()
    grey[1::2] = 100

    seen = paste(grey, 1.0)

    places = torch.tensor([centre_changed(*pair) for pair in zip(grey[1::2], seen[1::2], strict=True)])
    assert (seen != grey).flatten(1).any(dim=1).all()
    assert places.amin() < 8
    assert places.amax() > 24


def test_brightness_changes_by_at_most_its_range() -> None:
    torch.manual_seed(0)
    images = torch.full((400, 32, 32, 3), 100, dtype=torch.uint8)

    seen = paste(images, 1.0)

    lowest, highest = seen.flatten(1).amin(dim=1), seen.flatten(1).amax(dim=1)
    assert (lowest.int() >= 80).all()
    assert (highest.int() <= 120).all()
    assert 80 <= lowest.min() < 84
    assert 116 < highest.max() <= 120
    assert ((lowest == 100) | (highest == 100)).all()  # one factor for the whole region
    assert int(paste(torch.full_like(images, 255), 1.0).min()) >= 204  # 1.2 * 255 is white, and does not wrap around


def test_ellipses_are_of_the_stated_size_and_everywhere() -> None:
    torch.manual_seed(0)
    found = ellipses(torch.rand(800, 2), 64)
    # Of those that lie inside the image: area pi r^2, with r uniform in the range.
    inside = found[(found[:, [0, -1]].amax(dim=(1, 2)) < 0.01) & (found[:, :, [0, -1]].amax(dim=(1, 2)) < 0.01)]
    radius = (inside.mean(dim=(1, 2)) / torch.pi).sqrt()
    assert found.min() >= 0
    assert found.max() <= 1
    assert radius.min() > 0.8 * PASTE_RADIUS[0]
    assert radius.max() < 1.15 * PASTE_RADIUS[1]
    assert (found.amax(dim=0) > 0.9).all()  # corners included
