"""Faults of the kind that exports really have, planted one by one: the gate must refuse each, at FP32 and at FP16.

The engines are the inference graph in PyTorch, whole but for the fault, so that nothing else can be what is refused.
"""

from __future__ import annotations

import dataclasses
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qfae_train.perceptual
from qfae_export.chain import beyond_rounding
from qfae_export.errors import ExportError
from qfae_export.graph import InferenceGraph
from qfae_export.images import ParityImages, from_checkpoint
from qfae_export.layers import Linear
from qfae_export.parity import measure
from qfae_export.parity_report import ParityReport
from qfae_export.precision import FP16, Precision
from qfae_export.reference import Measured64, pytorch_scores
from qfae_export.resize_check import check_resize
from qfae_export.rounded import RoundedEngine
from qfae_runtime.agreement import Reference, Scale
from qfae_runtime.arrays import UInt8
from qfae_runtime.contract import CONTRACTS
from qfae_runtime.engines.base import Scores
from qfae_runtime.preprocess import PreprocessSpec
from qfae_train.aggregate import anomaly
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.checkpoint import build_scorer, load
from tests.commands import ROOT
from tests.export.in_torch import Judge, Torch, graph_of
from tests.export.tiny import config_of, pictures, scorer_of

# The demonstration's trained model. Its scores span seven decades, which FP16 bears in the perceptual network alone.
HALF = Precision("fp16", ("encoder", "qformer", "decoder"))

# FP16's own rounding is left out of the faulty engines, for PyTorch's takes minutes on a CPU.


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_without_a_fault_it_passes(scorer: AnomalyScorer, judge: Judge, precision: str) -> None:
    graph = graph_of(scorer)
    [report] = judge(graph.cast(HALF) if precision == "fp16" else graph, (precision,))
    assert report, report.failures()


def test_one_weight_matrix_perturbed_by_one_percent(
    scorer: AnomalyScorer, images: ParityImages, measured: Measured64
) -> None:
    """Every matrix, one after the other; 1 % of its own size, in random directions."""
    graph = InferenceGraph(scorer)
    few = [int(number) for number in np.argsort(measured.reference.scores.score[: images.real])[-9:]]
    reference, given = measured.reference.of(few), torch.from_numpy(images.pixels[few])
    whole = Scores(*(output.numpy() for output in graph(given)))
    assert not CONTRACTS["fp32"].failures(reference.compare(whole))  # without a fault
    unseen = []
    for name, module in graph.named_modules():
        if isinstance(module, Linear):
            kept = module.weight.clone()
            noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
            module.weight.add_(0.01 * kept.std() * noise)
            got = Scores(*(output.numpy() for output in graph(given)))
            module.weight.copy_(kept)
            if not CONTRACTS["fp32"].failures(reference.compare(got)):
                unseen.append(name)
    assert unseen == []


def test_one_weight_matrix_scaled_by_one_percent(scorer: AnomalyScorer, judge: Judge) -> None:
    graph = graph_of(scorer)
    graph.decoder.head.weight.mul_(1.01)
    assert not any(judge(graph))


def test_blue_for_red(scorer: AnomalyScorer, judge: Judge, images: ParityImages) -> None:
    graph = graph_of(scorer)
    coloured = {name for name, image in zip(images.names, images.pixels, strict=True) if np.ptp(image, axis=2).any()}
    assert coloured
    for report in judge(lambda given: graph(given.flip(-1))):
        named = [match.group(1) for text in report.failures() if (match := re.search(r" \((.*)\)", text))]
        assert named
        assert coloured.issuperset(named)


def test_a_transposed_map(scorer: AnomalyScorer, judge: Judge) -> None:
    graph = graph_of(scorer)

    def answer(given: Tensor) -> tuple[Tensor, ...]:
        score, anomaly_map, greys = graph(given)
        return score, anomaly_map.transpose(1, 2), greys

    for report in judge(answer):
        assert any(": map " in text for text in report.failures())


def test_the_wrong_blocks(scorer: AnomalyScorer, judge: Judge) -> None:
    assert scorer.config.score.blocks == (1,)
    assert not any(judge(graph_of(scorer, blocks=[2])))


@pytest.mark.parametrize("sizes", [[4, 8], [8, 16], [4, 16]])
def test_a_dropped_patch_size(scorer: AnomalyScorer, judge: Judge, sizes: list[int]) -> None:
    assert not any(judge(graph_of(scorer, patch_sizes=sizes)))


def test_encoder_states_off_by_one(scorer: AnomalyScorer, judge: Judge) -> None:
    graph = graph_of(scorer)
    graph.encoder.taps = [tap - 1 for tap in graph.encoder.taps]
    assert not any(judge(graph))


def test_a_map_of_another_image_of_the_batch(scorer: AnomalyScorer, judge: Judge) -> None:
    graph = graph_of(scorer)

    def answer(given: Tensor) -> tuple[Tensor, ...]:
        score, anomaly_map, greys = graph(given)
        return score, anomaly_map.roll(1, dims=0), greys

    for report in judge(answer):
        assert any(": map " in text for text in report.failures())
        assert not any(text.startswith("batch 1:") for text in report.failures())


def test_a_reconstruction_of_another_image(scorer: AnomalyScorer, judge: Judge) -> None:
    graph = graph_of(scorer)

    def answer(given: Tensor) -> tuple[Tensor, ...]:
        score, anomaly_map, greys = graph(given)
        return score, anomaly_map, greys.roll(1, dims=0)

    for report in judge(answer):
        assert any("reconstruction" in text for text in report.failures())


def test_positions_resized_without_antialias(
    scorer: AnomalyScorer, images: ParityImages, measured: Measured64, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def aliased(table: Tensor, new_size: list[int], num_prefix_tokens: int, **_: object) -> Tensor:
        side = int((table.shape[1] - num_prefix_tokens) ** 0.5)
        grid = table[:, num_prefix_tokens:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=new_size, mode="bicubic", antialias=False)
        return torch.cat([table[:, :num_prefix_tokens], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    monkeypatch.setattr(qfae_train.perceptual, "resample_abs_pos_embed", aliased)
    faulty = graph_of(build_scorer(load(ROOT / "demo/weights/demo.pt")))
    assert not any(judge(faulty, ("fp32",)))
    # Its errors are a quarter of what FP16 may cost at all, but nine times what it costs this model.
    few = [0, 9, 18, 27, 36, 45]
    rounded = RoundedEngine(graph_of(scorer), HALF, len(few)).run(images.pixels[few])
    truth = measured.reference.scores.of(few)
    said = beyond_rounding(truth, rounded, pytorch_scores(faulty, images.pixels[few]))
    assert [one.partition(" errors are ")[0] for one in said] == ["score", "map"]
    assert beyond_rounding(truth, rounded, rounded) == []
    assert beyond_rounding(truth, rounded, measured.modules.of(few)) == [], "an engine may round less"


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
    scores = Scores(*(output.numpy() for output in outputs))
    reference = Reference(scores, Scale.of(scores, factors=3))
    distance = float(np.median(scores.score)) ** (1 / 3)
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

    assert not any(judge(answer))


def test_a_lax_contract_cannot_be_slipped_in() -> None:
    lax = dataclasses.replace(CONTRACTS["fp16"], bounds={**CONTRACTS["fp16"].bounds, "score_distance": 0.5})
    assert not lax.is_as_strict_as(CONTRACTS["fp16"])
