"""Order, batch sizes and filling up never change an FP32 score: a real exported engine, on every installed backend."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from qfae_export.export import Exported
from qfae_runtime import Scorer
from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.backends import lacking, load_onnx
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.engines.batches import sizes_up_to
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_runtime.geometry import Geometry
from qfae_runtime.preprocess import Prepared
from tests.export.tiny import SIZE, pictures

MOST = 32
WITHIN = 1e-5
ENGINES = ("onnxruntime", "onnxruntime, filled up", "openvino")


@pytest.fixture(params=ENGINES, scope="module")
def engine(request: pytest.FixtureRequest, exported: Exported) -> Iterator[Engine]:
    name = str(request.param)
    if name == "onnxruntime, filled up":
        with OnnxRuntimeEngine(exported.engine, SIZE, MOST, threads=1, batches=sizes_up_to(MOST)) as opened:
            yield opened
        return
    if reason := lacking(name, "cpu"):
        pytest.skip(f"{name}: {reason}")
    with load_onnx(exported.engine, SIZE, MOST, name, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def images() -> UInt8:
    return pictures(MOST + 5)


@pytest.fixture(scope="module")
def alone(engine: Engine, images: UInt8) -> Scores:
    """Every image by itself: what the same image must give in any company."""
    return Scores.joined(engine.run(images[number : number + 1]) for number in range(len(images)))


def agree(got: Scores, want: Scores) -> None:
    np.testing.assert_allclose(got.score, want.score, rtol=0, atol=WITHIN)
    np.testing.assert_allclose(got.anomaly_map, want.anomaly_map, rtol=0, atol=WITHIN)
    assert np.abs(got.reconstruction.astype(int) - want.reconstruction).max() <= 1


def test_these_images_tell_mistakes_apart(alone: Scores) -> None:
    """Else swapped rows would pass: no two scores are as near as the tolerance."""
    assert np.diff(np.sort(alone.score)).min() > WITHIN


@pytest.mark.parametrize("size", range(1, MOST + 1))
def test_every_batch_size(engine: Engine, images: UInt8, alone: Scores, size: int) -> None:
    agree(engine.run(images[:size]), alone.of(slice(size)))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16, 31, MOST])
def test_odd_remainders(engine: Engine, images: UInt8, alone: Scores, size: int, exported: Exported) -> None:
    whole = Geometry.whole(SIZE, SIZE, SIZE)
    scored = list(Scorer(engine, exported.manifest, size).score(Prepared(image, whole) for image in images))
    np.testing.assert_allclose([one.score for one in scored], alone.score, rtol=0, atol=WITHIN)
    for one, want in zip(scored, alone.anomaly_map, strict=True):
        assert one.anomaly_map is not None
        np.testing.assert_allclose(one.anomaly_map, want, rtol=0, atol=WITHIN)


@pytest.mark.parametrize("size", [2, 7, 13, MOST])
def test_any_order(engine: Engine, images: UInt8, alone: Scores, size: int) -> None:
    rng = np.random.default_rng(size)
    for _ in range(3):
        order = list(rng.permutation(len(images))[:size])
        agree(engine.run(images[order]), alone.of(order))


def test_duplicates_score_alike_wherever_they_stand(engine: Engine, images: UInt8, alone: Scores) -> None:
    order = [4, 0, 4, 4, 1, 4, 30, 4, 4]
    got = engine.run(images[order])
    agree(got, alone.of(order))
    same = got.score[[place for place, number in enumerate(order) if number == 4]]
    assert np.ptp(same) <= WITHIN


def test_a_batch_leaves_nothing_to_the_next(engine: Engine, images: UInt8, alone: Scores) -> None:
    before = engine.run(images[3:5])
    engine.run(np.full_like(images[:MOST], 255))
    after = engine.run(images[3:5])
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    agree(after, alone.of([3, 4]))


def test_scores_without_maps_are_the_same(engine: Engine, images: UInt8) -> None:
    np.testing.assert_array_equal(engine.run(images[:9], maps=False).score, engine.run(images[:9]).score)
