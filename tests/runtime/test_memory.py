"""Memory: what a run keeps of a file is its name, however many files there are."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np

from .conftest import write_png
from .test_run import run

MORE = 1200
BYTES_PER_FILE = 1500  # names in a few forms; a picture of 96 x 96 has 27,648


def archive(folder: Path, count: int, picture: Path) -> Path:
    for number in range(count):
        path = folder / f"patient{number // 100:04}" / f"slice-{number:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(picture, path)
    return folder


def peak(images: Path, engine: Path, out: Path) -> int:
    tracemalloc.start()
    try:
        run(images, engine, out, maps=False, backend="onnxruntime", batch_size=8)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_by_names_alone(engine_path: Path, tmp_path: Path) -> None:
    picture = tmp_path / "one.png"
    write_png(picture, np.random.default_rng(0).integers(0, 256, (96, 96), dtype=np.uint8))
    run(archive(tmp_path / "warm", 8, picture), engine_path, tmp_path / "out0", maps=False)
    few = peak(archive(tmp_path / "few", 200, picture), engine_path, tmp_path / "out1")
    many = peak(archive(tmp_path / "many", 200 + MORE, picture), engine_path, tmp_path / "out2")
    assert (many - few) / MORE < BYTES_PER_FILE
