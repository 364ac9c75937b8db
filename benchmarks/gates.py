"""What the gates let through: how near sound engines come to FP32's bounds, and which planted faults are refused.

    python -m benchmarks.gates sound --ckpt demo.pt --images chest=DIR     a row for a checkpoint and a set of images
    python -m benchmarks.gates faults --ckpt demo.pt                       a row for a fault, and what share was caught

Sound engines: ONNX Runtime and OpenVINO with 1 and 2 threads, in their processes of their own OpenVINO and PyTorch held
to AVX2 by the libraries' own variables (ONNX Runtime has none). Cells are shares of a bound, the worst of all engines:
1 is the bound itself. Faults and gates are those of gate_faults.py.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
import numpy as np
import torch

from benchmarks.gate_catalogue import FAULTS
from benchmarks.gate_faults import Fault, Faulty, Rows
from benchmarks.speed.torch_engine import TorchEngine
from qfae_export.graph import InferenceGraph
from qfae_export.images import ParityImages, from_checkpoint, from_folder
from qfae_export.onnx_file import write_onnx
from qfae_export.parity import golden_of, measure
from qfae_export.reference import Measured64, reference_of
from qfae_runtime.agreement import Agreement, Reference, Scale
from qfae_runtime.arrays import UInt8
from qfae_runtime.contract import CONTRACTS
from qfae_runtime.coverage import spread
from qfae_runtime.engines.base import Engine
from qfae_runtime.engines.batches import sizes_up_to
from qfae_runtime.golden import Golden
from qfae_runtime.preprocess import PreprocessSpec
from qfae_runtime.quantities import OF_ALL_IMAGES, QUANTITIES
from qfae_runtime.selftest import _first_outputs, _run_golden, contract_for
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.checkpoint import build_scorer
from qfae_train.official import open_checkpoint
from qfae_train.weight_files import WeightFiles

FP32 = CONTRACTS["fp32"]
RUN_BATCH = 16
SHOWN = ("spearman", *(name for name in FP32.bounds if QUANTITIES[name].title.endswith("PyTorch's own")))
"""What the table shows. Of the other bounds no sound engine uses anything, but for the one grey level by which a value
on the edge between two may come out."""

AVX2 = {"openvino": {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "pytorch": {"ATEN_CPU_CAPABILITY": "avx2"}}
"""Variables by which a library leaves AVX-512 alone."""

_SEED = 14


def main_sets(spec: PreprocessSpec, stored: UInt8, folders: Sequence[tuple[str, Path]], count: int) -> dict[str, Any]:
    """Return sets of images by name: the checkpoint's own, folders', noise, photographs cropped at random."""
    own = from_checkpoint(stored, spec, "the checkpoint")
    sets = {"own": own} | {name: from_folder(folder, spec, max(count, 32)) for name, folder in folders}
    size, rng = spec.image_size, np.random.default_rng(_SEED)
    sets["noise"] = _named("noise", rng.integers(0, 256, (32, size, size, 3), dtype=np.uint8))
    sets["photographs"] = _named("photograph", photographs := _photographs(rng, size))
    # Nearly empty slices have little contrast.
    faint = photographs.mean((1, 2, 3), keepdims=True) * 15 / 16 + photographs / 16
    sets["faint photographs"] = _named("faint photograph", np.rint(faint).astype(np.uint8))
    return {name: _first(one, count).with_stress() for name, one in sets.items()}


def _photographs(rng: np.random.Generator, size: int) -> UInt8:
    from sklearn.datasets import load_sample_images

    whole = [photograph[::2, ::2] if size < 200 else photograph for photograph in load_sample_images().images]
    cut = []
    for number in range(32):
        photograph = whole[number % len(whole)]
        top, left = (int(rng.integers(0, side - size + 1)) for side in photograph.shape[:2])
        cut.append(photograph[top : top + size, left : left + size])
    return np.ascontiguousarray(np.stack(cut))


def _named(name: str, pixels: UInt8) -> ParityImages:
    names = tuple(f"{name} {number}" for number in range(len(pixels)))
    return ParityImages(pixels, names, name, (None,) * len(pixels))


def _first(images: ParityImages, count: int) -> ParityImages:
    kept = spread(len(images), count)
    names, labels = tuple(images.names[one] for one in kept), tuple(images.labels[one] for one in kept)
    return ParityImages(images.pixels[kept], names, images.origin, labels)


def shares_of(measured: Agreement) -> dict[str, float]:
    """Return by quantity what share of its bound an engine uses; above 1 it breaks it.

    Of a quantity that is best at 1, that of the distance from 1; where the bound is 0, infinity or nothing.
    """
    shares = {}
    for name, bound in FP32.bounds.items():
        value = measured.values.get(name)
        if value is None:
            shares[name] = float("nan") if measured.fault is None else float("inf")
        elif QUANTITIES[name].larger_is_better:
            shares[name] = (1 - value) / (1 - bound)
        else:
            shares[name] = value / bound if bound else float("inf") if value else 0.0
    return shares


def _scorer(checkpoint: Path) -> tuple[AnomalyScorer, PreprocessSpec, UInt8]:
    """Open a checkpoint; a folder is the small model of the authors' of tests/train/official.py."""
    if checkpoint.is_dir():
        from tests.train.official import Official

        official = Official(checkpoint)
        size = official.config.model.image_size
        return official.scorer, official.config.preprocess_spec(), np.empty((0, size, size, 3), np.uint8)
    opened = open_checkpoint(checkpoint, None, WeightFiles())
    return build_scorer(opened), opened.config.preprocess_spec(), opened.parity_images.numpy()


def _engine(backend: str, checkpoint: Path, onnx: Path, size: int, threads: int) -> Engine:
    if backend == "pytorch":
        scorer = _scorer(checkpoint)[0]
        torch.set_num_threads(threads)
        return TorchEngine(scorer, size, "cpu", batches=sizes_up_to(RUN_BATCH))  # all that it takes would be measured
    if backend == "openvino":
        from qfae_runtime.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(onnx, size, RUN_BATCH, threads)
    from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(onnx, size, RUN_BATCH, threads)


Sets = dict[str, tuple[ParityImages, Measured64]]


def used(backend: str, checkpoint: Path, onnx: Path, threads: int, sets: Sets) -> dict[str, dict[str, float]]:
    """Return by set and quantity the share of its bound that an engine uses; in a process of its own or here."""
    size = next(iter(sets.values()))[0].pixels.shape[1]
    with _engine(backend, checkpoint, onnx, size, threads) as engine:
        return {
            name: shares_of(measure(engine, images, measured.reference, CONTRACTS["fp32"]).worst)
            for name, (images, measured) in sets.items()
        }


def _apart(backend: str, *arguments: Any) -> dict[str, dict[str, float]]:
    """Do `used` in a new process that is held to AVX2: libraries read their variables once."""
    before = dict(os.environ)
    os.environ.update(AVX2[backend])
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(used, backend, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def sound_rows(checkpoint: Path, folders: Sequence[tuple[str, Path]], count: int, only: Sequence[str]) -> list[str]:
    """Return the table's rows of one checkpoint."""
    scorer, spec, stored = _scorer(checkpoint)
    graph = InferenceGraph(scorer)
    chosen = main_sets(spec, stored, folders, count)
    sets: Sets = {
        name: (images, reference_of(scorer, graph, images))
        for name, images in chosen.items()
        if name in only or not only
    }
    with TemporaryDirectory() as folder:
        onnx = Path(folder) / "engine.onnx"
        write_onnx(graph, onnx)
        found = {}
        for backend in ("onnxruntime", "openvino"):
            for threads in (1, 2):
                found[f"{backend}, {threads}"] = used(backend, checkpoint, onnx, threads, sets)
        for backend in AVX2:
            found[f"{backend}, AVX2"] = _apart(backend, checkpoint, onnx, 1, sets)
    rows = []
    for name, (images, measured) in sets.items():
        by_engine = {engine: shares[name] for engine, shares in found.items()}
        for engine, shares in by_engine.items():
            click.echo(
                f"{checkpoint.stem} {name} {engine}: " + ", ".join(f"{k} {v:.2f}" for k, v in shares.items()), err=True
            )
        scores = measured.reference.scores.score[: images.real]
        worst = {
            quantity: max((shares[quantity], engine) for engine, shares in by_engine.items()) for quantity in SHOWN
        }
        cells = [f"{share:.2f}" for share, _ in worst.values()]
        rows.append(f"| {checkpoint.stem} | {name} | {scores.min():.1e} to {scores.max():.2g} | {' | '.join(cells)} |")
    return rows


class Verdict(NamedTuple):
    """Of one fault: what either gate said of it, and how large it is on any of the images (shares of bounds)."""

    fault: Fault
    parity: list[str]
    self_test: list[str]
    harm: float


class Gates:
    """Both gates on one model, with the images and golden file that an export would give it.

    `others` are images that no gate sees: they tell whether a fault that passes does any harm.
    """

    def __init__(self, scorer: AnomalyScorer, own: ParityImages, others: Mapping[str, ParityImages]) -> None:
        self._scorer, self._graph = scorer, InferenceGraph(scorer)
        self._images, self._measured = own, reference_of(scorer, self._graph, own)
        self._golden = golden_of(own, self._measured.reference)
        self._right = Rows(scorer)
        self._others: dict[str, tuple[ParityImages, Reference | None]] = {
            name: (one, None) for name, one in others.items()
        }

    def judge(self, fault: Fault) -> Verdict:
        """Ask both gates; of what parity lets through, measure the other images, too."""
        measured, engine = self._measured, self._engine
        report = measure(engine(fault), self._images, measured.reference, FP32, measured.pytorch)
        said = self_test(engine(fault), self._golden, measured.reference.scale)
        largest = [_largest(shares_of(report.worst))]
        if not report:
            return Verdict(fault, report.failures(), said, *largest)
        for name, (images, reference) in self._others.items():
            reference = reference or reference_of(self._scorer, self._graph, images).reference
            self._others[name] = images, reference
            largest.append(_largest(shares_of(measure(engine(fault), images, reference, FP32).worst)))
        return Verdict(fault, [], said, max(largest))

    def _engine(self, fault: Fault) -> Faulty:
        return Faulty(fault, self._right, self._scorer)


def self_test(engine: Engine, golden: Golden, scale: Scale) -> list[str]:
    """Return what qfae-run's self-test says of an engine for a run at batch 16; nothing if it passes."""
    reference, contract = golden.reference(scale), contract_for(None)
    calls, _ = _run_golden(engine, golden, RUN_BATCH)
    said = contract.failures(reference.compare(_first_outputs(calls, len(golden.images))))
    for numbers, outputs in calls:
        said += contract.without(OF_ALL_IMAGES).failures(reference.of(numbers).compare(outputs))
    return said


def _largest(shares: dict[str, float]) -> float:
    """Return the largest share of a bound; a grey level more or less is one anyway where a bound is one level."""
    return max(share for name, share in shares.items() if name != "reconstruction_levels" or share > 1)


def share_table(verdicts: Sequence[Verdict]) -> list[str]:
    """Return by kind how many faults there are and how many each gate refuses, as a table."""
    rows = ["| kind | faults | parity refuses | self-test refuses |", "|---|---|---|---|"]
    kinds = list(dict.fromkeys(one.fault.kind for one in verdicts))
    for kind in (*kinds, "all"):
        mine = [one for one in verdicts if kind in (one.fault.kind, "all")]
        counts = (len(mine), sum(bool(one.parity) for one in mine), sum(bool(one.self_test) for one in mine))
        rows.append(f"| {kind} | " + " | ".join(map(str, counts)) + " |")
    return rows


@click.group()
def main() -> None:
    """Measure the gates themselves."""


@main.command()
@click.option("--ckpt", "checkpoints", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--images", "folders", multiple=True, help="NAME=DIR; repeatable.")
@click.option("--count", default=32, help="Images of a set.")
@click.option("--only", multiple=True, help="Names of sets; else all.")
def sound(checkpoints: Sequence[Path], folders: Sequence[str], count: int, only: Sequence[str]) -> None:
    """Print what share of FP32's bounds sound engines use."""
    pairs = _pairs(folders)
    headings = [
        "checkpoint",
        "images",
        "scores",
        *(QUANTITIES[name].title.removesuffix(" / PyTorch's own") for name in SHOWN),
    ]
    click.echo("| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    for checkpoint in checkpoints:
        for row in sound_rows(checkpoint, pairs, count, only):
            click.echo(row)


@main.command()
@click.option("--ckpt", "checkpoint", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--images", "folders", multiple=True, help="NAME=DIR, to see whether what passes does harm; repeatable.")
@click.option("--only", default="", help="Faults whose names hold this.")
def faults(checkpoint: Path, folders: Sequence[str], only: str) -> None:
    """Print which planted faults the parity measurement and the self-test refuse."""
    scorer, spec, stored = _scorer(checkpoint)
    others = main_sets(spec, stored, _pairs(folders), 32)
    gates = Gates(scorer, others.pop("own"), others)
    verdicts = []
    for fault in FAULTS:
        if only in fault.name:
            verdicts.append(gates.judge(fault))
            one = verdicts[-1]
            said = ["refused" if gate else "passes" for gate in (one.parity, one.self_test)]
            click.echo(f"{fault.kind}: {fault.name}: {said[0]}, {said[1]}, {one.harm:.3g}", err=True)
    harmful = [one for one in verdicts if one.harm > 1]
    for row in share_table(harmful):
        click.echo(row)
    click.echo("\nPassed by a gate: kind, name, parity, self-test, largest share of a bound on any images")
    for one in verdicts:
        if not (one.parity and one.self_test):
            said = ["refused" if gate else "passes" for gate in (one.parity, one.self_test)]
            harm = f"{one.harm:.2g}" if one.harm > 1 else f"{one.harm:.2g}, harmless"
            click.echo(f"- {one.fault.kind}: {one.fault.name}: {said[0]}, {said[1]}, {harm}")


def _pairs(folders: Sequence[str]) -> list[tuple[str, Path]]:
    return [(name, Path(folder)) for name, _, folder in (one.partition("=") for one in folders)]


if __name__ == "__main__":
    main()
