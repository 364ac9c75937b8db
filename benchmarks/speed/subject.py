"""The model that is measured, as files in one folder: every process reads it from there.

subject.json    what it is, and how much an image costs
images.npz      the images it is measured on, PyTorch's outputs on them, and how far PyTorch FP32 is from those itself
random.pt       the checkpoint, where its weights are random
model.onnx ...  the engine files that candidates ask for, with a manifest
model.*.plan, model.*.pt2   what was built of them for candidates that need it
model.*.seconds             how long building each of those took

All of it is kept for the next run of the very same model by the very same code, and replaced for another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.speed.gemm import Product
from benchmarks.speed.revision import writers
from qfae_runtime.agreement import Reference, Scale
from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import Scores
from qfae_runtime.engines.files import EngineFile, check_engine_file
from qfae_runtime.errors import QfaeError
from qfae_runtime.golden import load_golden
from qfae_runtime.hashing import sha256_of, sha256_of_engine
from qfae_runtime.inputs import Inputs
from qfae_runtime.layout import scan
from qfae_runtime.manifest import Manifest, find_manifest
from qfae_runtime.writers.whole import whole_file
from qfae_runtime.yardstick import Yardstick

if TYPE_CHECKING:
    from qfae_export.graph import InferenceGraph
    from qfae_export.images import ParityImages
    from qfae_train.checkpoint import Checkpoint

SUBJECT, IMAGES, RANDOM = "subject.json", "images.npz", "random.pt"
NAME = "model"
WRITTEN = {"onnx": f"{NAME}.onnx", "int8": f"{NAME}.int8.onnx", "fp16": f"{NAME}.fp16.onnx"}
"""The engine files that are written here, by what candidates call them; INT8's scales are of qfae's brain slices."""

# subject.json goes first: without it nothing is taken for kept.
_MADE = (
    SUBJECT,
    IMAGES,
    RANDOM,
    f"{NAME}.json",
    f"{NAME}.onnx*",
    f"{NAME}.*.onnx*",
    f"{NAME}.*.plan",
    f"{NAME}.*.pt2",
    f".{NAME}.*.part",
    f"{NAME}.*.seconds",
)


@dataclass(frozen=True)
class Asked:
    """What to measure: a checkpoint (`ckpt`), a configuration with random weights of a seed, or an exported `engine`.

    An engine beside a checkpoint takes the place of the file that would be written of it. `config` describes the
    authors' checkpoints and random weights; `encoders` (by timm's name) and `perceptual` are files of frozen weights,
    `images` is a folder of images to measure scores on.
    """

    ckpt: str | None = None
    engine: str | None = None
    config: str | None = None
    random_weights: int | None = None
    encoders: dict[str, str] = field(default_factory=dict)
    perceptual: str | None = None
    images: str | None = None

    @property
    def title(self) -> str:
        """The model in a few words, without a folder of this machine."""
        if self.engine is not None or self.ckpt is not None:
            return Path(str(self.engine or self.ckpt)).name
        return f"{Path(str(self.config)).stem}, random weights {self.random_weights}"


@dataclass(frozen=True)
class Subject:
    """What subject.json says.

    asked       what to measure, and `sources` what that was: see sources_of
    max_batch   the largest batch that the files are for
    images      how many images scores are measured on, stress images among them
    flop        the least that an image needs
    products    the matrix products of an image
    files       engine files by what candidates call them
    int8        of the INT8 file, if there is one: `share_of_flop` in eight bits, `kept_fp32` and `calibrated_on` as in
                its manifest
    reference   what scores are held against: where PyTorch computed it, or "golden", an engine's stored images
    """

    asked: Asked
    sources: dict[str, str]
    max_batch: int
    image_size: int
    images: int
    flop: int
    products: tuple[Product, ...]
    files: dict[str, str]
    int8: dict[str, Any] | None = None
    reference: str = "golden"

    def save(self, folder: Path) -> None:
        """Write subject.json, whole or not at all."""
        with whole_file(folder / SUBJECT) as part:
            part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Subject:
        """Read subject.json."""
        stored: dict[str, Any] = json.loads((folder / SUBJECT).read_text(encoding="utf-8"))
        products = tuple(Product(*one) for one in stored["products"])
        return cls(**{**stored, "asked": Asked(**stored["asked"]), "products": products})

    @classmethod
    def kept(
        cls, folder: Path, asked: Asked, sources: dict[str, str], max_batch: int, reference: str = "golden"
    ) -> Subject | None:
        """Return what an earlier run left of the very same model, for batches as large; None if it left none."""
        try:
            found = cls.load(folder)
        except (OSError, ValueError, KeyError, TypeError):  # none, or one of another version
            return None
        same = (found.asked, found.sources, found.reference) == (asked, sources, reference)
        return found if same and found.max_batch >= max_batch else None


def sources_of(asked: Asked) -> dict[str, str]:
    """Return what tells a model from another one under the same names, by those names.

    It is the SHA-256 of files and of the configuration; of a folder of images, digests of names, sizes and times of
    change. What cannot be read is left out: reading the model says why. What writes a model's files counts as well: the
    code, and the versions of libraries.

    Raises:
        ConfigError: there is no such configuration, or it is faulty.

    """
    from qfae_train.config import load

    files, found = {asked.ckpt, asked.perceptual, *asked.encoders.values()}, writers()
    if asked.config is not None:
        config = load(asked.config)
        found[asked.config] = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()
        files |= {config.perceptual.weights, *(entry.weights for entry in config.model.encoders)}
    with suppress(OSError):
        if asked.engine is not None:
            found[asked.engine] = sha256_of_engine(Path(asked.engine))
    for name in sorted(filter(None, files)):
        with suppress(OSError):
            found[name] = sha256_of(Path(name))
    with suppress(OSError):
        if asked.images is not None:
            images = scan([Path(asked.images)])
            names = [images.source_of(path) for path in images.images]
            found[asked.images] = json.dumps(Inputs.of(images.images, names, None, hashed=False).fingerprint())
    return found


def images_of(folder: Path) -> tuple[UInt8, tuple[bool | None, ...], Reference]:
    """Return the images uint8 (N, S, S, 3), which are anomalous (None: unknown), and what is known of them."""
    with np.load(folder / IMAGES, allow_pickle=False) as stored:
        labels = tuple(None if one < 0 else bool(one) for one in stored["labels"])
        scores = Scores(*(stored[name] for name in Scores._fields))
        yardstick = Yardstick(*(stored[name] for name in Yardstick._fields))
        stress = tuple(int(number) for number in stored["stress"])
        scale = Scale(**json.loads(str(stored["scale"])))
        return stored["images"], labels, Reference(scores, scale, yardstick, stress)


def _save_images(folder: Path, images: UInt8, labels: Sequence[bool | None], reference: Reference) -> None:
    assert reference.yardstick is not None
    np.savez(
        folder / IMAGES,
        images=images,
        labels=np.array([-1 if one is None else int(one) for one in labels], np.int8),
        stress=np.array(reference.stress, np.int64),
        scale=np.array(json.dumps(asdict(reference.scale))),
        **reference.scores._asdict(),
        **reference.yardstick._asdict(),
    )


def prepare(
    asked: Asked,
    folder: Path,
    flavours: Sequence[str],
    max_batch: int,
    say: Callable[[str], None],
    device: str = "cpu",
) -> Subject:
    """Write the files of a model into `folder`, and score its images with PyTorch on `device`; needs torch.

    What is there already of the very same model is kept; of another one, nothing is.

    Raises:
        QfaeError: a checkpoint, weights or images cannot be had, an engine is not of the checkpoint, or the model
            cannot be exported.

    """
    from benchmarks.speed.work import least_flop, stored_products
    from qfae_export.graph import InferenceGraph
    from qfae_export.images import choose
    from qfae_export.reference import reference_of
    from qfae_train.checkpoint import build_scorer

    sources = sources_of(asked)
    kept = Subject.kept(folder, asked, sources, max_batch, device)
    if kept is not None and asked.engine is None:
        if all(flavour in kept.files for flavour in flavours):
            return kept
        flavours = [*flavours, *kept.files]  # written once more, or subject.json would forget them
    folder.mkdir(parents=True, exist_ok=True)
    if asked.engine is not None and asked.ckpt is None:
        return _of_engine(asked, folder, sources, max_batch)
    say("reading the model")
    read = opened(asked, folder) if asked.ckpt is not None else None  # before anything makes room for it
    named = _beside(asked, read[0]) if read is not None else {}
    if kept is None:
        _clear(folder, sources)
    checkpoint, weights = read or opened(asked, folder)
    spec = checkpoint.config.preprocess_spec()
    chosen = choose(Path(asked.images) if asked.images else None, spec, None, checkpoint.parity_images.numpy(), NAME)
    scorer = build_scorer(checkpoint, weights)
    say(f"scoring {len(chosen)} images with PyTorch in FP64 and FP32 on {device}, the reference")
    graph = InferenceGraph(scorer)
    reference = reference_of(scorer, graph, chosen, device=device).reference
    graph.forget()
    _save_images(folder, chosen.pixels, chosen.labels, reference)
    del scorer
    products, flop = tuple(stored_products(graph)), least_flop(checkpoint.config)
    files = _write_engines(graph, checkpoint, asked.title, chosen, folder, flavours, max_batch, say)
    files |= named
    int8 = _int8_of(folder / files["int8"]) if "int8" in files else None
    subject = Subject(asked, sources, max_batch, spec.image_size, len(chosen), flop, products, files, int8, device)
    subject.save(folder)
    return subject


def _clear(folder: Path, sources: Iterable[str]) -> None:
    """Remove what was made of another model, for nothing of it may be taken for this one's; what is asked for stays."""
    asked = {Path(source).resolve() for source in sources}
    for path in (path for pattern in _MADE for path in folder.glob(pattern)):
        if path.resolve() not in asked:
            path.unlink()


def _write_engines(
    graph: InferenceGraph,
    checkpoint: Checkpoint,
    title: str,
    measured: ParityImages,
    folder: Path,
    flavours: Sequence[str],
    max_batch: int,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Write the engine files of these flavours and their manifest; return them by flavour."""
    from qfae_export.describe import manifest_of, provenance_of
    from qfae_export.images import calibration
    from qfae_export.int8 import calibrated_on, int8_graph
    from qfae_export.onnx_file import write_onnx
    from qfae_export.precision import FP16, FP32

    if not flavours:
        return {}
    calibrating = calibration(None, checkpoint.config.preprocess_spec()) if "int8" in flavours else None

    def made(flavour: str) -> InferenceGraph:
        if calibrating is not None and flavour == "int8":
            return int8_graph(graph, calibrating.pixels)
        return graph.cast(FP32 if flavour == "onnx" else FP16)  # FP16 rounds the weights, so it comes last

    written, files = {}, {}
    for flavour, name in WRITTEN.items():
        if flavour in flavours:
            say(f"writing {name}")
            cast = made(flavour)
            written[name] = (write_onnx(cast, folder / name), cast.precision)
            files[flavour] = name
    provenance = provenance_of(checkpoint, title)
    manifest = manifest_of(NAME, checkpoint.config, "full", max_batch, written, None, (), provenance)
    if calibrating is not None:
        manifest.precision[files["int8"]]["calibrated_on"] = calibrated_on(calibrating, measured)[0]
    manifest.save(folder / f"{NAME}.json")
    return files


def _int8_of(path: Path) -> dict[str, Any]:
    """Return what rows say of an INT8 file whose manifest lies beside it."""
    from benchmarks.speed.work import int8_share

    policy = Manifest.load(find_manifest(path)).precision[path.name]
    return {"share_of_flop": int8_share(path)} | {name: policy.get(name) for name in ("kept_fp32", "calibrated_on")}


def _of_engine(asked: Asked, folder: Path, sources: dict[str, str], max_batch: int) -> Subject:
    """Take an exported engine as it is; its golden images are what scores are measured on.

    Raises:
        QfaeError: it is refused, or has no golden images.

    """
    file = check_engine_file(Path(str(asked.engine)))
    manifest = file.manifest
    path = file.path.parent / (manifest.golden or "")
    if manifest.golden is None or not path.is_file():
        raise QfaeError(f"{file.path}: its manifest names no golden images to measure scores on; pass --ckpt as well")
    if Subject.kept(folder, asked, sources, max_batch) is None:
        _clear(folder, sources)
    golden = load_golden(path.read_bytes(), path.name, manifest.image_size)
    scale = next((one.scale for one in manifest.certificate if one.engine == file.path.name), None)
    reference = golden.reference(scale)
    _save_images(folder, golden.images, [None] * len(golden.images), reference)
    products: tuple[Product, ...] = ()
    if file.format == "onnx":
        from benchmarks.speed.work import products_of

        products = tuple(products_of(file.path))
    flop, files, many = sum(one.flop for one in products), _engine_file(file), len(golden.images)
    int8 = _int8_of(file.path) if file.precision == "int8" else None
    subject = Subject(asked, sources, max_batch, manifest.image_size, many, flop, products, files, int8)
    subject.save(folder)
    return subject


def _beside(asked: Asked, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the file of an engine that stands beside its checkpoint, by what candidates call it; {}: there is none.

    Raises:
        QfaeError: it is refused, or its manifest says that it was exported from something else.

    """
    from qfae_export.describe import refuse_other_checkpoint

    if asked.engine is None:
        return {}
    file = check_engine_file(Path(asked.engine))
    if {"checkpoint", "random_weights"} & file.manifest.provenance.keys():  # otherwise nobody can tell
        refuse_other_checkpoint(file.manifest, file.path.name, Path(str(asked.ckpt)), checkpoint.sha256)
    return _engine_file(file)


def _engine_file(file: EngineFile) -> dict[str, str]:
    """Return what candidates call an engine's file, and where it is."""
    kinds = {"onnx": {"fp32": "onnx", "fp16": "fp16", "int8": "int8"}, "plan": {"fp32": "plan", "fp16": "plan-fp16"}}
    kind = kinds.get(file.format, {}).get(file.precision)
    if kind is None:
        raise QfaeError(f"{file.path}: format {file.format!r} in {file.precision} is not measured here")
    return {kind: str(file.path.resolve())}


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
