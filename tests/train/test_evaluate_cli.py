"""qfae-train evaluate and --seeds: what they print and write, and what they refuse."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sklearn.metrics import average_precision_score, roc_auc_score

from qfae_runtime.metrics import TITLES
from qfae_train import seeds as seeds_module
from qfae_train.checkpoint import build_scorer, load
from qfae_train.cli import command
from qfae_train.data import load_split
from qfae_train.evaluate import evaluate_checkpoint, judge_checkpoint
from qfae_train.evaluate_cli import evaluate_command
from qfae_train.fit import fit

from . import tiny
from .made_up import config as small_config
from .made_up import made_up


@pytest.fixture(scope="module")
def labelled(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set with a test split: 5 normal images and 6 anomalous ones, one of them without a mask."""
    root = tmp_path_factory.mktemp("labelled") / "data"
    shutil.copytree(data, root)
    shutil.copytree(data / "valid", root / "test")
    (root / "test/good/img/5.png").unlink()
    (root / "test/Ungood/label/3.png").unlink()
    return root


@pytest.fixture(scope="module")
def trained(weights: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "tiny.pt"
    return fit(tiny.config(weights, train={"epochs": 2, "batch_size": 4}), labelled, out, device="cpu").best


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(evaluate_command, [str(one) for one in arguments])


def test_results_are_those_of_scikit_learn_and_every_image_counts(trained: Path, labelled: Path) -> None:
    """Eleven images in batches of four: the incomplete batch counts."""
    result = invoke("--ckpt", trained, "--data", labelled, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    split = load_split(labelled, "test", tiny.config().preprocess_spec())
    scores = build_scorer(load(trained))(split.rgb(slice(None))).score.numpy()
    assert values["counts"]["good"] + values["counts"]["ungood"] == len(scores) == 11
    assert values["image_auroc"] == pytest.approx(roc_auc_score(split.anomalous, scores), abs=1e-9)
    assert values["image_ap"] == pytest.approx(average_precision_score(split.anomalous, scores), abs=1e-9)
    assert (values["counts"]["images_with_pixel_truth"], values["counts"]["images_without_pixel_truth"]) == (10, 1)
    assert set(values["intervals_95"]) == set(TITLES)
    assert values["conditioning"]["tolerances"]["fp16"]["passes"] is True
    stored = load(trained).conditioning
    assert stored is not None
    assert values["conditioning"]["threshold"] == stored.threshold
    assert len(values["conditioning"]["rows"]) == 11
    assert result.stderr == "test: 11 images\n"


def test_text_gives_each_metric_with_its_interval(trained: Path, labelled: Path) -> None:
    result = invoke("--ckpt", trained, "--data", labelled, "--device", "cpu", "--batch-size", "3")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    for line, title in zip(lines, TITLES.values(), strict=False):
        assert line.startswith(title)
        assert " 95 % interval 0." in line or " 95 % interval 1." in line
    assert lines[5] == "5 good and 6 Ungood images, every one counted"
    assert "note: 1 images without a usable mask are left out of the pixel metrics" in lines
    stored = load(trained).conditioning
    assert stored is not None
    start = lines.index("rounding, against PyTorch FP64 on 12 images and 14 stress images:")
    assert lines[start - 1] == ""
    assert [line.split("  ")[0] for line in lines[start:]] == [
        line.split("  ")[0] for line in stored.text().splitlines()
    ]
    assert lines[-2:] == stored.text().splitlines()[-2:]


def test_one_class_is_said_and_no_number_is_made_up(trained: Path, labelled: Path, tmp_path: Path) -> None:
    shutil.copytree(labelled / "test/good", tmp_path / "test/good")
    result = invoke("--ckpt", trained, "--data", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "nan" not in result.output
    lines = result.stdout.splitlines()
    assert [line.split()[-1] for line in lines[:5]] == ["undefined"] * 5
    assert "all 5 scored images are normal, and it takes both normal and anomalous ones" in result.stdout
    values = json.loads(invoke("--ckpt", trained, "--data", tmp_path, "--device", "cpu", "--json").stdout)
    assert values["image_auroc"] is None


def test_the_authors_checkpoint(labelled: Path, tmp_path: Path) -> None:
    made = made_up(tmp_path, small_config())
    result = evaluate_checkpoint(
        made.checkpoint, labelled, config=made.config, files=made.files, batch_size=4, device="cpu"
    )
    split = load_split(labelled, "test", made.config.preprocess_spec())
    expected, _ = made.reference().score(split.rgb(slice(None)))
    assert result.scores == pytest.approx(expected.numpy(), abs=2e-5)
    judged = judge_checkpoint(
        made.checkpoint, labelled, config=made.config, files=made.files, batch_size=4, device="cpu"
    )
    assert judged.conditioning.images == 11  # it brings none: those of the split
    assert judged.metrics.image_auroc == result.image_auroc
    refused = invoke("--ckpt", made.checkpoint, "--data", labelled)
    assert refused.exit_code == 2
    assert "does not say its architecture; name it with --preset or --config" in refused.stderr


def test_every_fault_at_once() -> None:
    result = invoke(
        "--split", "train", "--device", "tpu", "--batch-size", "0", "--preset", "x", "--perceptual-weights", "n"
    )
    assert result.exit_code == 2
    assert result.stderr.splitlines()[:-1] == [
        f"qfae-train evaluate: {fault}"
        for fault in (
            "--ckpt: missing; name the checkpoint to evaluate",
            "--data: missing; name the data set's folder",
            "--split: got 'train', accepted are test, valid",
            "--device: got 'tpu', accepted are auto, cpu, cuda",
            "--batch-size: got '0', expected a whole number in 1..4096",
            "--perceptual-weights: n: no such file",
            "--preset: got 'x', accepted are brats, brats-dual, demo, liver, resc, rsna",
        )
    ]


def test_seeds_train_and_evaluate_each(weights: Path, labelled: Path, tmp_path: Path) -> None:
    config = tiny.config(weights, train={"epochs": 1, "batch_size": 4})
    out = tmp_path / "runs" / "tiny.pt"
    summary = seeds_module.fit_seeds(config, labelled, out, seeds=[42, 7], resume=False, overwrite=False, device="cpu")
    stored = json.loads((tmp_path / "runs/tiny.seeds.json").read_text(encoding="utf-8"))
    assert [run["seed"] for run in stored["runs"]] == [42, 7]
    for run in stored["runs"]:
        checkpoint = out.with_name(run["checkpoint"])
        assert checkpoint.name == f"tiny.seed{run['seed']}.pt"
        assert load(checkpoint).config.train.seed == run["seed"]
        again = evaluate_checkpoint(checkpoint, labelled, device="cpu")
        assert run["test"]["image_auroc"] == pytest.approx(again.image_auroc)
    first, second = (run["test"]["image_auroc"] for run in stored["runs"])
    assert stored["statistics"]["image_auroc"]["mean"] == pytest.approx((first + second) / 2)
    assert stored["statistics"]["image_auroc"]["std"] == pytest.approx(statistics.stdev([first, second]))
    text = summary.text().splitlines()
    assert text[0].startswith(f"seed 42: image AUROC {100 * first:.2f}, image AP ")
    assert text[2] == (
        f"image AUROC: {50 * (first + second):.2f} ± {100 * statistics.stdev([first, second]):.2f} over 2 seeds"
    )
    assert [line.split(": ")[:2] for line in text[-2:]] == [["seed 42", "FP16"], ["seed 7", "FP16"]]
    for run in stored["runs"]:
        kept = load(out.with_name(run["checkpoint"])).conditioning
        assert kept is not None
        assert run["conditioning"] == kept.to_dict()
    best = max(stored["runs"], key=lambda run: run["valid_image_auroc"])
    assert summary.best == out.with_name(best["checkpoint"])


def test_seeds_that_are_done_are_not_trained_again(
    weights: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(weights, train={"epochs": 1, "batch_size": 4})
    given: dict[str, Any] = {"device": "cpu", "overwrite": False}
    seeds_module.fit_seeds(config, labelled, tmp_path / "t.pt", seeds=[3], resume=False, **given)
    before = (tmp_path / "t.seed3.pt").stat().st_mtime_ns
    summary = seeds_module.fit_seeds(config, labelled, tmp_path / "t.pt", seeds=[3, 4], resume=True, **given)
    assert (tmp_path / "t.seed3.pt").stat().st_mtime_ns == before
    assert [run["seed"] for run in summary.runs] == [3, 4]
    with pytest.raises(Exception, match=r"t.seeds.json': results are already there; add --resume to go on or --over"):
        seeds_module.fit_seeds(config, labelled, tmp_path / "t.pt", seeds=[3], resume=False, **given)


def test_seeds_on_the_command_line(tmp_path: Path) -> None:
    given = ["--preset", "demo", "--data", "d", "--out", str(tmp_path / "m.pt")]
    result = CliRunner().invoke(command, [*given, "--seeds", "42,x", "--seed", "3"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == (
        "qfae-train: --seeds: got '42,x', expected different whole numbers with commas between, such as 42,7,13"
    )
    result = CliRunner().invoke(command, [*given, "--seeds", "42,7", "--seed", "3"])
    assert result.stderr.splitlines()[0] == "qfae-train: --seed and --seeds exclude each other; choose one"


def test_no_gpu(trained: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = invoke("--ckpt", trained, "--data", labelled, "--device", "cuda")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0].endswith(
        "--device: cuda was asked for, but torch finds no CUDA device; use cpu or auto"
    )


def test_faults_of_the_configuration_are_told_with_the_rest(tmp_path: Path) -> None:
    result = invoke("--config", tmp_path / "no.toml", "--data", tmp_path, "--batch-size", "0")
    assert result.exit_code == 2
    assert [line.split(": ")[1].split(" ")[0] for line in result.stderr.splitlines()[:-1]] == [
        "--ckpt",
        "--batch-size",
        "config",
    ]
