"""The inference graph: what an engine computes, from uint8 images to score, map and reconstruction.

    uint8 images -> pixels -> encoders -> Q-Former -> decoder -> reconstruction
    [pixels; reconstruction] -> perceptual network -> distance maps -> score, anomaly map

Equal to the training modules and cheaper: blocks that nothing reads are cut; what reads no image is a constant (the
queries' self-attention, their LayerNorm and projection, resampled kernels and tables); neighbouring products are one
product; scales and biases are folded into weights; image and reconstruction pass the perceptual network as one batch
of 2 B, whose trunk is there once for all patch sizes. `layers.py` says why each rewriting is exact.

Letters: B images, S pixels per side.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qfae_export.errors import ExportError
from qfae_export.layers import CENTRE, UNIT, ForeignBlock, Unit
from qfae_export.precision import FP32, Precision, unknown_selectors
from qfae_export.stages import DecoderStage, EncoderStage, PerceptualStage, QFormerStage
from qfae_train.aggregate import Anomaly, anomaly
from qfae_train.autoencoder import AnomalyScorer, Result
from qfae_train.perceptual import distance_maps


class Reconstruction(NamedTuple):
    """What the reconstruction half returns."""

    reconstruction: Tensor
    """(B, S, S, 3) uint8."""
    pixels: Tensor
    """(B, S, S, 3) float32, the same before it is clipped and rounded, in grey levels."""


class InferenceGraph(nn.Module):
    """An `AnomalyScorer` rewritten for inference; scores agree with it to 1e-5 in FP32.

    The weights are folded here, once: make a new graph after changing weights. It shares what needs no change with the
    scorer. `part` leaves out the other half.
    """

    def __init__(self, scorer: AnomalyScorer, part: str = "full") -> None:
        super().__init__()
        config = scorer.config
        self.part = part
        self.options = config.score
        self.image_size = config.model.image_size
        self.precision = FP32
        self.exact = True
        autoencoder = scorer.autoencoder
        encoders: list[Any] = list(autoencoder.encoders) if part != "scorer" else []
        for number, encoder in enumerate(encoders, start=1):
            self.add_module(_encoder_name(number), EncoderStage(encoder))
        self.encoders = len(encoders)
        if part != "scorer":
            last: Any = autoencoder.qformer.blocks[-1]
            self.qformer = QFormerStage(autoencoder.qformer, [encoder.projection for encoder in encoders])
            self.decoder = DecoderStage(autoencoder.decoder, last.fc2)
        if part != "reconstruction":
            self.perceptual = PerceptualStage(scorer.perceptual, self.options.patch_sizes, self.options.blocks)
        self.requires_grad_(False)
        self.eval()

    def units(self) -> list[str]:
        """Return the place of every operation that a precision policy can name, in the order of the computation."""
        return [
            name
            for name, module in self.named_modules()
            if isinstance(module, Unit) and not isinstance(module, ForeignBlock)
        ]

    def halved(self, precision: Precision) -> list[str]:
        """Return the places of the operations that a policy computes in FP16, in the order of the computation."""
        return [unit for unit in self.units() if precision.dtype(unit) == torch.float16]

    def refuse_unknown(self, precision: Precision, option: str = "precision") -> None:
        """Refuse a policy that does not fit; `option` is where it was said.

        Raises:
            ExportError: a selector of the policy names nothing in this graph.

        """
        unknown = unknown_selectors(precision.kept, self.units())
        if unknown:
            raise ExportError(
                f"{option}: {', '.join(unknown)}: no such place in this model; expected, for example, "
                f"{', '.join(self.units()[:2])}, or a stage of it"
            )

    def cast(self, precision: Precision) -> InferenceGraph:
        """Give every unit its type in a precision policy, in place; FP32 weights that were rounded stay rounded.

        Raises:
            ExportError: a selector of the policy names nothing in this graph.

        """
        self.refuse_unknown(precision)
        for name, module in self.named_modules():
            if isinstance(module, Unit):
                module.set_dtype(precision.dtype(name))
        foreign = [name for name, module in self.named_modules() if isinstance(module, ForeignBlock)]
        self.precision = replace(precision, foreign=tuple(foreign))
        return self

    def at(self, precision: Precision) -> InferenceGraph:
        """Return this FP32 graph in a precision policy, as a copy that shares every tensor that stays FP32.

        Raises:
            ExportError: a selector of the policy names nothing in this graph.

        """
        folded = [tensor for module in self.modules() if isinstance(module, Unit) for tensor in module.folded.values()]
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers(), *folded)}
        return copy.deepcopy(self, shared).forget().cast(precision)

    def forget(self) -> InferenceGraph:
        """Drop what `in_float64` alone reads, what rounding took from folded weights (0.5 GB at full size)."""
        self.exact = False
        for module in self.modules():
            if isinstance(module, Unit):
                module.folded = {}
        return self

    @contextmanager
    def in_float64(self) -> Iterator[None]:
        """Compute in FP64 for a while, with the weights as they were folded; of the graph in FP32 alone.

        What is left between it and the modules in FP64 is what a rewriting got wrong. What tensors it shared with the
        scorer it has for itself from then on.

        Raises:
            ValueError: the graph has forgotten them.

        """
        if not self.exact:
            raise ValueError("the graph forgot its weights' FP64 values; make it again from the scorer")
        units = [module for module in self.modules() if isinstance(module, Unit)]
        try:
            for unit in units:
                unit.unround()
            yield
        finally:
            for unit in units:
                unit.set_dtype(torch.float32)  # exactly what they were

    def emulated(self, precision: Precision) -> InferenceGraph:
        """Return a copy of this FP32 graph that rounds as the policy says and computes in FP32.

        ONNX Runtime has few FP16 operations on a CPU and leaves out the rounding between the others, so that an
        overflow may not show there. Here everything is rounded that an FP16 engine rounds.

        Raises:
            ExportError: a selector of the policy names nothing in this graph.

        """
        graph = self.at(precision)
        for module in graph.modules():
            if isinstance(module, Unit):
                module.emulate()
        return graph

    def forward(self, *inputs: Tensor) -> Result | Reconstruction | Anomaly:
        """Return what the part gives.

        full            uint8 (B, S, S, 3) -> score (B,), map (B, S, S), reconstruction uint8 (B, S, S, 3)
        reconstruction  uint8 (B, S, S, 3) -> reconstruction uint8, pixels float32, both (B, S, S, 3)
        scorer          uint8 images and float32 pixels of the reconstruction -> score (B,), map (B, S, S)
        """
        images = entering(inputs[0].float())
        if self.part == "scorer":
            return self.score(images, entering(inputs[1]))
        reconstruction = self.reconstruct(images)
        # In FP32: sixteen bits would round the grey levels.
        pixels = reconstruction.float() * UNIT + CENTRE
        # Clipped, then rounded half to even, then cast: the three have the same meaning in torch and in ONNX.
        greys = pixels.clamp(0, 255).round().to(torch.uint8)
        if self.part == "reconstruction":
            return Reconstruction(greys, pixels)
        return Result(*self.score(images, reconstruction), greys)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return reconstructions of images, both as pixels that enter, (B, S, S, 3)."""
        hidden = [self.get_submodule(_encoder_name(number + 1))(images) for number in range(self.encoders)]
        reconstruction: Tensor = self.decoder(self.qformer(hidden))
        return reconstruction

    def score(self, images: Tensor, reconstruction: Tensor) -> Anomaly:
        """Return score and map, in FP32 (or FP64) from the features on, of pixels that enter, (B, S, S, 3)."""
        batch = images.shape[0]
        wide = torch.promote_types(images.dtype, reconstruction.dtype)
        both = self.perceptual(torch.cat([images.to(wide), reconstruction.to(wide)]))
        maps = distance_maps(
            {key: tokens[:batch] for key, tokens in both.items()},
            {key: tokens[batch:] for key, tokens in both.items()},
            self.image_size,
        )
        return anomaly(maps, self.options, self.image_size)


def entering(greys: Tensor) -> Tensor:
    """Return pixels as the stages take them, from grey levels 0..255 in float32."""
    return (greys - CENTRE) / UNIT


def _encoder_name(number: int) -> str:
    return "encoder" if number == 1 else f"encoder{number}"
