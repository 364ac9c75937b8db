"""`make bench-gpu`: qfae-bench at full size on one GPU, in one command and inside eight minutes.

Runs from the checkout with whatever Python has torch; what is not installed is listed in the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

from benchmarks.speed.cli import main as bench

PRESET, WEIGHTS = ("--preset", "brats"), ("--random-weights", "0")
AGAINST = (
    "torch-plain,torch-fp16,torch-graph-fp16,torch-graph-fp16-streams,torch-compile-fp16,aotinductor-fp16,"
    "onnxruntime,onnxruntime-fp16,onnxruntime-tensorrt,tensorrt,tensorrt-fp16"
)
ARGUMENTS = (
    *("--device", "cuda:0"),
    *("--batches", "1,8,32,64", "--rounds", "3", "--seconds", "0.5", "--longest", "10", "--longest-build", "240"),
    *("--files", "256", "--out", "build/bench-gpu"),
)


def arguments(given: Sequence[str]) -> list[str]:
    """Return the arguments of qfae-bench: those that stand here, then what is given, which comes last and counts.

    Where another model is named, the preset or the random weights that would contradict it are left out; so are the
    candidates where it is tried on a processor, which cannot run them.
    """
    named = {word.partition("=")[0] for word in given}
    preset = () if named & {"--engine", "--ckpt", "--config"} else PRESET
    weights = () if named & {"--engine", "--ckpt"} else WEIGHTS
    against = () if "--against" in named or _on_processor(given) else ("--against", AGAINST)
    return [*preset, *weights, *against, *ARGUMENTS, *given]


def _on_processor(given: Sequence[str]) -> bool:
    return "--device=cpu" in given or ("--device", "cpu") in pairwise(given)


if __name__ == "__main__":
    bench(arguments(sys.argv[1:]))
