"""Measure the shipped demo model on test images of several data seeds and in every format, and write what it reached.

python -m demo.spread            writes demo/results.json, and the README's paragraph and table about it
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.documents import between
from demo import formats
from demo.run import CHECKPOINT, exit_code, run, step

DATA_SEEDS = (0, 1, 2)
RESULTS = Path("demo/results.json")
README = Path("README.md")
MARKS = ("<!-- demo-results -->", "<!-- /demo-results -->")
ENGINE_MARKS = ("<!-- demo-engines -->", "<!-- /demo-engines -->")


def measure() -> dict[str, Any]:
    """Run the demonstration on every data seed, and every format on the first one's slices.

    Return the rows, their means and standard deviations, and under "engines" what formats.measure gives.
    """
    rows = []
    for seed in DATA_SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"data_seed": seed, **run(seed, Path(folder))})
            if seed == DATA_SEEDS[0]:
                engines = of_formats(Path(folder))
    keys = [key for key in rows[0] if key != "data_seed"]
    summary = {
        key: {"mean": statistics.mean(row[key] for row in rows), "std": statistics.stdev(row[key] for row in rows)}
        for key in keys
    }
    return {"runs": rows, "summary": summary, "engines": engines.to_dict()}


def of_formats(build: Path) -> formats.Measured:
    """Export the model in every format, and measure each on the test slices in `build`.

    An FP16 engine that is refused is left out, which the table says.
    """
    folder = build / "formats"
    wanted = ("qfae-export", "--ckpt", str(CHECKPOINT), "--int8", "--out", str(folder))
    if exit_code(*wanted, "--fp16"):
        step(*wanted)
    return formats.measure(folder, CHECKPOINT, build / "data", lambda said: click.echo(said, err=True))


def paragraph(results: dict[str, Any]) -> str:
    """Return the README's sentences about the results."""
    first, summary = results["runs"][0], results["summary"]
    image, pixel = (f"{summary[key]['mean']:.3f} ± {summary[key]['std']:.3f}" for key in ("image_auroc", "pixel_auroc"))
    return (
        f"It reaches an image AUROC of **{first['image_auroc']:.3f}** and a pixel AUROC of "
        f"**{first['pixel_auroc']:.3f}**; the blurred\nmaximum intensity, a detector without learning, reaches "
        f"{first['baseline_image_auroc']:.3f}. Over test slices of {len(results['runs'])} seeds: image\n"
        f"{image}, pixel {pixel} (mean ± standard deviation of one trained model)."
    )


def with_results(readme: str, results: dict[str, Any]) -> str:
    """Return the README with its paragraph about the results and its table of formats replaced."""
    table = formats.table(formats.Measured.from_dict(results["engines"]))
    return between(between(readme, MARKS, paragraph(results)), ENGINE_MARKS, table)


@click.command()
def main() -> None:
    """Run the demonstration on three data seeds."""
    results = measure()
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    README.write_text(with_results(README.read_text(encoding="utf-8"), results), encoding="utf-8")
    for row in results["runs"]:
        click.echo("  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    for key, value in results["summary"].items():
        click.echo(f"{key}: {value['mean']:.3f} +- {value['std']:.3f}")


if __name__ == "__main__":
    main()
