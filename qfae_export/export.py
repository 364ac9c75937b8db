"""The main path, top-down: checkpoint -> graph -> ONNX files -> measured against PyTorch -> handed over with the proof.

Everything is made in a folder of its own inside --out and appears under its final names at the very end, the manifest
last. A failure leaves what was there before.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qfae_export.describe import bytes_of, manifest_of, provenance_of
from qfae_export.errors import ExportError
from qfae_export.graph import InferenceGraph
from qfae_export.halves import CompletedHalf
from qfae_export.images import (
    FOLDER_LIMIT,
    ParityImages,
    from_checkpoint,
    from_folder,
    from_slices,
    largest_batch,
    spread,
)
from qfae_export.onnx_file import write_onnx
from qfae_export.options import DEFAULT_MAX_BATCH, FP16_SUFFIX, Options
from qfae_export.parity import (
    ParityError,
    ParityReport,
    golden_of,
    link,
    measure,
    pytorch_scores,
    reference_scores,
    scale_of,
)
from qfae_export.precision import FP16, FP32, Precision
from qfae_export.resize_check import check_resize
from qfae_runtime.agreement import Scale
from qfae_runtime.certificate import CertificateEntry, Link
from qfae_runtime.contract import CONTRACTS
from qfae_runtime.engines import open_engine
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_runtime.errors import OutputError, UsageError
from qfae_runtime.golden import save_golden
from qfae_runtime.manifest import Manifest
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.checkpoint import build_scorer
from qfae_train.config import Config
from qfae_train.config import load as load_config
from qfae_train.official import open_checkpoint

Say = Callable[[str], None]

PYTORCH, GRAPH = "PyTorch FP32", "graph FP32"

# The graph in PyTorch is measured on a few images: it is there to tell a fault of the rewriting from one of the export.
_LINK_IMAGES = 8


@dataclass(frozen=True)
class Exported:
    """Certified engines of one model: their files, the manifest, and what was measured of each.

    `reports` holds a report by engine file; engines of random weights have none.
    """

    folder: Path
    manifest: Manifest
    engines: tuple[str, ...]
    reports: dict[str, ParityReport] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def engine(self) -> Path:
        """The engine asked for: the last one of the chain."""
        return self.folder / self.engines[-1]

    @property
    def report(self) -> ParityReport:
        """The measurement of the engine asked for."""
        return self.reports[self.engines[-1]]

    @property
    def files(self) -> list[Path]:
        """Every file of the export, the engines first, the manifest last."""
        others = [name for name in self.manifest.files if name not in self.engines]
        return [self.folder / name for name in (*self.engines, *others, f"{self.manifest.name}.json")]


@dataclass(frozen=True)
class _Source:
    """What an engine is made of and measured with. `images` is None for random weights: nothing is measured."""

    config: Config
    make_scorer: Callable[[], AnomalyScorer]
    provenance: dict[str, Any]
    images: ParityImages | None
    max_batch: int


@dataclass
class _Chain:
    """The reference, and the links measured so far on the way from there to an engine."""

    images: ParityImages
    reference: Scores
    scale: Scale
    links: list[Link]
    last: str
    outputs: Scores
    """Of the last step of the chain, on `numbers` of the images."""
    numbers: list[int]


def export(options: Options, say: Say = lambda step: None) -> Exported:
    """Export a checkpoint to engines with certificates, or raise and leave the folder as it was.

    `say` is told each step as it begins.

    Raises:
        UsageError: the options contradict themselves, or the configuration is faulty or missing.
        OutputError: an engine of that name exists, or the folder cannot be written or is too full.
        CheckpointError: the checkpoint is missing, is none, or does not fit its configuration.
        WeightsError: frozen weights cannot be had.
        ExportError: parity images are missing or unreadable, or the model cannot be expressed in ONNX.
        ParityError: an engine does not compute what PyTorch computes.

    """
    if faults := options.faults():
        raise UsageError(faults)
    _refuse_existing(options)
    say("reading the checkpoint" if options.ckpt is not None else "making random weights")
    source = _read(options)
    check_resize(source.config.preprocess_spec())
    with _made_in(options) as made:
        exported = _engines(source, options, made, say)
        return hand_over(exported, options.folder)


@contextmanager
def _made_in(options: Options) -> Iterator[Path]:
    """Yield a folder inside --out, so that moving a file to its final name is one step that cannot run out of space."""
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.folder, prefix=f".{options.engine_name}-") as made:
            yield Path(made)
    except OSError as error:
        raise OutputError(
            f"{options.folder}: cannot be written ({error.strerror or error}); "
            "nothing was exported: free some space or choose another --out"
        ) from error


def _engines(source: _Source, options: Options, folder: Path, say: Say) -> Exported:
    """Write the ONNX files, measure each, and write golden file and manifest beside them."""
    scorer, graph = _graph(source, options.part)
    _refuse_full_disk(options, bytes_of(graph))
    chain = None
    if source.images is not None:
        chain = _begin_chain(scorer, graph, source.images, options.part, say)
    other = None if options.part == "full" else InferenceGraph(scorer, _other(options.part))
    del scorer
    name = options.engine_name
    written = {f"{name}.onnx": (_write(graph, folder / f"{name}.onnx", say), FP32)}
    if options.fp16:
        graph.cast(FP16)
        written[name + FP16_SUFFIX] = (_write(graph, folder / (name + FP16_SUFFIX), say), FP16)
    del graph
    gc.collect()  # an engine of full size needs the memory that the graph held
    reports, certificates = {}, []
    for engine, (files, precision) in written.items() if chain is not None else ():
        assert chain is not None
        say(f"comparing {engine} in ONNX Runtime with PyTorch")
        with _opened(files[0], source, options.part, other) as opened:
            reports[engine] = _measured(opened, files[0].name, precision, chain)
            certificates.append(_certificate(files[0], opened, reports[engine]))
    golden = None
    if chain is not None and options.part == "full":
        golden = folder / f"{name}.golden.npz"
        save_golden(golden, golden_of(chain.images, chain.reference))
    manifest = manifest_of(
        name, source.config, options.part, source.max_batch, written, golden, certificates, source.provenance
    )
    manifest.save(folder / f"{name}.json")
    if golden is not None:
        for engine in written:  # the runtime's own door: files as written must open, their hashes and certificate fit
            open_engine(folder / engine).close()
    return Exported(folder, manifest, tuple(written), reports)


def _begin_chain(scorer: AnomalyScorer, graph: InferenceGraph, images: ParityImages, part: str, say: Say) -> _Chain:
    say(f"scoring {len(images)} images with PyTorch float32, the reference")
    reference = reference_scores(scorer, images.pixels)
    scale = scale_of(images, reference)
    if part != "full":
        return _Chain(images, reference, scale, [], PYTORCH, reference, list(range(len(images))))
    few = spread(len(images), _LINK_IMAGES)
    outputs = pytorch_scores(graph, images.pixels[few])
    first = link(PYTORCH, GRAPH, reference.of(few), outputs, "fp32", scale, [images.labels[one] for one in few])
    return _Chain(images, reference, scale, [first], GRAPH, outputs, few)


def _measured(engine: Engine, file: str, precision: Precision, chain: _Chain) -> ParityReport:
    """Measure an engine against PyTorch and against the chain's last step, of which it becomes the new one.

    Raises:
        ParityError: a bound was broken.

    """
    report = measure(engine, chain.images, chain.reference, CONTRACTS[precision.name], chain.scale)
    step = f"ONNX {precision.name.upper()}"
    assert report.outputs is not None
    numbers = chain.numbers
    got = report.outputs.of(numbers)
    labels = [chain.images.labels[number] for number in numbers]
    chain.links.append(link(chain.last, step, chain.outputs, got, precision.name, chain.scale, labels))
    chain.last, chain.outputs, chain.numbers = step, report.outputs, list(range(len(chain.images)))
    report = replace(report, links=tuple(chain.links))
    if not report:
        raise ParityError(_disagreement(file, report), report)
    return report


def _disagreement(engine: str, report: ParityReport) -> str:
    lines = [f"{engine}: ONNX Runtime does not compute what PyTorch computes, so nothing was written:"]
    lines += [f"  {failure}" for failure in report.failures()]
    guilty = report.guilty()
    lines.append(f"the step at fault: {guilty}" if guilty else "no step of the chain is at fault alone: errors add up")
    if report.contract.name == "fp32":
        lines.append(
            "the checkpoint is not at fault, its export is: try other versions of torch, onnxscript or onnxruntime, "
            "and report these lines"
        )
    else:
        lines.append(
            "FP16 rounds more than this model bears; pass --bisect to find what must stay FP32, or leave out --fp16"
        )
    return "\n".join(lines)


def _certificate(path: Path, engine: Engine, report: ParityReport) -> CertificateEntry:
    return CertificateEntry.issue(
        path,
        engine,
        report.worst,
        report.contract,
        batches=report.batches,
        images_from=report.images.origin,
        links=report.links,
    )


def _opened(path: Path, source: _Source, part: str, other: InferenceGraph | None) -> Engine:
    size = source.config.model.image_size
    if other is None:
        return OnnxRuntimeEngine(path, size, source.max_batch)
    return CompletedHalf(path, part, other, size, source.max_batch)


def _write(graph: InferenceGraph, path: Path, say: Say) -> list[Path]:
    say(f"writing {path.name}")
    return write_onnx(graph, path)


def _graph(source: _Source, part: str) -> tuple[AnomalyScorer, InferenceGraph]:
    """Return the model and its inference graph, the same bits however many threads the machine has.

    Building them computes constants (resampled kernels, folded queries), whose last digit depends on the threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        scorer = source.make_scorer()
        return scorer, InferenceGraph(scorer, part)
    finally:
        torch.set_num_threads(threads)


def _other(part: str) -> str:
    return "scorer" if part == "reconstruction" else "reconstruction"


def _refuse_existing(options: Options) -> None:
    suffixes = (".onnx", ".onnx.data", FP16_SUFFIX, FP16_SUFFIX + ".data", ".plan", ".rtx.plan", ".golden.npz", ".json")
    names = [options.engine_name + suffix for suffix in suffixes]
    existing = [name for name in names if (options.folder / name).exists()]
    if existing and not options.overwrite:
        raise OutputError(
            f"{options.folder}: already holds {', '.join(existing)}; pass --overwrite to replace it, "
            "or another --out or --name"
        )


def _refuse_full_disk(options: Options, weights: int) -> None:
    """Say now what would otherwise be found out after minutes of scoring."""
    needed = weights + (weights // 2 if options.fp16 else 0)
    free = shutil.disk_usage(options.folder).free
    if free < needed:
        raise OutputError(
            f"{options.folder}: {free / 1e9:.1f} GB are free, but the engine takes {needed / 1e9:.1f} GB; "
            "nothing was exported: free some space or choose another --out"
        )


def _read(options: Options) -> _Source:
    config = load_config(options.config) if options.config is not None else None
    if options.ckpt is None:
        assert config is not None
        assert options.random_weights is not None
        from qfae_export.random_weights import random_scorer

        seed = options.random_weights
        return _Source(
            config,
            lambda: random_scorer(config, seed),
            {"random_weights": seed, "config": config.to_dict()},
            None,
            options.max_batch or DEFAULT_MAX_BATCH,
        )
    checkpoint = open_checkpoint(options.ckpt, config, options.weights)
    images = _images(options, checkpoint.parity_images.numpy(), checkpoint.config)
    return _Source(
        checkpoint.config,
        lambda: build_scorer(checkpoint, options.weights),
        provenance_of(checkpoint, options.ckpt.name),
        images,
        largest_batch(options.max_batch, DEFAULT_MAX_BATCH, images),
    )


def _images(options: Options, stored: Any, config: Config) -> ParityImages:
    spec = config.preprocess_spec()
    if options.parity_images is not None:
        return from_folder(options.parity_images, spec, max(FOLDER_LIMIT, options.max_batch or 0))
    if len(stored):
        assert options.ckpt is not None
        return from_checkpoint(stored, spec.image_size, options.ckpt.name)
    return from_slices(spec)


def hand_over(exported: Exported, folder: Path) -> Exported:
    """Move the finished files to their final names, the manifest last: until then no engine there can be opened."""
    for file in exported.files:
        file.replace(folder / file.name)
    for engine in (f"{exported.manifest.name}.onnx", exported.manifest.name + FP16_SUFFIX):
        for stale in (engine, f"{engine}.data"):
            if stale not in exported.manifest.files:
                (folder / stale).unlink(missing_ok=True)
    return replace(exported, folder=folder)


__all__ = ["ExportError", "Exported", "Options", "ParityError", "export"]
