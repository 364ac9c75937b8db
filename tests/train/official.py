"""A small model of the authors' with what their released code computed (tests/data/official-small), in our modules.

The weights are not stored: `recipe` makes each from its name, by NumPy alone. `expected.npz` holds probes of every
stage in FP32 on a CPU; layers in `meta.json` are numbered from 0.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from qfae_train.aggregate import Anomaly, anomaly
from qfae_train.autoencoder import AnomalyScorer, normalise
from qfae_train.checkpoint import build_scorer
from qfae_train.config import Backbone, Config, Decoder, Loss, Model, Perceptual, QFormer, Score
from qfae_train.official import POSITIONS, open_checkpoint
from qfae_train.perceptual import distance_maps
from qfae_train.positions import sincos_2d
from qfae_train.weight_files import WeightFiles

FOLDER = Path(__file__).parent.parent / "data" / "official-small"

MAE_SEED_OFFSET = 1000


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


def made_up_state(shapes: Mapping[str, Sequence[int]], seed: int, dim: int, side: int) -> dict[str, Tensor]:
    """A checkpoint as the authors save it: every weight from its name; the position table is the fixed one."""
    state = {name: recipe(name, list(shape), seed) for name, shape in shapes.items()}
    if POSITIONS in state:
        state[POSITIONS] = sincos_2d(dim, side)[None]
    return state


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
        """The authors' checkpoint as it would be loaded."""
        decoder = self.config.model.decoder
        side = self.config.model.image_size // decoder.patch_size
        return made_up_state(self.meta["keys"], self.meta["weight_seed"], decoder.dim, side)

    @cached_property
    def mae_state(self) -> dict[str, Tensor]:
        seed = self.meta["weight_seed"] + MAE_SEED_OFFSET
        return {name: recipe(name, shape, seed) for name, shape in self.meta["mae_keys"].items()}

    def write(self, folder: Path) -> tuple[Path, WeightFiles]:
        """Write what a user holds: the authors' checkpoint and the perceptual network's weight file."""
        checkpoint, weights = folder / "last_ckpt.pth", folder / "mae.safetensors"
        torch.save(OrderedDict(self.authors_state), checkpoint)
        save_file(self.mae_state, weights)
        return checkpoint, WeightFiles(perceptual=weights)

    @cached_property
    def scorer(self) -> AnomalyScorer:
        with tempfile.TemporaryDirectory() as folder:
            path, files = self.write(Path(folder))
            return build_scorer(open_checkpoint(path, self.config, files), files)

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
