"""Processes that this project starts of itself: they import it from where the one that starts them did."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGES = str(Path(__file__).parents[1])


def importing_alike() -> dict[str, str]:
    """Return the environment of this process, the folder that holds its packages first on the path of imports."""
    paths = [_PACKAGES, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
