"""Any number of images brought to a few sizes of batch, through ONNX Runtime: no image's result knows of the others."""

from __future__ import annotations

import numpy as np
import pytest

from qfae_runtime.engines.base import Scores
from qfae_runtime.engines.batches import calls_of, chosen_batch, cut, cut_back, filled_up, next_size, sizes_up_to
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine

from .tiny import SIZE, golden_images, model_bytes


@pytest.mark.parametrize(("most", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (32, (1, 2, 4, 8, 16, 32))])
def test_sizes_are_powers_of_two_and_the_largest(most: int, sizes: tuple[int, ...]) -> None:
    assert sizes_up_to(most) == sizes
    assert [next_size(sizes, count) for count in sizes] == list(sizes)


SPLIT = [1, 2, 2, 1, 4, 4, 1, 4, 2, 4, 2, 1, 8, 8, 1, 8, 2, 8, 2, 1, 12]


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize(("device", "calls"), [("cpu", SPLIT), ("cuda:0", [1, 2, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12])])
def test_every_number_of_images_gives_what_they_give_alone(
    maps: bool, device: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = golden_images(12)
    with OnnxRuntimeEngine(model_bytes(), SIZE, 12) as engine:
        alone = Scores.joined(engine.run(one[None]) for one in images)
        monkeypatch.setattr(engine, "device", device)
        seen: list[int] = []
        run = engine._session.run
        engine._session = type("Watched", (), {"run": lambda _, names, feed: seen.append(len(feed["images"])) or run(names, feed)})()  # type: ignore[func-returns-value]  # fmt: skip  # noqa: E501
        for count in range(1, 13):
            before = len(seen)
            got = engine.run(images[:count], maps)
            assert tuple(seen[before:]) == calls_of(engine.batches, count, device)
            np.testing.assert_allclose(got.score, alone.score[:count], rtol=0, atol=1e-6)
            kept = count if maps else 0
            np.testing.assert_allclose(got.anomaly_map, alone.anomaly_map[:kept], rtol=0, atol=1e-6)
            np.testing.assert_array_equal(got.reconstruction, alone.reconstruction[:kept])
    assert seen == calls


@pytest.mark.parametrize(
    ("sizes", "images", "parts"),
    [
        ((1, 2, 4, 8, 16), 9, (8, 1)),
        ((1, 2, 4, 8, 16), 13, (8, 4, 1)),
        ((1, 2, 4, 8, 12), 23, (12, 8, 2, 1)),
        ((1, 3, 5), 14, (5, 5, 3, 1)),
        ((1,), 3, (1, 1, 1)),
    ],
)
def test_a_number_is_cut_into_sizes_the_largest_first(
    sizes: tuple[int, ...], images: int, parts: tuple[int, ...]
) -> None:
    assert cut(sizes, images) == parts


def test_sizes_that_leave_images_over_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 images are left over; the sizes \(2, 4\) must begin with 1"):
        cut((2, 4), 7)


@pytest.mark.parametrize(("asked", "chosen"), [(None, 16), (1, 1), (3, 2), (31, 16), (32, 32), (99, 32)])
def test_the_largest_size_up_to_what_was_asked_for_is_chosen(asked: int | None, chosen: int) -> None:
    assert chosen_batch(asked, (1, 2, 4, 8, 16, 32)) == chosen


def test_where_all_sizes_are_larger_batches_are_filled_up() -> None:
    assert chosen_batch(3, (4, 8)) == 3
    assert chosen_batch(None, (1, 2, 6)) == 6


def test_what_is_cut_back_keeps_nothing_of_the_rest_alive() -> None:
    whole = Scores(np.zeros(4, np.float32), np.zeros((4, 2, 2), np.float32), np.zeros((4, 2, 2, 3), np.uint8))
    for output in cut_back(whole, 3):
        assert len(output) == 3
        assert output.base is None
    assert cut_back(whole, 4) is whole


def test_a_full_batch_is_not_copied_and_a_short_one_is_black_behind() -> None:
    images = golden_images(3)
    assert filled_up(images, 3) is images
    filled = filled_up(images, 5)
    np.testing.assert_array_equal(filled, [*images, *np.zeros_like(images[:2])])
