"""INT8: the products that are computed in eight bits, and the scales that calibration images give them.

Two steps, both on a copy of the FP32 graph. Smoothing moves what is large in few channels of an activation into the
weights, where every column has a scale of its own anyway; it changes nothing in real numbers. Then each product is
given the range that its input had on the calibration images; `qdq.py` writes it into the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qfae_export.errors import ExportError
from qfae_export.graph import InferenceGraph
from qfae_export.images import ParityImages, common
from qfae_export.layers import Linear, TransformerBlock
from qfae_export.precision import INT8, Precision
from qfae_export.reference import pytorch_scores
from qfae_runtime.arrays import UInt8

_ALPHA = 0.5  # how much of an activation's spread goes into the weights; the paper's value for most models
_TINY = 1e-5


@dataclass
class _Seen:
    """The least and the largest value of every channel that a product's input had."""

    low: Tensor
    high: Tensor

    def add(self, x: Tensor) -> None:
        self.low = torch.minimum(self.low, x.amin(0))
        self.high = torch.maximum(self.high, x.amax(0))

    @property
    def largest(self) -> Tensor:
        return torch.maximum(self.low.abs(), self.high.abs()).clamp(min=_TINY)

    def scaled(self, factor: Tensor) -> _Seen:
        return _Seen(self.low * factor, self.high * factor)


def int8_graph(graph: InferenceGraph, images: UInt8, policy: Precision = INT8) -> InferenceGraph:
    """Return a copy of an FP32 graph whose products have ranges from images uint8 (N, S, S, 3), and the INT8 policy.

    The copy computes in FP32, and what the graph computes: `trace` makes eight bits of the ranges. It shares what is
    not smoothed.

    Raises:
        ExportError: a selector of the policy names nothing in this graph.

    """
    copied = graph.at(policy)
    chosen = products_in_int8(copied, policy)
    with _watched(chosen) as seen:
        pytorch_scores(copied, images)
    for name, module in copied.named_modules():
        if isinstance(module, TransformerBlock):
            _smooth(module, name, seen)
    for name, product in chosen.items():
        product.input_range = (min(float(seen[name].low.min()), 0.0), max(float(seen[name].high.max()), 0.0))
    return copied


def products_in_int8(graph: InferenceGraph, policy: Precision) -> dict[str, Linear]:
    """Return the products of a graph that a policy computes in eight bits, by their place."""
    return {name: one for name, one in graph.named_modules() if isinstance(one, Linear) and policy.in_int8(name)}


def refuse_policy(graph: InferenceGraph, policy: Precision) -> None:
    """Refuse an INT8 policy that does not fit a graph; its selectors are those of --int8-keep.

    Raises:
        ExportError: a selector names nothing in it, or nothing is left to be computed in eight bits.

    """
    graph.refuse_unknown(policy, "--int8-keep")
    if not products_in_int8(graph, policy):
        raise ExportError(
            f"--int8-keep: with {', '.join(policy.kept) or 'nothing'} in FP32, no product of this model is computed in "
            "eight bits; keep less, or leave out --int8"
        )


def calibrated_on(images: ParityImages, measured: ParityImages | None) -> tuple[dict[str, Any], str | None]:
    """Return what the manifest says of the calibration images, and a warning where they prove less than they could.

    `measured` are the images that the engine is certified on, if it is.
    """
    again = common(images, measured) if measured is not None else 0
    entry = {"images": len(images), "from": images.origin, "measured_on_too": again}
    cure = "pass --calibration-images DIR with normal images of your kind, others than those measured on"
    if again:
        return entry, f"warning: {again} of INT8's {len(images)} calibration images were measured on as well; {cure}"
    if images.stands_in and measured is not None:
        return entry, f"warning: INT8's scales come from {images.origin}; {cure}"
    return entry, None


@contextmanager
def _watched(products: dict[str, Linear]) -> Iterator[dict[str, _Seen]]:
    """Yield what the products' inputs, [..., channels], are seen to be while the graph runs within."""
    seen: dict[str, _Seen] = {}

    def watch(name: str, module: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)
        seen.setdefault(name, _Seen(x.amin(0), x.amax(0))).add(x)

    hooks = [product.register_forward_pre_hook(partial(watch, name)) for name, product in products.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _smooth(block: TransformerBlock, place: str, seen: dict[str, _Seen]) -> None:
    """Divide activations by a factor a channel, and multiply the rows of the weights that take them, in place.

    Before `qkv` and `fc1` the LayerNorm takes the division. Before `proj` v's columns do: an attention's outputs are
    sums of v's. Before `fc2` stands the GELU, which nothing passes. Products that stay FP32 are left as they are.
    """
    for norm, product, name in ((block.norm1, block.qkv, "qkv"), (block.norm2, block.fc1, "fc1")):
        if f"{place}.{name}" in seen:
            factor = _moved(product, f"{place}.{name}", seen)
            norm.weight, norm.bias = norm.weight / factor, norm.bias / factor
    if f"{place}.proj" in seen:
        factor = _moved(block.proj, f"{place}.proj", seen)
        columns = torch.cat([torch.ones(2 * len(factor)), 1 / factor])  # of q, k and v
        block.qkv.weight = block.qkv.weight * columns
        block.qkv.bias = block.qkv.bias * columns if block.qkv.bias is not None else None


def _moved(product: Linear, name: str, seen: dict[str, _Seen]) -> Tensor:
    """Multiply a product's rows by their factors, and return those."""
    factor = _factor(seen[name], product.weight)
    product.weight = product.weight * factor[:, None]
    seen[name] = seen[name].scaled(1 / factor)
    return factor


def _factor(seen: _Seen, weight: Tensor) -> Tensor:
    """Return the factor of every channel; Xiao et al., SmoothQuant, ICML 2023, equation 4."""
    rows = weight.abs().amax(1).clamp(min=_TINY)
    factor: Tensor = seen.largest**_ALPHA / rows ** (1 - _ALPHA)
    return factor
