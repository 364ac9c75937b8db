"""Which images an engine is run with to see whether it is right at every batch size that it may be run with.

Used where it is measured against PyTorch, and by the self-test.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qfae_runtime.arrays import Float32

_SINGLES = 4
"""Images that run alone: the lowest score, the highest, and two between them."""


def spread(count: int, limit: int) -> list[int]:
    """Return at most `limit` of the numbers 0..count-1, evenly spread, first and last among them."""
    if count <= limit:
        return list(range(count))
    return sorted({round(number * (count - 1) / max(limit - 1, 1)) for number in range(limit)})


def calls_of(scores: Float32, sizes: Sequence[int]) -> dict[int, list[list[int]]]:
    """Return the images of every call, by number and by batch size, the largest size first.

    Every image is in one of them at least: what one size does not hold, the next ones take, and the largest what is
    left. At each size, images are spread over the scores, the lowest and the highest among them; in a call of its own
    the highest is in every place. The highest score runs alone, too.
    """
    by_score = [int(number) for number in np.argsort(scores, kind="stable")]
    lowest, highest = by_score[0], by_score[-1]
    calls: dict[int, list[list[int]]] = {}
    left = list(by_score)
    for size in sorted(set(sizes), reverse=True):
        if size == 1:
            calls[1] = [[by_score[place]] for place in spread(len(by_score), _SINGLES)]
            left = [number for number in left if [number] not in calls[1]]
            continue
        new = [left[place] for place in spread(len(left), size)]
        ends = [number for number in dict.fromkeys((lowest, highest)) if number not in new]
        new = new[: size - len(ends)]
        others = [number for number in by_score if number not in {*new, *ends}]
        call = [*new, *ends, *(others[place] for place in spread(len(others), size))]
        calls[size] = [[call[place % len(call)] for place in range(size)], [highest] * size]
        left = [number for number in left if number not in calls[size][0]]
    largest = max(calls)
    calls[largest] += [left[start : start + largest] for start in range(0, len(left), largest)]
    return calls
