"""What holds for every test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

# Two processes share two processors, and models of a few thousand weights are computed by one thread: others only wait
# for it. Said before torch is imported, and handed on to the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def leave_gradients_on() -> Iterator[None]:
    """Nothing may switch torch's gradients off for the whole process: whoever trains in it next could not."""
    yield
    if torch := sys.modules.get("torch"):
        switched_on = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        assert switched_on, "gradients were left switched off"
