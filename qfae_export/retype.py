"""One traced FP16 graph, written again and again in other precision policies: what a bisection's trials are made of.

Tracing takes torch.export ten seconds for the smallest model, and trials differ in nothing but types. So the graph is
traced once, with everything in FP16 that can be; a policy then sets the nodes of its FP32 units to FP32, fetches their
weights and inserts casts where types meet. The same operations come out as if the policy had been traced, and the same
outputs, bit by bit (`tests/export/test_retype.py`). What is handed over is traced and measured all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

from qfae_export.graph import InferenceGraph
from qfae_export.onnx_file import save, trace
from qfae_export.precision import FP16_STREAMS, Precision

_SINGLE, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


class Retyper:
    """Writes a graph as an ONNX file in any FP16 policy, quickly; the graph is FP32 and lends its weights.

    Raises:
        ExportError: torch cannot express the graph in ONNX.

    """

    def __init__(self, graph: InferenceGraph) -> None:
        self._units = frozenset(graph.units())
        self._weights = {name: one for name, one in graph.named_buffers() if name.rpartition(".")[0] in self._units}
        template = graph.at(FP16_STREAMS)
        for number, buffer in enumerate((template.get_buffer(name) for name in self._weights), start=2):
            # The exporter merges equal weights, but what is equal in FP16 may differ in FP32. So here all differ, and
            # none is a 0 or 1 that would be optimised away; the values are of no further use.
            buffer.fill_(number % 2048).view(-1)[0] = number // 2048
        self._template = trace(template)
        self._set_weights(self._template, frozenset())

    def write(self, precision: Precision, path: Path) -> list[Path]:
        """Write the graph in an FP16 policy; return the files written, the engine first.

        Raises:
            OSError: the file cannot be written.

        """
        model = self._template.clone()
        kept = frozenset(unit for unit in self._units if precision.dtype(unit) == torch.float32)
        halves = {value for node in model.graph for value in (*node.inputs, *node.outputs) if _is(value, _HALF)}
        self._set_weights(model, kept)
        casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        for node in list(model.graph):
            unit = (node.name or "").rpartition("/")[0]
            inputs = [value for value in node.inputs if value in halves]  # what was FP16, and may be FP32 by now
            if unit in kept:
                wanted = _SINGLE
            elif unit in self._units:
                wanted = _HALF
            else:  # between units: FP32 if one part is, as torch joins them
                wanted = _SINGLE if any(_is(value, _SINGLE) for value in inputs) else _HALF
            _cast_inputs(node, inputs, wanted, casts)
            if node.op_type == "Cast":
                if unit in kept:
                    node.attributes["to"] = ir.AttrInt64("to", _SINGLE)
                    _set_type(node.outputs[0], _SINGLE)
            elif wanted == _SINGLE:
                for output in node.outputs:
                    if output in halves:
                        _set_type(output, _SINGLE)
            if node.op_type == "Attention" and unit in kept:
                _decompose(node)
        return save(model, path)

    def _set_weights(self, model: ir.Model, kept: frozenset[str]) -> None:
        for name, value in model.graph.initializers.items():
            if name in self._weights:
                dtype = torch.float32 if name.rpartition(".")[0] in kept else torch.float16
                value.const_value = _lazily(self._weights[name], dtype, name)
                _set_type(value, value.const_value.dtype)


def _lazily(weight: torch.Tensor, dtype: torch.dtype, name: str) -> ir.LazyTensor:
    """Convert a weight when the file is written, and keep nothing: a full-sized model is in memory once."""
    return ir.LazyTensor(
        lambda: TorchTensor(weight.to(dtype), name),
        dtype=from_torch_dtype(dtype),
        shape=ir.Shape(weight.shape),
        name=name,
    )


def _is(value: ir.Value | None, kind: ir.DataType) -> bool:
    return value is not None and value.dtype == kind


def _set_type(value: ir.Value, kind: ir.DataType) -> None:
    value.type = ir.TensorType(kind)  # not value.dtype: clones share the object that holds it


def _cast_inputs(
    node: ir.Node,
    inputs: Sequence[ir.Value | None],
    wanted: ir.DataType,
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value],
) -> None:
    if node.op_type == "Cast":
        return  # takes either
    for value in inputs:
        if value is None or value.dtype == wanted:
            continue
        if (value, wanted) not in casts:
            cast = ir.node("Cast", [value], {"to": wanted}, name=f"{node.name}/Cast_{len(casts)}")
            _set_type(cast.outputs[0], wanted)
            _graph_of(node).insert_before(node, cast)
            casts[value, wanted] = cast.outputs[0]
        for index, one in enumerate(node.inputs):
            if one is value:
                node.replace_input_with(index, casts[value, wanted])


def _decompose(node: ir.Node) -> None:
    """Replace an attention by what an FP32 `Attend` is traced to; its operands are heads apart, q scaled."""
    q, k, v = node.inputs[:3]
    assert q is not None
    turned = ir.node("Transpose", [k], {"perm": [0, 1, 3, 2]}, name=f"{node.name}/Transpose")
    logits = ir.node("MatMul", [q, *turned.outputs], name=f"{node.name}/MatMul")
    steps = [turned, logits]
    causal = node.attributes.get("is_causal")
    if causal is not None and causal.as_int():
        assert q.shape is not None
        tokens = q.shape[2]
        assert isinstance(tokens, int)  # the number of queries is fixed
        unseen = np.triu(np.full((tokens, tokens), -math.inf, np.float32), 1)
        mask = ir.node("Constant", [], {"value": ir.tensor(unseen)}, name=f"{node.name}/Constant")
        steps += [mask, ir.node("Add", [*logits.outputs, *mask.outputs], name=f"{node.name}/Add")]
    steps.append(ir.node("Softmax", [*steps[-1].outputs], {"axis": -1}, name=f"{node.name}/Softmax"))
    steps.append(ir.node("MatMul", [*steps[-1].outputs, v], name=f"{node.name}/MatMul_1"))
    graph, before = _graph_of(node), node.outputs[0]
    graph.insert_before(node, steps)
    after = steps[-1].outputs[0]
    _set_type(after, _SINGLE)
    before.replace_all_uses_with(after)
    graph.remove(node, safe=True)


def _graph_of(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph
