"""Files of several pictures through a whole run: rows, pictures, resume; and one image in three formats."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import RLELossless

from qfae_runtime import pipeline
from qfae_runtime.errors import OutputError, RunInterruptedError
from qfae_runtime.readers import ReadOptions, Slice, nifti
from qfae_runtime.run import Counts, Options, Summary, execute
from qfae_runtime.writers.heatmap import heatmap_names
from qfae_runtime.writers.maps import map_name
from qfae_runtime.writers.names import frame_path

from .conftest import write_png
from .dicom_files import dicom_bytes, write_dicom
from .test_cli import qfae_run

RNG = np.random.default_rng(11)
FRAMES = RNG.integers(0, 256, (5, 20, 24), dtype=np.uint8)


def run(images: Path, engine: Path, out: Path, **options: Any) -> Summary:
    return execute(Options((images,), engine, out, **options))


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A single picture, a film, a damaged film of which 2 frames are left, a volume, a TIFF of 3 pages, a report."""
    root = tmp_path / "archive"
    write_png(root / "a.png", FRAMES[0])
    write_dicom(root / "b" / "film", FRAMES)
    film = pydicom.dcmread(write_dicom(root / "b" / "film.damaged", FRAMES))
    film.compress(RLELossless)
    film.save_as(root / "b" / "film.damaged")
    content = bytearray((root / "b" / "film.damaged").read_bytes())
    starts = [at for at in range(len(content) - 4) if content[at : at + 4] == b"\xfe\xff\x00\xe0"]
    content[starts[3] + 8 : starts[3] + 72] = b"\xff" * 64
    (root / "b" / "film.damaged").write_bytes(content)
    volume = nibabel.Nifti1Image(RNG.normal(size=(12, 10, 4)), np.eye(4))
    (root / "c.nii.gz").parent.mkdir(exist_ok=True)
    nibabel.save(volume, root / "c.nii.gz")
    pages = [Image.fromarray(frame) for frame in FRAMES[:3]]
    pages[0].save(root / "d.tiff", save_all=True, append_images=pages[1:])
    write_dicom(root / "e.sr", FRAMES[0], SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    write_png(root / "f.png", FRAMES[1])
    return root


PICTURES = [
    ("a.png", None),
    *[("b/film", frame) for frame in range(5)],
    *[("b/film.damaged", frame) for frame in range(3)],
    *[("c.nii.gz", frame) for frame in range(4)],
    *[("d.tiff", frame) for frame in range(3)],
    ("e.sr", None),
    ("f.png", None),
]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_every_frame_has_its_row_heat_map_and_map(
    archive: Path, engine_path: Path, tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "FRAMES_AT_ONCE", 2)
    out = tmp_path / "out"
    summary = run(archive, engine_path, out, batch_size=batch_size, save_maps=True)
    rows = rows_of(out)
    assert [(row["source"], row["frame"]) for row in rows] == PICTURES
    errors = {(row["source"], row["frame"]): row["error"] for row in rows if row["status"] == "error"}
    assert errors.keys() == {("b/film.damaged", 2), ("e.sr", None)}
    assert errors["b/film.damaged", 2].startswith("frame 2 and all after it: damaged or truncated DICOM image (")
    assert errors["e.sr", None] == "no image to score: a structured report (Basic Text SR Storage)"
    assert (summary.counts.done, summary.counts.total, summary.counts.rows, summary.counts.errors) == (7, 7, 18, 2)
    record = json.loads((out / "run.json").read_text())
    assert record["counts"] == {"files": 7, "rows": 18, "scored": 16, "errors": 2, "resumed": 0}
    drawn = {path.relative_to(out / "heatmaps").as_posix() for path in (out / "heatmaps").rglob("*.png")}
    kept = {path.relative_to(out / "maps").as_posix() for path in (out / "maps").rglob("*.npy")}
    scored = [picture for picture in PICTURES if picture not in errors]
    assert kept == {frame_path(Path(map_name(source)), frame).as_posix() for source, frame in scored}
    for row in rows:
        pictures = [row["heatmap"], row["anomaly_map"]]
        if row["status"] == "error":
            assert pictures == [None, None]
        else:
            assert [(out / picture).is_file() for picture in pictures] == [True, True]
    assert len({row["heatmap"] for row in rows}) == 16 + 1
    assert "b/film.f0004.npy" in kept
    assert len(drawn) == 16
    assert {"a.png", "b/film.f0004.png", "c.nii.gz.f0003.png", "d.tiff.f0000.png"} <= drawn
    with (out / "scores.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert table[9]["applied"].startswith("axial; range ")
    page = (out / "report.html").read_text()
    assert page.count("<img") == 16
    assert "c.nii.gz, frame 3 · axial; range" in page
    assert "b/film.damaged, frame 2</td>" in page


def test_batches_do_not_change_the_score_of_a_frame(archive: Path, engine_path: Path, tmp_path: Path) -> None:
    scores = []
    for batch_size in (1, 5):
        run(archive, engine_path, tmp_path / str(batch_size), batch_size=batch_size)
        scores.append([row["score"] for row in rows_of(tmp_path / str(batch_size))])
    for one, other in zip(*scores, strict=True):
        assert one == other or abs(one - other) < 1e-5
    single = rows_of(tmp_path / "1")
    by_name = {(row["source"], row["frame"]): row["score"] for row in single}
    assert by_name["a.png", None] == by_name["b/film", 0] == by_name["d.tiff", 0]
    assert by_name["f.png", None] == by_name["b/film", 1] == by_name["d.tiff", 1]


@pytest.mark.parametrize("kept", range(len(PICTURES) + 1))
def test_no_row_is_lost_and_none_is_twice(
    archive: Path, engine_path: Path, tmp_path: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ended after any row, in the middle of the next: resumed, it is that of one piece."""
    monkeypatch.setattr(pipeline, "FRAMES_AT_ONCE", 2)
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(archive, engine_path, whole, batch_size=1, maps=False)
    shutil.copytree(whole, out)
    lines = (out / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (out / "scores.jsonl").write_bytes(b"".join(lines[:kept]) + b'{"source": "torn')
    record = json.loads((out / "run.json").read_text()) | {"status": "running"}
    (out / "run.json").write_text(json.dumps(record))
    seen: list[tuple[int, int]] = []
    summary = execute(
        Options((archive,), engine_path, out, batch_size=1, maps=False, resume=True),
        lambda counts: seen.append((counts.done, counts.rows)),
    )
    assert (out / "scores.jsonl").read_bytes() == (whole / "scores.jsonl").read_bytes()
    assert (out / "scores.csv").read_bytes() == (whole / "scores.csv").read_bytes()
    assert (summary.counts.done, summary.counts.rows, summary.counts.errors) == (7, 18, 2)
    assert seen == sorted(set(seen))
    files = [source for source, _ in PICTURES[:kept]]
    complete = len(set(files)) - (bool(files) and PICTURES[kept - 1][1] is not None)
    assert summary.counts.resumed == complete


@pytest.mark.parametrize("stop_at", [1, 4, 8, 11])
def test_labelled_frames_are_counted_once_when_resumed(engine_path: Path, tmp_path: Path, stop_at: int) -> None:
    """With labels the maps of finished files are made again, their rows are not."""
    root, out, whole = tmp_path / "data", tmp_path / "out", tmp_path / "whole"
    write_dicom(root / "good" / "film", FRAMES)
    write_dicom(root / "Ungood" / "img" / "film", FRAMES)
    mask = root / "Ungood" / "label" / "film"
    mask.parent.mkdir()
    Image.fromarray(FRAMES[0]).save(mask, format="PNG")
    write_png(root / "good" / "x.png", FRAMES[2])
    run(root, engine_path, whole, batch_size=2)

    def stop(counts: Counts) -> None:
        if counts.rows == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(RunInterruptedError):
        execute(Options((root,), engine_path, out, batch_size=2), stop)
    assert (out / "scores.jsonl").read_bytes().count(b"\n") == stop_at
    run(root, engine_path, out, batch_size=2, resume=True)
    for name in ("scores.jsonl", "metrics.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["counts"]["masks_unusable"] == 5
    assert (
        "5 masks could not be used, the first is the mask of Ungood/img/film: is that of a file with several pictures, "
        "expected one; give each a file of its own"
    ) in metrics["notes"]


def test_a_finished_run_of_frames_stays_as_it_is(engine_path: Path, tmp_path: Path) -> None:
    write_dicom(tmp_path / "in" / "film", FRAMES)
    run(tmp_path / "in", engine_path, tmp_path / "out")
    before = (tmp_path / "out" / "scores.jsonl").read_bytes()
    summary = run(tmp_path / "in", engine_path, tmp_path / "out", resume=True)
    assert summary.nothing_left
    assert (tmp_path / "out" / "scores.jsonl").read_bytes() == before


def test_rows_that_skip_a_frame_are_not_resumed(engine_path: Path, tmp_path: Path) -> None:
    write_dicom(tmp_path / "in" / "film", FRAMES)
    run(tmp_path / "in", engine_path, tmp_path / "out")
    rows = tmp_path / "out" / "scores.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join([lines[0], lines[2]]))
    with pytest.raises(OutputError, match=r"row 2 is not the next frame of its file; start afresh with --overwrite"):
        run(tmp_path / "in", engine_path, tmp_path / "out", resume=True)


def test_another_window_axis_or_range_refuses_to_resume(archive: Path, engine_path: Path, tmp_path: Path) -> None:
    run(archive, engine_path, tmp_path / "out")
    with pytest.raises(OutputError) as caught:
        run(
            archive,
            engine_path,
            tmp_path / "out",
            resume=True,
            reading=ReadOptions(window=(40.0, 400.0), axis="coronal", slices=(1, None)),
        )
    for line in ("window: was None, now [40.0, 400.0]", "axis: was 'axial', now 'coronal'", "slices: was None, now"):
        assert line in str(caught.value)


def test_options_of_the_command_line_reach_the_rows(archive: Path, engine_path: Path, tmp_path: Path) -> None:
    given = ["--window", "0.5,3", "--axis", "sagittal", "--slices", "2:4", "--no-maps"]
    shown = qfae_run(archive / "c.nii.gz", "--engine", engine_path, "--out", tmp_path / "out", *given)
    assert shown.exit_code == 0, shown.stderr
    assert "; 2 pictures are in all 1 files" in shown.stdout
    assert [(row["frame"], row["applied"]) for row in rows_of(tmp_path / "out")] == [
        (2, "sagittal; window 0.5,3 (asked for)"),
        (3, "sagittal; window 0.5,3 (asked for)"),
    ]


def test_one_image_in_three_formats_has_one_score(engine_path: Path, tmp_path: Path) -> None:
    """As PNG, as DICOM, and as NIfTI stored as a DICOM converter does, from left to right and top to bottom."""
    grey, root = FRAMES[3], tmp_path / "in"
    write_png(root / "x.png", grey)
    write_dicom(root / "x.dcm", grey)
    write_dicom(root / "deep.dcm", grey.astype(np.int16) * 16 - 1024, WindowCenter="1024", WindowWidth="4081")
    volume = nibabel.Nifti1Image(grey.T[:, :, None], np.diag([-1.0, -1.0, 1.0, 1.0]))
    nibabel.save(volume, root / "x.nii.gz")
    Image.fromarray(grey).save(root / "x.tiff")
    assert execute(Options((root,), engine_path, tmp_path / "out")).counts.errors == 0
    scores = {row["source"]: row["score"] for row in rows_of(tmp_path / "out")}
    assert set(scores) == {"x.png", "x.dcm", "x.nii.gz", "x.tiff", "deep.dcm"}
    expected = scores["x.png"]
    assert expected > 0.1
    assert {name: score for name, score in scores.items() if name != "deep.dcm"} == dict.fromkeys(
        ("x.dcm", "x.nii.gz", "x.png", "x.tiff"), expected
    )


def test_images_under_names_of_other_things_are_found(engine_path: Path, tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_dicom(root / "1.2.840.log", FRAMES[0])
    (root / "notes.txt").write_text("notes")
    (root / "table.gz").write_bytes(b"\x1f\x8b no gzip")
    nibabel.save(nibabel.Nifti1Image(FRAMES[0][:, :, None], np.eye(4)), root / "x.nii.gz")
    Image.fromarray(FRAMES[1]).save(root / "y.db", format="PNG")
    (root / "nopreamble").write_bytes(dicom_bytes(FRAMES[2])[132:])
    execute(Options((root,), engine_path, tmp_path / "out"))
    assert [row["source"] for row in rows_of(tmp_path / "out")] == ["1.2.840.log", "nopreamble", "x.nii.gz", "y.db"]
    assert all(row["status"] == "ok" for row in rows_of(tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["inputs"]["ignored"] == {".gz": 1, ".txt": 1}


def test_names_of_frames_never_meet_those_of_files() -> None:
    sources = ["x", "x.f0001", "x.f0001~", "x.png", "x.f0001.png", "x.f0001.f0002"]
    names = heatmap_names(sources)
    drawn = [*names, *[frame_path(Path(name), frame).as_posix() for name in names for frame in (None, 1, 2)][1:]]
    every = {*names} | {frame_path(Path(name), frame).as_posix() for name in names for frame in (1, 2, 12345)}
    assert len(every) == len(names) * 4
    assert set(drawn) <= every
    kept = [frame_path(Path(map_name(source)), frame) for source in sources for frame in (None, 1, 2, 12345)]
    assert len(set(kept)) == len(kept)


def test_overwriting_removes_the_maps_of_frames(archive: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(archive, engine_path, out, save_maps=True)
    run(archive / "a.png", engine_path, out, overwrite=True, save_maps=True)
    assert [path.name for path in (out / "maps").rglob("*") if path.is_file()] == ["a.png.npy"]
    assert [path.name for path in (out / "heatmaps").rglob("*") if path.is_file()] == ["a.png"]


def test_volumes_are_unpacked_once_and_one_at_a_time(
    engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        path = tmp_path / "in" / f"{number}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(RNG.normal(size=(8, 8, 20)), np.eye(4)), path)
    genuine, events = nifti.read_volume, list[str]()

    def watched(path: Path, source: str, options: ReadOptions) -> Iterator[Slice]:
        events.append(f"{source} opened")
        yield from genuine(path, source, options)
        events.append(f"{source} done")

    monkeypatch.setattr(nifti, "read_volume", watched)
    execute(Options((tmp_path / "in",), engine_path, tmp_path / "out", batch_size=2, maps=False))
    assert events == [f"{n}.nii.gz {what}" for n in range(6) for what in ("opened", "done")]


def test_a_long_film_is_never_held_whole(engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 frames no more wait between decoder and engine than two lists and a batch."""
    write_dicom(tmp_path / "in" / "film", np.repeat(FRAMES, 80, axis=0))
    monkeypatch.setattr(pipeline, "FRAMES_AT_ONCE", 8)
    genuine, decoded, scored, most = pipeline._prepared, 0, 0, 0

    def counting(*arguments: Any) -> Any:
        nonlocal decoded, most
        decoded += 1
        most = max(most, decoded - scored)
        return genuine(*arguments)

    def told(counts: Counts) -> None:
        nonlocal scored
        scored = counts.rows

    monkeypatch.setattr(pipeline, "_prepared", counting)
    execute(Options((tmp_path / "in",), engine_path, tmp_path / "out", batch_size=4, maps=False), told)
    assert scored == 400
    assert most <= 3 * 8 + 4 * 4 + 4
