"""Made-up weights: the same from the same seed, without network or files, on the scale of a real model."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qfae_export.graph import InferenceGraph
from qfae_export.images import from_slices
from qfae_export.precision import FP16
from qfae_export.random_weights import random_checkpoint, random_scorer
from qfae_export.reference import factors_of
from qfae_train.autoencoder import AnomalyScorer, Result
from qfae_train.checkpoint import build_scorer, frozen_backbones, load, save
from qfae_train.config import presets
from tests.export.small_presets import small
from tests.export.tiny import config_of, vit


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a made-up model asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def tensors(scorer: AnomalyScorer) -> dict[str, torch.Tensor]:
    return {**dict(scorer.named_parameters()), **dict(scorer.named_buffers())}


def test_the_seed_decides_alone() -> None:
    config = config_of(encoders=[vit(), vit(init_values=0.1)], qformer_blocks=2)
    torch.manual_seed(1)
    one = tensors(random_scorer(config, 7))
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    again, other = tensors(random_scorer(config, 7)), tensors(random_scorer(config, 8))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), torch.manual_seed(2).get_state())
    assert not torch.equal(state, torch.random.get_rng_state())
    fixed = {name for name in one if torch.equal(one[name], other[name])}
    assert fixed == {"autoencoder.decoder.positions"}


def test_threads_do_not_matter() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = random_scorer(small("brats"), 0)
        torch.set_num_threads(2)
        two = random_scorer(small("brats"), 0)
    finally:
        torch.set_num_threads(threads)
    drawn = dict(one.named_parameters())
    assert all(torch.equal(tensor, drawn[name]) for name, tensor in two.named_parameters())


def test_equal_backbones_get_weights_of_their_own() -> None:
    scorer = random_scorer(config_of(encoders=[vit(), vit()]), 0)
    first, second = (dict(encoder.named_parameters()) for encoder in scorer.autoencoder.encoders)
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_weight_files_are_not_read() -> None:
    config = small("brats")
    absent = replace(config.perceptual, weights="/nowhere/mae.safetensors")
    named, plain = random_scorer(replace(config, perceptual=absent), 0), random_scorer(config, 0)
    assert torch.equal(named.perceptual.get_buffer("table_16"), plain.perceptual.get_buffer("table_16"))


@pytest.mark.parametrize("preset", presets())
def test_numbers_are_those_of_a_real_model(preset: str) -> None:
    config = small(preset)
    scorer = random_scorer(config, 3)
    images = torch.from_numpy(from_slices(config.preprocess_spec()).pixels[:4])
    with torch.no_grad():
        exact: Result = scorer(images)
        half: Any = InferenceGraph(scorer).cast(FP16)(images)
    score = exact.score.numpy()
    assert np.isfinite(score).all()
    assert np.isfinite(half.score.numpy()).all()
    # Distances lie between 0 and 2; these are neither of a model that copies nor of one that sees nothing.
    typical = float(exact.anomaly_map.mean()) ** (1 / factors_of(scorer))
    assert 0.1 < typical < 1.5
    assert score.std() > 0.02 * score.mean()
    assert 20 < exact.reconstruction.float().std() < 120
    np.testing.assert_allclose(half.score.numpy(), score, rtol=0.02)


def test_a_checkpoint_of_them_is_the_same_model(tmp_path: Path) -> None:
    config = config_of(encoders=[vit(), vit(init_values=0.1)], qformer_blocks=2)
    save(tmp_path / "random.pt", random_checkpoint(config, 7))
    stored = load(tmp_path / "random.pt")
    want, got = tensors(random_scorer(config, 7)), tensors(build_scorer(stored))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    # At full depth, so that what a plain model computes in vain can be computed too.
    backbones: list[Any] = frozen_backbones(stored)
    assert [len(backbone.blocks) for backbone in backbones] == [3, 3, 3]
