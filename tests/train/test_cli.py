"""The command qfae-train: every fault at once, exit codes, and the next command to type."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qfae_train import fit as fit_module
from qfae_train import seeds as seeds_module
from qfae_train.checkpoint import load
from qfae_train.cli import command
from qfae_train.config import Config, Train

from . import conditionings, tiny


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture
def toml(weights: Path, tmp_path: Path) -> Path:
    """The tiny configuration as a file, its weights beside it."""
    (tmp_path / "w.safetensors").write_bytes(weights.read_bytes())
    backbone = f"""
        timm = "{tiny.TIMM}"
        patch_size = 8
        args = {{ patch_size = 8, embed_dim = 32, depth = 3, num_heads = 2 }}
        weights = "w.safetensors"
    """
    path = tmp_path / "my.toml"
    path.write_text(
        f"""
        [model]
        image_size = {tiny.SIZE}
        hidden_states = [-1, -2]
        [[model.encoders]]
        {backbone}
        [model.qformer]
        dim = 32
        queries = 16
        heads = 2
        cross_head_dim = 16
        [model.decoder]
        dim = 32
        depth = 1
        heads = 2
        [perceptual]
        {backbone}
        [loss]
        patch_sizes = [16]
        blocks = [2]
        [score]
        patch_sizes = [8, 16]
        blocks = [2, 3]
        [augment]
        enabled = false
        [train]
        epochs = 9
        batch_size = 10
        """,
        encoding="utf-8",
    )
    return path


def test_help_ends_with_the_example_and_shows_each_option() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert "  qfae-train --preset brats --data BMAD/Brain --out runs/brats/brats.pt\n" in result.output
    assert result.output.rstrip().endswith("qfae-train evaluate --ckpt runs/brats/brats.pt --data BMAD/Brain")
    own = ["preset", "config", "data", "out", "resume", "overwrite", "device", "version", "help"]
    for option in [*own, *(spec.name for spec in dataclasses.fields(Train))]:
        assert f"--{option.replace('_', '-')}" in result.output
    flowing = " ".join(result.output.split())
    for spec in dataclasses.fields(Train):
        help_text = spec.metadata["help"]
        assert f"{help_text[0].upper()}{help_text[1:]}." in flowing
        assert f"{spec.default} if it names none" in flowing


def test_every_fault_at_once() -> None:
    result = invoke(
        *("--preset", "nosuch", "--resume", "--overwrite", "--device", "tpu", "--epoch", "3"),
        *("--epochs", "many", "--lr", "nan", "--batch-size", "1.5", "--precision", "8-bit"),
    )
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[:2] == [
        "qfae-train: --epoch: no such option; did you mean --epochs?",
        "qfae-train: '3': unexpected; everything is named by an option",
    ]
    assert lines[2].startswith("qfae-train: --preset: got 'nosuch', accepted are brats, brats-dual, demo")
    assert lines[3:] == [
        "qfae-train: --data: missing; name the data set's folder",
        "qfae-train: --out: missing; name the checkpoint to write",
        "qfae-train: --resume and --overwrite exclude each other; choose one",
        "qfae-train: --device: got 'tpu', accepted are auto, cpu, cuda",
        "qfae-train: train.epochs: expected a whole number, got 'many'",
        "qfae-train: train.batch_size: expected a whole number, got 1.5",
        "qfae-train: train.lr: expected a finite number, got nan",
        "qfae-train: train.precision: got '8-bit'; accepted are '32-true', 'bf16-mixed', '16-mixed'",
        "Try 'qfae-train --help'.",
    ]


@pytest.mark.parametrize(
    ("given", "fault"),
    [([], "give one of them"), (["--preset", "demo", "--config", "my.toml"], "give one of them, not both")],
)
def test_one_configuration_is_needed(given: list[str], fault: str, tmp_path: Path) -> None:
    result = invoke(*given, "--data", tmp_path, "--out", tmp_path, "--epochs", "0")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"qfae-train: --preset, --config: {fault}",
        f"qfae-train: --out: {tmp_path} is a folder; name a file, such as {tmp_path / 'model.pt'}",
        "qfae-train: train.epochs: got 0; it must be above 0",
        "Try 'qfae-train --help'.",
    ]


def test_faults_of_a_file_and_of_the_command_line(toml: Path, tmp_path: Path) -> None:
    toml.write_text(
        toml.read_text(encoding="utf-8").replace("\n        heads = 2", "\n        heads = 3"), encoding="utf-8"
    )
    result = invoke("--config", toml, "--data", tmp_path, "--out", tmp_path / "m.pt", "--lr", "-1")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "qfae-train: model.qformer.heads: 3 heads do not divide the width 32",
        "qfae-train: model.decoder.heads: 3 heads do not divide the width 32",
        "qfae-train: train.lr: got -1.0; it must be above 0",
        "Try 'qfae-train --help'.",
    ]


def test_wrong_types_and_wrong_values_at_once(toml: Path, tmp_path: Path) -> None:
    toml.write_text(
        toml.read_text(encoding="utf-8").replace("dim = 32\n        queries", 'dim = "big"\n        queries'),
        encoding="utf-8",
    )
    weights = tmp_path / "w.safetensors"
    given = ["--epochs", "0", "--batch-size", "x", "--lr", "-1", "--backbone-weights", f"nosuch={weights}"]
    expected = [
        "qfae-train: --data: missing; name the data set's folder",
        "qfae-train: train.batch_size: expected a whole number, got 'x'",
        "qfae-train: train.epochs: got 0; it must be above 0",
        "qfae-train: train.lr: got -1.0; it must be above 0",
        "Try 'qfae-train --help'.",
    ]
    result = invoke("--preset", "demo", "--out", tmp_path / "m.pt", *given)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == expected
    result = invoke("--config", toml, "--out", tmp_path / "m.pt", *given)
    expected.insert(1, "qfae-train: model.qformer.dim: expected a whole number, got 'big'")
    assert result.stderr.splitlines() == expected


def test_an_unknown_encoder_is_told_with_the_rest(toml: Path, tmp_path: Path) -> None:
    result = invoke("--config", toml, "--out", "m.pt", "--backbone-weights", f"nosuch={tmp_path / 'w.safetensors'}")
    assert result.stderr.splitlines() == [
        "qfae-train: --data: missing; name the data set's folder",
        f"qfae-train: --backbone-weights: no encoder is called 'nosuch'; there is {tiny.TIMM}",
        "Try 'qfae-train --help'.",
    ]


def test_no_gpu_and_impossible_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given = ["--preset", "demo", "--data", "d", "--out", tmp_path / "m.pt", "--device", "cuda"]
    device = "qfae-train: --device: cuda was asked for, but torch finds no CUDA device; use cpu or auto"
    result = invoke(*given, "--seed", 2**31)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[:-1] == [
        device,
        "qfae-train: train.seed: got 2147483648; accepted are values up to 2147483647",
    ]
    result = invoke(*given, "--seeds", f"1,{2**31}")
    assert result.stderr.splitlines()[:-1] == [
        device,
        "qfae-train: --seeds: got 2147483648; accepted are seeds from 0 to 2147483647",
    ]


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    result = invoke("--config", "my.yaml", "--data", tmp_path, "--out", tmp_path / "m.pt")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == "qfae-train: --config: 'my.yaml' does not end in .toml"
    result = invoke("--config", tmp_path / "no.toml", "--data", tmp_path, "--out", tmp_path / "m.pt")
    assert result.exit_code == 2
    assert f"config '{tmp_path / 'no.toml'}': no such file or preset" in result.stderr


def test_missing_data(toml: Path, tmp_path: Path) -> None:
    result = invoke("--config", toml, "--data", tmp_path / "none", "--out", tmp_path / "m.pt")
    assert result.exit_code == 1
    assert result.stderr == (
        f"qfae-train: data '{tmp_path / 'none'}': no folder train/; "
        "expected the BMAD layout (train/good, valid, test)\n"
    )
    assert not (tmp_path / "m.pt").exists()


def test_options_reach_the_run(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(config: Config, data: Path, out: Path, **options: Any) -> fit_module.Result:
        seen.update(config=config, data=data, out=out, **options)
        return fit_module.Result(out, out.with_name("last.pt"), 0.91234, 40, conditionings.made())

    monkeypatch.setattr(fit_module, "fit", record)
    given = ["--epochs", "3", "--lr", "1e-2", "--precision", "bf16-mixed", "--pixel-warmup", "0", "--seed", "7"]
    result = invoke("--config", toml, "--data", "d", "--out", "my runs/m.pt", "--device", "cpu", "--resume", *given)
    assert result.exit_code == 0, result.output
    assert seen["config"].train == Train(epochs=3, batch_size=10, lr=0.01, precision="bf16-mixed", seed=7)
    assert (seen["data"], seen["out"]) == (Path("d"), Path("my runs/m.pt"))
    assert (seen["resume"], seen["overwrite"], seen["device"]) == (True, False, "cpu")
    assert result.stdout.splitlines() == [
        "best checkpoint my runs/m.pt, validation AUROC 0.9123 at epoch 40; newest my runs/last.pt",
        *conditionings.made().text().splitlines(),
        "next: qfae-export --ckpt 'my runs/m.pt'",
    ]


@pytest.mark.parametrize("seeds", [False, True])
@pytest.mark.parametrize(
    ("before", "given", "saves"),
    [
        (False, [], False),
        (False, [], True),
        (True, ["--overwrite"], False),
        (True, ["--overwrite"], True),
        (True, ["--resume"], False),
    ],
)
def test_interrupted(
    before: bool,
    given: list[str],
    saves: bool,
    seeds: bool,
    toml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    last = tmp_path / ("m.seed7.last.pt" if seeds else "m.last.pt")
    if before:
        last.write_bytes(b"")
        os.utime(last, (1, 1))

    def interrupt(*_: object, **__: object) -> None:
        if saves:
            last.write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "fit", interrupt)
    monkeypatch.setattr(seeds_module, "fit_seeds", interrupt)
    if seeds:
        given = [*given, "--seeds", "3,7"]
    result = invoke("--config", toml, "--data", "d", "--out", tmp_path / "m.pt", *given)
    assert result.exit_code == 130
    if saves or "--resume" in given:
        assert result.stderr == "qfae-train: interrupted; go on with --resume\n"
    else:
        assert result.stderr == "qfae-train: interrupted before the first checkpoint; nothing was saved\n"


def test_a_missing_extra_is_one_sentence(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qfae_train.fit", None)
    monkeypatch.delattr("qfae_train.fit", raising=False)

    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr("qfae_train.cli.parse_options", missing)
    result = invoke("--config", toml, "--data", "d", "--out", tmp_path / "m.pt")
    assert result.exit_code == 1
    assert result.stderr == "qfae-train: training needs timm, which is not installed: pip install 'qfae[train]'\n"


def test_a_run_in_a_process_of_its_own(toml: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "m.pt"
    done = subprocess.run(
        [sys.executable, "-m", "qfae_train.cli", "--config", toml, "--data", data, "--out", out, "--epochs", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"next: qfae-export --ckpt {out}"
    checkpoint = load(out)
    assert checkpoint.config.train.epochs == 2
    assert checkpoint.config.train.batch_size == 10
    again = invoke("--config", toml, "--data", data, "--out", out)
    assert again.exit_code == 1
    assert again.stderr == (
        f"qfae-train: '{out}': a run is already there; add --resume to go on with it or --overwrite to start anew\n"
    )


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, qfae_train.cli; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
