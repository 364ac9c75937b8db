"""The slices that come with qfae-export are what their recipe makes."""

from __future__ import annotations

import numpy as np

from demo.parity_slices import COUNT, TARGET, parity_slices
from tests.commands import ROOT


def test_the_shipped_slices_are_the_recipes() -> None:
    with np.load(ROOT / TARGET, allow_pickle=False) as stored:
        shipped = stored["slices"]
    assert shipped.shape == (COUNT, 240, 240)
    made = parity_slices(4)
    # Another processor may round a grey level otherwise.
    assert np.abs(made.astype(int) - shipped[:4].astype(int)).max() <= 1
    assert (made != shipped[:4]).mean() < 1e-3
