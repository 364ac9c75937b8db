"""Pictures of files with names that no picture can have: each is written, and its row says where."""

from __future__ import annotations

import errno
import json
import os
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

from qfae_runtime.errors import OutputError
from qfae_runtime.run import Options, Summary, execute
from qfae_runtime.writers import heatmap
from qfae_runtime.writers.heatmap import heatmap_names, is_ours
from qfae_runtime.writers.maps import map_name
from qfae_runtime.writers.names import frame_path, name_for, spare_name
from qfae_runtime.writers.places import Place

from .conftest import write_png

RNG = np.random.default_rng(4)


def run(images: Path, engine: Path, out: Path, **options: Any) -> Summary:
    return execute(Options((images,), engine, out, save_maps=True, **options))


def pictures(out: Path) -> dict[str, tuple[str, str]]:
    """Where the rows say the heat map and the map of each source are; they are there, and no others."""
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        assert is_ours(out / row["heatmap"])
        stored = np.load(out / row["anomaly_map"], allow_pickle=False)
        assert stored.shape == (20, 20 + rows.index(row))  # it is the map of this source
    found = {path for name in ("heatmaps", "maps") for path in walk(out / name)}
    assert found == {str(out / row[key]) for row in rows for key in ("heatmap", "anomaly_map")}
    return {row["source"]: (row["heatmap"], row["anomaly_map"]) for row in rows}


def walk(folder: Path) -> list[str]:
    return [os.path.join(here, name) for here, _, names in os.walk(folder) for name in names]  # noqa: PTH118 - long paths


def fill(paths: list[Path]) -> None:
    """Write a picture under each path, each wider than the one before."""
    for number, path in enumerate(paths):
        write_png(path.parent / "new.png", RNG.integers(0, 256, (20, 20 + number), dtype=np.uint8))
        (path.parent / "new.png").rename(path)


def test_a_folder_that_is_called_as_the_picture_of_a_file(engine_path: Path, tmp_path: Path) -> None:
    names = ["x", "x.npy/y", "x.npy~/y", "x.png/y", "x.png/z.png/y", "x.png~/y", "~/y"]
    fill([tmp_path / "in" / name for name in names])
    run(tmp_path / "in", engine_path, tmp_path / "out")
    assert pictures(tmp_path / "out") == {
        "x": ("heatmaps/x.png", "maps/x.npy"),
        "x.npy/y": ("heatmaps/x.npy~/y.png", "maps/x.npy~/y.npy"),
        "x.npy~/y": ("heatmaps/x.npy~~/y.png", "maps/x.npy~~/y.npy"),
        "x.png/y": ("heatmaps/x.png~/y.png", "maps/x.png~/y.npy"),
        "x.png/z.png/y": ("heatmaps/x.png~/z.png~/y.png", "maps/x.png~/z.png~/y.npy"),
        "x.png~/y": ("heatmaps/x.png~~/y.png", "maps/x.png~~/y.npy"),
        "~/y": ("heatmaps/~~/y.png", "maps/~~/y.npy"),
    }


@pytest.mark.skipif(os.name == "nt", reason="the limit is that of POSIX systems")
def test_a_path_that_is_too_long_as_a_whole(engine_path: Path, tmp_path: Path) -> None:
    """Below in/ it just fits into 4,095 bytes, below out/heatmaps/ it does not."""
    top = tmp_path / "in"
    deep = top
    while (room := 4090 - len(os.fsencode(deep))) > 200:
        deep /= "d" * min(room - 100, 200)
    fill([top / "a.png", deep / ("e" * (4090 - len(os.fsencode(deep)) - 1))])
    out = tmp_path / "out"
    assert run(top, engine_path, out).counts.errors == 0
    found = pictures(out)
    [source] = found.keys() - {"a.png"}
    assert len(source) > 3900
    assert found["a.png"] == ("heatmaps/a.png", "maps/a.png.npy")
    assert found[source] == (f"heatmaps/{spare_name(source, '.png')}", f"maps/{spare_name(source, '.npy')}")
    assert (out / "report.html").read_text().count("<img") == 2
    run(top / "a.png", engine_path, out, overwrite=True)
    assert list(pictures(out)) == ["a.png"]


def test_names_that_the_file_system_of_the_results_does_not_take(
    engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no colons, say, and tells by one of several errors."""
    fill([tmp_path / "in" / name for name in ("a.png", "b:1.png", "c:2/x.png")])
    genuine, errors = Path.mkdir, iter((errno.EINVAL, errno.EILSEQ))

    def mkdir(path: Path, *arguments: Any, **more: Any) -> None:
        if ":" in path.name:
            raise OSError(next(errors), "Invalid")
        genuine(path, *arguments, **more)

    def save(figure: heatmap.Figure, path: Path) -> None:
        if ":" in path.name:
            raise OSError(errno.EINVAL, "Invalid argument")
        saved(figure, path)

    saved = heatmap.save
    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(heatmap, "save", save)
    run(tmp_path / "in", engine_path, tmp_path / "out")
    assert pictures(tmp_path / "out") == {
        "a.png": ("heatmaps/a.png", "maps/a.png.npy"),
        "b:1.png": (f"heatmaps/{spare_name('b:1.png', '.png')}", "maps/b:1.png.npy"),
        "c:2/x.png": tuple(
            f"{folder}/{spare_name('c:2/x.png', suffix)}" for folder, suffix in (("heatmaps", ".png"), ("maps", ".npy"))
        ),
    }


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_full_disk_is_no_matter_of_names(
    engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fill([tmp_path / "in" / name for name in ("a.png", "b.png", "c.png")])
    genuine, tried = heatmap.save, list[str]()

    def save(figure: heatmap.Figure, path: Path) -> None:
        tried.append(path.name)
        if path.name == "b.png":
            raise OSError(number, os.strerror(number))
        genuine(figure, path)

    monkeypatch.setattr(heatmap, "save", save)
    with pytest.raises(OutputError, match=f"cannot be written.*{os.strerror(number)}.*go on with --resume"):
        run(tmp_path / "in", engine_path, tmp_path / "out")
    assert len(tried) == len(set(tried))
    assert not (tmp_path / "out" / "heatmaps" / "~").exists()
    rows = (tmp_path / "out" / "scores.jsonl").read_bytes()
    assert [json.loads(line)["source"] for line in rows.splitlines()] == ["a.png"]


def test_something_in_the_way_of_a_picture(tmp_path: Path) -> None:
    """Whoever made it: it stays, and the picture goes elsewhere, all frames of a file each on its own."""

    def draw(path: Path) -> None:
        path.write_text("picture")

    (tmp_path / "heatmaps" / "x.png").mkdir(parents=True)
    (tmp_path / "heatmaps" / "folder").write_text("mine")
    for source, frame, expected in (
        ("x", None, f"heatmaps/{spare_name('x', '.png')}"),
        ("x", 3, "heatmaps/x.f0003.png"),
        ("folder/x", 3, f"heatmaps/{frame_path(Path(spare_name('folder/x', '.png')), 3).as_posix()}"),
    ):
        place = Place(tmp_path / "heatmaps", f"{source}.png", source)
        assert place.write(frame, draw) == expected
        assert (tmp_path / expected).read_text() == "picture"
    assert (tmp_path / "heatmaps" / "folder").read_text() == "mine"


def test_no_picture_is_called_as_another_nor_as_a_folder() -> None:
    """Names from parts that mean something here, put together in every way, three deep."""
    parts = ["x", "x.png", "x.npy", "x.png~", "~", "~~", "x.f0001", ".x.npy.part", "X.PNG"]
    sources = ["/".join(one) for depth in (1, 2, 3) for one in product(parts, repeat=depth)]
    for names in (heatmap_names(sources), [map_name(source) for source in sources]):
        every = {frame_path(Path(name), frame).as_posix() for name in names for frame in (None, 1)} | {
            spare_name(source, PurePosixPath(names[0]).suffix) for source in sources
        }
        assert len(every) == 3 * len(sources)
        folders = {parent.as_posix() for name in every for parent in PurePosixPath(name).parents}
        halves = {PurePosixPath(name).with_name(f".{PurePosixPath(name).name}.part").as_posix() for name in every}
        assert not folders & (every | halves)


def test_names_of_pictures_fit(tmp_path: Path) -> None:
    assert name_for("a.b/c", ".png") == "a.b/c.png"
    long = name_for("d.png/" + "é" * 200, ".png")
    assert long.startswith("d.png~/é")
    assert len(os.fsencode(PurePosixPath(long).name)) <= 230
    assert len(spare_name("x" * 4000, ".npy")) == len("~/") + 32 + len(".npy")


def test_a_row_that_was_edited_shows_no_picture_from_elsewhere(engine_path: Path, tmp_path: Path) -> None:
    fill([tmp_path / "in" / name for name in ("a.png", "b.png")])
    run(tmp_path / "in", engine_path, tmp_path / "out")
    rows = (tmp_path / "out" / "scores.jsonl").read_text()
    (tmp_path / "out" / "heatmaps" / "a.png").rename(tmp_path / "a.png")
    (tmp_path / "out" / "scores.jsonl").write_text(rows.replace("heatmaps/a.png", "heatmaps/../../a.png"))
    (tmp_path / "out" / "report.html").unlink()
    run(tmp_path / "in", engine_path, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "report.html").read_text().count("<img") == 1
