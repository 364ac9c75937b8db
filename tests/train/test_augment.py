"""Augmentations: what they are, what they keep, and that a seed decides them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfae_train.augment import Augmentation, augmentation
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
