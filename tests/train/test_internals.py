"""The figures of --verbose, against values computed another way, and those of the shipped model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from qfae_train.autoencoder import AnomalyScorer, build, normalise
from qfae_train.checkpoint import build_scorer, load
from qfae_train.cli import command
from qfae_train.encoder import Encoder
from qfae_train.evaluate import internals_of
from qfae_train.evaluate_cli import evaluate_command
from qfae_train.internals import Gain, Internals, States, effective_rank, gain, internals, spectrum

from . import tiny
from .made_up import toml

SHIPPED = Path(__file__).parents[2] / "demo" / "weights" / "demo.pt"

# What the shipped model must keep to, so that FP16 reads it without loss.
LEAST_EFFECTIVE_RANK = 100  # of 128, at every tap
LARGEST_GAIN = 10
LARGEST_CROSS_LOGIT = 200


def test_the_shipped_model_is_well_conditioned() -> None:
    found = internals_of(SHIPPED, "cpu")
    print("\n".join(found.lines()))
    assert [one.name for one in found.states] == ["encoder 1, block 5", "encoder 1, block 3"]
    assert min(one.effective_rank for one in found.states) > LEAST_EFFECTIVE_RANK
    assert max(one.largest for one in found.gains) < LARGEST_GAIN
    cross = found.logits["Q-Former cross-attention"]
    assert cross is not None
    assert cross < LARGEST_CROSS_LOGIT


def scorer_of(weights: Path, blocks: int = 1) -> AnomalyScorer:
    """A tiny model, its trained weights large enough that logits are far from zero."""
    qformer = {**tiny.table()["model"]["qformer"], "blocks": blocks}
    model = {**tiny.table(weights)["model"], "qformer": qformer}
    torch.manual_seed(3)
    scorer = build(tiny.config(weights, model=model))[0].eval()
    for parameter in scorer.autoencoder.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return scorer


def pictures(count: int) -> Tensor:
    rng = np.random.default_rng(0)
    made = np.stack([tiny.picture(rng, tiny.SIZE, tiny.SIZE) for _ in range(count)])
    return torch.from_numpy(made)[..., None].expand(-1, -1, -1, 3)


@pytest.mark.parametrize(
    ("variances", "expected"),
    [
        ([2.0] * 7, 7.0),
        ([5.0, 0.0, 0.0], 1.0),
        ([0.0, 3.0, 1.0], 4 / 3**0.75),  # exp(entropy of 3/4, 1/4)
        ([0.0, 0.0], 0.0),
    ],
)
def test_effective_rank(variances: list[float], expected: float) -> None:
    assert effective_rank(torch.tensor(variances, dtype=torch.float64)) == pytest.approx(expected)


def correlated() -> Tensor:
    """States (6, 50, 5), correlated, of different sizes, away from zero."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(6, 50, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    return mixed * torch.tensor([1.0, 3.0, 0.1, 2.0, 1.0]) + torch.tensor([0.0, 1.0, 5.0, 0.0, -2.0])


def test_the_spectrum_is_that_of_numpys_covariance() -> None:
    states = correlated()
    expected = np.linalg.eigvalsh(np.cov(states.reshape(-1, 5).double().numpy(), rowvar=False, bias=True))
    assert spectrum(states).numpy() == pytest.approx(expected, rel=1e-9)


def test_gains_of_white_states_and_of_a_whitened_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(40, 500, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    assert gain(rotation, white) == pytest.approx((1, 1), rel=0.02)
    assert gain(1e3 * rotation, 1e-5 * white) == pytest.approx((1, 1), rel=0.02)
    # One of six directions has a hundredth of the others' deviation, and is whitened: r / s = sqrt(5 / 6) * 100.
    shape = torch.tensor([1.0, 1, 1, 1, 1, 0.01])
    states = white * shape @ rotation.T
    largest, typical = gain(torch.diag(1 / shape) @ rotation.T, states)
    size = float((states.flatten(0, 1).square().mean(0).sqrt() * rotation[:, 5]).norm())  # of the channels it reads
    assert largest == pytest.approx(100 * size, rel=0.02)
    assert typical == pytest.approx(100 * size / 6**0.5, rel=0.02)


@pytest.mark.parametrize("digits", [10, 7])
def test_the_typical_gain_says_what_rounding_does(digits: int) -> None:
    """Rounded to 1 + `digits` bits: measured errors, in units of the outputs' deviation and of half the last bit."""
    states = correlated().double()
    weight = torch.linalg.inv(torch.linalg.cholesky(states.flatten(0, 1).T.cov()))
    half = torch.exp2(states.abs().log2().floor() - digits - 1)
    rounded = (states / (2 * half)).round() * 2 * half
    error = ((rounded - states) @ weight.T).square().mean().sqrt()
    spread = (states @ weight.T).flatten(0, 1).var(dim=0).mean().sqrt()
    # A value's error is at most 2^-(digits + 1) of it, in the root mean square 0.58 to 0.29 of that.
    assert 0.25 < float(error / spread) / 2.0 ** -(digits + 1) / gain(weight, states)[1] < 0.6


def logits_of(q: Tensor, k: Tensor) -> Tensor:
    """Logits (Q, L), the largest over images and heads, of queries (B, Q, H, K) and keys (B, L, H, K)."""
    return torch.einsum("bqhd,blhd->bhql", q, k).div(math.sqrt(q.shape[-1])).abs().amax(dim=(0, 1))


def timm_logits(attention: Any, x: Tensor) -> Tensor:
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    return logits_of(q, k)


def without_corner(found: Tensor, prefix: int) -> float:
    found = found.clone()
    found[:prefix, :prefix] = 0
    return float(found.max())


@torch.no_grad()
def expected_logits(scorer: AnomalyScorer, images: Tensor) -> dict[str, float]:
    """Written out from the inputs of the attentions, which hooks take."""
    inputs: dict[int, list[Any]] = {}
    for module in scorer.modules():
        module.register_forward_hook(lambda one, given, out: inputs.setdefault(id(one), []).append((given, out)))
    x = normalise(images)
    scorer.perceptual(torch.cat([x, scorer.autoencoder(x)]), scorer.config.score.patch_sizes, [1, 2, 3])

    def given(module: nn.Module) -> Any:
        return inputs[id(module)][0][0]

    encoder, qformer, decoder = scorer.autoencoder.encoders[0], scorer.autoencoder.qformer, scorer.autoencoder.decoder
    assert isinstance(encoder, Encoder)
    found: dict[str, list[float]] = {}
    for number, block in enumerate(encoder.backbone.blocks):
        logits = timm_logits(block.attn, given(block.attn)[0])
        found.setdefault("encoder", []).append(without_corner(logits, 0 if number else 1))
    for number, block in enumerate(qformer.blocks):
        own: Any = block.attention
        queries = given(own)[0]
        q = own.qkv(queries)[..., : queries.shape[-1]].unflatten(-1, (own.heads, own.head_dim))
        k = own.qkv(queries)[..., queries.shape[-1] : queries.shape[-1] + own.head_dim]
        logits = logits_of(q, k[:, :, None].expand(-1, -1, own.heads, -1))
        if number:
            rows, columns = torch.tril_indices(*logits.shape)
            found.setdefault("Q-Former self-attention", []).append(float(logits[rows, columns].max()))
        if block.cross is not None:
            cross: Any = block.cross
            queries, context = given(cross)
            q = cross.to_q(cross.norm(queries)).unflatten(-1, (cross.heads, -1))
            k = cross.to_kv(context)[..., : q.shape[-1] * cross.heads].unflatten(-1, (cross.heads, -1))
            largest = float(logits_of(q, k).max())
            null = cross.null_kv[0].expand(len(q), 1, cross.heads, -1)
            found.setdefault("Q-Former cross-attention", []).append(
                max(largest, float(logits_of(q, null).max())) if number else largest
            )
    for number, block in enumerate(decoder.blocks):
        at: Any = block
        logits = timm_logits(at.attn, given(at.attn)[0])
        found.setdefault("decoder", []).append(without_corner(logits, 0 if number else 5))
    for number, block in enumerate(scorer.perceptual.blocks):
        at = block
        packed = inputs[id(at.norm1)][0][1]
        for part in packed.split([17, 5], dim=1):  # patches of 8 and 16 pixels, and a class token each
            found.setdefault("perceptual", []).append(without_corner(timm_logits(at.attn, part), 0 if number else 1))
    return {place: max(values) for place, values in found.items()}


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_logits_are_those_that_images_reach(blocks: int, weights: Path) -> None:
    images = pictures(6)
    found = internals(scorer_of(weights, blocks), images).logits
    expected = expected_logits(scorer_of(weights, blocks), images)
    assert {place: value for place, value in found.items() if value is not None} == pytest.approx(expected, rel=1e-4)
    assert [place for place, value in found.items() if value is None] == (
        ["Q-Former self-attention"] if blocks == 1 else []
    )
    assert list(found) == [
        "encoder", "Q-Former self-attention", "Q-Former cross-attention", "decoder", "perceptual",
    ]  # fmt: skip


def test_what_no_image_reaches_does_not_count(weights: Path) -> None:
    """Huge logits of the null token, of class tokens with each other, and of the queries with each other."""
    images = pictures(3)
    plain, changed = scorer_of(weights), scorer_of(weights)
    block: Any = changed.autoencoder.qformer.blocks[0]
    with torch.no_grad():
        block.cross.null_kv[0] = 1e4
        # The queries keep what they attend to, themselves: the first alone, and every other as all logits are equal.
        changed.autoencoder.qformer.queries.copy_(plain.autoencoder.qformer.queries[:, :1].expand(-1, 16, -1))
        plain.autoencoder.qformer.queries.copy_(changed.autoencoder.qformer.queries)
        block.attention.qkv.weight[: 32 + 16] *= 100
        block.attention.qkv.bias[: 32 + 16] *= 100
    before, after = internals(plain, images).logits, internals(changed, images).logits
    assert after["Q-Former self-attention"] is None
    for place in ("encoder", "Q-Former cross-attention"):
        assert after[place] == pytest.approx(before[place], rel=1e-4)


def test_states_and_gains_of_a_model(weights: Path) -> None:
    images = pictures(9)  # not a multiple of the images at a time
    scorer = scorer_of(weights).train()
    found = internals(scorer, images)
    assert scorer.training
    encoder = scorer.autoencoder.encoders[0]
    assert isinstance(encoder, Encoder)
    states = encoder.hidden(normalise(images))
    assert found.images == 9
    assert [one.name for one in found.states] == ["encoder 1, block 3", "encoder 1, block 2"]
    for one, tap in zip(found.states, states.split(17, dim=1), strict=True):
        values = spectrum(tap)
        shown = (one.width, one.largest, one.median, one.smallest)
        assert shown == pytest.approx((32, float(values[31]), float(values[15]), float(values[0])), rel=1e-4)
        assert one.effective_rank == pytest.approx(effective_rank(values), rel=1e-5)
    assert [one.name for one in found.gains] == ["encoder 1, projection"]
    expected = gain(encoder.projection.weight, states)
    assert (found.gains[0].largest, found.gains[0].typical) == pytest.approx(expected, rel=1e-5)


def test_attention_that_timm_does_not_fuse_counts_too(weights: Path) -> None:
    images, scorer = pictures(2), scorer_of(weights)
    fused = internals(scorer, images)
    modules: list[Any] = [module for module in scorer.modules() if hasattr(module, "fused_attn")]
    for module in modules:
        module.fused_attn = False
    assert internals(scorer, images) == fused
    assert not any(module.fused_attn for module in modules)


def test_text() -> None:
    found = Internals(
        32,
        [States("encoder 1, block 5", 128, 2.54, 68.0, 8.4e-5, 8e-7)],
        [Gain("encoder 1, projection", 107.04, 15.0)],
        {"encoder": 5.11, "Q-Former self-attention": None, "Q-Former cross-attention": 193.0},
    )
    assert found.lines() == [
        "internals, on 32 images",
        "  encoder 1, block 5: effective rank 2.5 of 128; variance largest 68, median 8.4e-05, smallest 8e-07",
        "  encoder 1, projection: gain largest 107.0, typical 15.0",
        "  largest attention logit: encoder 5.1, Q-Former self-attention none, Q-Former cross-attention 193.0",
    ]


def test_on_the_command_line(weights: Path, data: Path, tmp_path: Path) -> None:
    config = tiny.config(weights, train={"epochs": 2})
    (tmp_path / "m.toml").write_text(toml(config), encoding="utf-8")
    given = ["--config", tmp_path / "m.toml", "--data", data, "--out", tmp_path / "m.pt", "--device", "cpu"]
    result = CliRunner().invoke(command, [*map(str, given), "--verbose"])
    assert result.exit_code == 0, result.output
    lines = internals_of(tmp_path / "m.pt", "cpu").lines()
    assert lines[0] == "internals, on 12 images"
    said = result.stderr.splitlines()
    assert said[-len(lines) :] == [f"m.pt: {lines[0]}", *lines[1:]]
    assert "rank" not in result.stdout

    given = ["--ckpt", tmp_path / "m.pt", "--data", data, "--split", "valid", "--device", "cpu", "--json"]
    quiet, verbose = (CliRunner().invoke(evaluate_command, [*map(str, given), *more]) for more in ([], ["--verbose"]))
    assert quiet.stderr == "valid: 12 images\n"
    assert verbose.stderr.splitlines() == ["valid: 12 images", *lines]  # the same images as in the checkpoint
    assert json.loads(verbose.stdout) == json.loads(quiet.stdout)


def test_each_seed_on_the_command_line(weights: Path, data: Path, tmp_path: Path) -> None:
    labelled = tmp_path / "data"
    labelled.mkdir()
    for name, of in (("train", "train"), ("valid", "valid"), ("test", "valid")):
        (labelled / name).symlink_to(data / of, target_is_directory=True)
    config = tiny.config(weights, train={"epochs": 1})
    (tmp_path / "m.toml").write_text(toml(config), encoding="utf-8")
    given = ["--config", tmp_path / "m.toml", "--data", labelled, "--out", tmp_path / "m.pt", "--device", "cpu"]
    result = CliRunner().invoke(command, [*map(str, given), "--seeds", "3,4", "--verbose"])
    assert result.exit_code == 0, result.output
    heads = [line for line in result.stderr.splitlines() if "internals" in line]
    assert heads == ["m.seed3.pt: internals, on 12 images", "m.seed4.pt: internals, on 12 images"]


def test_the_checkpoints_own_scorer_is_measured(weights: Path, data: Path, tmp_path: Path) -> None:
    from qfae_train.fit import fit

    result = fit(tiny.config(weights, train={"epochs": 1}), data, tmp_path / "m.pt", device="cpu")
    checkpoint = load(result.best)
    assert internals_of(result.best, "cpu") == internals(build_scorer(checkpoint), checkpoint.parity_images)
