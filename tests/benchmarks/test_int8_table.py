"""What INT8 costs, as docs/int8.md's table says it: of engines that were kept, and of those that were refused."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import int8
from qfae_export.export import Options, ParityError
from qfae_runtime.quantities import QUANTITIES


def report(value: float, kept: bool) -> Any:
    values = dict.fromkeys(QUANTITIES, value)

    class Report(SimpleNamespace):
        def __bool__(self) -> bool:
            return kept

    return Report(worst=SimpleNamespace(values=values))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """Stand in for exporting; it refuses what is calibrated on validation slices with the decoder in INT8."""
    found: list[Options] = []

    def export(options: Options, say: Any) -> Any:
        found.append(options)
        if options.int8_keep == () and options.calibration_images is not None:
            raise ParityError("refused", report(2.5, kept=False))
        manifest = SimpleNamespace(name="demo")
        others = {("demo.int8.onnx", "openvino"): report(0.25, kept=True)}
        return SimpleNamespace(manifest=manifest, reports={"demo.int8.onnx": report(0.125, kept=True)}, others=others)

    monkeypatch.setattr(int8, "export", export)
    return found


def test_every_way_and_calibration_is_a_row(asked: list[Options], tmp_path: Path) -> None:
    found = int8.rows(tmp_path / "demo.pt", tmp_path / "data")
    assert [(one.int8_keep, one.calibration_images) for one in asked] == [
        (None, None),
        (None, tmp_path / "data/valid/good"),
        ((), None),
        ((), tmp_path / "data/valid/good"),
    ]
    assert {(one.int8, one.parity_images, one.parity_count) for one in asked} == {(True, tmp_path / "data/test", 200)}
    assert [row[:4] for row in found[:2]] == [
        ["as it is", "qfae's slices", "onnxruntime", "0.125"],
        ["as it is", "qfae's slices", "openvino", "0.25"],
    ]
    assert [row[-1] for row in found] == ["kept"] * 6 + ["broken: refused"], "a refused one has no second backend"
    assert found[-1][:4] == ["`--int8-keep none`", "validation slices", "onnxruntime", "2.5"]


def test_the_table_takes_the_place_of_the_one_before(
    asked: list[Options], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = "Above.\n\n<!-- int8-results -->\n", "<!-- /int8-results -->\n\nBelow.\n"
    document = tmp_path / "int8.md"
    document.write_text(f"{before}| old |\n{after}", encoding="utf-8")
    monkeypatch.setattr(int8, "DOCUMENT", document)
    int8.main(["--ckpt", "demo.pt", "--data", str(tmp_path)], standalone_mode=False)
    text = document.read_text(encoding="utf-8")
    assert text.startswith(before)
    assert text.endswith(after)
    lines = text.removeprefix(before).removesuffix(after).splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("| policy | calibrated on | backend | score error as distance, mean |")
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "| old |" not in text


def test_the_document_holds_the_contract_and_a_table_of_these_columns() -> None:
    """Every bound of the contract stands in docs/int8.md, and the table there has the columns that are measured."""
    from qfae_runtime.contract import AUROC_CHANGE, CONTRACTS, FLIPS_SHARE

    text = int8.DOCUMENT.read_text(encoding="utf-8")
    table = text.partition("## The contract")[2].partition("## ")[0]
    numbers = re.findall(r"\d+(?:\.\d+)?", table)
    for bound in (*CONTRACTS["int8"].bounds.values(), AUROC_CHANGE["int8"], FLIPS_SHARE["int8"]):
        assert f"{bound:g}" in numbers, bound
    assert {*CONTRACTS["int8"].bounds, "auroc_change", "flips"} == set(int8.SHOWN)
    heads = int8.table([]).splitlines()[0]
    assert heads in text
