"""float32 keeps its digits while it matters, and PyTorch's settings are given back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from qfae_export.reference import pytorch_scores
from qfae_train import fit as fit_module
from qfae_train.evaluate import evaluate

from . import tiny

IN_A_PROCESS = """
import torch
from qfae_train.float32 import whole_float32

new = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
CHANGE

def states():
    try:
        return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    except RuntimeError:
        return [one.fp32_precision for one in new]

before = states()
try:
    with whole_float32():
        assert 'tf32' not in [one.fp32_precision for one in new]
        1 / 0
except ZeroDivisionError:
    pass
assert states() == before, (before, states())
print("given back")
"""


@pytest.mark.parametrize(
    "change",
    [
        "pass",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cudnn.allow_tf32 = False",
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
        "for one in new: one.fp32_precision = 'tf32'",
    ],
)
def test_settings_are_given_back(change: str) -> None:
    """In a process of its own, for PyTorch's older and newer settings stand in each other's way."""
    program = IN_A_PROCESS.replace("CHANGE", change)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "given back\n", done.stderr


class _SeenError(Exception):
    pass


def seen(*_: Any, **__: Any) -> Any:
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, False)
    raise _SeenError


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 on, which other tests may have left off."""
    settings: Any = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [one.allow_tf32 for one in settings]
    for one in settings:
        one.allow_tf32 = True
    yield
    for one, was in zip(settings, before, strict=True):
        one.allow_tf32 = was


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("what", ["training", "evaluation", "reference"])
def test_where_scores_are_made(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "_start", seen)
    scorer = torch.nn.Linear(1, 1)
    monkeypatch.setattr(scorer, "forward", seen)
    split: Any = type("Split", (), {"__len__": lambda self: 1, "rgb": lambda self, part: torch.zeros(1, 1)})()
    calls: dict[str, Callable[[], object]] = {
        "training": lambda: fit_module.fit(tiny.config(), tmp_path, tmp_path / "x.pt"),
        "evaluation": lambda: evaluate(cast(Any, scorer), split, 1),
        "reference": lambda: pytorch_scores(seen, np.zeros((1, 2, 2, 3), np.uint8)),
    }
    with pytest.raises(_SeenError):
        calls[what]()
