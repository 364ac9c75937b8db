"""The ONNX Runtime backends: on a CPU, the reference every other engine is held against; on a GPU, by CUDA or TensorRT.

    onnxruntime           cpu     CPUExecutionProvider
    onnxruntime           cuda:0  CUDAExecutionProvider
    onnxruntime-tensorrt  cuda:0  TensorrtExecutionProvider, which compiles the file whenever it is opened

No provider may compute in another precision than the file's: TF32 is off, and nothing is cast to FP16.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.backends import GPU_BUILD
from qfae_runtime.engines.base import (
    INPUT_NAME,
    OUTPUT_NAMES,
    Scores,
    check_images,
    check_signature,
    one_line,
)
from qfae_runtime.engines.batches import cut_back, filled_up, fills_up, next_size, run_split, sizes_up_to
from qfae_runtime.errors import EngineError

# From 1.32 on, ONNX Runtime gives the machine an identity in ~/.cache/Microsoft and keeps usage events there as soon
# as it is imported. A hospital's machine keeps no such record, and reports to nobody.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

VERSION: str = ort.__version__
_CPU, _CUDA, _TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_PROVIDERS = {
    ("onnxruntime", "cpu"): (_CPU,),
    ("onnxruntime", "cuda:0"): (_CUDA, _CPU),
    ("onnxruntime-tensorrt", "cuda:0"): (_TENSORRT, _CUDA, _CPU),
}
_TF32 = "NVIDIA_TF32_OVERRIDE"
_ERRORS_ONLY = 3  # ONNX Runtime's log severity; warnings about the graph are the exporter's business
_NUMPY_TYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}


def has_provider(backend: str, device: str) -> bool:
    """Say whether this build of ONNX Runtime has what a backend on a device needs; it may still not start."""
    return _PROVIDERS[backend, device][0] in ort.get_available_providers()


class OnnxRuntimeEngine:
    """An ONNX file or its bytes, run by ONNX Runtime. Needs no manifest; keeps to Engine.

    `model` as bytes cannot refer to external data; `threads` bounds the compute threads (None: all cores). `batches`
    are the only sizes that ONNX Runtime is called with, from 1 to `max_batch`, ascending; None: powers of two, and it.

    Raises:
        EngineError: the provider is not installed or falls back to the CPU, ONNX Runtime cannot load the model, or its
            inputs and outputs are not those of a QFAE engine.

    """

    def __init__(
        self,
        model: Path | str | bytes,
        image_size: int,
        max_batch: int,
        threads: int | None = None,
        *,
        backend: str = "onnxruntime",
        device: str = "cpu",
        batches: Sequence[int] | None = None,
    ) -> None:
        self.backend, self.device, self.version = backend, device, VERSION
        self.image_size, self.max_batch = image_size, max_batch
        self.batches = tuple(sizes_up_to(max_batch) if batches is None else batches)
        what = "the engine" if isinstance(model, bytes) else str(model)
        providers = _PROVIDERS[backend, device]
        if not has_provider(backend, device):
            raise EngineError(
                f"{what}: ONNX Runtime {VERSION} is installed without {providers[0]}; "
                f"install the GPU build with: {GPU_BUILD}"
            )
        if device != "cpu":
            _prepare_gpu(backend, what)
        try:
            self._session: Any = ort.InferenceSession(
                model if isinstance(model, bytes) else str(model),
                _session_options(threads),
                providers=list(providers),
                provider_options=[_options_of(one, image_size, max_batch) for one in providers],
            )
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise EngineError(_refusal(what, str(error), device)) from None
        # A provider that cannot start is left out with a line in a log: scores would come from an engine that no
        # certificate is about.
        if self._session.get_providers()[:1] != [providers[0]]:
            got = ", ".join(self._session.get_providers()) or "none"
            self._session = None
            raise EngineError(
                f"{what}: {providers[0]} did not start, ONNX Runtime {VERSION} fell back to {got}; {_cure(device)}"
            )
        session = self._session
        inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
        check_signature(_signature(inputs), _signature(session.get_outputs()), image_size, what)

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        """Score uint8 (B, S, S, 3); see Engine.run."""
        if self._session is None:
            raise EngineError("the engine is closed; open it again to score with it")
        check_images(images, self.image_size, self.max_batch)
        if fills_up(self.device):
            batch = filled_up(images, next_size(self.batches, len(images)))
            return cut_back(self._run(batch, maps), len(images))
        return run_split(self.batches, images, lambda part: self._run(part, maps))

    def _run(self, batch: UInt8, maps: bool) -> Scores:
        names = list(OUTPUT_NAMES if maps else OUTPUT_NAMES[:1])
        try:
            outputs = self._session.run(names, {INPUT_NAME: np.ascontiguousarray(batch)})
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime {self.version} failed on a batch of {len(batch)}: {one_line(error)}; "
                "try a smaller --batch-size"
            ) from None
        if not maps:
            size = self.image_size
            outputs += [np.empty((0, size, size), np.float32), np.empty((0, size, size, 3), np.uint8)]
        return Scores(*outputs)

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _session_options(threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.inter_op_num_threads = 1
    # On x86 without VNNI its products of unsigned with signed bytes overflow in between; this takes slower ones there.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _options_of(provider: str, image_size: int, max_batch: int) -> dict[str, str]:
    if provider == _CUDA:
        # HEURISTIC and EXHAUSTIVE choose an algorithm anew in every process, by a time measured there. The first GPU is
        # taken anyway, and where it is named (device_id), 1.31 warns on stderr of a plugin that is not there.
        return {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}
    if provider == _TENSORRT:
        square = f"{image_size}x{image_size}x3"
        return {
            "trt_fp16_enable": "0",
            "trt_int8_enable": "0",
            # Else it compiles the file again for each batch size that it has not seen.
            "trt_profile_min_shapes": f"{INPUT_NAME}:1x{square}",
            "trt_profile_opt_shapes": f"{INPUT_NAME}:{max_batch}x{square}",
            "trt_profile_max_shapes": f"{INPUT_NAME}:{max_batch}x{square}",
        }
    return {}


def _prepare_gpu(backend: str, what: str) -> None:
    """Find NVIDIA's libraries where pip puts them, and switch TF32 off where no option of the provider does.

    Raises:
        EngineError: the environment asks for TF32.

    """
    # TensorRT's builder uses TF32 unless told otherwise, and its provider has no option for it.
    if backend == "onnxruntime-tensorrt" and os.environ.setdefault(_TF32, "0") != "0":
        raise EngineError(
            f"{what}: {_TF32} is {os.environ[_TF32]!r}, expected '0': TensorRT would round FP32 to TF32; "
            "unset it or set it to 0"
        )
    preload = getattr(ort, "preload_dlls", None)  # from 1.21 on
    if preload is not None:
        preload(directory="")


def _refusal(what: str, reason: str, device: str) -> str:
    """Return the sentence for a file that cannot be loaded; one of a later opset is sound, the installation is old."""
    opset, known = re.search(r"Opset (\d+) is under", reason), re.search(r"is till opset (\d+)", reason)
    if opset and known:
        return (
            f"{what}: its opset is {opset[1]}, ONNX Runtime {VERSION} reads up to {known[1]}; install a newer one "
            "(pip install --upgrade onnxruntime), FP16 files need 1.23"
        )
    return f"{what}: ONNX Runtime {VERSION} cannot load it: {one_line(reason)}; {_cure(device)}"


def _cure(device: str) -> str:
    if device == "cpu":
        return "export it again with qfae-export"
    return "check that nvidia-smi shows a GPU, and that CUDA, cuDNN and TensorRT fit this build of ONNX Runtime"


def _signature(nodes: list[Any]) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Return numpy type and shape by name; symbolic dimensions are settled when the engine runs."""
    return {
        node.name: (
            _NUMPY_TYPES.get(node.type, node.type),
            tuple(None if isinstance(size, str) else size for size in node.shape),
        )
        for node in nodes
    }
