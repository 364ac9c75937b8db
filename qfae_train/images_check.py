"""What cannot be trained on is refused before the first epoch: images that are alike, features that are alike.

Training needs images that differ from each other, and features that differ with them. Where they do not, whitening and
the least-squares fits of the aligned initialisation divide by next to nothing, and the perceptual loss has no gradient:
hours later the loss is NaN, or the model knows one picture.

Letters: N images, n of them that are looked at, L tokens, C width of a backbone, P values of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qfae_train.autoencoder import AnomalyScorer, frozen_entries, normalise
from qfae_train.config import Config
from qfae_train.data import DataError, Split
from qfae_train.encoder import Encoder
from qfae_train.weights import WeightsError

FEWEST_SEEN = 4
"""Different images that the frozen networks are tried on, at least; more where their tokens are few."""

ROUNDING = 2.0**-18
"""Deviations below this share of the features' root mean square are rounding: 2^-24 in FP32, summed over the blocks."""

FEWEST_DIRECTIONS = 2
"""Directions that features must vary in. In one alone, all channels alike, cosines of features are 1 or -1."""

_CHUNK = 64
"""Images that are compared at a time: 26 MB in float64 at 224 pixels."""

_BATCH = 8
"""Images that the frozen networks look at at a time."""


def check_images(data: Path, train: Split) -> None:
    """Refuse training images that show one picture, whatever their names.

    Raises:
        DataError: each image is of one colour, or all are the same picture up to brightness and contrast.

    """
    images = train.images.flatten(1)  # [N, P]
    got = f"data '{data}': {len(images)} training image{'s' if len(images) > 1 else ''}"
    why = "the model learns what different pictures have in common; look at what train/good holds, and at [preprocess]"
    plain = torch.cat([(part == part[:, :1, :1]).flatten(1).all(dim=1) for part in train.images.split(_CHUNK)])
    pictures = (~plain).nonzero()[:, 0]
    if not len(pictures):
        low, high = int(images.min()), int(images.max())
        colour = "black" if high == 0 else f"level {low}" if low == high else f"levels {low} to {high}"
        raise DataError(f"{got}, each of one colour throughout ({colour}), expected pictures: {why}")
    # The one of most contrast: the others follow from it by gains of at most one, which raise no rounding.
    base = images[pictures[torch.cat([part.float().var(dim=1) for part in images[pictures].split(_CHUNK)]).argmax()]]
    if all(bool((part == base).all()) for part in images.split(_CHUNK)):
        alike = "all the same picture, " if len(images) > 1 else ""
        raise DataError(f"{got}, {alike}expected different ones: {why}")
    if all(bool(_of_one_picture(images[part], base).all()) for part in pictures.split(_CHUNK)):
        raise DataError(f"{got} that differ in nothing but brightness and contrast, expected different ones: {why}")


def _of_one_picture(images: Tensor, base: Tensor) -> Tensor:
    """Tell of each of uint8 (n, P) whether it is gain * base (P,) + offset, clipped and rounded to grey levels.

    Rounded, that is, twice: when the brightness was changed, and when the image was resized.
    """
    x, y = base.double()[None], images.double()
    inside = ((images > 0) & (images < 255) & (base > 0) & (base < 255)).double()  # what is clipped follows no line
    count = inside.sum(dim=1).clamp_min(1)
    x_mean, y_mean = (inside * x).sum(dim=1) / count, (inside * y).sum(dim=1) / count
    x_off, y_off = inside * (x - x_mean[:, None]), inside * (y - y_mean[:, None])
    gain = (x_off * y_off).sum(dim=1) / x_off.square().sum(dim=1).clamp_min(1e-9)
    line = (gain[:, None] * (x - x_mean[:, None]) + y_mean[:, None]).clamp(0, 255)
    off = y - line
    # Where the base is clipped, what it showed lies beyond its level, and so does the image's.
    beyond = torch.where(base == 255, 1.0, torch.where(base == 0, -1.0, 0.0)) * gain.sign()[:, None]
    off = torch.where(beyond * off > 0, 0.0, off)
    close = off.abs().amax(dim=1) <= gain.abs() + 1.5  # one level each, and half of one for the fit
    # In images of a few levels rounding would excuse everything.
    explained = (inside * off).square().sum(dim=1) <= 0.05 * y_off.square().sum(dim=1)
    return close & explained & (inside.sum(dim=1) > 1) | (images == base).all(dim=1)


class _Frozen(NamedTuple):
    """A frozen network in the words of a message."""

    name: str
    cure: str


def check_features(
    config: Config,
    scorer: AnomalyScorer,
    records: list[dict[str, str]],
    data: Path,
    train: Split,
    say: Callable[[str], None],
) -> None:
    """Refuse frozen networks whose features cannot tell the training images apart; `say` takes what is merely unusual.

    Raises:
        DataError: fewer hidden states in all training images than the encoder has dimensions.
        WeightsError: features are not finite, the same for all images, or the same in all channels.

    """
    frozen = [
        _Frozen(f"{kind} '{entry.timm}' (weights: {record['source']})", f"supply trained weights ({option})")
        for kind, (entry, option), record in zip(
            [*["encoder"] * len(config.model.encoders), "perceptual network"],
            frozen_entries(config),
            records,
            strict=True,
        )
    ]
    encoders = [one for one in scorer.autoencoder.encoders if isinstance(one, Encoder)]
    widths = [(one.context_tokens, one.projection.in_features) for one in encoders]
    for (tokens, width), name in zip(widths, frozen, strict=False):
        if len(train) * tokens <= width:
            raise DataError(
                f"data '{data}': all training images have {len(train)} x {tokens} hidden states, in {width} dimensions "
                f"of the {name.name}, expected more states than dimensions; add images, at least "
                f"{width // tokens + 1} are needed"
            )
    images = different(train, max([FEWEST_SEEN, *(math.ceil(2 * width / tokens) + 1 for tokens, width in widths)]))
    parts = [normalise(part) for part in images.split(_BATCH)]
    with torch.no_grad():
        for encoder, name in zip(encoders, frozen, strict=False):
            states = torch.cat([encoder.hidden(part) for part in parts])
            live = _directions(states, name, "hidden states")
            if live < min(states.shape[2], (len(images) - 1) * states.shape[1]):
                say(
                    f"note: hidden states of the {name.name} vary in {live} of {states.shape[2]} directions, in the "
                    "others they are the same for all images"
                )
        targets = [scorer.loss_target(part) for part in parts]
    for key in targets[0]:
        _directions(torch.cat([target[key] for target in targets]), frozen[-1], f"features of block {key[0]}")


def different(train: Split, count: int) -> Tensor:
    """Return up to `count` different images, uint8 (n, S, S, 3), from all over the split if there are as many."""
    spread = torch.linspace(0, len(train) - 1, min(count, len(train))).round().long().tolist()
    found: dict[bytes, int] = {}
    for number in dict.fromkeys([*spread, *range(len(train))]):
        found.setdefault(train.images[number].contiguous().numpy().tobytes(), number)
        if len(found) == count:
            break
    return train.rgb(torch.tensor(list(found.values())))


def _directions(features: Tensor, frozen: _Frozen, what: str) -> int:
    """Return in how many directions features (n, L, C) of different images vary, at the same place, beyond rounding.

    Raises:
        WeightsError: in fewer than FEWEST_DIRECTIONS, or they are not finite.

    """
    x = features.double()
    if not bool(x.isfinite().all()):
        count = int((~x.isfinite()).sum())
        raise WeightsError(
            f"{what} of the {frozen.name}: {count} of {x.numel()} values are not finite on training images; "
            f"{frozen.cure}"
        )
    varying = (x - x.mean(dim=0)).flatten(0, 1)  # [n * L, C]
    deviations = torch.linalg.eigvalsh(varying.T @ varying / len(varying)).clamp_min(0).sqrt()
    live = int((deviations > ROUNDING * x.square().mean().sqrt()).sum())
    if live < FEWEST_DIRECTIONS:
        got = "are the same for all images" if live == 0 else "differ between images in one direction only"
        raise WeightsError(
            f"{what} of the {frozen.name} {got}, of {len(deviations)} directions, expected features that tell images "
            f"apart; {frozen.cure}"
        )
    return live
