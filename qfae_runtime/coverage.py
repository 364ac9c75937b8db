"""Which images an engine is run with to see whether it is right at every batch size that it may be run with.

Used where it is measured against PyTorch, and by the self-test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qfae_runtime.agreement import Agreement, Reference
from qfae_runtime.arrays import Float32
from qfae_runtime.contract import Contract
from qfae_runtime.engines.base import Scores
from qfae_runtime.engines.batches import cut
from qfae_runtime.quantities import OF_ALL_IMAGES

_ENOUGH = 12
"""From so many different images on, the geometric mean of errors says something about an engine."""


def spread(count: int, limit: int) -> list[int]:
    """Return at most `limit` of the numbers 0..count-1, evenly spread, first and last among them."""
    if count <= limit:
        return list(range(count))
    return sorted({round(number * (count - 1) / max(limit - 1, 1)) for number in range(limit)})


def calls_of(scores: Float32, sizes: Sequence[int], stress: Sequence[int] = ()) -> dict[int, list[list[int]]]:
    """Return the images of every call, by number and by batch size, the largest size first.

    At each size there are all of the images `stress`, the lowest and the highest score of the others, and as many as
    one call holds of those that no larger size has had, spread over the scores; and, in a call of its own, the highest
    score of all in every place. Every image is in one call at least. Each call is as large as its size.
    """
    by_score = [int(number) for number in np.argsort(scores, kind="stable")]
    known = set(stress)
    real = [number for number in by_score if number not in known]
    left = list(real)
    calls: dict[int, list[list[int]]] = {}
    for turn, size in enumerate(sorted(set(sizes), reverse=True)):
        new = [left[place] for place in spread(len(left), size)]
        left = [number for number in left if number not in new]
        mixed = list(dict.fromkeys((*stress, *new, *real[:1], *real[-1:])))
        calls[size] = _filled(mixed[turn:] + mixed[:turn], by_score, size)  # turned: each image in several places
        if size > 1:
            calls[size].append([by_score[-1]] * size)
    for size in cut(sorted(calls), len(left)) if 1 in calls else [max(calls)] * -(-len(left) // max(calls)):
        calls[size] += _filled(left[:size], by_score, size)
        left = left[size:]
    return calls


def agreement_at(reference: Reference, numbers: Sequence[int], got: Scores) -> Agreement:
    """Measure what an engine gave at one batch size: the outputs on the images `numbers`, some of them several times.

    Quantities of a whole set are undefined, but for what is typical of _ENOUGH different images of one kind or more.
    """
    agreement = reference.of(numbers).compare(got)
    values = {name: None if name in OF_ALL_IMAGES else value for name, value in agreement.values.items()}
    if agreement.fault is None:
        first = {number: place for place, number in reversed(list(enumerate(numbers)))}
        kinds = [[number for number in first if (number in reference.stress) == stress] for stress in (False, True)]
        enough = [number for kind in kinds if len(kind) >= _ENOUGH for number in kind]
        if enough:
            values |= reference.of(enough).typical(got.of([first[number] for number in enough]))
    return replace(agreement, values=values)


def bounds_at(contract: Contract, agreement: Agreement) -> Contract:
    """Return the bounds that what was measured at one batch size can be held against."""
    undefined = [name for name in OF_ALL_IMAGES if agreement.values.get(name) is None]
    return contract.without(undefined)


def _filled(numbers: list[int], by_score: list[int], size: int) -> list[list[int]]:
    """Cut images into calls of one size; the last is filled up with others, spread over the scores."""
    missing = -len(numbers) % size
    others = [number for number in by_score if number not in numbers] or by_score
    filling = [others[place] for place in spread(len(others), missing)]
    every = [*numbers, *(filling[place % len(filling)] for place in range(missing))]
    return [every[start : start + size] for start in range(0, len(every), size)]
