"""What holds for every test."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two processes share two processors, and models of a few thousand weights are computed by one thread: others only wait
# for it. Said before torch is imported, and handed on to the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what fixtures of many tests remember of self-tests out of the home of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("verdicts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QFAE_CACHE", str(folder / "shared"))
        yield folder


_tests = itertools.count()


@pytest.fixture(autouse=True)
def cache(verdicts: Path) -> Iterator[Path]:
    """Where the test remembers self-tests: it must not find that an engine of the same bytes passed in another one."""
    folder = verdicts / str(next(_tests))
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test that undoes its changes keeps this one
        patch.setenv("QFAE_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def leave_gradients_on() -> Iterator[None]:
    """Nothing may switch torch's gradients off for the whole process: whoever trains in it next could not."""
    yield
    if torch := sys.modules.get("torch"):
        switched_on = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        assert switched_on, "gradients were left switched off"
