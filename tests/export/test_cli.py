"""The command as it is typed: output, exit codes, and every fault in one sentence."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qfae_export.chain
import qfae_export.export
from qfae_export import reference
from qfae_export.cli import main
from qfae_export.export import Exported
from qfae_export.reference import Measured64
from qfae_runtime.manifest import Manifest
from tests.export.tiny import checkpoint_file, picture_folder


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
    steps = ("reading the", "scoring ", "writing ", "comparing ")
    [fault] = [line for line in lines if not line.startswith(steps)]
    return fault


def test_another_process_writes_the_same_bytes(exported: Exported, checkpoint: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
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
        "qfae-export: scoring 46 images with PyTorch in FP64 and FP32, the reference",
        "qfae-export: writing tiny.onnx",
        "qfae-export: comparing tiny.onnx in ONNX Runtime with PyTorch",
    ]
    lines = done.stdout.splitlines()
    assert "against PyTorch FP64 on 32 images and 14 stress images, contract fp32" in lines[0]
    assert any("graph FP32 →" in line for line in lines)
    assert "measured on: validation images stored in tiny.pt" in lines
    assert lines[-1] == f"next: qfae-run IMAGES --engine '{engine}' --out results/"


@pytest.mark.usefixtures("quick")
def test_success_shows_table_files_and_next_command(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    folder = picture_folder(tmp_path / "scans", 32)
    ran = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--parity-images", folder, "--max-batch", 5)
    assert ran.code == 0
    for text in (
        "PyTorch FP32",
        "all images",
        "batch 1",
        "batch 2 to 5, worst",
        "score error, typical / PyTorch's own",
        "reconstruction, grey levels",
        "≤ 5",
        "and 14 stress images: constants, ramps, noise, colours, bright corners and borders",
    ):
        assert text in ran.out
    assert "measured on: 32 of the 32 images in scans/" in ran.out
    assert "largest batch" not in ran.out  # it was asked for
    assert f"wrote {tmp_path / 'tiny.onnx'} (" in ran.out
    assert ran.out.endswith(f"next: qfae-run IMAGES --engine {tmp_path / 'tiny.onnx'} --out results/\n")


@pytest.mark.usefixtures("quick")
def test_default_folder_is_the_checkpoints_and_a_capped_batch_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qfae_export.export.DEFAULT_MAX_BATCH", 64)
    monkeypatch.setattr("qfae_export.cli.DEFAULT_MAX_BATCH", 64)
    ran = run(capsys, "--ckpt", checkpoint_file(tmp_path / "tiny.pt"))
    assert ran.code == 0
    assert (tmp_path / "tiny.onnx").is_file()
    assert Manifest.load(tmp_path / "tiny.json").max_batch == 32
    assert "largest batch 32, the number of images measured on; for a larger one pass --parity-images" in ran.out
    again = run(capsys, "--ckpt", tmp_path / "tiny.pt")
    assert again.code == 1
    assert fault_of(again).endswith("pass --overwrite to replace it, or another --out or --name")
    assert run(capsys, "--ckpt", tmp_path / "tiny.pt", "--overwrite").code == 0


@pytest.mark.usefixtures("quick")
def test_disagreement_shows_the_table_and_exits_1(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(*arguments: Any) -> Measured64:
        measured = reference.reference_of(*arguments)
        measured.reference.scores.anomaly_map[3, 10, 20] += 2e-3
        return measured

    monkeypatch.setattr(qfae_export.chain, "reference_of", shifted)
    ran = run(capsys, "--ckpt", checkpoint, "--out", tmp_path / "out")
    assert ran.code == 1
    assert "on 32 images and 14 stress images, contract fp32" in ran.err
    said = r"map error, worst pixel / PyTorch's own: [\d.e+]+ exceeds \d+, worst at image 3, y 10, x 20 "
    assert re.search(said + r"\(image 3 stored in tiny\.pt\): expected", ran.err)
    assert "next:" not in ran.out
    assert not (tmp_path / "out").exists()


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
        "qfae-export: --max-batch: got '0', expected a whole number in 1..4096",
        "qfae-export: --ckpt: missing; name the checkpoint that qfae-train wrote",
        "qfae-export: --name: '../up' cannot name an engine; pass a --name of letters, digits and _ . + -",
        f"qfae-export: --out: {tmp_path / 'file'} is a file; name a folder",
        "Try 'qfae-export --help'.",
    ]


def test_too_large_a_batch_and_a_missing_folder(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    ran = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--max-batch", 33)
    assert (ran.code, fault_of(ran)[:61]) == (1, "--max-batch 33: the largest batch is measured with 33 differe")
    ran = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--parity-images", tmp_path / "nowhere")
    assert (ran.code, "no such folder" in fault_of(ran)) == (1, True)


def test_help_is_quick_and_ends_with_an_example() -> None:
    code = "import sys; from qfae_export.cli import command; assert not {'torch', 'onnx'} & sys.modules.keys(); " + (
        "command.main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("qfae-export verify --engine brats.onnx --ckpt brats.pt\n")


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
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "faults"),
    [
        (("--fp15",), ["--fp15: no such option; did you mean --fp16?", "--ckpt: missing; name the checkpoint that"]),
        (
            ("--ckpt", "a.pt", "--format", "engine", "--part", "half", "--bisect"),
            [
                "--format: got 'engine', accepted are onnx, plan, rtx-plan",
                "--part: got 'half', accepted are full, reconstruction, scorer",
                "--bisect: finds what must stay FP32 in an FP16 engine; pass --fp16 too",
            ],
        ),
        (
            ("--ckpt", "a.pt", "--random-weights", "x"),
            ["--random-weights: got 'x', expected a seed, a whole number in 0..999999999"],
        ),
        (("--random-weights", "1"), ["--random-weights: of which model? Name it with --preset or --config"]),
        (
            ("--onnx", "a.fp16.onnx", "--ckpt", "a.pt", "--fp16", "--name", "b", "--format", "onnx"),
            [
                "--ckpt, --onnx: give one of them",
                "--name: means nothing with --onnx, whose plan is written beside it as its manifest says",
                "--fp16: means nothing with --onnx, whose plan is written beside it as its manifest says",
                "--format: onnx is what --onnx names already; accepted are plan, rtx-plan",
            ],
        ),
    ],
)
def test_contradictions(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], faults: list[str]) -> None:
    ran = run(capsys, *arguments)
    assert ran.code == 2
    lines = ran.err.splitlines()[:-1]
    assert len(lines) == len(faults)
    for line, fault in zip(lines, faults, strict=True):
        assert line.startswith(f"qfae-export: {fault}")
