"""What engines are compared with: PyTorch in FP64 on the parity images, and how far PyTorch FP32 itself is from that.

    training modules, FP32    every image
    training modules, FP64    every image of a small model, a dozen of a large one: the truth
    inference graph, FP32     where there is FP64; with the modules it gives PyTorch's own error, the yardstick
    inference graph, FP64     a few images: that the rewriting computes what the modules do

Two FP32 forms, because one alone may be right by chance: errors of rounding are a draw, and a single draw that came out
small would refuse sound engines.

Letters: N images, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qfae_export.errors import ExportError
from qfae_export.graph import InferenceGraph
from qfae_export.images import ParityImages
from qfae_runtime.agreement import Agreement, Reference, Scale
from qfae_runtime.arrays import UInt8
from qfae_runtime.coverage import spread
from qfae_runtime.engines.base import Scores
from qfae_runtime.yardstick import Float64, Yardstick, errors_of, steps_of
from qfae_train import conditioning
from qfae_train.aggregate import factors
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.float32 import whole_float32

_BATCH = 8

LARGE_PARAMETERS = conditioning.LARGE_PARAMETERS
"""A model with more parameters than this is scored in FP64 on EXACT_IMAGES images alone: at full size FP64 takes twice
as long as FP32, and all images would double the time of an export."""

EXACT_IMAGES = conditioning.FEW_IMAGES
"""Half of them stress images; each kind spread over its scores, the lowest and the highest among them."""

_GRAPH_IMAGES = 3
"""Images on which the graph is compared in FP64: there a fault of the rewriting does not hide behind rounding."""

_GRAPH_BOUND = 0.01
"""How far scores and maps of the graph in FP64 may be from the modules' in FP64, in units of the modules' own FP32
error. Both are folded and computed in FP64: of a sound graph it is 1e-6 at the most, of the smallest of nine wrong
rewritings 1.4."""


@dataclass(frozen=True)
class Measured64:
    """The reference, and what was measured on the way to it.

    reference  FP64's outputs and PyTorch's own error
    exact      numbers of the images that were scored in FP64
    modules    the training modules' FP32 outputs on all images
    graph      the inference graph's FP32 outputs on the images `exact`
    pytorch    the training modules in FP32 against the reference, which they are themselves where there is no FP64
    """

    reference: Reference
    exact: tuple[int, ...]
    modules: Scores
    graph: Scores
    pytorch: Agreement


def reference_of(
    scorer: AnomalyScorer,
    graph: InferenceGraph,
    images: ParityImages,
    threshold: float | None = None,
    device: str = "cpu",
) -> Measured64:
    """Score the images with the training modules in FP64 and FP32 and with the whole graph in FP32.

    Decisions are taken at `threshold`, if one was calibrated. `device` is where PyTorch computes; the modules come back
    to the CPU, in FP32.

    Raises:
        ExportError: PyTorch's outputs are not finite, or the graph does not compute what the modules do.

    """
    pixels, numbers = images.pixels, list(range(len(images)))
    modules = modules_scores(scorer, pixels, device)
    exact = _exact(scorer, images, modules)
    of_graph = pytorch_scores(graph.to(device), pixels[exact], device)
    few = spread(len(exact), _GRAPH_IMAGES)
    with graph.in_float64():
        graph64 = pytorch_scores(graph, pixels[[exact[place] for place in few]], device)
    graph.to("cpu")
    with scorer.in_float64():
        truth = pytorch_scores(scorer.to(device), pixels[exact], device)
        scorer.to("cpu")
    scores = modules.of(numbers)  # a copy
    scores.score[exact], scores.anomaly_map[exact] = truth.score, truth.anomaly_map
    scores.reconstruction[exact] = truth.reconstruction
    forms = [errors_of(truth, form) for form in (modules.of(exact), of_graph)]
    groups = [int(number in images.stress) for number in numbers]
    yardstick = Yardstick.measured(scores, forms, exact, groups)
    scale = scale_of(images, scores, threshold, factors_of(scorer))
    reference = Reference(scores, scale, yardstick, images.stress)
    pytorch = reference.compare(modules, images.labels)
    # Of the modules alone: a fault of the graph is in its own FP32 outputs, too.
    alone = Yardstick.measured(scores, forms[:1], exact, groups).unit[[exact[place] for place in few]]
    _refuse_other_graph(truth.of(few), graph64, alone)
    return Measured64(reference, tuple(exact), modules, of_graph, pytorch)


def modules_scores(scorer: AnomalyScorer, images: UInt8, device: str = "cpu") -> Scores:
    """Return the training modules' FP32 outputs on uint8 (N, S, S, 3).

    `device` is where they compute; the modules come back to the CPU.

    Raises:
        ExportError: the outputs are not finite, so the checkpoint itself is at fault.

    """
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in scorer.state_dict().values()):
        raise ExportError("the reference must be float32; call scorer.float() before measuring")
    try:
        scores = pytorch_scores(scorer.to(device), images, device)
    finally:
        scorer.to("cpu")
    odd = int((~np.isfinite(scores.score)).sum() or (~np.isfinite(scores.anomaly_map)).sum())
    if odd:
        raise ExportError(
            f"the checkpoint gives {odd} values that are not finite on {len(images)} images, in PyTorch already; "
            "its training diverged: export an earlier checkpoint, or train again with a lower --lr"
        )
    return scores


@whole_float32()
def pytorch_scores(
    scorer: Callable[[torch.Tensor], Sequence[torch.Tensor]], images: UInt8, device: str = "cpu"
) -> Scores:
    """Return PyTorch's outputs on uint8 (N, S, S, 3), of the training modules or of the inference graph.

    Scores and maps are float32, or float64 of a module in FP64. `device` is where the module is.
    """
    with torch.no_grad():
        parts = [
            scorer(torch.from_numpy(images[start : start + _BATCH]).to(device))
            for start in range(0, len(images), _BATCH)
        ]
    return Scores(*(torch.cat(tensors).cpu().numpy() for tensors in zip(*parts, strict=True)))


def scale_of(images: ParityImages, reference: Scores, threshold: float | None = None, factors: int = 1) -> Scale:
    """Return what errors are held against, of the images as they came: stress images say nothing about scores."""
    return Scale.of(reference.of(slice(images.real)), images.labels[: images.real], threshold, factors)


def factors_of(scorer: AnomalyScorer) -> int:
    """Return how many cosine distances a score multiplies."""
    return factors(scorer.config.score)


def _exact(scorer: AnomalyScorer, images: ParityImages, scores: Scores) -> list[int]:
    """Return the numbers of the images to be scored in FP64, ascending."""
    numbers = list(range(len(images)))
    if sum(parameter.numel() for parameter in scorer.parameters()) <= LARGE_PARAMETERS:
        return numbers
    stress = set(images.stress)
    chosen: list[int] = []
    for group, count in (
        ([number for number in numbers if number not in stress], EXACT_IMAGES // 2),
        ([number for number in numbers if number in stress], EXACT_IMAGES // 2),
    ):
        by_score = sorted(group, key=lambda number: float(scores.score[number]))
        chosen += [by_score[place] for place in spread(len(by_score), count)]
    return sorted(chosen)


def _refuse_other_graph(truth: Scores, graph: Scores, own: Float64) -> None:
    """Refuse a graph that is not the modules', in real numbers; `own` is the modules' FP32 error on these images.

    Raises:
        ExportError: by how much they differ.

    """
    score, maps = (errors_of(truth, graph) / (own + steps_of(truth))).max(axis=0)[:2]
    if not (score <= _GRAPH_BOUND and maps <= _GRAPH_BOUND):
        raise ExportError(
            "the inference graph does not compute what the training modules do: in FP64, where hardly anything is "
            f"rounded, its scores are {score:.3g} times as far from theirs as PyTorch FP32 is, its maps {maps:.3g} "
            f"times (at most {_GRAPH_BOUND:g} expected); report this line, with the checkpoint's configuration"
        )
