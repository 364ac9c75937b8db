"""The OpenVINO backends on a CPU: an FP32 ONNX file in FP32 or, where the CPU can, in BF16, and an INT8 one in INT8.

    openvino        FP32, or the INT8 that an INT8 file says; owes the contract of the file
    openvino-bf16   blocks of the perceptual network in BF16, all else in FP32 (openvino_parts.py); owes BF16's contract

The file is compiled once, for every batch size: measured on two cores, a model compiled for one size is no faster, and
each would hold a copy of the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import INPUT_NAME, OUTPUT_NAMES, Scores, check_images, check_signature, one_line
from qfae_runtime.engines.batches import run_split, sizes_up_to
from qfae_runtime.engines.external import refuse_scattered
from qfae_runtime.engines.openvino_parts import parts_of, whole
from qfae_runtime.engines.signal_stack import kept_signal_stack
from qfae_runtime.errors import EngineError

PRECISIONS = {"openvino": "f32", "openvino-bf16": "bf16"}
"""By backend: OpenVINO's name of the type that most of the work is done in."""

_INTEGERS = {"i8", "u8"}
_BF16_FLAGS = ("avx512_bf16", "amx_bf16")
_TYPES = {"u8": "uint8", "f32": "float32"}  # of OpenVINO: of numpy
_PRODUCTS = ("FullyConnected", "MatMul", "Convolution")  # the layers that nearly all of the work is in
_TELEMETRY = "openvino_telemetry"


def version() -> str:
    """Return OpenVINO's version and build, e.g. "2026.4.1-22982".

    Raises:
        EngineError: it is not installed.

    """
    return "-".join(str(import_library().__version__).split("-")[:2])


@cache
def import_library() -> Any:
    """Return the module `openvino`.

    Raises:
        EngineError: it is not installed, or cannot be loaded.

    """
    try:
        with _without_telemetry():
            import openvino
    except (ImportError, OSError) as error:  # OSError: a library it loads is damaged
        raise EngineError(
            f"OpenVINO cannot be imported ({one_line(error)}); install it with: pip install 'qfae[openvino]'"
        ) from None
    return openvino


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Within, `import openvino` does not find its telemetry, and goes without.

    Else it gives the machine an identity in ~/intel and reports the import to Google Analytics. No setting stops that
    but a file in the home folder. Whoever imported OpenVINO before has decided for himself.
    """
    before = sys.modules.get(_TELEMETRY)
    if before is None:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # Python's way to say: not to be found
    try:
        yield
    finally:
        if before is None:
            del sys.modules[_TELEMETRY]


def has_bf16() -> bool:
    """Say whether this processor computes in BF16. OpenVINO emulates it on others, slowly."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: OpenVINO's own word
        with kept_signal_stack():
            return "BF16" in import_library().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return any(flag in flags for flag in _BF16_FLAGS)


class _Step(NamedTuple):
    """A compiled part: its request, and the names of what it takes and gives, in the order of its ports."""

    request: Any
    takes: tuple[str, ...]
    gives: tuple[str, ...]


class OpenVinoEngine:
    """An ONNX file or its bytes, run by OpenVINO on the CPU. Needs no manifest; keeps to Engine.

    `model` as bytes must not refer to external data: OpenVINO would look for it in the working directory. `backend` is
    one of PRECISIONS; `threads` bounds the compute threads (None: all cores). `batches` are the only sizes that
    OpenVINO is called with, from 1 to `max_batch`, ascending; None: powers of two, and it.

    Raises:
        EngineError: OpenVINO is not installed or cannot load the model, the processor has no BF16, the model computes
            in another type than asked for, or its inputs and outputs are not those of a QFAE engine.

    """

    device = "cpu"

    def __init__(
        self,
        model: Path | str | bytes,
        image_size: int,
        max_batch: int,
        threads: int | None = None,
        *,
        backend: str = "openvino",
        batches: Sequence[int] | None = None,
    ) -> None:
        library = import_library()
        self.backend, self.version = backend, version()
        self.image_size, self.max_batch = image_size, max_batch
        self.batches = tuple(sizes_up_to(max_batch) if batches is None else batches)
        what = "the engine" if isinstance(model, bytes) else str(model)
        if backend == "openvino-bf16" and not has_bf16():
            raise EngineError(
                f"{what}: this processor does not compute in BF16 (none of {', '.join(_BF16_FLAGS)}); "
                "leave out the backend, or name openvino"
            )
        if not isinstance(model, bytes):
            refuse_scattered(Path(model), "OpenVINO", linked_alike=False)
        try:
            core = library.Core()
            read = core.read_model(model if isinstance(model, bytes) else str(model))
            # Integer products are right in a file that says so, and nowhere else.
            integers = _INTEGERS if any("Quantize" in one.get_type_name() for one in read.get_ops()) else set()
            precision = PRECISIONS[backend]
            parts = parts_of(library, read) if precision == "bf16" else [whole(read, precision)]
            with kept_signal_stack():
                compiled = [core.compile_model(one.model, "CPU", _settings(one.precision, threads)) for one in parts]
            inputs, outputs = _signature(read.inputs), _signature(read.outputs)
            computed = [_computed_in(one) for one in compiled]
            self._steps = [
                _Step(one.create_infer_request(), *part[2:]) for one, part in zip(compiled, parts, strict=True)
            ]
        except Exception as error:  # its bindings raise RuntimeError and others
            raise EngineError(
                f"{what}: OpenVINO {self.version} cannot load it: {one_line(error)}; "
                "export it again with qfae-export, or run it with --backend onnxruntime"
            ) from None
        for part, types in zip(parts, computed, strict=True):
            if wrong := types - {part.precision} - integers:
                self._steps = []
                raise EngineError(
                    f"{what}: OpenVINO {self.version} computes products in {', '.join(sorted(wrong))}, expected "
                    f"{part.precision}; name another backend"
                )
        check_signature(inputs, outputs, image_size, what)

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        """Score uint8 (B, S, S, 3); see Engine.run."""
        if not self._steps:
            raise EngineError("the engine is closed; open it again to score with it")
        check_images(images, self.image_size, self.max_batch)
        return run_split(self.batches, images, lambda part: self._run(part, maps))

    def _run(self, images: UInt8, maps: bool) -> Scores:
        tensors: dict[str, Any] = {INPUT_NAME: np.ascontiguousarray(images)}
        try:
            for request, takes, gives in self._steps:
                # Not copied on the way in: it is read only until this returns. What a step gives lies in its request,
                # which writes the next batch there.
                request.infer([tensors[name] for name in takes], share_inputs=True, share_outputs=True)
                tensors |= {name: request.get_output_tensor(number).data for number, name in enumerate(gives)}
        except Exception as error:
            raise EngineError(
                f"OpenVINO {self.version} failed on a batch of {len(images)}: {one_line(error)}; "
                "try a smaller --batch-size"
            ) from None
        return Scores(*(tensors[name][: None if maps or name == "score" else 0].copy() for name in OUTPUT_NAMES))

    def close(self) -> None:
        """Free the model."""
        self._steps = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _settings(precision: str, threads: int | None) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": precision,
        # Else OpenVINO may lower the precision where it finds that faster.
        "EXECUTION_MODE_HINT": "ACCURACY",
        # One batch at a time, by all threads: a second stream would take half of them.
        "NUM_STREAMS": "1",
    }
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    return settings


def _computed_in(compiled: Any) -> set[str]:
    """Return the types that the model as it was compiled computes its products in, e.g. {"bf16"}."""
    found = set()
    for layer in compiled.get_runtime_model().get_ops():
        facts = layer.get_rt_info()
        if facts["layerType"].astype(str) in _PRODUCTS:
            found.add(facts["runtimePrecision"].astype(str))
    return found


def _signature(tensors: list[Any]) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    found = {}
    for tensor in tensors:
        shape = tuple(None if size.is_dynamic else size.get_length() for size in tensor.get_partial_shape())
        dtype = tensor.get_element_type().get_type_name()
        found[tensor.get_any_name()] = (_TYPES.get(dtype, dtype), shape)
    return found
