"""Golden images in the batches of a scorer: engines that go wrong meanwhile are caught, and sound ones see no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from qfae_runtime import Scorer, open_engine
from qfae_runtime.arrays import UInt8
from qfae_runtime.canary import Canary, row_failures
from qfae_runtime.contract import CONTRACTS
from qfae_runtime.engines.base import Scores
from qfae_runtime.engines.batches import cut, run_split, sizes_up_to
from qfae_runtime.errors import CanaryError, EngineError
from qfae_runtime.geometry import Geometry
from qfae_runtime.golden import Golden
from qfae_runtime.manifest import Manifest
from qfae_runtime.preprocess import Prepared
from qfae_runtime.quantities import OF_ALL_IMAGES
from qfae_runtime.selftest import NOT_ON_FEW_IMAGES

from .doubles.tensorrt import SIZE as PLAN_SIZE
from .doubles.tensorrt import FakeTensorRt, batch_of, check_scores
from .doubles.tensorrt import expected_scores as plan_scores
from .doubles.tensorrt import open_engine as open_plan
from .tiny import SIZE, edit_manifest, export_tiny, yardstick_of

GOLDEN = 5
Fault = Callable[["Small", UInt8, Scores], None]


class Small:
    """An engine for images of 2 x 2 pixels; `fault` spoils what a call of its backend gives. Keeps to Engine."""

    image_size, backend, device, version = 2, "small", "cpu", "1"

    def __init__(self, max_batch: int, fault: Fault = lambda engine, images, scores: None) -> None:
        self.max_batch, self.batches = max_batch, sizes_up_to(max_batch)
        self.calls: list[UInt8] = []
        self._fault = fault

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        return run_split(self.batches, images, lambda part: self._run(part, maps))

    def _run(self, images: UInt8, maps: bool) -> Scores:
        self.calls.append(images)
        scores = right(images)
        self._fault(self, images, scores)
        return scores if maps else Scores(scores.score, scores.anomaly_map[:0], scores.reconstruction[:0])

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None: ...


def right(images: UInt8) -> Scores:
    maps = 0.1 + images.astype(np.float32).mean(axis=3) / 255
    return Scores(maps.max(axis=(1, 2)), maps, 255 - images)


def pictures(count: int, seed: int = 1) -> UInt8:
    return np.random.default_rng([seed, count]).integers(0, 200, (count, 2, 2, 3), dtype=np.uint8)


def golden_set() -> Golden:
    """Images that no picture is like: each has a pixel of 255, the others of its own number."""
    images = np.stack([np.full((2, 2, 3), number, np.uint8) for number in range(GOLDEN)])
    images[:, 0, 0, 0] = 255
    return Golden(images, right(images), yardstick_of(right(images)), 1)


def canary_of(golden: Golden) -> Canary:
    contract = CONTRACTS["fp32"].without((*OF_ALL_IMAGES, *NOT_ON_FEW_IMAGES))
    reference = golden.reference()
    return Canary(golden, lambda numbers, got: row_failures(reference, numbers, got, contract))


def scorer_of(engine: Any, batch_size: int, *, canary: bool = True) -> Scorer:
    manifest: Any = type("Sized", (), {"image_size": 2, "name": "small"})()
    return Scorer(engine, manifest, batch_size, canary_of(golden_set()) if canary else None)


def golden_in(images: UInt8) -> list[int]:
    """Return the places of golden images in a batch."""
    return [place for place, image in enumerate(images) if image[0, 0, 0] == 255]


def scored(scorer: Scorer, images: UInt8, maps: bool = True) -> list[Any]:
    return list(scorer.score((Prepared(image, Geometry.whole(2, 2, 2)) for image in images), maps))


@pytest.mark.parametrize("size", [1, 2, 7, 8, 16, 64, 100, 101, 256])
def test_golden_images_take_one_percent_and_ride_in_the_last_batch(size: int) -> None:
    counts = {*range(1, 2 * size + 3), *range(98, 104), *range(198, 232), 500, 1000, 1001, 1999, 2500}
    for count in sorted(counts)[:: 1 if size < 20 else 7]:
        engine, images = Small(size), pictures(count)
        scorer = scorer_of(engine, size)
        got = scored(scorer, images)
        np.testing.assert_array_equal([one.score for one in got], right(images).score)
        np.testing.assert_array_equal([one.anomaly_map for one in got], right(images).anomaly_map)
        np.testing.assert_array_equal([one.reconstruction for one in got], right(images).reconstruction)
        seen = sum(len(golden_in(call)) for call in engine.calls)
        assert seen == scorer.canaries_read
        assert 1 <= seen <= max(1, count / 100)
        assert count / max(150, 3 * size) <= seen + 1, "they come throughout"
        assert golden_in(engine.calls[-1]), "the last call has one"
        if size > 1:
            assert len(engine.calls[-1]) > 1, "it rides with images"
        assert {len(call) for call in engine.calls} <= set(engine.batches)
        used = {number: sum(len(call) == number for call in engine.calls) for number in engine.batches}
        assert dict(scorer.batches_run) == {number: times for number, times in used.items() if times}


def test_without_a_canary_images_are_cut_into_sizes_that_were_measured() -> None:
    engine = Small(32)
    scorer = scorer_of(engine, 20, canary=False)
    assert scorer.batch_size == 16
    assert len(scored(scorer, pictures(16 * 2 + 13))) == 45
    assert [len(call) for call in engine.calls] == [16, 16, 8, 4, 1]
    assert dict(scorer.batches_run) == {16: 2, 8: 1, 4: 1, 1: 1}
    assert scorer.canaries_read == 0


def test_they_go_round_from_the_highest_score_on_and_through_every_place() -> None:
    engine = Small(4)
    scored(scorer_of(engine, 4), pictures(4 * 26 * 12))
    found = [(place[0], int(call[place[0], 0, 0, 1])) for call in engine.calls if (place := golden_in(call))]
    assert {place for place, _ in found} == {0, 1, 2, 3}
    order = np.argsort(-golden_set().scores.score).tolist()
    numbers = [number for _, number in found]
    assert numbers == [order[number % GOLDEN] for number in range(len(found) - 1)] + [order[0]]


@pytest.mark.parametrize("pattern", ["..x", "x.", "xxxxxx.", ".......x", "x" * 90 + "."])
def test_errors_between_the_images_keep_their_order_and_cost_nothing(pattern: str) -> None:
    image_of, engine = iter(pictures(3000)), Small(8)
    kinds = [kind for _ in range(40) for kind in pattern]
    given = [(next(image_of) if kind == "." else None, number) for number, kind in enumerate(kinds)]
    scorer = scorer_of(engine, 8)
    got = list(scorer.score_pictures(given))
    assert [number for _, number in got] == list(range(len(kinds)))
    images = np.stack([image for image, _ in given if image is not None])
    np.testing.assert_array_equal([one.score for one, _ in got if one is not None], right(images).score)
    assert [one is None for one, _ in got] == [kind == "x" for kind in kinds]
    assert 1 <= scorer.canaries_read <= max(1, len(images) / 100)
    assert golden_in(engine.calls[-1])


def test_errors_alone_call_no_engine() -> None:
    engine = Small(8)
    scorer = scorer_of(engine, 8)
    assert list(scorer.score_pictures([(None, number) for number in range(70)])) == [(None, n) for n in range(70)]
    assert (engine.calls, scorer.canaries_read) == ([], 0)


# --- engines that go wrong ---


def spoil(scores: Scores, what: str, rows: Any = slice(None)) -> None:
    if what == "score":
        scores.score[rows] *= 1.01
    elif what == "map":
        scores.anomaly_map[rows, 1, 1] += 0.01
    elif what == "nan":
        scores.score[rows] = np.nan
    else:
        scores.reconstruction[rows, 0, 1] ^= 64


def result_of(scorer: Scorer, images: UInt8, maps: bool = True) -> tuple[list[Any], CanaryError]:
    """Return what came before a golden image was wrong, and the error."""
    came: list[Any] = []
    with pytest.raises(CanaryError) as caught:
        # list.extend keeps what came before the error.
        came.extend(scorer.score((Prepared(image, Geometry.whole(2, 2, 2)) for image in images), maps))
    return came, caught.value


@pytest.mark.parametrize("what", ["score", "map", "nan", "reconstruction"])
@pytest.mark.parametrize(("size", "after"), [(8, 0), (8, 5), (8, 70), (16, 40), (1, 30), (1, 350)])
def test_an_engine_that_goes_wrong_is_caught_and_where_is_told(what: str, size: int, after: int) -> None:
    images = pictures(450 if size == 1 else 1000)

    def fault(engine: Small, batch: UInt8, scores: Scores) -> None:
        if len(engine.calls) > after:
            spoil(scores, what)

    came, error = result_of(scorer_of(Small(size, fault), size), images)
    first_wrong = size * after - size * after // 101 // size  # where golden images take places, a few earlier
    assert error.first - 1 <= first_wrong, "nothing that is wrong is trusted"
    assert first_wrong - error.first < 250, "and not much that is right is doubted"
    np.testing.assert_array_equal(
        [one.score for one in came[: error.first - 1]], right(images).score[: error.first - 1]
    )
    assert str(error).startswith("canary: a golden image in a batch no longer gives PyTorch's outputs (")
    assert f"); do not trust the scores from image {error.first} on, and repeat the self-test" in str(error)
    assert len(came) < first_wrong + 250 + size


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 100, 208, 1000, 1003])
def test_one_that_is_wrong_in_the_last_batch_alone_is_caught(count: int) -> None:
    sound = Small(8)
    scored(scorer_of(sound, 8), pictures(count))
    calls = len(sound.calls)

    def fault(engine: Small, batch: UInt8, scores: Scores) -> None:
        if len(engine.calls) == calls:
            spoil(scores, "score")

    _, error = result_of(scorer_of(Small(8, fault), 8), pictures(count))
    assert error.first <= count


@pytest.mark.parametrize("place", range(8))
def test_one_that_is_wrong_at_one_place_of_a_batch_is_caught(place: int) -> None:
    def fault(engine: Small, batch: UInt8, scores: Scores) -> None:
        if len(batch) == 8:
            spoil(scores, "map", [place])

    came, _ = result_of(scorer_of(Small(8, fault), 8), pictures(2000))
    assert len(came) <= 8 * 13 * 10


@pytest.mark.parametrize("maps", [True, False])
def test_scores_alone_are_compared_where_no_maps_are_asked_for(maps: bool) -> None:
    def wrong_map(engine: Small, batch: UInt8, scores: Scores) -> None:
        spoil(scores, "map")

    def wrong_score(engine: Small, batch: UInt8, scores: Scores) -> None:
        spoil(scores, "score")

    result_of(scorer_of(Small(8, wrong_score), 8), pictures(20), maps)
    if maps:
        result_of(scorer_of(Small(8, wrong_map), 8), pictures(20), maps)
    else:
        assert len(scored(scorer_of(Small(8, wrong_map), 8), pictures(20), maps)) == 20


def test_a_wrong_golden_image_of_a_batch_of_its_own_is_caught_too() -> None:
    """Images, then so many errors that they are no longer waited for, then the end: the golden image comes alone."""
    engine = Small(4, lambda engine, batch, scores: spoil(scores, "nan", golden_in(batch)))
    given: list[tuple[UInt8 | None, int]] = [*((image, 0) for image in pictures(2)), *[(None, 0)] * 40]
    with pytest.raises(CanaryError) as caught:
        list(scorer_of(engine, 4).score_pictures(given))
    assert [len(call) for call in engine.calls] == [2, 1]
    assert caught.value.first == 1


# --- services: batches as they come ---


def test_score_batch_has_a_golden_image_every_hundred() -> None:
    engine, rng = Small(8), np.random.default_rng(4)
    scorer = scorer_of(engine, 8)
    images = pictures(1000)
    at = 0
    while at < len(images):
        batch = images[at : at + int(rng.integers(1, 9))]
        got = scorer.score_batch(list(batch), maps=False)
        np.testing.assert_array_equal([one.score for one in got], right(batch).score)
        at += len(batch)
    assert 8 <= scorer.canaries_read <= 10
    assert sum(len(golden_in(call)) for call in engine.calls) == scorer.canaries_read
    assert {len(call) for call in engine.calls} <= set(engine.batches)
    for count in (0, 9):
        with pytest.raises(EngineError, match=rf"score_batch: got {count} images, expected 1\.\.8; score takes any"):
            scorer.score_batch(list(images[:count]))


def test_score_batch_counts_from_the_first_image_of_the_scorer() -> None:
    def fault(engine: Small, batch: UInt8, scores: Scores) -> None:
        if len(engine.calls) > 40:
            spoil(scores, "score")

    scorer, images = scorer_of(Small(8, fault), 8), pictures(8)

    scored: list[int] = []
    with pytest.raises(CanaryError) as caught:
        scored.extend(len(scorer.score_batch(list(images))) for _ in range(100))
    # Two were right, behind 104 and 200 images, each with the eight of its batch; the third came behind 304.
    assert caught.value.first == 200 + 8 + 1
    assert sum(scored) == 304


# --- a plan, whose batches overlap and are filled up ---


@pytest.fixture
def plan_manifest(tmp_path: Path) -> Manifest:
    return Manifest.load(export_tiny(tmp_path / "six", size=PLAN_SIZE).with_suffix(".json"))


def plan_canary() -> Canary:
    images = batch_of(3, seed=9)
    return canary_of(Golden(images, plan_scores(images), yardstick_of(plan_scores(images)), 1))


def watched(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    submit = engine.submit

    def submitting(images: UInt8) -> None:
        sizes.append(len(images))
        submit(images)

    monkeypatch.setattr(engine, "submit", submitting)
    return sizes


@pytest.mark.parametrize("count", [1, 3, 5, 8, 9, 16, 21])
def test_golden_images_take_the_places_that_would_be_black(
    trt: FakeTensorRt, plan_manifest: Manifest, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = batch_of(count)
    with open_plan(trt) as engine:
        scorer = Scorer(engine, plan_manifest, 8, plan_canary())
        sizes = watched(engine, monkeypatch)
        got = list(scorer.score(Prepared(image, Geometry.whole(PLAN_SIZE, PLAN_SIZE, PLAN_SIZE)) for image in images))
    np.testing.assert_array_equal([one.score for one in got], plan_scores(images).score)
    np.testing.assert_array_equal([one.anomaly_map for one in got], plan_scores(images).anomaly_map)
    full, left = divmod(count, 8)
    last = {0: [1, 8], 1: [2], 3: [4], 5: [8]}[left]
    assert sizes == [8] * (full - (left == 0)) + last, "no place is black"
    assert scorer.canaries_read == sum(sizes) - count


def test_a_plan_that_goes_wrong_is_caught_and_left_to_be_used(
    trt: FakeTensorRt, plan_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, collected = batch_of(600), [0]
    with open_plan(trt) as engine:
        collect = engine.collect

        def wrong(maps: bool = True) -> Scores:
            collected[0] += 1
            scores = collect(maps)
            return scores if collected[0] < 30 else scores._replace(score=scores.score + 1)

        monkeypatch.setattr(engine, "collect", wrong)
        scorer = Scorer(engine, plan_manifest, 8, plan_canary())
        came: list[Any] = []
        with pytest.raises(CanaryError) as caught:
            came.extend(scorer.score_pictures(zip(images, range(600), strict=True)))
        monkeypatch.undo()
        check_scores(engine.run(batch_of(2)), batch_of(2))
    rows = caught.value.first - 1
    assert 0 < rows <= 8 * 29
    np.testing.assert_array_equal([one.score for one, _ in came[:rows]], plan_scores(images[:rows]).score)


# --- of an opened engine ---


def test_an_opened_engine_brings_its_golden_images(engine_path: Path) -> None:
    with open_engine(engine_path) as opened:
        scorer = Scorer.of(opened, 8)
        assert scorer.canary is not None
        images = np.random.default_rng(1).integers(0, 256, (9, SIZE, SIZE, 3), dtype=np.uint8)
        whole = Geometry.whole(SIZE, SIZE, SIZE)
        assert len(list(scorer.score(Prepared(image, whole) for image in images))) == 9
        assert scorer.canaries_read == 1
        scores = opened.engine.run(images[:1])
        assert scorer.canary.compare([0], scores)[0].endswith(
            f"(golden image 0): expected {_golden_score(scorer):.7g}, got {scores.score[0]:.7g}"
        )
        score_alone = Scores(scores.score, scores.anomaly_map[:0], scores.reconstruction[:0])
        assert scorer.canary.compare([0], score_alone)


def _golden_score(scorer: Scorer) -> float:
    assert scorer.canary is not None
    return float(scorer.engine.run(scorer.canary.image(0)[None]).score[0])


def test_an_uncertified_engine_without_golden_images_has_no_canary(tmp_path: Path) -> None:
    path = export_tiny(tmp_path / "bare", certified=False)
    edit_manifest(path, golden=None)
    with open_engine(path, allow_uncertified=True) as opened:
        assert Scorer.of(opened).canary is None
    edit_manifest(path, golden="tiny.golden.npz")
    with open_engine(path, allow_uncertified=True) as opened:
        assert Scorer.of(opened).canary is not None


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_a_service_is_told_about_the_batches_it_sends(count: int) -> None:
    """An engine that is wrong at one of the sizes that so many images take is seen; one at another size is not met."""

    def wrong(engine: Small, images: UInt8, scores: Scores) -> None:
        if len(images) == max(cut(engine.batches, count)):
            scores.score[:] *= np.float32(1.01)

    def sent(engine: Small) -> Scorer:
        scorer = scorer_of(engine, 8)
        for _ in range(200):
            scorer.score_batch(list(pictures(count)))
        return scorer

    with pytest.raises(CanaryError):
        sent(Small(8, wrong))
    engine = Small(8)
    scorer = sent(engine)
    assert scorer.canaries_read >= count
    assert {len(call) for call in engine.calls} == {*cut(engine.batches, count), 1}
