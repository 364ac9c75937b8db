"""Training augmentations, in the order of the supplement's section 1.4, by torchvision."""

from __future__ import annotations

from collections.abc import Callable

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
