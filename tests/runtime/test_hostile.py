"""File names and files that mean no good: every row stays parseable and leads back to its file."""

from __future__ import annotations

import csv
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from .conftest import write_png
from .test_cli import qfae_run
from .test_run import run, table

NAMES = [
    b"comma,semicolon;tab\t.png",
    b"line\nbreak\r\n.png",
    b"cr\ronly.png",
    b"quote\"'`.png",
    b"<img src=x onerror=alert(1)>.png",
    b"<script>alert(1)<.png",
    b"{{ 7 * 7 }}{% raw %}.png",
    b"=cmd|' calc'!A0.png",
    b"-rf.png",
    b"%s %n {0} $HOME.png",
    b"no utf-8 \xff\xfe\x80.png",
    "right to left \u202e gnp.\u05d0.png".encode(),
    "\U0001f9e0 e\u0301 \u00e9.png".encode(),
    b" spaces \x01\x7f .png",
    b"without suffix",
    b"x" * 251 + b".png",
    b"y" * 255,
]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    rng = np.random.default_rng(2)
    for number, name in enumerate(NAMES):
        write_png(tmp_path / "one.png", rng.integers(0, 200 + number, (20, 20), dtype=np.uint8))
        folder.mkdir(exist_ok=True)
        os.rename(tmp_path / "one.png", os.path.join(os.fsencode(folder), name))  # noqa: PTH104, PTH118 - bytes
    return folder


class Page(HTMLParser):
    """Collects the tags of a page and the text of its cells of file names."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers |= {name for name, _ in attrs if name.startswith("on")}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_rows_lead_back_to_files_of_any_name(hostile: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(hostile, engine_path, out, save_maps=True).counts.errors == 0
    for line in (out / "scores.jsonl").read_bytes().splitlines():
        line.decode("ascii")
    sources = [json.loads(line)["source"] for line in (out / "scores.jsonl").read_bytes().splitlines()]
    assert sorted(map(os.fsencode, sources)) == sorted(NAMES)
    with (out / "scores.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [row["source"] for row in csv.DictReader(file)] == sources
    assert len([path for path in (out / "heatmaps").iterdir() if path.suffix == ".png"]) == len(NAMES)
    assert len([path for path in (out / "maps").iterdir() if path.suffix == ".npy"]) == len(NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "in", "out"]


def test_the_report_shows_names_as_text(hostile: Path, engine_path: Path, tmp_path: Path) -> None:
    (hostile / "<b>torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    run(hostile, engine_path, tmp_path / "out")
    page = Page()
    page.feed((tmp_path / "out" / "report.html").read_text())
    assert "script" not in page.tags
    assert not page.handlers
    for name in ("<img src=x onerror=alert(1)>.png", "<script>alert(1)<.png", "{{ 7 * 7 }}", "<b>torn.png"):
        assert name in page.text


def test_hostile_names_can_be_resumed(hostile: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(hostile, engine_path, out)
    whole = (out / "scores.csv").read_bytes()
    rows = (out / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (out / "scores.jsonl").write_bytes(b"".join(rows[:7]))
    (out / "report.html").unlink()
    assert run(hostile, engine_path, out, resume=True).counts.resumed == 7
    assert (out / "scores.csv").read_bytes() == whole


def test_files_that_go_or_change_while_they_are_read(
    hostile: Path, engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of files is made first; what has happened since then stands in the file's row."""
    victims = sorted(path.name for path in hostile.iterdir())[2:4]

    def later(images: tuple[Path, ...], listed: tuple[Path, ...], out: Path) -> object:
        found = genuine(images, listed, out)
        (hostile / victims[0]).unlink()
        (hostile / victims[1]).unlink()
        (hostile / victims[1]).mkdir()
        return found

    from qfae_runtime import run as module

    genuine = module.find_inputs
    monkeypatch.setattr("qfae_runtime.run.find_inputs", later)
    shown = qfae_run(hostile, "--engine", engine_path, "--out", tmp_path / "out")
    assert shown.exit_code == 3
    rows = {row["source"]: row for row in table(tmp_path / "out")}
    assert rows[victims[0]]["error"] == "cannot be read (No such file or directory)"
    assert rows[victims[1]]["error"].startswith("a folder")
    assert sum(row["status"] == "ok" for row in rows.values()) == len(NAMES) - 2
