"""The aligned initialisation: what each part must do at the start, measured on the parts themselves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from qfae_train.alignment import align, context_grid, fit_linear, grid, principal_patches, whiten
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


@torch.no_grad()
def test_projected_hidden_states_are_white(scorer: AnomalyScorer) -> None:
    encoder = scorer.autoencoder.encoders[0]
    assert isinstance(encoder, Encoder)
    states = encoder.hidden(images())

    whiten(encoder, states)

    projected = encoder.projection(states).flatten(0, 1)
    covariance = projected.T.cov(correction=0)
    leading = covariance[:8, :8]
    assert projected.mean(0).abs().max() < 1e-3
    torch.testing.assert_close(leading, torch.eye(8), rtol=0, atol=1e-3)


@torch.no_grad()
def test_whitening_does_not_raise_rounding_errors(scorer: AnomalyScorer) -> None:
    """Hidden states that lie in four directions: the others hold nothing but rounding, which must stay small."""
    encoder = scorer.autoencoder.encoders[0]
    assert isinstance(encoder, Encoder)
    states = torch.randn(50, 20, 4) @ torch.randn(4, 32)

    whiten(encoder, states)

    exact = encoder.double().projection(states.double())
    noisy = encoder.projection(states.double() + 1e-7 * torch.randn(states.shape))
    assert (noisy - exact).abs().max() < 1e-4


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
