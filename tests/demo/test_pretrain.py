"""The demo's backbone: pretraining is deterministic and learns, and rescaling changes no feature."""

from __future__ import annotations

import torch
from torch import Tensor

from demo.pretrain import MaskedAutoencoder, batch_of, pretrain, rescale
from demo.slices import finish, normal_slice
from qfae_runtime.preprocess import PreprocessSpec, preprocess
from qfae_train.autoencoder import perceptual_backbone
from qfae_train.backbone import create, filled, read_frozen
from qfae_train.config import load

CONFIG = load("demo")


def slices(count: int) -> Tensor:
    spec = PreprocessSpec(image_size=112)
    made = [finish(normal_slice([9, n]), n)[..., None].repeat(3, 2) for n in range(count)]
    return torch.stack([torch.from_numpy(preprocess(one, spec).image[..., 0].copy()) for one in made])


def test_the_same_seed_gives_the_same_weights_in_half_precision() -> None:
    images = slices(8)
    first, again, other = (pretrain(CONFIG, images, steps=2, batch_size=4, lr=1e-3, seed=seed) for seed in (0, 0, 1))

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.float16}
    # The state is a backbone as the preset describes it.
    create(perceptual_backbone(CONFIG), 112).load_state_dict(first)


def test_it_learns_to_predict_hidden_patches() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(create(perceptual_backbone(CONFIG), 112), [16])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1.5e-3)
    batch, losses = batch_of(slices(16), torch.arange(16)), []
    for _ in range(60):
        loss = model(batch, 16)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


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


@torch.no_grad()
def test_the_shipped_backbone_is_rescaled_and_small() -> None:
    state, record = read_frozen(CONFIG.model.encoders[0], "")
    vit = filled(CONFIG.model.encoders[0], state, 112, "the shipped backbone")
    images = batch_of(slices(4), torch.arange(4))
    hidden = vit.forward_intermediates(images, output_fmt="NLC", intermediates_only=True, norm=False)  # type: ignore[operator]

    assert 0.7 < float(torch.stack(hidden).square().mean()) < 1.4
    assert record["source"] == "demo_vit.safetensors"
