"""What INT8 costs the demonstration's model, as a table in docs/int8.md: exported anew, measured on its test slices.

python -m demo.dataset --out build/demo/data --splits valid,test
python -m benchmarks.int8
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.documents import between
from qfae_export.export import Options, ParityError, export
from qfae_export.options import INT8_SUFFIX
from qfae_runtime.quantities import QUANTITIES

DOCUMENT = Path("docs/int8.md")
SHOWN = (
    *("score_distance", "score_distance_max", "spearman", "auroc_change", "flips"),
    *("map_angle", "map_angle_max", "map_cosine_p1", "map_cosine_min", "reconstruction_p999"),
    *("stress_distance", "stress_share", "stress_angle", "stress_cosine", "stress_reconstruction"),
)
"""Everything that the contract bounds."""

WAYS = {
    "as it is": None,
    "`--int8-keep none`": (),
}
_SLICES, _VALIDATION = "qfae's slices", "validation slices"
_MARKS = ("<!-- int8-results -->", "<!-- /int8-results -->")


def rows(checkpoint: Path, data: Path) -> list[list[str]]:
    """Return a row of the table for every way, calibrated on two sets of images, on ONNX Runtime and OpenVINO."""
    found = []
    for way, kept in WAYS.items():
        for title, images in ((_SLICES, None), (_VALIDATION, data / "valid/good")):
            with TemporaryDirectory() as folder:
                options = Options(
                    checkpoint,
                    out=Path(folder),
                    int8=True,
                    int8_keep=kept,
                    calibration_images=images,
                    parity_images=data / "test",
                    parity_count=200,
                    backends=("onnxruntime", "openvino"),
                )
                try:
                    exported = export(options, lambda step: click.echo(step, err=True))
                except ParityError as error:  # the table shows what was refused, too
                    reports = {"onnxruntime": error.report}
                else:
                    engine = exported.manifest.name + INT8_SUFFIX
                    reports = {"onnxruntime": exported.reports[engine], "openvino": exported.others[engine, "openvino"]}
                for backend, report in reports.items():
                    values = report.worst.values
                    verdict = "kept" if report else "broken: refused"
                    found.append([way, title, backend, *(f"{values[name]:.4g}" for name in SHOWN), verdict])
    return found


def table(found: list[list[str]]) -> str:
    """Return the rows as Markdown."""
    heads = ["policy", "calibrated on", "backend", *(QUANTITIES[name].title for name in SHOWN), "contract"]
    lines = [heads, ["---"] * 3 + ["---:"] * len(SHOWN) + ["---"], *found]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@click.command()
@click.option("--ckpt", type=click.Path(path_type=Path), default=Path("demo/weights/demo.pt"), show_default=True)
@click.option("--data", type=click.Path(path_type=Path), default=Path("build/demo/data"), show_default=True)
def main(ckpt: Path, data: Path) -> None:
    """Measure INT8 on the demonstration's test slices, and put the table into docs/int8.md."""
    text = table(rows(ckpt, data))
    click.echo(text)
    before = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(between(before, _MARKS, text.rstrip()), encoding="utf-8")


if __name__ == "__main__":
    main()
