"""FP16 as a GPU rounds it, in PyTorch on the CPU: an engine that computes nothing faster, and shows what FP16 does.

ONNX Runtime has few FP16 operations on a CPU. It computes the others in FP32 and leaves out the rounding in between, so
that neither an overflow nor all of the error need show. Here every value is rounded that an FP16 engine rounds.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch

from qfae_export.graph import InferenceGraph
from qfae_export.precision import Precision
from qfae_export.reference import pytorch_scores
from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import Scores
from qfae_runtime.engines.batches import run_split, sizes_up_to


class RoundedEngine:
    """A whole FP32 graph in a precision policy, emulated. Keeps to Engine; the graph itself is left as it is."""

    backend, device, version = "pytorch", "cpu", torch.__version__

    def __init__(self, graph: InferenceGraph, precision: Precision, max_batch: int) -> None:
        self.image_size, self.max_batch, self.batches = graph.image_size, max_batch, sizes_up_to(max_batch)
        self._graph = graph.emulated(precision)

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        """Score uint8 (B, S, S, 3); see Engine.run. The maps are always computed."""
        return run_split(self.batches, images, lambda part: pytorch_scores(self._graph, part))

    def close(self) -> None:
        """Free nothing: the graph goes with the engine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
