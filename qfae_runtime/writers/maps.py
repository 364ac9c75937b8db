"""maps/, on request: one anomaly map per picture in the picture's own geometry, float16 (H, W), as .npy.

float16 keeps three digits of a value. Below 6e-5 its steps are 6e-8 wide, so that smaller values become 0; the largest
it holds is 65504, and no map comes near. `numpy.load(path, allow_pickle=False)` reads a map.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qfae_runtime.arrays import Float32
from qfae_runtime.writers.names import name_for
from qfae_runtime.writers.whole import whole_file

_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f2', 'fortran_order': False, 'shape': \(\d+, \d+\), \} *\n", re.DOTALL
)
_HEADER_BYTES = 128
_FRAME_NAME = re.compile(r"\.f\d{4,}~*$")


def map_name(source: str) -> str:
    """Name a source's map below maps/: its whole path, and .npy; no two are alike, nor is one as that of a frame.

    A source that ends as the name of a frame does (see frame_path) gets a ~ more.
    """
    return name_for(f"{source}{'~' if _FRAME_NAME.search(source) else ''}", ".npy")


def save_map(anomaly_map: Float32, path: Path) -> None:
    """Write a map float32 (H, W) as float16, whole or not at all."""
    values = np.ascontiguousarray(anomaly_map, dtype="<f2")
    with whole_file(path) as temporary, temporary.open("wb") as file:
        # Not np.save: it hands a file to C, where a disk that is full goes unnoticed or loses its name.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        file.write(values.data)


def listed_names(rows_path: Path) -> set[str]:
    """Return the maps that rows in scores.jsonl name, below the results folder; other lines are passed over.

    A .npy holds no mark of who wrote it. Its name in this list, and what is_map says, make it ours.
    """
    return set(_named(rows_path))


def is_map(path: Path) -> bool:
    """Say whether a file begins as every map does: a .npy of a float16 matrix."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return _HEADER.match(file.read(_HEADER_BYTES)) is not None
    except OSError:
        return False


def _named(rows_path: Path) -> Iterator[str]:
    try:
        with rows_path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and isinstance(row.get("anomaly_map"), str):
                    yield row["anomaly_map"]
    except OSError:
        return
