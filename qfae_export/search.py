"""Which places must stay FP32? A search over sets of places, told of each set only whether it passes.

Nothing here assumes that keeping more is better: rounding errors also cancel, and a larger set may fail where a smaller
one passes. Where it is so all the same, as it mostly is, few trials are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from qfae_export.precision import covers

Passes = Callable[[Sequence[str]], bool]
"""Says whether the contract holds with these places in FP32."""

_FEW = 5
"""Of so few candidates the smallest set is found, of more a minimal one: their subsets are too many."""


class Refined(NamedTuple):
    """What a search found.

    kept     passes, and without any one of its places does not
    coarser  the sets of whole blocks and of stages it was found within, the nearest first; each passed
    """

    kept: tuple[str, ...]
    coarser: tuple[tuple[str, ...], ...]


def refine(units: Sequence[str], likely: Mapping[str, float], passes: Passes) -> Refined:
    """Find the stages that must stay FP32, within these the blocks, within these the operations.

    All units together must pass, none of them must not. `likely` says of every unit how likely it is at fault.
    """

    def by_likelihood(places: Iterable[str]) -> list[str]:
        return sorted(places, key=lambda place: -sum(likely[unit] for unit in units if covers(place, unit)))

    levels: list[tuple[str, ...]] = []
    candidates = stages(units)
    while not levels or candidates != levels[0]:
        levels.insert(0, _in_order(minimal(by_likelihood(candidates), passes), units))
        candidates = finer(levels[0], units)
    # Whole blocks and stages go by their own name; as such, each must be necessary again.
    kept = dropped_singly(by_likelihood(merged(levels[0], units)), passes)
    return Refined(_in_order(kept, units), tuple(levels[1:]))


def minimal(candidates: Sequence[str], passes: Passes) -> list[str]:
    """Return a 1-minimal subset that passes: without any one of its places it does not.

    `candidates` pass, and the empty set does not; the likeliest come first. Where they are few and keeping more never
    harms, no smaller subset passes.
    """
    if len(candidates) == 1:
        return list(candidates)
    if len(candidates) <= _FEW:
        return dropped_singly(_smallest(candidates, passes), passes)
    return _dropped_in_chunks(_shortest_prefix(candidates, passes), passes)


def dropped_singly(kept: Sequence[str], passes: Passes) -> list[str]:
    """Drop one place after the other, the last first, until none can be dropped."""
    kept = list(kept)
    dropped = True
    while dropped:
        dropped = False
        for place in reversed(kept) if len(kept) > 1 else ():
            rest = [one for one in kept if one != place]
            if rest and passes(rest):
                kept, dropped = rest, True
    return kept


def _smallest(candidates: Sequence[str], passes: Passes) -> list[str]:
    if passes(candidates[:1]):
        return list(candidates[:1])
    # What cannot be dropped alone is in every set that passes, if keeping more never harms.
    needed = [place for place in candidates if not passes([one for one in candidates if one != place])]
    others = [place for place in candidates if place not in needed]
    for count in range(len(others) + 1):
        for added in combinations(others, count):
            chosen = [place for place in candidates if place in needed or place in added]
            if chosen and passes(chosen):
                return chosen
    return list(candidates)


def _shortest_prefix(candidates: Sequence[str], passes: Passes) -> list[str]:
    """Return a beginning that passes, and one place less does not; found by doubling and then halving."""
    fails, length = 0, 1
    while length < len(candidates) and not passes(candidates[:length]):
        fails, length = length, 2 * length
    length = min(length, len(candidates))
    while length - fails > 1:
        middle = (fails + length) // 2
        if passes(candidates[:middle]):
            length = middle
        else:
            fails = middle
    return list(candidates[:length])


def _dropped_in_chunks(kept: list[str], passes: Passes) -> list[str]:
    """Go from the least likely place to the likeliest and drop as many at once as can be, twice as many each time."""
    end, size = len(kept), 1
    while end:
        start = max(end - size, 0)
        rest = kept[:start] + kept[end:]
        if rest and passes(rest):
            kept, end, size = rest, start, 2 * size
        elif size > 1:
            size //= 2
        else:
            end -= 1  # needed here, at least
    return dropped_singly(kept, passes)


def stages(units: Iterable[str]) -> tuple[str, ...]:
    """Return the first parts of the units' places, in their order."""
    return tuple(dict.fromkeys(unit.partition(".")[0] for unit in units))


def finer(places: Iterable[str], units: Sequence[str]) -> tuple[str, ...]:
    """Replace every place by what lies directly below it; units stay."""
    below: dict[str, None] = {}
    for place in places:
        for unit in units:
            if covers(place, unit):
                rest = unit[len(place) + 1 :].partition(".")[0]
                below[f"{place}.{rest}" if rest else unit] = None
    return tuple(below)


def merged(places: Sequence[str], units: Sequence[str]) -> tuple[str, ...]:
    """Name the same units by as few places as there can be: a whole block by the block, a whole stage by the stage."""
    chosen = {unit for unit in units if any(covers(place, unit) for place in places)}
    found: dict[str, None] = {}
    for unit in units:
        if unit in chosen:
            parts = unit.split(".")
            ancestors = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
            found[next(one for one in ancestors if all(u in chosen for u in units if covers(one, u)))] = None
    return tuple(found)


def _in_order(places: Iterable[str], units: Sequence[str]) -> tuple[str, ...]:
    first = {place: next(n for n, unit in enumerate(units) if covers(place, unit)) for place in places}
    return tuple(sorted(first, key=lambda place: first[place]))
