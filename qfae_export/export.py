"""The main path, top-down: checkpoint -> graph -> ONNX files -> measured against PyTorch -> handed over with the proof.

Everything is made in a folder of its own inside --out and appears under its final names at the very end, the manifest
last. A failure leaves what was there before.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qfae_export.bisect import Bisected
from qfae_export.chain import Chain
from qfae_export.describe import bytes_in_int8, bytes_of, manifest_of, provenance_of
from qfae_export.errors import ExportError
from qfae_export.graph import InferenceGraph
from qfae_export.halves import CompletedHalf
from qfae_export.handover import put_in_place
from qfae_export.images import ParityImages, calibration, choose, largest_batch
from qfae_export.int8 import calibrated_on, int8_graph, refuse_policy
from qfae_export.measurements import Engines, Measurements, measure_engines
from qfae_export.onnx_file import write_onnx
from qfae_export.options import DEFAULT_MAX_BATCH, FP16_SUFFIX, INT8_SUFFIX, REFERENCE, Options
from qfae_export.output_folder import made_in, possible_files, refuse_existing, refuse_full_disk
from qfae_export.parity import golden_of
from qfae_export.parity_report import ParityError, ParityReport
from qfae_export.plans import Planned, add_plan, rebuild, wanted
from qfae_export.precision import FP16, INT8, INT8_PERCEPTUAL, Precision
from qfae_export.random_weights import random_scorer
from qfae_export.resize_check import check_resize
from qfae_runtime.engines.base import Engine
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_runtime.errors import ManifestError, UsageError
from qfae_runtime.golden import save_golden
from qfae_runtime.manifest import Manifest
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.checkpoint import build_scorer
from qfae_train.config import Config
from qfae_train.config import load as load_config
from qfae_train.official import open_checkpoint

Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """Certified engines of one model: their files, the manifest, and what was measured of each.

    `reports` holds a report by engine file; engines of random weights have none. `others` are those of further
    backends, by engine file and backend; one that broke its contract is among them, and is not certified. `chain` is
    None where no PyTorch was at hand.
    """

    folder: Path
    manifest: Manifest
    engines: tuple[str, ...]
    reports: dict[str, ParityReport] = field(default_factory=dict)
    others: dict[tuple[str, str], ParityReport] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    from_onnx: bool = False
    bisected: Bisected | None = None
    chain: Chain | None = None

    def with_plan(self, planned: Planned) -> Exported:
        """Return the export with a plan in it."""
        return replace(
            self,
            manifest=planned.manifest,
            engines=(*self.engines, planned.name),
            reports={**self.reports, **({planned.name: planned.report} if planned.report is not None else {})},
            notes=(*self.notes, planned.note) if planned.note is not None else self.notes,
        )

    @property
    def engine(self) -> Path:
        """The last engine of the chain that was measured."""
        return self.folder / next(reversed(self.reports), self.engines[-1])

    @property
    def report(self) -> ParityReport:
        """The measurement of that engine."""
        return self.reports[self.engine.name]

    @property
    def files(self) -> list[Path]:
        """Every file of the export, the engines first, the manifest last."""
        others = [name for name in self.manifest.files if name not in self.engines]
        return [self.folder / name for name in (*self.engines, *others, f"{self.manifest.name}.json")]

    @property
    def written(self) -> list[Path]:
        """The files that this export wrote: all of them, or the plan and the manifest where it was built from ONNX."""
        rebuilt = [self.folder / name for name in (*self.engines, f"{self.manifest.name}.json")]
        return rebuilt if self.from_onnx else self.files


class _Written(NamedTuple):
    """ONNX files with their policies, by engine, the chain as far as PyTorch goes, and a half's other half."""

    engines: Engines
    chain: Chain | None
    other: InferenceGraph | None


@dataclass(frozen=True)
class _Source:
    """What an engine is made of and measured with. `images` is None for random weights: nothing is measured."""

    config: Config
    make_scorer: Callable[[], AnomalyScorer]
    provenance: dict[str, Any]
    images: ParityImages | None
    max_batch: int
    calibration: ParityImages | None = None


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
    if options.onnx is not None:
        planned = rebuild(options, say)
        return Exported(options.folder, planned.manifest, (), from_onnx=True).with_plan(planned)
    refuse_existing(options)
    kind, note = wanted(options, options.engine_name + (FP16_SUFFIX if options.fp16 else ".onnx"))
    say("reading the checkpoint" if options.ckpt is not None else "making random weights")
    source = _read(options)
    check_resize(source.config.preprocess_spec())
    if options.int8:  # read now: what is wrong with the folder must not be found out after minutes
        images = calibration(options.calibration_images, source.config.preprocess_spec())
        source = replace(source, calibration=images)
    with made_in(options) as made:
        exported = _engines(source, options, made, say)
        if kind is not None:
            try:
                exported = _with_plan(exported, kind, say)
            except ExportError as error:
                if options.format is not None:
                    raise
                note = f"no plan: {error}"  # nobody insisted on one, and the ONNX engines are proven
        if note is not None:
            exported = replace(exported, notes=(*exported.notes, note))
        refuse_existing(options)  # minutes have passed
        return hand_over(exported, options.folder)


def _engines(source: _Source, options: Options, folder: Path, say: Say) -> Exported:
    """Write the ONNX engines, measure each, and write golden file and manifest beside them."""
    written = _written(source, options, folder, say)
    chain = written.chain
    measured = Measurements()
    if chain is not None:
        open_onnx = partial(_opened, source=source, part=options.part, other=written.other)
        measured = measure_engines(
            written.engines,
            chain,
            options,
            source.max_batch,
            open_onnx,
            lambda: _graph(source, options.part)[1],
            None if options.int8_keep is not None else partial(_less_in_int8, source, say),
            say,
        )
    golden = None
    if chain is not None and options.part == "full":
        golden = folder / f"{options.engine_name}.golden.npz"
        save_golden(golden, golden_of(chain.images, chain.reference))
    manifest = manifest_of(
        options.engine_name,
        source.config,
        options.part,
        source.max_batch,
        written.engines,
        golden,
        measured.certificates,
        source.provenance,
    )
    if measured.bisected is not None:
        manifest.precision[options.engine_name + FP16_SUFFIX]["bisected"] = measured.bisected.to_dict()
    if source.calibration is not None:
        entry, note = calibrated_on(source.calibration, chain.images if chain is not None else None)
        manifest.precision[options.engine_name + INT8_SUFFIX]["calibrated_on"] = entry
        measured.notes += [note] if note is not None else []
    manifest.save(folder / f"{manifest.name}.json")
    if golden is not None:
        _check_as_written(folder, manifest.name)
    engines = tuple(written.engines)
    return Exported(
        folder,
        manifest,
        engines,
        measured.reports,
        measured.others,
        tuple(measured.notes),
        bisected=measured.bisected,
        chain=chain,
    )


def _check_as_written(folder: Path, name: str) -> None:
    """Ask of the files as written what the runtime asks before it loads an engine: hashes, and certificates that fit.

    Raises:
        ManifestError: they do not fit one another.

    """
    manifest = Manifest.load(folder / f"{name}.json")
    manifest.verify_files(folder)
    for engine in (file for file, entry in manifest.files.items() if entry.role == "engine"):
        if manifest.certified(engine, REFERENCE, "cpu") is None:
            raise ManifestError(f"{engine}: its certificate does not fit it as written; export again, or report this")


def _written(source: _Source, options: Options, folder: Path, say: Say) -> _Written:
    """Write the ONNX files, and begin the chain.

    What PyTorch holds is let go here: an engine of full size needs the memory.
    """
    scorer, graph = _graph(source, options.part)
    int8_policy = INT8 if options.int8_keep is None else replace(INT8, kept=options.int8_keep)
    if options.int8:
        refuse_policy(graph, int8_policy)  # now, and not after minutes
    refuse_full_disk(options, bytes_of(graph), bytes_in_int8(graph, int8_policy) if options.int8 else 0)
    chain = None
    if source.images is not None:
        say(f"scoring {len(source.images)} images with PyTorch in FP64 and FP32, the reference")
        chain = Chain.begin(scorer, graph, source.images)
    graph.forget()  # nothing else compares it in FP64
    other = None if options.part == "full" else InferenceGraph(scorer, _other(options.part)).forget()
    del scorer
    name = options.engine_name
    engines = {f"{name}.onnx": _write(graph, folder / f"{name}.onnx", say)}
    images = source.calibration
    if images is not None:
        say(f"taking INT8's scales from {images.origin}")
        int8 = int8_graph(graph, images.pixels, int8_policy)
        engines[name + INT8_SUFFIX] = _write(int8, folder / (name + INT8_SUFFIX), say)
        del int8
        let_go()
    if options.fp16:
        if chain is not None:
            say("rounding the graph as FP16 rounds")
            chain.round(graph, FP16)
        engines[name + FP16_SUFFIX] = _write(graph.cast(FP16), folder / (name + FP16_SUFFIX), say)
    del graph
    let_go()
    return _Written(engines, chain, other)


def _write(graph: InferenceGraph, path: Path, say: Say) -> tuple[list[Path], Precision]:
    say(f"writing {path.name}")
    return write_onnx(graph, path), graph.precision


def _less_in_int8(source: _Source, say: Say, path: Path) -> tuple[list[Path], Precision]:
    """Write an INT8 engine anew whose reconstruction is FP32's."""
    assert source.calibration is not None
    say("INT8 breaks its contract; keeping all in FP32 that the reconstruction depends on")
    graph = _graph(source, "full")[1].forget()
    return _write(int8_graph(graph, source.calibration.pixels, INT8_PERCEPTUAL), path, say)


def _with_plan(exported: Exported, kind: str, say: Say) -> Exported:
    """Add the plan of the last ONNX engine that plans are made of."""
    *_, name = (one for one in exported.engines if not one.endswith(INT8_SUFFIX))
    onnx, chain = exported.folder / name, exported.chain
    precision = exported.manifest.files[name].precision or "fp32"

    def measured(engine: Engine, file: str) -> ParityReport:
        assert chain is not None
        return chain.accept(chain.measure(engine, precision), file, "plan", engine.backend)

    planned = add_plan(exported.manifest, onnx, kind, say, measured if chain is not None else None)
    planned.manifest.save(exported.folder / f"{planned.manifest.name}.json")
    return exported.with_plan(planned)


def _opened(path: Path, source: _Source, part: str, other: InferenceGraph | None) -> Engine:
    size = source.config.model.image_size
    if other is None:
        return OnnxRuntimeEngine(path, size, source.max_batch)
    return CompletedHalf(path, part, other, size, source.max_batch)


def let_go() -> None:
    """Return to the system what nobody holds any more: an engine of full size needs the memory."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc keeps its own counsel
            ctypes.CDLL("libc.so.6").malloc_trim(0)


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


def _read(options: Options) -> _Source:
    config = load_config(options.config) if options.config is not None else None
    if options.ckpt is None:
        assert config is not None
        assert options.random_weights is not None
        seed = options.random_weights
        return _Source(
            config,
            lambda: random_scorer(config, seed),
            {"random_weights": seed, "config": config.to_dict()},
            None,
            options.max_batch or DEFAULT_MAX_BATCH,
        )
    path = options.ckpt
    checkpoint = open_checkpoint(path, config, options.weights)
    spec, stored = checkpoint.config.preprocess_spec(), checkpoint.parity_images.numpy()
    images = choose(options.parity_images, spec, options.max_batch, stored, path.name, options.parity_count)
    held = [checkpoint]  # only until the scorer is made: it has what it needs, and the rest may be gigabytes

    def make_scorer() -> AnomalyScorer:
        opened = held.pop() if held else open_checkpoint(path, config, options.weights)
        return build_scorer(opened, options.weights)

    return _Source(
        checkpoint.config,
        make_scorer,
        provenance_of(checkpoint, path.name),
        images,
        largest_batch(options.max_batch, DEFAULT_MAX_BATCH, images),
    )


def hand_over(exported: Exported, folder: Path) -> Exported:
    """Move the finished files to their final names, the manifest last: until then no engine there can be opened."""
    names = [file.name for file in exported.files]
    stale = [name for name in possible_files(exported.manifest.name) if name not in names]
    put_in_place(exported.folder, folder, names, stale)
    return replace(exported, folder=folder)


__all__ = ["ExportError", "Exported", "Options", "ParityError", "export"]
