"""A small model of the authors' with what their released code computed (tests/data/official-small), in our modules.

The weights are not stored: `recipe` makes each from its name, by NumPy alone. `expected.npz` holds probes of every
stage in FP32 on a CPU; layers in `meta.json` are numbered from 0.
"""

from __future__ import annotations

import json
import re
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from qfae_train.aggregate import Anomaly, anomaly
from qfae_train.autoencoder import AnomalyScorer, assemble, normalise, perceptual_backbone
from qfae_train.backbone import create, freeze
from qfae_train.config import Backbone, Config, Decoder, Loss, Model, Perceptual, QFormer, Score
from qfae_train.perceptual import distance_maps

FOLDER = Path(__file__).parent.parent / "data" / "official-small"

MAE_SEED_OFFSET = 1000

RENAMES = (
    (r"^encoders\.(\d+)\.final_projection\.", r"encoders.\1.projection."),
    (r"^junction\.", "qformer."),
    (r"\.attn\.Wqkv\.", ".attention.qkv."),
    (r"\.attn\.out_proj\.", ".attention.out."),
    (r"\.cross_attn\.to_out\.0\.", ".cross.out."),
    (r"\.cross_attn\.to_out\.1\.", ".cross.out_norm."),
    (r"\.cross_attn\.", ".cross."),
    (r"^(qformer\.blocks\.\d+)\.projection\.0\.", r"\1.norm."),
    (r"^(qformer\.blocks\.\d+)\.projection\.1\.", r"\1.fc1."),
    (r"^(qformer\.blocks\.\d+)\.projection\.3\.", r"\1.fc2."),
    (r"^decoder\.cls_token$", "decoder.class_token"),
    (r"^decoder\.reg_tokens$", "decoder.register_tokens"),
    (r"^decoder\.decoder_(embed|blocks|norm)\.", r"decoder.\1."),
    (r"^decoder\.decoder_prediction\.", "decoder.predict."),
)
"""From the authors' names to ours, applied in this order."""


def recipe(name: str, shape: list[int], seed: int) -> Tensor:
    """Make one weight from its name."""
    normal = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2 and name.endswith("weight"):
        normal /= np.sqrt(np.prod(shape[1:])).astype(np.float32)
    elif name.endswith(("weight", "gamma")):
        normal = 1 + np.float32(0.1) * normal
    elif name.endswith("bias"):
        normal *= np.float32(0.1)
    else:
        normal *= np.float32(0.5)
    return torch.from_numpy(normal)


def our_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


class Official:
    """Every stage of the small model, computed when first asked for: stages before a broken one still answer."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        with np.load(folder / "expected.npz") as stored:
            self.expected: dict[str, NDArray[Any]] = {name: stored[name] for name in stored}

    @cached_property
    def config(self) -> Config:
        meta = self.meta
        return Config(
            model=Model(
                encoders=tuple(Backbone(e["timm"], e["patch"]) for e in meta["encoders"]),
                image_size=meta["image_size"],
                qformer=QFormer(
                    dim=meta["junction_dim"],
                    queries=meta["queries"],
                    heads=meta["junction_heads"],
                    cross_head_dim=meta["cross_attention_head_dim"],
                ),
                decoder=Decoder(dim=meta["decoder_dim"], depth=meta["decoder_depth"], heads=meta["decoder_heads"]),
            ),
            perceptual=Perceptual(timm=meta["mae"]),
            loss=Loss(tuple(meta["train_patches"]), tuple(n + 1 for n in meta["train_layers_0based"])),
            score=Score((8, 16, 32, 56), self.score_blocks),
        )

    @property
    def score_blocks(self) -> tuple[int, ...]:
        return tuple(n + 1 for n in self.meta["eval_layers_0based"])

    @cached_property
    def authors_state(self) -> dict[str, Tensor]:
        """The authors' checkpoint as it would be loaded; the position table is fixed and comes from our decoder."""
        seed = self.meta["weight_seed"]
        return {name: recipe(name, shape, seed) for name, shape in self.meta["keys"].items()}

    @cached_property
    def scorer(self) -> AnomalyScorer:
        size = self.config.model.image_size
        encoders = []
        for number, entry in enumerate(self.config.model.encoders):
            prefix = f"encoders.{number}.model."
            state = {n.removeprefix(prefix): t for n, t in self.authors_state.items() if n.startswith(prefix)}
            encoders.append(_filled(create(entry, size), state))
        seed = self.meta["weight_seed"] + MAE_SEED_OFFSET
        mae = {name: recipe(name, shape, seed) for name, shape in self.meta["mae_keys"].items()}
        scorer = assemble(self.config, encoders, _filled(create(perceptual_backbone(self.config), size), mae))
        trained = {
            our_name(name): tensor
            for name, tensor in self.authors_state.items()
            if ".model." not in name and name != "decoder.decoder_pos_embed"
        }
        assert trained.keys() == scorer.autoencoder.trained_state().keys()
        scorer.autoencoder.load_state_dict(trained, strict=False)
        return scorer.eval()

    @cached_property
    def input(self) -> Tensor:
        paths = sorted(self.folder.glob("image_*.png"))
        images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
        return normalise(torch.from_numpy(images))

    @cached_property
    @torch.no_grad()
    def context(self) -> Tensor:
        model = self.scorer.autoencoder
        return model.context(model.hidden(self.input))

    @cached_property
    @torch.no_grad()
    def self_attention(self) -> Tensor:
        qformer = self.scorer.autoencoder.qformer
        attended: Tensor = qformer.blocks[0].get_submodule("attention")(qformer.queries)
        return attended

    @cached_property
    @torch.no_grad()
    def qformer(self) -> Tensor:
        tokens: Tensor = self.scorer.autoencoder.qformer(self.context)
        return tokens

    @cached_property
    @torch.no_grad()
    def reconstruction(self) -> Tensor:
        images: Tensor = self.scorer.autoencoder.decoder(self.qformer)
        return images

    @cached_property
    @torch.no_grad()
    def maps(self) -> dict[tuple[int, int], Tensor]:
        options, network = self.config.score, self.scorer.perceptual
        of_image = network(self.input, options.patch_sizes, options.blocks)
        of_reconstruction = network(self.reconstruction, options.patch_sizes, options.blocks)
        return distance_maps(of_image, of_reconstruction, self.config.model.image_size)

    def distance_map(self, patch_size: int) -> Tensor:
        return torch.stack([self.maps[block, patch_size] for block in self.score_blocks])

    def anomaly(self, patch_sizes: tuple[int, ...], fusion: str, spatial: str, across: str, pixel_map: str) -> Anomaly:
        options = Score(patch_sizes, self.score_blocks, fusion, spatial, across, pixel_map)
        return anomaly(self.maps, options, self.config.model.image_size)

    @cached_property
    def training(self) -> dict[str, Tensor]:
        """Loss and gradient norms of one step without dropout."""
        model = self.scorer.autoencoder
        loss = self.scorer.loss(self.scorer.loss_target(self.input), model(self.input))
        loss.backward()
        queries, last = model.qformer.queries.grad, model.decoder.predict.weight.grad
        assert queries is not None
        assert last is not None
        return {
            "train_loss": loss.detach(),
            "train_grad_queries_norm": queries.norm(),
            "train_grad_decoder_prediction_norm": last.norm(),
        }


def _filled(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    faults = model.load_state_dict(state, strict=False)
    # The backbones are made without a head and the final norm is not read, so nothing else may be missing.
    assert {name.split(".")[0] for name in faults.missing_keys} <= {"norm", "fc_norm"}, faults.missing_keys
    assert not faults.unexpected_keys
    return freeze(model)
