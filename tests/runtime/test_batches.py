"""A batch filled up to the next size and cut back, through ONNX Runtime: no image's result knows of the others."""

from __future__ import annotations

import numpy as np
import pytest

from qfae_runtime.engines.base import Scores
from qfae_runtime.engines.batches import cut_back, filled_up, next_size, sizes_up_to
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine

from .tiny import SIZE, golden_images, model_bytes


@pytest.mark.parametrize(("most", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (32, (1, 2, 4, 8, 16, 32))])
def test_sizes_are_powers_of_two_and_the_largest(most: int, sizes: tuple[int, ...]) -> None:
    assert sizes_up_to(most) == sizes
    assert [next_size(sizes, count) for count in sizes] == list(sizes)


@pytest.mark.parametrize("maps", [True, False])
def test_every_number_of_images_gives_what_they_give_alone(maps: bool) -> None:
    images = golden_images(12)
    with OnnxRuntimeEngine(model_bytes(), SIZE, 12) as plain, OnnxRuntimeEngine(
        model_bytes(), SIZE, 12, batches=sizes_up_to(12)
    ) as padded:  # fmt: skip
        alone = Scores.joined(plain.run(one[None]) for one in images)
        seen: list[int] = []
        run = padded._session.run
        padded._session = type("Watched", (), {"run": lambda _, names, feed: seen.append(len(feed["images"])) or run(names, feed)})()  # type: ignore[func-returns-value]  # fmt: skip  # noqa: E501
        for count in range(1, 13):
            got = padded.run(images[:count], maps)
            np.testing.assert_allclose(got.score, alone.score[:count], rtol=0, atol=1e-6)
            kept = count if maps else 0
            np.testing.assert_allclose(got.anomaly_map, alone.anomaly_map[:kept], rtol=0, atol=1e-6)
            np.testing.assert_array_equal(got.reconstruction, alone.reconstruction[:kept])
    assert seen == [1, 2, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]


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
