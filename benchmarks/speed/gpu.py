"""`make bench-gpu`: qfae-bench at full size on one GPU, in one command and inside eight minutes.

Runs from the checkout with whatever Python has torch; what is not installed is listed in the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.speed.cli import main as bench

ARGUMENTS = (
    *("--preset", "brats", "--random-weights", "0", "--device", "cuda:0"),
    *("--batches", "1,8,32,64", "--rounds", "3", "--seconds", "0.5", "--longest", "10"),
    *("--files", "256", "--out", "build/bench-gpu"),
)


def arguments(given: Sequence[str]) -> list[str]:
    """Return the arguments of qfae-bench; what is given takes the place of what stands here."""
    options = dict(zip(ARGUMENTS[::2], ARGUMENTS[1::2], strict=True))
    options |= dict(zip(given[::2], given[1::2], strict=False))
    if "--config" in options:
        options.pop("--preset", None)
    return [word for pair in options.items() for word in pair]


if __name__ == "__main__":
    bench(arguments(sys.argv[1:]))
