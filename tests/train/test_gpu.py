"""Training on a real card: the losses of the processor, files that the processor reads, and a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qfae_train.checkpoint import Checkpoint, load
from qfae_train.fit import fit

from . import tiny
from .test_fit import stop_in_epoch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; torch finds none on this machine"),
]


def trained(
    weights: Path, data: Path, out: Path, *, device: str = "cuda", precision: str = "32-true", epochs: int = 1
) -> Checkpoint:
    config = tiny.config(weights, train={"precision": precision, "epochs": epochs})
    return load(fit(config, data, out, device=device, resume=out.exists()).last)


def test_an_epoch_ends_where_the_processor_ends(weights: Path, data: Path, tmp_path: Path) -> None:
    want = trained(weights, data, tmp_path / "cpu.pt", device="cpu")
    got = trained(weights, data, tmp_path / "cuda.pt")
    assert got.record["loss"] == pytest.approx(want.record["loss"], rel=1e-3)
    assert got.record["valid_image_auroc"] == pytest.approx(want.record["valid_image_auroc"], abs=0.03)
    assert all(tensor.device.type == "cpu" for tensor in got.trained.values())
    assert not all(torch.equal(tensor, want.trained[name]) for name, tensor in got.trained.items())


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_learns_alike(precision: str, weights: Path, data: Path, tmp_path: Path) -> None:
    want = trained(weights, data, tmp_path / "whole.pt", epochs=4).record["loss"]
    got = trained(weights, data, tmp_path / "mixed.pt", precision=precision, epochs=4).record["loss"]
    assert got != want
    assert got == pytest.approx(want, rel=0.05)


def test_augmented_images_reach_the_card(weights: Path, data: Path, tmp_path: Path) -> None:
    """They come from a loader of their own, by way of page-locked memory."""
    config = tiny.config(weights, augment={"enabled": True}, train={"epochs": 1, "workers": 2})
    record = load(fit(config, data, tmp_path / "tiny.pt", device="cuda").last).record
    processor = load(fit(config, data, tmp_path / "cpu.pt", device="cpu").last).record
    assert record["loss"] == pytest.approx(processor["loss"], rel=1e-3)


def test_a_run_goes_on_on_another_device(weights: Path, data: Path, tmp_path: Path) -> None:
    begun = tiny.config(weights, train={"epochs": 2})
    want = load(fit(begun, data, tmp_path / "whole.pt", device="cpu").last).record["loss"]
    with pytest.MonkeyPatch.context() as patch:
        stop_in_epoch(2, patch)
        with pytest.raises(KeyboardInterrupt):
            fit(begun, data, tmp_path / "parts.pt", device="cuda")
    got = load(fit(begun, data, tmp_path / "parts.pt", device="cpu", resume=True).last).record
    assert got["epoch"] == 2
    assert got["loss"] == pytest.approx(want, rel=1e-3)
