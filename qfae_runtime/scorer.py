"""The main path, top-down: prepared images -> batches -> engine -> one Scored per image, in order.

for scored in Scorer(engine, manifest).score(prepared_images):
    scored.score, scored.anomaly_map, scored.reconstruction
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np

from qfae_runtime.arrays import Float32, UInt8
from qfae_runtime.engines.base import Engine, Overlapping, Scores
from qfae_runtime.errors import EngineError, ManifestError
from qfae_runtime.manifest import Manifest
from qfae_runtime.preprocess import Prepared

Tag = TypeVar("Tag")

DEFAULT_BATCH = 16
_MOST_EMPTY = 16  # batches without images that may keep back the results of those before them


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
        """Yield one Scored per image, in the order given.

        At most so many batches are held at a time as the engine can have under way: one, or two of a TensorRT plan.

        Raises:
            EngineError: an image is not uint8 (S, S, 3), or the backend failed.

        """
        remaining = iter(images)
        batches = iter(lambda: list(islice(remaining, self.batch_size)), [])
        tagged = (([prepared.image for prepared in batch], None) for batch in batches)
        with closing(self.score_batches(tagged, maps)) as scored:
            for results, _ in scored:
                yield from results

    def score_batches(
        self,
        batches: Iterable[tuple[list[UInt8], Tag]],
        maps: bool = True,
        measured: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Generator[tuple[list[Scored], Tag], None, None]:
        """Score batches as score_batch does, each with a tag of the caller's; results come in the order given.

        Where the engine can have several batches under way, the next is handed over before the last is waited for, and
        `batches` is read ahead by that, and by a few batches without images. The engine's time is spent within
        `measured()`. Whoever ends it early waits for the batches under way, which are lost.

        Raises:
            EngineError: an image is not uint8 (S, S, 3), or the backend failed; batches under way are lost.

        """
        engine = self.engine
        if not isinstance(engine, Overlapping):
            for images, tag in batches:
                with measured():
                    results = self.score_batch(images, maps) if images else []
                yield results, tag
            return
        under_way: deque[tuple[bool, Tag]] = deque()  # False: a batch without images, which the engine knows not of

        def collected(still: int) -> Iterator[tuple[list[Scored], Tag]]:
            while under_way and (not under_way[0][0] or sum(given for given, _ in under_way) > still):
                results: list[Scored] = []
                if under_way[0][0]:
                    with measured():
                        results = _apart(engine.collect(maps), maps)
                yield results, under_way.popleft()[1]

        try:
            for images, tag in batches:
                if images:
                    with measured():
                        engine.submit(self._joined(images))
                under_way.append((bool(images), tag))
                yield from collected(0 if len(under_way) > engine.slots + _MOST_EMPTY else engine.slots - 1)
            yield from collected(0)
        finally:
            with suppress(EngineError):  # it was told before, or nobody waits for it any more
                for given, _ in under_way:
                    if given:
                        engine.collect(maps=False)

    def score_batch(self, images: list[UInt8], maps: bool = True) -> list[Scored]:
        """Score 1..batch_size images uint8 (S, S, 3) in one run of the engine."""
        return _apart(self.engine.run(self._joined(images), maps), maps)

    def _joined(self, images: list[UInt8]) -> UInt8:
        """Return images as one batch uint8 (B, S, S, 3)."""
        size = self.engine.image_size
        for image in images:
            if image.shape != (size, size, 3) or image.dtype != np.uint8:
                raise EngineError(
                    f"image: expected uint8 ({size}, {size}, 3), got {image.dtype} {image.shape}; "
                    "prepare it with preprocess(pixels, manifest.preprocess)"
                )
        return np.stack(images)


def _apart(scores: Scores, maps: bool) -> list[Scored]:
    if not maps:
        return [Scored(score, None, None) for score in scores.score]
    return [Scored(*one) for one in zip(*scores, strict=True)]
