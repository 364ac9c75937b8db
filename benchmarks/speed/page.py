"""A page of one file: the two plots people ask for, the table, the conditions. Opens without a network.

Plots are laid out here as plain numbers; page.html draws them as SVG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.speed.rows import Row
from benchmarks.speed.table import (
    COST,
    SPEED,
    cost_cells,
    engine_rows_of,
    kept,
    largest_of,
    named,
    notes,
    speed_cells,
    title_of,
    with_interval,
)
from qfae_runtime.writers.histogram import log_ticks
from qfae_runtime.writers.whole import whole_file

WIDTH, HEIGHT = 880.0, 420.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 690.0, 16.0, 370.0
_COLOURS = (
    "#4269d0",
    "#e8743b",
    "#3ca951",
    "#a463f2",
    "#9c6b4e",
    "#ff725c",
    "#6cc5b0",
    "#97bbf5",
    "#d4a72c",
    "#666a73",
)
_LEAST_ERROR = 1e-8  # of a share of the interquartile range; less is drawn there


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from `low` to `high` between two places of the picture, with ticks."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> Axis:
        """Return an axis that holds all values, with some room."""
        low, high = min(values), max(values)
        return cls(low / 1.25, high * 1.25, start, end)

    def at(self, value: float) -> float:
        """Return the place of a value."""
        share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[dict[str, Any]]:
        """Return ticks at round numbers: where, and the text."""
        return [{"at": self.at(one), "text": f"{one:g}"} for one in log_ticks(self.low, self.high, most_decades=4)]


def write_page(rows: Sequence[Row], path: Path) -> None:
    """Write the page of a measurement, whole or not at all."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    first = next(row for row in rows if row["kind"] == "conditions")
    engines = engine_rows_of(rows)
    names = list(dict.fromkeys(map(named, engines)))
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}
    text = environment.get_template("page.html").render(
        conditions=first,
        title=title_of(first),
        speed_headings=SPEED,
        speed=[(row["batch"], speed_cells(row)) for row in engines],
        cost_headings=COST,
        cost=[cost_cells(row) for row in largest_of(rows)],
        latency=latency_plot(engines, colours) if engines else None,
        errors=error_plot(engines, colours),
        gemm=[row for row in rows if row["kind"] == "gemm"],
        notes=notes(rows),
        named=named,
        with_interval=with_interval,
        box={"width": _width(names), "height": HEIGHT, "left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM},
    )
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def _width(labels: Sequence[str]) -> float:
    """Return how wide pictures are, so that the longest label beside the plot is whole; 7.2 is a wide letter's."""
    return max(WIDTH, _RIGHT + 24 + 7.2 * max(map(len, labels), default=0))


def latency_plot(engines: Sequence[Row], colours: dict[str, str]) -> dict[str, Any]:
    """Lay out the median seconds of a batch against its size, a line for each candidate, both axes logarithmic.

    `colours` are by what `named` says of a row.
    """
    x = Axis.over([row["batch"] for row in engines], _LEFT, _RIGHT)
    y = Axis.over([row["latency_ms"]["p50"] for row in engines], _BOTTOM, _TOP)
    lines = []
    for name, colour in colours.items():
        points = [
            {
                "x": x.at(row["batch"]),
                "y": y.at(row["latency_ms"]["p50"]),
                "title": f"{name}, batch {row['batch']}: {row['latency_ms']['p50']:.3g} ms",
            }
            for row in engines
            if named(row) == name
        ]
        lines.append({"label": name, "colour": colour, "points": points, "y": points[-1]["y"]})
    batches = sorted({row["batch"] for row in engines})
    return {
        "lines": _apart(lines),
        "x": [{"at": x.at(size), "text": str(size)} for size in batches],
        "y": y.ticks(),
    }


def error_plot(engines: Sequence[Row], colours: dict[str, str]) -> dict[str, Any] | None:
    """Lay out the best images per second of each candidate against its score error; None where no error is known."""
    best: dict[str, Row] = {}
    for row in engines:
        name = named(row)
        known = (row["error"] or {}).get("score_iqr") is not None
        if known and row["images_per_second"]["mean"] > _rate(best.get(name)):
            best[name] = row
    if not best:
        return None
    x = Axis.over([*map(_error, best.values()), 1e-6, 1e-1], _LEFT, _RIGHT)
    y = Axis.over([_rate(row) for row in best.values()], _BOTTOM, _TOP)
    points = [
        {
            "label": name,
            "colour": colours[name],
            "x": x.at(_error(row)),
            "y": y.at(_rate(row)),
            "broken": kept(row) == "broken",
            "title": f"{name}, batch {row['batch']}: {_rate(row):.3g} images/s, error {_error(row):.1e}"
            f"{', contract broken' if kept(row) == 'broken' else ''}",
        }
        for name, row in best.items()
    ]
    return {"points": _apart(points), "x": x.ticks(), "y": y.ticks(), "bounds": [x.at(0.01)]}


def _rate(row: Row | None) -> float:
    return float(row["images_per_second"]["mean"]) if row is not None else 0.0


def _error(row: Row) -> float:
    return max(_LEAST_ERROR, float(row["error"]["score_iqr"]))


def _apart(marks: list[dict[str, Any]], least: float = 15.0) -> list[dict[str, Any]]:
    """Give every mark a place for its label beside the plot, in the order of their heights, none over another."""
    ordered = sorted(marks, key=lambda one: one["y"])
    at = _TOP
    for mark in ordered:
        at = max(at, mark["y"])
        mark["label_y"] = at
        at += least
    over = ordered[-1]["label_y"] - _BOTTOM if ordered else 0
    for mark in ordered:
        mark["label_y"] = round(mark["label_y"] - max(0.0, over), 1)
    return marks
