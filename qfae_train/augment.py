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

PASTE_BRIGHTNESS = (0.8, 1.2)
"""Range of the factor on a pasted region's grey levels: lesions differ from what surrounds them in brightness, too."""

BACKGROUND = 8
"""Pixels with no channel above this grey level show nothing: black, up to the noise and compression of scanners."""


def paste(images: Tensor, probability: float) -> Tensor:
    """Paste a soft-edged ellipse of another image, moved to another place, into some of uint8 (B, S, S, 3).

    Its centre is where both images show something (anywhere if there is no such place: background on background would
    change nothing, and a region on the background is told from an image too easily); its brightness is changed by a
    factor. Returns the images themselves at probability 0, else new ones. Randomness comes from torch's generator.

    The encoder sees the result, the loss the whole image: the autoencoder learns to leave out what does not belong
    where it is. Only normal tissue is pasted (as CutPaste does it, Li et al. 2021, there for a classifier); large
    models pretrained on natural images do not need it, small ones learn to copy whatever the encoder saw.
    """
    if not probability:
        return images
    count, side = images.shape[:2]
    moves = torch.randint(0, side, (count, 2)).tolist()
    foreign = torch.stack([image.roll(move, (0, 1)) for image, move in zip(images.roll(1, 0), moves, strict=True)])
    both = (images.amax(dim=-1) > BACKGROUND) & (foreign.amax(dim=-1) > BACKGROUND)
    opacity = torch.empty(count).uniform_(*PASTE_OPACITY) * (torch.rand(count) < probability)
    weight = opacity[:, None, None] * ellipses(centres(both), side)
    factor = torch.empty(count, 1, 1, 1).uniform_(*PASTE_BRIGHTNESS)
    brightened = (foreign * factor).clamp_(max=255)
    return images.float().lerp_(brightened, weight[..., None]).round_().to(torch.uint8)


def centres(allowed: Tensor) -> Tensor:
    """Draw one pixel of each bool (B, S, S) among those allowed, or among all where none is.

    Returns the pixels' centres, float32 (B, 2) as (row, column) in units of the image's side.
    """
    count, side = allowed.shape[:2]
    allowed = allowed | ~allowed.flatten(1).any(dim=1)[:, None, None]
    pixels = allowed.nonzero()  # (all allowed, 3): image, row, column; sorted by the image
    numbers = allowed.flatten(1).sum(dim=1)
    drawn = numbers.cumsum(0) - numbers + (torch.rand(count, dtype=torch.float64) * numbers).long()
    return (pixels[drawn, 1:] + 0.5) / side


def ellipses(centre: Tensor, side: int) -> Tensor:
    """Return random soft-edged ellipses, float32 (B, side, side) from 0 to 1, around what `centres` returns."""
    count = len(centre)
    radius = torch.empty(count, 1, 1).uniform_(*PASTE_RADIUS)
    stretch = torch.empty(count, 1, 1).uniform_(-0.4, 0.4).exp()
    angle = torch.rand(count, 1, 1) * math.pi
    at = (torch.arange(side) + 0.5) / side
    rows, columns = at[:, None] - centre[:, 0, None, None], at[None, :] - centre[:, 1, None, None]
    along = (angle.cos() * rows - angle.sin() * columns) * stretch
    across = (angle.sin() * rows + angle.cos() * columns) / stretch
    inside: Tensor = torch.sigmoid((radius - torch.hypot(along, across)) * side)  # soft over about two pixels
    return inside
