"""In which types an ONNX file computes, read from the file itself.

A manifest says it too, and its word would choose what the engine is held to: a file that computes in FP32 and is called
INT8 would be given INT8's bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import onnx
import torch

from qfae_export.graph import InferenceGraph
from qfae_export.layers import Constant
from qfae_export.onnx_facts import load_model
from qfae_export.precision import Precision
from qfae_runtime.errors import ManifestError
from qfae_runtime.manifest import Manifest

_FLOAT16, _BFLOAT16 = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16
_WHOLE = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_SHOWN = 3


class FileTypes(NamedTuple):
    """What an ONNX file computes in: the narrowest type anywhere, why, and by unit; of fp32, fp16, bf16, int8."""

    precision: str
    because: str
    units: Mapping[str, str]


def read_types(path: Path) -> FileTypes:
    """Read in which types a file computes; weights that lie in a file of their own are not opened.

    Raises:
        ExportError: it is missing, or no ONNX file.

    """
    model = load_model(path)
    nodes = [node for graph in _graphs(model) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    whole = sorted({node.op_type for node in nodes if _in_eight_bits(node)})
    types = {kind for graph in _graphs(model) for kind in _types_of(graph)} | {
        kind for node in nodes for kind in _types_in(node)
    }
    if whole:
        precision, because = "int8", f"it has {whole[0]}"
    elif _BFLOAT16 in types:
        precision, because = "bf16", "it has bfloat16"
    elif _FLOAT16 in types:
        precision, because = "fp16", "it has float16"
    else:
        precision, because = "fp32", "it has neither 16-bit floats nor QuantizeLinear"
    return FileTypes(precision, because, _by_unit(model.graph))


def refuse_other_precision(manifest: Manifest, engine: str, types: FileTypes) -> None:
    """Refuse a manifest that calls an engine another precision than its file has.

    Raises:
        ManifestError: what the manifest says, and what the file has.

    """
    said = manifest.files[engine].precision or "fp32"
    if said != types.precision:
        raise ManifestError(
            f"{manifest.name}.json: {engine} is {said} in 'files', but the file computes in {types.precision} "
            f"({types.because}), expected the same, for it decides which bounds hold; export the engine again"
        )


def refuse_other_policy(manifest: Manifest, engine: str, types: FileTypes, graph: InferenceGraph) -> None:
    """Refuse a manifest whose precision policy is not what its file computes, unit by unit of the checkpoint's graph.

    Raises:
        ManifestError: how many units differ, and the first of them.

    """
    policy = Precision.described(manifest.precision[engine])
    wanted = {
        unit: _named(policy, unit) for unit in graph.units() if not isinstance(graph.get_submodule(unit), Constant)
    }
    odd = [
        f"{unit} ({types.units.get(unit, 'not there')}, expected {want})"
        for unit, want in wanted.items()
        if types.units.get(unit) != want
    ]
    if odd:
        raise ManifestError(
            f"{manifest.name}.json: of {engine}, {len(odd)} of {len(wanted)} operations are not what 'precision' says: "
            f"{', '.join(odd[:_SHOWN])}{' and others' if len(odd) > _SHOWN else ''}; export the engine again"
        )


def _named(policy: Precision, unit: str) -> str:
    if policy.in_int8(unit):
        return "int8"
    return "fp16" if policy.dtype(unit) == torch.float16 else "fp32"


def _by_unit(graph: onnx.GraphProto) -> dict[str, str]:
    """Return what each unit computes in; nodes are named UNIT/OPERATION."""
    halves = {one.name for one in (*graph.value_info, *graph.output) if one.type.tensor_type.elem_type == _FLOAT16}
    found: dict[str, str] = {}
    for node in graph.node:
        unit, before = node.name.rpartition("/")[0], found.get(node.name.rpartition("/")[0], "fp32")
        if _in_eight_bits(node) or before == "int8":
            found[unit] = "int8"
        else:
            found[unit] = "fp16" if halves.intersection(node.output) else before
    return found


def _in_eight_bits(node: onnx.NodeProto) -> bool:
    return node.op_type in _WHOLE or node.op_type.startswith("QLinear") or node.op_type.endswith("Integer")


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Yield the graph and every graph inside one of its nodes."""
    stack = [model.graph, *(one for function in model.functions for node in function.node for one in _inner(node))]
    while stack:
        graph = stack.pop()
        yield graph
        stack += [one for node in graph.node for one in _inner(node)]


def _inner(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    held = [one.g for one in node.attribute if one.type == onnx.AttributeProto.GRAPH]
    return held + [graph for one in node.attribute for graph in one.graphs]


def _types_of(graph: onnx.GraphProto) -> Iterator[int]:
    yield from (one.data_type for one in graph.initializer)
    yield from (one.values.data_type for one in graph.sparse_initializer)
    for value in (*graph.value_info, *graph.input, *graph.output):
        yield value.type.tensor_type.elem_type


def _types_in(node: onnx.NodeProto) -> Iterator[int]:
    for one in node.attribute:
        if one.name in ("to", "dtype"):
            yield one.i
        if one.type == onnx.AttributeProto.TENSOR:
            yield one.t.data_type
