from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qfae_runtime.layout import find_images, label_of, mask_path_for, scan


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_nearest_folder_gives_the_label() -> None:
    root = Path("/data/good/run")
    assert label_of(root / "test" / "Ungood" / "img" / "x.png", root) == "Ungood"
    assert label_of(root / "UNGOOD" / "Good" / "x.png", root) == "good"
    assert label_of(root / "test" / "x.png", root) is None
    assert label_of(root / "test" / "x.png") == "good"
    assert label_of(root / "goods" / "good.png", root) is None
    assert label_of(Path("/d/good/x.png"), Path("/d/good")) == "good"


def test_masks_are_found_in_both_variants(tmp_path: Path) -> None:
    with_img, without = tmp_path / "a" / "Ungood", tmp_path / "b" / "Ungood"
    touch(
        with_img / "img" / "x.png", with_img / "anomaly_mask" / "x.png", without / "y.jpg", without / "label" / "y.png"
    )
    assert mask_path_for(with_img / "img" / "x.png") == with_img / "anomaly_mask" / "x.png"
    assert mask_path_for(without / "y.jpg") == without / "label" / "y.png"
    assert mask_path_for(without / "z.png") is None


def test_masks_and_non_images_are_passed_over_and_counted(tmp_path: Path) -> None:
    test = tmp_path / "test"
    touch(test / "Ungood" / "img" / "b.png", test / "Ungood" / "label" / "b.png", test / "good" / "a.png")
    touch(test / "good" / "label" / "a.png", test / "notes.txt", test / ".DS_Store", test / "Ungood" / "t.csv")
    touch(test / "label" / "c.png", test / "noname")
    found = scan([test])
    assert [found.source_of(path) for path in found.images] == [
        "Ungood/img/b.png",
        "good/a.png",
        "label/c.png",
        "noname",
    ]
    assert found.ignored == {".csv": 1, ".txt": 1, "hidden file": 1}
    assert found.mask_files == 2
    assert find_images(test) == found.images


def test_what_is_damaged_or_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image must not lose its row with its first bytes."""
    touch(tmp_path / "empty.nii.gz", tmp_path / "EMPTY.NII.GZ", tmp_path / "empty.gz", tmp_path / "shut.log")
    (tmp_path / "damaged.nii.gz").write_bytes(b"\x1f\x8bno stream")
    (tmp_path / "foreign.nii.gz").write_bytes(b"hello")
    (tmp_path / "packed.gz").write_bytes(b"\x1f\x8bno stream")
    (tmp_path / "lost.nii.gz").symlink_to(tmp_path / "none")
    (tmp_path / "lost.txt").symlink_to(tmp_path / "none")
    genuine = Path.open

    def forbidden(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "shut.log":
            raise PermissionError(13, "Permission denied", str(path))
        return genuine(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    found = scan([tmp_path])
    assert [path.name for path in found.images] == [
        "EMPTY.NII.GZ",
        "damaged.nii.gz",
        "empty.nii.gz",
        "foreign.nii.gz",
        "lost.nii.gz",
        "shut.log",
    ]
    assert found.ignored == {".gz": 2, ".txt": 1}


def test_named_files_are_always_taken_and_taken_once(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "x.txt", tmp_path / "b" / "y.png")
    found = scan([tmp_path / "a" / "x.txt", tmp_path / "b", tmp_path / "b" / "y.png"])
    assert found.root == tmp_path
    assert [found.source_of(path) for path in found.images] == ["a/x.txt", "b/y.png"]


def test_sources_of_two_roots_stay_apart(tmp_path: Path) -> None:
    touch(tmp_path / "good" / "x.png", tmp_path / "Ungood" / "x.png")
    found = scan([tmp_path / "good", tmp_path / "Ungood"])
    assert [found.source_of(path) for path in found.images] == ["Ungood/x.png", "good/x.png"]


def test_output_folder_is_not_searched_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path / "x.png", tmp_path / "results" / "heatmaps" / "x.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [path.name for path in scan([tmp_path], exclude=[tmp_path / "results"]).images] == ["x.png"]


def test_results_folders_are_known_by_their_content_and_passed_over(tmp_path: Path) -> None:
    ours, other = tmp_path / "a" / "label", tmp_path / "b"
    touch(ours / "scores.jsonl", ours / "heatmaps" / "x.png", ours / "y.png")
    touch(
        other / "scores.jsonl", other / "heatmaps" / "x.png", tmp_path / "c" / "scores.jsonl", tmp_path / "c" / "z.png"
    )
    (ours / "run.json").write_text('{"fingerprint": {}, "self_test": {}, "status": "interrupted"}')
    (other / "run.json").write_text('{"fingerprint": {}}')
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "c" / "run.json")
    found = scan([tmp_path])
    assert [found.source_of(path) for path in found.images] == ["b/heatmaps/x.png", "c/z.png"]
    assert found.ignored["results of qfae-run"] == 1
    assert scan([ours]).images == []
    assert [path.name for path in scan([ours / "y.png"]).images] == ["y.png"]


def test_mask_folder_that_cannot_be_listed_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "Ungood" / "img" / "x.png", tmp_path / "Ungood" / "label" / "x.png")
    genuine_scan, genuine_is_file = os.scandir, Path.is_file

    def forbidden_scan(path: Path) -> Any:
        if Path(path).name == "label":
            raise PermissionError(13, "Permission denied", str(path))
        return genuine_scan(path)

    def forbidden_is_file(path: Path) -> bool:
        if path.parent.name == "label":
            raise PermissionError(13, "Permission denied", str(path))
        return genuine_is_file(path)

    monkeypatch.setattr(os, "scandir", forbidden_scan)
    monkeypatch.setattr(Path, "is_file", forbidden_is_file)
    found = scan([tmp_path])
    assert [found.source_of(path) for path in found.images] == ["Ungood/img/x.png"]
    assert (found.mask_files, found.ignored) == (0, {"mask folder that cannot be listed": 1})
    assert mask_path_for(found.images[0]) is None


def test_missing_input_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        scan([tmp_path / "none"])


def test_a_path_through_a_link_is_what_the_system_takes_it_for(tmp_path: Path) -> None:
    touch(tmp_path / "far" / "deep" / "x.png", tmp_path / "far" / "y.png", tmp_path / "here" / "y.png")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "far" / "deep")
    way = tmp_path / "here" / "link" / ".." / "y.png"
    assert scan([way]).images == [Path(os.path.realpath(tmp_path / "far" / "y.png"))]
    far = Path(os.path.realpath(tmp_path / "far"))
    assert scan([tmp_path / "here" / "link" / ".."]).images == [far / "deep" / "x.png", far / "y.png"]
