"""The guard against a slower engine, in counts: arithmetic, stored weights, types, operations. No clock."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, numpy_helper
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.work import least_flop, products_of, stored_products, stored_types
from qfae_export.graph import InferenceGraph
from qfae_export.int8 import int8_graph
from qfae_export.layers import Constant, Embed, Linear, Norm
from qfae_export.onnx_file import write_onnx
from qfae_export.precision import FP16, FP32, INT8, Precision
from qfae_export.random_weights import random_scorer
from qfae_train.config import Config, load, presets
from tests.export.small_presets import attentions, small
from tests.export.tiny import config_of, pictures, vit

RICH = config_of(encoders=[vit(), vit(48, 2)], qformer_blocks=3)
"""Two encoders, self-attention of the queries, a cross-attention whose query is no constant."""

# Tracing takes seconds a graph. What other presets have, two encoders and other patch sizes, RICH has as well.
WRITTEN = {
    "brats": (small("brats"), FP32),
    "rich": (RICH, FP32),
    "brats in FP16": (small("brats"), FP16),
    "rich in FP16": (RICH, FP16),
    "brats in INT8": (small("brats"), INT8),
    "rich in INT8": (RICH, INT8),
}


class File:
    """A graph and the file written of it."""

    def __init__(self, config: Config, precision: Precision, path: Path) -> None:
        self.config, self.path = config, path
        graph = InferenceGraph(random_scorer(config, 0))
        if precision is INT8:
            self.graph = int8_graph(graph, pictures(2, config.model.image_size))
        else:
            self.graph = graph.cast(precision)
        write_onnx(self.graph, path)
        self.onnx = onnx.load(str(path))

    @property
    def numbers(self) -> int:
        """Of all weights."""
        return sum(tensor.numel() for tensor in self.graph.buffers())

    @property
    def wide(self) -> int:
        """Of the weights that FP16 leaves in FP32: those of LayerNorms, and what a residual stream begins with.

        Equal ones count once: the perceptual network's first token is the same for all patch sizes.
        """
        parts: list[Norm | Constant] = []
        for one in self.graph.modules():
            parts += [one] if isinstance(one, Norm) else [one.table, one.prefix] if isinstance(one, Embed) else []
        sizes = {one.numpy().tobytes(): one.numel() for part in parts for one in part.buffers()}
        return sum(sizes.values())

    @property
    def blocks(self) -> int:
        """How many transformer blocks a score needs, each with two additions to a stream and two LayerNorms."""
        model = self.config.model
        lasts = [int(one.args["depth"]) + max(one.hidden_states or model.hidden_states) + 1 for one in model.encoders]
        return sum(lasts) + model.decoder.depth + max(self.config.score.blocks)

    @property
    def eights(self) -> EightBits:
        return EightBits.of(self.config) if self.graph.precision.name == "int8" else EightBits(0, 0, 0)

    def count(self, operation: str) -> int:
        return sum(node.op_type == operation for node in self.onnx.graph.node)


class EightBits(NamedTuple):
    """What the policy has in eight bits: products, numbers of their weights, scales (a column's, an activation's)."""

    products: int
    weights: int
    scales: int

    @classmethod
    def of(cls, config: Config) -> EightBits:
        """The four products of the blocks that a score needs, but the decoder's and those of encoders' first blocks."""
        model, score, widths = config.model, config.score, []
        for entry in model.encoders:
            last = entry.args["depth"] + max(entry.hidden_states or model.hidden_states) + 1
            widths += [entry.args["embed_dim"]] * (last - 1)
        widths += [config.perceptual.args["embed_dim"]] * max(score.blocks)
        # [D, 3D], [D, D], [D, 4D], [4D, D]
        return cls(4 * len(widths), sum(12 * width**2 for width in widths), sum(9 * width + 4 for width in widths))


@pytest.fixture(scope="module", params=WRITTEN)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> File:
    return File(*WRITTEN[request.param], tmp_path_factory.mktemp("work") / "engine.onnx")


@pytest.mark.parametrize("config", [*(small(name) for name in presets()), RICH])
def test_the_least_is_what_the_graph_computes(config: Config) -> None:
    """Counted by PyTorch as it runs; the formulas know the configuration alone."""
    graph = InferenceGraph(random_scorer(config, 0))
    size = config.model.image_size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        graph(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    assert counter.get_total_flops() == least_flop(config)


def test_full_brats() -> None:
    """530 GFLOP an image was estimated from the publication's sizes, with blocks and products that fall away here."""
    assert least_flop(load("brats")) == 520_881_207_296


@pytest.mark.parametrize("batch", [1, 4])
def test_the_file_computes_the_least(file: File, batch: int) -> None:
    done = sum(product.flop for product in products_of(file.path, batch))
    assert batch * least_flop(file.config) <= done <= 1.02 * batch * least_flop(file.config)


def test_what_the_graph_multiplies_by_weights_is_what_the_file_does(file: File) -> None:
    """One is counted as PyTorch runs, the other from the shapes that onnx infers."""
    assert stored_products(file.graph) == [one for one in products_of(file.path) if one.stored]


def test_every_weight_is_multiplied_once(file: File) -> None:
    """Products with a stored weight are known as such, through whatever it comes to them."""
    stored = sum(one.inner * one.columns * one.times for one in products_of(file.path) if one.stored)
    assert stored == sum(one.weight.numel() for one in file.graph.modules() if isinstance(one, Linear))


def test_weights_are_stored_once(file: File) -> None:
    """As many numbers as the graph has (equal biases share one), and no large tensor twice under two names."""
    scales = file.eights.scales + file.eights.products  # an activation's offset as well
    stored = sum(stored_types(file.path).values()) - scales
    assert 0.99 * file.numbers <= stored <= 1.001 * file.numbers + 1000
    contents = [one.raw_data for one in file.onnx.graph.initializer if math.prod(one.dims) >= 1024]
    assert len(contents) > 20
    assert len(set(contents)) == len(contents)


def test_the_file_is_no_larger_than_its_weights(file: File) -> None:
    half = file.graph.precision.name == "fp16"
    width = 2 if half else 4
    weights = width * (file.numbers - file.eights.weights + file.eights.scales) + file.eights.weights
    weights += half * 2 * file.wide
    assert file.path.stat().st_size <= weights + 400 * len(file.onnx.graph.node)


def test_types(file: File) -> None:
    """No number in FP64; in FP16, FP32 numbers are those of LayerNorms and of where streams begin."""
    stored = stored_types(file.path)
    types = {TensorProto.DataType.Value(name) for name in stored}
    types |= {one.type.tensor_type.elem_type for one in file.onnx.graph.value_info}
    assert TensorProto.DOUBLE not in types
    if file.graph.precision.name == "fp16":
        assert file.wide <= stored["FLOAT"] < file.wide + 100  # and constants of the tail
        assert file.wide < 0.15 * file.numbers, "of narrow models; at full size it is 0.2 %"
    else:
        assert TensorProto.FLOAT16 not in types
        check_eight_bits(file)


def check_eight_bits(file: File) -> None:
    """What the policy has in eight bits is stored and computed so, and nothing else; of FP32 that is nothing."""
    eights, stored = file.eights, stored_types(file.path)
    assert stored["INT8"] + stored["UINT8"] == eights.weights + eights.products  # an offset each
    others = file.numbers - eights.weights + eights.scales
    assert 0.99 * others <= stored["FLOAT"] <= 1.001 * others + 1000
    # An activation is rounded once and widened again, a weight is widened.
    assert file.count("QuantizeLinear") == eights.products
    assert file.count("DequantizeLinear") == 2 * eights.products
    wide = {node.output[0] for node in file.onnx.graph.node if node.op_type == "DequantizeLinear"}
    products = [node for node in file.onnx.graph.node if node.op_type == "MatMul" and wide & set(node.input)]
    assert len(products) == eights.products
    assert all(set(node.input) <= wide for node in products), "half a product in eight bits saves nothing"


def in_fp32(file: File, product: NodeProto, widened: NodeProto) -> None:
    """Store the weight of a product as FP32."""
    graph = file.onnx.graph
    [weight] = [one for one in graph.initializer if one.name == widened.input[0]]
    graph.initializer.remove(weight)
    graph.initializer.append(
        numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float32), product.input[1])
    )
    graph.node.remove(widened)


def rounded_twice(file: File, product: NodeProto, widened: NodeProto) -> None:
    """Round what a product takes, which is rounded already."""
    nodes = list(file.onnx.graph.node)
    [back] = [node for node in nodes if node.output[0] == product.input[0]]
    [rounded] = [node for node in nodes if node.output[0] == back.input[0]]
    again = [NodeProto(), NodeProto()]
    for node, copied in zip(again, (rounded, back), strict=True):
        node.CopyFrom(copied)
        node.output[0] += "_again"
    again[0].input[0], again[1].input[0], product.input[0] = back.output[0], again[0].output[0], again[1].output[0]
    at = nodes.index(back) + 1
    del file.onnx.graph.node[:]
    file.onnx.graph.node.extend([*nodes[:at], *again, *nodes[at:]])


@pytest.mark.parametrize("fault", [in_fp32, rounded_twice])
def test_a_planted_fault_is_seen(fault: Callable[[File, NodeProto, NodeProto], None], tmp_path: Path) -> None:
    file = File(config_of(), INT8, tmp_path / "engine.onnx")
    check_eight_bits(file)
    makers = {node.output[0]: node for node in file.onnx.graph.node}
    product = next(node for node in file.onnx.graph.node if node.name == "perceptual.1.fc1/MatMul")
    fault(file, product, makers[product.input[1]])
    onnx.save(file.onnx, str(file.path))
    onnx.checker.check_model(str(file.path), full_check=True)
    with pytest.raises(AssertionError):
        check_eight_bits(file)


def test_no_stray_casts(file: File) -> None:
    """In FP32 the pixels are cast, coming and going. In FP16 also what FP32 sums need, each once."""
    known = {one.name: one.type.tensor_type.elem_type for one in (*file.onnx.graph.value_info, *file.onnx.graph.input)}
    found: Counter[tuple[str, str]] = Counter()
    for node in file.onnx.graph.node:
        if node.op_type == "Cast":
            kinds = (known[node.input[0]], node.attribute[0].i)
            found[TensorProto.DataType.Name(kinds[0]), TensorProto.DataType.Name(kinds[1])] += 1
    expected = {("UINT8", "FLOAT"): 1, ("FLOAT", "UINT8"): 1}
    if file.graph.precision.name == "fp16":
        model, sizes = file.config.model, len(file.config.score.patch_sizes)
        fused, encoders = file.count("Attention"), len(model.encoders)
        queries, crossed = model.qformer.blocks, (model.qformer.blocks + 1) // 2
        # q, k and v of each attention; what is added to a stream, twice a block; what each stream begins with; before
        # the Q-Former's LayerNorms what a cross-attention gives, and a self-attention (the first is a constant); the
        # reconstruction.
        widened = 3 * fused + 2 * file.blocks + (encoders + 1 + sizes) + crossed + (queries - 1) + 1
        # What each attention gives; the patches of every embedding; what LayerNorms give, for a block's two products,
        # the Q-Former's MLPs and queries (the first are a constant), and the head; each encoder's hidden states.
        patches = len({one.patch_size for one in model.encoders}) + sizes
        narrowed = fused + patches + 2 * file.blocks + queries + (crossed - 1) + 1 + encoders
        expected |= {("FLOAT16", "FLOAT"): widened, ("FLOAT", "FLOAT16"): narrowed}
    assert found == expected


def test_no_stray_operations(file: File) -> None:
    """What moves data and computes nothing is there as often as the structure asks for."""
    config, half = file.config, file.graph.precision.name == "fp16"
    assert file.count("Identity") == 0
    if config is not RICH:
        assert file.count("Attention" if half else "Softmax") == sum(attentions(config).values())
    # Tokens that stand before others, and the null token of the cross-attention; in FP16 its constant query, and the
    # keys and values that all heads of a self-attention share.
    embeds = len(config.model.encoders) + 1 + len(config.score.patch_sizes)
    crossed = (config.model.qformer.blocks + 1) // 2
    shared = 2 * (config.model.qformer.blocks - 1)
    assert file.count("Expand") <= embeds + crossed + half * (1 + shared)
