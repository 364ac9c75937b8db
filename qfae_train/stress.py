"""Images that no scanner makes, for measuring engines where the parity images say nothing.

On grey images of a narrow range of scores an engine is right that takes red for blue, clips what is bright, leaves a
border out, or wraps a score that it has never met. These ask for all of it: constants, all grey levels, saturated
colours, detail at every scale, something bright in every corner and at every border, scores beyond those of the parity
images, and two of those turned into what they are not.

Letters: S pixels per side.
"""

from __future__ import annotations

import numpy as np

from qfae_runtime.arrays import UInt8

_SEED = 20_260
_BLACK, _GREY, _WHITE = 0, 64, 255


def stress_images(size: int, like: UInt8) -> tuple[UInt8, tuple[str, ...]]:
    """Return stress images uint8 (N, size, size, 3), the same for the same arguments, and their names.

    `like` uint8 (M, size, size, 3) are parity images, one or more; a few of these are made of them.
    """
    rng = np.random.default_rng(_SEED)
    levels = np.round(np.linspace(0, 255, size)).astype(np.uint8)
    across, down = np.broadcast_to(levels, (size, size)), np.broadcast_to(levels[:, None], (size, size))
    first, middle, last = like[0], like[len(like) // 2], like[-1]
    made = {
        "black": np.full((size, size, 3), _BLACK, np.uint8),
        "white": np.full((size, size, 3), _WHITE, np.uint8),
        "checkerboard": _checkerboard(size, max(2, size // 28)),
        "grey ramp": _grey(np.maximum(across, down[::-1])),
        "colour ramps": np.stack([across, down, 255 - across], axis=2),
        "saturated colours": _colours(size),
        "noise in colours": rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
        "bright coloured squares on grey": _squares(size),
        "a parity image with bright marks in two corners": _marked(first, ((0, 0), (2, 2))),
        "a parity image with bright marks in the other corners": _marked(middle, ((0, 2), (2, 0))),
        "a parity image with bright marks at the upper and left border": _marked(last, ((0, 1), (1, 0))),
        "a parity image with bright marks at the lower and right border": _marked(first, ((2, 1), (1, 2))),
        "a parity image inverted": 255 - middle,
        "a parity image mirrored and faint": _faint(last[:, ::-1]),
    }
    return np.ascontiguousarray(np.stack(list(made.values()))), tuple(f"stress image: {name}" for name in made)


def _grey(values: UInt8) -> UInt8:
    return np.repeat(values[:, :, None], 3, axis=2)


def _checkerboard(size: int, cell: int) -> UInt8:
    rows, columns = np.indices((size, size)) // cell
    return _grey(np.where((rows + columns) % 2, _WHITE, _BLACK).astype(np.uint8))


def _colours(size: int) -> UInt8:
    """Return the eight corners of the colour cube as blocks: none is the same with its channels in another order."""
    rows, columns = np.indices((size, size)) * np.array([[[2]], [[4]]]) // size
    number = rows * 4 + columns  # 0..7
    cube = np.array([4, 1, 6, 2, 3, 7, 5, 0])[number]
    bits = [(cube >> shift & 1) * _WHITE for shift in (2, 1, 0)]
    return np.stack(bits, axis=2).astype(np.uint8)


def _squares(size: int) -> UInt8:
    """Return grey with two bright squares below: of all that was tried, what scores highest with most models.

    They have colours, for this is the image that runs in every place of a batch.
    """
    side = max(1, size // 7)
    image = np.full((size, size, 3), _GREY, np.uint8)
    image[-side:, :side], image[-side:, -side:] = (_WHITE, _WHITE, 0), (0, _WHITE, 180)
    return image


def _faint(image: UInt8) -> UInt8:
    """Return an image of a sixteenth of the contrast, as slices at the end of a volume are."""
    mean = image.mean()
    faint: UInt8 = np.rint(mean + (image - mean) / 16).astype(np.uint8)
    return faint


def _marked(image: UInt8, places: tuple[tuple[int, int], ...]) -> UInt8:
    """Return a copy with small white squares; a place is (row, column), each 0, 1 or 2, first to last.

    Small and on a picture that is rebuilt well, for then the largest value of the map lies there, at the very border.
    """
    size, side = len(image), max(1, len(image) // 28)
    starts = (0, (size - side) // 2, size - side)
    marked = image.copy()
    for row, column in places:
        marked[starts[row] : starts[row] + side, starts[column] : starts[column] + side] = _WHITE
    return marked
