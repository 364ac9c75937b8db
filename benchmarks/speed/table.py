"""Rows as tables for a terminal, and what has to be said beside them; README's table comes from here too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.speed.rows import Row, best_gemm
from qfae_runtime.command_line import size_text

HEADINGS = (
    "candidate",
    "precision",
    "batch",
    "p50 ms",
    "p99 ms",
    "images/s",
    "× plain",
    "GFLOP/s",
    "of GEMM",
    "score error / IQR",
    "Spearman",
    "cold start",
    "memory",
    "disk",
)


def cells(row: Row) -> list[str]:
    """Return an engine row's texts, in the order of HEADINGS."""
    error: dict[str, Any] = row["error"] or {}
    return [
        row["title"],
        row["precision"].upper(),
        str(row["batch"]),
        _short(row["latency_ms"]["p50"]),
        _short(row["latency_ms"]["p99"]),
        with_interval(row["images_per_second"]),
        _short((row["times_plain"] or {}).get("mean")),
        _short(row["gflops"] or None),
        f"{row['share_of_gemm']:.0%}" if row["share_of_gemm"] else "–",
        "not finite" if "fault" in error else _small(error.get("score_iqr")),
        f"{error['spearman']:.4f}" if error.get("spearman") is not None else "–",
        f"{row['cold_start_s']:.1f} s",
        size_text(row["host_peak_bytes"]),
        size_text(row["disk_bytes"]),
    ]


def engine_rows_of(rows: Sequence[Row]) -> list[Row]:
    """Return the engine rows, by batch size and then the slowest first."""
    found = [row for row in rows if row["kind"] == "engine"]
    return sorted(found, key=lambda row: (row["batch"], row["images_per_second"]["mean"]))


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the tables of a measurement."""
    first = next(row for row in rows if row["kind"] == "conditions")
    engines = Table(*HEADINGS, box=box.SIMPLE_HEAD, title=title_of(first), title_justify="left")
    for column in engines.columns[2:]:
        column.justify = "right"
    before = None
    for row in engine_rows_of(rows):
        if before is not None and row["batch"] != before:
            engines.add_section()
        before = row["batch"]
        engines.add_row(*cells(row))
    gemm = [row for row in rows if row["kind"] == "gemm"]
    if not gemm:
        return [engines]
    products = Table("library", "precision", "GFLOP/s", box=box.SIMPLE_HEAD, title_justify="left")
    products.title = f"the model's matrix products alone, batch {gemm[0]['batch']}"
    products.columns[2].justify = "right"
    for row in sorted(gemm, key=lambda row: (row["precision"], -row["gflops"])):
        products.add_row(row["title"], row["precision"].upper(), with_interval(row["gflops_interval"]))
    return [engines, products]


def title_of(conditions: Row) -> str:
    """Return the conditions in a line or two."""
    machine = conditions["hardware"]
    where = ", ".join(machine["cards"][:1]) if conditions["device"] != "cpu" else machine["processor"]
    threads = conditions["threads"] or machine["cores"]
    how = f"{threads} threads, " if conditions["device"] == "cpu" else ""
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items() if name != "timm")
    return (
        f"{conditions['model']} ({conditions['gflop_per_image']:.3g} GFLOP an image) on {where}, {how}"
        f"{conditions['rounds']} rounds, {conditions['date'][:10]}\n{versions}"
    )


def notes(rows: Sequence[Row]) -> list[str]:
    """Return the sentences below the tables: files through qfae-run, and what was not measured and why."""
    found = [whole_run(row) for row in rows if row["kind"] == "end_to_end"]
    for precision, row in best_gemm(rows).items():
        found.append(f"fastest {precision.upper()} products: {row['title']}, {row['gflops']:.0f} GFLOP/s")
    for row in rows:
        if row["kind"] == "missing":
            size = f", batch {row['batch']}" if "batch" in row else ""
            found.append(f"not measured: {row['candidate']}{size}: {row['reason']}")
    return found


def whole_run(row: Row) -> str:
    """Say what qfae-run on files reached beside its engine alone."""
    seconds = row["seconds"]
    stages = ("decoding", "preprocessing", "engine", "drawing", "writing")
    split = ", ".join(
        f"{name} {seconds[f'scoring_{name}']:.2f} s" for name in stages if seconds.get(f"scoring_{name}") is not None
    )
    maps = "with" if row["maps"] else "without"
    engine = f"{row['title']} {row['precision'].upper()}, batch {row['batch']}"
    reached = f"{with_interval(row['images_per_second'])} images/s, {row['share_of_engine']['mean']:.0%} of the engine"
    return (
        f"qfae-run, {row['files']} files of 240 x 240 px, {engine}, {maps} heat maps: {reached} alone ({split}; "
        f"whole process {seconds['process']:.1f} s)"
    )


def with_interval(interval: dict[str, float | None]) -> str:
    """Return a mean and half the width of its interval."""
    mean, low = interval["mean"], interval["low"]
    if mean is None:
        return "–"
    return _short(mean) if low is None else f"{_short(mean)} ± {mean - low:.2g}"


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"
