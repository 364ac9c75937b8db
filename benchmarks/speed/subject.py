"""The model that is measured, as files in one folder: every process reads it from there.

model.json      what it is, and how much an image costs
images.npz      the images it is measured on, and PyTorch's FP32 outputs on them
random.pt       the checkpoint, where its weights are random
NAME.onnx ...   the engine files that candidates ask for, with a manifest
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import Scores
from qfae_runtime.errors import QfaeError

MODEL, IMAGES, RANDOM = "model.json", "images.npz", "random.pt"
NAME = "model"
SUFFIXES = {"onnx": ".onnx", "fp16": ".fp16.onnx", "int8": ".int8.onnx"}
"""Engine files by what candidates call them."""


@dataclass(frozen=True)
class Asked:
    """What to measure: a checkpoint (`ckpt`), or a configuration with random weights of a seed.

    `config` describes the authors' checkpoints and random weights; `weights` are files of frozen weights, `encoders` by
    timm's name; `images` is a folder of images to measure scores on.
    """

    ckpt: str | None = None
    config: str | None = None
    random_weights: int | None = None
    encoders: dict[str, str] = field(default_factory=dict)
    perceptual: str | None = None
    images: str | None = None

    @property
    def title(self) -> str:
        """The model in a few words, without a folder of this machine."""
        if self.ckpt is not None:
            return Path(self.ckpt).name
        return f"{Path(str(self.config)).stem}, random weights {self.random_weights}"


@dataclass(frozen=True)
class Subject:
    """What model.json says. `flop` is the least an image needs; `products` are its matrix products at batch 1."""

    asked: Asked
    image_size: int
    flop: int
    products: tuple[tuple[int, int, int, int, bool], ...]
    files: dict[str, str]

    def save(self, folder: Path) -> None:
        """Write model.json."""
        (folder / MODEL).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Subject:
        """Read model.json."""
        stored: dict[str, Any] = json.loads((folder / MODEL).read_text(encoding="utf-8"))
        products = tuple((int(a), int(b), int(c), int(d), bool(e)) for a, b, c, d, e in stored["products"])
        return cls(**{**stored, "asked": Asked(**stored["asked"]), "products": products})


def images_of(folder: Path) -> tuple[UInt8, tuple[bool | None, ...], Scores]:
    """Return the images uint8 (N, S, S, 3), which are anomalous (None: unknown), and the reference's outputs."""
    with np.load(folder / IMAGES, allow_pickle=False) as stored:
        labels = tuple(None if one < 0 else bool(one) for one in stored["labels"])
        return stored["images"], labels, Scores(*(stored[name] for name in Scores._fields))


def prepare(asked: Asked, folder: Path, flavours: Sequence[str], max_batch: int, say: Callable[[str], None]) -> Subject:
    """Write the files of a model into `folder`, and score its images with PyTorch FP32; needs torch.

    What is there already of the very same model is kept.

    Raises:
        QfaeError: a checkpoint, weights or images cannot be had, or the model cannot be exported.

    """
    from benchmarks.speed.work import least_flop, products_of
    from qfae_export.describe import manifest_of, provenance_of
    from qfae_export.graph import InferenceGraph
    from qfae_export.images import choose
    from qfae_export.onnx_file import write_onnx
    from qfae_export.parity import reference_scores
    from qfae_export.precision import FP16, FP32
    from qfae_train.checkpoint import build_scorer

    if (folder / MODEL).is_file():
        found = Subject.load(folder)
        if found.asked == asked and all(flavour in found.files for flavour in flavours):
            return found
    folder.mkdir(parents=True, exist_ok=True)
    say("reading the model")
    checkpoint, weights = opened(asked, folder)
    spec = checkpoint.config.preprocess_spec()
    chosen = choose(Path(asked.images) if asked.images else None, spec, None, checkpoint.parity_images.numpy(), NAME)
    scorer = build_scorer(checkpoint, weights)
    say(f"scoring {len(chosen)} images with PyTorch float32, the reference")
    reference = reference_scores(scorer, chosen.pixels)
    labels = [-1 if one is None else int(one) for one in chosen.labels]
    np.savez(folder / IMAGES, images=chosen.pixels, labels=np.array(labels, np.int8), **reference._asdict())
    graph = InferenceGraph(scorer)
    del scorer
    written = {}
    for flavour, precision in (("onnx", FP32), ("fp16", FP16)):
        if flavour in flavours or flavour == "onnx":
            say(f"writing {NAME}{SUFFIXES[flavour]}")
            path = folder / f"{NAME}{SUFFIXES[flavour]}"
            written[path.name] = (write_onnx(graph.cast(precision), path), precision)
    manifest = manifest_of(
        NAME, checkpoint.config, "full", max_batch, written, None, (), provenance_of(checkpoint, asked.title)
    )
    manifest.save(folder / f"{NAME}.json")
    subject = Subject(
        asked,
        spec.image_size,
        least_flop(checkpoint.config),
        tuple(products_of(folder / f"{NAME}.onnx")),
        {flavour: f"{NAME}{SUFFIXES[flavour]}" for flavour in SUFFIXES if f"{NAME}{SUFFIXES[flavour]}" in written},
    )
    subject.save(folder)
    return subject


def opened(asked: Asked, folder: Path) -> tuple[Any, Any]:
    """Return the checkpoint and the weight files that complete it; random weights are made once and kept.

    Raises:
        QfaeError: it cannot be read.

    """
    from qfae_export.random_weights import random_checkpoint
    from qfae_train.checkpoint import load as load_checkpoint
    from qfae_train.checkpoint import save
    from qfae_train.config import load as load_config
    from qfae_train.official import open_checkpoint
    from qfae_train.weight_files import WeightFiles

    files = {name: Path(path) for name, path in asked.encoders.items()}
    weights = WeightFiles(files, Path(asked.perceptual) if asked.perceptual else None)
    config = load_config(asked.config) if asked.config is not None else None
    if asked.ckpt is not None:
        return open_checkpoint(Path(asked.ckpt), config, weights), weights
    if config is None or asked.random_weights is None:
        raise QfaeError("nothing to measure: name a checkpoint, or a preset with random weights")
    path = folder / RANDOM
    if not path.is_file():
        save(path, random_checkpoint(config, asked.random_weights))
    return load_checkpoint(path), weights


def with_file(subject: Subject, flavour: str, name: str) -> Subject:
    """Return the subject with one more file."""
    return replace(subject, files={**subject.files, flavour: name})
