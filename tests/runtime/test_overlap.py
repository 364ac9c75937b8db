"""Batches under way side by side, where the engine has slots for them: order, outcomes, errors, early ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import Overlapping, Scores
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_runtime.engines.tensorrt import SLOTS, TensorRtEngine
from qfae_runtime.errors import EngineError
from qfae_runtime.geometry import Geometry
from qfae_runtime.manifest import Manifest
from qfae_runtime.pipeline import Job, Outcome, Pipeline
from qfae_runtime.preprocess import Prepared
from qfae_runtime.scorer import Scorer

from .conftest import write_png
from .doubles.tensorrt import SIZE, FakeTensorRt, batch_of, check_scores, expected_scores, open_engine
from .tiny import export_tiny, model_bytes

BATCH = 4


class Plain:
    """The same engine, one batch at a time."""

    def __init__(self, engine: TensorRtEngine) -> None:
        self.image_size, self.max_batch, self.batches = engine.image_size, engine.max_batch, engine.batches
        self.backend, self.device, self.version = engine.backend, engine.device, engine.version
        self.run, self.close, self._engine = engine.run, engine.close, engine

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest.load(export_tiny(tmp_path / "six", size=SIZE).with_suffix(".json"))


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """18 pictures, damaged ones among them: within a batch, and so many at the end that they come alone."""
    rng = np.random.default_rng(5)
    for number in range(18):
        path = tmp_path / "in" / f"{number:02}.png"
        write_png(path, rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8))
        if number in (2, 9, 10) or number > 15:
            path.write_bytes(b"")
    return [Job(path, path.name, label="good") for path in sorted((tmp_path / "in").iterdir())]


def watched(engine: TensorRtEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the order of submit and collect."""
    events: list[str] = []
    submit, collect = engine.submit, engine.collect

    def submitting(images: UInt8) -> None:
        events.append(f"submit {len(images)}")
        submit(images)

    def collecting(maps: bool = True) -> Scores:
        events.append("collect")
        return collect(maps)

    monkeypatch.setattr(engine, "submit", submitting)
    monkeypatch.setattr(engine, "collect", collecting)
    return events


def comparable(outcome: Outcome) -> tuple[Any, ...]:
    scored = outcome.scored
    arrays = () if scored is None or scored.anomaly_map is None else (scored.anomaly_map, scored.reconstruction)
    return (outcome.row, outcome.picture.job.source, *(np.asarray(array).tobytes() for array in arrays))


@pytest.mark.parametrize("maps", [True, False])
def test_a_run_keeps_two_batches_under_way_and_rows_in_order(
    trt: FakeTensorRt, manifest: Manifest, jobs: list[Job], maps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(trt) as engine:
        assert isinstance(engine, Overlapping)
        plain = Plain(engine)
        assert not isinstance(plain, Overlapping)
        one_by_one = list(Pipeline(Scorer(plain, manifest, BATCH), maps=maps).run(jobs))
        events = watched(engine, monkeypatch)
        outcomes = list(Pipeline(Scorer(engine, manifest, BATCH), maps=maps).run(jobs))
        check_scores(engine.run(batch_of(2)), batch_of(2))  # nothing is left under way
    assert events[:7] == ["submit 4", "submit 4", "collect", "submit 4", "collect", "submit 1", "collect"]
    assert [comparable(one) for one in outcomes] == [comparable(one) for one in one_by_one]
    assert [one.row.source for one in outcomes] == [job.source for job in jobs]
    assert [one.row.status for one in outcomes].count("error") == 5
    assert [one.scored is not None and one.scored.anomaly_map is not None for one in outcomes].count(True) == 13 * maps


def test_no_more_batches_are_under_way_than_there_are_slots(trt: FakeTensorRt, manifest: Manifest) -> None:
    images = batch_of(8 * 5)
    taken = 0

    def pictures() -> Iterator[tuple[UInt8, int]]:
        nonlocal taken
        for number, image in enumerate(images):
            taken += 1
            yield image, number

    with open_engine(trt) as engine:
        came = []
        for scored, number in Scorer(engine, manifest, 8).score_pictures(pictures()):
            came.append(number)
            assert taken == min((number // 8 + SLOTS) * 8 + 1, 40)  # one more tells that a batch is not the last
            assert scored is not None
            assert scored.score == expected_scores(images[number][None]).score[0]
    assert came == list(range(40))


def test_many_damaged_files_do_not_keep_results_back(trt: FakeTensorRt, manifest: Manifest) -> None:
    """A few of them leave a batch under way; of many, the results before them are fetched."""
    taken = 0

    def pictures() -> Iterator[tuple[UInt8 | None, int]]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield batch_of(1)[0] if number in (2, 4) else None, number

    with open_engine(trt) as engine:
        ahead = [taken - number for _, number in Scorer(engine, manifest, BATCH).score_pictures(pictures())]
    assert len(ahead) == 100
    assert ahead[:3] == [1, 1, 4 * BATCH + SLOTS + 16]  # nothing under way; then a batch, and errors behind it
    assert max(ahead) == ahead[2]
    assert ahead[-1] == 1


def test_an_error_of_a_collected_batch_is_told_once(
    trt: FakeTensorRt, manifest: Manifest, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(trt, faults=("unwritten score",)) as engine:
        events = watched(engine, monkeypatch)
        outcomes = Pipeline(Scorer(engine, manifest, BATCH), maps=False).run(jobs)
        with pytest.raises(EngineError) as caught:
            list(outcomes)
        assert str(caught.value).startswith("output 'score': the plan wrote no number for 4 of 4 images; ")
        assert caught.value.__context__ is None
        assert list(outcomes) == []
        assert events[:3] == ["submit 4", "submit 4", "collect"]
        assert not any(event.startswith("submit") for event in events[3:])
        # What was under way is lost: the engine says the same of a new batch, not that others wait.
        with pytest.raises(EngineError, match="output 'score': the plan wrote no number for 1 of 1 images"):
            engine.run(batch_of(1))


def test_an_error_of_a_submitted_batch_ends_the_run(trt: FakeTensorRt, manifest: Manifest, jobs: list[Job]) -> None:
    with (
        open_engine(trt, faults=("raises",)) as engine,
        pytest.raises(EngineError, match=r"of 4: a C\+\+ exception; build it"),
    ):
        list(Pipeline(Scorer(engine, manifest, BATCH), maps=False).run(jobs))
    assert trt.cuda.left == []


def test_a_run_that_ends_early_leaves_an_engine_to_be_used(
    trt: FakeTensorRt, manifest: Manifest, jobs: list[Job]
) -> None:
    with open_engine(trt) as engine:
        with closing(Pipeline(Scorer(engine, manifest, BATCH), maps=False).run(jobs)) as outcomes:
            next(outcomes)
        check_scores(engine.run(batch_of(3)), batch_of(3))


def test_the_scorer_alone_overlaps_too(trt: FakeTensorRt, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    images = batch_of(5)
    with open_engine(trt) as engine:
        events = watched(engine, monkeypatch)
        prepared = (Prepared(image, Geometry.whole(SIZE, SIZE, SIZE)) for image in images)
        scorer = Scorer(engine, manifest, 3)
        scored = list(scorer.score(prepared))
    assert engine.batches == (1, 2, 4, 8)
    assert (scorer.batch_size, dict(scorer.batches_run)) == (2, {2: 2, 1: 1})  # 3 is no size of the plan
    assert events == ["submit 2", "submit 2", "collect", "submit 1", "collect", "collect"]
    np.testing.assert_array_equal([one.score for one in scored], expected_scores(images).score)


def test_an_engine_without_slots_runs_a_batch_when_the_next_image_is_there(manifest: Manifest) -> None:
    events: list[str] = []

    class Watched(OnnxRuntimeEngine):
        def run(self, images: UInt8, maps: bool = True) -> Scores:
            events.append(f"run {len(images)}")
            return super().run(images, maps)

    def pictures() -> Iterator[tuple[UInt8, int]]:
        for number, image in enumerate(batch_of(4)):
            events.append(f"asked for {number}")
            yield image, number

    with Watched(model_bytes(SIZE), SIZE, 8) as engine:
        assert not isinstance(engine, Overlapping)
        for _, number in Scorer(engine, manifest, 2).score_pictures(pictures()):
            events.append(f"got {number}")
    first = ["asked for 0", "asked for 1", "asked for 2", "run 2", "got 0", "got 1"]
    assert events == [*first, "asked for 3", "run 2", "got 2", "got 3"]
