"""Measure the shipped demo model on test images of several data seeds, and write what it reached.

python -m demo.spread            writes demo/results.json
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

import click

from demo.run import run

DATA_SEEDS = (0, 1, 2)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo/results.json"), show_default=True)
def main(out: Path) -> None:
    """Run the demonstration on three data seeds."""
    rows = []
    for seed in DATA_SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"data_seed": seed, **run(seed, Path(folder))})
    keys = ("image_auroc", "pixel_auroc", "baseline_image_auroc")
    summary = {
        key: {"mean": statistics.mean(r[key] for r in rows), "std": statistics.stdev(r[key] for r in rows)}
        for key in keys
    }
    out.write_text(json.dumps({"runs": rows, "summary": summary}, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        click.echo(f"data seed {row['data_seed']}: " + "  ".join(f"{key} {row[key]:.3f}" for key in keys))
    for key in keys:
        click.echo(f"{key}: {summary[key]['mean']:.3f} +- {summary[key]['std']:.3f}")


if __name__ == "__main__":
    main()
