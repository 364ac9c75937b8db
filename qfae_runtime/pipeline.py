"""read | preprocess | score | draw: many files through one engine, in order, in memory that does not grow.

Decoding and drawing run in a few threads with bounded queues; the engine runs in the calling thread. A file
that cannot be read becomes an error row and the run goes on.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.calibration import Decider
from qfae_runtime.errors import InputError
from qfae_runtime.geometry import Geometry
from qfae_runtime.layout import GOOD, mask_path_for
from qfae_runtime.preprocess import Prepared, PreprocessSpec, preprocess
from qfae_runtime.readers import read_mask, read_slices
from qfae_runtime.scorer import Scored, Scorer
from qfae_runtime.writers import heatmap
from qfae_runtime.writers.folder import make_parent
from qfae_runtime.writers.maps import save_map
from qfae_runtime.writers.records import OK, Row, error_row, scored_row

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """One file to score: where it is, its name in rows, its label if known, where its pictures go if wanted."""

    path: Path
    source: str
    label: str | None = None
    heatmap: Path | None = None
    saved_map: Path | None = None


class Picture(NamedTuple):
    """A decoded picture, or the `error` that stands for it. `truth` is its mask uint8 (S, S) if known.

    `mask_fault` says of a mask that is there why it could not be used.

    `thumbnail` uint8 (h, w, 3) is the picture at the size of its heat map, if one is wanted: the pixels as read,
    which may be many, do not wait in the queues.
    """

    job: Job
    frame: int | None
    prepared: Prepared | None
    truth: UInt8 | None = None
    error: str | None = None
    thumbnail: UInt8 | None = None
    mask_fault: str | None = None


class Outcome(NamedTuple):
    """A row ready to be written, with what it was made from; `scored` is None in error rows."""

    row: Row
    picture: Picture
    scored: Scored | None


@dataclass
class Seconds:
    """Where the time of a run goes. `decoding` and `drawing` add up over threads, `engine` is that of the caller's."""

    decoding: float = 0.0
    engine: float = 0.0
    drawing: float = 0.0


@dataclass(frozen=True)
class Pipeline:
    """The settings of one run. `truth` asks for masks; jobs that ask for heat maps need a `scale`.

    `inside` is the folder that no heat map or map may leave, not even by a link; needed where jobs ask for them.
    """

    scorer: Scorer
    maps: bool = True
    truth: bool = False
    scale: heatmap.ColourScale | None = None
    decider: Decider | None = None
    inside: Path | None = None
    workers: int = min(4, os.cpu_count() or 1)
    seconds: Seconds = field(default_factory=Seconds)

    def run(self, jobs: Iterable[Job]) -> Generator[Outcome, None, None]:
        """Yield one outcome per picture, in the order of the jobs, after its heat map and map have been written.

        Raises:
            EngineError: the backend failed.
            OSError: a heat map or map cannot be written.
            OutputError: a link would lead one out of the folder `inside`.

        """
        spec = self.scorer.manifest.preprocess
        depth = 2 * self.scorer.batch_size
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="qfae")
        try:
            read = partial(decode, spec=spec, truth=self.truth)
            decoded = self._timed("decoding", in_order(pool, read, jobs, depth + self.workers))
            yield from self._timed("drawing", in_order(pool, self._draw, self._score(decoded), depth))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _timed(self, stage: str, results: Iterator[tuple[Result, float]]) -> Iterator[Result]:
        for result, seconds in results:
            setattr(self.seconds, stage, getattr(self.seconds, stage) + seconds)
            yield result

    def _score(self, decoded: Iterator[list[Picture]]) -> Iterator[Outcome]:
        # Errors wait with the pictures around them, so that rows keep the order of the files.
        waiting: list[Picture] = []
        good = 0
        for pictures in decoded:
            for picture in pictures:
                waiting.append(picture)
                good += picture.prepared is not None
                if good == self.scorer.batch_size or good == 0:
                    yield from self._outcomes(waiting)
                    waiting, good = [], 0
        yield from self._outcomes(waiting)

    def _outcomes(self, pictures: list[Picture]) -> Iterator[Outcome]:
        images = [picture.prepared.image for picture in pictures if picture.prepared is not None]
        start = time.perf_counter()
        results = iter(self.scorer.score_batch(images, self.maps) if images else [])
        self.seconds.engine += time.perf_counter() - start
        for picture in pictures:
            job = picture.job
            if picture.prepared is None:
                reason = picture.error or "cannot be read"
                yield Outcome(error_row(job.source, picture.frame, reason, job.label), picture, None)
                continue
            scored = next(results)
            row = scored_row(job.source, picture.frame, scored.score, self.decider, job.label)
            yield Outcome(row, picture, scored if row.status == OK else None)

    def _draw(self, outcome: Outcome) -> Outcome:
        row, picture, scored = outcome
        path, prepared, image = picture.job.heatmap, picture.prepared, picture.thumbnail
        if prepared is None or scored is None or scored.anomaly_map is None or scored.reconstruction is None:
            return outcome
        if path is not None and image is not None and self.scale is not None and row.score is not None:
            figure = heatmap.draw(
                image,
                prepared.geometry,
                scored.reconstruction,
                scored.anomaly_map,
                self.scale,
                row.score,
                row.label,
            )
            if self.inside is not None:
                make_parent(path, self.inside)
            heatmap.save(figure, path)
        if picture.job.saved_map is not None:
            if self.inside is not None:
                make_parent(picture.job.saved_map, self.inside)
            save_map(prepared.geometry.map_back(scored.anomaly_map), picture.job.saved_map)
        return outcome


def decode(job: Job, spec: PreprocessSpec, truth: bool) -> list[Picture]:
    """Read and preprocess every picture of a file; one error picture if it cannot be read."""
    try:
        pictures = []
        for piece in read_slices(job.path, job.source):
            prepared = preprocess(piece.pixels, spec)
            mask, fault = pixel_truth(job, prepared.geometry) if truth else (None, None)
            small = heatmap.thumbnail(piece.pixels) if job.heatmap is not None else None
            pictures.append(Picture(job, piece.frame, prepared, mask, thumbnail=small, mask_fault=fault))
    except InputError as error:
        return [Picture(job, None, None, error=error.reason)]
    return pictures


def pixel_truth(job: Job, geometry: Geometry) -> tuple[UInt8 | None, str | None]:
    """Return a picture's mask as uint8 (S, S), all zero for a good one without a mask; None where unknown.

    A mask that cannot be read, or has another size than its image, says nothing: with None comes the reason.
    """
    path = mask_path_for(job.path)
    if path is None:
        return (np.zeros((geometry.size, geometry.size), np.uint8) if job.label == GOOD else None), None
    try:
        mask = read_mask(path)
    except InputError as error:
        return None, f"the mask of {job.source}: {error.reason}"
    if mask.shape != (geometry.height, geometry.width):
        sizes = [f"{width} x {height}" for height, width in (mask.shape, (geometry.height, geometry.width))]
        return None, f"the mask of {job.source}: got {sizes[0]} pixels, expected {sizes[1]}, the size of its image"
    return geometry.warp_mask(mask), None


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[tuple[Result, float]]:
    """Map `function` over `items` in the pool; results come in order, at most `depth` items are under way.

    With each comes how many seconds it took.
    """

    def timed(item: Item) -> tuple[Result, float]:
        start = time.perf_counter()
        return function(item), time.perf_counter() - start

    pending: deque[Future[tuple[Result, float]]] = deque()
    for item in items:
        pending.append(pool.submit(timed, item))
        if len(pending) >= depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
