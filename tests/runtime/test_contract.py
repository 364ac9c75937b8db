"""The bounds: which outputs pass, and what is said of those that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from qfae_runtime.agreement import Scale, measure_agreement
from qfae_runtime.contract import CONTRACTS, Contract, demanded, scores_agree
from qfae_runtime.engines.base import Scores

from .test_agreement import changed, scores

FP32, FP16 = CONTRACTS["fp32"], CONTRACTS["fp16"]


def failures(reference: Scores, got: Scores, contract: Contract = FP32) -> list[str]:
    return contract.failures(measure_agreement(reference, got))


def titles(sentences: list[str]) -> list[str]:
    return [sentence.partition(":")[0] for sentence in sentences]


def test_what_the_contracts_promise() -> None:
    assert dict(FP32.bounds) == {
        "score_abs": 1e-4,
        "score_rel": 1e-3,
        "score_iqr": 0.01,
        "spearman": 0.999,
        "flips_beyond": 0.0,
        "map_abs": 1e-4,
        "map_rel": 1e-3,
        "map_share": 0.01,
        "map_cosine_p1": 0.9995,
        "reconstruction_levels": 1.0,
    }
    assert dict(FP16.bounds) == {
        "score_iqr": 0.01,
        "spearman": 0.999,
        "flips_beyond": 0.0,
        "map_share": 0.01,
        "map_pixel": 0.02,
        "map_cosine_p1": 0.9995,
        "reconstruction_p999": 2.0,
    }
    assert CONTRACTS["bf16"].bounds == FP16.bounds


def test_equal_outputs_pass() -> None:
    assert failures(scores(), scores()) == failures(scores(), scores(), FP16) == []


def test_one_pixel_off_is_found_and_named() -> None:
    reference = scores()
    value = float(reference.anomaly_map[1, 2, 3])
    agreement = measure_agreement(reference, changed(reference, "anomaly_map", (1, 2, 3), value + 2e-4))
    [sentence, *_] = FP32.failures(agreement, ["a.png", "b.png"])
    assert sentence == (
        f"map error, largest: 0.0002 exceeds 0.0001, worst at image 1, y 2, x 3 (b.png): "
        f"expected {value:.7g}, got {float(np.float32(value + 2e-4)):.7g}"
    )


def test_tiny_maps_do_not_pass_unseen() -> None:
    """All values far below the absolute bound and the relative floor: only scale-free quantities can see a fault."""
    reference = scores()
    tiny = Scores(
        reference.score * np.float32(1e-6), reference.anomaly_map * np.float32(1e-6), reference.reconstruction
    )
    assert failures(tiny, tiny) == []
    flipped = tiny._replace(anomaly_map=np.ascontiguousarray(tiny.anomaly_map.swapaxes(1, 2)))
    assert titles(failures(tiny, flipped)) == ["map error, p99.9 / p99.9 of maps", "map cosine, p1"]
    shuffled = tiny._replace(score=tiny.score[::-1].copy())
    assert {"score error, p99.9 / IQR", "score ranks, Spearman"} <= set(titles(failures(tiny, shuffled)))


def test_relative_bound_bites_where_the_absolute_one_does_not() -> None:
    reference = changed(scores(), "anomaly_map", (0, 0, 0), 0.01)
    assert titles(failures(reference, changed(reference, "anomaly_map", (0, 0, 0), 0.01005))) == ["map error, relative"]


def test_reconstruction_may_be_one_level_off_but_not_two() -> None:
    reference = scores()
    level = int(reference.reconstruction[0, 1, 2, 0])
    assert failures(reference, changed(reference, "reconstruction", (0, 1, 2, 0), level + 1)) == []
    assert failures(reference, changed(reference, "reconstruction", (0, 1, 2, 0), level - 2)) == [
        "reconstruction, grey levels: 2 exceeds 1, worst at image 0, y 1, x 2, channel 0: "
        f"expected {level}, got {level - 2}"
    ]


def test_what_is_undefined_fails_with_a_cure() -> None:
    same = scores()._replace(score=np.full(12, 0.5, np.float32))
    [first, *_] = failures(same, changed(same, "score", (0,), 0.50001))
    assert first == (
        "score error, p99.9 / IQR is undefined: the reference does not tell these images apart; "
        "measure on images of which some are normal and some are not"
    )


def test_a_fault_is_the_only_sentence() -> None:
    assert failures(scores(2), scores(3)) == ["score: expected shape (2,), got (3,)"]


@pytest.mark.parametrize(
    ("name", "bound", "expected"),
    [("score_iqr", 0.005, True), ("score_iqr", 0.02, False), ("spearman", 0.9999, True), ("spearman", 0.99, False)],
)
def test_stricter_and_laxer(name: str, bound: float, expected: bool) -> None:
    assert replace(FP16, bounds={**FP16.bounds, name: bound}).is_as_strict_as(FP16) is expected


def test_a_missing_bound_is_laxer() -> None:
    assert not replace(FP16, bounds={"score_iqr": 0.0}).is_as_strict_as(FP16)
    assert not FP16.is_as_strict_as(FP32)


# --- INT8 ---


def test_what_int8_promises() -> None:
    """That images are told apart as before: typical errors, ranks, decisions, and the area where labels say it."""
    assert dict(CONTRACTS["int8"].bounds) == {
        "score_median": 0.05,
        "score_iqr": 2.0,
        "spearman": 0.995,
        "flips_share": 0.05,
        "flips_beyond": 0.0,
        "map_share": 0.05,
        "map_pixel": 0.25,
        "map_cosine_p1": 0.75,
        "map_cosine_min": 0.5,
        "reconstruction_p999": 4.0,
    }
    few, many = [True, False] * 50, [True, False] * 60
    assert "auroc_change" not in demanded("int8", few).bounds, "one pair would be an eighth of the bound"
    assert demanded("int8", many).bounds["auroc_change"] == 0.003
    assert demanded("int8", [None] * 200) == CONTRACTS["int8"]
    assert demanded("fp16", many) == FP16
    assert demanded("int8", many).is_as_strict_as(CONTRACTS["int8"])


@pytest.mark.parametrize(
    ("precision", "one", "other", "agree"),
    [
        ("fp32", "onnxruntime", "openvino", True),
        ("fp16", "onnxruntime", "onnxruntime-tensorrt", True),
        ("fp32", "onnxruntime", "openvino-bf16", False),
        ("fp32", "openvino-bf16", "openvino-bf16", True),
        ("bf16", "onnxruntime", "onnxruntime-tensorrt", False),
        ("int8", "onnxruntime", "openvino", False),
        ("int8", "openvino", "openvino", True),
    ],
)
def test_whose_scores_agree(precision: str, one: str, other: str, agree: bool) -> None:
    assert scores_agree(precision, one, other) is scores_agree(precision, other, one) is agree


def blobs(count: int = 40, side: int = 16) -> Scores:
    """Maps with one bright place each, as anomaly maps are, and scores of two clusters."""
    rows, columns = np.mgrid[:side, :side]
    places = np.random.default_rng(6).uniform(2, side - 2, (count, 2, 1, 1))
    maps = np.exp(-((rows - places[:, 0]) ** 2 + (columns - places[:, 1]) ** 2) / 8).astype(np.float32)
    score = np.linspace(0, 1, count, dtype=np.float32)
    return Scores(score, maps, np.zeros((count, side, side, 3), np.uint8))


EVERY = {"map_share", "map_pixel", "map_cosine_p1", "map_cosine_min"}


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        (lambda maps: maps.transpose(0, 2, 1), EVERY),
        (lambda maps: maps * 0, EVERY),
        (lambda maps: maps * 2, {"map_share", "map_pixel"}),
        (lambda maps: maps * 0.8, {"map_share"}),
        (lambda maps: np.concatenate([maps[:2], maps[2:3, ::-1], maps[3:]]), EVERY),
        (lambda maps: np.where(np.arange(maps.size).reshape(maps.shape) == 999, 0.5, maps), {"map_pixel"}),
    ],
    ids=["transposed", "zero", "twice", "paler", "one upside down", "a bright pixel"],
)
def test_maps_that_int8_does_not_allow(
    fault: Callable[[NDArray[np.float32]], NDArray[np.float32]], broken: set[str]
) -> None:
    reference = blobs()
    got = reference._replace(anomaly_map=np.ascontiguousarray(fault(reference.anomaly_map)))
    values = measure_agreement(reference, got).values
    contract = CONTRACTS["int8"]
    assert {name for name in contract.bounds if not contract.allows(name, values[name])} == broken


def test_a_single_bright_pixel_is_refused_and_named() -> None:
    """Of 40 images' 10,240 pixels one: neither percentiles nor cosines see it."""
    reference = blobs()
    maps = reference.anomaly_map.copy()
    row, column = np.unravel_index(int(maps[7].argmin()), maps[7].shape)
    maps[7, row, column] = 0.03 * np.percentile(maps, 99.9)
    agreement = measure_agreement(reference, reference._replace(anomaly_map=maps))
    [sentence] = FP16.failures(agreement)
    assert sentence.startswith("map error, largest pixel: 0.03 exceeds 0.02, worst at image 7, y ")
    maps[7, row, column] = 0.015
    assert FP16.failures(measure_agreement(reference, reference._replace(anomaly_map=maps))) == []


def test_errors_of_maps_that_are_nowhere_bright_cannot_be_judged() -> None:
    dark = blobs()._replace(anomaly_map=np.zeros((40, 16, 16), np.float32))
    assert measure_agreement(dark, dark).values["map_pixel"] == 0
    maps = dark.anomaly_map.copy()
    maps[0, 0, 0] = 1e-3
    assert measure_agreement(dark, dark._replace(anomaly_map=maps)).values["map_pixel"] is None


def test_decisions_that_int8_does_not_allow() -> None:
    """Many scores at the threshold: ranks and errors hardly change, but a tenth of the decisions do."""
    reference = blobs(400)
    score = reference.score.copy()
    scale = Scale.of(reference, threshold=0.5)
    score[180:220] = 0.5 + np.linspace(-1e-3, 1e-3, 40, dtype=np.float32)
    want, got = (reference._replace(score=one) for one in (score, score.copy()))
    got.score[180:220] = got.score[180:220][::-1]
    values, contract = measure_agreement(want, got, scale=scale).values, CONTRACTS["int8"]
    assert values["flips_share"] == 0.1
    assert {name for name in contract.bounds if not contract.allows(name, values[name])} == {"flips_share"}


def test_an_area_that_int8_changed_is_refused() -> None:
    """A planted fault that ranks hardly show: the lowest anomalous scores fall below the highest normal ones."""
    rng = np.random.default_rng(5)
    count = 400
    maps = rng.random((count, 4, 4), dtype=np.float32)
    anomalous = [number >= count // 2 for number in range(count)]
    scores_ = np.linspace(0, 1, count, dtype=np.float32)
    reference = Scores(scores_, maps, np.zeros((count, 4, 4, 3), np.uint8))
    swapped = scores_.copy()
    swapped[188:212] = swapped[188:212][::-1]
    contract = demanded("int8", anomalous)
    agreement = measure_agreement(reference, reference._replace(score=swapped), anomalous)
    assert agreement.values["spearman"] is not None
    assert agreement.values["spearman"] > 0.999
    assert titles(contract.failures(agreement)) == ["AUROC, change"]
    assert contract.failures(measure_agreement(reference, reference, anomalous)) == []
