"""A backend that never returns: Ctrl-C and SIGTERM end the command all the same, and what was written is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from qfae_runtime.interruption import GRACE_S

from .test_run import run, table

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")

# A mutex that is locked twice: a call that no signal interrupts, without Python's lock.
STUCK = """
import ctypes, sys, threading
from qfae_runtime import interruption
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
interruption.GRACE_S, interruption._INSISTS_AFTER_S, interruption._GRACE_INSISTED_S = map(float, sys.argv[1:4])
libc, mutex, genuine, runs = ctypes.CDLL(None), ctypes.create_string_buffer(256), OnnxRuntimeEngine.run, []
def stuck(self, images, maps=True):
    runs.append(len(images))
    if len(runs) == int(sys.argv[4]):
        libc.pthread_mutex_lock(mutex)
        # By then the main thread is in that call; a signal before it would be taken in order.
        threading.Timer(0.3, print, ["stuck"], {"flush": True}).start()
        libc.pthread_mutex_lock(mutex)
    return genuine(self, images, maps)
OnnxRuntimeEngine.run = stuck
from qfae_runtime.cli import main
main(sys.argv[5:])
"""


def heard() -> None:
    """A suite that a script runs in the background has Ctrl-C ignored, and so has whatever it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(at_run: int, *arguments: object, grace: tuple[float, float, float]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STUCK, *map(str, grace), str(at_run), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    return process


@pytest.fixture
def arguments(dataset: Path, engine_path: Path, tmp_path: Path) -> tuple[object, ...]:
    run(dataset, engine_path, tmp_path / "before")  # the self-test is remembered
    return (dataset, "--engine", engine_path, "--out", tmp_path / "out", "--batch-size", 1, "--no-maps")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_it_after_a_while(
    number: signal.Signals, arguments: tuple[object, ...], dataset: Path, engine_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    self_test = partial(run, dataset, engine_path, batch_size=1, maps=False)
    self_test(tmp_path / "one")
    process = started(5, *arguments, grace=(0.3, 60, 60))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == (
        "qfae-run: what it was at, a call into the backend perhaps, did not return; 4 of 12 files have whole rows in "
        f"{out / 'scores.jsonl'}; go on with the same command and --resume"
    )
    assert "Traceback" not in errors
    record = json.loads((out / "run.json").read_text())
    assert (record["status"], record["counts"]["rows"]) == ("interrupted", 4)
    assert record["seconds"]["scoring"] > 0.2
    assert len((out / "scores.jsonl").read_bytes().splitlines()) == 4
    assert self_test(out, resume=True).counts.resumed == 4
    assert table(out) == table(tmp_path / "one")


def test_a_second_signal_ends_it_sooner(
    arguments: tuple[object, ...], dataset: Path, engine_path: Path, tmp_path: Path
) -> None:
    run(dataset, engine_path, tmp_path / "one", batch_size=1, maps=False)
    process = started(3, *arguments, grace=(600, 0, 0.2))
    errors = None
    while errors is None:  # two that arrive together count as one
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            _, errors = process.communicate(timeout=0.5)
    assert process.returncode == 130, errors
    assert "2 of 12 files have whole rows" in errors


def test_two_signals_at_once_are_one(
    arguments: tuple[object, ...], dataset: Path, engine_path: Path, tmp_path: Path
) -> None:
    """A terminal and a wrapper pass on the same Ctrl-C."""
    run(dataset, engine_path, tmp_path / "one", batch_size=1, maps=False)
    process = started(3, *arguments, grace=(1.5, 30, 0))
    for _ in range(3):
        process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.7)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_stuck_in_the_self_test(arguments: tuple[object, ...], tmp_path: Path) -> None:
    process = started(1, *arguments, "--selftest", grace=(0.3, 60, 60))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (130, False)
    assert "did not return" in errors
    assert not (tmp_path / "out").exists()


def test_an_end_in_order_may_take_its_time(tmp_path: Path) -> None:
    """The main thread has taken the signal: nothing is forced, however long it clears up."""
    script = (
        "import os, signal, time\nfrom qfae_runtime import interruption\n"
        "interruption.GRACE_S = 0.1\n"
        "try:\n"
        "    with interruption.ended_in_order('x'):\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "            time.sleep(60)\n"
        "        except KeyboardInterrupt:\n"
        "            time.sleep(0.6)\n"
        "            print('cleared up')\n"
        "            raise\n"
        "except KeyboardInterrupt:\n"
        "    print('in order')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "cleared up\nin order\n")


def test_what_was_ignored_stays_ignored_and_handlers_are_put_back() -> None:
    script = (
        "import os, signal\nfrom qfae_runtime.interruption import ended_in_order\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with ended_in_order('x'):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "assert signal.set_wakeup_fd(-1) == -1\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_grace_is_shorter_than_that_of_container_runtimes() -> None:
    assert GRACE_S < 10
