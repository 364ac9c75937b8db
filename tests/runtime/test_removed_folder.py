"""--out taken away during a run: one sentence, exit code 1, and nothing made again in its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qfae_runtime import run as module
from qfae_runtime.errors import OutputError
from qfae_runtime.run import Counts, Options, execute
from qfae_runtime.writers import folder


def remove(out: Path) -> None:
    while out.exists():  # a picture may be written into a folder that has just been emptied
        shutil.rmtree(out, ignore_errors=True)


def move(out: Path) -> None:
    out.rename(out.with_name("moved"))


def replace_by_a_file(out: Path) -> None:
    remove(out)
    out.write_text("mine")


def replace_by_a_folder(out: Path) -> None:
    remove(out)
    out.mkdir()


TAKEN = [remove, move, replace_by_a_file, replace_by_a_folder]


def left(out: Path) -> str | None:
    """Return what is under the folder's name afterwards."""
    return out.read_text() if out.exists() else None


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("take", TAKEN)
@pytest.mark.parametrize("row", [1, 5, 12])
def test_between_two_rows(
    take: Callable[[Path], None], row: int, maps: bool, dataset: Path, engine_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def progress(counts: Counts) -> None:
        if counts.rows == row:
            take(out)

    with pytest.raises(OutputError) as caught:
        execute(Options((dataset,), engine_path, out, batch_size=1, maps=maps), progress)
    assert "was removed, moved or replaced while the run was writing there; leave it alone" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "are whole" not in str(caught.value)
    if take is replace_by_a_folder:  # which may hold a last picture, and a run.json that says "failed", but no rows
        assert not (out / "scores.jsonl").exists()
    else:
        assert left(out) == ("mine" if take is replace_by_a_file else None)


@pytest.mark.parametrize("step", ["write_csv", "compute_metrics", "write_report"])
@pytest.mark.parametrize("take", TAKEN)
def test_while_the_results_are_put_together(
    take: Callable[[Path], None],
    step: str,
    dataset: Path,
    engine_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, genuine = tmp_path / "out", getattr(module, step)

    def taken(*arguments: Any) -> Any:
        take(out)
        return genuine(*arguments)

    monkeypatch.setattr(module, step, taken)
    with pytest.raises(OutputError, match="was removed, moved or replaced while the run was writing there"):
        execute(Options((dataset,), engine_path, out))


@pytest.mark.parametrize("take", TAKEN[:3])
def test_while_the_folders_of_a_picture_are_made(
    take: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, genuine = tmp_path / "out", folder.refuse_link
    out.mkdir()

    def taken(path: Path) -> None:
        if out.is_dir():
            take(out)
        genuine(path)

    monkeypatch.setattr(folder, "refuse_link", taken)
    with pytest.raises(OutputError, match="was removed, moved or replaced while the run was writing there"):
        folder.make_parent(out / "heatmaps" / "good" / "x.png", out)
    assert left(out) == ("mine" if take is replace_by_a_file else None)
