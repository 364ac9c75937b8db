"""The bounds: which outputs pass, and what is said of those that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from qfae_runtime.agreement import FLIP_REACH, Scale, measure_agreement
from qfae_runtime.contract import CONTRACTS, Contract, beyond_pytorch, demanded, scores_agree
from qfae_runtime.engines.base import Scores

from .test_agreement import changed, scores
from .tiny import yardstick_of

FP32, FP16 = CONTRACTS["fp32"], CONTRACTS["fp16"]


def failures(reference: Scores, got: Scores, contract: Contract = FP32) -> list[str]:
    return contract.failures(measure_agreement(reference, got, yardstick=yardstick_of(reference)))


def titles(sentences: list[str]) -> list[str]:
    return [sentence.partition(":")[0] for sentence in sentences]


def test_what_the_contracts_promise() -> None:
    assert dict(FP32.bounds) == {
        "score_typical": 5.0,
        "score_worst": 30.0,
        "spearman": 0.999,
        "flips_beyond": 0.0,
        "map_typical": 5.0,
        "map_worst": 30.0,
        "map_pixel": 30.0,
        "map_cosine_p1": 0.9995,
        "reconstruction_typical": 5.0,
        "reconstruction_worst": 30.0,
        "reconstruction_levels": 1.0,
    }
    assert dict(FP16.bounds) == {
        "score_distance": 1e-3,
        "score_distance_max": 0.01,
        "spearman": 0.999,
        "map_angle": 1e-3,
        "map_angle_max": 5e-3,
        "reconstruction_p999": 2.0,
        "stress_distance": 0.01,
        "stress_share": 0.025,
        "stress_angle": 0.015,
        "stress_cosine": 0.995,
        "stress_reconstruction": 1.2,
    }
    assert CONTRACTS["bf16"].bounds == FP16.bounds


def test_a_decision_may_change_as_far_from_the_threshold_as_a_score_may_be_off() -> None:
    assert FP32.bounds["score_worst"] == FLIP_REACH


def test_equal_outputs_pass() -> None:
    assert failures(scores(), scores()) == failures(scores(), scores(), FP16) == []


def test_one_pixel_off_is_found_and_named() -> None:
    reference = scores()
    value = float(reference.anomaly_map[1, 2, 3])
    got = changed(reference, "anomaly_map", (1, 2, 3), value + 2e-4)
    agreement = measure_agreement(reference, got, yardstick=yardstick_of(reference))
    sentences = FP32.failures(agreement, ["a.png", "b.png"])
    share = 2e-4 / (2e-6 * float(reference.anomaly_map[1].max()))
    assert sentences[-1] == (
        f"map error, worst pixel / PyTorch's own: {share:.3g} exceeds 30, worst at image 1, y 2, x 3 (b.png): "
        f"expected {value:.7g}, got {float(np.float32(value + 2e-4)):.7g}"
    )


@pytest.mark.parametrize("height", [1.0, 1e-4, 1e-7])
def test_a_fault_shows_however_low_the_scores(height: float) -> None:
    """Errors are in units of what rounding costs on these very images; the floor of 1e-12 is below them all."""
    reference = scores()
    low = Scores(reference.score * np.float32(height), reference.anomaly_map * np.float32(height), reference[2])
    assert failures(low, low) == []
    flipped = low._replace(anomaly_map=np.ascontiguousarray(low.anomaly_map.swapaxes(1, 2)))
    beyond = {"map error, typical / PyTorch's own", "map error, worst image / PyTorch's own", "map cosine, p1"}
    assert beyond <= set(titles(failures(low, flipped)))
    shuffled = low._replace(score=low.score[::-1].copy())
    assert {"score error, typical / PyTorch's own", "score ranks, Spearman"} <= set(titles(failures(low, shuffled)))
    # Every score by two ten thousandths of itself: a hundred times what rounding costs.
    scaled = low._replace(score=low.score * np.float32(1 + 2e-4))
    assert "score error, typical / PyTorch's own" in titles(failures(low, scaled))
    # By a few of the last digits: what rounding does.
    rounded = low._replace(score=low.score * np.float32(1 + 3e-6))
    assert failures(low, rounded) == []


def test_without_pytorchs_own_error_fp32_cannot_be_judged() -> None:
    values = measure_agreement(scores(), scores()).values
    assert not FP32.holds(values)
    assert CONTRACTS["fp16"].holds(values)


def test_what_pytorch_breaks_itself_is_not_asked_of_an_engine() -> None:
    kept = measure_agreement(scores(), scores(), yardstick=yardstick_of(scores())).values
    assert beyond_pytorch(FP32, kept) == []
    assert beyond_pytorch(FP32, {**kept, "spearman": 0.99, "flips_beyond": 2.0}) == ["spearman", "flips_beyond"]
    assert beyond_pytorch(FP32, {**kept, "spearman": None}) == []  # nothing is known of it


def test_swapped_channels_of_a_nearly_grey_reconstruction_are_seen() -> None:
    """No value is more than one level off, but far more values differ than rounding explains."""
    rng = np.random.default_rng(3)
    grey = np.repeat(rng.integers(10, 240, (12, 16, 16, 1), dtype=np.uint8), 3, axis=3)
    grey[..., 0] += rng.random(grey.shape[:3]) < 0.05
    reference = scores(12, 16)._replace(reconstruction=grey)
    swapped = reference._replace(reconstruction=grey[..., ::-1].copy())
    assert titles(failures(reference, swapped)) == [
        "reconstruction, typical / PyTorch's own",
        "reconstruction, worst image / PyTorch's own",
    ]


def test_reconstruction_may_be_one_level_off_but_not_two() -> None:
    reference = scores()
    level = int(reference.reconstruction[0, 1, 2, 0])
    assert failures(reference, changed(reference, "reconstruction", (0, 1, 2, 0), level + 1)) == []
    assert failures(reference, changed(reference, "reconstruction", (0, 1, 2, 0), level - 2))[-1:] == [
        "reconstruction, grey levels: 2 exceeds 1, worst at image 0, y 1, x 2, channel 0: "
        f"expected {level}, got {level - 2}"
    ]


def test_what_is_undefined_fails_with_a_cure() -> None:
    same = scores()._replace(score=np.full(12, 0.5, np.float32))
    assert failures(same, changed(same, "score", (0,), 0.500001)) == [
        "score ranks, Spearman is undefined: the reference does not tell these images apart; "
        "measure on images of which some are normal and some are not"
    ]


def test_a_fault_is_the_only_sentence() -> None:
    assert failures(scores(2), scores(3)) == ["score: expected shape (2,), got (3,)"]


@pytest.mark.parametrize(
    ("name", "bound", "expected"),
    [("map_angle", 5e-4, True), ("map_angle", 2e-3, False), ("spearman", 0.9999, True), ("spearman", 0.99, False)],
)
def test_stricter_and_laxer(name: str, bound: float, expected: bool) -> None:
    assert replace(FP16, bounds={**FP16.bounds, name: bound}).is_as_strict_as(FP16) is expected


def test_a_missing_bound_is_laxer() -> None:
    assert not replace(FP16, bounds={"score_distance": 0.0}).is_as_strict_as(FP16)
    assert not FP16.is_as_strict_as(FP32)


# --- INT8 ---


def test_what_int8_promises() -> None:
    """That images are told apart as before: typical errors, ranks, decisions, and the area where labels say it."""
    assert dict(CONTRACTS["int8"].bounds) == {
        "score_distance": 0.01,
        "score_distance_max": 0.15,
        "spearman": 0.995,
        "map_angle": 0.01,
        "map_angle_max": 0.02,
        "map_cosine_p1": 0.75,
        "map_cosine_min": 0.5,
        "reconstruction_p999": 4.0,
        "stress_distance": 0.04,
        "stress_share": 0.1,
        "stress_angle": 0.25,
        "stress_cosine": 0.9,
        "stress_reconstruction": 20.0,
    }


@pytest.mark.parametrize(
    ("precision", "flips", "images", "auroc", "pairs"),
    [("fp16", 0.02, 50, 0.001, 10_000), ("bf16", 0.02, 50, 0.001, 10_000), ("int8", 0.05, 20, 0.003, 3_334)],
)
def test_bounds_that_few_images_cannot_show_are_asked_of_many(
    precision: str, flips: float, images: int, auroc: float, pairs: int
) -> None:
    contract = CONTRACTS[precision]
    assert demanded(precision, [None] * (images - 1)) == contract
    assert dict(demanded(precision, [None] * images).bounds) == {**contract.bounds, "flips_share": flips}
    normal, anomalous = 50, -(-pairs // 50)
    enough = [False] * normal + [True] * anomalous
    assert demanded(precision, enough).bounds["auroc_change"] == auroc
    assert "auroc_change" not in demanded(precision, enough[:-1]).bounds, "one pair would be too much of the bound"
    assert demanded(precision, enough).is_as_strict_as(contract)


def test_fp32_is_asked_the_same_of_any_number_of_images() -> None:
    assert demanded("fp32", [True, False] * 500) == FP32


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


EVERY = {"map_angle", "map_angle_max", "map_cosine_p1", "map_cosine_min"}


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        (lambda maps: maps.transpose(0, 2, 1), EVERY),
        (lambda maps: maps * 0, EVERY),
        (lambda maps: maps * 2, {"map_angle", "map_angle_max"}),
        (lambda maps: maps * 0.8, {"map_angle", "map_angle_max"}),
        (
            lambda maps: np.concatenate([maps[:2], maps[2:3, ::-1], maps[3:]]),
            EVERY,
        ),
    ],
    ids=["transposed", "zero", "twice", "paler", "one upside down"],
)
def test_maps_that_int8_does_not_allow(
    fault: Callable[[NDArray[np.float32]], NDArray[np.float32]], broken: set[str]
) -> None:
    reference = blobs()
    got = reference._replace(anomaly_map=np.ascontiguousarray(fault(reference.anomaly_map)))
    values = measure_agreement(reference, got).values
    contract = CONTRACTS["int8"]
    assert {name for name in contract.bounds if not contract.allows(name, values[name])} == broken


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("score", [1e-6, 2.7e-8])
def test_a_fault_of_stress_images_that_score_low_is_refused(precision: str, score: float) -> None:
    """0.01 and 0.003 as distance, as a model's own constant images may score: no absolute bound sees them vanish."""
    reference = blobs()
    reference.score[0], reference.anomaly_map[0] = score, reference.anomaly_map[0] * score
    contract = CONTRACTS[precision]

    def broken(factor: float) -> set[str]:
        got = reference._replace(score=reference.score.copy())
        got.score[0] *= factor
        scale = Scale.of(reference, factors=3)
        values = measure_agreement(reference, got, scale=scale, stress=[0]).values
        return {name for name in contract.bounds if not contract.allows(name, values[name])}

    assert "stress_share" in broken(1e-4)
    assert "stress_share" in broken(0.5)
    assert broken(0.95) == set()
    assert "stress_distance" not in broken(0.5)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_stress_images_map_moved_by_two_pixels_is_refused(precision: str) -> None:
    """However low it is: the errors of a low map are small angles."""
    reference = blobs()
    reference.anomaly_map[0] *= 1e-12
    moved = reference._replace(anomaly_map=reference.anomaly_map.copy())
    moved.anomaly_map[0] = np.roll(moved.anomaly_map[0], 2, 1)
    agreement = measure_agreement(reference, moved, scale=Scale.of(reference, factors=3), stress=[0])
    assert titles(CONTRACTS[precision].failures(agreement, ["made up"])) == ["stress images"]
    [sentence] = CONTRACTS[precision].failures(agreement, ["made up"])
    assert sentence.startswith("stress images: map cosine, least: 0.")
    assert sentence.endswith("worst at image 0 (made up)")


def test_decisions_that_int8_does_not_allow() -> None:
    """Many scores at the threshold: ranks and errors hardly change, but a tenth of the decisions do."""
    reference = blobs(400)
    score = reference.score.copy()
    scale = Scale.of(reference, threshold=0.5)
    score[180:220] = 0.5 + np.linspace(-1e-3, 1e-3, 40, dtype=np.float32)
    want, got = (reference._replace(score=one) for one in (score, score.copy()))
    got.score[180:220] = got.score[180:220][::-1]
    values, contract = measure_agreement(want, got, scale=scale).values, demanded("int8", [None] * 400)
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
