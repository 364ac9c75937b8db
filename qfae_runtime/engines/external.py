"""Which other files an ONNX file refers to, read from its bytes without the package onnx.

A backend opens those files itself. Only files whose hash the manifest holds may be among them: OpenVINO, given an
engine's bytes, would take weights from the working directory.
"""

from __future__ import annotations

from collections.abc import Iterator

from qfae_runtime.errors import EngineError

# Field numbers of onnx.proto: where a message of one kind holds messages that may hold tensors.
_INSIDE = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
_KEY, _VALUE = 1, 2  # of an entry of TensorProto.external_data
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_MAX_DEPTH = 64


def external_files(model: bytes, what: str) -> set[str]:
    """Return the locations that tensors of an ONNX file are to be read from; `what` names the file.

    Raises:
        EngineError: the bytes are no protobuf message, cut short perhaps.

    """
    try:
        return set(_locations(memoryview(model), "model", 0))
    except (ValueError, IndexError):
        raise EngineError(f"{what}: no ONNX file, or cut short; export it again with qfae-export") from None


def _locations(message: memoryview, kind: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    inside, entry = _INSIDE[kind], {}
    for field, content in _fields(message):
        if kind == "entry":
            entry[field] = bytes(content)
        elif field in inside:
            yield from _locations(content, inside[field], depth + 1)
    if entry.get(_KEY) == b"location":
        yield entry.get(_VALUE, b"").decode("utf-8", errors="replace")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of each field that holds bytes; the others hold no tensors."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        field, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, at = _varint(message, at)
            continue
        if kind == _BYTES:
            length, at = _varint(message, at)
        elif kind in _FIXED:
            length = _FIXED[kind]
        else:
            raise ValueError("a group, or no protobuf at all")
        if at + length > len(message):
            raise ValueError("cut short")
        if kind == _BYTES:
            yield field, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number too long")
