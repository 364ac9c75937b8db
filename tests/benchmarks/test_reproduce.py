"""`make reproduce` on a miniature BMAD tree made from the demonstration's slices, with tiny models."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.published import DATA_SETS, OURS, TABLE_3, TABLE_7, shown
from benchmarks.reproduce import find_roots, steps_of
from benchmarks.tables import LIVER_STEPS
from demo.slices import add_lesion, finish, normal_slice
from qfae_runtime.errors import UsageError
from qfae_train.backbone import create
from qfae_train.bmad import BENCHMARKS
from qfae_train.checkpoint import load as load_checkpoint
from qfae_train.config import Backbone, load
from tests.commands import ROOT, run

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
TIMM = "vit_tiny_patch16_224"

TOML = f"""
[model]
hidden_states = [-1]
encoders = [{{ timm = "{TIMM}", patch_size = 16, args = {{ embed_dim = 32, depth = 2, num_heads = 2 }} }}]
[model.qformer]
dim = 32
heads = 2
cross_head_dim = 16
[model.decoder]
dim = 32
depth = 1
heads = 2
[perceptual]
timm = "{TIMM}"
args = {{ embed_dim = 32, depth = 2, num_heads = 2 }}
[loss]
blocks = [1, 2]
[score]
patch_sizes = SCORE
blocks = [1, 2]
[preprocess]
kind = "KIND"
[train]
epochs = 1
batch_size = 4
workers = 0
"""


def tree(root: Path, train: int, masks: str, images: str) -> None:
    """One BMAD root with a few of the demonstration's slices; `masks` and `images` name the folders' variants."""
    for split, label, count in (("train", "good", train), ("valid", "good", 2), ("valid", "Ungood", 2),
                                ("test", "good", 3), ("test", "Ungood", 3)):  # fmt: skip
        for number in range(count):
            seed = [len(split), len(label), number]
            image = normal_slice(seed)
            folder = root / split / label
            if label == "Ungood":
                image, mask = add_lesion(image, [*seed, 1])
                save_png(folder / masks / f"{number}.png", Image.fromarray(mask))
            save_png(folder / images / f"{number}.png", Image.fromarray(finish(image, [*seed, 2])))


def save_png(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="module")
def bmad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bmad")
    tree(folder / "Brain", train=8, masks="label", images="img")
    tree(folder / "Liver", train=8, masks="anomaly_mask", images="")
    (folder / "notes").mkdir()
    generator = torch.Generator().manual_seed(3)
    state = create(Backbone(TIMM, 16, dict(SMALL)), 224).state_dict()
    save_file({name: 0.2 * torch.randn(t.shape, generator=generator) for name, t in state.items()},
              folder / "vit.safetensors")  # fmt: skip
    for name, score, kind in (("brain", "[16, 32, 56]", "resize"), ("liver", "[8, 16]", "liver")):
        text = TOML.replace("SCORE", score).replace("KIND", kind)
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return folder


def reproduce(
    data: Path, out: Path, *arguments: object, weights: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it on `data`, which is the fixture's folder or a root in it; `weights` where the fixture's files are."""
    bmad = weights or (data if (data / "brain.toml").exists() else data.parent)
    file = bmad / "vit.safetensors"
    return run(
        *("python", "-m", "benchmarks.reproduce", "--data", data, "--out", out, "--device", "cpu"),
        *("--config", f"BraTS2021={bmad / 'brain.toml'}", "--config", f"LiverCT={bmad / 'liver.toml'}"),
        *("--backbone-weights", f"{TIMM}={file}", "--perceptual-weights", file),
        *arguments,
        cwd=ROOT,
        home=out,
    )


def cells(printed: str, first: str) -> list[str]:
    """The cells of a table's row whose first cell begins so."""
    [line] = [line for line in printed.splitlines() if line.strip().startswith(first)]
    return re.split(r"\s{2,}", line.strip())[1:]


def stored(out: Path) -> list[dict[str, Any]]:
    content = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert content["failures"] == []
    results: list[dict[str, Any]] = content["results"]
    return results


PERCENT = r"\d+\.\d( ± \d+\.\d\d)?"


@pytest.fixture(scope="module")
def trained(bmad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with two seeds leaves."""
    out = tmp_path_factory.mktemp("reproduce")
    done = reproduce(bmad, out, "--seeds", "42,7")
    assert done.returncode == 0, done.stderr
    (out / "printed.txt").write_text(done.stdout, encoding="utf-8")
    return out


def test_it_trains_evaluates_both_ways_and_prints_the_tables(trained: Path, bmad: Path, tmp_path: Path) -> None:
    printed = (trained / "printed.txt").read_text(encoding="utf-8")
    for method, values in TABLE_7.items():
        first = f"{method} (published)" if method == OURS else method
        assert cells(printed, f"{first}  ") == [shown(value) for value in values]
    for where in ("PyTorch", "engine"):
        brain, liver, resc, rsna = cells(printed, f"{OURS}, here, {where}")
        assert re.fullmatch(PERCENT, brain)
        assert re.fullmatch(PERCENT, liver)
        assert "±" in brain
        assert (resc, rsna) == ("-", "-")
    for version, value in TABLE_3.items():
        published, in_torch, engine = cells(printed, version)
        assert published == shown(value)
        assert re.fullmatch(PERCENT, in_torch)
        assert in_torch == engine

    results = stored(trained)
    assert [(one["data_set"], one["step"]) for one in results] == [
        ("BraTS2021", "preset"),
        *(("LiverCT", step) for step in LIVER_STEPS),
    ]
    for one in results:
        assert one["largest_score_error"] < 1e-4
        assert len(one["torch"]) == len(one["engine"]) == 2
        for in_torch, engine in zip(one["torch"], one["engine"], strict=True):
            assert in_torch["counts"] == engine["counts"]
            assert in_torch["counts"]["good"] == in_torch["counts"]["ungood"] == 3
            assert in_torch["image_auroc"] == pytest.approx(engine["image_auroc"], abs=1e-9)
            assert in_torch["pixel_auroc"] == pytest.approx(engine["pixel_auroc"], abs=1e-3)
            assert engine["intervals_95"]["image_auroc"]
    # The two last steps are one model, scored otherwise.
    last = [load_checkpoint(trained / "LiverCT" / step / "liver.seed7.pt") for step in ("preprocessing", "preset")]
    assert all(torch.equal(tensor, last[1].trained[name]) for name, tensor in last[0].trained.items())
    assert [one.config.score.patch_sizes for one in last] == [(16, 32, 56), (8, 16)]

    given = trained / "LiverCT/liver.seed42.pt"
    again = reproduce(bmad, tmp_path / "again", "--ckpt", f"LiverCT={given}", "--ckpt",
                      f"BraTS2021={trained / 'BraTS2021/resize.seed7.pt'}")  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "LiverCT, main: not measured, no checkpoint was trained with this preprocessing" in again.stdout
    taken = stored(tmp_path / "again")
    assert taken[3]["torch"][0]["image_auroc"] == results[3]["torch"][0]["image_auroc"]


def test_a_model_of_another_configuration_is_not_taken_for_this_ones(trained: Path, bmad: Path, tmp_path: Path) -> None:
    """Nor is one trained without the preprocessing shown as trained with it."""
    text = (bmad / "brain.toml").read_text(encoding="utf-8")
    (tmp_path / "deeper.toml").write_text(text.replace("depth = 1\n", "depth = 2\n"), encoding="utf-8")
    done = reproduce(bmad / "Brain", trained, "--config", f"BraTS2021={tmp_path / 'deeper.toml'}", "--seeds", "7")
    assert done.returncode == 1
    assert "it was trained with another configuration (model.decoder.depth: 1 -> 2)" in done.stderr
    assert "Table 7" in done.stdout

    given = trained / "LiverCT/resize.seed7.pt"
    done = reproduce(bmad / "Liver", tmp_path / "given", "--ckpt", f"LiverCT={given}")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(PERCENT, cells(done.stdout, "Main Config")[1])
    assert [cells(done.stdout, version)[1:] for version in list(TABLE_3)[1:]] == [["-", "-"], ["-", "-"]]


def test_missing_splits_are_found_before_anything_is_trained(bmad: Path, tmp_path: Path) -> None:
    shutil.copytree(bmad / "Brain", tmp_path / "Brain")
    shutil.copytree(bmad / "Liver/test", tmp_path / "Liver/test")
    done = reproduce(tmp_path, tmp_path / "out", weights=bmad)
    assert done.returncode == 1
    assert f"--data: {tmp_path / 'Liver'}: no train/, valid/; LiverCT needs it" in done.stderr
    assert not (tmp_path / "out").exists()


def test_liver_goes_through_the_steps_of_table_3() -> None:
    steps = steps_of(BENCHMARKS["LiverCT"], load("liver"))
    seen = [(one.name, one.config.preprocess.kind, one.config.score.patch_sizes) for one in steps]
    assert seen == [
        ("main", "resize", (16, 32, 56)),
        ("preprocessing", "liver", (16, 32, 56)),
        ("preset", "liver", (8, 16)),
    ]
    assert [one.config for one in steps_of(BENCHMARKS["RSNA"], load("rsna"))] == [load("rsna")]


def test_the_published_tables_are_whole() -> None:
    assert len(TABLE_7) == 17
    assert list(TABLE_7)[-1] == OURS
    for name, value in zip(DATA_SETS, TABLE_7[OURS], strict=True):
        assert BENCHMARKS[name].image_auroc == value
    best = [max((row[column] or (0,))[0] for row in TABLE_7.values()) for column in range(4)]
    assert best == [94.3, 69.2, 91.8, 83.8]  # bold in the supplement
    assert sum(value is None for row in TABLE_7.values() for value in row) == 1
    # Sums over the table, taken off the supplement by a second reading.
    assert sum((value or (0,))[0] for row in TABLE_7.values() for value in row) == pytest.approx(4972.4, abs=0.05)


def test_roots_are_found_at_and_below_the_folder(bmad: Path, tmp_path: Path) -> None:
    assert find_roots(bmad) == {"BraTS2021": bmad / "Brain", "LiverCT": bmad / "Liver"}
    assert find_roots(bmad / "Brain") == {"BraTS2021": bmad / "Brain"}
    with pytest.raises(UsageError, match=r"no BMAD data set in it; a root is called one of .*brain"):
        find_roots(tmp_path)
    with pytest.raises(UsageError, match="no such folder; name the one that holds the BMAD data sets"):
        find_roots(tmp_path / "none")


def test_faults_are_told_at_once(bmad: Path, tmp_path: Path) -> None:
    done = reproduce(bmad, tmp_path, "--ckpt", "Heart=x.pt", "--ckpt", "RSNA=nowhere.pt")
    assert done.returncode == 1
    for text in ("'Heart=x.pt'", "'RSNA=nowhere.pt'"):
        assert f"--ckpt: got {text}, expected NAME=FILE, NAME one of BraTS2021, LiverCT, RESC, RSNA, FILE there" in (
            done.stderr
        )
