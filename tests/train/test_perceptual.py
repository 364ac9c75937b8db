"""The packed trunk against one whole timm model per patch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from benchmarks.speed.plain import PlainPerceptual
from qfae_train.backbone import create
from qfae_train.config import Backbone
from qfae_train.perceptual import PerceptualNetwork, distance_maps

SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3}
# Finer and coarser kernels than the weights' own, an odd grid (56 / 8), LayerScale, another MLP.
CASES = {
    "published": (Backbone("vit_tiny_patch16_224", 16, SMALL), 64, (16, 32, 8)),
    "demo": (Backbone("vit_tiny_patch16_224", 8, {**SMALL, "patch_size": 8}), 56, (8, 14, 28)),
    "layer scale": (Backbone("vit_tiny_patch16_224", 16, {**SMALL, "init_values": 0.3}), 64, (32, 16)),
    "narrow mlp, one size": (Backbone("vit_tiny_patch16_224", 16, {**SMALL, "mlp_ratio": 2.0}), 64, (16,)),
}


def filled(backbone: Backbone, size: int) -> tuple[nn.Module, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    model = create(backbone, size)
    state = {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval(), state


def compare(backbone: Backbone, size: int, patch_sizes: Sequence[int], blocks: Sequence[int]) -> None:
    model, state = filled(backbone, size)
    packed = PerceptualNetwork(model, size, patch_sizes, max(blocks))
    plain = PlainPerceptual(backbone, state, size, patch_sizes)
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    expected = plain(images, blocks)
    got = packed(images, patch_sizes, blocks)
    assert got.keys() == expected.keys()
    for key, tokens in expected.items():
        torch.testing.assert_close(got[key], tokens, rtol=1e-5, atol=1e-5 * float(tokens.abs().max()), msg=str(key))


@pytest.mark.parametrize("case", CASES)
def test_packed_equals_plain(case: str) -> None:
    backbone, size, patch_sizes = CASES[case]
    compare(backbone, size, patch_sizes, blocks=(4, 2))


def test_a_subset_of_the_patch_sizes_can_be_read_in_any_order() -> None:
    backbone, size, _ = CASES["published"]
    model, _ = filled(backbone, size)
    packed = PerceptualNetwork(model, size, (8, 16, 32), last_block=4)
    images = torch.randn(2, 3, size, size)
    together = packed(images, (8, 16, 32), (3,))
    alone = packed(images, (32, 8), (3,))
    assert set(alone) == {(3, 32), (3, 8)}
    for key, tokens in alone.items():
        torch.testing.assert_close(tokens, together[key], rtol=1e-5, atol=1e-5)


def test_blocks_behind_the_last_one_read_are_not_kept() -> None:
    model, _ = filled(*CASES["published"][:2])
    network = PerceptualNetwork(model, 64, (16,), last_block=2)
    assert sum(isinstance(module, Block) for module in network.modules()) == 2


def test_frozen_whatever_surrounds_it() -> None:
    model, _ = filled(*CASES["published"][:2])
    around = nn.Sequential(PerceptualNetwork(model, 64, (16,), last_block=2)).train()
    assert not any(module.training for module in around[0].modules())
    assert not any(parameter.requires_grad for parameter in around.parameters())


UNLIKE: dict[str, tuple[str, dict[str, Any], str]] = {
    "pre-norm": ("vit_base_patch32_clip_224", {}, "a norm before the blocks"),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}, "5 prefix tokens, expected one class token"),
    "no class token": (
        "vit_tiny_patch16_224",
        {"class_token": False, "global_pool": "avg"},
        "0 prefix tokens, expected one class token",
    ),
    "class token without position": (
        "vit_tiny_patch16_224",
        {"no_embed_class": True},
        "a class token without a position",
    ),
    "norm of queries": ("vit_tiny_patch16_224", {"qk_norm": True}, "a norm or gate within the attention"),
    "norm after the attention": ("vit_tiny_patch16_224", {"scale_attn_norm": True}, "a norm or gate within"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_models_that_would_be_read_wrongly_are_refused(case: str) -> None:
    name, extra, fault = UNLIKE[case]
    model = create(Backbone(name, 16, {**SMALL, **extra}), 64)
    with pytest.raises(ValueError, match=rf"^perceptual network: the backbone has .*{fault}"):
        PerceptualNetwork(model, 64, (16,), 2)


def test_distance_is_one_minus_cosine_in_float32() -> None:
    angle = torch.tensor([0.0, torch.pi / 3, torch.pi / 2, torch.pi])
    one = torch.stack([torch.ones(4), torch.zeros(4)], dim=1)[None]
    other = 5 * torch.stack([angle.cos(), angle.sin()], dim=1)[None]
    maps = distance_maps({(1, 16): one.half()}, {(1, 16): other.half()}, image_size=32)
    assert maps[1, 16].dtype == torch.float32
    torch.testing.assert_close(maps[1, 16], torch.tensor([[[0.0, 0.5], [1.0, 2.0]]]), rtol=0, atol=1e-3)


def test_distances_are_one_minus_the_cosine() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 16, 8, dtype=torch.float64)
    expected = 1 - F.cosine_similarity(ours, theirs, dim=-1)

    maps = distance_maps({(1, 4): ours}, {(1, 4): theirs}, 16)

    torch.testing.assert_close(maps[1, 4], expected.unflatten(1, (4, 4)), rtol=1e-12, atol=1e-15)


def test_small_distances_keep_their_digits_in_float32() -> None:
    """1 - cosine has an error of 6e-8 in float32: 1e-2 of a distance of 6e-6, and of what is multiplied with it."""
    torch.manual_seed(0)
    ours = torch.randn(1, 16, 128)
    theirs = ours + 3e-3 * torch.randn(1, 16, 128)
    expected = 1 - F.cosine_similarity(ours.double(), theirs.double(), dim=-1)
    assert 1e-6 < float(expected.min()) < float(expected.max()) < 1e-5

    maps = distance_maps({(1, 4): ours}, {(1, 4): theirs}, 16)

    torch.testing.assert_close(maps[1, 4].flatten(1).double(), expected, rtol=1e-4, atol=0)
    cancelled = 1 - F.cosine_similarity(ours, theirs, dim=-1)
    assert float(((cancelled - expected).abs() / expected).max()) > 1e-3


def test_features_without_length_are_at_no_distance_of_one_another_and_finite() -> None:
    nothing, something = torch.zeros(1, 16, 8), torch.ones(1, 16, 8)
    same = distance_maps({(1, 4): nothing}, {(1, 4): nothing}, 16)[1, 4]
    apart = distance_maps({(1, 4): nothing}, {(1, 4): something}, 16)[1, 4]
    torch.testing.assert_close(same, torch.zeros_like(same))
    torch.testing.assert_close(apart, torch.full_like(apart, 0.5))
