"""Training on a real card: the losses of the processor, files that the processor reads, and a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qfae_train.autoencoder import build
from qfae_train.checkpoint import build_scorer, load
from qfae_train.conditioning import measure
from qfae_train.config import Config, from_dict
from qfae_train.data import load_split
from qfae_train.fit import fit
from qfae_train.float32 import whole_float32
from qfae_train.progress import Reporter

from . import tiny
from .test_fit import stop_in_epoch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; torch finds none on this machine"),
]


def losses_of(config: Config, data: Path, out: Path, device: str) -> list[float]:
    """The loss of every step: of the first no update has a part, later ones hold ever more of each one's rounding."""
    advance = Reporter.advance
    losses: list[float] = []

    def noting(self: Reporter, description: str, loss: Tensor) -> None:
        losses.append(float(loss.detach()))
        advance(self, description, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "advance", noting)
        fit(config, data, out, device=device)
    return losses


def test_rounding_moves_the_scores_as_far_as_on_the_processor(weights: Path) -> None:
    """FP64 and the rounding are there, too; digits differ, for sums are taken in another order."""
    torch.manual_seed(3)
    scorer = build(tiny.config(weights))[0].eval()
    size = (12, tiny.SIZE, tiny.SIZE, 3)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    want, got = measure(scorer, images), measure(scorer.to("cuda"), images)
    assert got.threshold == pytest.approx(want.threshold, rel=1e-9)
    for one, other in zip(got.rows, want.rows, strict=True):
        assert one.fault is other.fault is None
        ours, theirs = (row.values["map_angle"] for row in (one, other))
        assert ours is not None
        assert theirs is not None
        assert 0.3 < ours / theirs < 3, (one.precision, one.stage)


@pytest.mark.parametrize("augmented", [False, True])
def test_training_is_that_of_the_processor(augmented: bool, weights: Path, data: Path, tmp_path: Path) -> None:
    """Augmented images come from processes of a loader, by way of page-locked memory; each device has its dropout."""
    table = tiny.table(weights, augment={"enabled": augmented}, train={"epochs": 4, "workers": 2 if augmented else 0})
    table["model"]["qformer"]["dropout"] = 0.0
    config = from_dict(table)
    want = losses_of(config, data, tmp_path / "cpu.pt", "cpu")
    got = losses_of(config, data, tmp_path / "cuda.pt", "cuda")
    assert got[0] == pytest.approx(want[0], rel=1e-4)
    assert got == pytest.approx(want, rel=0.05)
    assert got[-1] < 0.6 * got[0]
    processor, card = (load(tmp_path / f"{name}.last.pt") for name in ("cpu", "cuda"))
    assert all(tensor.device.type == "cpu" for tensor in card.trained.values())
    assert card.record["valid_image_auroc"] == pytest.approx(processor.record["valid_image_auroc"], abs=0.03)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_learns_alike(precision: str, weights: Path, data: Path, tmp_path: Path) -> None:
    whole, mixed = (tiny.config(weights, train={"precision": name, "epochs": 4}) for name in ("32-true", precision))
    want = losses_of(whole, data, tmp_path / "whole.pt", "cuda")
    got = losses_of(mixed, data, tmp_path / "mixed.pt", "cuda")
    assert got[0] != want[0]
    assert got == pytest.approx(want, rel=0.1)
    assert got[0] == pytest.approx(want[0], rel=0.02)


def test_a_run_goes_on_on_another_device(weights: Path, data: Path, tmp_path: Path) -> None:
    config = tiny.config(weights, train={"epochs": 2})
    want = load(fit(config, data, tmp_path / "whole.pt", device="cpu").last).record["loss"]
    with pytest.MonkeyPatch.context() as patch:
        stop_in_epoch(2, patch)
        with pytest.raises(KeyboardInterrupt):
            fit(config, data, tmp_path / "parts.pt", device="cuda")
    got = load(fit(config, data, tmp_path / "parts.pt", device="cpu", resume=True).last).record
    assert got["epoch"] == 2
    assert got["loss"] == pytest.approx(want, rel=0.03)


def test_the_processor_scores_as_the_card(weights: Path, data: Path, tmp_path: Path) -> None:
    checkpoint = load(fit(tiny.config(weights, train={"epochs": 1}), data, tmp_path / "tiny.pt", device="cuda").last)
    split = load_split(data, "valid", checkpoint.config.preprocess_spec(), quiet=True)
    scorer = build_scorer(checkpoint)
    before = torch.backends.cudnn.allow_tf32
    with whole_float32():
        assert not torch.backends.cudnn.allow_tf32
        got = scorer.to("cuda")(split.rgb(slice(8)).to("cuda")).score.cpu()
    assert torch.backends.cudnn.allow_tf32 == before
    want = scorer.to("cpu")(split.rgb(slice(8))).score
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
