"""Data sets: the layout's variants, labels, masks, and pixels that equal the runtime's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qfae_runtime.arrays import UInt8
from qfae_runtime.errors import InputError
from qfae_runtime.pipeline import Job, pixel_truth
from qfae_runtime.preprocess import PreprocessSpec, preprocess
from qfae_runtime.readers.image import read_image
from qfae_train.data import DataError, Split, TrainingImages, load_split

from .tiny import picture, write_png

SPEC = PreprocessSpec(image_size=32)


def load(root: Path, split: str) -> Split:
    return load_split(root, split, SPEC, quiet=True)


def refusal(root: Path, split: str) -> str:
    with pytest.raises(DataError) as caught:
        load(root, split)
    assert caught.value.exit_code == 1
    return str(caught.value)


def test_training_sees_the_pixels_that_scoring_sees(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = [(240, 240), (97, 131), (32, 32), (20, 24)]
    folder = tmp_path / "train" / "good" / "img"
    paths = [write_png(folder / f"{n}.png", picture(rng, *shape)) for n, shape in enumerate(shapes)]
    colour = rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)
    paths.append(write_png(folder / "colour.png", colour))
    split = load(tmp_path, "train")
    scored = [preprocess(read_image(path).pixels, SPEC).image for path in paths]
    assert split.images.dtype == torch.uint8
    np.testing.assert_array_equal(split.rgb(slice(None)).numpy(), np.stack(scored))
    item, number = TrainingImages(split, None)[4]
    assert number == 4
    np.testing.assert_array_equal(item.numpy(), scored[4])


def test_liver_images_and_masks_go_one_way_in_training_and_scoring(tmp_path: Path) -> None:
    spec = PreprocessSpec("liver", 32)
    rng = np.random.default_rng(0)
    folder = tmp_path / "test" / "Ungood"
    paths = []
    for number, (top, left, height, width) in enumerate([(0, 0, 20, 30), (7, 50, 60, 30), (40, 3, 24, 70)]):
        image = np.zeros((96, 80), np.uint8)
        image[top : top + height, left : left + width] = rng.integers(40, 90, (height, width))[:, : 80 - left]
        lesion = np.s_[top + height // 2 : top + height // 2 + 9, left + 9 : left + 19]
        image[lesion] = 255
        mask = np.zeros_like(image)
        mask[lesion] = 255
        paths.append(write_png(folder / "img" / f"{number}.png", image))
        write_png(folder / "label" / f"{number}.png", mask)
    split = load_split(tmp_path, "test", spec, quiet=True)
    assert split.images.shape == (3, 32, 32, 1)
    for path, pixels, truth in zip(paths, split.rgb(slice(None)).numpy(), split.masks.numpy(), strict=True):
        prepared = preprocess(read_image(path).pixels, spec)
        np.testing.assert_array_equal(pixels, prepared.image)
        scored, _ = pixel_truth(Job(path, path.name), prepared.geometry)
        np.testing.assert_array_equal(truth, scored)
        bright = pixels[..., 0] > 150
        assert (bright & (truth > 0)).sum() / (bright | (truth > 0)).sum() > 0.7


def test_grey_data_take_one_channel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [write_png(tmp_path / "train" / "good" / f"{n}.png", picture(rng)) for n in range(3)]
    split = load(tmp_path, "train")
    assert split.images.shape == (3, 32, 32, 1)
    scored = np.stack([preprocess(read_image(path).pixels, SPEC).image for path in paths])
    np.testing.assert_array_equal(split.rgb(torch.tensor([2, 0])).numpy(), scored[[2, 0]])
    np.testing.assert_array_equal(TrainingImages(split, None)[1][0].numpy(), scored[1])


def square(top: int, left: int, height: int = 40, width: int = 48) -> UInt8:
    mask = np.zeros((height, width), np.uint8)
    mask[top : top + 10, left : left + 12] = 255
    return mask


@pytest.mark.parametrize("images", ["img", ""])
@pytest.mark.parametrize("masks", ["label", "anomaly_mask"])
@pytest.mark.parametrize("folder", ["valid", "val"])
def test_variants_of_the_layout(images: str, masks: str, folder: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    root = tmp_path / folder
    write_png(root / "good" / images / "a.png", picture(rng))
    write_png(root / "Ungood" / images / "a.png", picture(rng))
    write_png(root / "Ungood" / images / "b.png", picture(rng))
    write_png(root / "Ungood" / masks / "b.png", square(20, 24))
    write_png(root / "good" / masks / "a.png", np.zeros((40, 48), np.uint8))
    split = load(tmp_path, "valid")
    assert len(split) == 3
    # In the order of the paths: Ungood/a, Ungood/b, good/a.
    assert split.anomalous.tolist() == [True, True, False]
    assert split.masks.dtype == torch.uint8
    assert [int(mask.sum()) > 0 for mask in split.masks] == [False, True, False]
    # A normal image needs no mask; an anomalous one without a mask says nothing about its pixels.
    assert split.has_truth.tolist() == [False, True, True]


def test_masks_are_zero_and_one_and_lie_on_their_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    places = [(0, 0), (20, 24), (30, 36)]
    for number, place in enumerate(places):
        mask = square(*place)
        image = np.where(mask > 0, 255, picture(rng) // 4).astype(np.uint8)
        write_png(tmp_path / "test" / "Ungood" / "img" / f"{number}.png", image)
        write_png(tmp_path / "test" / "Ungood" / "label" / f"{number}.png", mask)
    split = load(tmp_path, "test")
    assert set(split.masks.unique().tolist()) == {0, 1}
    bright = split.rgb(slice(None))[..., 0] > 160
    for mask, lesion in zip(split.masks.bool(), bright, strict=True):
        assert (mask & lesion).sum() / (mask | lesion).sum() > 0.85


def test_the_better_known_folder_wins(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_png(tmp_path / "valid" / "good" / "a.png", picture(rng))
    for name in "ab":
        write_png(tmp_path / "val" / "good" / f"{name}.png", picture(rng))
    assert len(load(tmp_path, "valid")) == 1


def test_a_relative_folder_below_one_called_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "Ungood"
    write_png(home / "data" / "train" / "good" / "a.png", picture(np.random.default_rng(0)))
    monkeypatch.chdir(home)
    assert load(Path("data"), "train").anomalous.tolist() == [False]
    write_png(home / "data" / "train" / "stray.png", picture(np.random.default_rng(0)))
    assert refusal(Path("data"), "train") == (
        "data 'data/train': images outside good/ and Ungood/: 1, the first is 'stray.png'; "
        "move them into the folder that says what they are"
    )


def test_no_such_split(tmp_path: Path) -> None:
    expected = "expected the BMAD layout (train/good, valid, test)"
    assert refusal(tmp_path, "train") == f"data '{tmp_path}': no folder train/; {expected}"
    assert refusal(tmp_path, "valid") == f"data '{tmp_path}': no folder valid/ or val/; {expected}"
    assert refusal(tmp_path / "none", "test") == f"data '{tmp_path / 'none'}': no folder test/; {expected}"


def test_empty_split(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "good" / "img"
    folder.mkdir(parents=True)
    (folder / "readme.txt").write_text("nothing here", encoding="utf-8")
    assert refusal(tmp_path, "train") == (
        f"data '{tmp_path / 'train'}': holds no images; expected them in good/ or good/img/"
    )


def test_images_without_a_label(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for place in ("good/a.png", "b.png", "maybe/c.png"):
        write_png(tmp_path / "test" / place, picture(rng))
    assert refusal(tmp_path, "test") == (
        f"data '{tmp_path / 'test'}': images outside good/ and Ungood/: 2, the first is 'b.png'; "
        "move them into the folder that says what they are"
    )


def test_anomalies_do_not_train(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_png(tmp_path / "train" / "good" / "a.png", picture(rng))
    write_png(tmp_path / "train" / "Ungood" / "b.png", picture(rng))
    assert refusal(tmp_path, "train") == (
        f"data '{tmp_path / 'train'}': images in Ungood/: 1; training takes normal images only, "
        "move them to valid/ or test/"
    )


def test_a_mask_of_another_size(tmp_path: Path) -> None:
    write_png(tmp_path / "test" / "Ungood" / "img" / "a.png", picture(np.random.default_rng(0)))
    mask = write_png(tmp_path / "test" / "Ungood" / "label" / "a.png", square(0, 0, 48, 40))
    assert refusal(tmp_path, "test") == (
        f"data '{mask}': the mask has 40 x 48 pixels, its image 48 x 40; both must be of one size"
    )


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train" / "good" / "a.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        load(tmp_path, "train")
    assert str(caught.value) == f"{path}: the file is empty (0 bytes)"


@pytest.mark.parametrize("damaged", [2, 9])
def test_all_damaged_images_are_named(damaged: int, tmp_path: Path) -> None:
    folder = tmp_path / "train" / "good"
    write_png(folder / "good.png", picture(np.random.default_rng(0)))
    paths = [folder / f"{number}.png" for number in range(damaged)]
    for path in paths:
        path.write_bytes(b"")
    told = "; ".join(f"{path}: the file is empty (0 bytes)" for path in paths[:8])
    assert refusal(tmp_path, "train") == (
        f"data: {damaged} files cannot be used, replace or remove them: {told}{'; and 1 more' if damaged > 8 else ''}"
    )


def test_damaged_images_and_masks_of_another_size_are_named_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "valid" / "Ungood"
    write_png(folder / "img" / "a.png", picture(rng))
    write_png(folder / "label" / "a.png", np.zeros((8, 8), np.uint8))
    (folder / "img" / "b.png").write_bytes(b"")
    told = refusal(tmp_path, "valid")
    assert told.startswith("data: 2 files cannot be used")
    assert f"'{folder / 'label' / 'a.png'}': the mask has 8 x 8 pixels" in told
    assert f"{folder / 'img' / 'b.png'}: the file is empty" in told
