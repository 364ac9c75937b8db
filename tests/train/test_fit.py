"""The training run: it learns, writes its files, and can be interrupted without a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qfae_runtime.errors import OutputError
from qfae_train import fit as fit_module
from qfae_train.autoencoder import AnomalyScorer, build
from qfae_train.checkpoint import Checkpoint, build_scorer, load
from qfae_train.config import Augment, Config, Train, from_dict
from qfae_train.data import DataError, Split, load_split
from qfae_train.evaluate import Metrics, evaluate
from qfae_train.fit import Frozen, Result, TrainingError, TrainingStep, fit
from qfae_train.progress import Reporter

from . import tiny


def run(config: Config, data: Path, out: Path, **options: bool) -> Result:
    return fit(config, data, out, device="cpu", **options)


def stop_in_epoch(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the run in the second step of its `number`-th epoch, counted from 1."""
    advance = Reporter.advance
    steps: list[str] = []

    def counting(self: Reporter, description: str, loss: Tensor) -> None:
        steps.append(description)
        if sum(f"epoch {number}/" in step for step in steps) == 2:
            raise KeyboardInterrupt
        advance(self, description, loss)

    monkeypatch.setattr(Reporter, "advance", counting)


def assert_same_training(one: Checkpoint, other: Checkpoint) -> None:
    assert one.trained.keys() == other.trained.keys()
    for name, tensor in one.trained.items():
        assert torch.equal(tensor, other.trained[name]), name
    assert flat(one.resume["optimizer"]) == flat(other.resume["optimizer"])
    for key in ("epoch", "best_auroc", "best_epoch"):
        assert one.resume[key] == other.resume[key]
    assert one.record["loss"] == other.record["loss"]


def flat(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, list | tuple) else value


def test_it_learns(weights: Path, data: Path, tmp_path: Path) -> None:
    config = tiny.config(weights, train={"epochs": 10, "batch_size": 5, "lr": 3e-3, "validate_every": 10})
    torch.manual_seed(config.train.seed)
    before, _ = build(config)
    result = run(config, data, tmp_path / "tiny.pt")
    split = load_split(data, "train", config.preprocess_spec(), quiet=True)
    losses = [loss_of(scorer, split.rgb(slice(None))) for scorer in (before.eval(), build_scorer(load(result.best)))]
    assert losses[1] < 0.6 * losses[0]


def loss_of(scorer: AnomalyScorer, images: Tensor) -> float:
    with torch.no_grad():
        return float(TrainingStep(scorer)(images, images, None, pixel_loss=False))


def test_best_and_last_checkpoint(
    weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    aurocs = iter([0.5, 0.9, 0.7])

    def scripted(scorer: AnomalyScorer, split: Split, batch_size: int) -> Metrics:
        return replace(evaluate(scorer, split, batch_size), image_auroc=next(aurocs))

    monkeypatch.setattr(fit_module, "evaluate", scripted)
    config = tiny.config(weights, train={"epochs": 6, "validate_every": 2})
    result = run(config, data, tmp_path / "tiny.pt")
    best, last = load(result.best), load(result.last)
    assert best.conditioning is not None
    assert result == Result(tmp_path / "tiny.pt", tmp_path / "tiny.last.pt", 0.9, 4, best.conditioning)
    assert last.conditioning is None
    assert best.record["epoch"] == 4
    assert best.record["valid_image_auroc"] == 0.9
    assert not best.resume
    assert last.record["epoch"] == 6
    assert last.resume["best_epoch"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.last.pt", "tiny.pt"]
    assert best.parity_images.shape == (12, tiny.SIZE, tiny.SIZE, 3)
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == ["train: 20 images", "valid: 12 images", "training on cpu"]
    assert [line.split(":")[0] for line in said[3:-1]] == ["epoch 2", "epoch 4", "epoch 6"]
    assert said[-1] == "measuring how far rounding moves the scores"


def test_the_record_is_what_evaluation_says(weights: Path, data: Path, tmp_path: Path) -> None:
    result = run(tiny.config(weights), data, tmp_path / "tiny.pt")
    newest = load(result.last)
    split = load_split(data, "valid", newest.config.preprocess_spec(), quiet=True)
    metrics = evaluate(build_scorer(newest), split, batch_size=5)
    assert newest.record["valid_image_auroc"] == pytest.approx(metrics.image_auroc, abs=1e-6)
    assert newest.record["valid_pixel_auroc"] == pytest.approx(metrics.pixel_auroc, abs=1e-3)
    assert newest.record["train_images"] == 20


def test_without_anomalies_the_newest_is_the_best(weights: Path, tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data", train=8, valid=0)
    tiny.write_png(data / "valid" / "good" / "a.png", tiny.picture(np.random.default_rng(0)))
    result = run(tiny.config(weights, train={"epochs": 2}), data, tmp_path / "tiny.pt")
    assert (result.best_auroc, result.best_epoch) == (None, 2)
    assert load(result.best).record["valid_image_auroc"] is None


@pytest.mark.parametrize("augmented", [False, True])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    augmented: bool, weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(weights, augment={"enabled": augmented}, train={"epochs": 3, "pixel_warmup": 0.5})
    whole = run(config, data, tmp_path / "whole.pt")
    with monkeypatch.context() as patch:
        stop_in_epoch(2, patch)
        with pytest.raises(KeyboardInterrupt):
            run(config, data, tmp_path / "parts.pt")
    assert load(tmp_path / "parts.last.pt").record["epoch"] == 1
    parts = run(config, data, tmp_path / "parts.pt", resume=True)
    assert (parts.best_auroc, parts.best_epoch) == (whole.best_auroc, whole.best_epoch)
    assert_same_training(load(parts.last), load(whole.last))
    assert load(parts.last).record["epoch"] == 3
    # A finished run is not trained further.
    before = parts.last.read_bytes()
    assert run(config, data, tmp_path / "parts.pt", resume=True) == parts
    assert parts.last.read_bytes() == before


def test_augmentation_in_worker_processes_is_repeatable(weights: Path, data: Path, tmp_path: Path) -> None:
    config = tiny.config(weights, augment={"enabled": True}, train={"epochs": 2, "workers": 2, "validate_every": 2})
    one, other = (load(run(config, data, tmp_path / f"{name}.pt").last) for name in "ab")
    assert_same_training(one, other)


def test_another_seed_is_another_run(weights: Path, data: Path, tmp_path: Path) -> None:
    one, other = (
        load(run(tiny.config(weights, train={"epochs": 1, "seed": seed}), data, tmp_path / f"{seed}.pt").last)
        for seed in (1, 2)
    )
    assert not torch.equal(one.trained["decoder.predict.weight"], other.trained["decoder.predict.weight"])


def test_the_warmup_trains_on_pixels_first(
    weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[bool] = []
    forward = TrainingStep.forward

    def noting(self: TrainingStep, images: Tensor, seen: Tensor, frozen: Any, pixel_loss: bool) -> Tensor:
        kinds.append(pixel_loss)
        return forward(self, images, seen, frozen, pixel_loss)

    monkeypatch.setattr(TrainingStep, "forward", noting)
    # 20 images in batches of 8: two steps an epoch, the rest is dropped.
    run(tiny.config(weights, train={"epochs": 4, "pixel_warmup": 0.4}), data, tmp_path / "tiny.pt")
    assert kinds == [True] * 4 + [False] * 4  # 0.4 of 8 steps is 3.2: the step that begins within it counts


def test_the_two_losses(weights: Path) -> None:
    scorer, _ = build(tiny.config(weights))
    step = TrainingStep(scorer.eval())
    images = torch.randint(0, 256, (2, tiny.SIZE, tiny.SIZE, 3), dtype=torch.uint8)
    normalised = (images.permute(0, 3, 1, 2) / 255 - 0.449) / 0.226
    with torch.no_grad():
        reconstruction = scorer.autoencoder(normalised)
        error = (reconstruction - normalised).abs()
        pixels = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
        assert float(step(images, images, None, True)) == pytest.approx(float(pixels), rel=1e-5)
        perceptual = scorer.loss(scorer.loss_target(normalised), reconstruction)
        assert float(step(images, images, None, False)) == pytest.approx(float(perceptual), rel=1e-5)


@pytest.mark.parametrize("pixel_loss", [True, False])
def test_the_loss_compares_with_the_images_whatever_the_encoder_saw(weights: Path, pixel_loss: bool) -> None:
    scorer, _ = build(tiny.config(weights))
    step = TrainingStep(scorer.eval())
    images, seen = torch.randint(0, 256, (2, 2, tiny.SIZE, tiny.SIZE, 3), dtype=torch.uint8)
    frozen = Frozen(step.hidden(seen), step.target(images))
    with torch.no_grad():
        loss = float(step(images, seen, None, pixel_loss))
        assert loss == pytest.approx(float(step(images, seen, frozen, pixel_loss)), rel=1e-5)
        assert loss != pytest.approx(float(step(seen, seen, None, pixel_loss)), rel=1e-5)


def test_pasted_regions_reach_the_encoder_alone(
    weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[tuple[Tensor, Tensor]] = []
    forward = TrainingStep.forward

    def noting(self: TrainingStep, images: Tensor, seen: Tensor, frozen: Any, pixel_loss: bool) -> Tensor:
        assert frozen is None  # features of what changes cannot be cached
        pairs.append((images, seen))
        return forward(self, images, seen, frozen, pixel_loss)

    monkeypatch.setattr(TrainingStep, "forward", noting)
    config = tiny.config(weights, augment={"enabled": False, "paste": 1.0}, train={"epochs": 1})
    run(config, data, tmp_path / "tiny.pt")
    known = load_split(data, "train", config.preprocess_spec(), quiet=True).rgb(slice(None)).flatten(1)
    for images, seen in pairs:
        assert all((known == image.flatten()).all(dim=1).any() for image in images)
        assert (images != seen).flatten(1).any(dim=1).all()


def test_cached_variants_take_turns_and_are_made_again_alike(weights: Path, data: Path, tmp_path: Path) -> None:
    config = tiny.config(weights, augment={"enabled": False, "paste": 1.0, "paste_variants": 2})
    caches = []
    for _ in range(2):
        started = fit_module._start(config, data, tmp_path / "tiny.pt", False, False, "cpu")
        torch.rand(7)
        cache = fit_module._cache(started)
        assert cache is not None
        caches.append(cache)
    first, again = caches
    numbers, device = torch.tensor([3, 11]), torch.device("cpu")
    images = started.train.rgb(numbers)
    whole = Frozen(started.step.hidden(images), started.step.target(images))
    picks = [first.pick(epoch, numbers, device) for epoch in range(4)]

    assert len(first.hidden) == 2
    assert all(
        torch.equal(a, b)
        for one, two in zip(first.hidden, again.hidden, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    for even, odd in ((0, 2), (1, 3)):
        assert torch.equal(picks[even].hidden[0], picks[odd].hidden[0])
    assert not torch.allclose(picks[0].hidden[0], picks[1].hidden[0], atol=1e-2)
    assert not torch.allclose(picks[0].hidden[0], whole.hidden[0], atol=1e-2)
    assert whole.target is not None
    assert picks[1].target is not None
    for key, tokens in whole.target.items():  # what the loss compares with is never pasted into
        torch.testing.assert_close(picks[1].target[key], tokens, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_clipped(weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.Adam.step

    def noting(self: torch.optim.Adam, *given: Any) -> Any:
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
        return step(self, *given)

    monkeypatch.setattr(torch.optim.Adam, "step", noting)
    run(tiny.config(weights, train={"epochs": 1}), data, tmp_path / "free.pt")
    free, norms = max(norms), []
    run(tiny.config(weights, train={"epochs": 1, "grad_clip": free / 2}), data, tmp_path / "clipped.pt")
    assert max(norms) == pytest.approx(free / 2, rel=1e-3)


def test_the_aligned_start_is_fitted_to_training_images(weights: Path, data: Path, tmp_path: Path) -> None:
    """A first step from aligned weights changes a run, and a resumed run does not align again."""
    model = tiny.table(weights)["model"]
    model = {**model, "qformer": {**model["qformer"], "query_init": "aligned"}}
    config = tiny.config(weights, model=model, train={"epochs": 2})
    whole = load(run(config, data, tmp_path / "whole.pt").last)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_epoch(2, patch)
        with pytest.raises(KeyboardInterrupt):
            run(config, data, tmp_path / "parts.pt")
    parts = load(run(config, data, tmp_path / "parts.pt", resume=True).last)
    plain = load(run(tiny.config(weights, train={"epochs": 2}), data, tmp_path / "plain.pt").last)
    assert all(torch.equal(whole.trained[name], parts.trained[name]) for name in whole.trained)
    assert not torch.equal(whole.trained["decoder.predict.bias"], plain.trained["decoder.predict.bias"])


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def test_cached_features_change_nothing(
    weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(weights, train={"epochs": 2})
    cached = load(run(config, data, tmp_path / "cached.pt").last)
    monkeypatch.setattr(fit_module, "CACHE_LIMIT_GIB", 0.0)
    uncached = load(run(config, data, tmp_path / "uncached.pt").last)
    assert cached.record["loss"] == pytest.approx(uncached.record["loss"], rel=1e-4)
    for name, tensor in cached.trained.items():
        # Batches of other images round otherwise; Adam's first steps amplify that where gradients are near zero.
        torch.testing.assert_close(tensor, uncached.trained[name], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("states", "targets", "kept"), [(2, 1, (2, True)), (2, 0, (2, False)), (1.9, 0, (1, False)), (0.9, 0, None)]
)
def test_what_has_no_room_is_not_cached(
    states: float,
    targets: float,
    kept: tuple[int, bool] | None,
    weights: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    augment = {"enabled": False, "paste": 1.0, "paste_variants": 2}
    started = fit_module._start(tiny.config(weights, augment=augment), data, tmp_path / "tiny.pt", False, False, "cpu")
    whole = fit_module._cache(started)
    assert whole is not None
    assert whole.target is not None
    of_states = sum(one.nbytes for one in whole.hidden[0])
    of_targets = sum(tokens.nbytes for tokens in whole.target.values())
    monkeypatch.setattr(fit_module, "CACHE_LIMIT_GIB", (states * of_states + targets * of_targets) / 2**30)
    capsys.readouterr()
    cache = fit_module._cache(started)

    assert kept == (None if cache is None else (len(cache.hidden), cache.target is not None))
    said = "keeping 1 of 2 versions of each image (augment.paste_variants)"
    assert (said in capsys.readouterr().err) == (kept == (1, False))


def test_a_target_that_is_not_cached_changes_nothing(
    weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(weights, train={"epochs": 2})
    whole = load(run(config, data, tmp_path / "whole.pt").last)
    monkeypatch.setattr(fit_module, "_room", lambda run, variants: (variants, False))
    part = load(run(config, data, tmp_path / "part.pt").last)
    assert part.record["loss"] == pytest.approx(whole.record["loss"], rel=1e-4)


@pytest.mark.parametrize("pct_start", [0.0, 0.25, 0.5, 1.0])
def test_every_share_of_rising_steps_can_be_run(pct_start: float) -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    schedule = fit_module._schedule(optimizer, Train(pct_start=pct_start), total=4)
    for _ in range(3):
        optimizer.step()
        schedule.step()


def test_divergence_stops_the_run(weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingStep, "forward", lambda self, *_: sum(p.sum() for p in trainable(self)) * torch.inf)
    with pytest.raises(TrainingError) as caught:
        run(tiny.config(weights), data, tmp_path / "tiny.pt")
    assert str(caught.value).endswith(
        "in epoch 1: training has diverged; start anew with a lower train.lr (it was 0.003)"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_an_absurd_learning_rate_is_told_as_divergence(
    grad_clip: float, weights: Path, data: Path, tmp_path: Path
) -> None:
    config = tiny.config(weights, train={"lr": 1e30, "grad_clip": grad_clip, "epochs": 2})
    with pytest.raises(TrainingError, match=r"in epoch 1: training has diverged; .* \(it was 1e\+30\)$"):
        run(config, data, tmp_path / "tiny.pt")


@pytest.mark.parametrize("pct_start", [0.5, 1.0])
def test_a_run_of_a_single_step(pct_start: float) -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    schedule = fit_module._schedule(optimizer, Train(pct_start=pct_start), total=1)
    optimizer.step()
    if pct_start == 1:
        assert schedule.get_last_lr()[0] == pytest.approx(Train().lr / 25)
        schedule.step()


@pytest.mark.parametrize("where", ["file", "full"])
def test_an_output_that_cannot_be_written_is_told_before_anything_is_read(
    where: str, weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.pt"
    if where == "file":
        out.write_bytes(b"")
        out = out / "x.pt"
    else:
        (tmp_path / ".a.last.pt.part").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"': cannot be written \(.+\); free the disk or name another --out$"):
        run(tiny.config(weights), tmp_path / "nodata", out)
    assert [path.name for path in tmp_path.iterdir()] == (["a.pt"] if where == "file" else [])


def test_fewer_images_than_a_batch(weights: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(tiny.config(weights, train={"batch_size": 21}), data, tmp_path / "tiny.pt")
    assert str(caught.value) == (
        f"data '{data}': 20 training images are fewer than one batch of 21; lower train.batch_size"
    )


def test_defaults_of_augmentation_are_on() -> None:
    tables = tiny.table()
    del tables["augment"]
    assert from_dict(tables).augment == Augment()
    assert Augment().enabled
