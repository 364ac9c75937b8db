"""What a training run goes on with, what it replaces, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qfae_runtime.errors import OutputError
from qfae_train.checkpoint import CheckpointError, load, save

from . import tiny
from .test_fit import run, stop_in_epoch


def test_resuming_with_another_configuration(weights: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.pt"
    run(tiny.config(weights, train={"epochs": 1}), data, out)
    with pytest.raises(CheckpointError) as caught:
        run(tiny.config(weights, train={"epochs": 2, "lr": 1.0}), data, out, resume=True)
    assert str(caught.value) == (
        f"cannot resume '{tmp_path / 'tiny.last.pt'}': it was trained with another configuration "
        "(train.epochs: 1 -> 2; train.lr: 0.003 -> 1.0); use the same preset and options, or --overwrite to start anew"
    )


def test_a_finished_run_says_again_what_rounding_does(
    weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = tiny.config(weights, train={"epochs": 1}), tmp_path / "tiny.pt"
    measured = run(config, data, out).conditioning
    assert load(out).conditioning == measured
    with monkeypatch.context() as patch:
        patch.setattr("qfae_train.fit.measure", None)  # it is read, not measured again
        assert run(config, data, out, resume=True).conditioning == measured
    # What earlier versions wrote, or a run that was ended while it measured, is measured now.
    save(out, replace(load(out), conditioning=None))
    assert run(config, data, out, resume=True).conditioning == measured
    assert load(out).conditioning == measured


def test_resuming_with_other_frozen_weights(data: Path, tmp_path: Path) -> None:
    weights = tiny.write_weights(tmp_path / "w.safetensors", seed=0)
    out = tmp_path / "tiny.pt"
    run(tiny.config(weights, train={"epochs": 1}), data, out)
    tiny.write_weights(weights, seed=1)
    with pytest.raises(CheckpointError) as caught:
        run(tiny.config(weights, train={"epochs": 1}), data, out, resume=True)
    assert str(caught.value) == (
        f"cannot resume '{tmp_path / 'tiny.last.pt'}': the frozen weights of {tiny.TIMM}, {tiny.TIMM} are not those "
        "it was trained with; put the original files back, or --overwrite to start anew"
    )


def test_resuming_on_other_data(weights: Path, data: Path, tmp_path: Path) -> None:
    own = tmp_path / "data"
    shutil.copytree(data, own)
    config = tiny.config(weights, train={"epochs": 1})
    result = run(config, own, tmp_path / "tiny.pt")

    def refusal() -> str:
        with pytest.raises(CheckpointError) as caught:
            run(config, own, tmp_path / "tiny.pt", resume=True)
        return str(caught.value).removeprefix(f"cannot resume '{result.last}': ")

    cure = "; put the original images back, or --overwrite to start anew"
    image = own / "train/good/img/0.png"
    tiny.write_png(image, tiny.picture(np.random.default_rng(99)))
    assert refusal() == (f"it was trained on other images: there are 20 as before, but not with the same pixels{cure}")
    newest = load(result.last)
    old = {key: value for key, value in newest.resume.items() if key != "train_sha256"}
    save(result.last, replace(newest, resume=old))
    assert run(config, own, tmp_path / "tiny.pt", resume=True) == result  # a file that does not say
    image.unlink()
    assert refusal() == f"it was trained on 20 images, the data set now holds 19{cure}"


def test_resuming_without_the_best_checkpoint(weights: Path, data: Path, tmp_path: Path) -> None:
    config = tiny.config(weights, train={"epochs": 1})
    result = run(config, data, tmp_path / "tiny.pt")
    result.best.unlink()
    with pytest.raises(CheckpointError) as caught:
        run(config, data, tmp_path / "tiny.pt", resume=True)
    assert str(caught.value) == (
        f"cannot resume '{result.last}': the best checkpoint '{result.best}' (of epoch 1) is missing; put it back, or "
        "--overwrite to start anew"
    )


def test_nothing_to_resume(weights: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        run(tiny.config(weights), data, tmp_path / "tiny.pt", resume=True)
    assert str(caught.value) == (
        f"nothing to resume: '{tmp_path / 'tiny.last.pt'}' does not exist; leave --resume out to start a new run"
    )


def test_the_best_checkpoint_cannot_be_resumed_from(weights: Path, data: Path, tmp_path: Path) -> None:
    config = tiny.config(weights, train={"epochs": 1})
    result = run(config, data, tmp_path / "tiny.pt")
    result.best.replace(result.last)
    with pytest.raises(CheckpointError) as caught:
        run(config, data, tmp_path / "tiny.pt", resume=True)
    assert str(caught.value) == (
        f"cannot resume '{result.last}': it holds no optimiser state; resume from a .last file"
    )


def test_an_existing_run_is_not_overwritten_unasked(
    weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(weights, train={"epochs": 1})
    out = tmp_path / "tiny.pt"
    first = run(config, data, out)
    before = first.best.read_bytes()
    there = f"'{out}': a run is already there; add --resume to go on with it or --overwrite to start anew"
    alone = (
        f"'{out}': a checkpoint is already there, without a 'tiny.last.pt' to resume from; add --overwrite to start "
        "anew or name another --out"
    )
    for content, removed, refusal in ((before, first.best, there), (before, first.last, there), (before, None, alone)):
        if removed == first.last:
            out.unlink(missing_ok=True)
        with pytest.raises(OutputError) as caught:
            run(config, data, out)
        assert str(caught.value) == refusal
        if removed is not None:
            removed.unlink()
        out.write_bytes(content)
    out.write_bytes(before)
    run(config, data, out, overwrite=True)
    # Overwriting, then stopped before the first checkpoint: the old run must not be resumed in its place.
    stop_in_epoch(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(config, data, out, overwrite=True)
    assert not first.last.exists()
