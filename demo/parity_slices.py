"""Write the slices that qfae-export measures on where it is given no images: qfae_export/parity_slices.npz.

    python -m demo.parity_slices

Half of them are normal, half carry a lesion, made as the demonstration's are, of a data seed of their own.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from demo.slices import add_lesion, finish, normal_slice

TARGET = Path("qfae_export/parity_slices.npz")

COUNT = 32

SEED = 7919
"""No data seed of the demonstration: these slices are in none of its splits."""


def parity_slices(count: int = COUNT) -> NDArray[np.uint8]:
    """Return the slices, uint8 (count, 240, 240), grey; every second one has a lesion."""
    slices = []
    for number in range(count):
        image = normal_slice([SEED, number, 0])
        if number % 2:
            image, _ = add_lesion(image, [SEED, number, 1])
        slices.append(finish(image, [SEED, number, 2]))
    return np.stack(slices)


@click.command()
def main() -> None:
    """Write the slices that qfae-export measures on by default."""
    with TARGET.open("wb") as file:
        np.savez_compressed(file, slices=parity_slices())
    click.echo(f"{COUNT} slices in {TARGET} ({TARGET.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
