"""Which pictures of a run share a batch, and in which batches a golden image rides along: counting, and no engine.

Both follow from which pictures of the whole run have an image and which are errors, and from nothing else. So a run
that is resumed composes the batches that it would have had without the interruption: see resuming.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qfae_runtime.engines.batches import cut, fills_up, next_size

IMAGES_PER_CANARY = 100
"""At least so many images are scored for one golden image: what is checked costs 1 % at most."""
_MOST_WAITING = 4  # times the batch size


class Start(NamedTuple):
    """The border between two groups of a run: the rows before it, the images among them, and the golden ones.

    The scores of the first `trusted` rows were confirmed by a golden image that rode with them or after them. Golden
    images are counted that took a place of others.
    """

    rows: int = 0
    images: int = 0
    canaries: int = 0
    trusted: int = 0


BEGIN = Start()


class Grouping:
    """Cuts pictures into groups, each of which becomes one batch, or a few at the end of a run.

    A group is closed when the next image has no room in it, so that the last one of a run is known to be the last; or
    when many errors have come, so that a row is not kept back for long behind damaged files, of which there may be any
    number. Errors with no image before them wait for nothing.
    """

    def __init__(self, size: int, *, canaries: bool, start: Start = BEGIN) -> None:
        self.at = start
        self._size, self._canaries = size, canaries
        self._pictures = self._images = 0

    @property
    def turn(self) -> int:
        """The number of the golden image that rides in this group, from 1; 0: none does.

        With it and the one of the last batch, there are no more than 1 % of the images.
        """
        turn = self.at.canaries + 1
        return turn if self._canaries and self.at.images >= IMAGES_PER_CANARY * (turn + 1) else 0

    def is_full_for(self, image: bool) -> bool:
        """Say whether the group must be closed before a picture; one place is kept for a golden image."""
        return image and self._images == (max(1, self._size - 1) if self.turn else self._size)

    def add(self, image: bool) -> bool:
        """Count a picture; True if the group must be closed behind it."""
        self._pictures += 1
        self._images += image
        return not self._images or self._pictures >= _MOST_WAITING * self._size

    def close(self) -> Start:
        """Begin the next group and return where that is."""
        rows, images, canaries, trusted = self.at
        end, rode = rows + self._pictures, bool(self.turn and self._images)
        self.at = Start(end, images + self._images, canaries + rode, end if rode else trusted)
        self._pictures = self._images = 0
        return self.at


class Portion(NamedTuple):
    """What one call of the engine takes: so many of a group's images, and so many golden ones."""

    images: int
    canaries: int


def portions(
    images: int, canary: bool, batch_size: int, sizes: Sequence[int], device: str, *, fill: bool, steady: bool = False
) -> list[Portion]:
    """Return the calls for a group: at most `batch_size` images, or that many and the golden one of the last batch.

    Where the golden image makes them no size of the engine, the smaller parts come first: it rides in the largest,
    with most of the images, and nothing comes after it. `steady`: as many images come again and again, so it rides in
    a call of a size that they have without it, and one image runs alone; of a single image, it is alone itself. `fill`:
    golden images take the places that would be black.
    """
    if not fills_up(device):
        if not canary:
            return [Portion(images, 0)]
        known = [size for size in sizes if size <= batch_size]
        *before, last = sorted((*cut(known, images), 1) if steady else cut(known, images + 1))
        return [*(Portion(size, 0) for size in before), Portion(last - 1, 1)]
    parts = [Portion(images, int(canary))]
    if canary and (images >= batch_size or (steady and images in sizes)):
        parts = [Portion(1, 0), Portion(images - 1, 1)]
    if not fill:
        return parts
    filled = [min(next_size(sizes, one + golden), batch_size) if one + golden else 0 for one, golden in parts]
    return [Portion(one, full - one) for (one, _), full in zip(parts, filled, strict=True)]
