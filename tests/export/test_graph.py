"""The rewritten graph computes what the training modules compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qfae_export.errors import ExportError
from qfae_export.graph import InferenceGraph
from qfae_export.layers import Constant, Embed, Norm, Residual, Unit
from qfae_export.precision import FP16, FP16_STREAMS, Precision
from tests.export.tiny import config_of, pictures, scorer_of, vit

CONFIGS: dict[str, dict[str, Any]] = {
    "as published": {},
    "two encoders of different width": {"encoders": [vit(), vit(width=48, depth=4)]},
    "encoder with register tokens": {"encoders": [vit(reg_tokens=4, no_embed_class=True)]},
    "encoder with LayerScale": {"encoders": [vit(init_values=0.3)]},
    "encoder with a norm before its blocks": {"encoders": [vit(pre_norm=True)]},
    "one early hidden state": {"hidden_states": (-3,)},
    "hidden states in the other order": {"hidden_states": (-3, -1)},
    "no decoder registers": {"register_tokens": 0},
    "two Q-Former blocks": {"qformer_blocks": 2},
    "three Q-Former blocks": {"qformer_blocks": 3},
    "maps kept apart": {"fusion": "separate"},
    "RSNA's reductions": {"spatial": "mean", "across": "max"},
    "largest map per pixel": {"pixel_map": "max"},
    "one patch size, last block": {"patch_sizes": [32], "blocks": [3]},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_graph_equals_training_modules(options: dict[str, Any]) -> None:
    scorer = scorer_of(config_of(**options))
    images = torch.from_numpy(pictures(5))
    want, got = scorer(images), InferenceGraph(scorer)(images)
    torch.testing.assert_close(got.score, want.score, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.anomaly_map, want.anomaly_map, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.reconstruction.int(), want.reconstruction.int(), atol=1, rtol=0)
    assert got.reconstruction.dtype == torch.uint8
    assert got.score.std() > 1e-3, "random weights must give different images different scores"


def test_scores_do_not_depend_on_the_batch() -> None:
    graph = InferenceGraph(scorer_of(config_of(qformer_blocks=2)))
    images = torch.from_numpy(pictures(5))
    together = graph(images)
    alone = torch.cat([graph(image[None]).score for image in images])
    torch.testing.assert_close(alone, together.score, atol=1e-5, rtol=0)


def test_what_was_folded_stays_when_the_scorer_changes() -> None:
    scorer = scorer_of(config_of())
    graph = InferenceGraph(scorer)
    before = graph(torch.from_numpy(pictures(2))).score
    with torch.no_grad():
        scorer.autoencoder.qformer.queries.zero_()  # folded when the graph was made
    torch.testing.assert_close(graph(torch.from_numpy(pictures(2))).score, before)
    assert not torch.allclose(InferenceGraph(scorer)(torch.from_numpy(pictures(2))).score, before)


def test_the_halves_make_the_whole() -> None:
    scorer = scorer_of(config_of())
    images = torch.from_numpy(pictures(3))
    whole = InferenceGraph(scorer)(images)
    greys, pixels = InferenceGraph(scorer, "reconstruction")(images)
    score, anomaly_map = InferenceGraph(scorer, "scorer")(images, pixels)
    assert torch.equal(greys, whole.reconstruction)
    assert torch.equal(pixels.clamp(0, 255).round().to(torch.uint8), greys)
    torch.testing.assert_close(score, whole.score, atol=1e-6, rtol=0)
    torch.testing.assert_close(anomaly_map, whole.anomaly_map, atol=1e-6, rtol=0)


def test_a_half_holds_no_weights_of_the_other() -> None:
    scorer = scorer_of(config_of())
    assert {unit.split(".")[0] for unit in InferenceGraph(scorer, "scorer").units()} == {"perceptual"}
    assert "perceptual" not in {unit.split(".")[0] for unit in InferenceGraph(scorer, "reconstruction").units()}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_fp16_stays_near(options: dict[str, Any]) -> None:
    scorer = scorer_of(config_of(**options))
    images = torch.from_numpy(pictures(5))
    want, got = scorer(images), InferenceGraph(scorer).cast(FP16)(images)
    assert (got.score.dtype, got.anomaly_map.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(got.score, want.score, atol=0.02 * float(want.score.std()), rtol=0)
    assert not torch.equal(got.score, want.score)


@pytest.mark.parametrize("name", ["as published", "three Q-Former blocks", "encoder with LayerScale"])
def test_emulated_fp16_is_as_far_from_fp32_as_fp16_itself(name: str) -> None:
    graph, images = InferenceGraph(scorer_of(config_of(**CONFIGS[name]))), torch.from_numpy(pictures(6))
    exact, half, emulated = (one(images).score for one in (graph, graph.at(FP16), graph.emulated(FP16)))
    error, other = float((half - exact).abs().max()), float((emulated - exact).abs().max())
    assert error / 4 < other < error * 4
    assert torch.equal(graph(images).score, exact)  # the graph itself is left as it is


def test_emulated_fp16_overflows_where_fp16_does() -> None:
    graph = InferenceGraph(scorer_of(config_of()))
    block = graph.get_submodule("encoder.2")
    block.get_submodule("fc1").weight.mul_(1e6)  # type: ignore[operator]
    block.get_submodule("fc2").weight.mul_(1e-6)  # type: ignore[operator]
    images = torch.from_numpy(pictures(2))
    assert torch.isfinite(graph(images).score).all()
    assert not torch.isfinite(graph.emulated(FP16)(images).score).any()
    kept = Precision("fp16", ("encoder.2.fc1", "encoder.2.fc2"))
    assert torch.isfinite(graph.emulated(kept)(images).score).all()


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_streams_and_norms_alone_are_fp32_by_rule(options: dict[str, Any]) -> None:
    """By what the units are, where the policy goes by their names."""
    graph = InferenceGraph(scorer_of(config_of(**options))).cast(FP16)
    begins = [part for one in graph.modules() if isinstance(one, Embed) for part in (one.table, one.prefix)]
    for name, unit in graph.named_modules():
        if isinstance(unit, Unit):
            stream = isinstance(unit, Norm | Residual) or (isinstance(unit, Constant) and unit in begins)
            assert unit.dtype == (torch.float32 if stream else torch.float16), name
    assert all(unit.dtype == torch.float16 for unit in graph.cast(FP16_STREAMS).modules() if isinstance(unit, Unit))


def test_a_stream_beyond_float16_is_borne() -> None:
    """Two sums of 40,000 pass 65,504 where no summand does; the next block takes them away again."""
    scorer = scorer_of(config_of())
    blocks: Any = scorer.autoencoder.encoders[0].backbone.blocks  # type: ignore[union-attr]
    with torch.no_grad():
        for number, sign in ((0, 1), (1, -1)):
            for layer in (blocks[number].attn.proj, blocks[number].mlp.fc2):
                layer.weight[3] = 0  # or the sums would be rounded to other numbers than they are made of
                layer.bias[3] = sign * 40_000
    graph, images = InferenceGraph(scorer), torch.from_numpy(pictures(4))
    want = graph(images)
    for rounded in (graph.at, graph.emulated):
        assert not torch.isfinite(rounded(FP16_STREAMS)(images).score).any()
        got = rounded(FP16)(images)
        assert torch.isfinite(got.score).all()
        torch.testing.assert_close(got.score, want.score, atol=0.02 * float(want.score.std()), rtol=0)
        assert not torch.equal(got.score, want.score)


def test_every_unit_kept_is_fp32_again() -> None:
    scorer = scorer_of(config_of())
    images = torch.from_numpy(pictures(3))
    graph = InferenceGraph(scorer)
    want = graph(images)
    everything = Precision("fp16", ("encoder", "qformer", "decoder", "perceptual"))
    assert torch.equal(graph.cast(everything)(images).score, want.score)


def test_one_unit_kept() -> None:
    graph = InferenceGraph(scorer_of(config_of())).cast(Precision("fp16", ("perceptual.2", "encoder.1.fc1")))
    types = {name: module.dtype for name, module in graph.named_modules() if name in graph.units()}
    kept = {name for name in graph.halved(FP16) if types[name] == torch.float32}
    assert kept == {f"perceptual.2.{name}" for name in ("qkv", "attention", "proj", "fc1", "fc2")} | {"encoder.1.fc1"}
    others = set(graph.units()) - set(graph.halved(FP16))
    assert {types[name] for name in others} == {torch.float32}, "by rule"


def test_a_place_that_is_not_there() -> None:
    graph = InferenceGraph(scorer_of(config_of()))
    with pytest.raises(
        ExportError, match=r"^precision: perceptual\.21, tail: no such place in this model; expected, for example, "
    ):
        graph.cast(Precision("fp16", ("perceptual.21", "perceptual.1", "tail")))


def test_a_block_of_another_kind_stays_as_it_is() -> None:
    scorer = scorer_of(config_of(encoders=[vit(qk_norm=True)]))
    images = torch.from_numpy(pictures(3))
    want, graph = scorer(images), InferenceGraph(scorer)
    torch.testing.assert_close(graph(images).score, want.score, atol=1e-5, rtol=0)
    assert [unit for unit in graph.units() if unit.startswith("encoder.")] == [
        "encoder.embed.product",
        "encoder.embed.table",
        "encoder.embed.prefix",
    ]
    graph.cast(FP16)
    torch.testing.assert_close(graph(images).score, want.score, atol=0.02 * float(want.score.std()), rtol=0)


def test_dropout_is_off_whatever_mode_the_scorer_was_in() -> None:
    scorer = scorer_of(config_of()).train()
    graph, images = InferenceGraph(scorer), torch.from_numpy(pictures(2))
    assert torch.equal(graph(images).score, graph(images).score)
