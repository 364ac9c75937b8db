"""What an engine is: uint8 images in, Scores out. Backends keep to this one protocol.

Letters: B images in a batch, S the engine's `image_size`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import NamedTuple, Protocol, Self, runtime_checkable

import numpy as np

from qfae_runtime.arrays import Float32, UInt8
from qfae_runtime.errors import EngineError

INPUT_NAME = "images"
OUTPUT_NAMES = ("score", "anomaly_map", "reconstruction")
_SHOWN_CHARACTERS = 300


class Tensor(NamedTuple):
    """An input or output: its name, numpy type, and shape without the batch."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes_per_image(self) -> int:
        """Bytes that one image takes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def tensors_of(image_size: int) -> tuple[Tensor, ...]:
    """Return the input and the outputs of every QFAE engine, the input first."""
    square = (image_size, image_size)
    return (
        Tensor(INPUT_NAME, "uint8", (*square, 3)),
        Tensor("score", "float32", ()),
        Tensor("anomaly_map", "float32", square),
        Tensor("reconstruction", "uint8", (*square, 3)),
    )


class Scores(NamedTuple):
    """An engine's outputs; the field names are the output names of every engine file.

    score           float32 (B,)         unbounded, higher is more anomalous
    anomaly_map     float32 (B, S, S)    the same unit, per pixel of the engine's square
    reconstruction  uint8 (B, S, S, 3)   RGB, 0..255
    """

    score: Float32
    anomaly_map: Float32
    reconstruction: UInt8

    def of(self, images: slice | list[int]) -> Scores:
        """Return the outputs of some of the images, in the order given."""
        return Scores(self.score[images], self.anomaly_map[images], self.reconstruction[images])

    @staticmethod
    def joined(parts: Iterable[Scores]) -> Scores:
        """Return the outputs of several runs as those of one."""
        return Scores(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


UNWRITTEN = 0xFF
"""The byte that buffers for outputs are filled with before a run; four of them are a NaN."""


class Engine(Protocol):
    """A loaded engine, to be used in a `with`: leaving it, or `close`, frees what it holds.

    One thread at a time may use it. Engines that are open at the same time share nothing.
    """

    @property
    def image_size(self) -> int:
        """S, in pixels."""
        ...

    @property
    def max_batch(self) -> int:
        """Most images that one `run` takes."""
        ...

    @property
    def batches(self) -> tuple[int, ...]:
        """The only batch sizes that the backend is called with, ascending.

        `run` takes any number of images up to `max_batch`: engines.batches says how it is brought to these sizes.
        """
        ...

    @property
    def backend(self) -> str:
        """What executes it and how, as certificates name it, e.g. "openvino-bf16"."""
        ...

    @property
    def device(self) -> str:
        """Where it runs, e.g. "cpu"."""
        ...

    @property
    def version(self) -> str:
        """The version of the backend."""
        ...

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        """Score uint8 (B, S, S, 3), 1 <= B <= max_batch; images need not lie in one piece.

        Who owns what: the images stay the caller's, are only read, and may be changed as soon as this returns. The
        returned arrays are the caller's too: writeable, and no later run, `close` or other engine touches them.

        With `maps=False` only the score is fetched; the other two outputs come back with B = 0.

        Raises:
            EngineError: the images are not what the engine takes, or the backend failed.

        """
        ...

    def close(self) -> None:
        """Free what the engine holds. Calling it twice does no harm."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Poisonable(Protocol):
    """An engine that writes into buffers of its own, and can be asked what it leaves in them unwritten."""

    def poison(self, byte: int | None = UNWRITTEN) -> None:
        """Fill the outputs with `byte` before every run from now on; None leaves what the run before wrote."""
        ...


@runtime_checkable
class Overlapping(Protocol):
    """An engine through which several batches may be on their way, so that copies go on while it computes."""

    @property
    def slots(self) -> int:
        """How many batches may be submitted and not yet collected; 1 or more."""
        ...

    def submit(self, images: UInt8) -> None:
        """Start on uint8 (B, S, S, 3), 1 <= B <= max_batch, and return without waiting for the result.

        The images are copied before it returns.

        Raises:
            EngineError: the images are not what the engine takes, `slots` batches wait to be collected, or the backend
                failed; then every batch that was on its way is lost.

        """
        ...

    def collect(self, maps: bool = True) -> Scores:
        """Wait for the batch that was submitted first and return its scores; ownership and `maps` as in Engine.run.

        Raises:
            EngineError: no batch was submitted, or the backend failed; then every batch that was on its way is lost.

        """
        ...


def card_of(engine: Engine) -> str | None:
    """Name the GPU that an engine runs on, as certificates do; None on a processor, or where it does not say."""
    card = getattr(engine, "gpu", None)
    return None if card is None else str(card)


def check_images(images: UInt8, image_size: int, max_batch: int) -> None:
    """Refuse a batch that is not uint8 (B, S, S, 3) with 1 <= B <= max_batch.

    Raises:
        EngineError: what was expected, what was got, and the cure.

    """
    wanted = (image_size, image_size, 3)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != wanted:
        raise EngineError(
            f"input {INPUT_NAME!r}: expected uint8 (B, {image_size}, {image_size}, 3), got {images.dtype} "
            f"{images.shape}; pass images from preprocess(), the engine normalises them itself"
        )
    if not 1 <= len(images) <= max_batch:
        raise EngineError(
            f"input {INPUT_NAME!r}: expected 1..{max_batch} images in a batch, got {len(images)}; "
            "Scorer cuts any number of images into batches"
        )


Found = Mapping[str, tuple[str, tuple[int | None, ...]]]
"""Numpy type and shape of inputs or outputs by name, None for what is settled when the model runs."""


def check_signature(inputs: Found, outputs: Found, image_size: int, what: str) -> None:
    """Refuse a model whose inputs and outputs are not those of a QFAE engine; `what` names it.

    The batch must be settled when the model runs. One input too many, even one with a value of its own, is an engine
    that computes something else if somebody sets it.

    Raises:
        EngineError: what was expected and what was got.

    """
    first, *others = tensors_of(image_size)
    for kind, found, expected in (("input", inputs, [first]), ("output", outputs, others)):
        _check_tensors(found, expected, what)
        names = [tensor.name for tensor in expected]
        if more := sorted(set(found) - set(names)):
            raise EngineError(one_too_many(what, kind, more[0], names))


def one_too_many(what: str, kind: str, name: str, expected: Iterable[str]) -> str:
    """Say that a model has an input or output that no engine has."""
    return (
        f"{what}: {kind} {name!r} is one too many, expected {', '.join(expected)} alone; this is no engine that "
        "qfae-export wrote"
    )


def _check_tensors(found: Found, expected_tensors: Iterable[Tensor], what: str) -> None:
    for tensor in expected_tensors:
        got = found.get(tensor.name)
        if got is not None and _fits(tensor, *got):
            continue
        said = f"none, only {', '.join(sorted(found))}" if got is None else f"{got[0]} {_shape_text(got[1])}"
        expected = f"{tensor.dtype} {_shape_text((None, *tensor.shape))}"
        raise EngineError(
            f"{what}: tensor {tensor.name!r}: expected {expected}, got {said}; "
            "this is no engine that qfae-export wrote for this image size"
        )


def _fits(tensor: Tensor, dtype: str, shape: tuple[int | None, ...]) -> bool:
    return (
        dtype == tensor.dtype
        and len(shape) == len(tensor.shape) + 1
        and shape[0] is None
        and all(have in (None, need) for have, need in zip(shape[1:], tensor.shape, strict=True))
    )


def _shape_text(shape: tuple[int | None, ...]) -> str:
    sizes = [
        "batch" if size is None and not axis else "?" if size is None else str(size) for axis, size in enumerate(shape)
    ]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def one_line(error: object) -> str:
    """Return what a library says, on one line and not too long."""
    line = " ".join(str(error).split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]} ..."
