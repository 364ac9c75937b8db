"""Saved maps and whole runs in the images' own geometry, for both kinds of preprocessing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qfae_runtime.engines import open_engine
from qfae_runtime.errors import OutputError
from qfae_runtime.preprocess import preprocess
from qfae_runtime.readers import read_image
from qfae_runtime.run import Options, Summary, execute
from qfae_runtime.scorer import Scorer
from qfae_runtime.writers.maps import is_map, listed_names, save_map

from .conftest import write_png
from .doubles.disk import FullDisk
from .test_cli import qfae_run
from .tiny import SIZE, export_tiny


def run(images: Path, engine: Path, out: Path, **options: Any) -> Summary:
    return execute(Options((images,), engine, out, save_maps=True, **options))


def saved(out: Path) -> list[str]:
    return sorted(path.relative_to(out / "maps").as_posix() for path in (out / "maps").rglob("*") if path.is_file())


@pytest.fixture
def livers(tmp_path: Path) -> Path:
    """Bodies on black, larger and smaller than the engine's square; a lesion in one, a black image, a damaged file."""
    folder = tmp_path / "livers"
    rng = np.random.default_rng(5)
    for name, (top, left, height, width) in {
        "large": (3, 20, 80, 50),
        "small": (60, 70, 20, 26),
        "wide": (0, 0, 30, 100),
    }.items():
        image = np.zeros((90, 100), np.uint8)
        image[top : top + height, left : left + width] = rng.integers(90, 110, (height, width))
        if name == "small":
            image[68:74, 80:86] = 255
        write_png(folder / f"{name}.png", image)
    write_png(folder / "sub" / "black.png", np.zeros((40, 50), np.uint8))
    (folder / "sub" / "damaged.png").write_text("no picture")
    return folder


@pytest.mark.parametrize("kind", ["resize", "liver"])
def test_maps_are_the_engines_brought_back(livers: Path, tmp_path: Path, kind: str) -> None:
    engine_path = export_tiny(tmp_path / "engine", kind=kind)
    summary = run(livers, engine_path, tmp_path / "out", batch_size=2)
    assert (summary.counts.done, summary.counts.errors) == (5, 1)
    assert saved(tmp_path / "out") == ["large.png.npy", "small.png.npy", "sub/black.png.npy", "wide.png.npy"]
    with open_engine(engine_path) as opened:
        spec = opened.manifest.preprocess
        assert spec.kind == kind
        for name in saved(tmp_path / "out"):
            pixels = read_image(livers / name.removesuffix(".npy")).pixels
            prepared = preprocess(pixels, spec)
            [scored] = Scorer(opened.engine, opened.manifest).score([prepared])
            assert scored.anomaly_map is not None
            stored = np.load(tmp_path / "out" / "maps" / name, allow_pickle=False)
            assert stored.dtype == np.float16
            assert stored.shape == pixels.shape[:2]
            expected = prepared.geometry.map_back(scored.anomaly_map)
            np.testing.assert_allclose(stored.astype(np.float32), expected, rtol=1e-3, atol=1e-5)
            if kind == "liver":
                inside = (pixels[..., 0] > 0).any()
                assert (stored > 0).any() == inside
                assert (stored[pixels[..., 0] == 0] == 0).all()


def test_the_lesion_is_the_brightest_spot_of_its_saved_map(livers: Path, tmp_path: Path) -> None:
    run(livers, export_tiny(tmp_path / "engine", kind="liver"), tmp_path / "out")
    found = np.load(tmp_path / "out" / "maps" / "small.png.npy")
    inner = found[64:78, 76:90]  # away from the border of the body, which the tiny engine finds odd
    y, x = np.unravel_index(int(inner.argmax()), inner.shape)
    assert 68 <= y + 64 < 74
    assert 80 <= x + 76 < 86


def test_saved_maps_do_not_change_the_scores(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    run(dataset, engine_path, tmp_path / "a")
    execute(Options((dataset,), engine_path, tmp_path / "b"))
    assert not (tmp_path / "b" / "maps").exists()
    with_maps, without = (
        [json.loads(line) for line in (tmp_path / name / "scores.jsonl").read_text().splitlines()] for name in "ab"
    )
    assert saved(tmp_path / "a") == [f"{row['source']}.npy" for row in with_maps]
    assert [row["anomaly_map"] for row in with_maps] == [f"maps/{row['source']}.npy" for row in with_maps]
    assert [{**row, "anomaly_map": None} for row in with_maps] == without


def test_resume_writes_the_maps_that_are_missing(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(dataset, engine_path, out)
    whole = {name: (out / "maps" / name).read_bytes() for name in saved(out)}
    lines = (out / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (out / "scores.jsonl").write_bytes(b"".join(lines[:7]) + b'{"source": "good/im')
    for row in lines[7:]:
        (out / "maps" / f"{json.loads(row)['source']}.npy").unlink()
    summary = run(dataset, engine_path, out, resume=True)
    assert (summary.counts.resumed, summary.counts.done) == (7, 12)
    assert list(whole) == saved(out)
    for name, content in whole.items():  # the last batch was smaller, so its last digits may differ
        assert len((out / "maps" / name).read_bytes()) == len(content)
    with pytest.raises(OutputError, match="save_maps: was True, now False"):
        execute(Options((dataset,), engine_path, out, resume=True))


def test_overwrite_removes_only_maps_of_ours(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(dataset, engine_path, out)
    np.save(out / "maps" / "mine.npy", np.zeros((4, 4), np.float16))  # of another name
    np.save(out / "maps" / "good" / "img" / "0.png.npy", np.zeros((4, 4), np.float32))  # of another type
    (out / "maps" / "good" / "img" / "notes.txt").write_text("mine")
    (dataset / "good" / "img" / "0.png").unlink()
    lines = (out / "scores.jsonl").read_bytes()
    (out / "scores.jsonl").write_bytes(b"[1]\nnonsense\n" + lines + b'{"source": 3}\n{"torn')
    execute(Options((dataset,), engine_path, out, overwrite=True))
    assert saved(out) == ["good/img/0.png.npy", "good/img/notes.txt", "mine.npy"]
    run(dataset, engine_path, out, overwrite=True)
    assert len(saved(out)) == 11 + 3


def test_a_folder_of_maps_alone_is_not_overwritten_unasked(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "maps").mkdir(parents=True)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(OutputError, match=r"out: holds maps, but no run\.json of qfae-run"):
            run(dataset, engine_path, tmp_path / "out", **options)
    (tmp_path / "out" / "maps").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "maps").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="maps: is a symbolic link; remove it"):
        run(dataset, engine_path, tmp_path / "out", overwrite=True)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_no_maps_and_save_maps_contradict(tmp_path: Path) -> None:
    shown = qfae_run(tmp_path, "--engine", "x", "--no-maps", "--save-maps")
    assert shown.exit_code == 2
    assert "qfae-run: --no-maps and --save-maps exclude each other; choose one\n" in shown.stderr


def test_the_option_reaches_the_run(livers: Path, engine_path: Path, tmp_path: Path) -> None:
    shown = qfae_run(livers, "--engine", engine_path, "--out", tmp_path / "out", "--save-maps")
    assert shown.exit_code == 3  # the damaged file
    assert len(saved(tmp_path / "out")) == 4
    assert json.loads((tmp_path / "out" / "run.json").read_text())["fingerprint"]["save_maps"] is True


def test_a_map_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "maps" / "x.png.npy"
    path.parent.mkdir()
    values = np.array([[0.0, 1e-8, 1e-7], [0.1234567, 2.0, 6e-5]], np.float32)
    save_map(values, path)
    stored = np.load(path, allow_pickle=False)
    assert stored.dtype == np.float16
    np.testing.assert_allclose(stored, values, rtol=5e-4, atol=6e-8)
    assert stored[0, 1] == 0
    assert [one.name for one in path.parent.iterdir()] == ["x.png.npy"]

    before = path.read_bytes()
    for bytes_fit in (0, 50, 128, len(before) - 1):  # the header has 128
        with monkeypatch.context() as patch:
            FullDisk(tmp_path, lambda _: True, bytes_fit).mount(patch)
            with pytest.raises(OSError, match="No space left") as caught:
                save_map(values + 1, path)
        assert caught.value.errno == errno.ENOSPC
        assert path.read_bytes() == before
        assert [one.name for one in path.parent.iterdir()] == ["x.png.npy"]


def test_what_counts_as_a_map(tmp_path: Path) -> None:
    save_map(np.zeros((SIZE, 7), np.float32), tmp_path / "ours.npy")
    save_map(np.zeros((1, 32768), np.float32), tmp_path / "wide.npy")
    assert is_map(tmp_path / "ours.npy")
    assert is_map(tmp_path / "wide.npy")
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2), np.float16))
    np.save(tmp_path / "double.npy", np.zeros((2, 2)))
    np.save(tmp_path / "fortran.npy", np.zeros((2, 3), np.float16, order="F"))
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("((((" * 99)
    (tmp_path / "link.npy").symlink_to(tmp_path / "ours.npy")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.npy")
    for name in ("cube", "double", "fortran", "empty", "text", "link", "pipe", "none"):
        assert not is_map(tmp_path / f"{name}.npy"), name
    assert listed_names(tmp_path / "no.jsonl") == set()
