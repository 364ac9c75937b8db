"""A model cut into parts that OpenVINO computes in different types: half of the work in BF16, all else in FP32.

The score compares an image with its reconstruction. What rounds both alike, as the perceptual network does, takes
little of their difference; what rounds the reconstruction alone, as encoder and decoder do, takes much of it, and the
more, the better the reconstruction is. So only the transformer blocks that the reconstruction does not depend on are
computed in BF16 (docs/engines.md has the measurements).

OpenVINO computes all that stands before the last product or resizing in BF16, and so rounds distances and every sum of
a residual stream to eight bits. A model whose outputs are such sums keeps them in FP32: what lies between an output and
the products before it is left alone. So the blocks of a residual stream are a model of their own, which returns the
stream, and what stands before and behind it is compiled in FP32:

    f32     images -> encoders, Q-Former, decoder -> reconstruction; patches of the perceptual network
    bf16    blocks of the perceptual network
    f32     distances, maps, score

The streams are found by what the graph computes, not by names: x + f(x), where f holds a matrix product, and x is the
start of a stream or such a sum itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

Key = tuple[str, int]
"""An output of an operation: the operation's name, which no other has, and the output's number."""

_PRODUCTS = ("MatMul", "Convolution")
_RECONSTRUCTION = "reconstruction"


class Part(NamedTuple):
    """A model to be compiled in `precision` ("bf16" or "f32").

    `takes` and `gives` name its inputs and outputs, in their order: tensors of the whole model by their names, those at
    a cut by names of their own.
    """

    model: Any
    precision: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]


class _Stream(NamedTuple):
    """A residual stream: what enters its first block, its sums by operation in their order, and what is read of it."""

    start: Key
    sums: list[str]
    ends: list[Key]


def whole(model: Any, precision: str) -> Part:
    """Return a model as one part."""
    takes, gives = (tuple(one.get_any_name() for one in tensors) for tensors in (model.inputs, model.outputs))
    return Part(model, precision, takes, gives)


def parts_of(library: Any, model: Any) -> list[Part]:
    """Return the parts of a model, in the order in which they are computed; together they compute what it does.

    `library` is the module `openvino`. A model without a residual stream is one part, in BF16; one whose
    reconstruction depends on every stream is one part, in FP32. The operations of the model are given other names.
    """
    graph = _Graph(library, model)
    streams = graph.streams()
    if not streams:
        return [whole(model, "bf16")]
    streams = [stream for stream in streams if not graph.rebuilds(stream)]
    parts: list[Part] = []
    known: list[Key] = []
    waiting = list(graph.results)
    for number, stream in enumerate(streams):
        later = {name for one in streams[number:] for name in one.sums}
        ready = [result for result in waiting if not graph.depends(result, later)]
        waiting = [result for result in waiting if result not in ready]
        parts.append(graph.part("f32", known, [stream.start, *ready]))
        parts.append(graph.part("bf16", [stream.start], stream.ends))
        known += [stream.start, *stream.ends]
    parts.append(graph.part("f32", known, waiting))
    return parts


class _Graph:
    """The operations of a model in the order of the computation, and what depends on what."""

    def __init__(self, library: Any, model: Any) -> None:
        self._library, self._model = library, model
        self._ops: dict[str, Any] = {}
        self._bits: dict[str, int] = {}
        self._before: dict[str, int] = {}  # by operation: all that it depends on, itself included, as bits
        for number, op in enumerate(model.get_ordered_ops()):
            # A clone keeps these names. Nothing else makes sure that no two are the same.
            name = f"{number} {op.get_friendly_name()}"
            op.set_friendly_name(name)
            self._ops[name], self._bits[name] = op, 1 << number
            self._before[name] = self._bits[name]
            for source, _ in _sources(op):
                self._before[name] |= self._before[source]
        self._inputs = [one.get_friendly_name() for one in model.get_parameters()]
        self._products = [name for name, op in self._ops.items() if op.get_type_name() in _PRODUCTS]
        self.results: dict[Key, str] = {_sources(one)[0]: one.output(0).get_any_name() for one in model.get_results()}
        """The names of the model's outputs, by what they come from."""

    def depends(self, key: Key, names: Iterable[str]) -> bool:
        """Say whether an output depends on one of these operations, or is one's."""
        return any(self._before[key[0]] & self._bits[name] for name in names)

    def streams(self) -> list[_Stream]:
        """Return the residual streams, in the order of the computation."""
        starts: dict[str, Key] = {}  # by sum
        found: dict[Key, list[str]] = {}
        for name, op in self._ops.items():
            stream = self._continued(op)
            if stream is not None:
                starts[name] = start = starts.get(stream[0], stream)
                found.setdefault(start, []).append(name)
        return [_Stream(start, sums, list(self._ends(sums))) for start, sums in found.items()]

    def rebuilds(self, stream: _Stream) -> bool:
        """Say whether the reconstruction depends on a stream."""
        return any(self.depends(key, stream.sums) for key, name in self.results.items() if name == _RECONSTRUCTION)

    def _continued(self, op: Any) -> Key | None:
        """Return x where an operation is x + f(x) and f holds a matrix product; else None."""
        if op.get_type_name() != "Add" or not op.get_output_element_type(0).is_real():
            return None
        addends = _sources(op)
        for stream, update in (addends, addends[::-1]):
            if not self.depends(stream, self._inputs):  # a bias, a table
                continue
            within = [name for name in self._products if self.depends(update, [name])]
            if any(self.depends((name, 0), [stream[0]]) for name in within if name != stream[0]):
                return stream
        return None

    def _ends(self, sums: Sequence[str]) -> Iterator[Key]:
        """Yield the sums of a stream that are read by what its last sum does not depend on."""
        for name in sums:
            readers = [
                target.get_node().get_friendly_name() for target in self._ops[name].output(0).get_target_inputs()
            ]
            if not all(self.depends((sums[-1], 0), [reader]) for reader in readers):
                yield (name, 0)

    def part(self, precision: str, known: Sequence[Key], wanted: Sequence[Key]) -> Part:
        """Return the part that computes what is wanted from what is known and from the model's own inputs."""
        used, inputs = self._read(known, wanted)
        copy = self._model.clone()
        ops = {op.get_friendly_name(): op for op in copy.get_ordered_ops()}
        takes = {
            one.output(0).get_any_name(): one for one in copy.get_parameters() if one.get_friendly_name() in inputs
        }
        for name, number in used:
            output = ops[name].output(number)
            entry = self._library.op.Parameter(output.get_element_type(), output.get_partial_shape())
            for target in output.get_target_inputs():
                target.replace_source_output(entry.output(0))
            takes[self._name((name, number))] = entry
        results = [self._library.op.Result(ops[name].output(number)) for name, number in wanted]
        model = self._library.Model(results, list(takes.values()), precision)
        return Part(model, precision, tuple(takes), tuple(self._name(key) for key in wanted))

    def _read(self, known: Sequence[Key], wanted: Sequence[Key]) -> tuple[list[Key], set[str]]:
        """Return which of the known are read on the way to what is wanted, and the operations on that way."""
        used: set[Key] = set()
        seen: set[str] = set()
        ahead = [name for name, _ in wanted]
        while ahead:
            name = ahead.pop()
            if name in seen:
                continue
            seen.add(name)
            for key in _sources(self._ops[name]):
                if key in known:
                    used.add(key)
                else:
                    ahead.append(key[0])
        return [key for key in known if key in used], seen

    def _name(self, key: Key) -> str:
        return self.results.get(key, f"{key[0]}:{key[1]}")


def _sources(op: Any) -> list[Key]:
    sources = [one.get_source_output() for one in op.inputs()]
    return [(one.get_node().get_friendly_name(), one.get_index()) for one in sources]
