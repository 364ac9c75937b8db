"""Which other files an ONNX file refers to, and what goes in and out, read from its bytes without the package onnx.

A backend opens those files itself. Only files whose hash the manifest holds may be among them: OpenVINO, given an
engine's bytes, would take weights from the working directory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qfae_runtime.errors import EngineError
from qfae_runtime.hashing import WEIGHTS_SUFFIX

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
_GRAPH, _INPUT, _OUTPUT, _NAME = 7, 11, 12, 1  # of a model, of a graph twice, of what goes in or out
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


def inputs_and_outputs(model: bytes, what: str) -> tuple[list[str], list[str]]:
    """Return the names of a graph's inputs, those with a value of their own among them, and of its outputs.

    Backends show them differently: OpenVINO does not name an input that has a value.

    Raises:
        EngineError: the bytes are no protobuf message, cut short perhaps.

    """
    found: dict[int, list[str]] = {_INPUT: [], _OUTPUT: []}
    try:
        for graph in (content for field, content in _fields(memoryview(model)) if field == _GRAPH):
            for field, content in _fields(graph):
                if field in found:
                    name = dict(_fields(content)).get(_NAME, memoryview(b""))
                    found[field].append(bytes(name).decode("utf-8", errors="replace"))
    except (ValueError, IndexError):
        raise EngineError(f"{what}: no ONNX file, or cut short; export it again with qfae-export") from None
    return found[_INPUT], found[_OUTPUT]


def refuse_scattered(engine: Path, what: str, *, linked_alike: bool) -> None:
    """Refuse an engine whose weights are a link to a folder where a backend does not read them.

    ONNX Runtime and OpenVINO follow links no further than their folder. `linked_alike`: weights may also lie where
    the engine file itself is linked to, as in caches that keep all files under their hashes in one folder.

    Raises:
        EngineError: where they are, and what to do.

    """
    weights = engine.with_name(engine.name + WEIGHTS_SUFFIX)
    if not weights.exists():
        return
    lies = weights.resolve().parent
    if lies != engine.parent.resolve() and not (linked_alike and lies == engine.resolve().parent):
        raise EngineError(
            f"{engine}: its weights {weights.name} are a link to {lies}, and {what} reads them from the engine's own "
            f"folder alone; copy both as files into one folder (cp -L)"
        )


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
