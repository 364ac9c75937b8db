"""The inference graph: what an engine computes, from uint8 images to score, map and reconstruction.

    uint8 images -> normalise -> encoders -> Q-Former -> decoder -> reconstruction
    [images; reconstructions] -> perceptual network -> distance maps -> score, anomaly map

The same modules and weights as training (nothing is copied), read in a cheaper order: what reads no image is a
constant, image and reconstruction pass the perceptual network as one batch, and only the blocks and patch sizes of
the score are read. What `forward` does not read is not written to the engine file.

Letters: B images, S pixels per side, Q queries, L context tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qfae_train.aggregate import Anomaly, anomaly
from qfae_train.autoencoder import AnomalyScorer, QFormerAutoencoder, Result, denormalise, normalise
from qfae_train.perceptual import distance_maps


class InferenceGraph(nn.Module):
    """An `AnomalyScorer` rewritten for inference; scores agree with it to 1e-5.

    Shares the scorer's parameters. The folded constant is computed once, here: make a new graph after changing weights.
    """

    first_queries: Tensor
    """The queries after the first block's self-attention, [1, Q, D]: they depend on no image."""

    def __init__(self, scorer: AnomalyScorer) -> None:
        super().__init__()
        self.options = scorer.config.score
        self.image_size = scorer.config.model.image_size
        self.autoencoder: QFormerAutoencoder = scorer.autoencoder
        self.perceptual = scorer.perceptual
        with torch.no_grad():
            first = scorer.autoencoder.qformer.blocks[0]
            folded = first.get_submodule("attention")(scorer.autoencoder.qformer.queries)
        self.register_buffer("first_queries", folded.detach(), persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> Result:
        """Return score float32 (B,), map float32 (B, S, S), reconstruction uint8 (B, S, S, 3) of uint8 (B, S, S, 3)."""
        x = normalise(images)
        reconstruction = self.reconstruct(x)
        score, anomaly_map = self.score(x, reconstruction)
        # Clipped, then rounded half to even, then cast: the three have the same meaning in torch and in ONNX.
        return Result(score, anomaly_map, denormalise(reconstruction))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return reconstructions of normalised images, both (B, 3, S, S)."""
        autoencoder = self.autoencoder
        context = autoencoder.context(autoencoder.hidden(images))  # [B, L, D]
        queries = self._first_block(context)  # [B, Q, D]
        for block in autoencoder.qformer.blocks[1:]:
            queries = block(queries, context)
        reconstruction: Tensor = autoencoder.decoder(queries)
        return reconstruction

    def _first_block(self, context: Tensor) -> Tensor:
        block = self.autoencoder.qformer.blocks[0]
        # One row of queries meets a batch of contexts: norm and projection of the queries run once, not B times.
        queries = block.get_submodule("cross")(self.first_queries, context)
        hidden = nn.functional.gelu(block.get_submodule("fc1")(block.get_submodule("norm")(queries)))
        out: Tensor = block.get_submodule("fc2")(hidden)
        return out

    def score(self, images: Tensor, reconstruction: Tensor) -> Anomaly:
        """Return score and map of normalised images and reconstructions (B, 3, S, S)."""
        batch = images.shape[0]
        both = self.perceptual(torch.cat([images, reconstruction]), self.options.patch_sizes, self.options.blocks)
        maps = distance_maps(
            {key: tokens[:batch] for key, tokens in both.items()},
            {key: tokens[batch:] for key, tokens in both.items()},
            self.image_size,
        )
        return anomaly(maps, self.options, self.image_size)
