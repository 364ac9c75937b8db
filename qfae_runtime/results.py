"""What makes a folder a results folder of qfae-run: the content of its run.json, whatever the folder is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN_NAME, ROWS_NAME = "run.json", "scores.jsonl"
_MARKS = frozenset({"fingerprint", "self_test"})
_MAX_RUN_BYTES = 16 * 2**20


def read_record(path: Path) -> dict[str, Any]:
    """Read a run.json; empty when it is missing, illegible or not written by qfae-run."""
    try:
        # A file of this name may be anything, a pipe included.
        if not path.is_file() or path.stat().st_size > _MAX_RUN_BYTES:
            return {}
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) and stored.keys() >= _MARKS else {}


def holds_run(folder: Path) -> bool:
    """Say whether a folder holds a run.json that qfae-run wrote."""
    return bool(read_record(folder / RUN_NAME))
