"""The published recipe, detail by detail: what is trained, from where, in which batches, at which rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qfae_train import config as options
from qfae_train import fit as fit_module
from qfae_train.autoencoder import build
from qfae_train.checkpoint import build_scorer, load
from qfae_train.config import Config
from qfae_train.decoder import Decoder
from qfae_train.fit import Result, fit
from qfae_train.qformer import QFormer

from . import tiny


def run(config: Config, data: Path, out: Path) -> Result:
    return fit(config, data, out, device="cpu")


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def test_the_order_is_a_permutation_that_drops_the_incomplete_batch(weights: Path, data: Path, tmp_path: Path) -> None:
    config = tiny.config(weights)
    started = fit_module._start(config, data, tmp_path / "tiny.pt", False, False, "cpu")
    epochs = []
    for epoch in (0, 1, 0):
        started.epoch = epoch
        batches = list(fit_module._batches(started))
        assert [len(images) for images, _ in batches] == [8, 8]
        for images, numbers in batches:
            assert torch.equal(images, started.train.rgb(numbers))
        epochs.append(torch.cat([numbers for _, numbers in batches]).tolist())
        assert len(set(epochs[-1])) == 16
    assert epochs[0] == epochs[2] != epochs[1]


def test_the_incomplete_batch_is_dropped_from_augmented_epochs_too(weights: Path, data: Path, tmp_path: Path) -> None:
    config = tiny.config(weights, augment={"enabled": True})
    started = fit_module._start(config, data, tmp_path / "tiny.pt", False, False, "cpu")
    assert len(started.train) == 20
    batches = list(fit_module._batches(started))
    assert [len(numbers) for _, numbers in batches] == [8, 8] == [8] * started.steps_per_epoch
    assert len(set(torch.cat([numbers for _, numbers in batches]).tolist())) == 16


def test_the_learning_rate_moves_with_every_batch_to_the_end_of_its_course(
    weights: Path, data: Path, tmp_path: Path
) -> None:
    result = run(tiny.config(weights, train={"epochs": 3, "lr": 1e-3}), data, tmp_path / "tiny.pt")
    schedule = load(result.last).resume["schedule"]
    assert (schedule["last_epoch"], schedule["total_steps"]) == (3 * 2, 3 * 2)
    assert load(result.last).resume["optimizer"]["param_groups"][0]["max_lr"] == pytest.approx(1e-3)


def test_the_optimizer_holds_projections_qformer_and_decoder_and_nothing_else(
    weights: Path, data: Path, tmp_path: Path
) -> None:
    started = fit_module._start(tiny.config(weights), data, tmp_path / "tiny.pt", False, False, "cpu")
    model = started.step.scorer.autoencoder
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    [group] = started.optimizer.param_groups
    held = {names[id(parameter)] for parameter in group["params"]}
    parts = ("encoders.0.projection.", "qformer.", "decoder.")
    assert held == {name for name in names.values() if name.startswith(parts)}
    assert {part for part in parts for name in held if name.startswith(part)} == set(parts)


def test_queries_and_prefix_tokens_start_as_published() -> None:
    """N(0, 1e-3): the width of the start decides whether anything is learned."""
    torch.manual_seed(0)
    qformer = QFormer(options.QFormer(dim=64, queries=256, heads=4))
    decoder = Decoder(options.Decoder(dim=512, depth=1, heads=4, register_tokens=4), 64, 128)
    for tensor in (qformer.queries, decoder.register_tokens, decoder.class_token):
        assert float(tensor.detach().std()) == pytest.approx(1e-3, rel=0.15)
        assert abs(float(tensor.detach().mean())) < 2e-4


def test_optimizer_and_schedule(weights: Path, data: Path, tmp_path: Path) -> None:
    config = tiny.config(weights, train={"epochs": 10, "lr": 1e-3, "pct_start": 0.15})
    started = fit_module._start(config, data, tmp_path / "tiny.pt", False, False, "cpu")
    assert type(started.optimizer.optimizer) is torch.optim.Adam  # type: ignore[attr-defined]  # AdamW is an Adam too
    assert [group["weight_decay"] for group in started.optimizer.param_groups] == [0]
    rates = []
    for _ in range(20):
        rates.append(started.optimizer.param_groups[0]["lr"])
        started.optimizer.step()
        if len(rates) < 20:
            started.schedule.step()
    assert rates.index(max(rates)) == 2  # the rise ends at 0.15 * 20 steps, counted from 0
    assert max(rates) == pytest.approx(1e-3)
    assert rates[0] == pytest.approx(1e-3 / 25)
    assert rates[-1] == pytest.approx(1e-3 / 25 / 1e4)


def test_only_the_trained_parts_change(weights: Path, data: Path, tmp_path: Path) -> None:
    config = tiny.config(weights, augment={"enabled": True}, train={"epochs": 2})
    torch.manual_seed(config.train.seed)
    before, _ = build(config)
    after = build_scorer(load(run(config, data, tmp_path / "tiny.pt").last))
    start, end = before.state_dict(), after.state_dict()
    trained = {f"autoencoder.{name}" for name in before.autoencoder.trained_state()}
    assert {name for name in start if not torch.equal(start[name], end[name])} == trained
    state = load(tmp_path / "tiny.last.pt").resume["optimizer"]
    assert len(state["param_groups"][0]["params"]) == len(list(trainable(before)))
