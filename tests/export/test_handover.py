"""Files appear together or not at all, and what was there comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from qfae_export.handover import put_in_place


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    for name in ("a.onnx", "b.npz", "a.json"):
        (tmp_path / "made" / name).write_text(f"new {name}")
    for name in ("a.onnx", "a.json", "a.plan", "other"):
        (tmp_path / name).write_text(f"old {name}")
    return tmp_path / "made"


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


NAMES, STALE = ["a.onnx", "b.npz", "a.json"], ["a.plan", "nothing"]


def test_new_files_take_the_place_of_old_ones(made: Path, tmp_path: Path) -> None:
    put_in_place(made, tmp_path, NAMES, STALE)
    assert files(tmp_path) == {**{name: f"new {name}" for name in NAMES}, "other": "old other"}


@pytest.mark.parametrize("fails_at", range(1, 7))
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_whatever_stops_it_both_folders_are_as_before(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, error: type[BaseException]
) -> None:
    before = files(tmp_path), files(made)
    genuine, count = Path.replace, 0

    def replace(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == fails_at:
            raise error
        return genuine(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(error):
        put_in_place(made, tmp_path, NAMES, STALE)
    assert (files(tmp_path), files(made)) == before
