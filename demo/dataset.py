"""Write the demonstration data set in the BMAD folder layout.

    python -m demo.dataset --out build/demo/data                     everything
    python -m demo.dataset --out build/demo/data --splits test  what `make demo` needs

    train/good/img/0000.png        normal slices
    valid|test/good/img/0000.png   normal slices
    valid|test/Ungood/img/0000.png slices with one lesion, its mask in Ungood/label/ under the same name

A slice is a function of (data seed, split, class, number) alone, so that splits share nothing, any part can be made
without the rest, and two machines make the same files.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from demo.slices import add_lesion, finish, normal_slice

SPLITS = {"train": 1, "valid": 2, "test": 3}
"""Numbers that keep the random streams of the splits apart."""

COUNTS = {
    ("train", "good"): 24000,
    ("valid", "good"): 60,
    ("valid", "Ungood"): 60,
    ("test", "good"): 100,
    ("test", "Ungood"): 100,
}


@dataclass(frozen=True)
class Item:
    """One slice to write."""

    root: Path
    data_seed: int
    split: str
    label: str
    number: int

    def stream(self, purpose: int) -> list[int]:
        """Return the seed of one of this slice's random streams."""
        return [self.data_seed, SPLITS[self.split], int(self.label == "Ungood"), self.number, purpose]


def write_item(item: Item) -> None:
    """Write one slice, and its mask if it has a lesion. An existing file is replaced by the same bytes."""
    folder = item.root / item.split / item.label
    image = normal_slice(item.stream(0))
    if item.label == "Ungood":
        image, mask = add_lesion(image, item.stream(1))
        _save(folder / "label" / f"{item.number:04d}.png", mask.astype(np.uint8) * 255)
    _save(folder / "img" / f"{item.number:04d}.png", finish(image, item.stream(2)))


def _save(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=3)


def items(
    root: Path,
    data_seed: int,
    splits: list[str],
    counts: dict[tuple[str, str], int] = COUNTS,
) -> list[Item]:
    """List the slices of the given splits."""
    return [
        Item(root, data_seed, split, label, number)
        for (split, label), count in counts.items()
        if split in splits
        for number in range(count)
    ]


def write(work: list[Item], processes: int = 2) -> None:
    """Write all items with a progress bar."""
    with Progress() as progress, ProcessPoolExecutor(processes) as pool:
        task = progress.add_task("demo slices", total=len(work))
        for _ in pool.map(write_item, work, chunksize=8):
            progress.advance(task)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; replaced if it exists.")
@click.option("--splits", default="train,valid,test", show_default=True, help="Which splits to write.")
@click.option("--data-seed", default=0, show_default=True, help="Another number gives another data set.")
@click.option("--processes", default=2, show_default=True, help="Worker processes.")
def main(out: Path, splits: str, data_seed: int, processes: int) -> None:
    """Write the demonstration slices in the BMAD layout."""
    chosen = splits.split(",")
    unknown = sorted(set(chosen) - set(SPLITS))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}; accepted are {', '.join(SPLITS)}", param_hint="--splits")
    for split in chosen:
        shutil.rmtree(out / split, ignore_errors=True)
    write(items(out, data_seed, chosen), processes)
    click.echo(f"demo slices in {out}")


if __name__ == "__main__":
    main()
