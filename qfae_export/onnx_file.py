"""NAME.onnx, NAME.int8.onnx, NAME.fp16.onnx: the inference graph as a file, the same bytes for the same weights.

FP32 is opset 18, attention decomposed into MatMul and Softmax: every ONNX Runtime and OpenVINO of recent years runs
that, and ONNX Runtime's CUDA provider keeps opset 18's Resize on the GPU. INT8 is the same with eight-bit products
(qdq.py). FP16 is opset 23, which has Attention and Gelu as single operations: what TensorRT fuses. An FP32 Attention
parses in TensorRT and then fails to build, so the two are different files.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from qfae_export.errors import ExportError
from qfae_export.graph import InferenceGraph, Reconstruction
from qfae_export.layers import Linear
from qfae_export.qdq import Quantised, add_qdq, misfits
from qfae_export.simplify import simplify
from qfae_runtime import __version__
from qfae_runtime.engines.base import INPUT_NAME, OUTPUT_NAMES
from qfae_runtime.manifest import MAX_BATCH

OPSETS = {"fp32": 18, "int8": 18, "fp16": 23}
"""The opset of each flavour."""

PRODUCER = "qfae-export"
"""What the file says of where it comes from."""

PIXELS_NAME = "pixels"
"""What one half of the graph hands to the other: the reconstruction in grey levels, neither clipped nor rounded."""

EXTERNAL_ABOVE_BYTES = 2**31 - 2**26
"""Weights larger than this go to NAME.onnx.data: one protobuf file holds 2 GiB at most, the nodes included."""

_EXAMPLE_BATCH = 3  # 0 and 1 would be taken for constants; 3 differs from its double and from the colours' dimension
_NOISY = ("torch.onnx", "torch.export", "torch._guards", "onnxscript", "onnx_ir")


def write_onnx(graph: InferenceGraph, path: Path) -> list[Path]:
    """Write the graph to `path`, checked by onnx, and return the files written: the engine, then its weights if apart.

    Names and types of inputs and outputs are those of `tensor_names`. Nothing of the machine that exported is in
    the file: no paths, no source lines. Nodes are named by their place in the graph, `perceptual.7.attention/...`.

    Raises:
        ExportError: torch cannot express the graph in ONNX, or onnx refuses the file.
        OSError: the file cannot be written.

    """
    written = save(trace(graph), path)
    _check(path, graph)
    if quantised := _quantised(graph):
        _check_bytes(path, quantised)
    return written


def _quantised(graph: InferenceGraph) -> dict[str, Quantised]:
    """Return the weights and input ranges of the products that are to be INT8, by their place."""
    return {
        name: (one.weight.numpy(), one.input_range)
        for name, one in graph.named_modules()
        if isinstance(one, Linear) and one.input_range
    }


def tensor_names(part: str) -> tuple[list[str], list[str]]:
    """Return the names of inputs and outputs of a part of the graph."""
    if part == "reconstruction":
        return [INPUT_NAME], list(Reconstruction._fields)
    if part == "scorer":
        return [INPUT_NAME, PIXELS_NAME], list(OUTPUT_NAMES[:2])
    return [INPUT_NAME], list(OUTPUT_NAMES)


def trace(graph: InferenceGraph) -> ir.Model:
    """Return the graph as an ONNX model with a free batch, stripped of what only describes the export.

    Raises:
        ExportError: torch cannot express the graph in ONNX.

    """
    size = graph.image_size
    inputs, outputs = tensor_names(graph.part)
    types = [torch.uint8, torch.float32][: len(inputs)]
    example = tuple(torch.zeros(_EXAMPLE_BATCH, size, size, 3, dtype=dtype) for dtype in types)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    shapes: Any = (tuple({0: batch} for _ in inputs),)
    try:
        with _quiet(), torch.no_grad():
            # Captured here and not inside torch.onnx.export, which falls back to a fixed batch without a word.
            program = torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSETS[graph.precision.name],
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=shapes,
                optimize=False,
                verbose=False,
            )
            model: ir.Model = exported.model
            simplify(model)
    except Exception as error:  # tracer, decompositions and translation raise a dozen kinds
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ExportError(
            f"torch {torch.__version__} cannot express the model in ONNX: {type(error).__name__}: {reason}; "
            "export with the versions of torch and onnxscript this project is tested with, or report the configuration"
        ) from error
    _check_attentions(program, model)
    _name_nodes(model)
    ranges = {name: extent for name, (_, extent) in _quantised(graph).items()}
    if (got := add_qdq(model, ranges)) != len(ranges):
        raise ExportError(
            f"torch {torch.__version__} writes {got} of {len(ranges)} INT8 products as one operation; export with the "
            "versions of torch and onnxscript this project is tested with, or leave out --int8"
        )
    _strip(model)
    return model


def _check_attentions(program: torch.export.ExportedProgram, model: ir.Model) -> None:
    """Hold the attentions of the file against those of the graph: what falls apart is no attention to any engine.

    Raises:
        ExportError: this torch writes them in another way than expected.

    """
    whole = torch.ops.aten.scaled_dot_product_attention.default
    wanted = sum(node.target is whole for node in program.graph.nodes)
    got = sum(node.op_type == "Attention" for node in model.graph)
    if got != wanted:
        raise ExportError(
            f"torch {torch.__version__} writes {got} of {wanted} attentions as one operation: an engine built from the "
            "file would be slow; export with the versions of torch and onnxscript this project is tested with"
        )


def save(model: ir.Model, path: Path, external_above_bytes: int = EXTERNAL_ABOVE_BYTES) -> list[Path]:
    """Write the model, its weights apart in NAME.onnx.data if they are too many bytes; return the files written."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    if sum(tensor.nbytes for tensor in tensors if tensor is not None) <= external_above_bytes:
        ir.save(model, path)
        return [path]
    weights = path.with_name(path.name + ".data")
    ir.save(model, path, external_data=weights.name)
    return [path, weights]


def _name_nodes(model: ir.Model) -> None:
    """Name every node by its place: `perceptual.7.attention/Attention_1` is the second of that place."""
    seen: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        place = next((scope for scope in reversed(scopes[:-1]) if scope), "graph")
        name = f"{place}/{node.op_type}"
        node.name = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1


def _strip(model: ir.Model) -> None:
    """Remove what only describes the export: source lines, paths of this machine, names of Python objects."""
    model.producer_name, model.producer_version = PRODUCER, __version__
    model.metadata_props.clear()
    model.doc_string = None
    graph = model.graph
    holders: list[Any] = [graph, *graph.inputs, *graph.initializers.values()]
    holders += [value.const_value for value in graph.initializers.values() if value.const_value is not None]
    for node in graph.all_nodes():
        holders += [node, *node.outputs]
    for holder in holders:
        holder.metadata_props.clear()
        holder.doc_string = None


def _check_bytes(path: Path, quantised: dict[str, Quantised]) -> None:
    """Hold the eight-bit products of a file against what they stand for.

    Raises:
        ExportError: some are something else.

    """
    wrong = misfits(path, quantised)
    if wrong:
        raise ExportError(
            f"{path.name}: the bytes of {', '.join(wrong[:3])}{' and others' if len(wrong) > 3 else ''} are not "
            "what the weights and calibration images give; report this, or leave out --int8"
        )


def _check(path: Path, graph: InferenceGraph) -> None:
    """Hold the file against what every engine of this project looks like.

    Raises:
        ExportError: onnx refuses the file, or it is not what was asked for.

    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"{path.name}: onnx {onnx.__version__} refuses the exported file: {reason}") from None
    model = onnx.load(str(path), load_external_data=False)
    opsets = {one.domain: one.version for one in model.opset_import}
    tensors = [*model.graph.input, *model.graph.output]
    names = [tensor.name for tensor in tensors]
    fixed = [one.name for one in tensors if one.type.tensor_type.shape.dim[0].dim_param != "batch"]
    inputs, outputs = tensor_names(graph.part)
    opset = OPSETS[graph.precision.name]
    if opsets != {"": opset} or names != [*inputs, *outputs] or fixed:
        raise ExportError(
            f"{path.name}: expected opset {opset}, {inputs + outputs} and a free batch, got {opsets}, {names} and a "
            f"fixed batch in {fixed or 'none'}; torch {torch.__version__} exports this model in another way than "
            "expected"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter off the terminal; what matters about it is measured afterwards."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
