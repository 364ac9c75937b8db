"""The FP16 and INT8 policies as data: what is computed in fewer bits, what stays in FP32, and why.

A unit is an operation of the inference graph, named by its place: `encoder.12.fc1`, `qformer.1.attention`,
`decoder.head`, `perceptual.7.residual`. Blocks are numbered from 1. A selector names a unit or everything below a
place: `perceptual`, `perceptual.7`, `perceptual.7.fc1`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

FP16_RULES: dict[str, dict[str, str]] = {
    "matrix products": {"type": "float16", "why": "nearly all of the work; weights and biases are stored in float16"},
    "residual streams": {
        "type": "float32",
        "why": "each addition would round all that was added before; a sum may pass 65504 where no summand does",
    },
    "LayerNorms": {
        "type": "float32",
        "why": "they read a stream and divide by its spread; what they give is rounded once, for the product behind",
    },
    "pixels": {"type": "float16", "why": "(grey - 114) / 64 is exact in float16 for the 256 grey levels"},
    "softmax and its sums": {
        "type": "float32",
        "why": "queries, keys and values are float16 numbers, cast to float32 around each attention: TensorRT runs "
        "that as one fused kernel which accumulates in float32",
    },
    "features to score": {
        "type": "float32",
        "why": "differences of features that are nearly alike, several of which are multiplied",
    },
    "outputs": {"type": "float32", "why": "scores and maps are compared with thresholds found elsewhere"},
}
"""What an FP16 engine computes in which type. The manifest repeats it."""

_RULES_OF_FP16_STREAMS: dict[str, dict[str, str]] = {
    "residual streams": {"type": "float16", "why": "read and written around every product"},
    "LayerNorms": {"type": "float16", "why": "their statistics are float32, for sums of squares overflow float16"},
}
"""What differs where residual streams are FP16 too."""

# The sums of a residual stream, the first of which adds positions and prefix tokens, and every LayerNorm:
# encoder.embed.table, perceptual.embed16.prefix, decoder.1.residual2, encoder.norm_pre, qformer.1.cross.norm_out.
_STREAM_UNITS = re.compile(r".+\.(embed\d*\.(table|prefix)|residual[12]|norm([12]|_\w+)?)")


INT8_RULES: dict[str, dict[str, str]] = {
    "matrix products of the blocks": {
        "type": "int8",
        "why": "nearly all of the work; a scale a column of weights, a scale an activation, sums in int32",
    },
    "the encoder's first block": {
        "type": "float32",
        "why": "all others add to its residual stream",
    },
    "the decoder's head": {
        "type": "float32",
        "why": "it writes the pixels, an error of which is an error of every distance",
    },
    "embeddings and Q-Former": {"type": "float32", "why": "little work, and everything later depends on it"},
    "attentions, softmax, LayerNorm, GELU, residual streams": {"type": "float32", "why": "little work, large ranges"},
    "features to score": {
        "type": "float32",
        "why": "differences of features that are nearly alike, several of which are multiplied",
    },
}
"""What an INT8 engine computes in which type. The manifest repeats it."""

# encoder.2.qkv, encoder2.17.fc1, decoder.1.proj, perceptual.1.fc2, but no encoder's first block.
_INT8_UNITS = re.compile(r"(encoder\d*\.(?!1\.)|decoder\.|perceptual\.)\d+\.(qkv|proj|fc1|fc2)")


@dataclass(frozen=True)
class Precision:
    """The type of every unit.

    name     "fp32", "fp16" or "int8"
    kept     selectors of what stays FP32 in an FP16 or INT8 graph; they may cover what is FP32 by rule
    foreign  blocks of other kinds than are known here, which stay FP32 whatever is asked for
    streams  the type of residual streams and LayerNorms in an FP16 graph: "float32" or "float16"
    """

    name: str
    kept: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    streams: str = "float32"

    def dtype(self, unit: str) -> torch.dtype:
        """Return the type a unit is computed in."""
        if self.name != "fp16" or any(covers(selector, unit) for selector in self.kept):
            return torch.float32
        if self.streams != "float16" and _STREAM_UNITS.fullmatch(unit):
            return torch.float32
        return torch.float16

    def in_int8(self, unit: str) -> bool:
        """Say whether a unit's product is computed in eight bits."""
        kept = any(covers(selector, unit) for selector in self.kept)
        return self.name == "int8" and not kept and _INT8_UNITS.fullmatch(unit) is not None

    @classmethod
    def described(cls, stored: Mapping[str, Any]) -> Precision:
        """Return the policy that `describe` gave, here or in versions whose streams were FP16: the rules say so."""
        streams = stored.get("rules", {}).get("residual streams", {}).get("type", "float32")
        return cls(stored["policy"], tuple(stored.get("kept_fp32", ())), streams=streams)

    def describe(self) -> dict[str, Any]:
        """Return plain JSON values for the manifest."""
        if self.name == "fp32":
            return {"policy": "fp32"}
        if self.name == "int8":
            return {"policy": "int8", "rules": INT8_RULES, "kept_fp32": [*self.kept, *self.foreign]}
        rules = FP16_RULES | _RULES_OF_FP16_STREAMS if self.streams == "float16" else FP16_RULES
        return {"policy": "fp16", "rules": rules, "kept_fp32": [*self.kept, *self.foreign]}


FP32 = Precision("fp32")
FP16 = Precision("fp16")
FP16_STREAMS = Precision("fp16", streams="float16")
"""FP16 with residual streams and LayerNorms in FP16 as well: what benchmarks compare FP16 with."""
INT8 = Precision("int8", kept=("decoder",))
"""What INT8 is without a wish: the decoder's products stay FP32, for they cost more ranks and maps than all others."""
INT8_PERCEPTUAL = Precision("int8", kept=("decoder", "encoder"))
"""What it is where that breaks the contract: all that the reconstruction depends on stays FP32. What rounds image and
reconstruction alike takes little of their difference."""


def covers(selector: str, unit: str) -> bool:
    """Say whether a unit is the selector's place or lies below it."""
    return unit == selector or unit.startswith(selector + ".")


def unknown_selectors(selectors: Iterable[str], units: Iterable[str]) -> list[str]:
    """Return the selectors that cover no unit."""
    units = list(units)
    return [selector for selector in selectors if not any(covers(selector, unit) for unit in units)]
