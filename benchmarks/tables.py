"""Our measurements beside the published tables, for the terminal and as JSON."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.published import DATA_SETS, OURS, TABLE_3, TABLE_7, Value, shown
from qfae_runtime.metrics import Metrics
from qfae_train.config import Config

NOT_MEASURED = "-"
_FILE_WIDTH = 140
"""Columns where there is no terminal: no row is wrapped."""


@dataclass(frozen=True)
class Step:
    """One configuration to measure, and its name: "preset", or one of LiverCT's earlier steps."""

    name: str
    config: Config


LIVER_STEPS = dict(zip(("main", "preprocessing", "preset"), TABLE_3, strict=True))
"""Names of the steps -> rows of Table 3."""


@dataclass(frozen=True)
class Measured:
    """Results of one step on one data set, one a model, in the same order."""

    data_set: str
    step: str
    torch: list[Metrics]
    engine: list[Metrics]

    def image_auroc(self, where: str) -> Value:
        """Return mean and sample standard deviation in percent over the models; None where nothing was measured."""
        aurocs = [one.image_auroc for one in getattr(self, where)]
        known = [100 * one for one in aurocs if one is not None]
        if not known or len(known) < len(aurocs):
            return None
        return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None

    def score_error(self) -> float | None:
        """Return the largest difference between a score of the engine's and PyTorch's."""
        pairs = list(zip(self.torch, self.engine, strict=True))
        return max(float(np.abs(a.scores - b.scores).max()) for a, b in pairs) if pairs else None


def table_7(results: list[Measured]) -> Table:
    """Return Table 7: every published row, and ours in PyTorch and through the engine."""
    table = Table(box=box.SIMPLE_HEAD, title="Table 7: image AUROC, percent", title_justify="left")
    table.add_column("method")
    for name in DATA_SETS:
        table.add_column(name, justify="right")
    for method, values in TABLE_7.items():
        table.add_row(f"{method} (published)" if method == OURS else method, *(shown(value) for value in values))
    final = {one.data_set: one for one in results if one.step == "preset"}
    for where, title in (("torch", f"{OURS}, here, PyTorch"), ("engine", f"{OURS}, here, engine")):
        cells = [final[name].image_auroc(where) if name in final else None for name in DATA_SETS]
        table.add_row(title, *(NOT_MEASURED if cell is None else shown(cell) for cell in cells), style="bold")
    return table


def table_3(results: list[Measured]) -> Table:
    """Return Table 3: LiverCT's steps as published, and ours beside them."""
    table = Table(box=box.SIMPLE_HEAD, title="Table 3: LiverCT, image AUROC, percent", title_justify="left")
    for column in ("version", "published", "here, PyTorch", "here, engine"):
        table.add_column(column, justify="left" if column == "version" else "right")
    own = {one.step: one for one in results if one.data_set == "LiverCT"}
    for step, version in LIVER_STEPS.items():
        cells = [own[step].image_auroc(where) if step in own else None for where in ("torch", "engine")]
        ours = [NOT_MEASURED if cell is None else shown(cell) for cell in cells]
        table.add_row(version.replace("[", r"\["), shown(TABLE_3[version]), *ours)
    return table


def print_tables(results: list[Measured]) -> None:
    """Print both tables, and how far the engines' scores lie from PyTorch's."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(table_3(results))
    console.print(table_7(results))
    for one in results:
        error = one.score_error()
        what = f"{one.data_set}, {one.step}"
        if error is None:
            console.print(f"{what}: not measured, no checkpoint was trained with this preprocessing", soft_wrap=True)
        else:
            console.print(
                f"{what}: {len(one.torch)} models, engine and PyTorch differ by {error:.2g} in a score at most"
            )


def to_json(results: list[Measured]) -> list[dict[str, Any]]:
    """Return everything measured as plain JSON values."""
    return [
        {
            "data_set": one.data_set,
            "step": one.step,
            "image_auroc_percent": {where: one.image_auroc(where) for where in ("torch", "engine")},
            "largest_score_error": one.score_error(),
            "torch": [metrics.to_dict() for metrics in one.torch],
            "engine": [metrics.to_dict() for metrics in one.engine],
        }
        for one in results
    ]
