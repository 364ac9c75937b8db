"""Commands as a user types them: scripts of this environment, in a folder of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def run(*command: object, cwd: Path, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command with this environment's scripts first on the path and a cache of its own; its output as text."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment["QFAE_CACHE"] = str((home or cwd) / "cache")
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False)
