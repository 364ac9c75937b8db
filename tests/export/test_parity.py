"""The measurement: planted faults in an engine's outputs must be seen, wherever they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from qfae_export.images import ParityImages
from qfae_export.parity import golden_of, measure
from qfae_export.parity_report import ParityReport
from qfae_runtime.agreement import Reference
from qfae_runtime.arrays import UInt8
from qfae_runtime.contract import CONTRACTS
from qfae_runtime.coverage import calls_of
from qfae_runtime.engines.base import Scores
from qfae_runtime.errors import EngineError
from tests.export.echo import COUNT, OWN, SIZE, Echo, Fault, bound, made_up, made_up_images, spoil


@pytest.fixture
def images() -> ParityImages:
    return made_up_images()


@pytest.fixture
def reference() -> Reference:
    return made_up()


def report_of(images: ParityImages, reference: Reference, fault: Fault) -> ParityReport:
    return measure(Echo(images, reference.scores, fault), images, reference, CONTRACTS["fp32"])


def test_equal_outputs_pass_and_every_image_counts(images: ParityImages, reference: Reference) -> None:
    seen: list[list[int]] = []
    report = report_of(images, reference, lambda answer, numbers: seen.append(numbers))
    assert report
    assert report.failures() == []
    assert report.batches == (1, 3, COUNT)
    by_score = [int(number) for number in np.argsort(reference.scores.score)]
    lowest, highest = by_score[0], by_score[-1]
    assert sorted(seen[0]) == list(range(COUNT))
    assert seen[1] == [highest] * COUNT
    assert {lowest, highest} <= set(seen[2])
    assert len(set(seen[2])) == 3
    assert seen[3] == [highest] * 3
    assert sorted(seen[4:]) == sorted([[lowest], [highest]])
    assert [row.run_at_this_size for row in report.rows] == [2, 3, COUNT]
    assert report.worst.values["map_abs"] == 0
    assert report.worst.values["auroc_change"] == 0
    assert report.outputs is not None
    np.testing.assert_array_equal(report.outputs.score, reference.scores.score)


@pytest.mark.parametrize("batches", [(1, 3, COUNT), (1, 2, 4, 8, COUNT), (5, COUNT), (1,), (1, 7, 40)])
def test_every_size_and_every_place_is_met(
    images: ParityImages, reference: Reference, batches: tuple[int, ...]
) -> None:
    class Sized(Echo):
        max_batch = max(batches)

    Sized.batches = batches
    highest, images_met = int(reference.scores.score.argmax()), Counter[int]()
    places: Counter[tuple[int, int]] = Counter()
    others: dict[int, set[int]] = {size: set() for size in batches}

    def note(answer: Scores, numbers: list[int]) -> None:
        images_met.update(numbers)
        others[len(numbers)].update(numbers)
        places.update((len(numbers), place) for place, number in enumerate(numbers) if number == highest)

    assert measure(Sized(images, reference.scores, note), images, reference, CONTRACTS["fp32"])
    assert set(images_met) == set(range(COUNT))
    for size in batches:
        assert all(places[size, place] for place in range(size)), size
        assert int(reference.scores.score.argmin()) in others[size]
        assert len(others[size]) >= min(COUNT, max(size, 2))


class Buffered(Echo):
    """An engine with buffers of its own, which leaves one pixel of every image as it was filled."""

    byte: int | None = 0xFF

    def poison(self, byte: int | None = 0xFF) -> None:
        self.byte = byte


@pytest.mark.parametrize("unwritten", [True, False])
def test_a_pixel_that_is_never_written_is_found(images: ParityImages, reference: Reference, unwritten: bool) -> None:
    reference.scores.reconstruction[:, 2, 3, 1] = 0xFF  # what the buffer happens to hold
    reference.scores.reconstruction[:, 2, 3, 0] = 0x00

    def leave(answer: Scores, numbers: list[int]) -> None:
        if unwritten:
            answer.reconstruction[:, 2, 3, 1] = engine.byte or 0

    engine = Buffered(images, reference.scores, leave)
    if not unwritten:
        assert measure(engine, images, reference, CONTRACTS["fp32"])
        return
    with pytest.raises(EngineError) as caught:
        measure(engine, images, reference, CONTRACTS["fp32"])
    assert str(caught.value).startswith(
        "output 'reconstruction': 10 of 1920 values were not written in a batch of 10; do not use this plan: "
    )
    assert engine.byte == 0xFF


BY = 50 * OWN
"""An error beyond PyTorch's own in one value: more than any bound on single values."""


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        pytest.param(
            spoil("anomaly_map", 9, (3, 5), lambda value: value + BY),
            rf"batch 10: map error, worst pixel / PyTorch's own: 50 exceeds {bound('map_pixel')}, "
            r"worst at image 9, y 3, x 5 \(9\.png\): expected",
            id="one pixel off",
        ),
        pytest.param(
            spoil("score", 4, (), lambda value: value + BY),
            rf"batch 10: score error, worst image / PyTorch's own: 50 exceeds {bound('score_worst')}, "
            r"worst at image 4 \(4\.png\): expected",
            id="one score off",
        ),
        pytest.param(
            spoil("anomaly_map", 4, ..., lambda values: values + BY),
            rf"all images: map error, worst image / PyTorch's own: 50 exceeds {bound('map_worst')}, "
            r"worst at image 4, y \d, x \d \(4\.png\): expected",
            id="one map off",
        ),
        pytest.param(
            spoil("anomaly_map", 0, (0, 0), lambda value: float("nan")),
            r"batch 10: anomaly_map: the engine has \d+ values that are not finite, the first at index \(",
            id="a NaN in a map",
        ),
        pytest.param(
            spoil("score", 9, (), lambda value: float("inf")),
            r"batch 10: score: the engine has \d+ values that are not finite",
            id="an infinite score of the last image",
        ),
        pytest.param(
            spoil("reconstruction", 2, (1, 1, 2), lambda value: value + 2),
            r"reconstruction, grey levels: 2 exceeds 1, worst at image 2, y 1, x 1, channel 2 \(2\.png\)",
            id="two grey levels",
        ),
        pytest.param(
            spoil("reconstruction", 2, ..., lambda values: values + 1),
            rf"reconstruction, worst image / PyTorch's own: \d+ exceeds {bound('reconstruction_worst')}, "
            r"worst at image 2, y \d, x \d, channel \d \(2\.png\)",
            id="one grey level everywhere",
        ),
    ],
)
def test_planted_faults_are_named(images: ParityImages, reference: Reference, fault: Fault, sentence: str) -> None:
    report = report_of(images, reference, fault)
    assert not report
    assert any(re.search(sentence, failure) for failure in report.failures()), report.failures()


@pytest.mark.parametrize(
    ("output", "quantity", "column"),
    [("score", "score_typical", 0), ("anomaly_map", "map_typical", 1)],
)
@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_an_error_of_every_image_is_held_tighter_than_one_of_a_single_image(
    images: ParityImages, reference: Reference, output: str, quantity: str, column: int, factor: float
) -> None:
    """The typical error is a mean over the images: a wrong constant shows in it."""
    by = factor * CONTRACTS["fp32"].bounds[quantity] * OWN

    def fault(answer: Scores, numbers: list[int]) -> None:
        getattr(answer, output)[:] += np.float32(by)

    failures = report_of(images, reference, fault).failures()
    titles = {"score_typical": "score error, typical", "map_typical": "map error, typical"}
    assert [text.partition(" / ")[0] for text in failures] == (
        [] if factor < 1 else [f"all images: {titles[quantity]}"]
    )
    assert column in (0, 1)


def test_the_error_of_an_image_is_in_units_of_its_own_yardstick(images: ParityImages, reference: Reference) -> None:
    """Where PyTorch FP32 is a hundred times farther from the truth, so may an engine be."""
    assert reference.yardstick is not None
    fault = spoil("score", 4, (), lambda value: value + BY)
    assert not report_of(images, reference, fault)
    for table in reference.yardstick:
        table[4] *= 100
    assert report_of(images, reference, fault)


def test_a_bound_that_pytorch_breaks_itself_is_left_out_and_no_other(
    images: ParityImages, reference: Reference
) -> None:
    two_levels = spoil("reconstruction", 2, (1, 1, 2), lambda value: value + 2)
    engine = Echo(images, reference.scores, two_levels)
    pytorch = reference.compare(engine.run(images.pixels), images.labels)
    assert not measure(engine, images, reference, CONTRACTS["fp32"])
    report = measure(engine, images, reference, CONTRACTS["fp32"], pytorch)
    assert report, report.failures()
    assert report.contract.bounds == {
        name: bound for name, bound in CONTRACTS["fp32"].bounds.items() if name != "reconstruction_levels"
    }
    worse = Echo(images, reference.scores, spoil("score", 4, (), lambda value: value + BY))
    assert not measure(worse, images, reference, CONTRACTS["fp32"], pytorch)


def only(condition: Callable[[list[int], int], bool]) -> Fault:
    """A score and its map off in the rows that are named, by the numbers of the images of a call and the row."""

    def fault(answer: Scores, numbers: list[int]) -> None:
        for row in range(len(numbers)):
            if condition(numbers, row):
                answer.score[row] += BY
                answer.anomaly_map[row] += BY

    return fault


class Sixteen(Echo):
    """An engine that is run at every power of two."""

    max_batch = 16
    batches = (1, 2, 4, 8, 16)


@pytest.mark.parametrize("size", Sixteen.batches)
def test_a_fault_at_one_size_only_is_named_by_it(images: ParityImages, reference: Reference, size: int) -> None:
    engine = Sixteen(images, reference.scores, only(lambda numbers, row: len(numbers) == size))
    failures = measure(engine, images, reference, CONTRACTS["fp32"]).failures()
    assert {text.partition(":")[0] for text in failures} - {"all images"} == {f"batch {size}"}
    assert any(re.search(r"worst at image \d+ \(\d+\.png\)", text) for text in failures)


@pytest.mark.parametrize("size", Sixteen.batches)
def test_a_fault_in_one_place_of_a_batch_is_named_by_its_size(
    images: ParityImages, reference: Reference, size: int
) -> None:
    highest = int(reference.scores.score.argmax())
    for place in range(size):
        fault = only(lambda numbers, row, place=place: (len(numbers), row) == (size, place))  # type: ignore[misc]
        engine = Sixteen(images, reference.scores, fault)
        failures = measure(engine, images, reference, CONTRACTS["fp32"]).failures()
        assert any(text.startswith(f"batch {size}: score error, worst image") for text in failures), place
        # Wherever the place is, one of its images is the one with the highest score.
        engine = Sixteen(
            images,
            reference.scores,
            only(lambda numbers, row, place=place: (len(numbers), row, numbers[row]) == (size, place, highest)),  # type: ignore[misc]
        )
        failures = measure(engine, images, reference, CONTRACTS["fp32"]).failures()
        assert any(f"batch {size}: score error, worst" in text and f"({highest}.png)" in text for text in failures)


def test_a_fault_of_the_highest_score_alone_is_seen_at_every_size(images: ParityImages, reference: Reference) -> None:
    highest = int(reference.scores.score.argmax())
    engine = Sixteen(images, reference.scores, only(lambda numbers, row: numbers[row] == highest))
    failures = measure(engine, images, reference, CONTRACTS["fp32"]).failures()
    for size in Sixteen.batches:
        assert any(
            text.startswith(f"batch {size}: score error, worst image") and f"({highest}.png)" in text
            for text in failures
        ), size


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("number", [0, 5, 13])
def test_a_fault_on_one_stress_image_alone_is_seen_and_named(precision: str, number: int) -> None:
    images = made_up_images().with_stress()
    reference = made_up(images)
    wrong = COUNT + number
    change = {"score": 0.4, "anomaly_map": 0.4}
    for output, by in change.items():
        where = () if output == "score" else ...
        fault = spoil(output, wrong, where, lambda value, by=by: value + by)  # type: ignore[misc]
        report = measure(Echo(images, reference.scores, fault), images, reference, CONTRACTS[precision])
        assert not report, output
        assert any(f"({images.names[wrong]})" in text for text in report.failures()), report.failures()
    assert images.names[wrong].startswith("stress image: ")


def test_a_map_of_another_image_is_seen(images: ParityImages, reference: Reference) -> None:
    def fault(answer: Scores, numbers: list[int]) -> None:
        answer.anomaly_map[:] = np.roll(answer.anomaly_map, 1, axis=0)

    failures = report_of(images, reference, fault).failures()
    assert any("map cosine, p1" in text for text in failures)
    assert all(": map " in text and not text.startswith("batch 1:") for text in failures)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_size_that_an_engine_has_kernels_for_is_measured(
    images: ParityImages, reference: Reference, precision: str
) -> None:
    class Plan(Echo):
        batches = (1, 2, 4, COUNT)

    def fault(answer: Scores, numbers: list[int]) -> None:
        if len(numbers) == 2:
            answer.anomaly_map[:] = 0

    report = measure(Plan(images, reference.scores, fault), images, reference, CONTRACTS[precision])
    assert report.batches == (1, 2, 4, COUNT)
    assert report.failures()
    assert all(text.startswith("batch 2: map ") for text in report.failures())


def test_a_largest_batch_beyond_the_images_is_really_run(images: ParityImages, reference: Reference) -> None:
    class Large(Echo):
        max_batch = 25
        batches = (1, 3, 16, 25)

    sizes: list[int] = []
    engine = Large(images, reference.scores, lambda answer, numbers: sizes.append(len(numbers)))
    report = measure(engine, images, reference, CONTRACTS["fp32"])
    assert report
    assert sizes == [25, 25, 16, 16, 3, 3, 1, 1]
    assert report.outputs is not None
    assert len(report.outputs.score) == COUNT


def test_few_images_at_a_small_batch_are_not_diluted() -> None:
    def fault(answer: Scores, numbers: list[int]) -> None:
        if len(numbers) == 1:
            answer.anomaly_map[:] = answer.anomaly_map[:, ::-1]

    many = made_up_images(200)
    reference = made_up(many)
    report = measure(Echo(many, reference.scores, fault), many, reference, CONTRACTS["fp32"])
    assert any(text.startswith("batch 1: map cosine, p1") for text in report.failures())


def test_quantities_of_a_whole_set_are_those_of_all_images_alone(images: ParityImages, reference: Reference) -> None:
    report = report_of(images, reference, lambda *_: None)
    assert report.whole is not None
    assert report.whole.values["spearman"] == pytest.approx(1)
    assert [row.agreement.values["spearman"] for row in report.rows] == [None] * 3
    assert report.worst.values["spearman"] == report.whole.values["spearman"]


def test_lost_images_are_seen(images: ParityImages, reference: Reference) -> None:
    class Loses(Echo):
        def run(self, images: UInt8, maps: bool = True) -> Scores:
            answer = super().run(images, maps)
            return Scores(answer.score[:-1], answer.anomaly_map[:-1], answer.reconstruction[:-1])

    report = measure(Loses(images, reference.scores, lambda *_: None), images, reference, CONTRACTS["fp32"])
    assert not report
    assert "batch 10: score: expected shape (20,), got (18,)" in report.failures()
    assert (report.whole, report.outputs) == (None, None)


def test_golden_images_span_the_scores_and_hold_every_stress_image() -> None:
    rng = np.random.default_rng(1)
    images = made_up_images(40).with_stress()
    count = len(images)
    scores = Scores(
        rng.permutation(count).astype(np.float32),
        np.arange(count, dtype=np.float32)[:, None, None].repeat(SIZE, 1).repeat(SIZE, 2),
        np.zeros((count, SIZE, SIZE, 3), np.uint8),
    )
    reference = replace(made_up(images), scores=scores)
    assert reference.yardstick is not None
    for table in reference.yardstick:
        table[:] = np.arange(count)[:, None]
    golden = golden_of(images, reference)
    real = scores.score[:40]
    assert len(golden.images) == 18 + 14
    assert golden.stress == tuple(range(18, 32))
    assert (golden.scores.score[0], golden.scores.score[17]) == (real.min(), real.max())
    assert np.all(np.diff(golden.scores.score[:18]) > 0)
    numbers = [int(one[0, 0]) for one in golden.scores.anomaly_map]
    assert numbers[18:] == list(images.stress)
    for place, number in enumerate(numbers):
        assert np.array_equal(golden.images[place], images.pixels[number])
        assert golden.yardstick.own[place, 0] == golden.yardstick.unit[place, 3] == number


def test_calls_leave_no_image_out_however_few_the_sizes_hold() -> None:
    scores = np.random.default_rng(3).permutation(50).astype(np.float32)
    for sizes in ((1,), (1, 2), (1, 4, 16), (32,), (1, 2, 4, 8, 16, 32, 64)):
        calls = calls_of(scores, sizes)
        assert list(calls) == sorted(sizes, reverse=True)
        assert {number for batches in calls.values() for call in batches for number in call} == set(range(50))
        assert all(len(call) == size for size, batches in calls.items() for call in batches)


@pytest.mark.parametrize("count", [14, 32, 46, 200])
def test_at_each_size_there_are_all_stress_images_and_the_highest_score_in_every_place(count: int) -> None:
    scores = np.random.default_rng(5).permutation(count).astype(np.float32)
    stress, real = list(range(count - 14, count)), list(range(count - 14))
    places: dict[int, set[int]] = {number: set() for number in stress}
    for size, batches in calls_of(scores, (1, 2, 4, 8, 16), stress).items():
        met = {number for call in batches for number in call}
        assert met >= set(stress)
        if real:
            by_score = sorted(real, key=lambda number: float(scores[number]))
            assert {by_score[0], by_score[-1]} <= met
            assert len(met & set(real)) >= 2
        assert size == 1 or [int(scores.argmax())] * size in batches
        assert sum(map(len, batches)) <= 2 * size + max(size, count - 14) + 16
        for call in batches:
            for place, number in enumerate(call):
                if number in places:
                    places[number].add(place)
    assert min(len(one) for one in places.values()) >= (3 if real else 2), "in several places"
