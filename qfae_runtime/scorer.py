"""The main path, top-down: prepared images -> batches -> engine -> one Scored per image, in order.

for scored in Scorer.of(opened).score(prepared_images):
    scored.score, scored.anomaly_map, scored.reconstruction
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass
from typing import Generic, NamedTuple, Self, TypeVar

import numpy as np

from qfae_runtime.arrays import Float32, UInt8
from qfae_runtime.batching import BEGIN, IMAGES_PER_CANARY, Grouping, Start, portions
from qfae_runtime.canary import Canary
from qfae_runtime.engines.base import Engine, Overlapping, Scores
from qfae_runtime.engines.batches import calls_of, chosen_batch
from qfae_runtime.engines.opened import OpenedEngine
from qfae_runtime.errors import CanaryError, EngineError, ManifestError
from qfae_runtime.manifest import Manifest
from qfae_runtime.preprocess import Prepared

Tag = TypeVar("Tag")
Measured = Callable[[], AbstractContextManager[None]]

_MOST_EMPTY = 16  # calls without images that may keep back the results of those before them


class Scored(NamedTuple):
    """One image's result. `anomaly_map` float32 (S, S), `reconstruction` uint8 (S, S, 3); None without maps."""

    score: np.float32
    anomaly_map: Float32 | None
    reconstruction: UInt8 | None


@dataclass(frozen=True)
class _Call(Generic[Tag]):
    """One call of the engine: the pictures it is for, those without an image too, and where it ends in the run.

    The golden images of these `numbers` stand together, the first at `place`. Where there are neither images nor golden
    ones, the engine is not called.
    """

    pictures: Sequence[tuple[UInt8 | None, Tag]]
    numbers: Sequence[int]
    place: int
    end: int

    @property
    def runs(self) -> bool:
        """Whether the engine is called."""
        return bool(self.numbers) or _has_images(self.pictures)


class Scorer:
    """Scores any number of prepared images with one engine, in batches.

    `batch_size` is the largest that is used: the largest size that the engine's backend is called with and that is not
    above what was asked for (None: 16). With a `canary`, golden images ride along: in every few batches, one for 100
    images or more, and in the last.

    For the record of a run: `batches_run` counts the calls of the backend by batch size, `canaries_read` the golden
    images that were compared.

    Raises:
        ManifestError: engine and manifest disagree about the image size.
        EngineError: the batch size is beyond what the engine takes.

    """

    def __init__(
        self, engine: Engine, manifest: Manifest, batch_size: int | None = None, canary: Canary | None = None
    ) -> None:
        if engine.image_size != manifest.image_size:
            raise ManifestError(
                f"image_size: the engine takes {engine.image_size}, {manifest.name}.json says "
                f"{manifest.image_size}; use the manifest that was exported with the engine"
            )
        if batch_size is not None and not 1 <= batch_size <= engine.max_batch:
            raise EngineError(f"batch size: got {batch_size}, this engine takes 1..{engine.max_batch}")
        self.engine = engine
        self.manifest = manifest
        self.canary = canary
        self.batch_size = min(chosen_batch(batch_size, engine.batches), engine.max_batch)
        self.batches_run: Counter[int] = Counter()
        self.canaries_read = 0
        self._batches = BEGIN  # what score_batch has done

    @classmethod
    def of(cls, opened: OpenedEngine, batch_size: int | None = None) -> Self:
        """Return a scorer of an opened engine, with its golden images as canary if it has any.

        Raises:
            ManifestError: the golden file is missing or damaged.
            EngineError: the batch size is beyond what the engine takes.

        """
        return cls(opened.engine, opened.manifest, batch_size, Canary.of(opened))

    def score(self, images: Iterable[Prepared], maps: bool = True) -> Iterator[Scored]:
        """Yield one Scored per image, in the order given.

        At most so many batches are held at a time as the engine can have under way (one, or two of a TensorRT plan),
        and one image more: which batch is the last is known when no image comes after it.

        Raises:
            EngineError: an image is not uint8 (S, S, 3), or the backend failed.
            CanaryError: a golden image that rode along did not give PyTorch's outputs.

        """
        with closing(self.score_pictures(((prepared.image, None) for prepared in images), maps)) as pictures:
            for scored, _ in pictures:
                if scored is not None:
                    yield scored

    def score_pictures(
        self,
        pictures: Iterable[tuple[UInt8 | None, Tag]],
        maps: bool = True,
        measured: Measured = nullcontext,
        start: Start = BEGIN,
    ) -> Generator[tuple[Scored | None, Tag], None, None]:
        """Yield the result of each picture uint8 (S, S, 3) with its tag, in the order given; None has None.

        Pictures are read ahead by a batch, by one more where the engine can have several under way, and by a few that
        are None. The engine's time is spent within `measured()`. `start` is where in a run they begin. Whoever ends it
        early waits for the batches under way, which are lost.

        Raises:
            EngineError: an image is not uint8 (S, S, 3), or the backend failed; batches under way are lost.
            CanaryError: a golden image that rode along did not give PyTorch's outputs.

        """
        trusted = start.trusted
        with closing(self._called(self._calls(pictures, start), maps, measured)) as called:
            for call, scores in called:
                results = iter(self._read(call, scores, maps, trusted) if scores is not None else ())
                if call.numbers:
                    trusted = call.end
                for image, tag in call.pictures:
                    yield (None if image is None else next(results)), tag

    def score_batch(self, images: list[UInt8], maps: bool = True) -> list[Scored]:
        """Score 1..batch_size images uint8 (S, S, 3) now, as a service does; a golden image rides along every 100.

        Raises:
            EngineError: as score; or there are more images than `batch_size`.
            CanaryError: as score, counting the images since the scorer was made.

        """
        if not 1 <= len(images) <= self.batch_size:
            raise EngineError(f"score_batch: got {len(images)} images, expected 1..{self.batch_size}; score takes any")
        rows, _, canaries, trusted = self._batches
        due = self.canary is not None and rows >= IMAGES_PER_CANARY * (canaries + 1)
        end = rows + len(images)
        results: list[Scored] = []
        turn = canaries + 1 if due else 0
        for call in self._of_group([(image, None) for image in images], turn, end, steady=True):
            results += self._read(call, self._run(call, maps), maps, trusted)
            trusted = call.end if call.numbers else trusted
        self._batches = Start(end, end, canaries + due, trusted)
        return results

    def _calls(self, pictures: Iterable[tuple[UInt8 | None, Tag]], start: Start) -> Iterator[_Call[Tag]]:
        """Compose the calls of the engine; the last has a golden image whatever its size."""
        grouping = Grouping(self.batch_size, canaries=self.canary is not None, start=start)
        waiting: list[tuple[UInt8 | None, Tag]] = []
        unread = False  # images were scored since the last golden one

        def closed(*, last: bool = False) -> Iterator[_Call[Tag]]:
            nonlocal waiting, unread
            images = _has_images(waiting)
            unread = unread or images
            turn = int(unread) if last else grouping.turn if images else 0
            if self.canary is None:
                turn = 0
            unread = unread and not turn
            group, waiting, end = waiting, [], grouping.close().rows
            yield from self._of_group(group, turn, end)

        for image, tag in pictures:
            if grouping.is_full_for(image is not None):
                yield from closed()
            waiting.append((image, tag))
            if grouping.add(image is not None):
                yield from closed()
        if waiting or unread:
            yield from closed(last=True)

    def _of_group(
        self, pictures: list[tuple[UInt8 | None, Tag]], turn: int, end: int, *, steady: bool = False
    ) -> Iterator[_Call[Tag]]:
        """Compose the calls for the pictures of one group, which ends at row `end` of the run.

        The golden image of a `turn` rides along, the highest-scoring first; 0: none, and any in what would be black.
        Its place goes round with the turns, so that each place of a batch is seen.
        """
        images = sum(image is not None for image, _ in pictures)
        parts = portions(
            images,
            turn > 0,
            self.batch_size,
            self.engine.batches,
            self.engine.device,
            fill=self.canary is not None,
            steady=steady,
        )
        rest, row = iter(pictures), end - len(pictures)
        for number, part in enumerate(parts):
            taken: list[tuple[UInt8 | None, Tag]] = []
            wanted = part.images
            while wanted:
                taken.append(next(rest))
                wanted -= taken[-1][0] is not None
            if number == len(parts) - 1:
                taken += rest
            row += len(taken)
            first = turn - 1 if turn else end
            numbers = self.canary.numbers(first, part.canaries) if self.canary is not None else []
            place = (turn if turn > 1 else end) % (part.images + 1)
            yield _Call(taken, numbers, place, row)

    def _called(
        self, calls: Iterable[_Call[Tag]], maps: bool, measured: Measured
    ) -> Generator[tuple[_Call[Tag], Scores | None], None, None]:
        """Yield each call with its outputs, in order; the next is handed over before the last is waited for."""
        engine = self.engine
        if not isinstance(engine, Overlapping):
            for call in calls:
                with measured():
                    scores = self._run(call, maps) if call.runs else None
                yield call, scores
            return
        under_way: deque[_Call[Tag]] = deque()

        def collected(still: int) -> Iterator[tuple[_Call[Tag], Scores | None]]:
            while under_way and (not under_way[0].runs or sum(call.runs for call in under_way) > still):
                scores = None
                if under_way[0].runs:
                    with measured():
                        scores = engine.collect(maps)
                yield under_way.popleft(), scores

        try:
            for call in calls:
                if call.runs:
                    with measured():
                        engine.submit(self._joined(call))
                under_way.append(call)
                yield from collected(0 if len(under_way) > engine.slots + _MOST_EMPTY else engine.slots - 1)
            yield from collected(0)
        finally:
            with suppress(EngineError):  # it was told before, or nobody waits for it any more
                for call in under_way:
                    if call.runs:
                        engine.collect(maps=False)

    def _run(self, call: _Call[Tag], maps: bool) -> Scores:
        return self.engine.run(self._joined(call), maps)

    def _joined(self, call: _Call[Tag]) -> UInt8:
        """Return the images of a call and the golden ones among them as one batch uint8 (B, S, S, 3)."""
        size = self.engine.image_size
        images = [image for image, _ in call.pictures if image is not None]
        for image in images:
            if image.shape != (size, size, 3) or image.dtype != np.uint8:
                raise EngineError(
                    f"image: expected uint8 ({size}, {size}, 3), got {image.dtype} {image.shape}; "
                    "prepare it with preprocess(pixels, manifest.preprocess)"
                )
        if self.canary is not None:
            images[call.place : call.place] = [self.canary.image(number) for number in call.numbers]
        self.batches_run.update(calls_of(self.engine.batches, len(images), self.engine.device))
        return np.stack(images)

    def _read(self, call: _Call[Tag], scores: Scores, maps: bool, trusted: int) -> list[Scored]:
        """Return the results of a call's images, after its golden images have been compared.

        Raises:
            CanaryError: one did not give PyTorch's outputs.

        """
        results = _apart(scores, maps)
        if self.canary is not None and call.numbers:
            golden = slice(call.place, call.place + len(call.numbers))
            self.canaries_read += len(call.numbers)
            if failures := self.canary.compare(call.numbers, scores.of(golden)):
                raise CanaryError(failures[0], trusted + 1)
            del results[golden]
        return results


def _has_images(pictures: Sequence[tuple[UInt8 | None, Tag]]) -> bool:
    return any(image is not None for image, _ in pictures)


def _apart(scores: Scores, maps: bool) -> list[Scored]:
    if not maps:
        return [Scored(score, None, None) for score in scores.score]
    return [Scored(*one) for one in zip(*scores, strict=True)]
