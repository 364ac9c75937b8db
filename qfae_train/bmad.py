"""The BMAD benchmark's data sets, as published: names their folders go by, and how many images each split has.

Source: supplement 1.5, Tables 3, 5 and 7.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One published data set. Test images are anomalous and normal ones; the sizes are (height, width) in pixels."""

    name: str
    presets: tuple[str, ...]
    """Shipped configurations for it, the published best first."""
    folders: tuple[str, ...]
    """Names of the root folder in the archives people have, compared without case, hyphens and underscores."""
    train: int
    valid: int
    test_ungood: int
    test_good: int
    size: tuple[int, int]
    image_auroc: tuple[float, float]
    """Mean and standard deviation over five seeds, in percent (Table 7)."""

    @property
    def counts(self) -> dict[str, int]:
        """Images of each split."""
        return {"train": self.train, "valid": self.valid, "test": self.test_ungood + self.test_good}


BENCHMARKS = {
    one.name: one
    for one in (
        Benchmark("BraTS2021", ("brats-dual", "brats"), ("brats2021", "brats2021slice", "brats", "brain", "brainad"),
                  7500, 83, 3075, 640, (240, 240), (94.3, 0.18)),
        Benchmark("LiverCT", ("liver",), ("liverct", "liver", "ctliver", "liverad", "histliver"),
                  1542, 166, 660, 833, (512, 512), (65.5, 1.96)),
        Benchmark("RESC", ("resc",), ("resc", "retinaresc", "retinarescad", "rescad", "octresc"),
                  4297, 115, 764, 1041, (512, 1024), (91.8, 0.55)),
        Benchmark("RSNA", ("rsna",), ("rsna", "chest", "chestrsna", "chestad", "rsnaad"),
                  8000, 1490, 16413, 781, (1024, 1024), (83.8, 0.46)),
    )
}  # fmt: skip


def benchmark_of_folder(name: str) -> Benchmark | None:
    """Return the data set that a root folder of that name holds, by the names its archives go by; None if unknown."""
    plain = name.lower().replace("-", "").replace("_", "").replace(" ", "")
    return next((one for one in BENCHMARKS.values() if plain in one.folders), None)


def held_against(name: str, split: str, count: int) -> str:
    """Return what is to be said of a split's number of images: the published one beside it, where one is known."""
    published = BENCHMARKS[name].counts[split] if name else None
    if published is None:
        return f"{split}: {count:,} images"
    verdict = "as published" if count == published else f"published are {published:,}"
    return f"{split}: {count:,} images ({name}: {verdict})"
