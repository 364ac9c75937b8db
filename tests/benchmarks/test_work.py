"""The guard against a slower engine, in counts: arithmetic, stored weights, types, operations. No clock."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.work import least_flop, products_of, stored_types
from qfae_export.graph import InferenceGraph
from qfae_export.onnx_file import write_onnx
from qfae_export.precision import FP16, FP32, Precision
from qfae_export.random_weights import random_scorer
from qfae_train.config import Config, load, presets
from tests.export.small_presets import attentions, small
from tests.export.tiny import config_of, vit

RICH = config_of(encoders=[vit(), vit(48, 2)], qformer_blocks=3)
"""Two encoders, self-attention of the queries, a cross-attention whose query is no constant."""

# Tracing takes seconds a graph. What other presets have, two encoders and other patch sizes, RICH has as well.
WRITTEN = {
    "brats": (small("brats"), FP32),
    "rich": (RICH, FP32),
    "brats in FP16": (small("brats"), FP16),
    "rich in FP16": (RICH, FP16),
}


class File:
    """A graph and the file written of it."""

    def __init__(self, config: Config, precision: Precision, path: Path) -> None:
        self.config, self.path = config, path
        self.graph = InferenceGraph(random_scorer(config, 0)).cast(precision)
        write_onnx(self.graph, path)
        self.onnx = onnx.load(str(path))

    def count(self, operation: str) -> int:
        return sum(node.op_type == operation for node in self.onnx.graph.node)


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


def test_weights_are_stored_once(file: File) -> None:
    """As many numbers as the graph has (equal biases share one), and no large tensor twice under two names."""
    numbers = sum(tensor.numel() for tensor in file.graph.buffers())
    assert 0.99 * numbers <= sum(stored_types(file.path).values()) <= 1.001 * numbers + 1000
    contents = [one.raw_data for one in file.onnx.graph.initializer if math.prod(one.dims) >= 1024]
    assert len(contents) > 20
    assert len(set(contents)) == len(contents)


def test_the_file_is_no_larger_than_its_weights(file: File) -> None:
    width = 4 if file.graph.precision.name == "fp32" else 2
    nodes = 400 * len(file.onnx.graph.node)
    assert file.path.stat().st_size <= width * sum(tensor.numel() for tensor in file.graph.buffers()) + nodes


def test_types(file: File) -> None:
    """No number in FP64, and weights in the type of the products alone."""
    types = {TensorProto.DataType.Value(name) for name in stored_types(file.path)}
    types |= {one.type.tensor_type.elem_type for one in file.onnx.graph.value_info}
    assert TensorProto.DOUBLE not in types
    if file.graph.precision.name == "fp32":
        assert TensorProto.FLOAT16 not in types
    else:
        assert stored_types(file.path)["FLOAT"] < 100  # constants of the tail


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
        fused = file.count("Attention")
        score = file.config.score
        tapped = len(score.blocks) * len(score.patch_sizes)
        entering = len({one.patch_size for one in file.config.model.encoders}) + len(score.patch_sizes)
        # q, k and v of each attention, both images' features of each map, the reconstruction; back: what each
        # attention gives, the patches of every embedding.
        expected |= {("FLOAT16", "FLOAT"): 3 * fused + 2 * tapped + 1, ("FLOAT", "FLOAT16"): fused + entering}
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
