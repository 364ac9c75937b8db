"""How much arithmetic an image costs: the least that the method needs, and what a graph or an ONNX file really does.

One multiplication and one addition are two FLOP; only matrix products count, which are nearly all of it.

Letters: S pixels per side, T tokens, D width, L context tokens, Q queries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import nn

from benchmarks.speed.gemm import Product
from qfae_export.graph import InferenceGraph
from qfae_export.layers import Linear
from qfae_train.autoencoder import perceptual_backbone
from qfae_train.backbone import create
from qfae_train.config import Backbone, Config
from qfae_train.qformer import QFormer


def least_flop(config: Config) -> int:
    """Return the FLOP that one image needs, counted from the configuration alone.

    Blocks that nothing reads do not count, nor what reads no image; products that follow each other without anything
    between them count as one.
    """
    size, model = config.model.image_size, config.model
    total, contexts = 0, []
    for entry in model.encoders:
        vit = _vit(entry, size)
        taps = [len(vit.blocks) + state for state in entry.hidden_states or model.hidden_states]
        patches = (size // vit.patch_embed.patch_size[0]) ** 2
        tokens = patches + vit.num_prefix_tokens
        total += _embed(patches, vit.patch_embed.patch_size[0], vit.embed_dim)
        total += (max(taps) + 1) * _block(tokens, tokens, vit.embed_dim, _hidden(vit))
        contexts.append((tokens * len(taps), vit.embed_dim))
    decoder = model.decoder
    total += _qformer(config, contexts)
    prefix = 1 + decoder.register_tokens
    tokens = model.qformer.queries + prefix
    total += decoder.depth * _block(tokens, tokens, decoder.dim, int(decoder.dim * decoder.mlp_ratio))
    total += 2 * model.qformer.queries * decoder.dim * 3 * decoder.patch_size**2
    vit = _vit(perceptual_backbone(config), size)
    for patch_size in config.score.patch_sizes:
        patches = (size // patch_size) ** 2
        once = _embed(patches, patch_size, vit.embed_dim)
        once += max(config.score.blocks) * _block(patches + 1, patches + 1, vit.embed_dim, _hidden(vit))
        total += 2 * once  # of image and reconstruction
    return total


def _vit(entry: Backbone, size: int) -> Any:
    with torch.device("meta"):
        return create(entry, size)


def _hidden(vit: Any) -> int:
    return int(vit.blocks[0].mlp.fc1.out_features)


def _embed(patches: int, patch_size: int, width: int) -> int:
    return 2 * patches * 3 * patch_size**2 * width


def _block(queries: int, keys: int, width: int, hidden: int) -> int:
    """Return what a transformer block costs: four products of D by D, two of its MLP, two of its attention."""
    return 2 * queries * (4 * width * width + 2 * width * hidden) + 4 * queries * keys * width


def _qformer(config: Config, contexts: Sequence[tuple[int, int]]) -> int:
    options = config.model.qformer
    with torch.device("meta"):
        blocks: Any = QFormer(options).blocks
    queries, dim, total = options.queries, options.dim, 0
    for number, block in enumerate(blocks):
        first, last = number == 0, number == len(blocks) - 1
        if not first:
            width = block.attention.head_dim
            total += 2 * queries * dim * (dim + 2 * width) + 4 * queries * queries * dim + 2 * queries * dim * dim
        if block.cross is not None:
            inner = block.cross.heads * block.cross.head_dim
            total += sum(2 * tokens * width * 2 * inner for tokens, width in contexts)
            total += 0 if first else 2 * queries * dim * inner
            total += 4 * queries * (1 + sum(tokens for tokens, _ in contexts)) * inner + 2 * queries * inner * dim
        hidden = block.fc1.out_features
        after = config.model.decoder.dim if last else dim  # the last product is one with the decoder's embedding
        total += 2 * queries * dim * hidden + 2 * queries * hidden * after
    return total


_Found = Counter[tuple[int, int, int, bool]]
"""How often a product of [rows, inner] and [inner, columns] is there, the right side a stored weight or not."""


def stored_products(graph: InferenceGraph) -> list[Product]:
    """Return a graph's products with a stored weight for one image, equal ones together; it is run once for that."""
    found = _Found()

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        (x,) = inputs
        weight: Any = module.weight  # ours is stored [in, out], torch's [out, in]
        columns = weight.shape[1 if isinstance(module, Linear) else 0]
        found[math.prod(x.shape[:-1]), x.shape[-1], columns, True] += 1

    products = [one for one in graph.modules() if isinstance(one, Linear | nn.Linear)]  # timm's, in blocks left as are
    hooks = [one.register_forward_pre_hook(count) for one in products]
    try:
        with torch.no_grad():
            graph(torch.zeros(1, graph.image_size, graph.image_size, 3, dtype=torch.uint8))
    finally:
        for hook in hooks:
            hook.remove()
    return _together(found)


def products_of(path: Path, batch: int = 1) -> list[Product]:
    """Return the matrix products of an ONNX file of this project for one batch, equal ones together.

    Weights that lie in a file of their own are not read.

    Raises:
        ValueError: onnx cannot tell the shape of a product.

    """
    return _together(_products(path, batch)[0])


def int8_share(path: Path) -> float:
    """Return the share of a file's FLOP that is computed in eight bits; errors as of products_of."""
    all_, eight = (sum(one.flop for one in _together(found)) for found in _products(path, 1))
    return eight / all_


def _together(found: _Found) -> list[Product]:
    return [
        Product(rows, inner, columns, times, kept)
        for (rows, inner, columns, kept), times in sorted(found.items(), reverse=True)
    ]


def _products(path: Path, batch: int) -> tuple[_Found, _Found]:
    """Return all products, and those of them that are computed in eight bits."""
    model = onnx.load(str(path), load_external_data=False)
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]  # they say "batch"
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {one.name: _shape(one) for one in (*inferred.value_info, *inferred.input, *inferred.output)}
    shapes |= {one.name: tuple(one.dims) for one in inferred.initializer}
    stored = {one.name for one in inferred.initializer}
    # What an INT8 file stores as bytes comes to its product by way of a node.
    widened = {
        node.output[0] for node in inferred.node if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }
    stored |= widened
    found, eight = _Found(), _Found()
    for node in inferred.node:
        if node.op_type == "MatMul":
            left, right = (shapes.get(name, ()) for name in node.input[:2])
            if len(left) < 2 or len(right) < 2 or 0 in (*left, *right):
                raise ValueError(f"{path}: the shapes of {node.name} are unknown: {left} @ {right}")
            if node.input[1] in stored:
                key = math.prod(left[:-1]), left[-1], right[-1], True
                found[key] += 1
                eight[key] += node.input[1] in widened
            else:
                outer = np.broadcast_shapes(left[:-2], right[:-2])
                found[left[-2], left[-1], right[-1], False] += math.prod(outer)
        elif node.op_type == "Attention":
            (*heads, queries, width), (*_, keys, _) = shapes[node.input[0]], shapes[node.input[1]]
            found[queries, width, keys, False] += math.prod(heads)
            found[queries, keys, width, False] += math.prod(heads)
    return found, eight


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(one.dim_value for one in value.type.tensor_type.shape.dim)


def stored_types(path: Path) -> Counter[str]:
    """Return how many numbers of each type a file stores."""
    model = onnx.load(str(path), load_external_data=False)
    found: Counter[str] = Counter()
    for one in model.graph.initializer:
        found[TensorProto.DataType.Name(one.data_type)] += math.prod(one.dims)
    return found
