"""The measurement: planted faults in an engine's outputs must be seen, wherever they are."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from io import StringIO
from typing import Self

import numpy as np
import pytest
import torch
from rich.console import Console

from qfae_export.errors import ExportError
from qfae_export.images import ParityImages
from qfae_export.parity import (
    ParityError,
    ParityReport,
    accepted,
    golden_of,
    link,
    measure,
    reference_scores,
    scale_of,
)
from qfae_runtime.arrays import UInt8
from qfae_runtime.contract import CONTRACTS
from qfae_runtime.engines.base import Scores
from qfae_runtime.errors import EngineError
from tests.export.tiny import config_of, pictures, scorer_of

SIZE = 8
COUNT = 10
Fault = Callable[[Scores, "list[int]"], object]


class Echo:
    """An engine that knows every image's right answer, and spoils what a fault makes of it. Keeps to Engine."""

    image_size, max_batch, backend, device, version = SIZE, COUNT, "echo", "cpu", "1"
    batches: tuple[int, ...] = (1, 3, COUNT)

    def __init__(self, images: ParityImages, reference: Scores, fault: Fault) -> None:
        self._numbers = {image.tobytes(): number for number, image in enumerate(images.pixels)}
        self._reference = reference
        self._fault = fault

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        numbers = [self._numbers[image.tobytes()] for image in images]
        answer = Scores(
            self._reference.score[numbers],
            self._reference.anomaly_map[numbers],
            self._reference.reconstruction[numbers],
        )
        self._fault(answer, numbers)
        return answer

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None: ...


@pytest.fixture
def images() -> ParityImages:
    labels = tuple(n % 2 == 1 for n in range(COUNT))
    return ParityImages(pictures(COUNT, SIZE), tuple(f"{n}.png" for n in range(COUNT)), "made up", labels)


@pytest.fixture
def reference() -> Scores:
    rng = np.random.default_rng(5)
    return Scores(
        rng.uniform(0.05, 0.5, COUNT).astype(np.float32),
        rng.uniform(0.02, 0.5, (COUNT, SIZE, SIZE)).astype(np.float32),
        rng.integers(0, 250, (COUNT, SIZE, SIZE, 3), dtype=np.uint8),
    )


def report_of(images: ParityImages, reference: Scores, fault: Fault) -> ParityReport:
    return measure(Echo(images, reference, fault), images, reference, CONTRACTS["fp32"])


def spoil(output: str, image: int, where: tuple[int, ...], change: Callable[[float], float]) -> Fault:
    """Change one value of one image, at whatever batch it comes."""

    def fault(answer: Scores, numbers: list[int]) -> None:
        array = getattr(answer, output)
        for row, number in enumerate(numbers):
            if number == image:
                array[(row, *where)] = change(array[(row, *where)])

    return fault


def test_equal_outputs_pass_and_every_image_counts(images: ParityImages, reference: Scores) -> None:
    seen: list[int] = []
    report = report_of(images, reference, lambda answer, numbers: seen.extend(numbers))
    assert report
    assert report.failures() == []
    assert report.batches == (1, 3, COUNT)
    singles, odd = [0, 9], [0, 4, 9]  # evenly spread
    assert seen == [*range(COUNT), *singles, *odd]
    assert [row.run_at_this_size for row in report.rows] == [2, 3, COUNT]
    assert report.worst.values["map_abs"] == 0
    assert report.worst.values["auroc_change"] == 0
    assert report.outputs is not None
    np.testing.assert_array_equal(report.outputs.score, reference.score)


class Buffered(Echo):
    """An engine with buffers of its own, which leaves one pixel of every image as it was filled."""

    byte: int | None = 0xFF

    def poison(self, byte: int | None = 0xFF) -> None:
        self.byte = byte


@pytest.mark.parametrize("unwritten", [True, False])
def test_a_pixel_that_is_never_written_is_found(images: ParityImages, reference: Scores, unwritten: bool) -> None:
    reference.reconstruction[:, 2, 3, 1] = 0xFF  # what the buffer happens to hold
    reference.reconstruction[:, 2, 3, 0] = 0x00

    def leave(answer: Scores, numbers: list[int]) -> None:
        if unwritten:
            answer.reconstruction[:, 2, 3, 1] = engine.byte or 0

    engine = Buffered(images, reference, leave)
    if not unwritten:
        assert measure(engine, images, reference, CONTRACTS["fp32"])
        return
    with pytest.raises(EngineError) as caught:
        measure(engine, images, reference, CONTRACTS["fp32"])
    assert str(caught.value).startswith(
        "output 'reconstruction': 10 of 1920 values were not written in a batch of 10; do not use this plan: "
    )
    assert engine.byte == 0xFF


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        pytest.param(
            spoil("anomaly_map", 9, (3, 5), lambda value: value + 2e-4),
            r"batch 1: map error, largest: 0\.0002 exceeds 0\.0001, worst at image 9, y 3, x 5 \(9\.png\): expected",
            id="one pixel off by 2e-4",
        ),
        pytest.param(
            spoil("score", 4, (), lambda value: value + 2e-4),
            r"batch 3: score error, largest: 0\.0002 exceeds 0\.0001, worst at image 4 \(4\.png\): ",
            id="one score off by 2e-4",
        ),
        pytest.param(
            spoil("anomaly_map", 0, (0, 0), lambda value: float("nan")),
            r"batch 10: anomaly_map: the engine has 1 values that are not finite, the first at index \(0, 0, 0\)",
            id="a NaN in a map",
        ),
        pytest.param(
            spoil("score", 9, (), lambda value: float("inf")),
            r"batch 10: score: the engine has 1 values that are not finite",
            id="an infinite score of the last image",
        ),
        pytest.param(
            spoil("reconstruction", 2, (1, 1, 2), lambda value: value + 2),
            r"reconstruction, grey levels: 2 exceeds 1, worst at image 2, y 1, x 1, channel 2",
            id="two grey levels",
        ),
    ],
)
def test_planted_faults_are_named(images: ParityImages, reference: Scores, fault: Fault, sentence: str) -> None:
    report = report_of(images, reference, fault)
    assert not report
    assert any(re.search(sentence, failure) for failure in report.failures()), report.failures()


def test_relative_error_counts_where_values_are_small(images: ParityImages, reference: Scores) -> None:
    reference.anomaly_map[4, 2, 2] = 0.02
    report = report_of(images, reference, spoil("anomaly_map", 4, (2, 2), lambda value: value + 5e-5))
    assert len(report.failures()) == 2  # the absolute bound holds; the relative one breaks wherever image 4 is run
    assert "map error, relative: 0.0025 exceeds 0.001, worst at image 4, y 2, x 2" in report.failures()[0]


def test_relative_error_does_not_count_below_the_floor(images: ParityImages, reference: Scores) -> None:
    reference.anomaly_map[4, 2, 2] = 0.0005
    assert report_of(images, reference, spoil("anomaly_map", 4, (2, 2), lambda value: value + 5e-5))


def test_a_fault_at_one_batch_size_only_is_seen(images: ParityImages, reference: Scores) -> None:
    def fault(answer: Scores, numbers: list[int]) -> None:
        if len(numbers) == 3:
            answer.score[2] += 2e-4

    [failure] = report_of(images, reference, fault).failures()
    assert failure.startswith("batch 3: score error, largest")
    assert "at image 9" in failure


def test_a_map_of_another_image_is_seen(images: ParityImages, reference: Scores) -> None:
    def fault(answer: Scores, numbers: list[int]) -> None:
        answer.anomaly_map[:] = np.roll(answer.anomaly_map, 1, axis=0)

    failures = report_of(images, reference, fault).failures()
    assert any("map cosine, p1" in failure for failure in failures)
    assert all(": map " in failure and ("batch 3:" in failure or "batch 10:" in failure) for failure in failures)


def test_every_size_that_an_engine_has_kernels_for_is_measured(images: ParityImages, reference: Scores) -> None:
    class Plan(Echo):
        batches = (1, 2, 4, COUNT)

    def fault(answer: Scores, numbers: list[int]) -> None:
        if len(numbers) == 2:
            answer.anomaly_map[:] = 0

    report = measure(Plan(images, reference, fault), images, reference, CONTRACTS["fp16"])
    assert report.batches == (1, 2, 4, COUNT)
    assert report.failures()
    assert all(text.startswith("batch 2: map ") for text in report.failures())


def test_a_largest_batch_beyond_the_images_is_really_run(images: ParityImages, reference: Scores) -> None:
    class Large(Echo):
        max_batch = 25
        batches = (1, 3, 16, 25)

    sizes: list[int] = []
    report = measure(
        Large(images, reference, lambda answer, numbers: sizes.append(len(numbers))),
        images,
        reference,
        CONTRACTS["fp32"],
    )
    assert report
    assert sizes == [25, 1, 1, 3, 16]
    assert report.outputs is not None
    assert len(report.outputs.score) == COUNT


def test_few_images_at_a_small_batch_are_not_diluted(images: ParityImages, reference: Scores) -> None:
    def fault(answer: Scores, numbers: list[int]) -> None:
        if len(numbers) == 1:
            answer.anomaly_map[:] = answer.anomaly_map[:, ::-1]

    many = ParityImages(
        pictures(200, SIZE), tuple(map(str, range(200))), "made up", tuple(n % 2 == 1 for n in range(200))
    )
    rng = np.random.default_rng(5)
    outputs = Scores(
        rng.uniform(0.05, 0.5, 200).astype(np.float32),
        rng.uniform(0.02, 0.5, (200, SIZE, SIZE)).astype(np.float32),
        rng.integers(0, 250, (200, SIZE, SIZE, 3), dtype=np.uint8),
    )
    report = measure(Echo(many, outputs, fault), many, outputs, CONTRACTS["fp16"])
    assert any(text.startswith("batch 1: map cosine, p1") for text in report.failures())


def test_lost_images_are_seen(images: ParityImages, reference: Scores) -> None:
    class Loses(Echo):
        def run(self, images: UInt8, maps: bool = True) -> Scores:
            answer = super().run(images, maps)
            return Scores(answer.score[:-1], answer.anomaly_map[:-1], answer.reconstruction[:-1])

    report = measure(Loses(images, reference, lambda *_: None), images, reference, CONTRACTS["fp32"])
    assert "batch 10: score: expected shape (10,), got (9,)" in report.failures()


def test_table_shows_errors_bounds_and_faults(images: ParityImages, reference: Scores) -> None:
    shown = StringIO()
    console = Console(width=100, file=shown)
    console.print(report_of(images, reference, spoil("score", 1, (), lambda value: value + 2e-4)).table())
    console.print(report_of(images, reference, spoil("score", 1, (), lambda value: float("nan"))).table())
    for text in ("on 10 images, contract fp32", "score error, largest", "batch 3", "2.0e-04", "≤ 0.0001", "none"):
        assert text in shown.getvalue()


def test_the_least_tolerance_that_would_have_passed(images: ParityImages, reference: Scores) -> None:
    report = report_of(images, reference, spoil("score", 4, (), lambda value: value + 2e-4))
    assert report.worst.values["score_abs"] == pytest.approx(2e-4, rel=1e-3)
    enough = dataclasses.replace(report.contract, bounds={"score_abs": report.worst.values["score_abs"] or 0.0})
    assert enough.holds(report.worst.values)


def test_links_name_the_guilty_step(images: ParityImages, reference: Scores) -> None:
    scale = scale_of(images, reference)
    good = link("PyTorch FP32", "graph FP32", reference, reference, "fp32", scale, images.labels)
    spoilt = reference._replace(score=reference.score + np.float32(0.01))
    bad = link("graph FP32", "ONNX FP32", reference, spoilt, "fp32", scale, images.labels)
    lost = link("ONNX FP32", "ONNX FP16", reference, reference.of([0, 1]), "fp16", scale, images.labels)
    assert (good.passed, bad.passed, lost.passed) == (True, False, False)
    report = dataclasses.replace(report_of(images, reference, lambda *_: None), links=(good, bad, lost))
    assert report.guilty() == "graph FP32 -> ONNX FP32"
    shown = StringIO()
    Console(width=100, file=shown).print(report.chain())
    assert "graph FP32 → ONNX FP32" in shown.getvalue()
    assert "undefined" in shown.getvalue()


def test_coloured_copies_do_not_count_in_the_scale(images: ParityImages, reference: Scores) -> None:
    with_two = dataclasses.replace(images, coloured=2)
    assert scale_of(with_two, reference) == scale_of(
        dataclasses.replace(images, pixels=images.pixels[:8], labels=images.labels[:8]), reference.of(slice(8))
    )


def test_images_that_hardly_differ_are_said_to(images: ParityImages, reference: Scores) -> None:
    alike = reference._replace(score=(0.5 + reference.score * 1e-4).astype(np.float32))
    for which, told in ((alike, True), (reference, False)):
        report = report_of(images, which, spoil("score", 1, (), lambda value: value + 0.01))
        with pytest.raises(ParityError) as caught:
            accepted(report, "tiny.onnx", "onnxruntime")
        assert ("these images' scores hardly differ (interquartile range " in str(caught.value)) is told


def test_golden_images_span_the_scores() -> None:
    reference = Scores(
        np.random.default_rng(1).permutation(40).astype(np.float32),
        np.arange(40, dtype=np.float32)[:, None, None].repeat(SIZE, 1).repeat(SIZE, 2),
        np.zeros((40, SIZE, SIZE, 3), np.uint8),
    )
    images = ParityImages(pictures(40, SIZE), tuple(map(str, range(40))), "made up", (None,) * 40)
    golden = golden_of(images, reference)
    assert len(golden.images) == 16
    assert (golden.scores.score[0], golden.scores.score[-1]) == (0, 39)
    assert np.all(np.diff(golden.scores.score) >= 2)
    for image, anomaly_map in zip(golden.images, golden.scores.anomaly_map, strict=True):
        assert np.array_equal(image, images.pixels[int(anomaly_map[0, 0])])


def test_reference_is_the_training_modules_in_float32() -> None:
    scorer, images = scorer_of(config_of()), pictures(11)
    scores = reference_scores(scorer, images)
    want = scorer(torch.from_numpy(images))
    np.testing.assert_allclose(scores.score, want.score.numpy(), atol=1e-6)
    assert scores.anomaly_map.shape == (11, 32, 32)
    assert scores.reconstruction.dtype == np.uint8
    with pytest.raises(ExportError, match="the reference must be float32"):
        reference_scores(scorer.half(), images)


def test_a_diverged_checkpoint_is_named_as_the_cause() -> None:
    scorer = scorer_of(config_of())
    with torch.no_grad():
        scorer.autoencoder.decoder.predict.bias.fill_(float("nan"))
    with pytest.raises(ExportError, match=r"gives 3 values that are not finite .* training diverged"):
        reference_scores(scorer, pictures(3))
