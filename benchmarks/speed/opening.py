"""How a candidate becomes something that can be timed, within its own process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.speed.candidates import Candidate
from benchmarks.speed.gemm import Gemm, maker
from benchmarks.speed.subject import NAME, Subject, images_of, opened
from qfae_runtime.engines.base import Engine
from qfae_runtime.writers.whole import whole_file

PLANS = {"plan": "onnx", "plan-fp16": "fp16"}
"""The file that a plan is built from."""

TOOK = ".seconds"
"""Ends the name of the file beside a built one that says how long building took; it is written last."""


class Ready(NamedTuple):
    """`seconds` times one batch of a size, with maps or without.

    `engine` is None of matrix products alone, `disk` the bytes it was read from.
    """

    seconds: Callable[[int, bool], float]
    engine: Engine | None
    disk: int
    flop: int | None = None


def build(candidate: Candidate, folder: Path, device: str, max_batch: int) -> float:
    """Build what a candidate runs, where it is not there yet: a plan, or a package; may take minutes.

    Return the seconds that it took: of what an earlier run built, those of then; 0 where there is nothing to build.

    Raises:
        QfaeError: it cannot be built.

    """
    path, subject = built_file(candidate, folder, device), Subject.load(folder)
    if path is None or (candidate.model in PLANS and candidate.model in subject.files):
        return 0.0  # of an engine that was named, nobody here knows what it took
    took = path.with_name(path.name + TOOK)
    kept = _kept(path, took)
    if kept is not None:
        return kept
    took.unlink(missing_ok=True)
    start = time.perf_counter()
    if candidate.model in PLANS:
        from qfae_export.tensorrt_plan import build_plan

        build_plan(folder / subject.files[PLANS[candidate.model]], path, "plan", max_batch)
    else:
        from benchmarks.speed.torch_engine import package

        package(_graph(candidate, folder), device, path)
    seconds = time.perf_counter() - start
    with whole_file(took) as part:
        part.write_text(f"{seconds!r}\n", encoding="utf-8")
    return seconds


def _kept(path: Path, took: Path) -> float | None:
    """Return the seconds that building a file took; None where it is not there, or was cut short before they were."""
    try:
        return float(took.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError):
        return None


def built_file(candidate: Candidate, folder: Path, device: str) -> Path | None:
    """Return what `build` writes for a candidate; None if there is nothing to build."""
    if candidate.model in PLANS:
        given = Subject.load(folder).files.get(candidate.model)  # an engine that was named
        return Path(given) if given is not None else folder / f"{NAME}.{candidate.precision}.plan"
    if candidate.backend == "aot":
        return folder / f"{NAME}.{candidate.precision}.{device.partition(':')[0]}.pt2"
    return None


def ready(candidate: Candidate, folder: Path, device: str, threads: int | None, batch: int, most: int) -> Ready:
    """Open a candidate; `batch` is what matrix products are made for, `most` the largest batch to come.

    Raises:
        QfaeError: it cannot be opened.

    """
    subject = Subject.load(folder)
    if candidate.model == "gemm":
        return _gemm(candidate, subject, device, threads, batch)
    engine, read = _engine(candidate, subject, folder, device, threads, most)
    images, _, _ = images_of(folder)

    def seconds(size: int, maps: bool) -> float:
        pixels = images[np.arange(size) % len(images)]
        start = time.perf_counter()
        engine.run(pixels, maps)
        return time.perf_counter() - start

    return Ready(seconds, engine, sum(path.stat().st_size for path in read if path.exists()))


def _gemm(candidate: Candidate, subject: Subject, device: str, threads: int | None, batch: int) -> Ready:
    products = [one._replace(rows=one.rows * batch) for one in subject.products]
    library = candidate.backend.partition("-")[0]
    gemm = Gemm(products, maker(library, candidate.precision, device, threads))
    return Ready(lambda size, maps: gemm.seconds(), None, 0, gemm.flop)


def _engine(
    candidate: Candidate, subject: Subject, folder: Path, device: str, threads: int | None, most: int
) -> tuple[Engine, list[Path]]:
    """Return the engine, and the files it was read from."""
    size = subject.image_size
    if candidate.model in ("onnx", "fp16", "int8"):
        from qfae_runtime.engines.backends import load_onnx

        path = folder / subject.files[candidate.model]
        files = [path, path.with_name(path.name + ".data")]
        return load_onnx(path, size, most, candidate.backend, device, threads), files
    built = built_file(candidate, folder, device)
    if candidate.model in PLANS and built is not None:
        from qfae_runtime.engines.tensorrt import TensorRtEngine

        plan = built.read_bytes()
        return TensorRtEngine(plan, size, most, backend="tensorrt", device=device, name=built.name), [built]
    import torch

    from benchmarks.speed import torch_engine

    if threads is not None:
        torch.set_num_threads(threads)
    if built is not None:
        return torch_engine.packaged(built, size, device), [built]
    ways = {"eager": torch_engine.eager, "captured": torch_engine.captured, "compile": torch_engine.compiled}
    return ways[candidate.backend](_graph(candidate, folder), size, device), _checkpoint_files(subject, folder)


def _graph(candidate: Candidate, folder: Path) -> Any:
    """Return the module that a candidate runs: the plain model, or the graph in its precision."""
    from benchmarks.speed.plain import PlainScorer
    from benchmarks.speed.torch_engine import for_torch
    from qfae_export.graph import InferenceGraph
    from qfae_train.checkpoint import build_scorer

    checkpoint, weights = opened(Subject.load(folder).asked, folder)
    if candidate.model == "plain":
        return PlainScorer(checkpoint, weights)
    graph = InferenceGraph(build_scorer(checkpoint, weights)).forget()
    return for_torch(graph, candidate.precision, candidate.streams)


def _checkpoint_files(subject: Subject, folder: Path) -> list[Path]:
    asked = subject.asked
    named = [asked.ckpt or str(folder / "random.pt"), *asked.encoders.values(), asked.perceptual]
    return [Path(one) for one in named if one is not None]
