"""Batch sizes that an engine is run with where kernels depend on the size: a batch is filled up to one, then cut back.

Every such size can be measured, so that no patient's image meets a kernel that no certificate is about. On a CPU
the images that fill a batch would cost as much as others, and nothing is filled up.

Letters: B images in a batch, S the engine's `image_size`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import Scores


def powers_of_two(largest: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... as far as they do not exceed `largest`."""
    return tuple(2**exponent for exponent in range(largest.bit_length()))


def sizes_up_to(max_batch: int) -> tuple[int, ...]:
    """Return the batch sizes to run, ascending: powers of two, and `max_batch`."""
    return tuple(sorted({*powers_of_two(max_batch), max_batch}))


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
