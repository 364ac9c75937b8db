"""Models of any configuration at full size on random weights: for benchmarks and tests, where no weights are at hand.

`trained_like` draws them, so that every stage is conditioned as a trained one is: hidden states keep their rank,
attention is neither uniform nor on one token, and scores differ by far more than rounding moves them.
"""

from __future__ import annotations

import torch
from torch import nn

from qfae_export.trained_like import fill
from qfae_train.autoencoder import AnomalyScorer, assemble, frozen_entries
from qfae_train.backbone import blank
from qfae_train.checkpoint import Checkpoint, without_files
from qfae_train.config import Backbone, Config


def random_scorer(config: Config, seed: int) -> AnomalyScorer:
    """Return the scorer of a configuration, in eval mode, its weights made from the seed alone; needs no network.

    The same seed gives the same weights on every machine that has this version of torch. Weight files that the
    configuration names are not read.
    """
    return _scorer(config, seed, _backbones(config, seed))


def random_checkpoint(config: Config, seed: int) -> Checkpoint:
    """Return the same weights as a checkpoint, the frozen ones embedded at full depth; there are no images in it."""
    config = without_files(config)
    backbones = _backbones(config, seed)
    embedded = {f"random-{seed}-{number}": dict(one.state_dict()) for number, one in enumerate(backbones)}
    entries = [entry for entry, _ in frozen_entries(config)]
    frozen = [
        {"timm": entry.timm, "source": "random", "sha256": digest}
        for entry, digest in zip(entries, embedded, strict=True)
    ]
    size = config.model.image_size
    return Checkpoint(
        config,
        trained=_scorer(config, seed, backbones).autoencoder.trained_state(),
        frozen=frozen,
        embedded=embedded,
        parity_images=torch.zeros(0, size, size, 3, dtype=torch.uint8),
        record={},
    )


def _backbones(config: Config, seed: int) -> list[nn.Module]:
    size = config.model.image_size
    return [
        _backbone(entry, size, f"{seed}/backbone{number}") for number, (entry, _) in enumerate(frozen_entries(config))
    ]


def _scorer(config: Config, seed: int, backbones: list[nn.Module]) -> AnomalyScorer:
    with torch.random.fork_rng(devices=[]):  # what the modules draw for themselves is overwritten
        scorer = assemble(config, backbones[:-1], backbones[-1])
    fill(scorer.autoencoder, scorer.autoencoder.trained_state(), f"{seed}/autoencoder")
    return scorer.eval().requires_grad_(False)


def _backbone(entry: Backbone, image_size: int, seed: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # where it is not blank, timm has drawn weights
        model = blank(entry, image_size)
    fill(model, model.state_dict(), seed)
    backbone: nn.Module = model.eval().requires_grad_(False)
    return backbone
