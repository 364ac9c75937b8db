"""The main path, top-down: checkpoint -> graph -> ONNX file -> measured against PyTorch -> handed over with its proof.

Everything is made in a folder of its own inside --out and appears under its final names at the very end, the manifest
last. A failure leaves what was there before.
"""

from __future__ import annotations

import math
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qfae_export.errors import ExportError
from qfae_export.graph import InferenceGraph
from qfae_export.images import FOLDER_LIMIT, ParityImages, from_checkpoint, from_folder, from_slices, largest_batch
from qfae_export.onnx_file import OPSETS, write_onnx
from qfae_export.options import DEFAULT_MAX_BATCH, Options
from qfae_export.parity import ParityError, ParityReport, golden_of, measure, pytorch_scores
from qfae_runtime import __version__
from qfae_runtime.engines import open_engine
from qfae_runtime.engines.base import INPUT_NAME, Scores
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_runtime.errors import OutputError, UsageError
from qfae_runtime.golden import save_golden
from qfae_runtime.manifest import CertificateEntry, FileEntry, Manifest, TensorSpec
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.checkpoint import Checkpoint, build_scorer, portable_config
from qfae_train.config import load as load_config
from qfae_train.official import open_checkpoint
from qfae_train.weight_files import WeightFiles

_BUILDERS = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Exported:
    """A certified engine: its file, its manifest, the measurement, and where the images came from."""

    engine: Path
    manifest: Manifest
    report: ParityReport

    @property
    def files(self) -> list[Path]:
        """Every file that belongs to the engine, the engine first."""
        others = [name for name in self.manifest.files if name != self.engine.name]
        return [self.engine, *(self.engine.with_name(name) for name in (*others, f"{self.manifest.name}.json"))]


@dataclass(frozen=True)
class _Source:
    """What an engine is made of and measured with."""

    checkpoint: Checkpoint
    file: str
    images: ParityImages
    max_batch: int


def export(options: Options, say: Callable[[str], None] = lambda step: None) -> Exported:
    """Export a checkpoint to an engine with a certificate, or raise and leave the folder as it was.

    `say` is told each step as it begins.

    Raises:
        UsageError: the options contradict themselves, or the configuration is faulty or missing.
        OutputError: an engine of that name exists, or the folder cannot be written.
        CheckpointError: the checkpoint is missing, is none, or does not fit its configuration.
        WeightsError: frozen weights cannot be had.
        ExportError: parity images are missing or unreadable, or the model cannot be expressed in ONNX.
        ParityError: the engine does not compute what PyTorch computes.

    """
    if faults := options.faults():
        raise UsageError(faults)
    _refuse_existing(options)
    say("reading the checkpoint")
    source = _read(options)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        # Inside the folder itself, so that moving a file to its final name is one step that cannot run out of space.
        with tempfile.TemporaryDirectory(dir=options.folder, prefix=f".{options.engine_name}-") as made:
            scorer, graph = _graph(source.checkpoint, options.weights)
            say(f"scoring {len(source.images)} images with PyTorch float32, the reference")
            reference = pytorch_scores(scorer, source.images.pixels)
            say("writing the ONNX file")
            written = write_onnx(graph, Path(made) / f"{options.engine_name}.onnx")
            say("comparing ONNX Runtime with PyTorch")
            exported = _certify(written, source, reference, options.engine_name)
            return _hand_over(exported, options.folder)
    except OSError as error:
        raise OutputError(
            f"{options.folder}: cannot be written ({error.strerror or error}); "
            "nothing was exported: free some space or choose another --out"
        ) from error


def _graph(checkpoint: Checkpoint, files: WeightFiles) -> tuple[AnomalyScorer, InferenceGraph]:
    """Return the model and its inference graph, the same bits however many threads the machine has.

    Building them computes constants (resampled kernels, folded queries), whose last digit depends on the threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        scorer = build_scorer(checkpoint, files)
        return scorer, InferenceGraph(scorer)
    finally:
        torch.set_num_threads(threads)


def _refuse_existing(options: Options) -> None:
    names = [options.engine_name + suffix for suffix in (".onnx", ".onnx.data", ".golden.npz", ".json")]
    existing = [name for name in names if (options.folder / name).exists()]
    if existing and not options.overwrite:
        raise OutputError(
            f"{options.folder}: already holds {', '.join(existing)}; pass --overwrite to replace it, "
            "or another --out or --name"
        )


def _read(options: Options) -> _Source:
    config = load_config(options.config) if options.config is not None else None
    checkpoint = open_checkpoint(options.ckpt, config, options.weights)
    spec, file = checkpoint.config.preprocess_spec(), options.ckpt.name
    if options.parity_images is not None:
        limit = max(FOLDER_LIMIT, options.max_batch or 0)
        images = from_folder(options.parity_images, spec, limit)
    elif len(checkpoint.parity_images):
        images = from_checkpoint(checkpoint.parity_images.numpy(), spec.image_size, file)
    else:
        images = from_slices(spec)
    return _Source(checkpoint, file, images, largest_batch(options.max_batch, DEFAULT_MAX_BATCH, images))


def _certify(written: list[Path], source: _Source, reference: Scores, name: str) -> Exported:
    """Measure the engine and write golden file and manifest beside it.

    Raises:
        ParityError: a bound was broken; neither golden file nor manifest is written.

    """
    path = written[0]
    size = source.checkpoint.config.model.image_size
    files = {path.name: FileEntry.of(path, "engine", "onnx", "fp32")}
    files |= {weights.name: FileEntry.of(weights, "weights") for weights in written[1:]}
    with OnnxRuntimeEngine(path, size, source.max_batch) as engine:
        report = measure(engine, source.images, reference)
        if not report:
            raise ParityError(_disagreement(path.name, report), report)
        certificate = CertificateEntry.issue(
            path,
            engine,
            report.worst,
            batches=report.batches,
            images=len(source.images),
            images_from=source.images.origin,
        )
    golden = path.with_name(f"{name}.golden.npz")
    save_golden(golden, golden_of(source.images, reference))
    files[golden.name] = FileEntry.of(golden, "golden")
    manifest = _manifest(name, source, files, golden.name, certificate)
    manifest.save(path.with_name(f"{name}.json"))
    # The runtime's own door: the files as written must open, their hashes and the certificate fit.
    open_engine(path).close()
    return Exported(path, manifest, report)


def _disagreement(engine: str, report: ParityReport) -> str:
    lines = [f"{engine}: ONNX Runtime does not compute what PyTorch computes, so nothing was written:"]
    lines += [f"  {failure}" for failure in report.failures()]
    lines.append(
        "the checkpoint is not at fault, its export is: try other versions of torch, onnxscript or onnxruntime, "
        "and report these lines"
    )
    return "\n".join(lines)


def _manifest(
    name: str, source: _Source, files: dict[str, FileEntry], golden: str, certificate: CertificateEntry
) -> Manifest:
    checkpoint = source.checkpoint
    spec = checkpoint.config.preprocess_spec()
    square = ("batch", spec.image_size, spec.image_size)
    return Manifest(
        name=name,
        preprocess=spec,
        max_batch=source.max_batch,
        files=files,
        inputs=(TensorSpec(INPUT_NAME, "uint8", (*square, 3)),),
        outputs=(
            TensorSpec("score", "float32", ("batch",)),
            TensorSpec("anomaly_map", "float32", square),
            TensorSpec("reconstruction", "uint8", (*square, 3)),
        ),
        golden=golden,
        precision={"policy": "fp32"},
        certificate=(certificate,),
        provenance={
            "checkpoint": {"file": source.file, "sha256": checkpoint.sha256},
            "config": portable_config(checkpoint.config),
            "frozen": checkpoint.frozen,
            "training": {key: _plain(value) for key, value in checkpoint.record.items()},
            "exported_by": {
                "qfae": __version__,
                "python": platform.python_version(),
                "opset": OPSETS["fp32"],
                **_versions(),
            },
        },
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _BUILDERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # another distribution of the same module, such as onnxruntime-gpu
            found[name] = "unknown"
    return found


def _plain(value: Any) -> Any:
    """Return what JSON can hold: training may have recorded a loss that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _hand_over(exported: Exported, folder: Path) -> Exported:
    """Move the finished files to their final names, the manifest last: until then no engine there can be opened."""
    for file in exported.files:
        file.replace(folder / file.name)
    stale = folder / f"{exported.engine.name}.data"
    if stale.name not in exported.manifest.files:
        stale.unlink(missing_ok=True)
    return Exported(folder / exported.engine.name, exported.manifest, exported.report)


__all__ = ["ExportError", "Exported", "Options", "ParityError", "export"]
