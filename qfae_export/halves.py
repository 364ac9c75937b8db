"""Half an engine, completed by PyTorch's other half, so that it is measured like a whole one.

Letters: B images, S pixels per side.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime as ort
import torch

from qfae_export.graph import InferenceGraph
from qfae_export.onnx_file import PIXELS_NAME, tensor_names
from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import INPUT_NAME, Scores, check_images
from qfae_runtime.engines.batches import run_split, sizes_up_to


class CompletedHalf:
    """One half in ONNX, the other in PyTorch float32. Keeps to Engine."""

    backend = "onnxruntime"
    device = "cpu"

    def __init__(self, path: Path, part: str, other: InferenceGraph, image_size: int, max_batch: int) -> None:
        self.image_size, self.max_batch, self.version = image_size, max_batch, str(ort.__version__)
        self.batches = sizes_up_to(max_batch)
        self._part, self._other = part, other
        self._session: Any = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        """Score uint8 (B, S, S, 3); see Engine.run. The maps are always fetched."""
        check_images(images, self.image_size, self.max_batch)
        return run_split(self.batches, images, self._run)

    def _run(self, images: UInt8) -> Scores:
        given = torch.from_numpy(images)
        names = tensor_names(self._part)[1]
        if self._part == "reconstruction":
            reconstruction, pixels = self._session.run(names, {INPUT_NAME: images})
            with torch.no_grad():
                score, anomaly_map = self._other(given, torch.from_numpy(pixels))
            return Scores(score.numpy(), anomaly_map.numpy(), reconstruction)
        with torch.no_grad():
            greys, exact = self._other(given)
        score, anomaly_map = self._session.run(names, {INPUT_NAME: images, PIXELS_NAME: np.asarray(exact)})
        return Scores(score, anomaly_map, greys.numpy())

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
