"""read | preprocess | score | draw: many files through one engine, in order, in memory that does not grow.

Decoding and drawing run in a few threads with bounded queues; the engine runs in the calling thread. A file
that cannot be read becomes an error row and the run goes on.

Files of one picture are decoded side by side. A file of several waits for its turn and is then decoded a few frames at
a time, so that neither its pixels nor those of the files after it pile up.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.batching import BEGIN, Start
from qfae_runtime.calibration import Decider
from qfae_runtime.errors import InputError
from qfae_runtime.geometry import Geometry
from qfae_runtime.layout import GOOD, mask_path_for
from qfae_runtime.preprocess import Prepared, PreprocessSpec, preprocess
from qfae_runtime.readers import ReadOptions, Slice, holds_volume, read_mask, read_slices
from qfae_runtime.readers.faults import foreign_faults_told
from qfae_runtime.scorer import Scored, Scorer
from qfae_runtime.workers import Pool, Seconds, TimedPool, in_order, in_pieces
from qfae_runtime.writers import heatmap
from qfae_runtime.writers.maps import save_map
from qfae_runtime.writers.places import Place
from qfae_runtime.writers.records import OK, Row, error_row, scored_row

FRAMES_AT_ONCE = 16
"""So many frames of one file are decoded before they are scored, while as many more are being decoded."""


@dataclass(frozen=True)
class Job:
    """One file to score: where it is, its name in rows, its label if known, where its pictures go if wanted.

    `heatmap` and `saved_map` are the places of the heat maps and maps of all its pictures.
    """

    path: Path
    source: str
    label: str | None = None
    heatmap: Place | None = None
    saved_map: Place | None = None


class Picture(NamedTuple):
    """A decoded picture, or the `error` that stands for it. `truth` is its mask uint8 (S, S) if known.

    `mask_fault` says of a mask that is there why it could not be used.

    `thumbnail` uint8 (h, w, 3) is the picture at the size of its heat map, if one is wanted: the pixels as read,
    which may be many, do not wait in the queues. `applied` is what the reader did to the values; `last` marks the last
    picture of its file.
    """

    job: Job
    frame: int | None
    prepared: Prepared | None
    truth: UInt8 | None = None
    error: str | None = None
    thumbnail: UInt8 | None = None
    mask_fault: str | None = None
    applied: str | None = None
    last: bool = True


class Outcome(NamedTuple):
    """A row ready to be written, with what it was made from; `scored` is None in error rows."""

    row: Row
    picture: Picture
    scored: Scored | None


@dataclass(frozen=True)
class Pipeline:
    """The settings of one run. `truth` asks for masks; jobs that ask for heat maps need a `scale`."""

    scorer: Scorer
    maps: bool = True
    truth: bool = False
    scale: heatmap.ColourScale | None = None
    decider: Decider | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    workers: int = min(4, os.cpu_count() or 1)
    seconds: Seconds = field(default_factory=Seconds)

    def run(self, jobs: Iterable[Job], start: Start = BEGIN, skip: int = 0) -> Generator[Outcome, None, None]:
        """Yield one outcome per picture, in the order of the jobs, after its heat map and map have been written.

        `start` is where in a run the jobs begin; their first `skip` pictures are passed over.

        Raises:
            EngineError: the backend failed.
            CanaryError: the engine went wrong meanwhile.
            OSError: a heat map or map cannot be written.
            OutputError: a link would lead one out of the results folder.

        """
        depth = 2 * self.scorer.batch_size
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="qfae")
        try:
            decoding, drawing = (TimedPool(pool, self.seconds, stage) for stage in ("decoding", "drawing"))
            # Closed before the pool is shut down, which would wait for what they have under way.
            with (
                closing(self._decoded(decoding, jobs, depth + self.workers)) as decoded,
                closing(self._score(decoded, start, skip)) as scored,
            ):
                if self.maps:
                    yield from in_order(drawing, self._draw, scored, depth, at_once=True)
                else:
                    yield from scored
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _decoded(self, pool: Pool, jobs: Iterable[Job], depth: int) -> Generator[list[Picture], None, None]:
        how = Decoding(self.scorer.manifest.preprocess, self.truth, self.reading, self.seconds)
        one = partial(decode, how=how)
        for job, pictures in in_order(pool, lambda job: (job, one(job)), jobs, depth):
            if pictures is not None:
                yield pictures
            else:
                yield from in_pieces(pool, pictures_of(job, how), FRAMES_AT_ONCE)

    def _score(self, decoded: Iterator[list[Picture]], start: Start, skip: int) -> Generator[Outcome, None, None]:
        pictures = islice((picture for group in decoded for picture in group), skip, None)
        given = ((picture.prepared.image if picture.prepared is not None else None, picture) for picture in pictures)
        engine = partial(self.seconds.measured, "engine")
        # closing(): batches under way are waited for, so that the engine can be used again.
        with closing(self.scorer.score_pictures(given, self.maps, engine, start)) as scored:
            for result, picture in scored:
                yield self._outcome(picture, result)

    def _outcome(self, picture: Picture, scored: Scored | None) -> Outcome:
        job = picture.job
        if scored is None:
            reason = picture.error or "cannot be read"
            return Outcome(error_row(job.source, picture.frame, reason, job.label, picture.applied), picture, None)
        row = scored_row(job.source, picture.frame, scored.score, self.decider, job.label, picture.applied)
        return Outcome(row, picture, scored if row.status == OK else None)

    def _draw(self, outcome: Outcome) -> Outcome:
        row, picture, scored = outcome
        job, prepared, image = picture.job, picture.prepared, picture.thumbnail
        if prepared is None or scored is None or scored.anomaly_map is None or scored.reconstruction is None:
            return outcome
        if job.heatmap is not None and image is not None and self.scale is not None and row.score is not None:
            figure = heatmap.draw(
                image,
                prepared.geometry,
                scored.reconstruction,
                scored.anomaly_map,
                self.scale,
                row.score,
                row.label,
            )
            row = replace(row, heatmap=job.heatmap.write(picture.frame, partial(heatmap.save, figure)))
        if job.saved_map is not None:
            back = prepared.geometry.map_back(scored.anomaly_map)
            row = replace(row, anomaly_map=job.saved_map.write(picture.frame, partial(save_map, back)))
        return Outcome(row, picture, scored)


class Decoding(NamedTuple):
    """How files become pictures: what the engine takes, whether masks are asked for, and what keeps the time."""

    spec: PreprocessSpec
    truth: bool
    reading: ReadOptions
    seconds: Seconds


def decode(job: Job, how: Decoding) -> list[Picture] | None:
    """Read and preprocess a file of one picture; one error picture if it cannot be read; None if it holds several."""
    if holds_volume(job.path):
        return None
    pictures = pictures_of(job, how)
    first = next(pictures)
    pictures.close()
    return [first] if first.last else None


def pictures_of(job: Job, how: Decoding) -> Generator[Picture, None, None]:
    """Read and preprocess the pictures of a file one after another, at least one.

    Where one cannot be read, the last is an error picture that stands for it and all after it.
    """
    waiting: Picture | None = None
    try:
        for piece in read_slices(job.path, job.source, how.reading):
            # A fault of this program goes on from here and ends the run: see faults.py for the border.
            with foreign_faults_told(job.path, job.source, "cannot be prepared"):
                picture = _prepared(job, piece, how)
            if waiting is not None:
                yield waiting
            waiting = picture._replace(last=False)
    except InputError as error:
        if waiting is None or waiting.frame is None:
            yield Picture(job, None, None, error=error.reason)
        else:
            yield waiting
            frame = waiting.frame + 1
            yield Picture(job, frame, None, error=f"frame {frame} and all after it: {error.reason}")
        return
    if waiting is not None:
        yield waiting._replace(last=True)


def _prepared(job: Job, piece: Slice, how: Decoding) -> Picture:
    with how.seconds.measured("preprocessing"):
        prepared = preprocess(piece.pixels, how.spec)
    mask, fault = pixel_truth(job, prepared.geometry, piece.frame) if how.truth else (None, None)
    small = None
    if job.heatmap is not None:
        with how.seconds.measured("drawing"):
            small = heatmap.thumbnail(piece.pixels)
    return Picture(job, piece.frame, prepared, mask, thumbnail=small, mask_fault=fault, applied=piece.applied)


def pixel_truth(job: Job, geometry: Geometry, frame: int | None = None) -> tuple[UInt8 | None, str | None]:
    """Return a picture's mask as uint8 (S, S), all zero for a good one without a mask; None where unknown.

    A mask that cannot be read, has another size than its image, or is that of several frames together, says nothing:
    with None comes the reason.
    """
    path = mask_path_for(job.path)
    if path is None:
        return (np.zeros((geometry.size, geometry.size), np.uint8) if job.label == GOOD else None), None
    if frame is not None:
        reason = "is that of a file with several pictures, expected one; give each a file of its own"
        return None, f"the mask of {job.source}: {reason}"
    try:
        mask = read_mask(path)
    except InputError as error:
        return None, f"the mask of {job.source}: {error.reason}"
    if mask.shape != (geometry.height, geometry.width):
        sizes = [f"{width} x {height}" for height, width in (mask.shape, (geometry.height, geometry.width))]
        return None, f"the mask of {job.source}: got {sizes[0]} pixels, expected {sizes[1]}, the size of its image"
    return geometry.warp_mask(mask), None
