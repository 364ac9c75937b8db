"""Where the images to measure on come from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qfae_export.errors import ExportError
from qfae_export.images import calibration, choose, from_checkpoint, from_folder, from_slices, largest_batch
from qfae_runtime.coverage import spread
from qfae_runtime.preprocess import PreprocessSpec, preprocess
from qfae_runtime.readers.image import read_image
from qfae_train.stress import stress_images
from tests.export.tiny import picture_folder, pictures

SPEC = PreprocessSpec(image_size=32)


def test_folder_images_are_preprocessed_as_for_scoring(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "test" / "good", 32)
    images = from_folder(folder, SPEC, limit=32)
    assert images.names[:3] == ("00.png", "01.png", "02.png")
    assert images.origin == "32 of the 32 images in good/"
    assert (images.added, images.stress) == (0, ())
    np.testing.assert_array_equal(images.pixels[3], preprocess(read_image(folder / "03.png").pixels, SPEC).image)


def test_masks_are_no_images_and_a_large_folder_is_sampled_evenly(tmp_path: Path) -> None:
    root = tmp_path / "test"
    picture_folder(root / "good" / "img", 30)
    picture_folder(root / "Ungood" / "img", 60)
    picture_folder(root / "Ungood" / "label", 10)
    images = from_folder(root, SPEC, limit=40)
    assert images.names[0] == "Ungood/img/00.png"
    # The 40 that are spread evenly hold copies; others take their places as long as there are too few.
    assert images.origin == f"{len(images)} of the 90 images in test/"
    assert images.labels == tuple(name.startswith("Ungood") for name in images.names)
    assert 10 < sum(map(bool, images.labels)) < len(images) - 4


def test_copies_do_not_keep_a_large_folder_from_being_measured_on(tmp_path: Path) -> None:
    """A volume's empty slices are all alike; there are enough others."""
    folder = picture_folder(tmp_path / "volume", 45)
    for number in range(0, 45, 4):
        (folder / f"{number:02}.png").write_bytes((folder / "00.png").read_bytes())
    images = from_folder(folder, SPEC, limit=32)
    assert images.real == 32
    assert images.origin == "32 of the 45 images in volume/"


def test_a_coloured_mark_on_grey_images_is_no_colour() -> None:
    grey = np.repeat(pictures(32)[..., :1], 3, axis=3)
    grey[:, 0, :4] = (200, 30, 30)
    assert from_checkpoint(grey, SPEC, "demo.pt").with_colours().added == 4


def test_every_unreadable_image_is_named(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "mixed", 4)
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "00.png").read_bytes()[:200])
    with pytest.raises(ExportError) as error:
        from_folder(folder, SPEC, limit=32)
    message = str(error.value)
    assert message.startswith("--parity-images: 3 of 7 images cannot be read: cut.png: damaged or truncated image (")
    assert "empty.png: the file is empty (0 bytes)" in message
    assert "text.png: not a PNG" in message
    assert message.endswith("remove them: a measurement leaves no image out")


def test_missing_empty_and_repetitive_folders(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such folder; name one that holds real images"):
        from_folder(tmp_path / "nowhere", SPEC, limit=32)
    with pytest.raises(ExportError, match="holds no images; name a folder of real images"):
        from_folder(tmp_path, SPEC, limit=32)
    folder = picture_folder(tmp_path / "copies", 2)
    for number in range(5):
        (folder / f"copy{number}.png").write_bytes((folder / "00.png").read_bytes())
    with pytest.raises(ExportError, match=r"copies/: 2 different images, but a measurement needs 32 at least; pass"):
        from_folder(folder, SPEC, limit=32)


def test_stored_images_and_their_copies() -> None:
    stored = pictures(33)
    stored[4] = stored[1]
    images = from_checkpoint(stored, SPEC, "demo.pt")
    assert len(images) == 32
    assert images.names[4] == "image 5 stored in demo.pt"
    assert set(images.labels) == {None}


def test_a_few_stored_images_are_joined_by_slices() -> None:
    stored = pictures(7)
    stored[6] = stored[0]
    images = from_checkpoint(stored, SPEC, "small.pt")
    assert (len(images), images.added, images.stands_in) == (32, 0, False)
    assert images.origin == "6 validation images stored in small.pt, and 26 brain slices that come with qfae"
    assert images.names[5:7] == ("image 5 stored in small.pt", "brain slice 0 of qfae")
    assert images.labels[5:9] == (None, False, True, False)
    assert from_checkpoint(stored[:0], SPEC, "small.pt").origin == "32 brain slices that come with qfae"


def test_what_is_measured_on_ends_with_stress_images(tmp_path: Path) -> None:
    stored = pictures(33)
    folder = picture_folder(tmp_path / "scans", 34)
    for images, real in (
        (choose(None, SPEC, 4, stored, "demo.pt"), 33),
        (choose(folder, SPEC, 4), 32),
        (choose(folder, SPEC, 4, count=34), 34),
        (choose(None, SPEC, 4), 32),
    ):
        assert (len(images), images.real, images.added) == (real + 14, real, 14)
        assert images.stress == tuple(range(real, real + 14))
        pixels, names = stress_images(SPEC.image_size, images.pixels[:real])
        np.testing.assert_array_equal(images.pixels[real:], pixels)
        assert images.names[real:] == names
        assert images.labels[real:] == (None,) * 14
        assert len(images.names) == len(images.labels) == len(set(images.names)) == real + 14


def test_stress_images_are_none_of_those_that_are_taken_from_somewhere(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "scans", 33)
    for images in (from_folder(folder, SPEC, 32), from_slices(SPEC), from_checkpoint(pictures(32), SPEC, "demo.pt")):
        assert (images.added, images.real, images.stress) == (0, len(images), ())
    assert not any(name.startswith("stress") for name in calibration(folder, SPEC).names)


def test_scales_are_taken_from_grey_images_and_coloured_copies(tmp_path: Path) -> None:
    slices = calibration(None, SPEC)
    assert (len(slices), slices.real, slices.added) == (36, 32, 4)
    assert slices.names[32] == "brain slice 0 of qfae in false colours"
    colourful = calibration(picture_folder(tmp_path / "scans", 33), SPEC)
    assert (len(colourful), colourful.added) == (32, 0)  # they have colours of their own


def test_grey_images_get_coloured_copies() -> None:
    grey = np.repeat(pictures(32)[..., :1], 3, axis=3)
    images = from_checkpoint(grey, SPEC, "demo.pt").with_colours()
    assert (len(images), images.real, images.added) == (36, 32, 4)
    assert images.names[-4:] == tuple(
        f"image {number} stored in demo.pt in false colours" for number in (0, 10, 21, 31)
    )
    assert images.labels[-4:] == (None,) * 4
    coloured = images.pixels[32:].astype(int)
    for one in coloured:
        orders = {one[..., list(order)].tobytes() for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 1, 0))}
        assert len(orders) == 5
    assert np.abs(coloured - grey[[0, 10, 21, 31]]).max() <= 31


def test_slices_stand_in_where_there_are_no_images() -> None:
    slices = from_slices(SPEC)
    assert (len(slices), slices.real) == (32, 32)
    assert slices.pixels.shape == (32, 32, 32, 3)
    assert slices.stands_in
    assert (slices.origin, slices.names[5]) == ("32 brain slices that come with qfae", "brain slice 5 of qfae")
    assert slices.labels[:4] == (False, True, False, True)  # every second one has a lesion
    assert len({image.tobytes() for image in slices.pixels}) == 32
    assert not from_checkpoint(pictures(32), SPEC, "demo.pt").stands_in


def test_checkpoint_with_wrong_images() -> None:
    with pytest.raises(ExportError, match=r"expected uint8 \(N, 64, 64, 3\), got uint8 \(3, 32, 32, 3\); pass"):
        from_checkpoint(pictures(3), PreprocessSpec(image_size=64), "demo.pt")


def test_largest_batch_never_exceeds_the_images() -> None:
    images = from_checkpoint(pictures(33), SPEC, "demo.pt")
    assert largest_batch(None, 64, images) == 33
    assert largest_batch(None, 4, images) == 4
    assert largest_batch(33, 32, images) == 33
    with pytest.raises(ExportError) as error:
        largest_batch(34, 32, images)
    assert str(error.value) == (
        "--max-batch 34: the largest batch is measured with 34 different images, but there are 33 "
        "(validation images stored in demo.pt); pass --parity-images DIR with 34 or more, or --max-batch 33"
    )


def test_spread() -> None:
    assert spread(3, 16) == [0, 1, 2]
    assert spread(100, 5) == [0, 25, 50, 74, 99]
    assert spread(7, 1) == [0]
    assert all(len(spread(count, 16)) == 16 for count in range(16, 300))
