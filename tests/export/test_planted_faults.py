"""Faults of the kind that exports really have, planted one by one: the gate must refuse each, at FP32 and at FP16.

The engines are the inference graph in PyTorch, whole but for the fault, so that nothing else can be what is refused.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qfae_train.perceptual
from qfae_export.errors import ExportError
from qfae_export.graph import InferenceGraph
from qfae_export.images import ParityImages, from_checkpoint
from qfae_export.layers import Linear
from qfae_export.parity import ParityReport, measure, reference_scores, scale_of
from qfae_export.precision import FP16, Precision
from qfae_export.resize_check import check_resize
from qfae_runtime.agreement import Scale, measure_agreement
from qfae_runtime.arrays import UInt8
from qfae_runtime.contract import CONTRACTS
from qfae_runtime.engines.base import Scores
from qfae_runtime.preprocess import PreprocessSpec
from qfae_train.aggregate import anomaly
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.checkpoint import build_scorer, load
from qfae_train.config import from_dict
from tests.commands import ROOT
from tests.export.tiny import config_of, pictures, scorer_of

BATCH = 16
Answer = Callable[[Tensor], Any]


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


# The demonstration's trained model. Its scores span seven decades, which FP16 bears in the perceptual network alone.
HALF = Precision("fp16", ("encoder", "qformer", "decoder"))


@pytest.fixture(scope="module")
def scorer() -> AnomalyScorer:
    return build_scorer(load(ROOT / "demo/weights/demo.pt"))


@pytest.fixture(scope="module")
def images() -> ParityImages:
    """Grey slices that the trainer stored, and some of them in false colours."""
    stored = load(ROOT / "demo/weights/demo.pt").parity_images.numpy()
    return from_checkpoint(stored, PreprocessSpec("resize", 112), "demo.pt")


@pytest.fixture(scope="module")
def reference(scorer: AnomalyScorer, images: ParityImages) -> Scores:
    return reference_scores(scorer, images.pixels)


Judge = Callable[[Answer, str], ParityReport]


@pytest.fixture(scope="module")
def judge(images: ParityImages, reference: Scores) -> Judge:
    scale: Scale = scale_of(images, reference)

    def report(answer: Answer, precision: str) -> ParityReport:
        return measure(Torch(answer, 112), images, reference, CONTRACTS[precision], scale)

    return report


def graph_of(scorer: AnomalyScorer, **score: Any) -> Any:
    """The scorer's graph, its score's options changed."""
    values = scorer.config.to_dict()
    config = from_dict({**values, "score": {**values["score"], **score}})
    return InferenceGraph(AnomalyScorer(config, scorer.autoencoder, scorer.perceptual))


both = pytest.mark.parametrize("precision", ["fp32", "fp16"])
"""The contract that must catch the fault; FP16's own rounding is left out, for PyTorch's takes minutes on a CPU."""


@both
def test_without_a_fault_it_passes(scorer: AnomalyScorer, judge: Judge, precision: str) -> None:
    graph = graph_of(scorer)
    report = judge(graph.cast(HALF) if precision == "fp16" else graph, precision)
    assert report, report.failures()


def test_one_weight_matrix_perturbed_by_one_percent(
    scorer: AnomalyScorer, images: ParityImages, reference: Scores
) -> None:
    """Every matrix, one after the other; 1 % of its own size, in random directions."""
    graph = InferenceGraph(scorer)
    few = [int(number) for number in np.argsort(reference.score)[-9:]]
    scale, given = scale_of(images, reference), torch.from_numpy(images.pixels[few])
    whole = Scores(*(output.numpy() for output in graph(given)))
    assert not CONTRACTS["fp32"].failures(measure_agreement(reference.of(few), whole, scale=scale))  # without a fault
    unseen = []
    for name, module in graph.named_modules():
        if isinstance(module, Linear):
            kept = module.weight.clone()
            noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
            module.weight.add_(0.01 * kept.std() * noise)
            got = Scores(*(output.numpy() for output in graph(given)))
            module.weight.copy_(kept)
            if not CONTRACTS["fp32"].failures(measure_agreement(reference.of(few), got, scale=scale)):
                unseen.append(name)
    assert unseen == []


@both
def test_one_weight_matrix_scaled_by_one_percent(scorer: AnomalyScorer, judge: Judge, precision: str) -> None:
    graph = graph_of(scorer)
    graph.decoder.head.weight.mul_(1.01)
    assert not judge(graph, precision)


@both
def test_blue_for_red(scorer: AnomalyScorer, judge: Judge, precision: str) -> None:
    graph = graph_of(scorer)
    report = judge(lambda given: graph(given.flip(-1)), precision)
    assert not report
    assert all("in false colours" in text for text in report.failures() if " image " in text and "score" not in text)


@both
def test_a_transposed_map(scorer: AnomalyScorer, judge: Judge, precision: str) -> None:
    graph = graph_of(scorer)

    def answer(given: Tensor) -> tuple[Tensor, ...]:
        score, anomaly_map, greys = graph(given)
        return score, anomaly_map.transpose(1, 2), greys

    report = judge(answer, precision)
    assert any("map cosine, p1" in text for text in report.failures())


@both
def test_the_wrong_blocks(scorer: AnomalyScorer, judge: Judge, precision: str) -> None:
    assert scorer.config.score.blocks == (1,)
    assert not judge(graph_of(scorer, blocks=[2]), precision)


@both
@pytest.mark.parametrize("sizes", [[4, 8], [8, 16], [4, 16]])
def test_a_dropped_patch_size(scorer: AnomalyScorer, judge: Judge, precision: str, sizes: list[int]) -> None:
    assert not judge(graph_of(scorer, patch_sizes=sizes), precision)


@both
def test_encoder_states_off_by_one(scorer: AnomalyScorer, judge: Judge, precision: str) -> None:
    graph = graph_of(scorer)
    graph.encoder.taps = [tap - 1 for tap in graph.encoder.taps]
    assert not judge(graph, precision)


@both
def test_a_map_of_another_image_of_the_batch(scorer: AnomalyScorer, judge: Judge, precision: str) -> None:
    graph = graph_of(scorer)

    def answer(given: Tensor) -> tuple[Tensor, ...]:
        score, anomaly_map, greys = graph(given)
        return score, anomaly_map.roll(1, dims=0), greys

    report = judge(answer, precision)
    assert any("map cosine, p1" in text for text in report.failures())
    assert not any(text.startswith("batch 1:") for text in report.failures())


@both
def test_a_reconstruction_of_another_image(scorer: AnomalyScorer, judge: Judge, precision: str) -> None:
    graph = graph_of(scorer)

    def answer(given: Tensor) -> tuple[Tensor, ...]:
        score, anomaly_map, greys = graph(given)
        return score, anomaly_map, greys.roll(1, dims=0)

    assert any("reconstruction" in text for text in judge(answer, precision).failures())


@both
def test_positions_resized_without_antialias(
    scorer: AnomalyScorer, judge: Judge, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def aliased(table: Tensor, new_size: list[int], num_prefix_tokens: int, **_: object) -> Tensor:
        side = int((table.shape[1] - num_prefix_tokens) ** 0.5)
        grid = table[:, num_prefix_tokens:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=new_size, mode="bicubic", antialias=False)
        return torch.cat([table[:, :num_prefix_tokens], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    monkeypatch.setattr(qfae_train.perceptual, "resample_abs_pos_embed", aliased)
    faulty = build_scorer(load(ROOT / "demo/weights/demo.pt"))
    assert not judge(graph_of(faulty), precision)


def test_images_resized_without_antialias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine and reference are given the same pixels: only the check of the preparation itself can see this."""
    check_resize(PreprocessSpec("resize", 112))

    def aliased(pixels: UInt8, height: int, width: int) -> UInt8:
        chw = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        resized = F.interpolate(chw, size=(height, width), mode="bilinear", antialias=False)
        prepared: UInt8 = resized[0].round().to(torch.uint8).permute(1, 2, 0).numpy()
        return prepared

    monkeypatch.setattr(sys.modules["qfae_runtime.preprocess"], "resize", aliased)
    with pytest.raises(ExportError, match=r"^preprocessing: an image of 240 x 240 resized to 112 x 112 differs from "):
        check_resize(PreprocessSpec("resize", 112))


def test_channels_swapped_by_the_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["qfae_runtime.preprocess"]
    right = module.resize
    monkeypatch.setattr(module, "resize", lambda pixels, *size: right(pixels[..., ::-1].copy(), *size))
    with pytest.raises(ExportError, match="differs from torchvision's"):
        check_resize(PreprocessSpec("resize", 112))


class Near(torch.nn.Module):
    """The scorer half on images and on the same with grain: distances near 0.02, as those of real models are."""

    def __init__(self, scorer: AnomalyScorer, *, half_tail: bool, half: bool) -> None:
        super().__init__()
        self.graph = InferenceGraph(scorer, "scorer")
        if half:
            self.graph.cast(FP16)
        self.half_tail = half_tail

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grain = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(2))
        # The more grain the brighter the image: scores differ.
        amount = images.float().amax(dim=(1, 2, 3), keepdim=True) ** 2 / 1000
        pixels = images.float() + amount * grain
        if not self.half_tail:
            return (*self.graph(images, pixels), images)
        graph, batch = self.graph, len(images)
        both = graph.perceptual(torch.cat([(images.float() - 114) / 64, (pixels - 114) / 64]))
        maps = {}
        for key, tokens in both.items():
            side = graph.image_size // key[1]
            a, b = tokens[:batch].half(), tokens[batch:].half()
            norms = (a * a).sum(-1).sqrt() * (b * b).sum(-1).sqrt()
            maps[key] = (1 - (a * b).sum(-1) / norms).unflatten(1, (side, side))
        score, anomaly_map = anomaly(maps, graph.options, graph.image_size)
        return score.float(), anomaly_map.float(), images


def test_a_half_precision_tail() -> None:
    """1 - cosine of half precision numbers, multiplied over three maps: 1 % of a score at distances near 0.02."""
    scorer = scorer_of(config_of(patch_sizes=[8, 16, 32], blocks=[1, 2]))
    brightness = np.linspace(0.3, 1, 32)[:, None, None, None]
    images = from_checkpoint((pictures(32) * brightness).astype(np.uint8), PreprocessSpec("resize", 32), "made up")
    with torch.no_grad():
        outputs = Near(scorer, half_tail=False, half=False)(torch.from_numpy(images.pixels))
    reference = Scores(*(output.numpy() for output in outputs))
    distance = float(np.median(reference.score)) ** (1 / 3)
    assert 0.01 < distance < 0.06

    def report(**kind: bool) -> ParityReport:
        return measure(Torch(Near(scorer, **kind), 32), images, reference, CONTRACTS["fp16"])

    sound = report(half_tail=False, half=True)
    assert sound, sound.failures()
    assert not report(half_tail=True, half=True)


def test_a_stale_output(scorer: AnomalyScorer, judge: Judge, images: ParityImages) -> None:
    """An engine that does not write an output leaves what an earlier batch left there."""
    graph = InferenceGraph(scorer)
    left: list[Tensor] = []

    def answer(given: Tensor) -> tuple[Tensor, ...]:
        score, anomaly_map, greys = graph(given)
        left.append(anomaly_map)
        return score, left[0][: len(given)], greys

    assert not judge(answer, "fp16")


def test_a_lax_contract_cannot_be_slipped_in() -> None:
    lax = dataclasses.replace(CONTRACTS["fp16"], bounds={**CONTRACTS["fp16"].bounds, "score_iqr": 0.5})
    assert not lax.is_as_strict_as(CONTRACTS["fp16"])
