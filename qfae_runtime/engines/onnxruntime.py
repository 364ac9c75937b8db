"""The ONNX Runtime backend (CPU): the reference every other engine is held against."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import INPUT_NAME, OUTPUT_NAMES, Scores, check_images
from qfae_runtime.errors import EngineError

# From 1.32 on, ONNX Runtime gives the machine an identity in ~/.cache/Microsoft and keeps usage events there as soon
# as it is imported. A hospital's machine keeps no such record, and reports to nobody.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

_ERRORS_ONLY = 3  # ONNX Runtime's log severity; warnings about the graph are the exporter's business


class OnnxRuntimeEngine:
    """An ONNX file or its bytes, run by ONNX Runtime on the CPU. Needs no manifest; keeps to Engine.

    `model` as bytes cannot refer to external data; `threads` bounds the compute threads (None: all cores).

    Raises:
        EngineError: ONNX Runtime cannot load it, or its inputs and outputs are not those of a QFAE engine.

    """

    backend = "onnxruntime"
    device = "cpu"

    def __init__(self, model: Path | str | bytes, image_size: int, max_batch: int, threads: int | None = None) -> None:
        self.image_size = image_size
        self.max_batch = max_batch
        self.version: str = ort.__version__
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.use_deterministic_compute = True
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        what = "the engine" if isinstance(model, bytes) else str(model)
        try:
            self._session: Any = ort.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise EngineError(
                f"{what}: ONNX Runtime {ort.__version__} cannot load it: {_one_line(error)}; "
                "export it again with qfae-export"
            ) from None
        _check_signature(self._session, image_size, what)

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        """Score uint8 (B, S, S, 3); see Engine.run."""
        if self._session is None:
            raise EngineError("the engine is closed; open it again to score with it")
        check_images(images, self.image_size, self.max_batch)
        names = list(OUTPUT_NAMES if maps else OUTPUT_NAMES[:1])
        try:
            outputs = self._session.run(names, {INPUT_NAME: np.ascontiguousarray(images)})
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime {self.version} failed on a batch of {len(images)}: {_one_line(error)}; "
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


def _check_signature(session: Any, size: int, what: str) -> None:
    wanted = {
        INPUT_NAME: ("tensor(uint8)", [size, size, 3]),
        "score": ("tensor(float)", []),
        "anomaly_map": ("tensor(float)", [size, size]),
        "reconstruction": ("tensor(uint8)", [size, size, 3]),
    }
    found = {node.name: node for node in (*session.get_inputs(), *session.get_outputs())}
    for name, (dtype, shape) in wanted.items():
        node = found.get(name)
        got = f"{node.type} {node.shape}" if node is not None else f"none, only {', '.join(sorted(found))}"
        # Symbolic dimensions (strings) of outputs are settled when the engine runs; fixed ones must fit.
        fits = (
            node is not None
            and node.type == dtype
            and len(node.shape) == len(shape) + 1
            and all(isinstance(have, str) or have == need for have, need in zip(node.shape[1:], shape, strict=True))
        )
        if not fits:
            raise EngineError(
                f"{what}: tensor {name!r}: expected {dtype} {['batch', *shape]}, got {got}; "
                "this is no engine that qfae-export wrote for this image size"
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
