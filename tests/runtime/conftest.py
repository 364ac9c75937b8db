from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .doubles.cuda import FakeCuda
from .doubles.tensorrt import FakeTensorRt
from .tiny import export_tiny


@pytest.fixture
def engine_path(tmp_path: Path) -> Path:
    return export_tiny(tmp_path / "engine")


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A double in the place of cuda-python."""
    cuda = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    return cuda


@pytest.fixture
def trt(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    """A double in the place of TensorRT and of TensorRT-RTX, on the double of cuda-python."""
    trt = FakeTensorRt(fake_cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    return trt


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """BMAD layout: 6 good images without masks, 6 Ungood ones with a bright square and its mask."""
    root = tmp_path / "data" / "test"
    rng = np.random.default_rng(3)
    for number in range(6):
        smooth = np.clip(rng.normal(100, 4, (40, 48)), 0, 255).astype(np.uint8)
        write_png(root / "good" / "img" / f"{number}.png", smooth)
        mask = np.zeros_like(smooth)
        mask[10:18, 20:28] = 255
        write_png(root / "Ungood" / "img" / f"{number}.png", np.where(mask > 0, 220, smooth).astype(np.uint8))
        write_png(root / "Ungood" / "label" / f"{number}.png", mask)
    return root


def write_png(path: Path, pixels: np.typing.NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
