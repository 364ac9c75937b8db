"""What a batch costs on its way to a GPU and back, which an engine's time holds."""

from __future__ import annotations

import time

import numpy as np

from qfae_runtime.engines.base import INPUT_NAME, Engine, tensors_of

_CALLS = 5


def transfer_seconds(engine: Engine, batch: int, maps: bool) -> float | None:
    """Return the seconds of moving a batch's images to the device and its results from there, by the engine's library.

    Without `maps` the scores are all that comes back.

    None where nothing is moved, and of plans, which move a batch while another one is computed.
    """
    if engine.device == "cpu" or not engine.backend.startswith("onnxruntime"):
        return None
    kind, _, number = engine.device.partition(":")
    return moved(kind, int(number or 0), engine.image_size, batch, maps)


def moved(kind: str, number: int, image_size: int, batch: int, maps: bool = True) -> float:
    """Return the seconds of moving a batch to ONNX Runtime's device of that kind and back; the quickest of some."""
    from onnxruntime import OrtValue

    found = []
    for _ in range(_CALLS):
        seconds = 0.0
        for tensor in tensors_of(image_size)[: None if maps else 2]:  # the images and the scores come first
            array = np.zeros((batch, *tensor.shape), tensor.dtype)
            start = time.perf_counter()
            there = OrtValue.ortvalue_from_numpy(array, kind, number)
            if tensor.name != INPUT_NAME:
                start = time.perf_counter()
                there.numpy()
            seconds += time.perf_counter() - start
        found.append(seconds)
    return min(found)
