"""The Q-Former autoencoder, and the scorer made of it and the perceptual network.

    images -> encoders (frozen) -> Q-Former -> decoder -> reconstruction
    image, reconstruction -> perceptual network (frozen) -> distance maps -> score, anomaly map

Letters: B images, S pixels per side, L context tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qfae_train.aggregate import Anomaly, anomaly, perceptual_loss
from qfae_train.backbone import Make, blank, create, filled, own_image_size, read_frozen
from qfae_train.config import Backbone, Config
from qfae_train.decoder import Decoder
from qfae_train.encoder import Encoder
from qfae_train.perceptual import Features, PerceptualNetwork, distance_maps
from qfae_train.qformer import QFormer

MEAN, STD = 0.449, 0.226
"""Normalisation of every channel, on the scale [0, 1] (supplement 1.4)."""


def normalise(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normalised (B, 3, S, S) of type `dtype` from uint8 (B, S, S, 3), computed in that type."""
    return (images.permute(0, 3, 1, 2).to(dtype) / 255 - MEAN) / STD


def denormalise(images: Tensor) -> Tensor:
    """Return uint8 (B, S, S, 3) from normalised (B, 3, S, S); values outside the grey scale are clipped."""
    grey = (images * STD + MEAN) * 255
    return grey.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)


class QFormerAutoencoder(nn.Module):
    """Encoders, Q-Former and decoder. Trained are the projections, the Q-Former and the decoder."""

    def __init__(self, config: Config, backbones: list[nn.Module]) -> None:
        super().__init__()
        options = config.model
        self.encoders = nn.ModuleList(
            Encoder(backbone, entry.hidden_states or options.hidden_states, options.qformer.dim)
            for backbone, entry in zip(backbones, options.encoders, strict=True)
        )
        self.qformer = QFormer(options.qformer)
        self.decoder = Decoder(options.decoder, options.qformer.dim, options.image_size)

    def hidden(self, images: Tensor) -> list[Tensor]:
        """Return each frozen encoder's hidden states, (B, L, its width), from normalised images (B, 3, S, S)."""
        return [encoder.hidden(images) for encoder in self.encoders]  # type: ignore[operator]

    def context(self, hidden: list[Tensor]) -> Tensor:
        """Return the context tokens (B, L, D): every encoder's hidden states projected, then concatenated."""
        parts = zip(self.encoders, hidden, strict=True)
        return torch.cat([encoder.get_submodule("projection")(states) for encoder, states in parts], dim=1)

    def reconstruct(self, hidden: list[Tensor]) -> Tensor:
        """Return reconstructions, normalised (B, 3, S, S), from the encoders' hidden states."""
        reconstruction: Tensor = self.decoder(self.qformer(self.context(hidden)))
        return reconstruction

    def forward(self, images: Tensor) -> Tensor:
        """Return reconstructions, normalised (B, 3, S, S), from normalised images of the same shape."""
        return self.reconstruct(self.hidden(images))

    def trained_state(self) -> dict[str, Tensor]:
        """Return the tensors that training changes; the frozen backbones are not among them."""
        return {name: tensor for name, tensor in self.state_dict().items() if ".backbone." not in name}

    def train(self, mode: bool = True) -> QFormerAutoencoder:
        """Switch training mode; the frozen backbones stay in eval mode."""
        super().train(mode)
        for encoder in self.encoders:
            encoder.get_submodule("backbone").eval()
        return self


class Result(NamedTuple):
    """What the scorer returns: the engine's three outputs."""

    score: Tensor
    """(B,) float32."""
    anomaly_map: Tensor
    """(B, S, S) float32."""
    reconstruction: Tensor
    """(B, S, S, 3) uint8."""


class AnomalyScorer(nn.Module):
    """The whole method: autoencoder and perceptual network."""

    def __init__(self, config: Config, autoencoder: QFormerAutoencoder, perceptual: PerceptualNetwork) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = autoencoder
        self.perceptual = perceptual

    @contextmanager
    def in_float64(self) -> Iterator[None]:
        """Compute in float64 for a while; the float32 weights are afterwards exactly what they were."""
        self.double()
        try:
            yield
        finally:
            self.float()

    @torch.no_grad()
    def loss_target(self, images: Tensor) -> Features:
        """Return the features of normalised images (B, 3, S, S) that the loss compares with."""
        target: Features = self.perceptual(images, self.config.loss.patch_sizes, self.config.loss.blocks)
        return target

    def loss(self, target: Features, reconstruction: Tensor) -> Tensor:
        """Return the perceptual loss of normalised reconstructions (B, 3, S, S) against `loss_target`'s features."""
        options = self.config.loss
        features = self.perceptual(reconstruction, options.patch_sizes, options.blocks)
        maps = distance_maps(target, features, self.config.model.image_size)
        return perceptual_loss(maps, options, self.config.model.image_size)

    def anomaly(self, images: Tensor, reconstruction: Tensor) -> Anomaly:
        """Return score and anomaly map of normalised images and their reconstructions."""
        options = self.config.score
        both = self.perceptual(torch.cat([images, reconstruction]), options.patch_sizes, options.blocks)
        halves = {key: tokens.chunk(2) for key, tokens in both.items()}
        return self.compare(
            {key: half[0] for key, half in halves.items()}, {key: half[1] for key, half in halves.items()}
        )

    def compare(self, of_image: Features, of_reconstruction: Features) -> Anomaly:
        """Return score and anomaly map from the perceptual network's features of images and reconstructions."""
        size = self.config.model.image_size
        return anomaly(distance_maps(of_image, of_reconstruction, size), self.config.score, size)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Result:
        """Return score, anomaly map and reconstruction of uint8 images (B, S, S, 3).

        Computed in the type of the weights: float32, or float64 after `double()`.
        """
        x = normalise(images, self.autoencoder.qformer.queries.dtype)
        reconstruction = self.autoencoder(x)
        score, anomaly_map = self.anomaly(x, reconstruction)
        return Result(score, anomaly_map, denormalise(reconstruction))


def build(config: Config) -> tuple[AnomalyScorer, list[dict[str, str]]]:
    """Return the scorer with frozen weights loaded and trained parts initialised, and the frozen weights' records.

    The records stand in the order of `frozen_entries`; see `backbone.read_frozen`.

    Raises:
        WeightsError: frozen weights are not to be had.

    """
    models: list[nn.Module] = []
    records = []
    for entry, option in frozen_entries(config):
        state, record = read_frozen(entry, option)
        # What timm draws for these models comes before the trained parts' weights in the course of a seed.
        models.append(frozen_model(config, len(models), state, record["source"], create))
        records.append(record)
    return assemble(config, models[:-1], models[-1]), records


def trained_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the sizes of all trained tensors of a configuration by name, without allocating them."""
    with torch.device("meta"):
        encoders = [create(entry, config.model.image_size) for entry in config.model.encoders]
        trained = QFormerAutoencoder(config, encoders).trained_state()
    return {name: tuple(tensor.shape) for name, tensor in trained.items()}


def frozen_entries(config: Config) -> list[tuple[Backbone, str]]:
    """Return every frozen backbone, encoders first, the perceptual network last, and the option that takes its file."""
    encoders = [(entry, f"--backbone-weights {entry.timm}=FILE") for entry in config.model.encoders]
    return [*encoders, (perceptual_backbone(config), "--perceptual-weights FILE")]


def frozen_model(config: Config, number: int, state: dict[str, Tensor], source: str, make: Make = blank) -> nn.Module:
    """Return the backbone of that number among `frozen_entries`, filled with the tensors of its file.

    Raises:
        WeightsError: the tensors do not fit.

    """
    if number < len(config.model.encoders):
        return filled(config.model.encoders[number], state, config.model.image_size, source, make)
    entry = perceptual_backbone(config)
    return filled(entry, state, own_image_size(entry, state, config.model.image_size), source, make)


def assemble(config: Config, encoders: list[nn.Module], perceptual: nn.Module) -> AnomalyScorer:
    """Return the scorer made of backbones that carry their weights already."""
    patch_sizes = [*config.loss.patch_sizes, *config.score.patch_sizes]
    last_block = max([*config.loss.blocks, *config.score.blocks])
    network = PerceptualNetwork(perceptual, config.model.image_size, patch_sizes, last_block)
    return AnomalyScorer(config, QFormerAutoencoder(config, encoders), network)


def perceptual_backbone(config: Config) -> Backbone:
    """Return the perceptual network's entry in the form the encoders have."""
    p = config.perceptual
    return Backbone(p.timm, p.patch_size, p.args, p.weights)
