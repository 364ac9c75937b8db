"""Faults that FP16 cannot bear, planted one by one: a bisection must name them, no more and no less.

All engines are real ones of ONNX Runtime, their files retyped (test_retype.py holds retyped files against traced ones).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import qfae_export.export
import qfae_export.trials
import tests.export.tiny
from qfae_export.bisect import MOST_TRIALS, Bisected, bisect
from qfae_export.graph import InferenceGraph
from qfae_export.halves import CompletedHalf
from qfae_export.parity import measure
from qfae_export.parity_report import ROUNDED, ParityError, ParityReport, link
from qfae_export.precision import FP16, Precision
from qfae_export.reference import reference_of
from qfae_export.retype import Retyper
from qfae_export.rounded import RoundedEngine
from qfae_runtime.agreement import Reference
from qfae_runtime.arrays import UInt8
from qfae_runtime.contract import CONTRACTS
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_runtime.errors import EngineError
from tests.export.planted import (
    CONFIG,
    Fault,
    cancellation_in_decoder_1,
    large_bias_in_encoder_1,
    overflow_in_perceptual_2,
    parity_images,
    planted,
    retyper_of,
    write_untraced,
)
from tests.export.test_cli import run
from tests.export.tiny import SIZE, checkpoint_file, pictures


@pytest.fixture(autouse=True)
def _untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qfae_export.trials, "Retyper", retyper_of)
    monkeypatch.setattr(qfae_export.trials, "write_onnx", write_untraced)
    monkeypatch.setattr(qfae_export.export, "write_onnx", write_untraced)


def open_engine(path: Path) -> Engine:
    return OnnxRuntimeEngine(path, SIZE, max_batch=6, threads=1)


@dataclass
class Case:
    """A model, its FP16 engine and how that was measured."""

    path: Path
    graph: InferenceGraph
    reference: Reference
    failed: ParityReport

    def bisect(self, opener: Callable[[Path], Engine] = open_engine, **options: Any) -> Bisected:
        return bisect(self.graph, self.failed, self.reference, opener, self.path, **options)

    def measured(self, kept: tuple[str, ...], path: Path) -> ParityReport:
        """Measure a policy apart from any bisection."""
        write_untraced(self.graph.at(Precision("fp16", kept)), path)
        with open_engine(path) as engine:
            return measure(engine, self.failed.images, self.reference, CONTRACTS["fp16"])


def case_of(folder: Path, *faults: Fault) -> Case:
    scorer, images = planted(*faults), parity_images()
    graph, path = InferenceGraph(scorer), folder / "tiny.fp16.onnx"
    reference = reference_of(scorer, graph, images).reference
    write_untraced(graph.at(FP16), path)
    with open_engine(path) as engine:
        return Case(path, graph, reference, measure(engine, images, reference, CONTRACTS["fp16"]))


FAULTS = [
    ([overflow_in_perceptual_2], ("perceptual.2.fc1", "perceptual.2.fc2")),
    ([cancellation_in_decoder_1], ("decoder.1.fc1",)),  # what it takes from its LayerNorm is FP32 by rule
    ([large_bias_in_encoder_1], ("encoder.1.fc2",)),
    (
        [overflow_in_perceptual_2, cancellation_in_decoder_1],
        ("decoder.1.fc1", "perceptual.2.fc1", "perceptual.2.fc2"),
    ),
]


@pytest.mark.parametrize(("faults", "guilty"), FAULTS)
def test_names_exactly_what_must_stay_fp32(faults: list[Fault], guilty: tuple[str, ...], tmp_path: Path) -> None:
    case = case_of(tmp_path, *faults)
    assert not case.failed
    found = case.bisect()
    assert found.precision == Precision("fp16", guilty)
    assert found.minimal
    assert len(found.trials) <= 12 * len(faults)  # of 46 operations that FP16 rounds


@pytest.mark.parametrize(("faults", "guilty"), FAULTS)
def test_each_place_named_is_needed(faults: list[Fault], guilty: tuple[str, ...], tmp_path: Path) -> None:
    case = case_of(tmp_path, *faults)
    assert case.measured(guilty, tmp_path / "all.onnx")
    for place in guilty:
        rest = tuple(one for one in guilty if one != place)
        assert not case.measured(rest, tmp_path / "less.onnx"), place


def test_writes_the_engine_it_found_and_measures_it_at_every_batch_size(tmp_path: Path) -> None:
    case = case_of(tmp_path, overflow_in_perceptual_2)
    before = case.path.stat().st_size
    found = case.bisect()
    assert found.files == (case.path,)
    assert found.report
    assert found.report.batches == (1, 2, 4, 6)
    with open_engine(case.path) as engine:
        again = measure(engine, case.failed.images, case.reference, CONTRACTS["fp16"])
    assert again.worst.values == found.after.values
    assert found.before.fault == "score: the engine has 12 values that are not finite, the first at index (0,)"
    assert found.cost.bytes == case.path.stat().st_size - before
    assert list(tmp_path.iterdir()) == [case.path]


def test_says_what_fp32_costs(tmp_path: Path) -> None:
    case = case_of(tmp_path, overflow_in_perceptual_2)
    cost = case.bisect().cost
    with FlopCounterMode(display=False) as counter:
        case.graph(torch.from_numpy(pictures(1)))
    tokens = 2 * (17 + 5)  # of image and reconstruction, at two patch sizes
    assert cost.products == pytest.approx(2 * (2 * tokens * 32 * 128) / counter.get_total_flops())
    assert (cost.units, cost.of_units) == (2, 46)
    weights = 2 * (2 * 32 * 128 + 128 + 32)  # two bytes more for each
    assert cost.bytes == pytest.approx(weights, abs=1000)  # casts go, where FP32 meets the stream


def test_a_model_that_passes_needs_no_bisection(tmp_path: Path) -> None:
    case = case_of(tmp_path)
    assert case.failed, "the measurement says that FP16 holds"
    steps: list[str] = []
    found = case.bisect(say=steps.append)
    assert (found.precision, found.trials, found.cost.units, found.cost.products, steps) == (FP16, (), 0, 0.0, [])


def test_says_that_fp16_is_not_at_fault_where_fp32_does_not_cure(tmp_path: Path) -> None:
    case = case_of(tmp_path, overflow_in_perceptual_2)
    whole = planted()
    other = reference_of(whole, InferenceGraph(whole), parity_images()).reference
    case = replace(case, reference=other)
    with pytest.raises(ParityError) as caught:
        case.bisect()
    text = str(caught.value)
    assert text.startswith(
        "tiny.fp16.onnx: FP16 is not at fault: with every stage in FP32 the contract is broken all the same "
        "(all images: score error as distance, mean: "
    )
    assert text.endswith("; leave out --fp16 and --bisect, and see which step breaks it")
    assert not caught.value.report


def test_says_each_trial_in_one_line(tmp_path: Path) -> None:
    steps: list[str] = []
    case_of(tmp_path, overflow_in_perceptual_2).bisect(say=steps.append)
    assert steps[0] == "tracing the graph for trials"
    assert steps[1].startswith(
        "trial 1: FP32 in encoder, qformer, decoder, perceptual: passes on 12 images: score error as distance, mean "
    )
    half = re.compile(
        r"trial \d: FP32 in perceptual\.2\.fc[12]: fails on 8 images: "
        r"score: the engine has 8 values that are not finite, the first at index \(0,\)"
    )
    assert any(map(half.fullmatch, steps)), steps
    assert steps[-2] == "writing tiny.fp16.onnx with FP32 in 2 places"
    assert all("\n" not in step and len(step) < 250 for step in steps)


def test_out_of_trials_takes_the_least_that_passed(tmp_path: Path) -> None:
    case = case_of(tmp_path, overflow_in_perceptual_2)
    found = case.bisect(most_trials=2)
    assert found.precision.kept == ("perceptual.2",)
    assert found.report
    assert not found.minimal


class _Broken:
    """An engine that is wrong at batch 1."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.image_size, self.max_batch, self.version = engine.image_size, engine.max_batch, engine.version
        self.backend, self.device, self.batches = engine.backend, engine.device, engine.batches

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        scores = self._engine.run(images, maps)
        return scores if len(images) > 1 else scores._replace(score=scores.score + 1)

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def test_an_answer_that_fails_in_full_gives_way_to_whole_blocks(tmp_path: Path) -> None:
    case = case_of(tmp_path, overflow_in_perceptual_2)
    built: list[Path] = []

    def first_answer_is_wrong_at_batch_1(path: Path) -> Engine:
        built.extend([path] if path == case.path else [])
        return _Broken(open_engine(path)) if path == case.path and len(built) == 1 else open_engine(path)

    found = case.bisect(first_answer_is_wrong_at_batch_1)
    assert found.precision.kept == ("perceptual.2",)
    assert found.report
    assert not found.minimal
    assert [trial.passed for trial in found.trials[-2:]] == [False, True]


def test_what_the_engine_hides_is_found_by_rounding(tmp_path: Path) -> None:
    """ONNX Runtime on a CPU leaves rounding out; here an engine that leaves out all of it."""
    case = case_of(tmp_path, overflow_in_perceptual_2)
    images = case.failed.images

    def exact(path: Path) -> Engine:
        return RoundedEngine(case.graph, Precision("fp16", tuple(case.graph.units())), max_batch=6)

    rounded = RoundedEngine(case.graph, FP16, 12).run(images.pixels)
    broken = link("graph FP32", ROUNDED, case.reference, rounded, "fp16", images.labels, len(images))
    report = measure(exact(case.path), images, case.reference, CONTRACTS["fp16"])
    assert report
    case.failed = replace(report, links=(broken,))
    found = case.bisect(exact)
    assert found.precision.kept == ("perceptual.2.fc1", "perceptual.2.fc2")
    assert found.minimal
    assert found.rounded is not None
    assert found.rounded[0].fault is not None
    assert CONTRACTS["fp16"].holds(found.rounded[1].values)


def test_half_a_graph_is_bisected_by_its_engine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, images, path = planted(cancellation_in_decoder_1), parity_images(), tmp_path / "half.onnx"
    graph, other = InferenceGraph(scorer, "reconstruction"), InferenceGraph(scorer, "scorer")
    retyper = Retyper(graph)  # traced: it is another structure than the other tests'
    monkeypatch.setattr(qfae_export.trials, "Retyper", lambda graph: retyper)
    monkeypatch.setattr(qfae_export.trials, "write_onnx", lambda graph, path: retyper.write(graph.precision, path))

    def half(path: Path) -> Engine:
        return CompletedHalf(path, "reconstruction", other, SIZE, max_batch=6)

    reference = reference_of(scorer, InferenceGraph(scorer), images).reference
    with half(retyper.write(FP16, path)[0]) as engine:
        failed = measure(engine, images, reference, CONTRACTS["fp16"])
    found = Case(path, graph, reference, failed).bisect(half)
    assert found.precision.kept == ("decoder.1.fc1",)
    assert found.rounded is None
    assert found.to_dict()["rounded"] is None


def test_a_mixture_that_the_backend_cannot_run_is_a_trial_that_fails(tmp_path: Path) -> None:
    case = case_of(tmp_path, overflow_in_perceptual_2)
    opened: list[Path] = []

    def no_kernel_for_the_third(path: Path) -> Engine:
        opened.append(path)
        if len(opened) == 3:
            raise EngineError("no kernel for this mixture")
        return open_engine(path)

    found = case.bisect(no_kernel_for_the_third)
    assert found.trials[2].kept == ("perceptual.2",)
    assert found.trials[2].agreement.fault == "no kernel for this mixture"
    assert found.report
    assert case.measured(found.precision.kept, tmp_path / "again.onnx")


def test_an_export_goes_on_with_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()  # nothing is retyped here but trials: the answer's file is traced, as a user's is
    monkeypatch.setattr(tests.export.tiny, "scorer_of", lambda config: planted(cancellation_in_decoder_1))
    checkpoint = checkpoint_file(tmp_path / "tiny.pt", CONFIG)
    out = tmp_path / "engines"
    monkeypatch.setattr("rich.console.Console.width", 200)
    arguments = ("--ckpt", checkpoint, "--fp16", "--format", "onnx", "--max-batch", 6, "--out", out)

    refused = run(capsys, *arguments)
    assert refused.code == 1
    assert "pass --bisect to find what must stay FP32" in refused.err
    ran = run(capsys, *arguments, "--bisect")
    assert ran.code == 0, ran.err

    manifest = json.loads((out / "tiny.json").read_text())
    precision = manifest["precision"]["tiny.fp16.onnx"]
    assert precision["kept_fp32"] == ["decoder.1.fc1"]
    assert precision["bisected"]["kept_fp32"] == precision["kept_fp32"]
    assert precision["bisected"]["minimal"] is True
    bounds = CONTRACTS["fp16"].bounds
    for measured in (precision["bisected"]["engine"], precision["bisected"]["rounded"]):
        for name in ("score_distance", "map_angle"):
            assert measured["before"]["measured"][name] > bounds[name] > measured["after"]["measured"][name], name
    assert set(precision["bisected"]["cost"]) == {
        "operations_fp32",
        "operations",
        "bytes_added",
        "bytes_fp16",
        "matrix_products_fp32_share",
    }
    [certificate] = [one for one in manifest["certificate"] if one["engine"] == "tiny.fp16.onnx"]
    assert certificate["passed"]
    assert certificate["measured"] == precision["bisected"]["engine"]["after"]["measured"]
    assert sorted(file.name for file in out.iterdir()) == [
        "tiny.fp16.onnx",
        "tiny.golden.npz",
        "tiny.json",
        "tiny.onnx",
    ]

    shown = " ".join(ran.out.split())
    assert f"bisected in {precision['bisected']['trials']} trials: FP32 stays in 1 place" in shown
    assert "decoder 1.fc1 operations kept in FP32 1 of 46 matrix products in FP32 " in shown
    for what in ("engine", "rounding alone"):
        for when in ("before", "after"):
            start = rf" {what}, {when} (score|map|reconstruction|stress images:|flips)[^(]* [\d.e-]+ \([≤≥] [\d.]+\); "
            assert re.search(start, shown), shown
    assert MOST_TRIALS > precision["bisected"]["trials"] > 3


def test_the_table_names_a_whole_stage_so_and_tells_an_early_end(tmp_path: Path) -> None:
    case = case_of(tmp_path, overflow_in_perceptual_2)
    found = case.bisect(most_trials=1)
    assert found.precision.kept == ("perceptual",)
    console = Console(width=160)
    with console.capture() as capture:
        console.print(found.table())
    text = " ".join(capture.get().split())
    assert "FP32 stays in 1 place perceptual all of it perhaps more than must be: the search ended early" in text
