"""The demo's folders: BMAD layout, splits that share nothing, the same bytes every time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from demo import dataset
from demo.baseline import baseline_auroc
from demo.dataset import COUNTS, items, write, write_item
from qfae_runtime.layout import label_of, mask_path_for, scan

FEW = {("train", "good"): 3, ("valid", "good"): 2, ("valid", "Ungood"): 2, ("test", "good"): 2, ("test", "Ungood"): 2}


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("few")
    write(items(root, 0, ["train", "valid", "test"], FEW))
    return root


def test_the_full_data_set_has_200_test_slices_half_of_them_with_lesions() -> None:
    assert COUNTS["test", "good"] == COUNTS["test", "Ungood"] == 100
    assert COUNTS["valid", "good"] == COUNTS["valid", "Ungood"]
    assert ("train", "Ungood") not in COUNTS


def test_the_runtime_finds_images_labels_and_masks(few: Path) -> None:
    found = scan([few / "test"])
    labels = [label_of(path, found.root) for path in found.images]

    assert labels.count("good") == labels.count("Ungood") == 2
    for path, label in zip(found.images, labels, strict=True):
        mask = mask_path_for(path)
        assert (mask is not None) == (label == "Ungood")
        if mask is not None:
            assert Image.open(mask).size == Image.open(path).size == (240, 240)
            assert set(np.unique(np.asarray(Image.open(mask)))) == {0, 255}


def test_any_part_is_made_byte_identical_without_the_rest(few: Path, tmp_path: Path) -> None:
    write(items(tmp_path, 0, ["test"], FEW), processes=1)

    assert digests(tmp_path) == {name: value for name, value in digests(few).items() if name.startswith("test/")}


def test_no_two_slices_share_a_random_stream(few: Path) -> None:
    work = items(few, 0, ["train", "valid", "test"]) + items(few, 1, ["train", "valid", "test"])
    streams = [tuple(item.stream(purpose)) for item in work for purpose in (0, 1, 2)]

    assert len(set(streams)) == len(streams)
    assert len(set(digests(few).values())) == len(digests(few))


def test_another_data_seed_gives_other_slices(few: Path, tmp_path: Path) -> None:
    other = items(tmp_path, 1, ["test"], FEW)[0]
    write_item(other)

    made = tmp_path / "test/good/img/0000.png"
    assert made.read_bytes() != (few / "test/good/img/0000.png").read_bytes()


def test_the_trivial_baseline_stays_below_070(tmp_path: Path) -> None:
    """On 2 x 40 slices of a seed of its own; `make demo` prints it for the 200 test slices."""
    write(items(tmp_path, 7, ["test"], {("test", "good"): 40, ("test", "Ungood"): 40}))

    assert 0.5 <= baseline_auroc(tmp_path / "test") < 0.70


def test_the_baseline_finds_what_is_brighter(tmp_path: Path) -> None:
    for label, levels in (("good", (10, 20)), ("Ungood", (200, 15))):
        for number, level in enumerate(levels):
            path = tmp_path / label / "img" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (32, 32), level).save(path)

    assert baseline_auroc(tmp_path) == 0.75  # of the four pairs, 15 against 20 alone is in the wrong order


def test_unknown_splits_are_refused_by_name(tmp_path: Path) -> None:
    result = CliRunner().invoke(dataset.main, ["--out", str(tmp_path), "--splits", "valid,tset,x"])

    assert result.exit_code == 2
    assert "tset, x; accepted are train, valid, test" in result.output
