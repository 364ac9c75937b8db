"""Faults of the kinds that engines really have, each planted into the inference graph in PyTorch, as an engine.

A fault edits a graph of its own (weights, constants, precision, geometry), changes images before the right graph sees
them (colour, borders), or changes what the right graph gave (batches, ranges, outputs). Every image goes through a
graph once and its outputs are kept: what depends on the batch, a fault adds itself.

Letters: B images in a batch, S pixels per side, W width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Self
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import qfae_export.graph
from qfae_export.graph import InferenceGraph
from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import Scores
from qfae_train.autoencoder import AnomalyScorer

SIZES = (1, 2, 4, 8, 16, 32)
STAGES = ("encoder", "qformer", "decoder", "perceptual")
_TOGETHER = 8


class Fault(NamedTuple):
    """An edit of a graph, or a change of images (B, S, S, 3) or of outputs on them; `state` is the engine's."""

    kind: str
    name: str
    edit: Callable[[Any], object] | None = None
    before: Callable[[UInt8], UInt8] | None = None
    after: Callable[[UInt8, Scores, dict[str, Any]], Scores | None] | None = None


class Rows:
    """A graph whose outputs on each image are kept."""

    def __init__(self, scorer: AnomalyScorer, edit: Callable[[Any], object] | None = None) -> None:
        self._graph = InferenceGraph(scorer)
        with torch.no_grad():
            if edit is not None:
                edit(self._graph)
        self._known: dict[bytes, Scores] = {}

    def __call__(self, images: UInt8) -> Scores:
        """Return the outputs on uint8 (B, S, S, 3)."""
        keys = [image.tobytes() for image in images]
        new = [place for place, key in enumerate(keys) if key not in self._known and keys.index(key) == place]
        for start in range(0, len(new), _TOGETHER):
            places = new[start : start + _TOGETHER]
            with torch.no_grad():
                outputs = Scores(*(one.numpy() for one in self._graph(torch.from_numpy(images[places]))))
            self._known |= {keys[place]: outputs.of([row]) for row, place in enumerate(places)}
        return Scores.joined(self._known[key] for key in keys)


class Faulty:
    """An engine with a fault. Keeps to Engine."""

    backend, device, version = "pytorch", "cpu", torch.__version__
    max_batch = SIZES[-1]

    def __init__(self, fault: Fault, right: Rows, scorer: AnomalyScorer, batches: tuple[int, ...] = SIZES) -> None:
        self.image_size, self.batches = scorer.config.model.image_size, batches
        self._fault, self._rows = fault, Rows(scorer, fault.edit) if fault.edit is not None else right
        self._state: dict[str, Any] = {}

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        """Score uint8 (B, S, S, 3); see Engine.run."""
        given = self._fault.before(images.copy()) if self._fault.before is not None else images
        scores = self._rows(np.ascontiguousarray(given))
        if self._fault.after is None:
            return scores
        with np.errstate(all="ignore"):
            return self._fault.after(images, scores, self._state) or scores

    def close(self) -> None:
        """Free nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None: ...


def head(graph: Any, place: str, part: str, factor: float, number: int = 1) -> None:
    """Scale what one head's q, k or v is made with, weight and bias."""
    qkv, heads = graph.get_submodule(f"{place}.qkv"), graph.get_submodule(f"{place}.attention").heads
    width = qkv.bias.numel() // 3
    start = "qkv".index(part) * width + number * width // heads
    for one in (qkv.weight, qkv.bias):
        one[..., start : start + width // heads] *= factor


def swap_heads(graph: Any, place: str, part: str) -> None:
    """Exchange the first two heads of q, k or v."""
    qkv, heads = graph.get_submodule(f"{place}.qkv"), graph.get_submodule(f"{place}.attention").heads
    width = qkv.bias.numel() // 3
    start, size = "qkv".index(part) * width, width // heads
    for one in (qkv.weight, qkv.bias):
        one[..., start : start + 2 * size] = one[..., start : start + 2 * size].roll(size, -1)


def noise(graph: Any, place: str, share: float) -> None:
    """Add noise to one matrix, as a share of its own spread."""
    weight = graph.get_submodule(place).weight
    weight.add_(share * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))


def through(graph: Any, stage: str, dtype: torch.dtype) -> None:
    """Round all weights of a stage to fewer bits."""
    for tensor in graph.get_submodule(stage).buffers():
        tensor.copy_(tensor.to(dtype).float())


def put(graph: Any, tensor: str, index: Any, value: float) -> None:
    """Set some elements of a tensor."""
    place, _, name = tensor.rpartition(".")
    getattr(graph.get_submodule(place), name)[index] = value


def times(graph: Any, tensor: str, index: Any, factor: float) -> None:
    """Scale some elements of a tensor."""
    place, _, name = tensor.rpartition(".")
    getattr(graph.get_submodule(place), name)[index] *= factor


def epsilon(graph: Any, stage: str, eps: float) -> None:
    """Give every LayerNorm of a stage another constant."""
    for module in graph.get_submodule(stage).modules():
        if hasattr(module, "eps"):
            module.eps = eps


def shift(graph: Any, place: str, by: int = 1) -> None:
    """Move a table of positions by some tokens."""
    table = graph.get_submodule(place).value
    table.copy_(table.roll(by, 1))


def without_prefix(graph: Any, stage: str) -> None:
    """Leave out the last token before the patches."""
    prefix = graph.get_submodule(f"{stage}.embed.prefix")
    prefix.value = prefix.value[:, :-1]
    if stage == "decoder":
        graph.decoder.prefix -= 1


def without_null(graph: Any) -> None:
    """Leave the null key and value out of the cross-attention."""
    attention = graph.qformer.get_submodule("1").cross.attention
    right = attention.forward
    attention.forward = lambda q, k, v: right(q, k[:, 1:], v[:, 1:])


def within(graph: Any, place: str, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """While a part of the graph computes ("" for all of it), let a function of a library be another."""
    module = graph.get_submodule(place)
    right = module.forward

    def forward(*given: Any) -> Any:
        with mock.patch.object(owner, name, make(getattr(owner, name))):
            return right(*given)

    module.forward = forward


def tanh_gelu(right: Any) -> Any:
    """Return GELU by tanh."""
    return lambda x, **_: right(x, approximate="tanh")


def fast_gelu(right: Any) -> Any:
    """Return GELU by a sigmoid."""
    return lambda x, **_: x * torch.sigmoid(1.702 * x)


def of_rounded(right: Any, to: Callable[[Tensor], Tensor]) -> Any:
    """Return a function that rounds what it is given."""
    return lambda a, b, **other: right(to(a), to(b), **other)


def rounded_after(right: Any, to: Callable[[Tensor], Tensor]) -> Any:
    """Return a function that rounds what it gives."""
    return lambda *given, **other: to(right(*given, **other))


def tf32(x: Tensor) -> Tensor:
    """Return float32 with ten bits behind the point, as a GPU's TF32 products take it."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def half(x: Tensor) -> Tensor:
    """Return what FP16 leaves."""
    return x.half().float()


def bf16(x: Tensor) -> Tensor:
    """Return what BF16 leaves."""
    return x.bfloat16().float()


def resize(right: Any, **changed: Any) -> Any:
    """Return a resize with other options."""
    return lambda x, **options: right(x, **{key: value for key, value in (options | changed).items() if value != ""})


def products(place: str, to: Callable[[Tensor], Tensor], make: Any = of_rounded) -> Callable[[Any], None]:
    """Return an edit that rounds the operands (or the results) of all products of a place."""
    return lambda graph: within(graph, place, torch, "matmul", partial(make, to=to))


def gelu(place: str, make: Any = tanh_gelu) -> Callable[[Any], None]:
    """Return an edit that approximates GELU."""
    return lambda graph: within(graph, place, F, "gelu", make)


def soft(place: str, make: Any) -> Callable[[Any], None]:
    """Return an edit of the softmax."""
    return lambda graph: within(graph, place, torch, "softmax", make)


def resized(**changed: Any) -> Callable[[Any], None]:
    """Return an edit of how distance maps are made larger."""
    return lambda graph: within(graph, "", F, "interpolate", partial(resize, **changed))


def enters(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """Return an edit of the normalisation."""
    return lambda graph: within(
        graph, "", qfae_export.graph, "entering", lambda right: lambda greys: change(right(greys))
    )


def at(size: int, change: Callable[[Scores], object]) -> Any:
    """Return a change of outputs in batches of one size."""
    return lambda images, got, state: change(got) if len(images) == size else None


def weaken(got: Scores, rows: Any = slice(None), factor: float = 0.99) -> None:
    """Scale scores and maps of some rows."""
    for one in (got.score, got.anomaly_map):
        one[rows] *= factor


def where(hit: Callable[[UInt8], Any], factor: float) -> Any:
    """Return a change of scores and maps of images for which `hit` holds."""
    return lambda images, got, state: weaken(got, np.array([bool(hit(image)) for image in images]), factor)


def above(limit: float, value: Callable[[Any], Any], outputs: tuple[str, ...] = ("score", "anomaly_map")) -> Any:
    """Return a change of what exceeds a limit."""

    def change(images: UInt8, got: Scores, state: dict[str, Any]) -> None:
        for name in outputs:
            one = getattr(got, name)
            one[...] = np.where(one > limit, value(one), one)

    return change


def carried(images: UInt8, got: Scores, state: dict[str, Any]) -> Scores:
    """Return the first map of the batch before in place of this one's."""
    kept, state["map"] = state.get("map"), got.anomaly_map[:1].copy()
    return got._replace(anomaly_map=np.concatenate([kept, got.anomaly_map[1:]])) if kept is not None else got


def every(number: int, images: UInt8, got: Scores, state: dict[str, Any]) -> None:
    """Weaken the outputs of every so many-th batch."""
    state["batches"] = state.get("batches", 0) + 1
    if state["batches"] % number == 0:
        weaken(got)


def border(width: int, images: UInt8, value: float = 0) -> Any:
    """Set a border of images or maps."""
    for edge in (np.s_[:, :width], np.s_[:, -width:], np.s_[:, :, :width], np.s_[:, :, -width:]):
        images[edge] = value
    return images


def inner_score(width: int, images: UInt8, got: Scores, state: dict[str, Any]) -> None:
    """Take the maximum of the map without its border."""
    got.score[...] = got.anomaly_map[:, width:-width, width:-width].max((1, 2))


def greyed(images: UInt8, least: int) -> UInt8:
    """Make pixels grey whose channels are farther apart than so many levels."""
    grey = np.rint(images.mean(3, keepdims=True)).astype(np.uint8)
    return np.where(np.ptp(images, axis=3, keepdims=True) > least, grey, images)


def written(name: str, change: Callable[[Any], Any]) -> Any:
    """Return a change of one output."""
    return lambda images, got, state: got._replace(**{name: change(getattr(got, name))})
