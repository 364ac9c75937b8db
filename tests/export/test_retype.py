"""A retyped file must be what a traced one is: the same answers bit by bit, and no other types."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qfae_export.file_precision import read_types
from qfae_export.graph import InferenceGraph
from qfae_export.layers import Constant
from qfae_export.onnx_file import write_onnx
from qfae_export.precision import FP16, FP16_STREAMS, Precision
from qfae_export.survey import survey
from qfae_runtime.engines.base import Scores
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from tests.export.planted import CONFIG, overflow_in_perceptual_2, planted, retyper_of
from tests.export.tiny import SIZE, pictures, scorer_of

IMAGES = pictures(5)
BY_RULE = {"norm", "norm1", "norm2", "norm_q", "norm_out", "residual1", "residual2"}
"""What the last part of a place is where it is FP32 by rule."""


def run(path: Path) -> Scores:
    with OnnxRuntimeEngine(path, SIZE, 8, threads=1) as engine:
        return engine.run(IMAGES)


def products(path: Path, place: str) -> Counter[int]:
    """Types of the weights that a place's nodes multiply."""
    model = onnx.load(path)
    weights = {one.name: one.data_type for one in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.name.startswith(f"{place}/MatMul")]
    return Counter(weights[name] for node in nodes for name in node.input if name in weights)


def test_the_answers_are_those_of_a_traced_file_bit_by_bit(tmp_path: Path) -> None:
    graph = InferenceGraph(scorer_of(CONFIG))
    units = graph.units()
    # Every second operation: borders of every kind. Causal attention and a constant besides.
    kept = {*units[::2], "qformer.2.attention", "qformer.1.cross.null"}
    # Streams are FP16 here: so LayerNorms and additions come in both types, too.
    policy = Precision("fp16", tuple(unit for unit in units if unit in kept), streams="float16")
    for kind in ("fc1", "attention", "residual1", "prefix", "norm1"):
        assert len({unit in kept for unit in units if unit.endswith(kind)}) == 2, f"{kind} is kept here and not there"
    retyped = run(retyper_of(graph).write(policy, tmp_path / "retyped.onnx")[0])
    traced = run(write_onnx(graph.at(policy), tmp_path / "traced.onnx")[0])
    for name in Scores._fields:
        assert np.array_equal(getattr(retyped, name), getattr(traced, name)), name


def test_fp16_by_rule_answers_as_a_traced_file_bit_by_bit(tmp_path: Path) -> None:
    graph = InferenceGraph(scorer_of(CONFIG))
    got = run(retyper_of(graph).write(FP16, tmp_path / "retyped.onnx")[0])
    want = run(write_onnx(graph.at(FP16), tmp_path / "traced.onnx")[0])
    for name in Scores._fields:
        assert np.array_equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize(
    ("policy", "wide"),
    [
        (FP16, BY_RULE),
        (FP16_STREAMS, set()),
        (Precision("fp16", ("decoder.1.residual1", "decoder.1.norm2"), streams="float16"), set()),
    ],
)
def test_every_unit_computes_in_what_the_policy_says(policy: Precision, wide: set[str], tmp_path: Path) -> None:
    graph = InferenceGraph(scorer_of(CONFIG))
    found = read_types(retyper_of(graph).write(policy, tmp_path / "a.onnx")[0]).units
    computing = [unit for unit in graph.units() if not isinstance(graph.get_submodule(unit), Constant)]
    expected = {unit for unit in computing if unit.rpartition(".")[2] in wide or unit in policy.kept}
    assert {unit for unit in computing if found[unit] == "fp32"} == expected
    assert {found[unit] for unit in computing} == {"fp16", "fp32"} if expected else {"fp16"}


def test_a_policy_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    retyper = retyper_of(InferenceGraph(scorer_of(CONFIG)))
    path = retyper.write(Precision("fp16", ("decoder.1.fc1", "perceptual")), tmp_path / "a.onnx")[0]
    assert products(path, "decoder.1.fc1") == {onnx.TensorProto.FLOAT: 1}
    assert products(path, "decoder.1.fc2") == {onnx.TensorProto.FLOAT16: 1}
    assert products(path, "perceptual.2.qkv") == {onnx.TensorProto.FLOAT: 1}
    onnx.checker.check_model(str(path), full_check=True)
    attentions = [node.name for node in onnx.load(path).graph.node if node.op_type == "Attention"]
    # FP32 attention is products and a softmax: TensorRT cannot build an FP32 Attention.
    assert attentions
    assert not any(name.startswith("perceptual") for name in attentions)


def test_one_policy_leaves_no_traces_in_the_next(tmp_path: Path) -> None:
    retyper = retyper_of(InferenceGraph(scorer_of(CONFIG)))
    first = retyper.write(FP16, tmp_path / "first.onnx")[0].read_bytes()
    retyper.write(Precision("fp16", ("encoder", "qformer")), tmp_path / "between.onnx")
    assert retyper.write(FP16, tmp_path / "again.onnx")[0].read_bytes() == first


def test_the_graph_lends_its_weights_and_stays_fp32(tmp_path: Path) -> None:
    graph = InferenceGraph(scorer_of(CONFIG))
    before = {name: buffer.clone() for name, buffer in graph.named_buffers()}
    half = graph.at(FP16)
    retyper_of(graph).write(FP16, tmp_path / "a.onnx")
    assert all(buffer.equal(before[name]) for name, buffer in graph.named_buffers())
    kept = graph.at(Precision("fp16", ("decoder",)))
    assert kept.get_buffer("decoder.head.weight").data_ptr() == graph.get_buffer("decoder.head.weight").data_ptr()
    assert half.get_buffer("decoder.head.weight").element_size() == 2


def test_the_survey_points_at_an_overflow_and_counts_every_product() -> None:
    graph = InferenceGraph(planted(overflow_in_perceptual_2))
    seen = survey(graph, IMAGES[:2], IMAGES[:2])
    infinite = [unit for unit, effect in seen.effect.items() if effect == float("inf")]
    assert infinite == ["perceptual.2.fc1", "perceptual.2.fc2"]
    with FlopCounterMode(display=False) as counter:
        graph(torch.from_numpy(IMAGES[:1]))
    assert sum(seen.products.values()) == pytest.approx(counter.get_total_flops())


@pytest.mark.parametrize("part", ["reconstruction", "scorer"])
def test_the_survey_looks_at_halves_too(part: str) -> None:
    graph = InferenceGraph(scorer_of(CONFIG), part)
    seen = survey(graph, IMAGES[:1], IMAGES[1:2])
    assert list(seen.effect) == list(seen.products) == graph.halved(FP16)
    assert not any(unit.endswith((".norm1", ".residual1", ".table")) for unit in seen.effect), "they are FP32 anyway"
    assert all(0 < seen.effect[unit] < 1e4 for unit in seen.effect if unit.endswith((".fc1", ".proj")))
