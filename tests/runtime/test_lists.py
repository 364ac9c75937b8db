"""Inputs by lists: @FILE and stdin."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qfae_runtime.cli import run_command
from qfae_runtime.lists import read_list

from .conftest import write_png
from .test_cli import qfae_run

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)


def rows_of(out: Path) -> dict[str, str]:
    with (out / "scores.csv").open(newline="", errors="surrogateescape") as file:
        return {row["source"]: row["error"] or row["status"] for row in csv.DictReader(file)}


def test_a_list_names_files_and_folders_relative_to_itself(tmp_path: Path, engine_path: Path) -> None:
    for name in ("a/x.png", "a/b/y.png", "c/z.png"):
        write_png(tmp_path / name, GREY)
    (tmp_path / "a" / "list.txt").write_bytes(b"\xef\xbb\xbfx.png\r\n\nb\n../c/z.png\ngone.png\nx.png\n")
    shown = qfae_run(
        f"@{tmp_path}/a/list.txt", tmp_path / "a" / "x.png", "--engine", engine_path, "--out", tmp_path / "o"
    )
    assert shown.exit_code == 3, shown.stderr
    assert rows_of(tmp_path / "o") == {
        "a/b/y.png": "ok",
        "a/gone.png": "cannot be read (No such file or directory)",
        "a/x.png": "ok",
        "c/z.png": "ok",
    }


@pytest.mark.skipif(os.name == "nt", reason="names are not bytes there")
def test_a_list_on_stdin_may_hold_any_bytes(tmp_path: Path, engine_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = os.fsdecode(b"caf\xe9\nnext.png")
    write_png(tmp_path / odd, GREY)
    write_png(tmp_path / "@x.png", GREY)
    monkeypatch.chdir(tmp_path)
    content = os.fsencode(odd) + b"\0@x.png\0"
    arguments = ["-", "--engine", str(engine_path), "--out", str(tmp_path / "o")]
    shown = CliRunner().invoke(run_command, arguments, input=content)
    assert shown.exit_code == 0, shown.stderr
    assert rows_of(tmp_path / "o") == {"@x.png": "ok", odd: "ok"}


def test_faulty_lists_are_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\r\n")
    shown = qfae_run("@nowhere", f"@{tmp_path}/empty", "--engine", "x")
    assert shown.exit_code == 2
    assert shown.stderr.splitlines()[:2] == [
        "qfae-run: @nowhere: the list cannot be read (No such file or directory); a file of that name is ./@nowhere",
        f"qfae-run: @{tmp_path}/empty: the list is empty; expected one path a line",
    ]


def test_lines_keep_their_blanks(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b" a b \n#c\n/abs/d\n")
    assert read_list(f"@{tmp_path}/list", []) == (tmp_path / " a b ", tmp_path / "#c", Path("/abs/d"))


def test_faulty_reading_options_are_told_at_once(tmp_path: Path) -> None:
    shown = qfae_run(tmp_path, "--engine", "x", "--window", "40", "--axis", "up", "--slices", "9:3")
    assert shown.exit_code == 2
    assert shown.stderr.splitlines()[:3] == [
        "qfae-run: --window: got '40', expected CENTER,WIDTH, two numbers, the width at least 1, e.g. 40,400",
        "qfae-run: --slices: got '9:3', expected FROM:TO, whole numbers from 0, TO not included and larger than FROM, "
        "e.g. 40:120, 40: or :120",
        "qfae-run: --axis: got 'up', accepted are sagittal, coronal, axial",
    ]
    for window in ("40,0", "nan,400", "1,2,3", "40,inf"):
        assert "--window: got" in qfae_run(tmp_path, "--engine", "x", "--window", window).stderr
