"""What the builder of a plan has to know of an ONNX file that this project wrote, read without its weights' bytes.

Letters: B images, H heads, T tokens, K width of a head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from qfae_export.errors import ExportError
from qfae_export.onnx_file import OPSETS, PRODUCER
from qfae_export.precision import covers

# An attention's place ends in `attention`. What lies below a `block` is timm's own, which always computes in FP32.
_WRITTEN_OUT = re.compile(r"(?!.*\.block\.).*\battention/Softmax(_\d+)?")


@dataclass(frozen=True)
class Attention:
    """One attention of the graph: the node that stands for it, and the width K of its heads (0: not recorded)."""

    node: str
    head_width: int

    @property
    def stage(self) -> str:
        """The part of the model it belongs to: `encoder`, `encoder2`, `qformer`, `decoder`, `perceptual`."""
        return self.node.partition(".")[0]


@dataclass(frozen=True)
class OnnxFacts:
    """What a file holds.

    precision     "fp32" or "fp16", from the opset
    attentions    attentions that are one operation
    written_out   attentions written as products and a softmax; `node` is the softmax
    """

    precision: str
    attentions: tuple[Attention, ...]
    written_out: tuple[Attention, ...]

    def to_fuse(self, kept: Sequence[str] = ()) -> tuple[Attention, ...]:
        """Return the attentions that a plan must run as one kernel each.

        In FP16 all of them, but for those that the precision policy keeps in FP32 (`kept`, its selectors): an
        attention that was written out for another reason is one that got lost on the way.
        """
        if self.precision == "fp32":
            return ()
        lost = (
            one
            for one in self.written_out
            if not any(covers(selector, one.node.rpartition("/")[0]) for selector in kept)
        )
        return (*self.attentions, *lost)


def read_facts(path: Path) -> OnnxFacts:
    """Read what a file holds; weights that lie in a file of their own are not opened.

    Raises:
        ExportError: it is missing, no ONNX file, or none of this project.

    """
    model = load_model(path)
    opset = next((one.version for one in model.opset_import if one.domain == ""), 0)
    precision = next((name for name, version in OPSETS.items() if version == opset), None)
    if model.producer_name != PRODUCER or precision is None:
        raise ExportError(
            f"{path}: was written by {model.producer_name or 'an unknown program'} in opset {opset}, expected "
            f"{PRODUCER} and opset {' or '.join(map(str, sorted(set(OPSETS.values()))))}; export it with this qfae"
        )
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise ExportError(
            f"{path}: is an INT8 file, for CPUs; plans are made of FP32 and FP16 files: name one of those"
        )
    # The width of a head is the last dimension of an attention's first operand, of a softmax's product too.
    widths = {one.name: _last_dimension(one) for one in model.graph.value_info}
    producers = {name: node for node in model.graph.node for name in node.output}
    attentions, written_out = [], []
    for node in model.graph.node:
        if node.op_type == "Attention":
            attentions.append(Attention(node.name, widths.get(node.input[0], 0)))
        elif node.op_type == "Softmax" and _WRITTEN_OUT.fullmatch(node.name):
            product = producers.get(node.input[0])
            operand = product.input[0] if product is not None and product.op_type == "MatMul" else ""
            written_out.append(Attention(node.name, widths.get(operand, 0)))
    return OnnxFacts(precision, tuple(attentions), tuple(written_out))


def load_model(path: Path) -> onnx.ModelProto:
    """Return the model of a file without the weights that lie in a file of their own.

    Raises:
        ExportError: it is missing, or no ONNX file.

    """
    try:
        return onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise ExportError(
            f"{path}: cannot be read ({error.strerror or error}); name the ONNX file that qfae-export wrote"
        ) from None
    except (DecodeError, ValueError) as error:
        raise ExportError(
            f"{path}: is no ONNX file ({error}); name the ONNX file that qfae-export wrote, or copy it again"
        ) from None


def _last_dimension(value: onnx.ValueInfoProto) -> int:
    shape = value.type.tensor_type.shape.dim
    return shape[-1].dim_value if len(shape) else 0
