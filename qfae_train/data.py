"""Data sets in the BMAD folder layout, preprocessed once and held in memory as 8-bit pixels.

train/good[/img]/*.png      normal images only
valid|val|test/{good,Ungood}[/img]/*.png, masks in label/ or anomaly_mask/
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from qfae_runtime.arrays import UInt8
from qfae_runtime.errors import InputError, QfaeError
from qfae_runtime.geometry import Geometry
from qfae_runtime.layout import GOOD, UNGOOD, Scan, label_of, mask_path_for, scan
from qfae_runtime.preprocess import PreprocessSpec, preprocess
from qfae_runtime.readers.image import read_image, read_mask
from qfae_train.augment import Augmentation

SPLITS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}
"""Folder names each split is found under, best first."""

SHOWN_FAULTS = 8
"""Damaged files named in one message."""


class DataError(QfaeError):
    """A data set does not follow the layout."""


@dataclass(frozen=True)
class Split:
    """Preprocessed images of one split, with their labels."""

    images: Tensor
    """uint8 (N, S, S, 3), or (N, S, S, 1) when every image is grey."""
    anomalous: Tensor
    """bool (N,)."""
    masks: Tensor
    """uint8 (N, S, S), 1 where anomalous; all zero for normal images and for anomalous ones without a mask."""
    has_truth: Tensor
    """bool (N,): the mask says where the image is anomalous. Not so for an anomalous image without a mask."""

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def sha256(self) -> str:
        """The digest of the preprocessed images, in their order."""
        return hashlib.sha256(self.images.contiguous().numpy().data).hexdigest()

    def rgb(self, index: Tensor | slice) -> Tensor:
        """Return uint8 (B, S, S, 3)."""
        return self.images[index].expand(-1, -1, -1, 3)


def split_folder(root: Path, split: str) -> Path | None:
    """Return the folder of a split, or None if the data set has none."""
    return next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)


def load_split(root: Path, split: str, spec: PreprocessSpec, *, threads: int = 2, quiet: bool = False) -> Split:
    """Read and preprocess one split of the data set at `root`.

    Raises:
        DataError: the split is missing or empty, an image lies outside good/ and Ungood/, training images
            are not all normal, or a mask has another size than its image.
        InputError: one file cannot be read. Several faults of files come as one DataError that names them.

    """
    folder = split_folder(root, split)
    if folder is None:
        names = " or ".join(f"{name}/" for name in SPLITS[split])
        raise DataError(f"data '{root}': no folder {names}; expected the BMAD layout (train/good, valid, test)")
    found = scan([folder])
    if not found.images:
        raise DataError(f"data '{folder}': holds no images; expected them in {GOOD}/ or {GOOD}/img/")
    labels = [label_of(path, found.root) for path in found.images]
    _check_labels(folder, split, found, labels)
    return _read(found.images, labels, spec, f"reading {split}", threads, quiet)


def _check_labels(folder: Path, split: str, found: Scan, labels: list[str | None]) -> None:
    outside = [found.source_of(path) for path, label in zip(found.images, labels, strict=True) if label is None]
    if outside:
        raise DataError(
            f"data '{folder}': images outside {GOOD}/ and {UNGOOD}/: {len(outside)}, the first is '{outside[0]}'; "
            "move them into the folder that says what they are"
        )
    if split == "train" and UNGOOD in labels:
        raise DataError(
            f"data '{folder}': images in {UNGOOD}/: {labels.count(UNGOOD)}; training takes normal images only, "
            "move them to valid/ or test/"
        )


def _read(
    paths: list[Path], labels: list[str | None], spec: PreprocessSpec, title: str, threads: int, quiet: bool
) -> Split:
    size = spec.image_size
    images = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    masks = np.zeros((len(paths), size, size), dtype=np.uint8)
    has_truth = np.ones(len(paths), dtype=np.bool_)

    def read(number: int) -> QfaeError | None:
        """Read one image; what is wrong is returned, so that all of them can be told at once."""
        try:
            fill(number)
        except (DataError, InputError) as error:
            return error
        return None

    def fill(number: int) -> None:
        prepared = preprocess(read_image(paths[number]).pixels, spec)
        images[number] = prepared.image
        if labels[number] == UNGOOD:
            mask = _mask(paths[number], prepared.geometry)
            has_truth[number] = mask is not None
            masks[number] = 0 if mask is None else mask

    console = Console(stderr=True)
    quiet = quiet or not console.is_terminal
    with ThreadPoolExecutor(threads) as pool:
        done = pool.map(read, range(len(paths)))
        faults = [
            fault
            for fault in track(done, title, len(paths), console=console, disable=quiet, transient=True)
            if fault is not None
        ]
    _raise_all(faults)
    if (images == images[..., :1]).all():  # grey: a third of the memory
        images = np.ascontiguousarray(images[..., :1])
    anomalous = torch.tensor([label == UNGOOD for label in labels])
    return Split(torch.from_numpy(images), anomalous, torch.from_numpy(masks), torch.from_numpy(has_truth))


def _raise_all(faults: list[QfaeError]) -> None:
    """Raise what is wrong with the files of a split: a single fault as it is, several as one."""
    if len(faults) == 1:
        raise faults[0]
    if faults:
        told = "; ".join(str(fault).removeprefix("data ") for fault in faults[:SHOWN_FAULTS])
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise DataError(f"data: {len(faults)} files cannot be used, replace or remove them: {told}{more}")


def _mask(image: Path, geometry: Geometry) -> UInt8 | None:
    """Return the mask beside an image, uint8 (S, S) of 0 and 1, or None where there is none."""
    path = mask_path_for(image)
    if path is None:
        return None
    mask = read_mask(path)
    if mask.shape != (geometry.height, geometry.width):
        raise DataError(
            f"data '{path}': the mask has {mask.shape[1]} x {mask.shape[0]} pixels, "
            f"its image {geometry.width} x {geometry.height}; both must be of one size"
        )
    return geometry.warp_mask(mask)


class TrainingImages(Dataset[tuple[Tensor, int]]):
    """Training images, augmented: uint8 (S, S, 3) and the image's number."""

    def __init__(self, split: Split, augmentation: Augmentation | None) -> None:
        self.split = split
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        """Return one image, uint8 (S, S, 3), and its number."""
        image = self.split.images[number].expand(-1, -1, 3)
        return (self.augmentation(image) if self.augmentation else image), number
