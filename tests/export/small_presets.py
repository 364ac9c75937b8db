"""Every preset as a small model: the same tokens, patch sizes, encoders and ways to score; narrow and shallow."""

from __future__ import annotations

from typing import Any

from qfae_train.config import Config, from_dict, load

WIDTH, HEADS = 128, 2  # heads of 64, as the presets have
_BLOCKS = [1, 2, 3]


def small(preset: str) -> Config:
    values = load(preset).to_dict()
    model: dict[str, Any] = values["model"]
    narrow = {"embed_dim": WIDTH, "num_heads": HEADS}
    for entry in (*model["encoders"], values["perceptual"]):
        entry["args"] = {**entry.get("args", {}), **narrow, "depth": 4}
        entry.pop("weights", None)
    model["qformer"].update(dim=WIDTH, heads=HEADS)
    model["decoder"].update(dim=WIDTH, heads=HEADS, depth=1)
    for section in ("loss", "score"):
        values[section]["blocks"] = _BLOCKS[: len(values[section]["blocks"])]
    return from_dict(values)


def attentions(config: Config) -> dict[str, int]:
    """How many attentions the graph of a small preset has, by stage: blocks up to the last tap, once a patch size."""
    encoders = {
        "encoder" if number == 0 else f"encoder{number + 1}": 1 + 4 + max(config.model.hidden_states)
        for number in range(len(config.model.encoders))
    }
    scored = max(config.score.blocks) * len(config.score.patch_sizes)
    return {**encoders, "qformer": 1, "decoder": config.model.decoder.depth, "perceptual": scored}
