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
    "residual streams": {"type": "float16", "why": "read and written around every product"},
    "pixels": {"type": "float16", "why": "(grey - 114) / 64 is exact in float16 for the 256 grey levels"},
    "LayerNorm statistics": {"type": "float32", "why": "sums of squares overflow float16 in vision transformers"},
    "softmax and its sums": {
        "type": "float32",
        "why": "queries, keys and values are float16 numbers, cast to float32 around each attention: TensorRT runs "
        "that as one fused kernel which accumulates in float32",
    },
    "features to score": {
        "type": "float32",
        "why": "1 - cosine cancels most digits, and three such maps are multiplied",
    },
    "outputs": {"type": "float32", "why": "scores and maps are compared with thresholds found elsewhere"},
}
"""What an FP16 engine computes in which type. The manifest repeats it."""


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
    "features to score": {"type": "float32", "why": "1 - cosine cancels most digits, and such maps are multiplied"},
}
"""What an INT8 engine computes in which type. The manifest repeats it."""

# encoder.2.qkv, encoder2.17.fc1, decoder.1.proj, perceptual.1.fc2, but no encoder's first block.
_INT8_UNITS = re.compile(r"(encoder\d*\.(?!1\.)|decoder\.|perceptual\.)\d+\.(qkv|proj|fc1|fc2)")


@dataclass(frozen=True)
class Precision:
    """The type of every unit. `kept` are the selectors of what stays FP32 in an FP16 or INT8 graph.

    `foreign` are blocks of other kinds than are known here, which stay FP32 whatever is asked for.
    """

    name: str
    kept: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    def dtype(self, unit: str) -> torch.dtype:
        """Return the type a unit is computed in."""
        if self.name != "fp16" or any(covers(selector, unit) for selector in self.kept):
            return torch.float32
        return torch.float16

    def in_int8(self, unit: str) -> bool:
        """Say whether a unit's product is computed in eight bits."""
        kept = any(covers(selector, unit) for selector in self.kept)
        return self.name == "int8" and not kept and _INT8_UNITS.fullmatch(unit) is not None

    @classmethod
    def described(cls, stored: Mapping[str, Any]) -> Precision:
        """Return the policy that `describe` gave."""
        return cls(stored["policy"], tuple(stored.get("kept_fp32", ())))

    def describe(self) -> dict[str, Any]:
        """Return plain JSON values for the manifest."""
        if self.name == "fp32":
            return {"policy": "fp32"}
        if self.name == "int8":
            return {"policy": "int8", "rules": INT8_RULES, "kept_fp32": [*self.kept, *self.foreign]}
        return {"policy": "fp16", "rules": FP16_RULES, "kept_fp32": [*self.kept, *self.foreign]}


FP32 = Precision("fp32")
FP16 = Precision("fp16")
INT8 = Precision("int8", kept=("decoder",))
"""What INT8 is without a wish: the decoder's products stay FP32, for they cost more ranks and maps than all others."""


def covers(selector: str, unit: str) -> bool:
    """Say whether a unit is the selector's place or lies below it."""
    return unit == selector or unit.startswith(selector + ".")


def unknown_selectors(selectors: Iterable[str], units: Iterable[str]) -> list[str]:
    """Return the selectors that cover no unit."""
    units = list(units)
    return [selector for selector in selectors if not any(covers(selector, unit) for unit in units)]
