"""Batch sizes: an engine is run with a few of them only, those that were measured, whatever number of images comes.

Kernels depend on the size, so that an engine may be right at one and wrong at another. On a GPU a batch is filled up to
the next size and cut back afterwards; on a CPU the images that fill it would cost as much as others, and it is split.

Letters: B images in a batch, S the engine's `image_size`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import Scores

DEFAULT_BATCH = 16


def powers_of_two(largest: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... as far as they do not exceed `largest`."""
    return tuple(2**exponent for exponent in range(largest.bit_length()))


def sizes_up_to(max_batch: int) -> tuple[int, ...]:
    """Return the batch sizes to run, ascending: powers of two, and `max_batch`."""
    return tuple(sorted({*powers_of_two(max_batch), max_batch}))


def chosen_batch(batch_size: int | None, sizes: Sequence[int]) -> int:
    """Return the largest of the ascending sizes that is not above what was asked for; None asks for 16.

    Where all are larger, it is what was asked for: each batch is filled up to the first of them.
    """
    asked = DEFAULT_BATCH if batch_size is None else batch_size
    return max((size for size in sizes if size <= asked), default=asked)


def fills_up(device: str) -> bool:
    """Say whether engines on a device fill a batch up to the next size; those on a CPU split it."""
    return device != "cpu"


def calls_of(sizes: Sequence[int], images: int, device: str) -> tuple[int, ...]:
    """Return the sizes that a backend is called with, in order, when an engine runs so many images."""
    return (next_size(sizes, images),) if fills_up(device) else cut(sizes, images)


def cut(sizes: Sequence[int], images: int) -> tuple[int, ...]:
    """Return the sizes, largest first, that so many images are split into; the ascending sizes begin with 1."""
    parts: list[int] = []
    for size in reversed(sizes):
        count, images = divmod(images, size)
        parts += [size] * count
    if images:
        raise ValueError(f"{images} images are left over; the sizes {tuple(sizes)} must begin with 1")
    return tuple(parts)


def run_split(sizes: Sequence[int], images: UInt8, run: Callable[[UInt8], Scores]) -> Scores:
    """Return the outputs on uint8 (B, S, S, 3), of which `run` only ever sees a number that is one of the sizes."""
    parts, start = [], 0
    for size in cut(sizes, len(images)):
        parts.append(run(images[start : start + size]))
        start += size
    return parts[0] if len(parts) == 1 else Scores.joined(parts)


def next_size(sizes: Sequence[int], images: int) -> int:
    """Return the least of the ascending sizes that holds so many images; the last one must."""
    return next(size for size in sizes if size >= images)


def filled_up(images: UInt8, batch: int) -> UInt8:
    """Return uint8 (batch, S, S, 3): the images, and black ones behind them. A batch that is full is not copied."""
    if len(images) == batch:
        return images
    buffer = np.empty(batch * images[0].size, np.uint8)
    fill_up(buffer, images, batch)
    return buffer.reshape(batch, *images.shape[1:])


def fill_up(buffer: UInt8, images: UInt8, batch: int) -> None:
    """Write uint8 (B, S, S, 3) to the beginning of a flat buffer, and black images behind them up to `batch`.

    Black, not what lies there: the engine is to see nothing of earlier patients.
    """
    rows = buffer[: batch * images[0].size].reshape(batch, *images.shape[1:])
    rows[: len(images)] = images
    rows[len(images) :] = 0


def cut_back(scores: Scores, images: int) -> Scores:
    """Return the scores of the first `images` of a batch that was filled up; the rest's memory is let go."""
    if len(scores.score) == images:
        return scores
    kept = scores.of(slice(images))
    return Scores(kept.score.copy(), kept.anomaly_map.copy(), kept.reconstruction.copy())
