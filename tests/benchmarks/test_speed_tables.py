"""What rows say to people: tables, the sentences below them, README's part and the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed.page import write_page
from benchmarks.speed.readme import block
from benchmarks.speed.table import COST, SPEED, cost_cells, notes, speed_cells, title_of, with_interval

from .conftest import of_kind


def test_what_int8_is_and_cannot_tell_stands_below_the_table(rows: list[dict[str, Any]]) -> None:
    found = notes(rows)
    [policy] = [note for note in found if note.startswith("INT8: ")]
    assert re.fullmatch(
        r"INT8: decoder in FP32 beside what always is, \d+% of the arithmetic in eight bits; scales of \d\d images "
        r"\(32 brain slices that come with qfae\), 0 of which errors are measured on too",
        policy,
    )
    assert (
        found.count("contract int8: the change of AUROC is not bounded, for these images have too few known labels")
        == 1
    )


def test_a_row_alone_says_what_ran_where(rows: list[dict[str, Any]]) -> None:
    [first] = of_kind(rows, "conditions")
    for row in of_kind(rows, "engine"):
        assert (row["model"], row["device"], row["threads"]) == ("tiny.pt", "cpu", 1)
        assert row["hardware"] == first["hardware"]["processor"]


def test_tables_and_page_name_the_commit(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    [row] = of_kind(rows, "conditions")
    for known, shown in (("0123456789abcdef", "commit 012345678"), ("0123456789+", "commit 012345678 with changes")):
        row["commit"] = known
        assert title_of(row).split("\n")[0].endswith(f", {row['date'][:10]}, {shown}")
        write_page(rows, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert shown in page
        assert f"commit {known};" in page
    row["commit"] = None
    without = title_of(row)
    del row["commit"]  # rows of before
    assert title_of(row) == without
    assert "commit" not in without
    write_page(rows, tmp_path / "page.html")


def test_a_broken_contract_is_shown_beside_the_speed(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for row in rows:
        if row.get("candidate") == "openvino":
            row["contract"] = {"name": "fp32", "kept": False, "broken": ["score_iqr", "spearman"]}
        elif row.get("candidate") == "openvino-int8":
            del row["contract"]  # rows of before
        elif row["kind"] == "engine":
            row["contract"] = {"name": "fp32", "kept": True, "broken": []}
    found = {row["candidate"]: speed_cells(row)[SPEED.index("contract")] for row in of_kind(rows, "engine")}
    kept = dict.fromkeys(("torch-plain", "torch", "onnxruntime"), "kept")
    assert found == {**kept, "openvino": "broken", "openvino-int8": "–"}
    sentence = "contract fp32 broken by OpenVINO, FP32: score error, p99.9 / IQR; score ranks, Spearman"
    assert notes(rows).count(sentence) == 1, "once, not for every batch size"
    readme = block([("x.jsonl", rows)])
    assert f"\n- {sentence}" in readme
    assert re.search(r"\| OpenVINO, FP32 \| 4 \|.*\| broken \|", readme)
    write_page(rows, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('fill="#fff"') == 1
    assert page.count("contract broken</title>") == 1


def test_of_a_processor_no_device_memory_is_told(rows: list[dict[str, Any]]) -> None:
    assert all(row["device_bytes"] is None for row in of_kind(rows, "engine"))
    at = COST.index("GPU memory held")
    row = of_kind(rows, "engine")[0]
    assert cost_cells(row)[at] == "–"
    assert cost_cells({**row, "device_bytes": 3 * 2**30})[at] == "3.2 GB"
    del row["device_bytes"]
    assert cost_cells({**row, "device_peak_bytes": 3 * 2**30})[at] == "3.2 GB", "rows of before"


def test_an_interval_is_written_without_powers_of_ten() -> None:
    assert with_interval({"mean": 416.0, "low": 283.0}) == "416 ± 133"
    assert with_interval({"mean": 0.3141, "low": 0.3021}) == "0.314 ± 0.012"
    assert with_interval({"mean": 12.0, "low": None}) == "12"
    assert with_interval({"mean": None, "low": None}) == "–"


@pytest.mark.parametrize(
    ("title", "width"), [("short", 880), ("a candidate whose title is long, with a CUDA graph", 1000)]
)
def test_the_longest_label_is_whole(rows: list[dict[str, Any]], tmp_path: Path, title: str, width: int) -> None:
    """7 pixels a letter right of the plot, at 690."""
    for row in rows:
        if row.get("candidate") == "torch":
            row["title"] = title
    write_page(rows, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    [*widths] = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ', page))
    assert len(widths) == 2
    assert min(widths) >= width
