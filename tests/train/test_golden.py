"""Every stage against what the authors' released code computed; a failure names the stage."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from .official import FOLDER, Official

RELATIVE = 1e-4
"""Of the largest value of the stage: FP32 sums taken in another order stay two digits below."""

SCORE_ABSOLUTE = 2e-5

STAGES: dict[str, Callable[[Official], Tensor]] = {
    "x": lambda o: o.input[:, :, ::16, ::16],
    "features_probe": lambda o: o.context[:, ::37, ::31],
    "queries_self_attention_probe": lambda o: o.self_attention[:, ::49, ::17],
    "junction_probe": lambda o: o.qformer[:, ::49, ::17],
    "reconstruction": lambda o: o.reconstruction[:, :, ::4, ::4],
    "reconstruction_mean_std": lambda o: torch.stack(
        [o.reconstruction.mean(dim=(1, 2, 3)), o.reconstruction.flatten(1).std(dim=1)], dim=1
    ),
    "A_p8": lambda o: o.distance_map(8),
    "A_p16": lambda o: o.distance_map(16),
    "A_p32": lambda o: o.distance_map(32),
    "A_p56": lambda o: o.distance_map(56),
    "train_loss": lambda o: o.training["train_loss"],
    "train_grad_queries_norm": lambda o: o.training["train_grad_queries_norm"],
    "train_grad_decoder_prediction_norm": lambda o: o.training["train_grad_decoder_prediction_norm"],
}

with np.load(FOLDER / "expected.npz") as _stored:
    NAMES = list(_stored)
SCORES = [name for name in NAMES if name.startswith("score_")]
PIXEL_MAPS = [name for name in NAMES if name.startswith("map_")]


@pytest.fixture(scope="module")
def official() -> Official:
    return Official()


def test_every_stored_number_is_compared() -> None:
    assert {*STAGES, *SCORES, *PIXEL_MAPS} == set(NAMES)
    assert len(SCORES) == 6
    assert len(PIXEL_MAPS) == 9


@pytest.mark.parametrize("stage", STAGES)
def test_stage(official: Official, stage: str) -> None:
    _assert_close(STAGES[stage](official), official.expected[stage])


@pytest.mark.parametrize("name", SCORES)
def test_score(official: Official, name: str) -> None:
    found = re.fullmatch(r"score_(product|separate)_p([\d-]+)_(max|mean)_(max|mean)", name)
    assert found
    fusion, patch_sizes, spatial, across = found.groups()
    score = official.anomaly(_sizes(patch_sizes), fusion, spatial, across, "mean").score
    np.testing.assert_allclose(score.numpy(), official.expected[name], rtol=0, atol=SCORE_ABSOLUTE)


@pytest.mark.parametrize("name", PIXEL_MAPS)
def test_pixel_map(official: Official, name: str) -> None:
    found = re.fullmatch(r"map_(mean|max)_(product|separate)_p([\d-]+)_(max|mean)_(max|mean)", name)
    assert found
    pixel_map, fusion, patch_sizes, spatial, across = found.groups()
    result = official.anomaly(_sizes(patch_sizes), fusion, spatial, across, pixel_map).anomaly_map
    _assert_close(result[:, ::4, ::4], official.expected[name])


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("-"))


def _assert_close(got: Tensor, expected: np.typing.NDArray[np.float32]) -> None:
    assert tuple(got.shape) == expected.shape
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=0, atol=RELATIVE * scale)
