"""What `export` is asked to do; the home of the command's defaults. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from qfae_train.weight_files import WeightFiles

DEFAULT_MAX_BATCH = 32

# What a manifest accepts as a file name, with room for suffixes.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


@dataclass(frozen=True)
class Options:
    """One export.

    ckpt            checkpoint that qfae-train wrote, or the authors' last_ckpt.pth
    config          preset or TOML file that describes the authors' checkpoint; None: qfae-train's brings its own
    weights         files of frozen weights that the checkpoint lacks; empty: timm's hub
    out             folder for the engine; None: the checkpoint's folder
    parity_images   folder of images to measure on; None: those in the checkpoint, or the slices in this package
    name            NAME of NAME.onnx, NAME.json, NAME.golden.npz; None: the checkpoint's name without suffix
    max_batch       largest batch of the engine; None: DEFAULT_MAX_BATCH, or as many as there are parity images
    overwrite       replace an engine of that name
    """

    ckpt: Path
    out: Path | None = None
    parity_images: Path | None = None
    name: str | None = None
    max_batch: int | None = None
    overwrite: bool = False
    config: str | None = None
    weights: WeightFiles = field(default_factory=WeightFiles)

    @property
    def folder(self) -> Path:
        """The folder the engine is written to."""
        return self.out if self.out is not None else self.ckpt.parent

    @property
    def engine_name(self) -> str:
        """NAME, without suffix."""
        return self.name if self.name is not None else self.ckpt.stem

    def faults(self) -> list[str]:
        """Say what is wrong with the options themselves, one sentence each."""
        faults = []
        if not is_plain_name(self.engine_name):
            option = "--name" if self.name is not None else "--ckpt"
            faults.append(
                f"{option}: {self.engine_name!r} cannot name an engine; pass a --name of letters, digits and _ . + -"
            )
        if self.folder.exists() and not self.folder.is_dir():
            faults.append(f"--out: {self.folder} is a file; name a folder")
        return faults


def is_plain_name(name: str) -> bool:
    """Say whether a manifest takes `name` as the beginning of its files' names."""
    return bool(_PLAIN_NAME.fullmatch(name)) and ".." not in name and not name.endswith(".")
