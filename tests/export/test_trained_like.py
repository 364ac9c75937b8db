"""Made-up weights are conditioned as trained ones are: by place, by stage and by what FP16 does to scores."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from timm.layers.layer_scale import LayerScale
from torch import Tensor, nn

import qfae_export.random_weights
from qfae_export.graph import InferenceGraph
from qfae_export.images import from_slices
from qfae_export.layers import Attend, Residual
from qfae_export.precision import FP16
from qfae_export.random_weights import random_scorer
from qfae_export.reference import factors_of, pytorch_scores, scale_of
from qfae_export.trained_like import fill
from qfae_runtime.agreement import Reference, distance
from qfae_runtime.contract import CONTRACTS
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.backbone import create
from qfae_train.config import Backbone, Config, from_dict, load

WIDTH, DEPTH = 128, 12


def deep() -> Config:
    """The main preset, narrower, half as deep, and of 112 pixels: what depth does to a network shows already."""
    values = load("brats").to_dict()
    model: dict[str, Any] = values["model"]
    for entry in (*model["encoders"], values["perceptual"]):
        entry["args"] = {**entry.get("args", {}), "embed_dim": WIDTH, "num_heads": 2, "depth": DEPTH}
        entry.pop("weights", None)
    model["image_size"] = 112
    model["qformer"].update(dim=WIDTH, heads=2, queries=196)
    model["decoder"].update(dim=WIDTH, heads=2)
    values["loss"].update(blocks=[8, 10], patch_sizes=[28, 56])
    values["score"].update(blocks=[6, 8, 10], patch_sizes=[16, 28, 56])
    return from_dict(values)


class Condition(NamedTuple):
    """What a model is like on brain slices."""

    growth: float
    """Of the encoder's residual stream: the root mean square before its last addition over that before the first."""
    branch: float
    """Largest share that a residual branch of the frozen networks has of its stream, in root mean squares."""
    logits: tuple[float, float]
    """Their standard deviation over keys: the least and the largest of any attention."""
    entropy: float
    """Of attention weights, as a share of the largest possible: the least of any attention."""
    rank: float
    """Directions that the hidden states of image patches span: exp of the entropy of their covariance's spectrum."""
    reconstruction: float
    """Standard deviation of a pixel over images, grey levels."""
    spread: float
    """Interquartile range of the scores as distances, over their mean."""
    error: float
    """FP16: mean error of the scores as distances, over their interquartile range."""
    broken: list[str]
    """Bounds of FP16's contract that are broken."""


def condition(scorer: AnomalyScorer) -> Condition:
    graph, images = InferenceGraph(scorer), from_slices(scorer.config.preprocess_spec())
    seen: dict[str, tuple[float, ...]] = {}
    states: list[Tensor] = []
    with watched(graph, seen, states):
        scores = pytorch_scores(graph, images.pixels)
    factors = factors_of(scorer)
    reference = Reference(scores, scale_of(images, scores, None, factors))
    values = reference.compare(pytorch_scores(graph.emulated(FP16), images.pixels), images.labels).values
    distances = distance(scores.score.astype(np.float64), factors)
    iqr = float(np.subtract(*np.percentile(distances, [75, 25])))
    contract = CONTRACTS["fp16"].without([name for name in CONTRACTS["fp16"].bounds if name.startswith("stress")])
    attentions = [numbers for name, numbers in seen.items() if name.endswith("attention")]
    residuals = {name: numbers for name, numbers in seen.items() if "residual" in name}
    branches = [numbers for name, numbers in residuals.items() if not name.startswith("decoder")]
    stream = [numbers[0] for name, numbers in residuals.items() if name.startswith("encoder")]
    return Condition(
        growth=stream[-1] / stream[0],
        branch=max(update / of for of, update in branches),
        logits=(min(one[0] for one in attentions), max(one[0] for one in attentions)),
        entropy=min(one[1] for one in attentions),
        rank=effective_rank(torch.cat(states)),
        reconstruction=float(scores.reconstruction.astype(np.float64).std(axis=0).mean()),
        spread=iqr / float(distances.mean()),
        error=float(values["score_distance"] or 0) / iqr,
        broken=[name for name in contract.bounds if not contract.allows(name, values[name])],
    )


@contextmanager
def watched(graph: InferenceGraph, seen: dict[str, tuple[float, ...]], states: list[Tensor]) -> Iterator[None]:
    """Collect, of the last batch, each attention's and each residual's numbers, and the encoder's patches of all."""

    def attention(name: str) -> Callable[..., None]:
        def see(module: Attend, inputs: tuple[Tensor, ...]) -> None:
            q, k = (one[:1].unflatten(2, (module.heads, -1)).transpose(1, 2) for one in inputs[:2])
            logits = q @ k.transpose(2, 3)
            weights = logits.softmax(-1)
            entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean() / math.log(k.shape[2])
            seen[name] = (float((logits - logits.mean(-1, keepdim=True)).std()), float(entropy))

        return see

    def residual(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            stream, update = (float(one.square().mean().sqrt()) for one in inputs)
            seen[name] = (stream, update)

        return see

    def tap(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        states.append(out[:, 5:].flatten(0, 1))  # without class and register tokens

    last = f"encoder.{DEPTH - 1}.residual2"
    handles = [graph.get_submodule(last).register_forward_hook(tap)]
    for name, module in graph.named_modules():
        if isinstance(module, Attend):
            handles.append(module.register_forward_pre_hook(attention(name)))
        elif isinstance(module, Residual):
            handles.append(module.register_forward_pre_hook(residual(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def effective_rank(rows: Tensor) -> float:
    centred = rows.double() - rows.double().mean(0)
    share = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(1e-300)
    share = share / share.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def unlike_trained(found: Condition) -> list[str]:
    """Name what is not as in trained networks; the facts are in trained_like.py."""
    allowed = {
        "growth": 1 < found.growth < 3,
        "branch": found.branch < 0.4,  # the stream carries several times as much
        "logits": found.logits[0] > 0.3 and found.logits[1] < 3,  # of order 1: not uniform
        "entropy": found.entropy > 0.4,  # nor on single tokens
        "rank": found.rank > 0.15 * WIDTH,
        "reconstruction": found.reconstruction > 12,
        "spread": found.spread > 0.05,
        "error": found.error < 0.004,
        "contract": not found.broken,
    }
    return [name for name, holds in allowed.items() if not holds]


def test_stages_and_scores_are_like_those_of_trained_networks() -> None:
    found = condition(random_scorer(deep(), 0))
    assert unlike_trained(found) == [], found


def test_a_plain_draw_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qfae_export.random_weights, "fill", plain)
    found = condition(random_scorer(deep(), 0))
    assert unlike_trained(found) == ["branch", "logits", "rank", "reconstruction", "spread"], found


@pytest.mark.parametrize("scaled", [True, False], ids=["LayerScale", "no LayerScale"])
def test_a_backbone_by_place(scaled: bool) -> None:
    """Standard deviations times the root of the inputs are gains; correlations are between weights."""
    vit: Any = backbone(args={"init_values": 1e-5} if scaled else {})
    gain = 2.0 / (2 * len(vit.blocks)) ** 0.5  # of both branches of all blocks, the root of the sum of squares is 2
    for block in vit.blocks:
        q, k, v = block.attn.qkv.weight.chunk(3)
        assert [gain_of(one) for one in (q, k, v)] == pytest.approx([1, 1, 1], rel=0.03)
        assert correlation(q, k) == pytest.approx(0.3, abs=0.03)
        assert correlation(block.attn.proj.weight, v.t()) == pytest.approx(-0.1, abs=0.03)
        assert gain_of(block.mlp.fc1.weight) == pytest.approx(1, rel=0.03)
        last = (block.attn.proj.weight, block.mlp.fc2.weight)
        # A GELU leaves 0.65 of what is standard normal, so the layer behind it has 1 / 0.65.
        assert [gain_of(one) for one in last] == pytest.approx(
            [1, 1 / 0.65] if scaled else [gain, gain / 0.65], rel=0.03
        )
        assert block.norm1.weight.mean() == pytest.approx(1, abs=0.06)
        assert block.norm1.weight.std() == pytest.approx(0.2, rel=0.25)
        for scale in (block.ls1, block.ls2):
            assert isinstance(scale, LayerScale) == scaled
            if scaled:
                assert (scale.gamma > 0).all()
                assert scale.gamma.square().mean().sqrt() == pytest.approx(gain, rel=0.2)
                assert scale.gamma.log().std() == pytest.approx(0.5, rel=0.25)


@pytest.mark.parametrize("prefix", [1, 0], ids=["class token in the table", "table of patches alone"])
def test_positions_are_smooth(prefix: int) -> None:
    vit: Any = backbone("vit_tiny_patch16_224" if prefix else "vit_small_patch14_reg4_dinov2")
    table = vit.pos_embed[0, prefix:].unflatten(0, (14, 14))
    assert table.square().mean().sqrt() == pytest.approx((0.5 + 0.3**2) ** 0.5, rel=0.05)
    assert correlation(table[:, 1:], table[:, :-1]) > 0.4
    assert abs(correlation(table[:, 7:], table[:, :-7])) < 0.15
    assert table.flatten(0, 1).mean(0).square().mean() < 0.2 * table.square().mean()


def test_filters_see_all_frequencies_of_an_image_and_patches_have_those_of_one() -> None:
    vit: Any = backbone()
    of_filters = spectrum(vit.patch_embed.proj.weight)
    at = torch.arange(16.0)
    frequency = torch.hypot(at[:, None], at[None, :])
    assert 3 <= float(frequency.flatten()[of_filters.argmax()]) <= 5
    seen = (of_filters / frequency)[(frequency > 0) & (frequency < 3)]
    assert seen.max() / seen.min() < 2.5  # of amplitudes that fall as 1 / f
    head = random_scorer(deep(), 0).autoencoder.decoder.predict.weight.unflatten(0, (8, 8, 3)).permute(3, 2, 0, 1)
    falls = spectrum(head) * torch.hypot(at[:8, None], at[None, :8])
    falls = falls[torch.hypot(at[:8, None], at[None, :8]) > 0]
    assert falls.max() / falls.min() < 2
    # Behind a norm, of variance 1: pixels of about variance 1 in the normalised scale, their colours nearly alike.
    assert head.square().sum(0).mean() == pytest.approx(1, rel=0.25)
    assert correlation(head[:, 0], head[:, 1]) > 0.8


def test_trained_parts_by_place() -> None:
    model: Any = random_scorer(deep(), 0).autoencoder
    block: Any = model.qformer.blocks[0]
    assert gain_of(model.encoders[0].projection.weight) == pytest.approx(3**-0.5, rel=0.03)
    assert gain_of(block.cross.to_q.weight) == pytest.approx(1.5, rel=0.03)
    assert gain_of(block.cross.to_kv.weight) == pytest.approx(1, rel=0.03)
    heads = block.attention.qkv.weight[:WIDTH].chunk(2)
    key = block.attention.qkv.weight[WIDTH : WIDTH + WIDTH // 2]
    assert [correlation(head, key) for head in heads] == pytest.approx([0.3, 0.3], abs=0.03)
    assert gain_of(torch.cat(heads)) == pytest.approx(1, rel=0.03)


def backbone(timm: str = "vit_tiny_patch16_224", args: Mapping[str, Any] = MappingProxyType({})) -> nn.Module:
    entry = Backbone(timm, 16, {"embed_dim": 128, "depth": 3, "num_heads": 2, **args})
    vit = create(entry, 224)
    fill(vit, vit.state_dict(), "0")
    return vit.requires_grad_(False)


def gain_of(weight: Tensor) -> float:
    return weight.std().item() * math.sqrt(weight[0].numel())


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


def spectrum(patches: Tensor) -> Tensor:
    """Return the amplitudes (P, P) of patches (N, colours, P, P) by their cosine waves, by scipy."""
    waves = dctn(patches.detach().double().numpy(), axes=(2, 3), norm="ortho")
    return torch.from_numpy(np.sqrt((waves**2).mean((0, 1))))


@torch.no_grad()
def plain(model: nn.Module, tensors: Mapping[str, Tensor], seed: str) -> None:
    """The draw of earlier versions: all that products and norms give has variance 1, and nothing more is asked."""
    for name, tensor in tensors.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        tensor.normal_(generator=generator)
        if tensor.ndim >= 2 and name.endswith("weight"):
            tensor.mul_(tensor[0].numel() ** -0.5)
        elif name.endswith(("weight", "gamma")):
            tensor.mul_(0.1).add_(1)
        else:
            tensor.mul_(0.1 if name.endswith("bias") else 0.5)
