"""Loss, score and anomaly map against a restatement in plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qfae_train import config
from qfae_train.aggregate import Maps, anomaly, fused_maps, perceptual_loss, upsample

from .plain import resized

SIZE = 48
BLOCKS = (2, 3)
PATCH_SIZES = (8, 16, 24)

MAPS: Maps = {
    (block, p): torch.rand(3, SIZE // p, SIZE // p, generator=torch.Generator().manual_seed(100 * block + p))
    for block in (1, 2, 3)
    for p in (8, 16, 24, 48)
}


def full_size(image: int, block: int, patch_size: int) -> Tensor:
    return resized(MAPS[block, patch_size][image], SIZE)


def restated(image: int, fusion: str, spatial: str, across: str, pixel_map: str) -> tuple[float, Tensor]:
    """Supplement 1.3 for one image: score and anomaly map."""
    maps: list[Tensor] = []
    for block in BLOCKS:
        product = torch.ones(SIZE, SIZE, dtype=torch.float64)
        for patch_size in PATCH_SIZES:
            one = full_size(image, block, patch_size)
            if fusion == "separate":
                maps.append(one)
            product = product * one
        if fusion == "product":
            maps.append(product)
    numbers = [float(m.max() if spatial == "max" else m.mean()) for m in maps]
    score = sum(numbers) / len(numbers) if across == "mean" else max(numbers)
    stack = torch.stack(maps)
    return score, stack.mean(0) if pixel_map == "mean" else stack.max(0).values


@pytest.mark.parametrize(
    ("fusion", "spatial", "across", "pixel_map"),
    list(itertools.product(("product", "separate"), ("max", "mean"), ("mean", "max"), ("mean", "max"))),
)
def test_anomaly_equals_the_restatement(fusion: str, spatial: str, across: str, pixel_map: str) -> None:
    options = config.Score(PATCH_SIZES, BLOCKS, fusion, spatial, across, pixel_map)
    result = anomaly(MAPS, options, SIZE)
    assert result.score.shape == (3,)
    assert result.anomaly_map.shape == (3, SIZE, SIZE)
    for image in range(3):
        score, anomaly_map = restated(image, fusion, spatial, across, pixel_map)
        assert float(result.score[image]) == pytest.approx(score, abs=1e-6)
        torch.testing.assert_close(result.anomaly_map[image].double(), anomaly_map, rtol=0, atol=1e-6)


def test_loss_is_the_mean_of_the_products() -> None:
    options = config.Loss(patch_sizes=(16, 24), blocks=(1, 3))
    products = [
        full_size(image, block, 16) * full_size(image, block, 24) for image in range(3) for block in options.blocks
    ]
    expected = float(torch.stack(products).mean())
    assert float(perceptual_loss(MAPS, options, SIZE)) == pytest.approx(expected, abs=1e-6)


def test_number_of_maps() -> None:
    assert fused_maps(MAPS, PATCH_SIZES, BLOCKS, "product", SIZE).shape == (3, 2, SIZE, SIZE)
    assert fused_maps(MAPS, PATCH_SIZES, BLOCKS, "separate", SIZE).shape == (3, 6, SIZE, SIZE)


def test_a_grid_of_one_cell_fills_the_image() -> None:
    full = upsample(MAPS[1, 48], SIZE)
    torch.testing.assert_close(full, MAPS[1, 48].expand(3, SIZE, SIZE), rtol=0, atol=1e-6)
