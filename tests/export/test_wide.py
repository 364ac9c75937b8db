"""Tables are printed whole, whatever the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from qfae_export.wide import print_wide


@pytest.mark.parametrize("width", [20, 80, 300])
@pytest.mark.parametrize("columns", [1, 7, 24])
def test_no_number_of_a_table_is_cut(width: int, columns: int) -> None:
    table = Table("measured", *(f"batch {number}" for number in range(columns)), "bound")
    numbers = [f"{number + 1}.5e-06" for number in range(columns)]
    table.add_row("score error, largest", *numbers, "≤ 0.0001")
    text = io.StringIO()
    print_wide(Console(file=text, width=width, highlight=False), table)
    [row] = [line for line in text.getvalue().splitlines() if "score error" in line]
    assert [word.strip() for word in row.strip("│ ").split("│")] == ["score error, largest", *numbers, "≤ 0.0001"]
    assert "…" not in text.getvalue()
