"""Tables on a terminal that is narrower than they are."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_wide(console: Console, table: Table) -> None:
    """Print a table in all its width; a narrower terminal wraps its lines.

    An engine on a GPU has a column for each of its batch sizes. Made to fit, its numbers would be cut to "7.1e-…".
    """
    unbounded = console.options.update(max_width=10_000)
    console.width = max(console.width, Measurement.get(console, unbounded, table).maximum)
    console.print(table)
