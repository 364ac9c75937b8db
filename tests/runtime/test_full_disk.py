"""A disk that fills up, at every kind of moment of a run: one sentence, nothing half-written, and --resume goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from qfae_runtime.calibrate_cli import calibrate_command

from .conftest import write_png
from .dicom_files import write_dicom
from .doubles.disk import FullDisk
from .test_cli import qfae_run
from .tiny import export_tiny

pytestmark = pytest.mark.skipif(os.name == "nt", reason="full disks are those of POSIX systems")

FILES = {
    "run.json": "run.json",
    "list of inputs": "inputs.jsonl",
    "rows": "scores.jsonl",
    "heat map": "2.png",
    "map": "2.png.npy",
    "heat map of a frame": "film.f0001.png",
    "table": "scores.csv",
    "metrics": "metrics.json",
    "report": "report.html",
}
MOMENTS = ["before the first byte", "in the middle", "before the last byte"]


def files_of(out: Path) -> dict[str, bytes]:
    """Return what is the same in every run of the same files: all but times."""
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name not in ("run.json", "report.html")}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and Ungood pictures with masks, a damaged file, a film in the middle."""
    root, rng = tmp_path_factory.mktemp("archive"), np.random.default_rng(2)
    for number in range(4):
        write_png(root / "good" / f"{number}.png", rng.integers(0, 256, (12, 14), dtype=np.uint8))
    (root / "good" / "damaged.png").write_bytes(b"\x89PNG")
    write_dicom(root / "good" / "film", rng.integers(0, 256, (3, 12, 14), dtype=np.uint8))
    write_png(root / "Ungood" / "img" / "9.png", rng.integers(0, 256, (12, 14), dtype=np.uint8))
    (root / "Ungood" / "label").mkdir()
    Image.fromarray(np.eye(12, 14, dtype=np.uint8) * 255).save(root / "Ungood" / "label" / "9.png")
    return root


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("engine"), size=16)


@pytest.fixture(scope="module")
def whole(archive: Path, engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run, on a disk that is watched and never full."""
    out = tmp_path_factory.mktemp("whole") / "out"
    shown = qfae_run(archive, "--engine", engine, "--out", out, "--save-maps", "--batch-size", 2)
    assert shown.exit_code == 3, shown.stderr
    return out


def size_of(file: str, whole: Path) -> int:
    [path] = [path for path in whole.rglob(FILES[file]) if path.parent.name != "label"]
    return path.stat().st_size


@pytest.fixture
def unmounted() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("moment", range(3), ids=MOMENTS)
@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_is_told_and_the_run_gone_on_with(
    file: str, moment: int, archive: Path, engine: Path, whole: Path, tmp_path: Path, unmounted: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    given = [archive, "--engine", engine, "--out", out, "--save-maps", "--batch-size", 2, "--quiet"]
    names = (FILES[file], f".{FILES[file]}.part")
    size = size_of(file, whole)
    disk = FullDisk(out, lambda path: path.name in names, [0, size // 2, size - 1][moment])
    if file == "report" and moment == 2:  # times in it are not of one length
        disk.bytes_fit -= 64
    if file == "run.json":  # its first form is the smaller one
        disk.bytes_fit = [0, 100, 1000][moment]
    disk.mount(unmounted)
    shown = qfae_run(*given)
    unmounted.undo()
    assert disk.failed
    assert disk.failed[0] in names
    assert shown.exit_code == 1
    assert shown.stderr == (
        f"qfae-run: {out}: cannot be written (No space left on device); the rows written so far are whole, go on with "
        "--resume\n"
    )
    expected = files_of(whole)
    for name, content in files_of(out).items():
        if name != "scores.jsonl":
            assert expected[name] == content, name  # no half-written file, nor one under another name
    rows = (out / "scores.jsonl").read_bytes() if (out / "scores.jsonl").exists() else b""
    assert expected["scores.jsonl"].startswith(rows)
    assert rows == b"" or rows.endswith(b"}\n")
    assert not (out / "report.html").exists()

    shown = qfae_run(*given, "--resume")
    assert shown.exit_code == 3, shown.stderr
    assert files_of(out) == expected
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "done"
    assert sum(part["rows"] for part in record["parts"]) == len(expected["scores.jsonl"].splitlines())
    assert (out / "report.html").read_text().count("<img") == (whole / "report.html").read_text().count("<img")


@pytest.mark.parametrize("bytes_fit", [0, 100, 2000])
def test_a_disk_that_is_full_when_the_record_is_finished(
    bytes_fit: int, archive: Path, engine: Path, whole: Path, tmp_path: Path, unmounted: pytest.MonkeyPatch
) -> None:
    """All files are there, and run.json still says that the run goes on."""
    out = tmp_path / "out"
    given = [archive, "--engine", engine, "--out", out, "--save-maps", "--batch-size", 2, "--quiet"]
    disk = FullDisk(out, lambda path: path.name == ".run.json.part" and (out / "report.html").exists(), bytes_fit)
    disk.mount(unmounted)
    shown = qfae_run(*given)
    unmounted.undo()
    assert shown.exit_code == 1
    assert set(disk.failed) == {".run.json.part"}
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    assert files_of(out) == files_of(whole)
    assert qfae_run(*given, "--resume").exit_code == 3
    assert files_of(out) == files_of(whole)
    parts = json.loads((out / "run.json").read_text())["parts"]
    assert [part["status"] for part in parts] == ["killed", "done"]


def test_a_disk_that_fills_up_while_a_run_is_gone_on_with(
    archive: Path, engine: Path, whole: Path, tmp_path: Path, unmounted: pytest.MonkeyPatch
) -> None:
    """Again and again, a few rows further each time."""
    out = tmp_path / "out"
    given = [archive, "--engine", engine, "--out", out, "--save-maps", "--batch-size", 2, "--quiet", "--resume"]
    size, codes = size_of("rows", whole), []
    for share in (0.2, 0.5, 0.8, 0.99):
        disk = FullDisk(out, lambda path: path.name == "scores.jsonl", int(size * share))
        disk.mount(unmounted)
        codes.append(qfae_run(*given).exit_code)
        unmounted.undo()
    assert codes == [1, 1, 1, 1]
    assert qfae_run(*given).exit_code == 3
    assert files_of(out) == files_of(whole)


@pytest.mark.parametrize("moment", range(3), ids=MOMENTS)
@pytest.mark.parametrize("before", [False, True])
def test_a_calibration_is_written_whole_or_not_at_all(
    moment: int, before: bool, engine: Path, tmp_path: Path, unmounted: pytest.MonkeyPatch
) -> None:
    rng, folder = np.random.default_rng(4), tmp_path / "calibrations"
    folder.mkdir()
    for number in range(20):
        write_png(tmp_path / "normal" / f"{number}.png", rng.integers(0, 256, (12, 14), dtype=np.uint8))
    path = folder / "c.json"
    given = [str(tmp_path / "normal"), "--engine", str(engine), "--fpr", "0.1", "--calibration", str(path)]
    assert CliRunner().invoke(calibrate_command, given).exit_code == 0
    size = path.stat().st_size
    path.unlink()
    if before:
        path.write_text("the one before")
        given.append("--overwrite")
    disk = FullDisk(folder, lambda file: True, [0, size // 2, size - 1][moment])
    disk.mount(unmounted)
    shown = CliRunner().invoke(calibrate_command, given)
    unmounted.undo()
    assert shown.exit_code == 1
    assert disk.failed
    assert shown.stderr == (
        f"qfae-run calibrate: {path}: cannot be written (No space left on device); free some space or choose another "
        "--calibration\n"
    )
    assert [file.name for file in folder.iterdir()] == (["c.json"] if before else [])
    assert not before or path.read_text() == "the one before"
    assert CliRunner().invoke(calibrate_command, given).exit_code == 0
    assert len(json.loads(path.read_text())["scores"]) == 20
