"""What this package raises on purpose, besides what checkpoint and runtime raise.

QfaeError
└── ExportError      exit 1   a checkpoint cannot be turned into a certified engine
    └── ParityError  exit 1   an engine was made, but does not compute what PyTorch computes
"""

from __future__ import annotations

from qfae_runtime.errors import QfaeError


class ExportError(QfaeError):
    """A checkpoint cannot be turned into a certified engine."""
