"""`make bench-gpu`: qfae-bench at full size on one GPU, in one command and inside eight minutes.

Runs from the checkout with whatever Python has torch; what is not installed is listed in the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.speed.cli import main as bench

PRESET, WEIGHTS = ("--preset", "brats"), ("--random-weights", "0")
ARGUMENTS = (
    *("--device", "cuda:0"),
    *("--batches", "1,8,32,64", "--rounds", "3", "--seconds", "0.5", "--longest", "10"),
    *("--files", "256", "--out", "build/bench-gpu"),
)


def arguments(given: Sequence[str]) -> list[str]:
    """Return the arguments of qfae-bench: those that stand here, then what is given, which comes last and counts.

    Where another model is named, the preset or the random weights that would contradict it are left out.
    """
    named = {word.partition("=")[0] for word in given}
    preset = () if named & {"--engine", "--ckpt", "--config"} else PRESET
    weights = () if named & {"--engine", "--ckpt"} else WEIGHTS
    return [*preset, *weights, *ARGUMENTS, *given]


if __name__ == "__main__":
    bench(arguments(sys.argv[1:]))
