"""Engines that know every image's right answer, and references to measure them against."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import EllipsisType
from typing import Any, Self

import numpy as np

from qfae_export.images import ParityImages
from qfae_export.reference import scale_of
from qfae_runtime.agreement import Reference
from qfae_runtime.arrays import UInt8
from qfae_runtime.contract import CONTRACTS
from qfae_runtime.engines.base import Scores
from qfae_runtime.yardstick import COLUMNS, Yardstick
from tests.export.tiny import pictures

SIZE = 8
COUNT = 10
OWN = 1e-5
"""PyTorch FP32's own error of every image here, and the share of reconstructed values that it gets wrong."""

Fault = Callable[[Scores, "list[int]"], object]


class Echo:
    """An engine that knows every image's right answer, and spoils what a fault makes of it. Keeps to Engine."""

    image_size, max_batch, backend, device, version = SIZE, COUNT, "echo", "cpu", "1"
    batches: tuple[int, ...] = (1, 3, COUNT)

    def __init__(self, images: ParityImages, scores: Scores, fault: Fault) -> None:
        self._numbers = {image.tobytes(): number for number, image in enumerate(images.pixels)}
        self._scores = scores
        self._fault = fault

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        numbers = [self._numbers[image.tobytes()] for image in images]
        answer = self._scores.of(numbers)
        self._fault(answer, numbers)
        return answer

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None: ...


def made_up_images(count: int = COUNT) -> ParityImages:
    labels = tuple(number % 2 == 1 for number in range(count))
    return ParityImages(pictures(count, SIZE), tuple(f"{number}.png" for number in range(count)), "made up", labels)


def made_up(images: ParityImages | None = None) -> Reference:
    """Outputs drawn at random, and a yardstick of OWN everywhere."""
    images = images or made_up_images()
    count, rng = len(images), np.random.default_rng(5)
    scores = Scores(
        rng.uniform(0.05, 0.5, count).astype(np.float32),
        rng.uniform(0.02, 0.5, (count, SIZE, SIZE)).astype(np.float32),
        rng.integers(0, 250, (count, SIZE, SIZE, 3), dtype=np.uint8),
    )
    own = np.full((count, len(COLUMNS)), OWN)
    return Reference(scores, scale_of(images, scores), Yardstick(own, own.copy()), images.stress)


def spoil(output: str, image: int, where: tuple[int, ...] | EllipsisType, change: Callable[[Any], Any]) -> Fault:
    """Change one value of one image, or all of them (...), at whatever batch it comes."""
    place = (where,) if where is ... else where

    def fault(answer: Scores, numbers: list[int]) -> None:
        array = getattr(answer, output)
        for row, number in enumerate(numbers):
            if number == image:
                array[(row, *place)] = change(array[(row, *place)])

    return fault


def bound(name: str, precision: str = "fp32") -> str:
    """A bound as messages write it."""
    return re.escape(f"{CONTRACTS[precision].bounds[name]:g}")
