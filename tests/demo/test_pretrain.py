"""The demo's backbones: pretraining is deterministic and learns, and rescaling changes no feature."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from demo.pretrain import RECIPES, MaskedAutoencoder, batch_of, moment_distance, pretrain, rescale
from demo.slices import finish, normal_slice
from qfae_runtime.preprocess import PreprocessSpec, preprocess
from qfae_train.autoencoder import perceptual_backbone
from qfae_train.backbone import create, filled, read_frozen
from qfae_train.config import PRESETS, load

CONFIG = load("demo")
BACKBONES = {"encoder": CONFIG.model.encoders[0], "perceptual": perceptual_backbone(CONFIG)}


def slices(count: int) -> Tensor:
    spec = PreprocessSpec(image_size=112)
    made = [finish(normal_slice([9, n]), n)[..., None].repeat(3, 2) for n in range(count)]
    return torch.stack([torch.from_numpy(preprocess(one, spec).image[..., 0].copy()) for one in made])


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_seed_gives_the_same_weights_in_half_precision(name: str) -> None:
    images = slices(8)
    first, again, other = (
        pretrain(name, CONFIG, images, steps=2, batch_size=4, lr=1e-3, seed=seed) for seed in (0, 0, 1)
    )

    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.float16}
    # The state is a backbone as the preset describes it: blocks that nobody reads are not in it.
    create(BACKBONES[name], 112).load_state_dict(first)


@pytest.mark.parametrize("name", RECIPES)
def test_it_learns_to_predict_hidden_patches(name: str) -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(create(BACKBONES["encoder"], 112), RECIPES[name], [16])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1.5e-3)
    batch, losses = batch_of(slices(16), torch.arange(16)), []
    for _ in range(60):
        loss = model(batch, 16)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_distance_of_a_second_moment_to_the_identity_is_numpys() -> None:
    states = np.random.default_rng(0).normal(size=(3, 40, 8)) * np.linspace(0.1, 2, 8) + 5
    moment = np.mean([np.outer(one, one) for one in states.reshape(120, 8)], axis=0)
    expected = ((moment - np.eye(8)) ** 2).sum() / 8

    assert float(moment_distance(torch.from_numpy(states))) == pytest.approx(expected, rel=1e-9)


def test_the_encoder_pays_for_the_second_moment_of_its_blocks() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(create(BACKBONES["encoder"], 112), RECIPES["encoder"], [16])
    batch, losses = batch_of(slices(4), torch.arange(4)), []
    for weight in (0.0, 1.0, 2.0):
        model.recipe = replace(RECIPES["encoder"], moment=weight)
        torch.manual_seed(1)  # of what is hidden
        losses.append(float(model(batch, 16).detach()))
    plain, once, twice = losses
    assert once - plain > 0.1
    assert twice - plain == pytest.approx(2 * (once - plain), rel=1e-4)


@torch.no_grad()
def test_rescaling_gives_unit_hidden_states_and_changes_no_feature() -> None:
    torch.manual_seed(0)
    vit = create(perceptual_backbone(CONFIG), 112).eval()
    for tensor in vit.parameters():
        tensor.mul_(3.0 if tensor.ndim > 1 else 1.0)
    images = batch_of(slices(4), torch.arange(4))
    before = vit.forward_features(images)  # type: ignore[operator]

    rescale(vit, images)

    hidden = vit.forward_intermediates(images, output_fmt="NLC", intermediates_only=True, norm=False)  # type: ignore[operator]
    torch.testing.assert_close(torch.stack(hidden).square().mean(), torch.tensor(1.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(vit.forward_features(images), before, rtol=1e-2, atol=1e-2)  # type: ignore[operator]


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_the_shipped_backbone_is_rescaled_and_says_how_it_was_made(name: str) -> None:
    state, record = read_frozen(BACKBONES[name], "")
    vit = filled(BACKBONES[name], state, 112, "the shipped backbone")
    images = batch_of(slices(4), torch.arange(4))
    hidden = vit.forward_intermediates(images, output_fmt="NLC", intermediates_only=True, norm=False)  # type: ignore[operator]

    # The perceptual network holds the first two blocks of six, whose stream is smaller than that of all.
    assert 0.1 < float(torch.stack(hidden).square().mean()) < 2
    assert record["source"] == f"demo_{name}.safetensors"
    with safe_open(PRESETS / f"demo_{name}.safetensors", "pt") as file:
        made = json.loads(file.metadata()["recipe"])
    stated = json.loads(json.dumps(asdict(RECIPES[name])))
    assert {key: made[key] for key in stated} == stated
