"""README's table of speed: of which batch size, and who is missing from it."""

from __future__ import annotations

import pytest

from benchmarks.speed.candidates import KNOWN
from benchmarks.speed.readme import block
from benchmarks.speed.rows import Row, missing_row
from qfae_runtime.errors import QfaeError


def shown(rows: list[Row]) -> list[list[str]]:
    """Return name and batch size of every line of the table."""
    cells = [line.strip("| ").split(" | ") for line in block([("x.jsonl", rows)]).splitlines() if line.startswith("|")]
    return [line[:2] for line in cells[2:]]


def without(rows: list[Row], *left_out: tuple[str, int]) -> list[Row]:
    return [row for row in rows if row["kind"] != "engine" or (row["candidate"], row["batch"]) not in left_out]


def test_the_largest_of_the_sizes_that_most_were_measured_at(rows: list[Row]) -> None:
    everybody = {row["candidate"] for row in rows if row["kind"] == "engine"}
    assert [batch for _, batch in shown(rows)] == ["4"] * len(everybody)
    assert [batch for _, batch in shown(without(rows, ("torch", 4)))] == ["1"] * len(everybody)
    # No size is common to all: the one that lacks at larger batches is left out of the table.
    apart = without(rows, ("torch", 4), ("openvino", 1))
    assert {batch for _, batch in shown(apart)} == {"4"}
    assert len(shown(apart)) == len(everybody) - 1


def test_what_was_not_measured_is_told_below_the_table(rows: list[Row]) -> None:
    failed = missing_row(KNOWN["aotinductor"], "WorkerError: its process ended with code -9")
    left_out = {**missing_row(KNOWN["torch"], "a batch would take about 40 s"), "batch": 4}
    lines = block([("x.jsonl", [*without(rows, ("torch", 4)), failed, left_out])]).splitlines()
    assert "- not measured: aotinductor: WorkerError: its process ended with code -9" in lines
    assert "- not measured: torch at batch 4: a batch would take about 40 s" in lines


def test_rows_without_an_engine_are_refused_in_a_sentence(rows: list[Row]) -> None:
    with pytest.raises(QfaeError) as caught:
        block([("x.jsonl", [row for row in rows if row["kind"] != "engine"])])
    assert str(caught.value) == (
        "x.jsonl: no engine was measured; expected rows of kind 'engine': measure again, or remove it"
    )
