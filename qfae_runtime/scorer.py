"""The main path, top-down: prepared images -> batches -> engine -> one Scored per image, in order.

for scored in Scorer(engine, manifest).score(prepared_images):
    scored.score, scored.anomaly_map, scored.reconstruction
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from qfae_runtime.arrays import Float32, UInt8
from qfae_runtime.engines.base import Engine
from qfae_runtime.errors import EngineError, ManifestError
from qfae_runtime.manifest import Manifest
from qfae_runtime.preprocess import Prepared

DEFAULT_BATCH = 16


def chosen_batch(batch_size: int | None, max_batch: int) -> int:
    """Return the batch size that was asked for, or by default 16, or what the engine takes."""
    return batch_size if batch_size is not None else min(DEFAULT_BATCH, max_batch)


class Scored(NamedTuple):
    """One image's result. `anomaly_map` float32 (S, S), `reconstruction` uint8 (S, S, 3); None without maps."""

    score: np.float32
    anomaly_map: Float32 | None
    reconstruction: UInt8 | None


class Scorer:
    """Scores any number of prepared images with one engine, `batch_size` at a time.

    Raises:
        ManifestError: engine and manifest disagree about the image size.
        EngineError: the batch size is beyond what the engine takes.

    """

    def __init__(self, engine: Engine, manifest: Manifest, batch_size: int | None = None) -> None:
        if engine.image_size != manifest.image_size:
            raise ManifestError(
                f"image_size: the engine takes {engine.image_size}, {manifest.name}.json says "
                f"{manifest.image_size}; use the manifest that was exported with the engine"
            )
        self.engine = engine
        self.manifest = manifest
        self.batch_size = chosen_batch(batch_size, engine.max_batch)
        if not 1 <= self.batch_size <= engine.max_batch:
            raise EngineError(f"batch size: got {batch_size}, this engine takes 1..{engine.max_batch}")

    def score(self, images: Iterable[Prepared], maps: bool = True) -> Iterator[Scored]:
        """Yield one Scored per image, in the order given; at most one batch is held at a time.

        Raises:
            EngineError: an image is not uint8 (S, S, 3), or the backend failed.

        """
        remaining = iter(images)
        while batch := list(islice(remaining, self.batch_size)):
            yield from self.score_batch([prepared.image for prepared in batch], maps)

    def score_batch(self, images: list[UInt8], maps: bool = True) -> list[Scored]:
        """Score 1..batch_size images uint8 (S, S, 3) in one run of the engine."""
        size = self.engine.image_size
        for image in images:
            if image.shape != (size, size, 3) or image.dtype != np.uint8:
                raise EngineError(
                    f"image: expected uint8 ({size}, {size}, 3), got {image.dtype} {image.shape}; "
                    "prepare it with preprocess(pixels, manifest.preprocess)"
                )
        scores = self.engine.run(np.stack(images), maps)  # [B, S, S, 3]
        if not maps:
            return [Scored(score, None, None) for score in scores.score]
        return [Scored(*one) for one in zip(*scores, strict=True)]
