"""NIfTI: orientation, slices, windows, and what is refused. Volumes are made here, header bytes and all."""

from __future__ import annotations

import builtins
import gzip
import itertools
import struct
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from qfae_runtime.errors import InputError, UsageError
from qfae_runtime.readers import ReadOptions, Slice, base, nifti, read_slices

# A body that is bright at the patient's right, at the front and at the head: values by canonical place (R, A, S).
RIGHT, FRONT, HEAD = 50, 30, 20
CANONICAL = np.fromfunction(lambda i, j, k: (i == 4) * RIGHT + (j == 3) * FRONT + (k == 2) * HEAD, (5, 4, 3))


def save(path: Path, values: Any, affine: Any = None, **header: Any) -> Path:
    image = nibabel.Nifti1Image(np.asarray(values), np.eye(4) if affine is None else affine)
    image.header.set_slope_inter(header.get("slope"), header.get("inter"))
    content = image.to_bytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(path: Path, options: ReadOptions | None = None) -> list[Slice]:
    return list(read_slices(path, "a/b", options))


def reason_for(path: Path, options: ReadOptions | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read(path, options)
    return caught.value.reason


@pytest.mark.parametrize("signs", list(itertools.product([1, -1], repeat=3)))
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_orientation_gives_the_same_upright_pictures(
    tmp_path: Path, order: tuple[int, int, int], signs: tuple[int, int, int]
) -> None:
    """The same body stored in each of the 48 ways: the patient's right is on the left of the picture, or the front."""
    stored = np.transpose(CANONICAL, order)[tuple(slice(None, None, signs[axis]) for axis in order)]
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for column, axis in enumerate(order):
        affine[axis, column] = signs[axis] * 2.0
    path = save(tmp_path / "x.nii", stored.astype(np.uint8), affine)
    axial = read(path)
    assert [piece.frame for piece in axial] == [0, 1, 2]
    for k, piece in enumerate(axial):
        expected = np.array([[CANONICAL[4 - x, 3 - y, k] for x in range(5)] for y in range(4)])
        np.testing.assert_array_equal(piece.pixels[:, :, 0], expected)
    assert axial[0].pixels[0, 0, 0] == RIGHT + FRONT  # top left
    assert axial[0].pixels[3, 4, 0] == 0
    coronal = read(path, ReadOptions(axis="coronal"))
    assert len(coronal) == 4
    assert coronal[0].pixels.shape == (3, 5, 3)
    assert coronal[0].pixels[0, 0, 0] == RIGHT + HEAD
    assert coronal[0].pixels[2, 4, 0] == 0
    sagittal = read(path, ReadOptions(axis="sagittal"))
    assert len(sagittal) == 5
    assert sagittal[0].pixels[0, 0, 0] == FRONT + HEAD
    assert sagittal[0].pixels[2, 3, 0] == 0


def test_one_range_for_the_whole_volume(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(100, 30, (6, 7, 8)).astype(np.float32)
    values[0, 0, 0], values[1, 1, 1] = np.nan, np.inf
    low, high = np.percentile(values[np.isfinite(values)], (0.5, 99.5))
    pieces = read(save(tmp_path / "x.nii.gz", values))
    for k, piece in enumerate(pieces):
        with np.errstate(invalid="ignore"):
            share = (values[::-1, ::-1, k].T.astype(float) - low) / (high - low)
            expected = np.nan_to_num(np.floor(np.clip(share, 0, 1) * 255 + 0.5), nan=0.0)
        np.testing.assert_array_equal(piece.pixels[:, :, 0], expected)
        assert piece.applied == f"axial; range {low:.6g}..{high:.6g} (percentiles 0.5 and 99.5 of the volume)"


@pytest.mark.parametrize("slope", [2.0, -2.0])
def test_scaling_comes_before_the_window(tmp_path: Path, slope: float) -> None:
    values = np.random.default_rng(0).integers(-300, 300, (4, 5, 2)).astype(np.int16)
    path = save(tmp_path / "x.nii", values, slope=slope, inter=10.0)
    [first, _] = read(path, ReadOptions(window=(40.0, 400.0)))
    scaled = values[::-1, ::-1, 0].T * slope + 10
    expected = np.floor(np.clip((scaled - 39.5) / 399 + 0.5, 0, 1) * 255 + 0.5)
    np.testing.assert_array_equal(first.pixels[:, :, 0], expected)
    assert first.applied == f"axial; rescaled {slope:g},10; window 40,400 (asked for)"
    [first, _] = read(path)
    low, high = np.percentile(values * slope + 10, (0.5, 99.5))
    expected = np.floor(np.clip((scaled - low) / (high - low), 0, 1) * 255 + 0.5)
    assert np.abs(first.pixels[:, :, 0] - expected).max() <= 1


def test_unsigned_bytes_and_colours_are_drawn_as_they_are(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(20, 90, (4, 5, 2), dtype=np.uint8)
    [first, _] = read(save(tmp_path / "x.nii", values))
    np.testing.assert_array_equal(first.pixels[:, :, 0], values[::-1, ::-1, 0].T)
    assert first.applied == "axial"
    colours = np.zeros((4, 5, 2), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    colours["R"], colours["B"] = values, 7
    [first, _] = read(save(tmp_path / "y.nii", colours))
    np.testing.assert_array_equal(first.pixels[:, :, 0], values[::-1, ::-1, 0].T)
    assert first.pixels[0, 0].tolist()[1:] == [0, 7]


def test_a_range_of_slices(tmp_path: Path) -> None:
    path = save(tmp_path / "x.nii", CANONICAL.astype(np.uint8))
    assert [piece.frame for piece in read(path, ReadOptions(slices=(1, 3)))] == [1, 2]
    assert [piece.frame for piece in read(path, ReadOptions(axis="sagittal", slices=(3, None)))] == [3, 4]
    assert reason_for(path, ReadOptions(slices=(3, 9))) == (
        "has 3 axial slices, from 0, and the asked range of slices holds none of them"
    )


def test_a_volume_of_one_value_and_one_of_nearly_one(tmp_path: Path) -> None:
    flat = np.full((30, 30, 3), 7, np.int16)
    assert read(save(tmp_path / "x.nii", flat))[0].pixels.max() == 0
    flat[3, 3, 0] = 107
    piece = read(save(tmp_path / "y.nii", flat))[0]
    assert (piece.pixels.min(), piece.pixels.max()) == (0, 255)
    assert piece.applied == "axial; range 7..107 (least and largest of the volume)"


def test_recognised_by_content_and_read_alike_packed_or_not(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 3000, (6, 5, 4)).astype(np.int16)
    plain = read(save(tmp_path / "x.nii", values))
    (tmp_path / "y.dat").write_bytes(gzip.compress((tmp_path / "x.nii").read_bytes()))
    two = nibabel.Nifti2Image(values, np.eye(4))
    (tmp_path / "z").write_bytes(two.to_bytes())
    big = nibabel.Nifti1Image(values, np.eye(4), nibabel.Nifti1Header(endianness=">"))
    (tmp_path / "b").write_bytes(big.to_bytes())
    for name in ("y.dat", "z", "b"):
        for one, other in zip(plain, read(tmp_path / name), strict=True):
            np.testing.assert_array_equal(one.pixels, other.pixels)


def test_what_is_refused(tmp_path: Path) -> None:
    four = save(tmp_path / "x.nii", np.zeros((4, 5, 6, 7), np.int16))
    assert reason_for(four) == (
        "a 4-D NIfTI of shape 4 x 5 x 6 x 7, expected 3-D; "
        "split it into single volumes (nibabel's four_to_three, or fslsplit)"
    )
    assert len(read(save(tmp_path / "y.nii", np.zeros((4, 5, 6, 1), np.int16)))) == 6
    assert reason_for(save(tmp_path / "c.nii", np.zeros((4, 5, 6), np.complex64))) == (
        "voxels of type complex64 are not read; convert the volume to numbers"
    )
    whole = save(tmp_path / "w.nii", CANONICAL.astype(np.int16)).read_bytes()
    (tmp_path / "cut.nii").write_bytes(whole[:-20])
    assert reason_for(tmp_path / "cut.nii") == (
        "damaged or truncated NIfTI volume (100 of 120 bytes of voxels are there)"
    )
    noise = save(tmp_path / "n.nii.gz", np.random.default_rng(0).normal(size=(9, 9, 9)).astype(np.float32)).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(noise[:-300])
    assert reason_for(tmp_path / "cut.nii.gz").startswith("damaged or truncated gzip file (")
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"hello" * 99))
    assert reason_for(tmp_path / "text.gz") == "a gzip file, and what is in it is not a NIfTI volume; unpack it"
    twisted = bytearray(whole)
    twisted[280:328] = bytes(48)  # the rows of the affine
    (tmp_path / "t.nii").write_bytes(twisted)
    assert reason_for(tmp_path / "t.nii") == (
        "damaged NIfTI volume (its orientation is not one: the affine is singular)"
    )


def test_a_bomb_is_never_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that asks for 54 TB; and a small volume with 200 MB of zeros behind it, which are left packed."""
    whole = bytearray(save(tmp_path / "w.nii", CANONICAL.astype(np.int16)).read_bytes())
    struct.pack_into("<4h", whole, 40, 3, 30000, 30000, 30000)
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(whole))
    assert reason_for(tmp_path / "x.nii.gz").startswith("too large: got 30000 x 30000 pixels")
    struct.pack_into("<4h", whole, 40, 3, 5000, 5000, 5000)
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(whole))
    assert reason_for(tmp_path / "x.nii.gz") == (
        "too large: a volume of 250,000,000,000 bytes, the limit is 1,073,741,824"
    )
    taken: list[int] = []
    genuine = gzip.GzipFile.read

    def counting(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        content = genuine(self, size)
        taken.append(len(content))
        return content

    monkeypatch.setattr(gzip.GzipFile, "read", counting)
    (tmp_path / "y.nii.gz").write_bytes(gzip.compress((tmp_path / "w.nii").read_bytes() + bytes(200 * 2**20), 1))
    assert len(read(tmp_path / "y.nii.gz")) == 3
    assert sum(taken) < 2**20


def test_limits_of_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x.nii", CANONICAL.astype(np.int16))
    monkeypatch.setattr(base, "MAX_VOLUME_BYTES", 119)
    assert reason_for(path) == "too large: a volume of 120 bytes, the limit is 119"
    monkeypatch.undo()
    monkeypatch.setattr(base, "MAX_FRAMES", 2)
    assert reason_for(path) == "too large: 3 pictures in one file, the limit is 2"


def test_a_missing_extra_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "nibabel":
            raise ModuleNotFoundError("No module named 'nibabel'", name="nibabel")
        return genuine(name, *arguments, **more)

    path = save(tmp_path / "x.nii", CANONICAL.astype(np.int16))
    nifti._nibabel.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    reason = reason_for(path)
    monkeypatch.undo()
    assert reason == "NIfTI files need nibabel; install it with: pip install 'qfae[medical]'"


def test_impossible_options_are_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        ReadOptions(window=(40.0, 0.0), axis="upright", slices=(5, 5))
    assert caught.value.faults == [
        "window: got (40.0, 0.0), expected (center, width) with a width of 1 or more",
        "axis: got 'upright', accepted are sagittal, coronal, axial",
        "slices: got (5, 5), expected (from, to) with 0 <= from < to",
    ]


def test_values_at_the_ends_of_what_a_number_holds(tmp_path: Path) -> None:
    """numpy would print a warning of the overflow, among the progress of a run."""
    values = np.array([[[-1.7e308, 0.0], [1e300, 1.7e308]]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pieces = read(save(tmp_path / "x.nii", values, slope=4.0, inter=1.0))
    assert [piece.pixels.shape for piece in pieces] == [(2, 1, 3)] * 2
