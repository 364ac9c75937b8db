"""Output that cannot be written: a full disk, a reader that left, a closed stream: no traceback, the work is done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .test_run import run, table

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="a full device is Linux's")

LOST = "standard output cannot be written (No space left on device)"
COMMANDS = ("qfae_runtime.cli", "qfae_export.cli", "qfae_train.cli", "benchmarks.speed.cli")


def shell(redirection: str, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a command with its streams redirected as a shell does it."""
    line = ["bash", "-c", f'set -o pipefail; "$@" {redirection}', "bash", *map(str, command)]
    return subprocess.run(line, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def program(module: str) -> list[str]:
    return [sys.executable, "-c", f"from {module} import main; main()"]


def scoring(dataset: Path, engine_path: Path, out: Path, *more: str) -> list[object]:
    return [sys.executable, "-m", "qfae_runtime.cli", dataset, "--engine", engine_path, "--out", out, *more]


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_on_a_full_disk(module: str, option: str) -> None:
    done = shell("> /dev/full", *program(module), option)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert LOST in line
    assert "free some space there" in line


@pytest.mark.parametrize("module", COMMANDS)
def test_wrong_usage_where_nothing_can_be_said(module: str) -> None:
    for redirection in ("> /dev/full 2> /dev/full", ">&- 2>&- <&-"):
        assert shell(redirection, *program(module), "--no-such-option").returncode == 2


@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_a_reader_that_leaves_is_no_fault(dataset: Path, engine_path: Path, tmp_path: Path, reader: str) -> None:
    for command in (
        [*program("qfae_runtime.cli"), "--help"],
        scoring(dataset, engine_path, tmp_path / "o"),
    ):
        done = shell(f"| {reader}", *command)
        assert done.returncode == 0
        assert "Traceback" not in done.stderr
        assert "Broken pipe" not in done.stderr


@pytest.mark.parametrize(
    ("redirection", "code"),
    [
        ("> /dev/full", 1),
        ("2> /dev/full", 0),
        ("> /dev/full 2> /dev/full", 1),
        (">&-", 0),
        ("2>&-", 0),
        (">&- 2>&-", 0),
        ("<&- >&- 2>&-", 0),
    ],
)
def test_a_run_is_the_same_whatever_it_can_say(
    dataset: Path, engine_path: Path, tmp_path: Path, redirection: str, code: int
) -> None:
    run(dataset, engine_path, tmp_path / "whole")
    done = shell(redirection, *scoring(dataset, engine_path, tmp_path / "out", "--json"))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert (LOST in done.stderr) == (redirection == "> /dev/full")
    assert table(tmp_path / "out") == table(tmp_path / "whole")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "done"
    if redirection.startswith(("2>", "<&")):
        assert "qfae-run" not in done.stdout  # what was lost did not come out elsewhere


def test_a_closed_stream_does_not_become_the_next_file(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    """What is printed would stand among the rows."""
    script = (
        "import os, sys\nfrom qfae_runtime import streams\n"
        "with streams.lasting_streams('x'):\n"
        "    descriptor = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\n"
        "    assert descriptor > 2, descriptor\n"
        "    os.write(1, b'stray'); os.write(2, b'stray'); print('stray'); print('stray', file=sys.stderr)\n"
    )
    for redirection in (">&-", "2>&-", "<&- >&- 2>&-"):
        file = tmp_path / "rows"
        assert shell(redirection, sys.executable, "-c", script, file).returncode == 0
        assert file.read_bytes() == b""


def test_failures_keep_their_code(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    done = shell("> /dev/full", *scoring(dataset, tmp_path / "none.onnx", tmp_path / "out"))
    assert done.returncode == 1
    assert "no such engine file" in done.stderr
    assert LOST not in done.stderr  # nothing had been said on stdout
    (dataset / "good" / "img" / "damaged.png").write_bytes(b"\x89PNG")
    assert shell("", *scoring(dataset, engine_path, tmp_path / "three")).returncode == 3
    done = shell("> /dev/full", *scoring(dataset, engine_path, tmp_path / "both"))
    assert (done.returncode, LOST in done.stderr) == (1, True)
    assert len(os.listdir(tmp_path / "both")) > 3  # noqa: PTH208
