"""What each unit costs and how much its rounding to FP16 would show in the score: where a bisection looks first.

One pass of the FP32 graph in PyTorch, forwards and backwards. Forwards, every unit is computed again with weights,
inputs and output rounded to FP16, which gives the error it makes by itself; backwards, the score's gradient says how
much of an error at this place arrives at the end. The product of both is a first-order estimate; an overflow counts as
infinite. It orders the trials and decides nothing. Units that the FP16 policy leaves in FP32 are not looked at: none of
them is a product.

Letters: B images, S pixels per side, T tokens.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qfae_export.graph import InferenceGraph, entering
from qfae_export.layers import Attend, CausalAttend, Linear, Unit
from qfae_export.precision import FP16
from qfae_runtime.arrays import UInt8


@dataclass(frozen=True)
class Survey:
    """What was seen of every unit that is FP16 by rule.

    products  floating-point operations of its matrix products on one image, attention included
    effect    expected square of what its rounding adds to the score (of half a graph: to what it gives)
    """

    products: dict[str, float]
    effect: dict[str, float]


def survey(graph: InferenceGraph, images: UInt8, reconstructions: UInt8) -> Survey:
    """Look at these units of an FP32 graph on uint8 (B, S, S, 3) images, one at a time for the memory's sake.

    `reconstructions`, of the same shape, are read by the scoring half alone.
    """
    units, seen = graph.halved(FP16), Survey(defaultdict(float), defaultdict(float))
    with _watched(graph, units, seen), torch.enable_grad():
        for pair in zip(images, reconstructions, strict=True):
            _result(graph, *(entering(torch.from_numpy(one)[None].float()) for one in pair)).backward()
    count = len(images)
    return Survey(
        {unit: seen.products[unit] / count for unit in units},
        {unit: seen.effect[unit] for unit in units},
    )


def _result(graph: InferenceGraph, images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return one number that stands for what the graph gives: the score, or reconstructed pixels weighted at random."""
    if graph.part == "scorer":
        return graph.score(images, reconstructions).score.sum()
    pixels = graph.reconstruct(images)
    if graph.part == "full":
        return graph.score(images, pixels).score.sum()
    return (pixels * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))).sum()


@contextmanager
def _watched(graph: InferenceGraph, units: Sequence[str], seen: Survey) -> Iterator[None]:
    handles = [graph.get_submodule(unit).register_forward_hook(_watcher(unit, seen)) for unit in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watcher(unit: str, seen: Survey) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def watch(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen.products[unit] += _products(module, inputs)
        with torch.no_grad():
            error = _rounded_by(module, inputs) - output
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        if not torch.isfinite(error).all():
            seen.effect[unit] = math.inf
            return output
        error = error.bfloat16()  # waits for the gradient; its digits do not matter, the memory does

        def arrive(gradient: Tensor) -> None:
            seen.effect[unit] += float((gradient.nan_to_num() * error).square().sum())

        output.register_hook(arrive)
        return output

    return watch


def _rounded_by(module: nn.Module, inputs: Any) -> Tensor:
    same: dict[int, Any] = {id(tensor): tensor for tensor in module.buffers()}
    twin = copy.deepcopy(module, same)
    assert isinstance(twin, Unit)
    twin.set_dtype(torch.float16)
    twin.emulate()
    rounded: Tensor = twin.forward(*inputs)
    return rounded


def _products(module: nn.Module, inputs: Any) -> float:
    if isinstance(module, Linear):
        return float(2 * inputs[0].numel() * module.weight.shape[1])
    if isinstance(module, Attend | CausalAttend):
        q, k = inputs[0], inputs[1]
        # q k^T and the weighted sum of v. A constant q stands for the whole batch.
        return float(4 * k.shape[0] * q.shape[1] * k.shape[1] * q.shape[2])
    return 0.0
