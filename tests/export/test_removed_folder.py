"""--out taken away during an export: one sentence that accuses neither the engine nor the backend."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import qfae_export.export
from qfae_export.export import Options, export
from qfae_runtime.errors import OutputError


def remove(out: Path) -> None:
    shutil.rmtree(out)


def replace_by_a_file(out: Path) -> None:
    shutil.rmtree(out)
    out.write_text("mine")


def replace_by_a_folder(out: Path) -> None:
    shutil.rmtree(out)
    out.mkdir()


def remove_what_is_in_it(out: Path) -> None:
    for path in out.iterdir():
        shutil.rmtree(path)


def move(out: Path) -> None:
    out.rename(out.with_name("moved"))


STEPS = ("scoring", "writing", "comparing")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("take", [remove, replace_by_a_file, replace_by_a_folder, remove_what_is_in_it, move])
def test_at_every_step(take: Callable[[Path], None], step: str, checkpoint: Path, tmp_path: Path) -> None:
    out, taken = tmp_path / "out", list[str]()

    def say(text: str) -> None:
        if text.startswith(step) and not taken:
            taken.append(text)
            take(out)

    with pytest.raises(OutputError) as caught:
        export(Options(checkpoint, out), say)
    assert taken
    assert str(caught.value) == (
        f"{out}: was removed, moved or replaced while the export was writing there, so nothing was exported; leave it "
        "alone until the export has ended, and run the command again"
    )
    assert out.read_text() == "mine" if take is replace_by_a_file else not out.exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.EACCES, "let yourself write there or choose another --out"),
        (errno.EROFS, "it is mounted read-only: choose another --out"),
    ],
)
def test_made_read_only(
    number: int, cure: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(qfae_export.export, "save_golden", refuse)
    with pytest.raises(OutputError) as caught:
        export(Options(checkpoint, tmp_path / "out"))
    assert str(caught.value) == f"{tmp_path / 'out'}: cannot be written (no); nothing was exported: {cure}"
    assert not (tmp_path / "out").exists()
