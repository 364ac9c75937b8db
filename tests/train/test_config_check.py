"""Combinations that cannot be built: the key, the value, what would be accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qfae_train.backbone_args import ACCEPTED
from qfae_train.config import ConfigError, from_dict

from .tiny import ARGS, TIMM, table

Tables = dict[str, Any]


def change(*path: str, to: Any) -> Callable[[Tables], None]:
    def apply(tables: Tables) -> None:
        for key in path[:-1]:
            tables = tables.setdefault(key, {})
        tables[path[-1]] = to

    return apply


def encoder(**entry: Any) -> Callable[[Tables], None]:
    return lambda tables: tables["model"]["encoders"][0].update(entry)


def perceptual(**entry: Any) -> Callable[[Tables], None]:
    return lambda tables: tables["perceptual"].update(entry)


CASES: dict[str, tuple[Callable[[Tables], None], list[str]]] = {
    "image too small": (
        change("model", "image_size", to=8),
        ["model.image_size: got 8; accepted are 16 to 4096 pixels"],
    ),
    "decoder patch does not divide": (
        change("model", "decoder", "patch_size", to=9),
        ["model.decoder.patch_size: 9 does not divide the image size 32; accepted are 4, 8, 16"],
    ),
    "loss patch does not divide": (
        change("loss", "patch_sizes", to=[8, 12]),
        ["loss.patch_sizes: 12 does not divide the image size 32; accepted are 4, 8, 16"],
    ),
    "no patch size": (
        change("score", "patch_sizes", to=[]),
        ["score.patch_sizes: got an empty list; at least one patch size is needed"],
    ),
    "queries do not fit the decoder": (
        change("model", "qformer", "queries", to=15),
        ["model.qformer.queries: got 15; the decoder's 4x4 grid of 8-pixel patches needs 16"],
    ),
    "heads do not divide": (
        change("model", "qformer", "heads", to=3),
        ["model.qformer.heads: 3 heads do not divide the width 32"],
    ),
    "decoder heads do not divide": (
        change("model", "decoder", "heads", to=5),
        ["model.decoder.heads: 5 heads do not divide the width 32"],
    ),
    "hidden width of zero": (
        change("model", "qformer", "mlp_ratio", to=0.03),
        ["model.qformer.mlp_ratio: got 0.03; 32 times it is the hidden width, which must be at least 1"],
    ),
    "decoder hidden width of zero": (
        change("model", "decoder", "mlp_ratio", to=0.03),
        ["model.decoder.mlp_ratio: got 0.03; 32 times it is the hidden width, which must be at least 1"],
    ),
    "no sine-cosine table of this width": (
        change("model", "decoder", "dim", to=30),
        ["model.decoder.dim: got 30; the sine-cosine table needs a multiple of 4"],
    ),
    "perceptual block beyond the depth": (
        change("loss", "blocks", to=[2, 4]),
        ["loss.blocks: block 4 of a perceptual network with 3 blocks; accepted are 1 to 3"],
    ),
    "perceptual blocks are numbered from 1": (
        change("score", "blocks", to=[0]),
        ["score.blocks: block 0 of a perceptual network with 3 blocks; accepted are 1 to 3"],
    ),
    "no perceptual block": (
        change("score", "blocks", to=[]),
        ["score.blocks: got an empty list; at least one block is needed"],
    ),
    "hidden state beyond the depth": (
        change("model", "hidden_states", to=[-1, -4]),
        ["model.hidden_states: -4 for model.encoders[0], which has 3 blocks; accepted are -1 to -3"],
    ),
    "hidden states count from the end": (
        change("model", "hidden_states", to=[0]),
        ["model.hidden_states: 0 for model.encoders[0], which has 3 blocks; accepted are -1 to -3"],
    ),
    "an encoder's own hidden state beyond the depth": (
        encoder(hidden_states=[-1, -5]),
        ["model.encoders[0].hidden_states: -5 for model.encoders[0], which has 3 blocks; accepted are -1 to -3"],
    ),
    "no hidden state": (
        change("model", "hidden_states", to=[]),
        ["model.hidden_states: got an empty list; at least one is needed"],
    ),
    "no encoder": (
        change("model", "encoders", to=[]),
        ["model.encoders: got an empty list; at least one encoder is needed"],
    ),
    "encoder patch does not divide": (
        encoder(patch_size=12),
        ["model.encoders[0].patch_size: 12 does not divide the image size 32"],
    ),
    "encoder has other patches": (
        encoder(patch_size=16),
        [f"model.encoders[0].patch_size: got 16, but '{TIMM}' has patches of 8"],
    ),
    "perceptual network has other patches": (
        perceptual(patch_size=16),
        [f"perceptual.patch_size: got 16, but '{TIMM}' has patches of 8"],
    ),
    "unknown model": (
        encoder(timm="vit_gigantic"),
        [f"model.encoders[0]: 'vit_gigantic' with args {ARGS} cannot be used: Unknown model (vit_gigantic)"],
    ),
    "no blocks": (
        encoder(args={**ARGS, "depth": 0}),
        ["model.encoders[0].args.depth: got 0; accepted are whole numbers from 1 to 128"],
    ),
    "weights by another road": (
        encoder(args={**ARGS, "pretrained": True}),
        [f"model.encoders[0].args: got 'pretrained' = True; accepted are {', '.join(ACCEPTED)}"],
    ),
    "a model that is not timm's own": (
        perceptual(timm="hf-hub:someone/model"),
        ["perceptual.timm: got 'hf-hub:someone/model'; accepted are names of timm's own models, such as "],
    ),
    "a patch size twice": (
        change("score", "patch_sizes", to=[8, 16, 8]),
        ["score.patch_sizes: got [8, 16, 8]; each patch size may stand there once"],
    ),
    "a block twice": (
        change("loss", "blocks", to=[2, 2]),
        ["loss.blocks: got [2, 2]; each block may stand there once"],
    ),
    "not a vision transformer": (
        encoder(timm="eva02_tiny_patch14_224", args={"patch_size": 8, "depth": 3}),
        [
            "model.encoders[0]: 'eva02_tiny_patch14_224' with args {'patch_size': 8, 'depth': 3} cannot be used: "
            "it is a Eva, expected a VisionTransformer"
        ],
    ),
    "unknown argument": (
        perceptual(args={**ARGS, "colour": 3}),
        [f"perceptual.args: got 'colour' = 3; accepted are {', '.join(ACCEPTED)}"],
    ),
    "perceptual network with registers": (
        perceptual(args={**ARGS, "reg_tokens": 2}),
        [
            f"perceptual: '{TIMM}' has 3 prefix tokens, expected one class token; "
            "accepted are plain vision transformers such as MAE's"
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_contradiction(case: str) -> None:
    spoil, expected = CASES[case]
    tables = table()
    spoil(tables)
    with pytest.raises(ConfigError) as caught:
        from_dict(tables)
    faults = caught.value.faults
    assert len(faults) == len(expected), faults
    for found, start in zip(faults, expected, strict=True):
        assert found.startswith(start)  # timm's own words may follow


def test_all_at_once() -> None:
    tables = table()
    for case in ("loss patch does not divide", "heads do not divide", "hidden state beyond the depth"):
        CASES[case][0](tables)
    with pytest.raises(ConfigError) as caught:
        from_dict(tables)
    assert caught.value.faults == [
        *CASES["loss patch does not divide"][1],
        *CASES["heads do not divide"][1],
        *CASES["hidden state beyond the depth"][1],
    ]


def test_arguments_of_timm_may_be_lists() -> None:
    tables = table()
    tables["model"]["encoders"][0]["args"]["patch_size"] = [8, 8]
    assert from_dict(tables).model.encoders[0].args["patch_size"] == [8, 8]
