"""The rewritten graph computes what the training modules compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qfae_export.graph import InferenceGraph
from tests.export.tiny import config_of, pictures, scorer_of, vit

CONFIGS: dict[str, dict[str, Any]] = {
    "as published": {},
    "two encoders of different width": {"encoders": [vit(), vit(width=48, depth=4)]},
    "encoder with register tokens": {"encoders": [vit(reg_tokens=4, no_embed_class=True)]},
    "encoder with LayerScale": {"encoders": [vit(init_values=0.3)]},
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


def test_queries_are_folded_and_weights_are_shared() -> None:
    scorer = scorer_of(config_of())
    graph = InferenceGraph(scorer)
    before = graph(torch.from_numpy(pictures(2))).score
    with torch.no_grad():
        scorer.autoencoder.qformer.queries.zero_()  # folded into first_queries when the graph was made
    torch.testing.assert_close(graph(torch.from_numpy(pictures(2))).score, before)
    assert graph.autoencoder is scorer.autoencoder
    assert not torch.equal(InferenceGraph(scorer).first_queries, graph.first_queries)


def test_dropout_is_off_whatever_mode_the_scorer_was_in() -> None:
    scorer = scorer_of(config_of()).train()
    graph, images = InferenceGraph(scorer), torch.from_numpy(pictures(2))
    assert torch.equal(graph(images).score, graph(images).score)
