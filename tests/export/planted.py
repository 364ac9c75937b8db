"""Tiny models with faults planted that FP16 cannot bear, and what makes a bisection of them quick."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qfae_export.graph import InferenceGraph
from qfae_export.images import ParityImages
from qfae_export.precision import Precision
from qfae_export.retype import Retyper
from qfae_train.autoencoder import AnomalyScorer
from tests.export.tiny import config_of, pictures, scorer_of

CONFIG = config_of(qformer_blocks=2)

Fault = Callable[[AnomalyScorer], None]


def planted(*faults: Fault) -> AnomalyScorer:
    """A tiny model with faults; every one is computed faithfully in FP32."""
    scorer = scorer_of(CONFIG)
    with torch.no_grad():
        for fault in faults:
            fault(scorer)
    return scorer


def overflow_in_perceptual_2(scorer: AnomalyScorer) -> None:
    """The hidden layer of an MLP is far beyond 65504, its output is of the residual stream's size."""
    perceptual: Any = scorer.perceptual
    block = perceptual.blocks[1]
    block.mlp.fc1.weight *= 2.0**24
    block.mlp.fc2.weight *= 2.0**-20


def cancellation_in_decoder_1(scorer: AnomalyScorer) -> None:
    """All weights are shifted by 128: LayerNorm's outputs add up to 0, so the shift has no effect in FP32.

    In FP16 the shift swallows the weights' digits, and multiplies what rounding adds to the sum of LayerNorm's outputs.
    """
    block: Any = scorer.autoencoder.decoder.blocks[0]
    block.norm2.bias -= block.norm2.bias.mean()
    block.mlp.fc1.weight += 128


def large_bias_in_encoder_1(scorer: AnomalyScorer) -> None:
    """A bias of 2000 passes the GELU unchanged and is subtracted by the next layer; FP16 keeps no digits beside it."""
    backbone: Any = scorer.autoencoder.encoders[0].backbone
    block = backbone.blocks[0]
    block.mlp.fc1.weight *= 10
    block.mlp.fc2.weight *= 10
    block.mlp.fc1.bias += 2000
    block.mlp.fc2.bias -= 2000 * block.mlp.fc2.weight.sum(dim=1)


def parity_images(count: int = 12) -> ParityImages:
    names = tuple(f"picture {number}" for number in range(count))
    return ParityImages(pictures(count), names, "pictures", tuple(number % 2 == 1 for number in range(count)))


def retyper_of(graph: InferenceGraph) -> Retyper:
    """A Retyper of a graph of `CONFIG`, without tracing it: all of them have one structure."""
    one = copy.copy(_traced())
    one._weights = {name: buffer for name, buffer in graph.named_buffers() if name in one._weights}
    return one


def write_untraced(graph: InferenceGraph, path: Path) -> list[Path]:
    """`write_onnx` of a graph of `CONFIG`, without tracing it; an FP32 one is what an FP16 file with all kept is."""
    precision = graph.precision if graph.precision.name == "fp16" else Precision("fp16", tuple(graph.units()))
    return retyper_of(graph).write(precision, path)


@cache
def _traced() -> Retyper:
    return Retyper(InferenceGraph(scorer_of(CONFIG)))
