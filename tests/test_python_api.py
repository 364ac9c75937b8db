"""The examples of docs/python-api.md run as they stand there, and print the scores that qfae-run writes."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qfae_runtime
from qfae_runtime import InputError, open_engine, preprocess, read_image
from tests.commands import ROOT, run
from tests.runtime.tiny import export_tiny

PAGE = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
COUNT = 37  # two full batches and a part


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine and scans, and the scores that qfae-run writes for them, in results/."""
    root = tmp_path_factory.mktemp("api")
    export_tiny(root, "brats")
    (root / "scans").mkdir()
    rng = np.random.default_rng(5)
    for number in range(COUNT):
        pixels = rng.integers(0, 256, (40 + number % 3, 48), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "scans" / f"{number:02}.png")
    done = run("qfae-run", "scans", "--engine", "brats.onnx", "--out", "results", "--no-maps", cwd=root)
    assert done.returncode == 0, done.stderr
    return root


def written(folder: Path) -> dict[str, float]:
    with (folder / "results" / "scores.csv").open(encoding="utf-8", newline="") as file:
        return {row["source"]: float(row["score"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize("number", [0, 1])
def test_an_example_gives_the_scores_of_the_program(folder: Path, tmp_path: Path, number: int) -> None:
    shutil.copytree(folder, tmp_path / "here")
    damaged = number == 0  # that example goes on; the other hands a damaged file's error to whoever asked
    if damaged:
        (tmp_path / "here/scans/99.png").write_bytes(b"no image")
    (tmp_path / "here/example.py").write_text(EXAMPLES[number], encoding="utf-8")
    done = run("python", "example.py", cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    printed = {name: float(score) for name, score in re.findall(r"^(\d+\.png): ([\d.]+)(?:,|$)", done.stdout, re.M)}
    assert printed == pytest.approx(written(folder), abs=6e-5)
    assert len(printed) == COUNT
    assert ("99.png: " in done.stdout) is damaged
    assert not done.stderr


def test_there_are_two_examples_and_every_name_in_the_table_is_public() -> None:
    assert len(EXAMPLES) == 2
    names = re.findall(r"^\| `(\w+)", PAGE, flags=re.MULTILINE)
    assert len(names) == 6
    assert set(names) <= set(qfae_runtime.__all__)
    assert [name for name in qfae_runtime.__all__ if not hasattr(qfae_runtime, name)] == []


def test_the_place_that_is_printed_is_the_maps_largest(folder: Path) -> None:
    path = folder / "scans" / "01.png"
    with open_engine(folder / "brats.onnx") as opened:
        prepared = preprocess(read_image(path).pixels, opened.manifest.preprocess)
        scores = opened.engine.run(prepared.image[None])
    assert prepared.geometry.map_back(scores.anomaly_map[0]).shape == (41, 48)
    with pytest.raises(InputError, match=r"scans/77\.png: "):
        read_image(folder / "scans" / "77.png")
