"""What runs what: every backend with the files and devices it takes, whether it is installed, and how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from qfae_runtime.engines.base import Engine
from qfae_runtime.engines.files import EngineFile
from qfae_runtime.errors import EngineError

DEVICES = ("auto", "cpu", "cuda:0")
NOT_INSTALLED = "not installed"
NEEDS_GPU_BUILD = "not installed, needs onnxruntime-gpu"
"""What `lacking` says where ONNX Runtime is there, but not its build for a GPU."""

GPU_INSTALL = "pip install onnxruntime-gpu"
GPU_BUILD = f"pip uninstall -y onnxruntime && {GPU_INSTALL}"
"""Installs the build with GPU providers. It fills the same folder as onnxruntime: of the two, only one can be there."""


class Backend(NamedTuple):
    """A backend: its name in certificates, the formats and precisions of files it runs, and where, first by default.

    `reference` marks the one that a format is exported for and certified on first.
    """

    name: str
    formats: tuple[str, ...]
    precisions: tuple[str, ...]
    devices: tuple[str, ...]
    reference: bool = False

    def places(self, precision: str) -> tuple[str, ...]:
        """Return the devices it runs files of a precision on."""
        return tuple(one for one in self.devices if one == "cpu" or precision not in _FOR_CPU)


_ANY = ("fp32", "fp16", "bf16")

_FOR_CPU = ("int8",)
"""Precisions of files for processors alone: no GPU backend is known to compute their products in eight bits."""

RUNNERS = (
    Backend("onnxruntime", ("onnx",), (*_ANY, "int8"), ("cpu", "cuda:0"), reference=True),
    Backend("onnxruntime-tensorrt", ("onnx",), _ANY, ("cuda:0",)),
    Backend("openvino", ("onnx",), ("fp32", "int8"), ("cpu",)),
    Backend("openvino-bf16", ("onnx",), ("fp32",), ("cpu",)),
    Backend("tensorrt", ("plan",), _ANY, ("cuda:0",), reference=True),
    Backend("tensorrt-rtx", ("rtx-plan",), _ANY, ("cuda:0",), reference=True),
)
"""Every backend, the reference of a format before the others."""

# One word for both kinds of plan: which library runs one, its format says.
BACKENDS = ("auto", *(one.name for one in RUNNERS if one.name != "tensorrt-rtx"))
CPU_BACKENDS = tuple(one.name for one in RUNNERS if "cpu" in one.devices)


def reference_of(format: str) -> Backend:
    """Return the backend that a format is exported for."""
    return next(one for one in RUNNERS if format in one.formats and one.reference)


def runners_of(file: EngineFile, device: str) -> list[tuple[str, str]]:
    """Return backend and device of everything that runs such a file, installed or not, the reference first."""
    return [
        (one.name, place)
        for one in RUNNERS
        if file.format in one.formats and file.precision in one.precisions
        for place in one.places(file.precision)
        if device in ("auto", place)
    ]


def runner(file: EngineFile, backend: str | None, device: str) -> tuple[str, str]:
    """Return the backend and device for what was asked; None or "auto" is the reference, and its first device.

    Raises:
        EngineError: what was asked for cannot run the file.

    """
    known = [one for one in RUNNERS if file.format in one.formats]
    reference = reference_of(file.format)
    # "tensorrt" asks for whichever library the kind of plan needs.
    either = (backend, reference.name) == ("tensorrt", "tensorrt-rtx")
    name = reference.name if backend in (None, "auto") or either else backend
    asked = next((one for one in known if one.name == name), None)
    if asked is None:
        others = " or ".join(one.name for one in known)
        raise EngineError(
            f"{file.path}: format {file.format!r} is run by {others}, not by {backend}; leave out the backend"
        )
    if file.precision not in asked.precisions:
        raise EngineError(
            f"{file.path}: {asked.name} runs {', '.join(asked.precisions)} files, this one is {file.precision}; "
            f"name {file.manifest.name}.onnx, or leave out the backend"
        )
    places = asked.places(file.precision)
    if device not in ("auto", *places) and device in asked.devices:
        raise EngineError(
            f"{file.path}: {file.precision.upper()} files are for processors, got device {device}, expected "
            f"{places[0]}; leave out the device, or name {file.manifest.name}.onnx, which {asked.name} runs there"
        )
    if device not in ("auto", *places):
        raise EngineError(
            f"{file.path}: {asked.name} runs format {file.format!r} on {places[0]}, not on {device}; "
            "leave out the device"
        )
    return asked.name, places[0] if device == "auto" else device


def lacking(backend: str, device: str) -> str | None:
    """Say in a few words what this machine lacks to run a backend on a device; None where it seems to lack nothing."""
    if backend.startswith("onnxruntime"):
        if find_spec("onnxruntime") is None:
            return NOT_INSTALLED
        from qfae_runtime.engines import onnxruntime

        return None if onnxruntime.has_provider(backend, device) else NEEDS_GPU_BUILD
    if backend.startswith("openvino"):
        if find_spec("openvino") is None:
            return NOT_INSTALLED
        from qfae_runtime.engines import openvino

        try:
            able = backend == "openvino" or openvino.has_bf16()
        except EngineError as error:
            return str(error)
        return None if able else "this processor does not compute in BF16"
    from qfae_runtime.engines.plan import LIBRARIES

    return None if find_spec(LIBRARIES[backend][1]) is not None else NOT_INSTALLED


def version_of(backend: str) -> str:
    """Return the version of an installed backend that runs ONNX files, as its engines would say.

    Raises:
        EngineError: it cannot be loaded.

    """
    if backend.startswith("onnxruntime"):
        from qfae_runtime.engines import onnxruntime

        return onnxruntime.VERSION
    from qfae_runtime.engines import openvino

    return openvino.version()


def load(file: EngineFile, backend: str, device: str, threads: int | None) -> Engine:
    """Load an engine file with a backend.

    Raises:
        EngineError: the backend is missing, or cannot load the file.

    """
    size, most = file.manifest.image_size, file.manifest.max_batch
    if file.format == "onnx":
        return load_onnx(file.model, size, most, backend, device, threads, batches=file.manifest.batch_sizes)
    from qfae_runtime.engines.tensorrt import TensorRtEngine

    plan = file.model if isinstance(file.model, bytes) else Path(file.model).read_bytes()
    return TensorRtEngine(plan, size, most, backend=backend, device=device, name=str(file.path))


def load_onnx(
    model: Path | bytes,
    image_size: int,
    max_batch: int,
    backend: str,
    device: str = "cpu",
    threads: int | None = None,
    *,
    batches: Sequence[int] | None = None,
) -> Engine:
    """Load an ONNX file, or its bytes, that needs no manifest; `batches` None: powers of two, and `max_batch`.

    Raises:
        EngineError: the backend is missing, or cannot load the file.

    """
    # Imported here, so that a manifest can be read where a backend is not installed.
    if backend.startswith("openvino"):
        from qfae_runtime.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(model, image_size, max_batch, threads, backend=backend, batches=batches)
    if find_spec("onnxruntime") is None:
        raise EngineError("ONNX Runtime is not installed; install it with: pip install onnxruntime")
    from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(model, image_size, max_batch, threads, backend=backend, device=device, batches=batches)


def measuring(engine: Path, backend: str, device: str) -> str:
    """Return the command that measures an engine on a backend and writes its certificate."""
    place = f" --device {device}" if device != "cpu" else ""
    return f"qfae-export verify --engine {quote(str(engine))} --ckpt NAME.pt --backend {backend}{place} --record"
