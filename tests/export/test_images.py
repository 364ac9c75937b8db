"""Where the images to measure on come from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qfae_export.errors import ExportError
from qfae_export.images import from_checkpoint, from_folder, from_slices, largest_batch, spread
from qfae_runtime.preprocess import PreprocessSpec, preprocess
from qfae_runtime.readers.image import read_image
from tests.export.tiny import picture_folder, pictures

SPEC = PreprocessSpec(image_size=32)


def test_folder_images_are_preprocessed_as_for_scoring(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "test" / "good", 5)
    images = from_folder(folder, SPEC, limit=32)
    assert images.names == ("00.png", "01.png", "02.png", "03.png", "04.png")
    assert images.origin == "5 of the 5 images in good/"
    np.testing.assert_array_equal(images.pixels[3], preprocess(read_image(folder / "03.png").pixels, SPEC).image)


def test_masks_are_no_images_and_a_large_folder_is_sampled_evenly(tmp_path: Path) -> None:
    root = tmp_path / "test"
    picture_folder(root / "good" / "img", 10)
    picture_folder(root / "Ungood" / "img", 10)
    picture_folder(root / "Ungood" / "label", 10)
    images = from_folder(root, SPEC, limit=4)
    assert images.names == ("Ungood/img/00.png", "Ungood/img/06.png", "good/img/03.png", "good/img/09.png")
    assert images.origin == "4 of the 20 images in test/"


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
    with pytest.raises(ExportError, match=r"copies/: 2 different images, but a measurement needs 3 at least; pass"):
        from_folder(folder, SPEC, limit=32)


def test_stored_images_and_their_copies() -> None:
    stored = pictures(6)
    stored[4] = stored[1]
    images = from_checkpoint(stored, 32, "demo.pt")
    assert len(images) == 5
    assert images.names[4] == "image 5 stored in demo.pt"


def test_slices_stand_in_where_there_are_no_images() -> None:
    slices = from_slices(SPEC)
    assert len(slices) == 32
    assert slices.pixels.shape == (32, 32, 32, 3)
    assert slices.stands_in
    assert (slices.origin, slices.names[5]) == ("32 brain slices that come with qfae", "brain slice 5 of qfae")
    assert len({image.tobytes() for image in slices.pixels}) == 32
    assert not from_checkpoint(pictures(3), 32, "demo.pt").stands_in


def test_checkpoint_with_wrong_images() -> None:
    with pytest.raises(ExportError, match=r"expected uint8 \(N, 64, 64, 3\), got uint8 \(3, 32, 32, 3\); pass"):
        from_checkpoint(pictures(3), 64, "demo.pt")


def test_largest_batch_never_exceeds_the_images() -> None:
    images = from_checkpoint(pictures(9), 32, "demo.pt")
    assert largest_batch(None, 32, images) == 9
    assert largest_batch(None, 4, images) == 4
    assert largest_batch(9, 32, images) == 9
    with pytest.raises(ExportError) as error:
        largest_batch(10, 32, images)
    assert str(error.value) == (
        "--max-batch 10: the largest batch is measured with 10 different images, but there are 9 "
        "(validation images stored in demo.pt); pass --parity-images DIR with 10 or more, or --max-batch 9"
    )


def test_spread() -> None:
    assert spread(3, 16) == [0, 1, 2]
    assert spread(100, 5) == [0, 25, 50, 74, 99]
    assert spread(7, 1) == [0]
    assert all(len(spread(count, 16)) == 16 for count in range(16, 300))
