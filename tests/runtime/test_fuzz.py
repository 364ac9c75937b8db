"""Damaged files of every format: pictures or a reason, in bounded time and memory. More of them: fuzz.py."""

from __future__ import annotations

import pytest

from .fuzz import MEMORY_BYTES, SECONDS_PER_FILE, mutant, read_all, seeds

pytest.importorskip("resource", reason="memory is measured by POSIX's means")


def test_what_is_mutated_can_be_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Were the originals refused, so would be all mutants, and nothing would be tested."""
    from qfae_runtime.readers import read_slices

    path = tmp_path_factory.mktemp("seeds") / "x"
    pictures = {}
    for name, content in seeds().items():
        path.write_bytes(content)
        pictures[name] = sum(1 for _ in read_slices(path, name))
    assert min(pictures.values()) == 1
    assert pictures["tiff-pages"] == pictures["webp-frames"] == pictures["dicom-frames"] == 3
    assert pictures["nifti.gz"] == 7


def test_five_hundred_damaged_files() -> None:
    found = read_all(range(500), seed=1)
    assert found.faults == []
    assert found.crashed_decoders == []
    assert found.files == sum(found.ended.values()) == 500
    assert min(found.ended["read"], found.ended["refused"]) > 50
    assert found.longest_seconds < SECONDS_PER_FILE, found.longest
    assert found.peak_bytes < MEMORY_BYTES


def test_mutants_are_the_same_every_time() -> None:
    originals = seeds()
    assert mutant(originals, 1, 77) == mutant(originals, 1, 77)
    assert mutant(originals, 1, 77) != mutant(originals, 2, 77)
