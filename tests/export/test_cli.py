"""The command as it is typed: output, exit codes, and every fault in one sentence."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qfae_export.export
from qfae_export.cli import main
from qfae_export.export import Exported
from qfae_export.parity import pytorch_scores
from qfae_runtime.engines.base import Scores
from qfae_runtime.manifest import Manifest
from tests.export.tiny import checkpoint_file, picture_folder, pictures


class Ran:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    code = left.value.code
    return Ran(code if isinstance(code, int) else 0, printed.out, printed.err)


def fault_of(ran: Ran) -> str:
    """The one line that says what was wrong, below the lines that say what was being done."""
    lines = [line.removeprefix("qfae-export: ") for line in ran.err.splitlines()]
    steps = ("reading the", "scoring ", "writing the", "comparing ")
    [fault] = [line for line in lines if not line.startswith(steps)]
    return fault


def test_another_process_writes_the_same_bytes(exported: Exported, checkpoint: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "qfae_export.cli", "--ckpt", checkpoint, "--out", tmp_path / "my engines"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    engine = tmp_path / "my engines" / "tiny.onnx"
    assert engine.read_bytes() == exported.engine.read_bytes()
    assert done.stderr.splitlines() == [
        "qfae-export: reading the checkpoint",
        "qfae-export: scoring 9 images with PyTorch float32, the reference",
        "qfae-export: writing the ONNX file",
        "qfae-export: comparing ONNX Runtime with PyTorch",
    ]
    lines = done.stdout.splitlines()
    assert "largest error on 9 images" in lines[0]
    assert "measured on: validation images stored in tiny.pt" in lines
    assert lines[-1] == f"next: qfae-run IMAGES --engine '{engine}' --out results/"


@pytest.mark.usefixtures("quick")
def test_success_shows_table_files_and_next_command(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    folder = picture_folder(tmp_path / "scans", 8)
    ran = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--parity-images", folder, "--max-batch", 5)
    assert ran.code == 0
    for text in ("batch 1", "batch 3", "batch 5", "score, relative", "reconstruction, grey levels", "0.0001"):
        assert text in ran.out
    assert "measured on: 8 of the 8 images in scans/" in ran.out
    assert "largest batch" not in ran.out  # it was asked for
    assert f"wrote {tmp_path / 'tiny.onnx'} (" in ran.out
    assert ran.out.endswith(f"next: qfae-run IMAGES --engine {tmp_path / 'tiny.onnx'} --out results/\n")


@pytest.mark.usefixtures("quick")
def test_default_folder_is_the_checkpoints_and_a_capped_batch_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ran = run(capsys, "--ckpt", checkpoint_file(tmp_path / "tiny.pt", parity_images=pictures(4)))
    assert ran.code == 0
    assert (tmp_path / "tiny.onnx").is_file()
    assert Manifest.load(tmp_path / "tiny.json").max_batch == 4
    assert "largest batch 4, the number of images measured on; for a larger one pass --parity-images" in ran.out
    again = run(capsys, "--ckpt", tmp_path / "tiny.pt")
    assert again.code == 1
    assert fault_of(again).endswith("pass --overwrite to replace it, or another --out or --name")
    assert run(capsys, "--ckpt", tmp_path / "tiny.pt", "--overwrite").code == 0


@pytest.mark.usefixtures("quick")
def test_disagreement_shows_the_table_and_exits_1(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(scorer: object, images: object) -> Scores:
        scores = pytorch_scores(scorer, images)  # type: ignore[arg-type]
        scores.anomaly_map[3, 10, 20] += 2e-4
        return scores

    monkeypatch.setattr(qfae_export.export, "pytorch_scores", shifted)
    ran = run(capsys, "--ckpt", checkpoint, "--out", tmp_path / "out")
    assert ran.code == 1
    assert "largest error on 9 images" in ran.err
    # 2e-4 and the engine's own rounding
    said = r"anomaly_map: absolute error 0\.000(2|20\d|19\d) exceeds 0\.0001 at image 3, y 10, x 20: "
    assert re.search(said, ran.err)
    assert "(image 3: image 3 stored in tiny.pt)" in ran.err
    assert "next:" not in ran.out
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_and_damaged_checkpoints_are_one_sentence(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:20000])
    (tmp_path / "bare-pickle.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"format": 1, "config": Hostile()}, tmp_path / "hostile.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    names = ("missing", "text", "empty", "cut", "bare-pickle", "hostile", "other")
    for name in names:
        ran = run(capsys, "--ckpt", tmp_path / f"{name}.pt", "--out", tmp_path / "out")
        assert ran.code == 1, name
        assert fault_of(ran).startswith(f"checkpoint '{tmp_path / name}.pt': "), ran.err
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


def test_all_usage_faults_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ran = run(capsys, "--max-bach=3", "x.pt", "--max-batch", "0", "--out", tmp_path / "file", "--name", "../up")
    assert ran.code == 2
    assert ran.err.splitlines() == [
        "qfae-export: --max-bach: no such option; did you mean --max-batch?",
        "qfae-export: 'x.pt': unexpected; everything is named by an option",
        "qfae-export: --ckpt: missing; name the checkpoint that qfae-train wrote",
        "qfae-export: --max-batch: got '0', expected a whole number in 1..4096",
        "qfae-export: --name: '../up' cannot name an engine; pass a --name of letters, digits and _ . + -",
        f"qfae-export: --out: {tmp_path / 'file'} is a file; name a folder",
        "Try 'qfae-export --help'.",
    ]


def test_too_large_a_batch_and_a_missing_folder(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    ran = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--max-batch", 10)
    assert (ran.code, fault_of(ran)[:61]) == (1, "--max-batch 10: the largest batch is measured with 10 differe")
    ran = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--parity-images", tmp_path / "nowhere")
    assert (ran.code, "no such folder" in fault_of(ran)) == (1, True)


def test_help_is_quick_and_ends_with_an_example() -> None:
    code = "import sys; from qfae_export.cli import command; assert not {'torch', 'onnx'} & sys.modules.keys(); " + (
        "command.main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("Example:\n    qfae-export --ckpt demo.pt --out engines/\n")
    assert "--fp16" not in done.stdout  # what does not work yet is not offered


def test_a_missing_package_names_the_extra(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "qfae_export.export", None)
    monkeypatch.delattr(qfae_export, "export", raising=False)
    monkeypatch.setattr("qfae_export.cli._EXTRA", ("qfae_export",))
    ran = run(capsys, "--ckpt", checkpoint)
    assert ran.code == 1
    assert fault_of(ran).endswith("which is not installed: pip install 'qfae[export]'")


def test_interruption_leaves_nothing(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(qfae_export.export, "write_onnx", interrupted)
    ran = run(capsys, "--ckpt", checkpoint, "--out", tmp_path / "out")
    assert (ran.code, fault_of(ran)) == (130, "interrupted; nothing was written")
    assert list((tmp_path / "out").iterdir()) == []
