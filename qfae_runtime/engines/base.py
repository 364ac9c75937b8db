"""What an engine is: uint8 images in, Scores out. Backends keep to this one protocol.

Letters: B images in a batch, S the engine's `image_size`.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np

from qfae_runtime.arrays import Float32, UInt8
from qfae_runtime.errors import EngineError

INPUT_NAME = "images"
OUTPUT_NAMES = ("score", "anomaly_map", "reconstruction")


class Scores(NamedTuple):
    """An engine's outputs; the field names are the output names of every engine file.

    score           float32 (B,)         unbounded, higher is more anomalous
    anomaly_map     float32 (B, S, S)    the same unit, per pixel of the engine's square
    reconstruction  uint8 (B, S, S, 3)   RGB, 0..255
    """

    score: Float32
    anomaly_map: Float32
    reconstruction: UInt8

    def of(self, images: slice | list[int]) -> Scores:
        """Return the outputs of some of the images, in the order given."""
        return Scores(self.score[images], self.anomaly_map[images], self.reconstruction[images])

    @staticmethod
    def joined(parts: Iterable[Scores]) -> Scores:
        """Return the outputs of several runs as those of one."""
        return Scores(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class Engine(Protocol):
    """A loaded engine. Not for use from two threads at once; `close` (or `with`) frees what it holds."""

    @property
    def image_size(self) -> int:
        """S, in pixels."""
        ...

    @property
    def max_batch(self) -> int:
        """Most images that one `run` takes."""
        ...

    @property
    def backend(self) -> str:
        """What executes it, e.g. "onnxruntime"."""
        ...

    @property
    def device(self) -> str:
        """Where it runs, e.g. "cpu"."""
        ...

    @property
    def version(self) -> str:
        """The version of the backend."""
        ...

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        """Score uint8 (B, S, S, 3), 1 <= B <= max_batch. The caller owns the returned arrays.

        With `maps=False` only the score is fetched; the other two outputs come back with B = 0.

        Raises:
            EngineError: the images are not what the engine takes, or the backend failed.

        """
        ...

    def close(self) -> None:
        """Free what the engine holds. Calling it twice does no harm."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_images(images: UInt8, image_size: int, max_batch: int) -> None:
    """Refuse a batch that is not uint8 (B, S, S, 3) with 1 <= B <= max_batch.

    Raises:
        EngineError: what was expected, what was got, and the cure.

    """
    wanted = (image_size, image_size, 3)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != wanted:
        raise EngineError(
            f"input {INPUT_NAME!r}: expected uint8 (B, {image_size}, {image_size}, 3), got {images.dtype} "
            f"{images.shape}; pass images from preprocess(), the engine normalises them itself"
        )
    if not 1 <= len(images) <= max_batch:
        raise EngineError(
            f"input {INPUT_NAME!r}: expected 1..{max_batch} images in a batch, got {len(images)}; "
            "Scorer cuts any number of images into batches"
        )
