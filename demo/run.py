"""The demonstration, from images to a report: what `make demo` runs.

Each step is a command that can be typed by hand; it is printed before it runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click

from demo.baseline import baseline_auroc

CHECKPOINT = Path("demo/weights/demo.pt")
BUILD = Path("build/demo")


def step(*command: str) -> None:
    """Print and run one command; stop the demonstration with its exit code if it fails."""
    if code := exit_code(*command):
        sys.exit(code)


def exit_code(*command: str) -> int:
    """Print and run one command, and return its exit code."""
    click.secho("$ " + " ".join(command), bold=True, err=True)
    # The scripts beside this interpreter, so that the virtual environment need not be activated.
    program = Path(sys.executable).parent / command[0]
    return subprocess.run([str(program), *command[1:]], check=False).returncode


def run(data_seed: int, build: Path) -> dict[str, float]:
    """Build the images, export, score; return the areas under the ROC curve, ours and the baseline's."""
    data, engine, results = build / "data", build / "engine", build / "results"
    splits = ("--splits", "test", "--data-seed", str(data_seed))
    step("python", "-m", "demo.dataset", "--out", str(data), *splits)
    step("qfae-export", "--ckpt", str(CHECKPOINT), "--out", str(engine), "--overwrite")
    test = str(data / "test")
    step("qfae-run", test, "--engine", str(engine / "demo.onnx"), "--out", str(results), "--overwrite")
    metrics = json.loads((results / "metrics.json").read_text(encoding="utf-8"))
    return {
        "image_auroc": metrics["image_auroc"],
        "pixel_auroc": metrics["pixel_auroc"],
        "baseline_image_auroc": baseline_auroc(data / "test"),
    }


@click.command()
@click.option("--data-seed", default=0, show_default=True, help="Another number gives other test images.")
@click.option("--build", type=click.Path(path_type=Path), default=BUILD, show_default=True, help="Folder to work in.")
def main(data_seed: int, build: Path) -> None:
    """Find lesions in brain slices with a certified engine."""
    began = time.monotonic()
    found = run(data_seed, build)
    click.echo()
    baseline = f"blurred maximum intensity: {found['baseline_image_auroc']:.3f}"
    click.echo(f"image AUROC      {found['image_auroc']:.3f}   ({baseline})")
    click.echo(f"pixel AUROC      {found['pixel_auroc']:.3f}")
    click.echo(f"time             {time.monotonic() - began:.0f} s")
    click.echo(f"report           {(build / 'results' / 'report.html').resolve()}")


if __name__ == "__main__":
    main()
