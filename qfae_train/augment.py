"""Training augmentations: those of the supplement's section 1.4, by torchvision, and pasting (off by default)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

from qfae_train import config

Augmentation = Callable[[Tensor], Tensor]
"""uint8 (S, S, 3) to uint8 (S, S, 3)."""


def augmentation(options: config.Augment, image_size: int) -> Augmentation | None:
    """Return the augmentation, or None where the options switch it off.

    Crop, rotation, vertical flip, then brightness and contrast. Images come resized to `image_size` and leave in the
    same size. Randomness comes from torch's generator.
    """
    if not options.enabled:
        return None
    steps = v2.Compose(
        [
            v2.RandomResizedCrop(image_size, options.crop_scale, options.crop_ratio, antialias=True),
            v2.RandomRotation(options.rotation),
            v2.RandomVerticalFlip(options.vertical_flip),
            v2.ColorJitter(brightness=options.jitter, contrast=options.jitter),
        ]
    )

    def apply(image: Tensor) -> Tensor:
        changed: Tensor = steps(image.permute(2, 0, 1))
        return changed.permute(1, 2, 0)

    return apply


PASTE_RADIUS = (0.04, 0.16)
"""Range of a pasted region's mean radius, in units of the image's side."""

PASTE_OPACITY = (0.5, 1.0)


def paste(images: Tensor, probability: float) -> Tensor:
    """Paste a soft-edged ellipse of another image, moved to another place, into some of uint8 (B, S, S, 3).

    The encoder sees the result, the loss the whole image: the autoencoder learns to leave out what does not belong
    where it is. Only normal tissue is pasted (as CutPaste does it, Li et al. 2021, there for a classifier); large
    models pretrained on natural images do not need it, small ones learn to copy whatever the encoder saw.
    """
    if not probability:
        return images
    count, side = images.shape[:2]
    moves = torch.randint(0, side, (count, 2)).tolist()
    foreign = torch.stack([image.roll(move, (0, 1)) for image, move in zip(images.roll(1, 0), moves, strict=True)])
    opacity = torch.empty(count).uniform_(*PASTE_OPACITY) * (torch.rand(count) < probability)
    weight = (opacity[:, None, None] * ellipses(count, side))[..., None]
    return torch.lerp(images.float(), foreign.float(), weight).round().to(torch.uint8)


def ellipses(count: int, side: int) -> Tensor:
    """Return random soft-edged ellipses, float32 (count, side, side) from 0 to 1, anywhere in the image."""
    centre = torch.rand(2, count, 1, 1)
    radius = torch.empty(count, 1, 1).uniform_(*PASTE_RADIUS)
    stretch = torch.empty(count, 1, 1).uniform_(-0.4, 0.4).exp()
    angle = torch.rand(count, 1, 1) * math.pi
    at = (torch.arange(side) + 0.5) / side
    rows, columns = at[:, None] - centre[0], at[None, :] - centre[1]
    along = (angle.cos() * rows - angle.sin() * columns) * stretch
    across = (angle.sin() * rows + angle.cos() * columns) / stretch
    inside: Tensor = torch.sigmoid((radius - torch.hypot(along, across)) * side)  # soft over about two pixels
    return inside
