"""Rows as tables for a terminal, and what has to be said beside them; README's table comes from here too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.speed.rows import Row, best_gemm
from qfae_runtime.command_line import size_text
from qfae_runtime.quantities import QUANTITIES

SPEED = (
    *("candidate", "batch", "p50 ms", "p99 ms", "images/s", "× plain", "of GEMM"),
    *("error / IQR", "Spearman", "contract"),
)
COST = ("candidate", "cold start", "loading", "building", "first call", "memory, peak", "GPU memory held", "disk")


_RETIRED = {
    "score_median": "score error, median / IQR",
    "map_share": "map error, p99.9 / p99.9 of maps",
    "map_pixel": "map error, largest pixel",
}
"""Bounds of FP16, BF16 and INT8 until November 2026, of which committed rows speak."""


def speed_cells(row: Row) -> list[str]:
    """Return what an engine row says of speed and scores, in the order of SPEED."""
    error: dict[str, Any] = row["error"] or {}
    return [
        named(row),
        str(row["batch"]),
        _short(row["latency_ms"]["p50"]),
        _short(row["latency_ms"]["p99"]),
        with_interval(row["images_per_second"]),
        _short((row["times_plain"] or {}).get("mean")),
        f"{row['share_of_gemm']:.0%}" if row["share_of_gemm"] else "–",
        "not finite" if "fault" in error else _small(error.get("score_iqr")),
        f"{error['spearman']:.4f}" if error.get("spearman") is not None else "–",
        kept(row),
    ]


def kept(row: Row) -> str:
    """Say whether the scores behind a row keep their contract: "kept" or "broken"."""
    contract = row.get("contract")  # rows of before have none
    return "–" if contract is None else "kept" if contract["kept"] else "broken"


def cost_cells(row: Row) -> list[str]:
    """Return what a candidate costs beside its time, in the order of COST; `row` is that of its largest batch."""
    seconds = [row["cold_start_s"], row["load_s"], row["build_s"], row["first_call_s"]]
    held = row.get("device_bytes", row.get("device_peak_bytes"))  # rows of before had it under the other name
    sizes = [row["host_peak_bytes"], held, row["disk_bytes"]]
    return [
        named(row),
        *(f"{_short(one)} s" if one is not None else "–" for one in seconds),
        *(size_text(one) if one else "–" for one in sizes),
    ]


def named(row: Row) -> str:
    """Return title and precision of a row."""
    return f"{row['title']}, {row['precision'].upper()}"


def engine_rows_of(rows: Sequence[Row]) -> list[Row]:
    """Return the engine rows, by batch size and then the slowest first."""
    found = [row for row in rows if row["kind"] == "engine"]
    return sorted(found, key=lambda row: (row["batch"], row["images_per_second"]["mean"]))


def largest_of(rows: Sequence[Row]) -> list[Row]:
    """Return the engine row of every candidate's largest batch."""
    return list({row["candidate"]: row for row in sorted(engine_rows_of(rows), key=lambda row: row["batch"])}.values())


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the tables of a measurement."""
    first = next(row for row in rows if row["kind"] == "conditions")
    speed = _table(SPEED, title_of(first))
    before = None
    for row in engine_rows_of(rows):
        if before is not None and row["batch"] != before:
            speed.add_section()
        before = row["batch"]
        speed.add_row(*speed_cells(row))
    cost = _table(COST, "what each costs, at its largest batch")
    for row in largest_of(rows):
        cost.add_row(*cost_cells(row))
    gemm = [row for row in rows if row["kind"] == "gemm"]
    if not gemm:
        return [speed, cost]
    products = _table(("library", "GFLOP/s"), f"the model's matrix products alone, batch {gemm[0]['batch']}")
    for row in sorted(gemm, key=lambda row: (row["precision"], -row["gflops"])):
        products.add_row(named(row), with_interval(row["gflops_interval"]))
    return [speed, cost, products]


def _table(headings: Sequence[str], title: str) -> Table:
    table = Table(*headings, box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    return table


def _bound(contract: str, name: str) -> str:
    """Return the words for a bound; rows outlive the bounds they speak of."""
    if contract != "fp32" and name in _RETIRED:
        return _RETIRED[name]
    return QUANTITIES[name].title


def title_of(conditions: Row) -> str:
    """Return the conditions in a line or two."""
    machine = conditions["hardware"]
    # Rows of before have the driver's whole line.
    cards = [" ".join(card.removeprefix("Model:").split()) for card in machine["cards"][:1]]
    where = ", ".join(cards) if conditions["device"] != "cpu" else machine["processor"]
    threads = conditions["threads"] or machine["cores"]
    how = f"{threads} thread{'s' if threads != 1 else ''}, " if conditions["device"] == "cpu" else ""
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items() if name != "timm")
    # Rows of before have no commit, and of an installed package there is none.
    commit = _short_commit(conditions.get("commit"))
    cut = "" if conditions.get("complete", True) else ", incomplete: it was ended early"
    rounds, done = conditions["rounds"], conditions.get("rounds_done")
    of_rounds = f"{rounds} rounds" if done in (None, rounds) else f"{done} of {rounds} rounds"
    return (
        f"{conditions['model']} ({conditions['gflop_per_image']:.3g} GFLOP an image) on {where}, {how}"
        f"{of_rounds}, {conditions['date'][:10]}{commit}{cut}\n{versions}"
    )


def _short_commit(commit: str | None) -> str:
    if commit is None:
        return ""
    whole = commit.removesuffix("+")
    return f", commit {whole[:9]}{' with changes' if whole != commit else ''}"


def notes(rows: Sequence[Row]) -> list[str]:
    """Return the sentences below the tables: files through qfae-run, broken contracts, what was not measured."""
    found = [whole_run(row) for row in rows if row["kind"] == "end_to_end"]
    found += [_rates_of(rows, precision) for precision in best_gemm(rows)]
    for row in largest_of(rows):
        if kept(row) == "broken":
            titles = "; ".join(_bound(row["contract"]["name"], name) for name in row["contract"]["broken"])
            found.append(f"contract {row['contract']['name']} broken by {named(row)}: {titles}")
    found += [_int8(row["int8"]) for row in rows if row["kind"] == "conditions" and row.get("int8")]
    if any((row.get("contract") or {}).get("not_bounded") for row in rows):
        found.append("contract int8: the change of AUROC is not bounded, for these images have too few known labels")
    missing: dict[str, list[str]] = {}
    for row in rows:
        if row["kind"] == "missing":
            size = f" at batch {row['batch']}" if "batch" in row else ""
            missing.setdefault(row["reason"], []).append(f"{row['candidate']}{size}")
    return found + [f"not measured: {', '.join(names)}: {reason}" for reason, names in missing.items()]


def _int8(policy: Row) -> str:
    """Say what an INT8 file computes in eight bits, and which images it knows."""
    others = f"{', '.join(policy['kept_fp32'])} in FP32 beside what always is, " if policy["kept_fp32"] else ""
    text = f"INT8: {others}{policy['share_of_flop']:.0%} of the arithmetic in eight bits"
    images = policy.get("calibrated_on")
    if images is None:
        return text
    known = f"{images['measured_on_too']} of which errors are measured on too"
    return f"{text}; scales of {images['images']} images ({images['from']}), {known}"


def _rates_of(rows: Sequence[Row], precision: str) -> str:
    """Say how fast every library computes the model's own matrix products in a precision, the fastest first."""
    mine = [row for row in rows if row["kind"] == "gemm" and row["precision"] == precision]
    rates = ", ".join(f"{row['title']} {row['gflops']:.0f}" for row in sorted(mine, key=lambda row: -row["gflops"]))
    return f"GFLOP/s of the {precision.upper()} products alone: {rates}"


def whole_run(row: Row) -> str:
    """Say what qfae-run on files reached beside its engine alone."""
    seconds = row["seconds"]
    stages = ("decoding", "preprocessing", "engine", "drawing", "writing")
    split = ", ".join(
        f"{name} {seconds[f'scoring_{name}']:.2f} s" for name in stages if seconds.get(f"scoring_{name}") is not None
    )
    if row.get("transfer_s") is not None:
        split += f"; of the engine about {row['transfer_s']:.2f} s to the GPU and back"
    maps = "with" if row["maps"] else "without"
    engine = f"{row['title']} {row['precision'].upper()}, batch {row['batch']}"
    reached = f"{with_interval(row['images_per_second'])} images/s, {row['share_of_engine']['mean']:.0%} of the engine"
    return (
        f"qfae-run, {row['files']} files of 240 x 240 px, {engine}, {maps} heat maps: {reached} alone{_quality(row)} "
        f"({split}; whole process {seconds['process']:.1f} s)"
    )


def _quality(row: Row) -> str:
    """Say how far the scores of the engine behind a run on files are from PyTorch's."""
    if "contract" not in row:  # rows of before
        return ""
    far = row["error"].get("score_iqr")
    error = f"score error {_small(far)} of the IQR" if far is not None else "scores that cannot be compared"
    return f", {error}, contract {kept(row)}"


def with_interval(interval: dict[str, float | None]) -> str:
    """Return a mean and half the width of its interval."""
    mean, low = interval["mean"], interval["low"]
    if mean is None:
        return "–"
    if low is None:
        return _short(mean)
    half = mean - low
    return f"{_short(mean)} ± {f'{half:.2g}' if half < 100 else f'{half:.0f}'}"


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"
