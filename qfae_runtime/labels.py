"""Labels that the user hands in: a CSV file with the columns source and label."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from qfae_runtime.errors import UsageError
from qfae_runtime.layout import GOOD, UNGOOD

_MEANING = {"good": GOOD, "normal": GOOD, "0": GOOD, "ungood": UNGOOD, "anomalous": UNGOOD, "1": UNGOOD}
_SHOWN_FAULTS = 20


def read_labels(path: Path, shown: Callable[[str], str] = repr) -> dict[str, str]:
    """Read source -> "good" or "Ungood". Accepted in the file: good, normal, 0 and Ungood, anomalous, 1.

    `shown` is what stands in messages for a text of the file, which may name someone.

    Raises:
        UsageError: every faulty line.

    """
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            table = list(csv.reader(file))
    except (OSError, csv.Error) as error:
        raise UsageError(f"--labels {path}: cannot be read ({error})") from None
    header = [name.strip().lower() for name in table[0]] if table else []
    if "source" not in header or "label" not in header:
        got = ", ".join(shown(name) for name in header)
        raise UsageError(f"--labels {path}: expected a first line with the columns source,label, got [{got}]")
    source_at, label_at = header.index("source"), header.index("label")
    labels: dict[str, str] = {}
    faults = []
    for number, cells in enumerate(table[1:], start=2):
        if not cells:
            continue
        if len(cells) <= max(source_at, label_at):
            faults.append(f"line {number}: expected {len(header)} columns, got {len(cells)}")
            continue
        label = _MEANING.get(cells[label_at].strip().lower())
        if label is None:
            accepted = ", ".join(_MEANING)
            faults.append(f"line {number}: label {shown(cells[label_at])}: accepted are {accepted}")
        elif labels.setdefault(cells[source_at], label) != label:
            faults.append(f"line {number}: {shown(cells[source_at])} has two different labels")
    if faults:
        raise UsageError([f"--labels {path}: {fault}" for fault in faults[:_SHOWN_FAULTS]])
    return labels
