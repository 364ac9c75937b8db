from __future__ import annotations

import threading

import numpy as np
import pytest

from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.engines.batches import fill_up
from qfae_runtime.errors import EngineError

from .doubles.tensorrt import SIZE, FakeTensorRt, batch_of, check_scores, expected_scores, open_engine

# Stream 0 copies, stream 1 computes. As late as possible, one or both as early as possible.
SCHEDULES = [(), (0,), (1,), (0, 1)]
ONE_PROFILE = [(1, 8, 8)]
PROFILE_PER_BUCKET = [(1, 1, 2), (1, 2, 2), (2, 4, 4), (3, 6, 6)]  # as TensorRT's builder is given them


@pytest.mark.parametrize("rtx", [False, True])
@pytest.mark.parametrize("hurry", SCHEDULES)
@pytest.mark.parametrize("profiles", [ONE_PROFILE, PROFILE_PER_BUCKET])
def test_every_batch_gets_its_own_rows(
    trt: FakeTensorRt, profiles: list[tuple[int, int, int]], hurry: tuple[int, ...], rtx: bool
) -> None:
    with open_engine(trt, *profiles, rtx=rtx) as opened:
        engine: Engine = opened
        assert (engine.image_size, engine.max_batch) == (SIZE, profiles[-1][2])
        assert (engine.backend, engine.device, engine.version) == (
            "tensorrt-rtx" if rtx else "tensorrt",
            "cuda:0",
            "11.4.0",
        )
        trt.cuda.hurry = hurry
        for round_ in range(2):
            for count in np.random.default_rng(round_).permutation(np.arange(1, engine.max_batch + 1)):
                images = batch_of(int(count), seed=round_)
                check_scores(engine.run(images), images)
        assert opened.uncaptured == {}
    assert trt.cuda.left == []


def test_a_batch_is_filled_up_to_the_next_size(trt: FakeTensorRt) -> None:
    with open_engine(trt, *PROFILE_PER_BUCKET) as engine:
        assert engine.batches == (1, 2, 4, 6)
        for count in (3, 5, 2, 1, 4):
            engine.run(batch_of(count))
    assert trt.made == [(4, 2), (6, 3), (2, 1), (1, 0)]  # (batch, profile), each set up once


def test_what_fills_a_batch_is_black() -> None:
    buffer = np.full(4 * 12, 77, np.uint8)
    fill_up(buffer, np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), 3)
    np.testing.assert_array_equal(buffer, [*range(24), *[0] * 12, *[77] * 12])


def test_a_plan_sees_nothing_of_earlier_images(trt: FakeTensorRt) -> None:
    with open_engine(trt) as engine:
        for _ in range(2):  # both slots
            engine.run(batch_of(8))
        images = batch_of(5, seed=1)
        engine.run(images)
        engine.run(images)
    for seen in trt.seen[-2:]:
        np.testing.assert_array_equal(seen, [*images, *np.zeros_like(images[:3])])


def test_images_need_not_lie_in_one_piece(trt: FakeTensorRt) -> None:
    images = batch_of(6)[::2, :, ::-1]
    with open_engine(trt) as engine:
        check_scores(engine.run(images), images)


def test_the_caller_owns_what_is_returned(trt: FakeTensorRt) -> None:
    with open_engine(trt) as engine:
        first = engine.run(batch_of(3))
        copies = [array.copy() for array in first]
        for array in first:
            assert array.flags.owndata or (array.base is not None and array.base.flags.owndata)
            assert array.flags.writeable
        engine.run(batch_of(3, seed=1))
        engine.run(batch_of(3, seed=2))
    for got, expected in zip(first, copies, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_without_maps_only_the_score_is_fetched(trt: FakeTensorRt) -> None:
    images = batch_of(3)
    with open_engine(trt) as engine:
        engine.run(images)
        before = trt.cuda.calls["cudaMemcpyAsync"]
        engine.run(images)
        whole = trt.cuda.calls["cudaMemcpyAsync"] - before
        bare = engine.run(images, maps=False)
        assert trt.cuda.calls["cudaMemcpyAsync"] - before == 2 * whole - 2
    np.testing.assert_array_equal(bare.score, expected_scores(images).score)
    assert (bare.anomaly_map.shape, bare.anomaly_map.dtype.name) == ((0, SIZE, SIZE), "float32")
    assert (bare.reconstruction.shape, bare.reconstruction.dtype.name) == ((0, SIZE, SIZE, 3), "uint8")


def test_wrong_batches_are_refused_with_the_cure(trt: FakeTensorRt) -> None:
    with open_engine(trt, (1, 4, 4)) as engine:
        assert engine.max_batch == 4
        with pytest.raises(EngineError) as caught:
            engine.run(np.zeros((2, 3, SIZE, SIZE), np.float32))
        assert str(caught.value) == (
            "input 'images': expected uint8 (B, 6, 6, 3), got float32 (2, 3, 6, 6); "
            "pass images from preprocess(), the engine normalises them itself"
        )
        for count in (0, 5):
            with pytest.raises(EngineError, match=rf"expected 1\.\.4 images in a batch, got {count}; Scorer cuts"):
                engine.run(batch_of(count))
    with (
        open_engine(trt, (1, 4, 4), max_batch=3) as engine,
        pytest.raises(EngineError, match=r"expected 1\.\.3 images"),
    ):
        engine.run(batch_of(4))


# --- two batches on their way ---


@pytest.mark.parametrize("faults", [(), ("capture",)])
@pytest.mark.parametrize("hurry", SCHEDULES)
def test_two_batches_on_their_way_do_not_mix(
    trt: FakeTensorRt, hurry: tuple[int, ...], faults: tuple[str, ...]
) -> None:
    batches = [batch_of(int(count), seed) for seed, count in enumerate([8, 3, 3, 1, 8, 2, 5, 5])]
    with open_engine(trt, faults=faults) as engine:
        trt.cuda.hurry = hurry
        results = []
        for number, images in enumerate(batches):
            given = images.copy()
            engine.submit(given)
            given[:] = 99  # they were copied
            if number:
                results.append(engine.collect(maps=number % 3 != 0))
        results.append(engine.collect())
    for number, (scores, images) in enumerate(zip(results, batches, strict=True)):
        expected = expected_scores(images)
        np.testing.assert_array_equal(scores.score, expected.score)
        if (number + 1) % 3 or number == len(batches) - 1:
            check_scores(scores, images)
        else:
            assert len(scores.anomaly_map) == len(scores.reconstruction) == 0
    assert trt.cuda.left == []


def test_too_many_and_too_few_batches_on_their_way_are_told(trt: FakeTensorRt) -> None:
    with open_engine(trt) as engine:
        with pytest.raises(EngineError, match="collect: no batch is on its way; submit one first"):
            engine.collect()
        engine.submit(batch_of(1))
        with pytest.raises(EngineError, match="run: 1 submitted batches wait; collect them first"):
            engine.run(batch_of(1))
        engine.submit(batch_of(2))
        with pytest.raises(EngineError, match="submit: 2 batches are on their way, expected fewer; collect one first"):
            engine.submit(batch_of(1))
        check_scores(engine.collect(), batch_of(1))  # the refusals lost nothing
        check_scores(engine.collect(), batch_of(2))


def test_another_thread_may_take_over(trt: FakeTensorRt) -> None:
    results: list[Scores] = []
    with open_engine(trt) as engine:
        for work in (
            lambda: engine.submit(batch_of(2)),
            lambda: results.append(engine.collect()),
            lambda: results.append(engine.run(batch_of(3))),
            engine.close,
        ):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    check_scores(results[0], batch_of(2))
    check_scores(results[1], batch_of(3))


# --- CUDA graphs ---


def test_each_size_is_captured_once_and_then_launched(trt: FakeTensorRt) -> None:
    with open_engine(trt) as engine:
        for count in (1, 2, 1, 2, 2):
            engine.run(batch_of(count))
        assert trt.cuda.calls["cudaStreamBeginCapture"] == trt.cuda.calls["cudaGraphInstantiate"] == 2
        assert trt.cuda.calls["cudaGraphLaunch"] == 5  # the first batch of a size as well
        assert trt.cuda.calls["cudaGraphDestroy"] == 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("capture", "cannot run a batch of 4: cannot allocate during capture"),
        ("capture breaks", "cudaStreamEndCapture failed on cuda:0: CUDA error 901, operation failed due to"),
        ("capture is empty", "CUDA captured an empty graph: the work went to another stream or GPU"),
        ("not capturable", "TensorRT 11.4.0 says that this plan cannot be captured"),
    ],
)
def test_what_cannot_be_captured_runs_without_a_graph(trt: FakeTensorRt, fault: str, reason: str) -> None:
    with open_engine(trt, faults=(fault,)) as engine:
        for seed in range(3):
            check_scores(engine.run(batch_of(3, seed)), batch_of(3, seed))
        assert list(engine.uncaptured) == [4]
        assert reason in engine.uncaptured[4]
        assert trt.cuda.calls["cudaStreamBeginCapture"] <= 1  # remembered, not tried again
        assert trt.cuda.calls["cudaGraphLaunch"] == 0
    assert trt.cuda.left == []
