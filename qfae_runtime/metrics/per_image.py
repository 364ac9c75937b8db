"""A coarse histogram of every image, for the bootstrap: sparse, in memory that is bounded.

A resample weighs whole images, so its histogram is a weighted sum of theirs. Kept at the full 2^20 bins these would be
as large as the maps. They are therefore kept at the finest power of two that fits both limits below: bins are merged in
pairs whenever one is passed. Where all values are close to each other, bins stay narrow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qfae_runtime.arrays import Bool, Float32
from qfae_runtime.metrics.curves import Weights

Keys = npt.NDArray[np.uint32]

KEY_BITS = 20
"""Values come as bins of float32's upper 20 bits: sign, exponent, 11 bits of mantissa."""

MOST_BINS = 1024
"""Bins that hold anything in any image."""

MOST_BYTES = 96 * 2**20
"""Of all entries together; 17,194 images of 224 x 224 pixels take 74 MiB in 600 bins. Bins that are a factor of two
wide are not merged any further: then it may be passed."""

_LARGEST_SHIFT = 11  # merged further, bins would hold values of more than a factor of two
_BLOCK = 512  # images side by side in one matrix; a row and a bin fit into 32 bits


class _Entries(NamedTuple):
    """What is not zero in the histograms of a block: `keys` (row, bin) rising, `weights` float32, both (n,)."""

    keys: Keys
    weights: Float32

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.weights.nbytes

    def merged(self) -> _Entries:
        """Halve the number of bins; the row stands in the upper bits and stays."""
        keys = self.keys >> np.uint32(1)
        starts = np.flatnonzero(np.diff(keys, prepend=np.uint32(2**32 - 1)))
        return _Entries(keys[starts], np.add.reduceat(self.weights, starts) if len(starts) else self.weights)


class _Block(NamedTuple):
    """The three histograms of up to _BLOCK images."""

    normal: _Entries
    anomalous: _Entries
    overlap: _Entries


class ImageHistograms:
    """Histograms of normal pixels, of anomalous ones, and of these weighted by 1 / (size of their region).

    `shift` says how many of the lower key bits have been merged away.
    """

    def __init__(self, most_bins: int = MOST_BINS, most_bytes: int = MOST_BYTES) -> None:
        self.shift = 0
        self._limits = most_bins, most_bytes
        self._occupied: Bool = np.zeros(1 << KEY_BITS, dtype=np.bool_)
        self._full: list[_Block] = []
        self._last: list[_Block] = []  # of one image each, until there are enough for a full one

    def __len__(self) -> int:
        return _BLOCK * len(self._full) + len(self._last)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(entries.nbytes for block in self._full + self._last for entries in block)

    def add(self, normal: Keys, anomalous: Keys, region_weights: Weights) -> None:
        """Keep an image's pixels: uint32 (n,) and (a,) of KEY_BITS bits, and the weights float64 (a,)."""
        self._last.append(
            _Block(
                self._entries(normal, None), self._entries(anomalous, None), self._entries(anomalous, region_weights)
            )
        )
        most_bins, most_bytes = self._limits
        if len(self._last) == _BLOCK:
            self._full.append(_joined(self._last))
            self._last = []
        # Bytes are summed once a block: a single image adds little.
        while self.shift < _LARGEST_SHIFT and (
            np.count_nonzero(self._occupied) > most_bins or (not self._last and self.nbytes > most_bytes)
        ):
            self._merge()

    def sums(self, counts: npt.NDArray[np.uint32]) -> tuple[Weights, Weights, Weights]:
        """Add up the histograms, each image as often as `counts` uint32 (R, N) says: three float64 (R, K)."""
        occupied = np.flatnonzero(self._occupied)
        column = np.zeros(len(self._occupied), dtype=np.int64)
        column[occupied] = np.arange(len(occupied))
        # float32 holds every whole number up to 2^24, and beyond that is off by less than one in ten million.
        totals = np.zeros((3, len(counts), len(occupied)), dtype=np.float32)
        blocks = self._full + ([_joined(self._last)] if self._last else [])
        for number, block in enumerate(blocks):
            part = counts[:, number * _BLOCK : (number + 1) * _BLOCK].astype(np.float32)  # [R, B]
            for total, entries in zip(totals, block, strict=True):
                if len(entries.keys):
                    total += part @ self._dense(entries, column, part.shape[1], len(occupied))
        normal, anomalous, overlap = totals.astype(np.float64)
        return normal, anomalous, overlap

    def _entries(self, keys: Keys, weights: Weights | None) -> _Entries:
        if not len(keys):
            return _Entries(np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.float32))
        bins = keys >> np.uint32(self.shift)
        lowest = bins.min()
        sums = np.bincount(bins - lowest, weights)
        found = np.flatnonzero(sums)
        bins = found.astype(np.uint32) + lowest
        self._occupied[bins] = True
        row = np.uint32(len(self._last) << (KEY_BITS - self.shift))
        return _Entries(bins | row, sums[found].astype(np.float32))

    def _merge(self) -> None:
        self.shift += 1
        self._occupied = self._occupied[0::2] | self._occupied[1::2]
        for blocks in (self._full, self._last):
            blocks[:] = [_Block(*(entries.merged() for entries in block)) for block in blocks]

    def _dense(self, entries: _Entries, column: npt.NDArray[np.int64], rows: int, columns: int) -> Float32:
        row, found = entries.keys >> np.uint32(KEY_BITS - self.shift), entries.keys & np.uint32(len(column) - 1)
        dense = np.zeros((rows, columns), dtype=np.float32)
        dense[row, column[found]] = entries.weights
        return dense


def _joined(blocks: list[_Block]) -> _Block:
    """Put the blocks of single images into one; their rows are already set."""
    return _Block(
        *(
            _Entries(np.concatenate([one.keys for one in parts]), np.concatenate([one.weights for one in parts]))
            for parts in zip(*blocks, strict=True)
        )
    )
