"""PyTorch as an engine, with or without a fault, so that nothing else can be what a gate refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from qfae_export.graph import InferenceGraph
from qfae_export.parity_report import ParityReport
from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import Scores
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.config import from_dict

BATCH = 16
Answer = Callable[[Tensor], Any]
Judge = Callable[..., list[ParityReport]]
"""Measures an answer to the demonstration's images, once, by the contracts of FP32 and FP16 (or those named)."""


class Torch:
    """PyTorch as an engine. Keeps to Engine."""

    max_batch, backend, device, version = BATCH, "torch", "cpu", torch.__version__
    batches = (1, 3, BATCH)

    def __init__(self, answer: Answer, image_size: int) -> None:
        self.image_size = image_size
        self._answer = answer

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        with torch.no_grad():
            return Scores(*(output.numpy() for output in self._answer(torch.from_numpy(images))))

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None: ...


def graph_of(scorer: AnomalyScorer, **score: Any) -> Any:
    """The scorer's graph, its score's options changed."""
    values = scorer.config.to_dict()
    config = from_dict({**values, "score": {**values["score"], **score}})
    return InferenceGraph(AnomalyScorer(config, scorer.autoencoder, scorer.perceptual))


def remembered(answer: Answer) -> Answer:
    """An answer that computes every batch once."""
    known: dict[bytes, tuple[Tensor, ...]] = {}

    def remember(given: Tensor) -> tuple[Tensor, ...]:
        key = given.numpy().tobytes()
        if key not in known:
            with torch.no_grad():
                known[key] = tuple(answer(given))
        return tuple(output.clone() for output in known[key])

    return remember
