"""The command line: each fault with its whole text and its exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from qfae_runtime.cli import run_command

from .tiny import export_tiny


def qfae_run(*arguments: object) -> Result:
    return CliRunner().invoke(run_command, [str(one) for one in arguments])


def test_help_shows_options_and_ends_with_an_example() -> None:
    shown = qfae_run("--help")
    assert shown.exit_code == 0
    assert shown.stdout.rstrip().endswith("qfae-run scans/ --engine demo.onnx --out results/")
    for option in ("--engine", "--resume", "--overwrite", "--selftest", "--allow-uncertified", "--json"):
        assert option in shown.stdout
    assert "qfae-run calibrate normal-scans/ --engine demo.onnx --fpr 0.05" in shown.stdout
    assert "130 interrupted (Ctrl-C, SIGTERM): --resume goes on." in shown.stdout


def test_all_usage_faults_are_told_at_once() -> None:
    shown = qfae_run("--batchsize", "4", "--batch-size", "none", "--threads", "0", "--device", "tpu", "--zzz")
    assert shown.exit_code == 2
    assert shown.stderr.splitlines() == [
        "qfae-run: --batchsize: no such option; did you mean --batch-size?",
        "qfae-run: --zzz: no such option; a file of that name is ./--zzz",
        "qfae-run: --engine: missing; name the engine file that qfae-export wrote",
        "qfae-run: --batch-size: got 'none', expected a whole number in 1..4096",
        "qfae-run: --threads: got '0', expected a whole number in 1..4096",
        "qfae-run: --device: got 'tpu', accepted are auto, cpu, cuda:0",
        "Try 'qfae-run --help'.",
    ]


def test_nothing_at_all_is_wrong_usage() -> None:
    shown = qfae_run()
    assert shown.exit_code == 2
    assert "IMAGES: missing; name the files or folders to score" in shown.stderr


def test_contradiction_and_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    shown = qfae_run(
        tmp_path, "--engine", "x", "--out", tmp_path / "f", "--overwrite", "--resume", "--backend", "abacus"
    )
    assert shown.exit_code == 2
    assert "--overwrite and --resume exclude each other; choose one" in shown.stderr
    assert f"--out: {tmp_path}/f is a file; name a folder" in shown.stderr
    assert "--backend: got 'abacus', accepted are auto, onnxruntime" in shown.stderr


def test_option_without_its_value_is_wrong_usage() -> None:
    shown = qfae_run("x", "--engine")
    assert shown.exit_code == 2
    assert "--engine" in shown.stderr


def test_missing_folder(tmp_path: Path, engine_path: Path) -> None:
    shown = qfae_run(tmp_path / "none", "--engine", engine_path)
    assert shown.exit_code == 1
    assert shown.stderr == (f"qfae-run: {tmp_path}/none: no such file or folder; check the path of the images\n")


def test_empty_folder(tmp_path: Path, engine_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "notes.txt").touch()
    shown = qfae_run(folder, "--engine", engine_path)
    assert shown.exit_code == 1
    assert shown.stderr == (
        f"qfae-run: {folder}: no image in it (ignored: 1 x .txt; mask files: 0); "
        "pass a folder with PNG, JPEG, BMP, TIFF, WebP, DICOM or NIfTI images\n"
    )


def test_missing_engine(tmp_path: Path, dataset: Path) -> None:
    shown = qfae_run(dataset, "--engine", tmp_path / "no.onnx", "--out", tmp_path / "out")
    assert shown.exit_code == 1
    assert shown.stderr.startswith(f"qfae-run: {tmp_path}/no.onnx: no such engine file; write one with: qfae-export")
    assert not (tmp_path / "out").exists()


def test_missing_manifest_and_altered_engine(tmp_path: Path, dataset: Path, engine_path: Path) -> None:
    content = engine_path.read_bytes()
    engine_path.write_bytes(content[:-20] + bytes(20))
    shown = qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "out")
    assert shown.exit_code == 1
    assert "its bytes do not match tiny.json" in shown.stderr
    engine_path.with_suffix(".json").unlink()
    shown = qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "out")
    assert shown.exit_code == 1
    assert "no manifest beside it" in shown.stderr
    assert not (tmp_path / "out").exists()


def test_uncertified_engine(tmp_path: Path, dataset: Path) -> None:
    engine_path = export_tiny(tmp_path / "u", certified=False)
    shown = qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "out")
    assert shown.exit_code == 1
    assert "pass --allow-uncertified to run it all the same" in shown.stderr
    shown = qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "out", "--allow-uncertified")
    assert shown.exit_code == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["certified"], record["allow_uncertified"]) == (False, True)
    assert "not certified" in (tmp_path / "out" / "report.html").read_text()


def test_batch_beyond_the_engine(tmp_path: Path, dataset: Path) -> None:
    engine_path = export_tiny(tmp_path / "small", max_batch=4)
    shown = qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "out", "--batch-size", "5")
    assert shown.exit_code == 2
    assert "--batch-size: got 5, this engine takes 1..4" in shown.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a first line with the columns source,label, got []"),
        ("file,kind\n", "expected a first line with the columns source,label, got ['file', 'kind']"),
        ("source,label\na.png,maybe\n", "line 2: label 'maybe': accepted are good, normal, 0, ungood, anomalous, 1"),
        ("source,label\na.png\n", "line 2: expected 2 columns, got 1"),
        ("source,label\na.png,0\na.png,1\n", "line 3: 'a.png' has two different labels"),
        ("source,label\nnone.png,0\n", "1 sources are not among the images, the first is 'none.png'"),
    ],
)
def test_faulty_labels(tmp_path: Path, dataset: Path, engine_path: Path, text: str, says: str) -> None:
    (tmp_path / "l.csv").write_text(text)
    shown = qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "out", "--labels", tmp_path / "l.csv")
    assert shown.exit_code == 2
    assert says in shown.stderr


def test_summary_as_json_and_quiet(tmp_path: Path, dataset: Path, engine_path: Path) -> None:
    shown = qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "out", "--json")
    assert shown.exit_code == 0
    values = json.loads(shown.stdout)
    assert (values["files"], values["scored"], values["errors"], values["exit_code"]) == (12, 12, 0, 0)
    assert values["self_test"]["status"] == "passed"
    assert values["metrics"]["image_auroc"] == 1.0
    shown = qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "out2", "--quiet")
    assert (shown.exit_code, shown.output) == (0, "")


def test_summary_shows_intervals_and_says_what_is_undefined(tmp_path: Path, dataset: Path, engine_path: Path) -> None:
    shown = qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "out")
    number = r"[01]\.\d{4}"
    line = rf"image AUROC 1.0000 \[1.0000, 1.0000\], pixel AUROC {number} \[{number}, {number}\] \(95 % intervals\)"
    assert re.fullmatch(line, shown.stdout.splitlines()[2])
    assert shown.stdout.splitlines()[3].startswith("note: every resample gives the same image_auroc and image_ap")
    shown = qfae_run(dataset / "good", "--engine", engine_path, "--out", tmp_path / "good")
    assert shown.stdout.splitlines()[2] == (
        "note: image_auroc and image_ap are undefined: all 6 scored images are normal, and it takes both normal and "
        "anomalous ones"
    )
    assert "AUROC" not in shown.stdout
    assert "nan" not in (shown.stdout + (tmp_path / "good" / "metrics.json").read_text()).lower()


def test_module_runs_as_a_program(tmp_path: Path, dataset: Path, engine_path: Path) -> None:
    def program(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qfae_runtime.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    done = program(dataset, "--engine", engine_path, "--out", tmp_path / "out")
    assert done.returncode == 0
    assert f"report   {tmp_path}/out/report.html   (open it in a browser)" in done.stdout
    failed = program(dataset, "--engine", tmp_path / "no.onnx")
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert len(failed.stderr.splitlines()) == 1


def test_what_pillow_warns_of_does_not_come_between_the_lines_of_any_command(
    tmp_path: Path, dataset: Path, engine_path: Path
) -> None:
    """A picture at which it warns of a decompression bomb, below the size at which it refuses."""
    Image.new("1", (10000, 9000)).save(dataset / "good" / "img" / "large.png")
    for more in (["--out", tmp_path / "out"], ["--fpr", "0.2"]):
        words = ["calibrate", dataset / "good"] if more[0] == "--fpr" else [dataset / "good"]
        command = [sys.executable, "-m", "qfae_runtime.cli", *words, "--engine", engine_path, *more]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 3, done.stderr
        assert "Warning" not in done.stderr
    reason = "too large: got 10000 x 9000 pixels, the limit is 67,108,864 pixels and 32,768 a side"
    assert f"qfae-run calibrate: left out, 1 x: {reason}\n" in done.stderr
