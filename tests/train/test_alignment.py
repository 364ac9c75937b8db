"""The aligned initialisation: what each part must do at the start, measured on the parts themselves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from qfae_train.alignment import LARGEST_GROWTH, align, context_grid, fit_linear, grid, principal_patches, whiten
from qfae_train.autoencoder import AnomalyScorer, build, normalise
from qfae_train.encoder import Encoder
from qfae_train.qformer import QFormerBlock
from tests.train import tiny


def images(count: int = 24) -> torch.Tensor:
    rng = np.random.default_rng(0)
    pictures = np.stack([tiny.picture(rng, tiny.SIZE, tiny.SIZE) for _ in range(count)])
    return normalise(torch.from_numpy(pictures)[..., None].expand(-1, -1, -1, 3))


@pytest.fixture
def scorer(tmp_path: Path) -> AnomalyScorer:
    torch.manual_seed(0)
    qformer = {**tiny.table()["model"]["qformer"], "query_init": "aligned"}
    model = {**tiny.table(tiny.write_weights(tmp_path / "vit.safetensors"))["model"], "qformer": qformer}
    return build(tiny.config(tmp_path / "vit.safetensors", model=model))[0]


def attention_of_queries(scorer: AnomalyScorer, x: torch.Tensor) -> torch.Tensor:
    """Mean over images and heads of the cross-attention's weights on the context, without the null token: (Q, L)."""
    autoencoder = scorer.autoencoder
    block = autoencoder.qformer.blocks[0]
    assert isinstance(block, QFormerBlock)
    assert block.cross is not None
    cross, context = block.cross, autoencoder.context(autoencoder.hidden(x))
    queries = block.attention(autoencoder.qformer.queries)
    q = cross.to_q(cross.norm(queries)).unflatten(-1, (cross.heads, -1))
    k = cross.to_kv(context).chunk(2, dim=-1)[0].unflatten(-1, (cross.heads, -1))
    logits = torch.einsum("qhd,blhd->bhql", q[0], k) / math.sqrt(cross.head_dim)
    weights: torch.Tensor = logits.softmax(-1).mean(dim=(0, 1))
    return weights


def mean_distance(scorer: AnomalyScorer, x: torch.Tensor) -> float:
    """Mean distance, in units of the image's side, between a query's place and the places it reads."""
    encoders = [e for e in scorer.autoencoder.encoders if isinstance(e, Encoder)]
    places = context_grid(encoders)
    known = ~places.isnan().any(dim=1)
    weights = attention_of_queries(scorer, x)[:, known]
    weights = weights / weights.sum(dim=1, keepdim=True)
    side = math.isqrt(len(weights))
    return float((weights * torch.cdist(grid(side), places[known])).sum(dim=1).mean())


@torch.no_grad()
def test_a_query_reads_the_image_around_its_own_place(scorer: AnomalyScorer) -> None:
    before = mean_distance(scorer, images())

    align(scorer.autoencoder, images())

    after = mean_distance(scorer, images())
    uniform = float(torch.cdist(grid(4), grid(4)).mean())
    assert before > 0.8 * uniform
    assert after < 0.6 * uniform


def with_spectrum(deviations: torch.Tensor, mean: float = 0.0) -> torch.Tensor:
    """Hidden states (50, 40, C) whose covariance has exactly these standard deviations, in random directions."""
    generator = torch.Generator().manual_seed(2)
    width = len(deviations)
    white = torch.linalg.qr(centred(torch.randn(2000, width, generator=generator, dtype=torch.float64)))[0] * 2000**0.5
    directions = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    return (white * deviations @ directions.T + mean).float().unflatten(0, (50, 40))


def centred(flat: torch.Tensor) -> torch.Tensor:
    return flat - flat.mean(0)


def fp16_errors(encoder: Encoder, states: torch.Tensor) -> torch.Tensor:
    """Root mean square (D,) of what rounding the states to FP16 changes in each projected value."""
    projection = encoder.projection.double()
    return (projection(states.half().double()) - projection(states.double())).square().mean(dim=(0, 1)).sqrt()


@torch.no_grad()
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_a_healthy_spectrum_is_whitened_exactly(mean: float, scorer: AnomalyScorer) -> None:
    encoder = scorer.autoencoder.encoders[0]
    assert isinstance(encoder, Encoder)
    states = with_spectrum(torch.linspace(3.0, 0.4, 32), mean)

    whiten(encoder, states)

    projected = encoder.projection(states).flatten(0, 1)
    assert projected.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(projected.T.cov(correction=0), torch.eye(32), rtol=0, atol=1e-4)
    assert fp16_errors(encoder, states).max() < 0.002


@torch.no_grad()
@pytest.mark.parametrize(("scale", "mean"), [(1.0, 0.0), (1e-3, 0.0), (20.0, 2.0)])
def test_tiny_variances_are_not_raised_beyond_the_bound(scale: float, mean: float, scorer: AnomalyScorer) -> None:
    """The spectrum of a backbone that uses two or three dimensions: deviations of 8 down to 1e-3, and some of zero."""
    encoder = scorer.autoencoder.encoders[0]
    assert isinstance(encoder, Encoder)
    deviations = torch.cat([torch.logspace(0.9, -3, 28), torch.zeros(4)]) * scale
    states = with_spectrum(deviations, mean * scale)

    whiten(encoder, states)

    size = float(states.square().mean().sqrt())
    bound = size / LARGEST_GROWTH  # deviations above it become one, those below it keep their ratio to it
    weight = encoder.projection.weight
    torch.testing.assert_close(weight.norm(dim=1).max(), torch.tensor(1 / bound), rtol=1e-4, atol=0)
    projected = centred(encoder.projection(states).flatten(0, 1))
    found = projected.square().mean(0).sqrt()
    torch.testing.assert_close(found, (deviations / bound).clamp_max(1), rtol=1e-3, atol=1e-4)
    assert fp16_errors(encoder, states).max() < LARGEST_GROWTH * 2**-11
    # Without the bound the smallest non-zero one alone would have more error than signal.
    assert deviations[27] < size * 2**-10


@torch.no_grad()
def test_projected_hidden_states_are_uncorrelated(scorer: AnomalyScorer) -> None:
    encoder = scorer.autoencoder.encoders[0]
    assert isinstance(encoder, Encoder)
    states = encoder.hidden(images())

    whiten(encoder, states)

    projected = encoder.projection(states).flatten(0, 1)
    covariance = projected.T.cov(correction=0)
    variances = covariance.diagonal()
    assert projected.mean(0).abs().max() < 1e-3
    torch.testing.assert_close(covariance - variances.diag(), torch.zeros(32, 32), rtol=0, atol=1e-3)
    torch.testing.assert_close(variances[:4], torch.ones(4), rtol=0, atol=1e-3)  # the largest components come first
    assert variances.max() < 1 + 1e-3


@torch.no_grad()
def test_the_last_layer_spans_the_patches(scorer: AnomalyScorer) -> None:
    decoder, x = scorer.autoencoder.decoder, images()

    principal_patches(decoder, x)

    p = decoder.patch_size
    patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(0, 2)
    basis, mean = decoder.predict.weight, decoder.predict.bias
    torch.testing.assert_close(mean, patches.mean(0))
    coefficients = torch.linalg.lstsq(basis, (patches - mean).T).solution
    left = (basis @ coefficients).T + mean - patches
    width = decoder.predict.in_features
    exact = torch.linalg.svdvals(patches - mean)[width:].square().sum() / patches.numel()
    torch.testing.assert_close(left.square().mean(), exact, rtol=1e-3, atol=1e-6)
    # One unit along an input is one standard deviation of the patches along that component.
    torch.testing.assert_close(coefficients[0].square().mean(), torch.tensor(1.0), rtol=1e-3, atol=0)


def test_the_ridge_regression_recovers_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, matrix = torch.randn(500, 6, generator=generator), torch.randn(3, 6, generator=generator)

    found = fit_linear(inputs, inputs @ matrix.T)

    torch.testing.assert_close(found, matrix, rtol=5e-3, atol=5e-3)


def test_places_are_the_centres_of_the_patches() -> None:
    expected = [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    torch.testing.assert_close(grid(2), torch.tensor(expected))


@torch.no_grad()
def test_the_aligned_start_is_a_function_of_seed_and_images(scorer: AnomalyScorer, tmp_path: Path) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        align(scorer.autoencoder, images())
        states.append({name: tensor.clone() for name, tensor in scorer.autoencoder.trained_state().items()})

    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.isfinite(tensor).all() for tensor in states[0].values())
