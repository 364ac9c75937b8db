"""report.html: the run on one page, in one file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import heapq
import io
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

from qfae_runtime.calibration import Calibration
from qfae_runtime.engines import OpenedEngine
from qfae_runtime.layout import GOOD, UNGOOD
from qfae_runtime.metrics import TITLES
from qfae_runtime.quantities import QUANTITIES
from qfae_runtime.writers import histogram
from qfae_runtime.writers.colours import colour_table
from qfae_runtime.writers.folder import ResultsFolder
from qfae_runtime.writers.heatmap import ColourScale, read_panels
from qfae_runtime.writers.records import OK, Row, read_rows

GALLERY_LIMIT = 200
ERROR_LIMIT = 200
_JPEG_QUALITY = 88
_MAX_STRIP_WIDTH = 690
_UNKNOWN = "no label"


@dataclass
class _Gathered:
    """What one pass over the rows yields: all scores by label, the highest-scored rows, the first errors."""

    scores: dict[str, list[float]] = field(default_factory=dict)
    top: list[tuple[float, int, Row]] = field(default_factory=list)
    errors: list[Row] = field(default_factory=list)
    error_count: int = 0


def write_report(
    folder: ResultsFolder,
    record: dict[str, Any],
    metrics: dict[str, Any] | None,
    opened: OpenedEngine,
    calibration: Calibration | None,
    scale: ColourScale,
) -> None:
    """Write report.html from scores.jsonl and the heat maps on disk, so that a resumed run shows all of it.

    The GALLERY_LIMIT highest-scored pictures are embedded; the page says so when there are more.
    """
    gathered = _gather(folder.jsonl)
    cards = [
        {"row": row, "rank": rank, "strip": _strip(folder, row.heatmap)}
        for rank, (_, _, row) in enumerate(gathered.top, start=1)
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qfae_runtime", "writers"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = "{:.4g}".format
    environment.filters["score"] = _score
    environment.filters["area"] = _area
    page = environment.get_template("report.html").render(
        record=record,
        metrics=metrics,
        areas=TITLES.items(),
        manifest=opened.manifest,
        certificate=opened.certificate,
        quantities=QUANTITIES,
        calibration=calibration,
        scale=scale,
        scale_gradient=_gradient(),
        scale_marks=[scale.low, (scale.low + scale.high) / 2, scale.high],
        cards=cards,
        has_strips=any(card["strip"] for card in cards),
        labels=[label for label in (UNGOOD, GOOD, _UNKNOWN) if label in gathered.scores],
        scored=sum(len(values) for values in gathered.scores.values()),
        errors=gathered.errors,
        error_count=gathered.error_count,
        histogram=histogram.layout(gathered.scores, calibration.threshold if calibration is not None else None),
    )
    folder.write_text(folder.report, page)


def _gather(path: Path) -> _Gathered:
    gathered = _Gathered()
    for number, row in enumerate(read_rows(path)):
        if row.status != OK or row.score is None:
            gathered.error_count += 1
            if len(gathered.errors) < ERROR_LIMIT:
                gathered.errors.append(row)
            continue
        gathered.scores.setdefault(row.label or _UNKNOWN, []).append(row.score)
        entry = (row.score, -number, row)  # equal scores keep the order of the rows
        if len(gathered.top) < GALLERY_LIMIT:
            heapq.heappush(gathered.top, entry)
        elif entry[:2] > gathered.top[0][:2]:
            heapq.heapreplace(gathered.top, entry)
    gathered.top.sort(key=lambda entry: entry[:2], reverse=True)
    return gathered


def _strip(folder: ResultsFolder, heatmap: str | None) -> str | None:
    """Return the three panels of a row's heat map as a data URI; None if there is no heat map."""
    if heatmap is None or ".." in PurePosixPath(heatmap).parts:  # a file of rows can be edited
        return None
    strip = read_panels(folder.root / heatmap)
    if strip is None:
        return None
    if strip.width > _MAX_STRIP_WIDTH:
        height = round(strip.height * _MAX_STRIP_WIDTH / strip.width)
        strip = strip.resize((_MAX_STRIP_WIDTH, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    strip.save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _gradient() -> str:
    stops: npt.NDArray[np.uint8] = colour_table()[:: 255 // 15]
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b in stops.tolist())


def _score(value: float) -> str:
    return f"{value:#.4g}".rstrip(".")  # "#" keeps the zeros: 0.6400, so that a column of scores lines up


def _area(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
