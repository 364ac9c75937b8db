"""From the authors' checkpoint to scores of files, as a user types it, against a plain reading of the method."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.commands import run
from tests.train.made_up import DINO, DINOV2, MAE, SMALL, MadeUp, config, images, made_up, toml

SCORE_ABSOLUTE = 2e-5

SIZES = ((112, 112), (240, 240), (300, 150), (64, 200))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeUp:
    two = [
        {"timm": DINOV2, "patch_size": 14, "args": dict(SMALL)},
        {"timm": DINO, "patch_size": 8, "args": dict(SMALL)},
    ]
    return made_up(tmp_path_factory.mktemp("authors"), config(model={"encoders": two}))


def test_from_the_authors_checkpoint_to_scores(made: MadeUp, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(toml(made.config), encoding="utf-8")
    (tmp_path / "scans").mkdir()
    resized = []
    for number, (height, width) in enumerate(SIZES):
        pixels = images(len(SIZES), max(height, width))[number, :height, :width]
        Image.fromarray(pixels.numpy()).save(tmp_path / "scans" / f"{number}.png")
        resized.append(v2.Resize((112, 112), antialias=True)(pixels.permute(2, 0, 1)).permute(1, 2, 0))
    weights = made.files.perceptual
    exported = run(
        *("qfae-export", "--ckpt", made.checkpoint, "--config", "my.toml", "--perceptual-weights", weights),
        *("--out", "engine", "--name", "two"),
        cwd=tmp_path,
    )
    assert exported.returncode == 0, exported.stderr
    assert (
        "measured on: 32 brain slices that come with qfae\n"
        "and 14 stress images: constants, ramps, noise, colours, bright corners and borders\n"
        "warning: these are not images of your kind"
    ) in exported.stdout
    scored = run("qfae-run", "scans", "--engine", "engine/two.onnx", "--out", "results", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr

    with (tmp_path / "results/scores.csv").open(encoding="utf-8", newline="") as file:
        got = [float(row["score"]) for row in csv.DictReader(file)]
    expected, _ = made.reference().score(torch.stack(resized))
    np.testing.assert_allclose(got, expected, rtol=0, atol=SCORE_ABSOLUTE)

    manifest = json.loads((tmp_path / "engine/two.json").read_text(encoding="utf-8"))
    assert [(one["timm"], one["source"]) for one in manifest["provenance"]["frozen"]] == [
        (DINOV2, "last_ckpt.pth"),
        (DINO, "last_ckpt.pth"),
        (MAE, "mae.safetensors"),
    ]
    assert all(len(one["sha256"]) == 64 for one in manifest["provenance"]["frozen"])
    assert manifest["provenance"]["training"] == {"origin": "the authors' release"}
    assert str(tmp_path) not in json.dumps(manifest)


def refusal(made: MadeUp, folder: Path, *arguments: object) -> tuple[int, list[str]]:
    done = run("qfae-export", "--ckpt", made.checkpoint, "--out", "engine", *arguments, cwd=folder)
    lines = [line.removeprefix("qfae-export: ") for line in done.stderr.splitlines()]
    return done.returncode, [line for line in lines if line != "reading the checkpoint"]


def test_another_architecture_lists_every_name(made: MadeUp, tmp_path: Path) -> None:
    code, lines = refusal(made, tmp_path, "--preset", "brats", "--perceptual-weights", made.files.perceptual)
    assert code == 1
    assert lines[0].startswith(f"checkpoint '{made.checkpoint}': does not fit the configuration (")
    assert "  junction.queries: expected (1, 784, 768), got (1, 196, 48)" in lines
    assert "  decoder.decoder_blocks.5.norm1.bias: expected (768,), missing" in lines
    assert f"  encoders.1.final_projection.bias: not a part of this architecture, got {(48,)}" in lines
    assert not list(tmp_path.glob("engine/*"))


def test_faults_of_the_options_all_at_once(made: MadeUp, tmp_path: Path) -> None:
    given = ("--preset", "nosuch", "--config", "my.yaml", "--perceptual-weights", "none.pt", "--backbone-weights", "x")
    code, lines = refusal(made, tmp_path, *given)
    assert code == 2
    assert lines[:-1] == [
        "--backbone-weights: got 'x', expected NAME=FILE with timm's name of the encoder",
        "--perceptual-weights: none.pt: no such file",
        "--preset, --config: give one of them, not both",
        "--config: 'my.yaml' does not end in .toml",
        "--preset: got 'nosuch', accepted are brats, brats-dual, demo, liver, resc, rsna",
    ]


def test_the_architecture_must_be_named(made: MadeUp, tmp_path: Path) -> None:
    code, lines = refusal(made, tmp_path)
    assert code == 2
    assert lines[0] == (
        f"{made.checkpoint}: a checkpoint of the authors' release, which does not say its architecture; name it with "
        "--preset or --config"
    )
