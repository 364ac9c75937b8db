"""How far rounding moves a model's scores: what is rounded, which stage is named, what is said and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qfae_runtime.contract import CONTRACTS
from qfae_runtime.errors import ManifestError
from qfae_train import conditioning as module
from qfae_train.autoencoder import AnomalyScorer, build
from qfae_train.conditioning import ALL, FEW_IMAGES, STAGES, Conditioning, Pass, measure

from . import tiny
from .conditionings import made

CURE = "qfae-export --fp16 --bisect finds what must stay FP32"


def scorer_of(weights: Path, **sections: dict[str, Any]) -> AnomalyScorer:
    torch.manual_seed(3)
    return build(tiny.config(weights, **sections))[0].eval()


@pytest.fixture
def scorer(weights: Path) -> AnomalyScorer:
    return scorer_of(weights)


@pytest.fixture(scope="module")
def images() -> Tensor:
    rng = np.random.default_rng(1)
    grey = np.stack([tiny.picture(rng, tiny.SIZE, tiny.SIZE) for _ in range(32)])
    return torch.from_numpy(np.repeat(grey[..., None], 3, axis=3))


def mlps(scorer: AnomalyScorer) -> dict[str, Any]:
    """A first MLP of every stage, its layers `fc1` and `fc2`."""
    autoencoder: Any = scorer.autoencoder
    return {
        "encoder": autoencoder.encoders[0].backbone.blocks[0].mlp,
        "qformer": autoencoder.qformer.blocks[0],
        "decoder": autoencoder.decoder.blocks[0].mlp,
        "perceptual": scorer.perceptual.blocks[0].mlp,
    }


def halves(tensor: Tensor) -> bool:
    return torch.equal(tensor, tensor.half().float())


# ---------- what is rounded


@pytest.mark.parametrize("rounded", [(), *((stage,) for stage in STAGES), STAGES, ("encoder", "perceptual")])
def test_only_the_stages_that_were_asked_for_are_rounded(
    rounded: tuple[str, ...], scorer: AnomalyScorer, images: Tensor
) -> None:
    seen: dict[str, list[bool]] = {stage: [] for stage in STAGES}
    for stage, mlp in mlps(scorer).items():
        mlp.fc1.register_forward_hook(lambda _, __, out, stage=stage: seen[stage].append(halves(out)))
    Pass(scorer, images[:2]).outputs("fp16", rounded)
    # The perceptual network looks at the images and at their reconstructions.
    assert seen == {stage: [stage in rounded] * (2 if stage == "perceptual" else 1) for stage in STAGES}


def test_what_two_ways_have_in_common_is_computed_once(scorer: AnomalyScorer, images: Tensor) -> None:
    passes: dict[str, int] = dict.fromkeys(STAGES, 0)

    def counting(stage: str) -> Any:
        def count(*_: object) -> None:
            passes[stage] += 1

        return count

    for stage, mlp in mlps(scorer).items():
        mlp.fc1.register_forward_hook(counting(stage))
    one = Pass(scorer, images[:2])
    for rounded in [(), *((stage,) for stage in STAGES), STAGES]:
        one.outputs("fp16", rounded)
    assert passes == {"encoder": 2, "qformer": 4, "decoder": 5, "perceptual": 8}
    with torch.no_grad():
        plain = scorer(images[:2])
    again = one.outputs("fp32", ())
    assert again.score == pytest.approx(plain.score.numpy(), rel=1e-6)
    assert np.array_equal(again.reconstruction, plain.reconstruction.numpy())
    assert not np.array_equal(one.outputs("bf16", STAGES).score, one.outputs("fp16", STAGES).score)


def test_what_an_engine_computes_once_and_what_lies_within_one_product_is_not_rounded(
    scorer: AnomalyScorer, images: Tensor
) -> None:
    seen: dict[str, bool] = {}

    def watch(name: str, layer: nn.Module) -> None:
        layer.register_forward_hook(lambda _, __, out: seen.update({name: halves(out)}))

    autoencoder: Any = scorer.autoencoder
    block = autoencoder.qformer.blocks[0]
    watch("queries", block.attention)
    watch("q", block.cross.to_q)
    watch("projection", autoencoder.encoders[0].projection)
    watch("keys and values", block.cross.to_kv)
    watch("last layer", block.fc2)
    watch("embedding", autoencoder.decoder.embed)
    Pass(scorer, images[:2]).outputs("fp16", STAGES)
    assert seen == {
        "queries": False,
        "q": False,
        "projection": False,
        "keys and values": True,
        "last layer": False,
        "embedding": True,
    }


def test_blocks_that_an_export_keeps_in_fp32_are_not_rounded(scorer: AnomalyScorer, images: Tensor) -> None:
    block = mlps(scorer)["encoder"]
    block.act = nn.SiLU()  # no longer timm's plain block
    seen: list[bool] = []
    block.fc1.register_forward_hook(lambda _, __, out: seen.append(halves(out)))
    Pass(scorer, images[:2]).outputs("fp16", STAGES)
    assert seen == [False]


# ---------- what is measured


def test_the_scorer_is_left_as_it_was(scorer: AnomalyScorer, images: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in scorer.state_dict().items()}
    scorer.train()
    found = measure(scorer, images)
    assert scorer.training
    after = scorer.state_dict()
    assert all(
        torch.equal(tensor, after[name]) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    assert found == measure(scorer.eval(), images)


def test_fp32_is_measured_against_fp64_and_fp16_is_a_thousand_times_coarser(
    scorer: AnomalyScorer, images: Tensor
) -> None:
    found = measure(scorer, images)
    assert (found.images, found.stress_images) == (32, 14)
    with torch.no_grad():
        single = scorer(images).score.double()
        double = scorer.double()(images).score
    scorer.float()
    expected = ((single - double).abs() / double.clamp(min=np.percentile(double.numpy(), 95))).max()
    fp32, fp16, bf16 = (found.row(name) for name in ("fp32", "fp16", "bf16"))
    assert fp32.relative == pytest.approx(float(expected), rel=0.5)  # of the batches' sizes, float32 rounds elsewhere
    assert found.threshold == pytest.approx(float(np.percentile(double.numpy(), 95)), rel=1e-6)
    own, half, brain = (row.values["map_angle"] or 0.0 for row in (fp32, fp16, bf16))
    assert 0 < own * 300 < half < 1e-3
    assert 3 * half < brain < 24 * half
    assert found.passes("fp16")


def test_the_threshold_is_that_of_normal_images_or_the_one_given(scorer: AnomalyScorer, images: Tensor) -> None:
    with torch.no_grad():
        scores = scorer(images).score.numpy()
    labels = [number % 2 == 1 for number in range(32)]
    assert measure(scorer, images, labels).threshold == pytest.approx(np.percentile(scores[::2], 95), rel=1e-5)
    assert measure(scorer, images, labels, threshold=0.5).threshold == 0.5


def test_a_large_model_is_measured_on_few_images(
    scorer: AnomalyScorer, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE_PARAMETERS", 1000)
    found = measure(scorer, images, [False] * 31 + [True])
    assert found.images + found.stress_images == FEW_IMAGES
    assert found.images == 6
    assert "spearman" in found.row("fp16").values
    assert "spearman" not in found.shares("fp16")  # ranks of six images say nothing


@pytest.mark.parametrize("stage", STAGES)
def test_the_stage_that_is_ill_conditioned_is_named(stage: str, scorer: AnomalyScorer, images: Tensor) -> None:
    """A thousand is added within an MLP and taken out by its next layer: by then FP16 has lost the digits."""
    mlp = mlps(scorer)[stage]
    with torch.no_grad():
        mlp.fc1.bias += 1000
        mlp.fc2.weight -= mlp.fc2.weight.mean(1, keepdim=True)
    found = measure(scorer, images)
    said = found.sentence()
    title = {"encoder": "encoder", "qformer": "Q-Former", "perceptual": "perceptual network"}.get(stage, stage)
    assert said.startswith("FP16 will be refused: ")
    assert f"; most of it comes from the {title}, alone " in said
    assert said.endswith(CURE)
    assert not found.passes("fp16")
    for other in STAGES:
        assert (max(found.shares("fp16", other).values()) > 2) == (other == stage)


def test_saturated_attention_with_large_keys_overflows_in_the_qformer(scorer: AnomalyScorer, images: Tensor) -> None:
    autoencoder: Any = scorer.autoencoder
    with torch.no_grad():
        autoencoder.encoders[0].projection.weight *= 1000
        autoencoder.qformer.blocks[0].cross.to_kv.weight *= 1000
    said = measure(scorer, images).sentence()
    assert said.startswith("FP16 will be refused: score: the engine has 46 values that are not finite")
    assert said.endswith(f"; it comes from the Q-Former; {CURE}")


def test_a_model_that_gives_no_numbers_is_not_judged(scorer: AnomalyScorer, images: Tensor) -> None:
    with torch.no_grad():
        scorer.autoencoder.decoder.predict.bias.fill_(torch.nan)
    found = measure(scorer, images)
    assert found.threshold is None
    assert found.sentence().startswith("FP16 cannot be judged: score: the reference has 46 values that are not finite")
    assert Conditioning.from_dict(found.to_dict()) == found


def test_several_encoders_and_blocks(weights: Path, images: Tensor) -> None:
    table = tiny.table(weights)
    qformer = {**table["model"]["qformer"], "blocks": 3}
    model = {**table["model"], "encoders": table["model"]["encoders"] * 2, "qformer": qformer}
    assert measure(scorer_of(weights, model=model), images[:4]).row("fp16").fault is None


# ---------- what is said


def test_text() -> None:
    changed: Any = {("fp32", ALL): {"score_distance": 1.2e-7, "spearman": 1.0}, ("fp16", ALL): {"spearman": None}}
    assert made(changed).table().splitlines()[:3] == [
        "rounded                   score distance  largest  Spearman  map angle  grey levels  error / score",
        "PyTorch FP32                     1.2e-07  1.0e-03   1.00000    3.0e-04            1        1.5e-03",
        "FP16, as an engine               2.0e-04  1.0e-03  undefined    3.0e-04            1        1.5e-03",
    ]
    assert made().text().splitlines() == [
        "rounding, against PyTorch FP64 on 32 images and 14 stress images:",
        "rounded                   score distance  largest  Spearman  map angle  grey levels  error / score",
        "PyTorch FP32                     2.0e-04  1.0e-03   0.99990    3.0e-04            1        1.5e-03",
        *(
            f"{precision}, {stage:<18}         2.0e-04  1.0e-03   0.99990    3.0e-04            1        1.5e-03"
            for precision in ("FP16", "BF16")
            for stage in ("as an engine", "encoder", "Q-Former", "decoder", "perceptual network")
        ),
        "FP16: within the tolerances of an export, at most 0.30 of a bound (map error as angle, mean)",
        "BF16: within the tolerances of an export, at most 0.30 of a bound (map error as angle, mean)",
    ]


def test_sentences() -> None:
    refused: Any = {
        ("fp16", ALL): {"score_distance": 2.4e-3, "map_angle": 1.5e-3},
        ("fp16", "encoder"): {"score_distance": 1.5e-3},
        ("fp16", "qformer"): {"score_distance": 9e-4, "map_angle": 5e-3},
    }
    assert made(refused).sentence() == (
        "FP16 will be refused: score error as distance, mean: 0.0024 exceeds 0.001 (and 1 more bound is broken); "
        f"most of it comes from the encoder, alone 1.50 of the bound; {CURE}"
    )
    probably: Any = {("fp16", ALL): {"spearman": 0.9988}, ("fp16", "decoder"): {"spearman": 0.9989}}
    assert made(probably).sentence() == (
        "FP16 will probably be refused: score ranks, Spearman: 0.998800 falls below 0.999; most of it comes from the "
        f"decoder, alone 1.10 of the bound; {CURE}"
    )
    single: Any = {("bf16", ALL): {"spearman": 0.9988}}
    assert made(single).sentence("bf16") == (
        "BF16 will probably be refused: score ranks, Spearman: 0.998800 falls below 0.999; all of it comes from the "
        "perceptual network"
    )
    close: Any = {("fp16", ALL): {"score_distance_max": 0.0093}}
    assert made(close).sentence() == (
        "FP16: within the tolerances of an export, at most 0.93 of a bound (score error as distance, largest); that is "
        "close, and only the export can tell"
    )
    undefined: Any = {("fp16", ALL): {"spearman": None}}
    assert made(undefined).sentence().startswith("FP16 will be refused: score ranks, Spearman is undefined: the refer")
    overflow = {("fp16", ALL): "score: 3 infinite", ("fp16", "decoder"): "score: 2 infinite"}
    assert made(faults=overflow).sentence() == (
        f"FP16 will be refused: score: 3 infinite; it comes from the decoder; {CURE}"
    )
    together = {("fp16", ALL): "score: 3 infinite"}
    assert made(faults=together).sentence() == (
        f"FP16 will be refused: score: 3 infinite; no stage alone does that; {CURE}"
    )
    assert "FP16, as an engine        score: 3 infinite" in made(faults=together).table().splitlines()


def test_bounds_that_pytorch_breaks_itself_do_not_count() -> None:
    worse: Any = {("fp16", ALL): {"map_angle": 0.02}}
    assert not made(worse).passes("fp16")
    assert made({**worse, ("fp32", ALL): {"map_angle": 0.01}}).passes("fp16")


def test_ranks_of_few_images_do_not_count() -> None:
    worse: Any = {("fp16", ALL): {"spearman": 0.99}}
    assert not made(worse, images=32).passes("fp16")
    assert made(worse, images=31).passes("fp16")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_share_of_one_is_the_bound(precision: str) -> None:
    bounds = CONTRACTS[precision].bounds
    found = made({(precision, ALL): {**bounds}})
    assert found.shares(precision) == pytest.approx(dict.fromkeys(bounds, 1.0))
    for name, bound in bounds.items():
        for sign in (-1, 1):
            moved: Any = {(precision, ALL): {name: bound + sign * 0.001 * max(bound, 0.002)}}
            assert made(moved).passes(precision) == CONTRACTS[precision].holds(made(moved).row(precision).values)


# ---------- what is kept


def test_round_trip(scorer: AnomalyScorer, images: Tensor) -> None:
    found = measure(scorer, images[:3])
    assert Conditioning.from_dict(found.to_dict()) == found
    assert {"tolerances", *found.to_dict()} == found.said().keys()
    assert found.said()["tolerances"]["fp16"] == {"passes": found.passes("fp16"), "sentence": found.sentence()}


ROWS = "FP32, then FP16 and BF16, each of all and of every stage"
HOSTILE: list[tuple[Any, str]] = [
    (lambda c: c.pop("rows"), "key 'rows' is missing; measure again"),
    (lambda c: c.update(odd=1), "unknown key 'odd'; known here are images, rows, stress_images, threshold"),
    (lambda c: c.update(rows={}), "key 'rows': expected a list, got {}"),
    (lambda c: c.update(rows=[0] * 65), f"key 'rows': expected up to 64 rows, got {str([0] * 65)[:77]}..."),
    (lambda c: c.update(rows=[]), f"key 'rows': expected {ROWS}, got []"),
    (lambda c: c["rows"].__setitem__(2, 5), "key 'rows.2': expected an object, got 5"),
    (lambda c: c["rows"][0].update(stage="\x1b[2J"), "key 'rows.0.stage': expected characters that can be printed"),
    (lambda c: c["rows"][0].update(more=1), "unknown key 'rows.0.more'; known here are fault, precision"),
    (
        lambda c: c["rows"][1]["values"].update(flips=float("nan")),
        "key 'rows.1.values.flips': expected a finite",
    ),
    (
        lambda c: c["rows"][1]["values"].update(odd=1),
        "unknown key 'rows.1.values.odd'; known here are flips",
    ),
    (lambda c: c["rows"][1].update(values=[]), "key 'rows.1.values': expected an object, got []"),
    (lambda c: c.update(images=0), "key 'images': expected a whole number in 1.."),
    (lambda c: c.update(threshold="high"), "key 'threshold': expected a finite number, got 'high'"),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_what_is_not_a_measurement_is_refused(number: int) -> None:
    change, expected = HOSTILE[number]
    content = made().to_dict()
    change(content)
    with pytest.raises(ManifestError) as caught:
        Conditioning.from_dict(content)
    assert str(caught.value).startswith(f"conditioning: {expected}")
