"""The main path, top-down: checkpoint -> graph -> ONNX files -> measured against PyTorch -> handed over with the proof.

Everything is made in a folder of its own inside --out and appears under its final names at the very end, the manifest
last. A failure leaves what was there before.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qfae_export.bisect import Bisected, bisect
from qfae_export.chain import Chain
from qfae_export.describe import bytes_of, manifest_of, provenance_of
from qfae_export.errors import ExportError
from qfae_export.graph import InferenceGraph
from qfae_export.halves import CompletedHalf
from qfae_export.images import FOLDER_LIMIT, ParityImages, from_checkpoint, from_folder, largest_batch
from qfae_export.onnx_file import write_onnx
from qfae_export.options import DEFAULT_MAX_BATCH, FP16_SUFFIX, Options
from qfae_export.parity import ParityError, ParityReport, certificate_of, golden_of
from qfae_export.plans import SUFFIXES, add_plan, rebuild, wanted
from qfae_export.precision import FP16, FP32, Precision
from qfae_export.random_weights import random_scorer
from qfae_export.resize_check import check_resize
from qfae_runtime.command_line import size_text
from qfae_runtime.engines import open_engine
from qfae_runtime.engines.base import Engine
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
    from_onnx: bool = False
    bisected: Bisected | None = None

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


@dataclass(frozen=True)
class _Source:
    """What an engine is made of and measured with. `images` is None for random weights: nothing is measured."""

    config: Config
    make_scorer: Callable[[], AnomalyScorer]
    provenance: dict[str, Any]
    images: ParityImages | None
    max_batch: int


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
        return _rebuilt(options, say)
    _refuse_existing(options)
    kind, note = wanted(options, options.engine_name + (FP16_SUFFIX if options.fp16 else ".onnx"))
    say("reading the checkpoint" if options.ckpt is not None else "making random weights")
    source = _read(options)
    check_resize(source.config.preprocess_spec())
    with _made_in(options) as made:
        exported = _engines(source, options, kind, made, say)
        notes = (*exported.notes, note) if note is not None else exported.notes
        return hand_over(replace(exported, notes=notes), options.folder)


@contextmanager
def _made_in(options: Options) -> Iterator[Path]:
    """Yield a folder inside --out, so that moving a file to its final name is one step that cannot run out of space."""
    new = not options.folder.exists()
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.folder, prefix=f".{options.engine_name}-") as made:
            yield Path(made)
    except OSError as error:
        raise OutputError(
            f"{options.folder}: cannot be written ({error.strerror or error}); "
            "nothing was exported: free some space or choose another --out"
        ) from error
    finally:
        if new and options.folder.is_dir() and not any(options.folder.iterdir()):
            options.folder.rmdir()


def _engines(source: _Source, options: Options, kind: str | None, folder: Path, say: Say) -> Exported:
    """Write the engines, measure each, and write golden file and manifest beside them."""
    name = options.engine_name
    written, chain, other = _written(source, options, folder, say)
    reports: dict[str, ParityReport] = {}
    certificates, bisected = [], None
    for engine, (files, precision) in written.items() if chain is not None else ():
        assert chain is not None
        say(f"comparing {engine} in ONNX Runtime with PyTorch")
        open_onnx = partial(_opened, source=source, part=options.part, other=other)
        with open_onnx(files[0]) as opened:
            report = chain.measure(opened, precision.name)
        if options.bisect and precision.name == "fp16" and not report:
            _, graph = _graph(source, options.part)  # FP16 has rounded the other's weights
            bisected = bisect(graph, report, chain.reference, chain.scale, open_onnx, files[0], say)
            report, written[engine] = bisected.report, (list(bisected.files), bisected.precision)
            chain.round(graph, bisected.precision)
            del graph
        reports[engine] = chain.accept(report, engine, f"ONNX {precision.name.upper()}", opened.backend)
        certificates.append(certificate_of(files[0], opened, reports[engine]))
    golden = None
    if chain is not None and options.part == "full":
        golden = folder / f"{name}.golden.npz"
        save_golden(golden, golden_of(chain.images, chain.reference))
    manifest = manifest_of(
        name, source.config, options.part, source.max_batch, written, golden, certificates, source.provenance
    )
    if bisected is not None:
        manifest.precision[name + FP16_SUFFIX]["bisected"] = bisected.to_dict()
    exported = Exported(folder, manifest, tuple(written), reports, bisected=bisected)
    if kind is not None:
        exported = _with_plan(exported, kind, chain, say)
    exported.manifest.save(folder / f"{name}.json")
    if golden is not None:
        for engine in written:  # the runtime's own door: files as written must open, their hashes and certificate fit
            open_engine(folder / engine).close()
    return exported


def _written(
    source: _Source, options: Options, folder: Path, say: Say
) -> tuple[dict[str, tuple[list[Path], Precision]], Chain | None, InferenceGraph | None]:
    """Write the ONNX files; return them with their policies, the chain as far as PyTorch goes, and a half's other half.

    What PyTorch holds is let go here: an engine of full size needs the memory.
    """
    scorer, graph = _graph(source, options.part)
    _refuse_full_disk(options, bytes_of(graph))
    chain = None
    if source.images is not None:
        say(f"scoring {len(source.images)} images with PyTorch float32, the reference")
        chain = Chain.begin(scorer, graph, source.images)
    other = None if options.part == "full" else InferenceGraph(scorer, _other(options.part))
    del scorer
    written = {}
    for precision in (FP32, FP16) if options.fp16 else (FP32,):
        engine = options.engine_name + (".onnx" if precision is FP32 else FP16_SUFFIX)
        if chain is not None and precision is not FP32:
            say("rounding the graph as FP16 rounds")
            chain.round(graph, precision)
        say(f"writing {engine}")
        written[engine] = (write_onnx(graph.cast(precision), folder / engine), graph.precision)
    del graph
    _let_go()
    return written, chain, other


def _with_plan(exported: Exported, kind: str, chain: Chain | None, say: Say) -> Exported:
    """Add the plan of the last ONNX engine."""
    onnx = exported.folder / exported.engines[-1]
    precision = exported.manifest.files[onnx.name].precision or "fp32"
    reports = dict(exported.reports)

    def held(engine: Engine) -> ParityReport:
        assert chain is not None
        reports["plan"] = chain.accept(chain.measure(engine, precision), "the plan", "plan", engine.backend)
        return reports["plan"]

    manifest, name, note = add_plan(exported.manifest, onnx, kind, say, held if chain is not None else None)
    if "plan" in reports:
        reports[name] = reports.pop("plan")
    notes = (*exported.notes, note) if note is not None else exported.notes
    return replace(exported, manifest=manifest, engines=(*exported.engines, name), reports=reports, notes=notes)


def _rebuilt(options: Options, say: Say) -> Exported:
    folder, manifest, name, note, report = rebuild(options, say)
    return Exported(folder, manifest, (name,), {name: report} if report else {}, (note,) if note else (), True)


def _opened(path: Path, source: _Source, part: str, other: InferenceGraph | None) -> Engine:
    size = source.config.model.image_size
    if other is None:
        return OnnxRuntimeEngine(path, size, source.max_batch)
    return CompletedHalf(path, part, other, size, source.max_batch)


def _let_go() -> None:
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


def _refuse_existing(options: Options) -> None:
    onnx = (".onnx", ".onnx.data", FP16_SUFFIX, f"{FP16_SUFFIX}.data")
    suffixes = (*onnx, *SUFFIXES.values(), ".golden.npz", ".json")
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
    needed += weights if options.bisect else 0  # a trial, and what stays FP32
    free = shutil.disk_usage(options.folder).free
    if free < needed:
        raise OutputError(
            f"{options.folder}: {size_text(free)} are free, but the engine takes {size_text(needed)}; "
            "nothing was exported: free some space or choose another --out"
        )


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
    images = _images(options, checkpoint.parity_images.numpy(), checkpoint.config)
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


def _images(options: Options, stored: Any, config: Config) -> ParityImages:
    spec = config.preprocess_spec()
    if options.parity_images is not None:
        return from_folder(options.parity_images, spec, max(FOLDER_LIMIT, options.max_batch or 0))
    assert options.ckpt is not None
    return from_checkpoint(stored, spec, options.ckpt.name)


def hand_over(exported: Exported, folder: Path) -> Exported:
    """Move the finished files to their final names, the manifest last: until then no engine there can be opened."""
    for file in exported.files:
        file.replace(folder / file.name)
    for suffix in (".onnx", FP16_SUFFIX, *SUFFIXES.values(), ".golden.npz"):
        for stale in (exported.manifest.name + suffix, f"{exported.manifest.name}{suffix}.data"):
            if stale not in exported.manifest.files:
                (folder / stale).unlink(missing_ok=True)
    return replace(exported, folder=folder)


__all__ = ["ExportError", "Exported", "Options", "ParityError", "export"]
