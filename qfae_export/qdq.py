"""Eight bits in an ONNX file: weights stored in INT8, a pair of QuantizeLinear and DequantizeLinear before products.

Runtimes recognise the pattern and compute such a product in integers; whoever does not computes the same numbers in
FP32. Weights have a scale a column and no offset. So have activations, in signed bytes; one that is hardly ever
negative (what a GELU gives) takes unsigned bytes and an offset, which doubles its resolution. Not so where attentions
are joined before the product: OpenVINO 2026.4 cannot load an offset there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

Range = tuple[float, float]
Quantised = tuple[npt.NDArray[np.float32], Range]
"""A product that is to be INT8: its weight, [in, out], and the range of its input."""

_LEVELS = 127


def add_qdq(model: ir.Model, ranges: Mapping[str, Range]) -> int:
    """Make the products of these units INT8, in place; return how many products that were.

    A unit's product is its MatMul with a constant weight [in, out]; its range is that of its input, 0 within.
    """
    done = 0
    for node in list(model.graph):
        unit = (node.name or "").rpartition("/")[0]
        if node.op_type == "MatMul" and unit in ranges:
            _quantise(model.graph, node, unit, ranges[unit])
            done += 1
    common.RemoveUnusedNodesPass()(model)
    return done


def misfits(path: Path, products: Mapping[str, Quantised]) -> list[str]:
    """Return the units of a written file whose bytes are not their weights [in, out], or whose scale not their range.

    Scores of a few images hardly show a wrong column among thousands; here every byte is held against what it stands
    for: within half a step, no step wider than a column needs, no input cut off, and no scale far wider than it.
    """
    stored = ir.load(path).graph.initializers

    def array(name: str) -> npt.NDArray[Any]:
        tensor = stored[name].const_value
        assert tensor is not None
        return tensor.numpy()

    def fits(unit: str, weight: npt.NDArray[np.float32], low: float, high: float) -> bool:
        levels, steps = array(f"{unit}.weight_int8"), array(f"{unit}.weight_scale")
        near = np.abs(levels * steps - weight) <= 0.5001 * steps
        full = (np.abs(levels.astype(np.int16)).max(axis=0) == _LEVELS) | (weight == 0).all(axis=0)
        step, offset = float(array(f"{unit}.input_scale")), array(f"{unit}.input_offset")
        kind, place = np.iinfo(offset.dtype), int(offset)
        covered = (kind.min - place - 1) * step <= low and high <= (kind.max - place + 1) * step
        narrow = (kind.max - kind.min) * step <= 2.05 * (high - low) or low == high
        return bool(near.all() and full.all() and covered and narrow)

    return [unit for unit, (weight, extent) in products.items() if not fits(unit, weight, *extent)]


def weight_scales(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the scale of every column of [in, out] for signed bytes without offset."""
    scales: npt.NDArray[np.float32] = (np.abs(weight).max(axis=0) / _LEVELS).astype(np.float32)
    scales[scales == 0] = 1  # a column of zeros stays one
    return scales


def activation_scale(low: float, high: float, signed: bool = False) -> tuple[np.float32, np.int8 | np.uint8]:
    """Return scale and offset of a range: signed bytes without offset, or unsigned ones if it is mostly positive."""
    if -low < high / 4 and not signed:
        scale = np.float32((high - low) / (2 * _LEVELS + 1))
        return scale, np.uint8(round(-low / float(scale)))
    return np.float32(max(-low, high) / _LEVELS or 1), np.int8(0)


def _quantise(graph: ir.Graph, node: ir.Node, unit: str, extent: Range) -> None:
    x, weight = node.inputs
    assert x is not None
    assert weight is not None
    assert weight.const_value is not None
    whole = weight.const_value.numpy().astype(np.float32)
    scales = weight_scales(whole)
    bytes_ = np.clip(np.rint(whole / scales), -_LEVELS, _LEVELS).astype(np.int8)
    scale, offset = activation_scale(*extent, signed=unit.endswith(".proj"))
    scale_x = _constant(graph, f"{unit}.input_scale", np.asarray(scale))
    offset_x = _constant(graph, f"{unit}.input_offset", np.asarray(offset))
    stored = _constant(graph, f"{unit}.weight_int8", bytes_)
    scale_w = _constant(graph, f"{unit}.weight_scale", scales)
    rounded = _node(f"{unit}/QuantizeLinear", [x, scale_x, offset_x])
    back = _node(f"{unit}/DequantizeLinear", [rounded.outputs[0], scale_x, offset_x])
    wide = _node(f"{unit}/DequantizeLinear_1", [stored, scale_w], [ir.AttrInt64("axis", 1)])
    graph.insert_before(node, [rounded, back, wide])
    node.replace_input_with(0, back.outputs[0])
    node.replace_input_with(1, wide.outputs[0])


def _node(name: str, inputs: list[ir.Value], attributes: list[ir.Attr] | None = None) -> ir.Node:
    operation = name.rpartition("/")[2].partition("_")[0]
    node = ir.Node("", operation, inputs, attributes or [], num_outputs=1, name=name)
    node.outputs[0].name = name
    return node


def _constant(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)  # type: ignore[union-attr]
    graph.register_initializer(value)
    return value
