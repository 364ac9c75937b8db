"""The images an engine is measured on: real ones, from the checkpoint or from a folder, and stress images.

Medical images are mostly grey and score within a narrow range; what an engine does to others, stress images ask
(stress.py). INT8's scales are taken from real ones and a few copies in false colours.

Letters: N images, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qfae_export.errors import ExportError
from qfae_runtime.arrays import UInt8
from qfae_runtime.contract import MIN_IMAGES
from qfae_runtime.coverage import spread
from qfae_runtime.errors import InputError
from qfae_runtime.layout import UNGOOD, label_of, scan
from qfae_runtime.preprocess import PreprocessSpec, preprocess
from qfae_runtime.readers.image import read_image
from qfae_train.stress import stress_images

FOLDER_LIMIT = 32
"""Images taken from a folder (or as many as the largest batch, if that is more): enough to measure on in minutes."""

COLOURED = 4
"""Copies in false colours for INT8's scales, where all images are grey."""

# How much of the grey value goes into red, green and blue: every order of the channels is another image, yet none is
# so far from grey that the model's answer to it is out of all proportion.
_TINTS = ((1.0, 0.94, 0.88), (0.9, 1.0, 0.95))

SLICES = Path(__file__).parent / "parity_slices.npz"
"""Brain slices made by this project (demo/parity_slices.py), for checkpoints that bring no images."""

_COLOURFUL = 2.0  # grey levels between an image's channels, in the mean

_SHOWN = 8
_CURE = "pass --parity-images DIR with a folder of real images, normal and anomalous"
_NEEDS = {
    "--parity-images": f"a measurement needs {MIN_IMAGES} at least; {_CURE}",
    "--calibration-images": f"INT8's scales need {MIN_IMAGES} at least; pass --calibration-images DIR with a folder of "
    "normal images, of the kind to be scored",
}
"""What is said of too few images, by the option that names a folder of them."""


@dataclass(frozen=True)
class ParityImages:
    """`pixels` uint8 (N, S, S, 3), all different; `names` say which is which, `origin` where they come from.

    `labels` say which are anomalous (None: unknown). The last `added` images are stress images or, of those that INT8's
    scales are taken from, copies in false colours. `stands_in`: they are not of the kind the engine is for.
    """

    pixels: UInt8
    names: tuple[str, ...]
    origin: str
    labels: tuple[bool | None, ...]
    added: int = 0
    stands_in: bool = False

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def real(self) -> int:
        """How many images are as they came, added ones left out."""
        return len(self.pixels) - self.added

    @property
    def stress(self) -> tuple[int, ...]:
        """Numbers of the stress images."""
        return tuple(range(self.real, len(self.pixels)))

    def with_stress(self) -> ParityImages:
        """Return these images with stress images behind them, some of which are made of these."""
        pixels, names = stress_images(self.pixels.shape[1], self.pixels)
        return replace(
            self,
            pixels=np.concatenate([self.pixels, pixels]),
            names=(*self.names, *names),
            labels=(*self.labels, *(None for _ in names)),
            added=len(names),
        )

    def with_colours(self) -> ParityImages:
        """Return these images and, where all are grey, a few of them in false colours."""
        if _colourful(self.pixels) >= COLOURED:
            return self
        chosen = spread(len(self.pixels), COLOURED)
        coloured = np.stack([_tinted(self.pixels[number], count) for count, number in enumerate(chosen)])
        return replace(
            self,
            pixels=np.concatenate([self.pixels, coloured]),
            names=(*self.names, *(f"{self.names[number]} in false colours" for number in chosen)),
            labels=(*self.labels, *(None for _ in chosen)),
            added=len(chosen),
        )


def choose(
    folder: Path | None,
    spec: PreprocessSpec,
    max_batch: int | None,
    stored: UInt8 | None = None,
    file: str = "",
    count: int | None = None,
) -> ParityImages:
    """Return what an engine of `max_batch` is measured on: a folder's images, else the checkpoint's, else the slices.

    `stored` are those of the checkpoint `file`, uint8 (N, S, S, 3); `count` is how many of a folder's are taken. Stress
    images come behind them.

    Raises:
        ExportError: see from_folder and from_checkpoint.

    """
    if folder is not None:
        return from_folder(folder, spec, count or max(FOLDER_LIMIT, max_batch or 0)).with_stress()
    return (from_slices(spec) if stored is None else from_checkpoint(stored, spec, file)).with_stress()


def calibration(folder: Path | None, spec: PreprocessSpec) -> ParityImages:
    """Return what INT8's scales are taken from: a folder's images, else the slices, half of which have lesions.

    Raises:
        ExportError: see from_folder.

    """
    images = from_slices(spec) if folder is None else from_folder(folder, spec, FOLDER_LIMIT, "--calibration-images")
    return images.with_colours()


def common(one: ParityImages, other: ParityImages) -> int:
    """Return how many images of `one` are among `other`, byte by byte."""
    known = {image.tobytes() for image in other.pixels}
    return sum(image.tobytes() in known for image in one.pixels)


def from_checkpoint(stored: UInt8, spec: PreprocessSpec, file: str) -> ParityImages:
    """Return the held-out images uint8 (N, S, S, 3) that the trainer stored in the checkpoint `file`.

    Where a small data set left too few, brain slices join them; without any, those stand alone.

    Raises:
        ExportError: they are not images of this size.

    """
    image_size = spec.image_size
    if (
        stored.dtype != np.uint8
        or stored.ndim != 4
        or (len(stored) and stored.shape[1:] != (image_size, image_size, 3))
    ):
        raise ExportError(
            f"{file}: parity images: expected uint8 (N, {image_size}, {image_size}, 3), got {stored.dtype} "
            f"{stored.shape}; {_CURE}"
        )
    if not len(stored):
        return from_slices(spec)
    names = [f"image {number} stored in {file}" for number in range(len(stored))]
    origin, labels = f"validation images stored in {file}", [None] * len(names)
    different = len({image.tobytes() for image in stored})
    if different >= MIN_IMAGES:
        return _prepared(stored, names, origin, labels)
    slices = from_slices(spec)
    added = list(range(MIN_IMAGES - different))
    return _prepared(
        np.concatenate([stored, slices.pixels[added]]),
        [*names, *(slices.names[number] for number in added)],
        f"{different} {origin}, and {len(added)} brain slices that come with qfae",
        [*labels, *(slices.labels[number] for number in added)],
    )


def from_folder(folder: Path, spec: PreprocessSpec, limit: int, option: str = "--parity-images") -> ParityImages:
    """Return at most `limit` images of a folder, evenly spread over its files, preprocessed as for scoring.

    `option` is what named the folder, one of _NEEDS.

    Raises:
        ExportError: the folder is missing or holds too few images, or images cannot be read (all are named).

    """
    try:
        found = scan([folder])
    except FileNotFoundError:
        raise ExportError(f"{option}: {folder}: no such folder; name one that holds real images") from None
    if not found.images:
        raise ExportError(f"{option}: {folder}: holds no images; name a folder of real images")
    first = spread(len(found.images), limit)
    order = [*first, *sorted(set(range(len(found.images))) - set(first))]
    prepared: list[UInt8] = []
    names, labels = [], []
    faults: list[str] = []
    different: set[bytes] = set()
    for file in (found.images[index] for index in order):
        if len(different) >= limit or (len(prepared) + len(faults) >= limit and len(different) >= MIN_IMAGES):
            break
        name = found.source_of(file)
        try:
            prepared.append(preprocess(read_image(file, source=name).pixels, spec).image)
            different.add(prepared[-1].tobytes())
            names.append(name)
            label = label_of(file, folder)
            labels.append(None if label is None else label == UNGOOD)
        except InputError as error:
            faults.append(str(error))
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ExportError(
            f"{option}: {len(faults)} of {len(faults) + len(prepared)} images cannot be read: "
            f"{'; '.join(faults[:_SHOWN])}{more}; remove them: a measurement leaves no image out"
        )
    origin = f"{len(different)} of the {len(found.images)} images in {folder.absolute().name}/"
    return _prepared(np.stack(prepared), names, origin, labels, option)


def from_slices(spec: PreprocessSpec) -> ParityImages:
    """Return the brain slices that come with this package, preprocessed as for scoring.

    They are real anatomy, every second one with a lesion, but not the user's: `stands_in` is set.
    """
    with np.load(SLICES, allow_pickle=False) as stored:
        slices = stored["slices"]
    pixels = np.stack([preprocess(np.repeat(one[:, :, None], 3, axis=2), spec).image for one in slices])
    names = [f"brain slice {number} of qfae" for number in range(len(pixels))]
    origin = f"{len(pixels)} brain slices that come with qfae"
    return replace(_prepared(pixels, names, origin, [number % 2 == 1 for number in range(len(pixels))]), stands_in=True)


def largest_batch(asked: int | None, default: int, images: ParityImages) -> int:
    """Return the engine's largest batch, measured with that many images: stress images do not count, being alike.

    Raises:
        ExportError: a batch was asked for that these images cannot fill.

    """
    if asked is None:
        return min(default, images.real)
    if asked > images.real:
        raise ExportError(
            f"--max-batch {asked}: the largest batch is measured with {asked} different images, but there are "
            f"{images.real} ({images.origin}); pass --parity-images DIR with {asked} or more, "
            f"or --max-batch {images.real}"
        )
    return asked


def _prepared(
    pixels: UInt8, names: Sequence[str], origin: str, labels: Sequence[bool | None], option: str = "--parity-images"
) -> ParityImages:
    """Keep the first of equal images, for a copy measures nothing."""
    first: dict[bytes, int] = {}
    for number, image in enumerate(pixels):
        first.setdefault(image.tobytes(), number)
    kept = list(first.values())
    if len(kept) < MIN_IMAGES:
        raise ExportError(f"{origin}: {len(kept)} different images, but {_NEEDS[option]}")
    kept_names, kept_labels = [names[number] for number in kept], [labels[number] for number in kept]
    pixels = np.ascontiguousarray(pixels[kept])
    return ParityImages(pixels, tuple(kept_names), origin, tuple(kept_labels))


def _colourful(pixels: UInt8) -> int:
    """Return how many of the images have colours worth the name: a coloured mark on a grey image is none."""
    spans = pixels.max(axis=3).astype(np.int16) - pixels.min(axis=3)
    return int((spans.mean(axis=(1, 2)) > _COLOURFUL).sum())


def _tinted(image: UInt8, number: int) -> UInt8:
    coloured: UInt8 = np.rint(image * np.array(_TINTS[number % len(_TINTS)])).astype(np.uint8)
    return coloured
