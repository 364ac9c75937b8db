"""The BMAD folder layout, shared with training: where images lie, what their folders say, where masks are.

train/good[/img]/x.png
valid|val|test/{good,Ungood}[/img]/x.png      masks under the same names in label/ or anomaly_mask/
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qfae_runtime.readers.recognise import kind_of
from qfae_runtime.results import ROWS_NAME, RUN_NAME, holds_run

GOOD = "good"
UNGOOD = "Ungood"
MASK_FOLDERS = ("label", "anomaly_mask")
IMAGE_FOLDER = "img"

# What lies beside images in real archives. Inside a folder these are counted and not attempted, unless their first
# bytes are those of an image or cannot be read; all else is attempted, .nii.gz too. A file that is named itself is
# always attempted.
NON_IMAGE_SUFFIXES = frozenset(
    {
        ".txt",
        ".csv",
        ".tsv",
        ".json",
        ".jsonl",
        ".md",
        ".rst",
        ".log",
        ".xml",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
    }
    | {
        ".html",
        ".css",
        ".js",
        ".py",
        ".ipynb",
        ".sh",
        ".cfg",
        ".npy",
        ".npz",
        ".pt",
        ".pth",
        ".onnx",
        ".plan",
    }
    | {".pdf", ".doc", ".docx", ".xls", ".xlsx", ".db", ".zip", ".gz", ".tar", ".7z", ".sha256", ".md5"}
)

RESULTS = "results of qfae-run"
"""What a results folder is counted as: its heat maps are pictures, but none to score."""

HIDDEN = "hidden file"

UNREADABLE_MASKS = "mask folder that cannot be listed"

_LABELS = {GOOD.lower(): GOOD, UNGOOD.lower(): UNGOOD}


def label_of(path: Path, root: Path | None = None) -> str | None:
    """Read "good" or "Ungood" off the folders above a file; None when no folder says so.

    The nearest folder wins. With `root`, only `root` itself and folders below it count, so that a home folder
    that happens to be called "good" labels nothing.
    """
    for folder in path.parents:
        label = _LABELS.get(folder.name.lower())
        if label is not None:
            return label
        if root is not None and folder == root:
            return None
    return None


def mask_path_for(image_path: Path) -> Path | None:
    """Find the mask in `label/` or `anomaly_mask/`, beside `img/` or the image; None if there is none."""
    base = image_path.parent
    if base.name.lower() == IMAGE_FOLDER:
        base = base.parent
    names = dict.fromkeys((image_path.name, image_path.stem + ".png"))
    candidates = (base / folder / name for folder in MASK_FOLDERS for name in names)
    return next((path for path in candidates if path != image_path and _is_file(path)), None)


@dataclass(frozen=True)
class Scan:
    """What was found under the inputs: sorted `images`, their common `root`, and what was passed over."""

    root: Path
    images: list[Path]
    ignored: dict[str, int] = field(default_factory=dict)  # suffix, HIDDEN or RESULTS -> count
    mask_files: int = 0

    def source_of(self, image: Path) -> str:
        """Name an image in rows: its path below `root`, with forward slashes."""
        return image.relative_to(self.root).as_posix()


def find_images(inputs: Path | Iterable[Path]) -> list[Path]:
    """List the image files under a folder, or under several folders and files; sorted, without masks."""
    return scan([inputs] if isinstance(inputs, Path) else list(inputs)).images


def scan(inputs: Sequence[Path], exclude: Sequence[Path] = (), listed: Sequence[Path] = ()) -> Scan:
    """Walk folders recursively and take named files as they are, each once however often it is named.

    `listed` are inputs too, but for one that does not exist: it is returned as if it were an image, so that it gets
    its own error row.

    Folders in `exclude` are not entered, nor are results folders of qfae-run, which are counted as ignored.

    A folder that cannot be listed is returned as if it were an image, so that it gets its own error row.

    Raises:
        FileNotFoundError: an input does not exist.

    """
    tops = [_absolute(path) for path in (*inputs, *listed)]
    required = len(inputs)
    walk = _Walk(frozenset(_absolute(path) for path in exclude))
    anchors: dict[Path, None] = {}
    for number, top in enumerate(tops):
        is_folder = _is_dir(top)
        if is_folder:
            walk.folder(top)
        elif number >= required or os.path.lexists(top):
            walk.found[top] = None
        else:
            raise FileNotFoundError(str(top))
        anchors[top if is_folder else top.parent] = None
    root = Path(os.path.commonpath(anchors)) if anchors else Path.cwd()
    images = sorted(walk.found, key=lambda path: path.relative_to(root).as_posix())
    return Scan(root, images, dict(sorted(walk.ignored.items())), walk.mask_files)


class _Walk:
    """One walk: what was found, what was ignored, which folders were entered (so symlink loops end)."""

    def __init__(self, exclude: frozenset[Path]) -> None:
        self.exclude = exclude
        self.found: dict[Path, None] = {}
        self.ignored: Counter[str] = Counter()
        self.mask_files = 0
        self._entered: set[tuple[int, int]] = set()

    def folder(self, top: Path) -> None:
        pending = [top]
        while pending:
            here = pending.pop()
            try:
                status = here.stat()
                entries = sorted(os.scandir(here), key=lambda entry: entry.name)
            except OSError:
                self.found[here] = None
                continue
            if (status.st_dev, status.st_ino) in self._entered:
                continue
            self._entered.add((status.st_dev, status.st_ino))
            if {RUN_NAME, ROWS_NAME} <= {entry.name for entry in entries} and holds_run(here):
                self.ignored[RESULTS] += 1
                continue
            folders = [Path(entry.path) for entry in entries if _is_dir(entry)]
            for entry in entries:
                if not _is_dir(entry):
                    self._file(Path(entry.path))
            has_images_folder = any(folder.name.lower() == IMAGE_FOLDER for folder in folders)
            for folder in folders:
                if folder in self.exclude or folder.name.startswith("."):
                    continue
                if _holds_masks(folder, has_images_folder):
                    self._masks(folder)
                else:
                    pending.append(folder)

    def _masks(self, folder: Path) -> None:
        try:
            self.mask_files += sum(1 for entry in os.scandir(folder) if _is_file(entry))
        except OSError:  # images can be scored without their masks
            self.ignored[UNREADABLE_MASKS] += 1

    def _file(self, path: Path) -> None:
        suffix = path.suffix.lower()
        if path.name.startswith("."):
            self.ignored[HIDDEN] += 1  # not by its name: there may be one for each image, and it may say whose it is
        elif (suffix in NON_IMAGE_SUFFIXES or path.name == "Thumbs.db") and not _may_be_image(path):
            self.ignored[suffix] += 1
        else:
            self.found[path] = None


def _absolute(path: Path) -> Path:
    """Return a path from the root, without `..`; where a link comes before one, as the system reads it."""
    whole = path.absolute()
    if whole.name == "..":
        return Path(os.path.realpath(whole))
    if ".." in whole.parts:
        return Path(os.path.realpath(whole.parent), whole.name)
    return Path(os.path.normpath(whole))


def _is_dir(place: Path | os.DirEntry[str]) -> bool:
    # What may not even be looked at raises in Python's own is_dir and is_file.
    try:
        return place.is_dir()
    except OSError:
        return False


def _is_file(place: Path | os.DirEntry[str]) -> bool:
    try:
        return place.is_file()
    except OSError:
        return False


def _may_be_image(path: Path) -> bool:
    """Say whether a file is to be attempted whatever its suffix: DICOM that ends in .log, or what cannot be opened.

    A .nii.gz is, however damaged: an image that has lost its first bytes must not lose its row.
    """
    if path.name.lower().endswith(".nii.gz"):
        return True
    try:
        return path.is_file() and kind_of(path) is not None
    except (OSError, ValueError):
        return True


def _holds_masks(folder: Path, beside_images_folder: bool) -> bool:
    # A folder that is merely called "label" is no mask folder: it must stand where the layout puts one.
    named = folder.name.lower() in MASK_FOLDERS
    return named and (beside_images_folder or folder.parent.name.lower() in _LABELS)
