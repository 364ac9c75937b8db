"""The model in its plainest form: whole timm models, every block computed, one pass per image and patch size.

What one writes first, with nothing trimmed, folded or packed; the baseline of every speed-up, and a reference for the
packed trunk of training. Its scores are those of the training modules.

Letters: N images, S pixels per side, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from qfae_train.aggregate import anomaly
from qfae_train.autoencoder import QFormerAutoencoder, Result, denormalise, normalise, perceptual_backbone
from qfae_train.backbone import create
from qfae_train.checkpoint import Checkpoint, frozen_backbones
from qfae_train.config import Backbone
from qfae_train.perceptual import Features, distance_maps
from qfae_train.weight_files import FROM_HUB, WeightFiles


class PlainPerceptual(nn.Module):
    """One complete vision transformer per patch size, weights resampled by timm's own loading.

    Args:
        backbone: the configuration of the model the weights belong to.
        state: its weights, under timm's names.
        image_size: pixels per side of the input.
        patch_sizes: the patch sizes to read.

    """

    def __init__(
        self, backbone: Backbone, state: Mapping[str, Tensor], image_size: int, patch_sizes: Sequence[int]
    ) -> None:
        super().__init__()
        self.models = nn.ModuleDict()
        for patch_size in patch_sizes:
            args = {name: value for name, value in backbone.args.items() if name != "patch_size"}
            with torch.device("meta"):  # every tensor is loaded: drawing them first would take long
                model: Any = create(replace(backbone, patch_size=patch_size, args=args), image_size)
            model.load_state_dict(checkpoint_filter_fn(dict(state), model), assign=True)
            self.models[str(patch_size)] = model
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, blocks: Sequence[int]) -> Features:
        """Return patch tokens (N, grid * grid, D) by (block numbered from 1, patch size), without the final norm."""
        features: Features = {}
        for name, model in self.models.items():
            read: Any = model
            states = read.forward_intermediates(images, norm=False, output_fmt="NLC", intermediates_only=True)
            features.update({(block, int(name)): states[block - 1] for block in blocks})
        return features


class PlainScorer(nn.Module):
    """The whole method from a checkpoint, plainly."""

    def __init__(self, checkpoint: Checkpoint, files: WeightFiles = FROM_HUB) -> None:
        super().__init__()
        config = checkpoint.config
        self.options, self.size = config.score, config.model.image_size
        *encoders, perceptual = frozen_backbones(checkpoint, files)
        self.encoders = nn.ModuleList(encoders)
        entry = perceptual_backbone(config)
        self.perceptual = PlainPerceptual(entry, perceptual.state_dict(), self.size, config.score.patch_sizes)
        with torch.device("meta"):  # only what stands around the backbones is wanted of these
            stand_ins = [create(one, self.size) for one in config.model.encoders]
        self.autoencoder = QFormerAutoencoder(config, stand_ins)
        self.taps: list[Any] = [one.taps for one in self.autoencoder.encoders]
        for encoder in self.autoencoder.encoders:
            encoder.backbone = nn.Identity()
        self.autoencoder.load_state_dict(checkpoint.trained)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Result:
        """Return score, anomaly map and reconstruction of uint8 images (N, S, S, 3)."""
        x = normalise(images)
        hidden = [self._hidden(encoder, taps, x) for encoder, taps in zip(self.encoders, self.taps, strict=True)]
        reconstruction = self.autoencoder.reconstruct(hidden)
        maps = distance_maps(
            self.perceptual(x, self.options.blocks),
            self.perceptual(reconstruction, self.options.blocks),
            self.size,
        )
        score, anomaly_map = anomaly(maps, self.options, self.size)
        return Result(score, anomaly_map, denormalise(reconstruction))

    @staticmethod
    def _hidden(encoder: Any, taps: Sequence[int], images: Tensor) -> Tensor:
        states = []
        tokens = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images)))
        for block in encoder.blocks:
            tokens = block(tokens)
            states.append(tokens)
        encoder.norm(tokens)
        return torch.cat([states[tap] for tap in taps], dim=1)
