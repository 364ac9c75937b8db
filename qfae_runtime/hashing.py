"""SHA-256 of files, the only hash this project uses."""

from __future__ import annotations

import hashlib
from pathlib import Path

WEIGHTS_SUFFIX = ".data"
"""What an engine's weights are called where they lie apart: NAME.onnx.data."""


def sha256_of_engine(path: Path) -> str:
    """Hash an engine with its weights, which may lie in a file beside it."""
    weights = path.with_name(path.name + WEIGHTS_SUFFIX)
    return joined(sha256_of(path), sha256_of(weights) if weights.is_file() else None)


def joined(graph: str, weights: str | None) -> str:
    """Return the hash that stands for an engine of these two files' hashes; `weights` None: it is one file."""
    return graph if weights is None else hashlib.sha256(f"{graph} {weights}".encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hash a file without holding it in memory; lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
