"""The files of a run as jobs: what each is called, its label, and where its pictures go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qfae_runtime.layout import Scan, label_of
from qfae_runtime.pipeline import Job
from qfae_runtime.writers.heatmap import heatmap_names
from qfae_runtime.writers.maps import map_name
from qfae_runtime.writers.places import Place


class Jobs:
    """Makes jobs when they are asked for: those of a hundred thousand files would be most of a run's memory.

    `sources` are the names of `found.images` in rows. `labels` go by a file's own name below the root; None: folder
    names tell. Without the folder `heatmaps` or `maps`, none are drawn or kept.
    """

    def __init__(
        self,
        found: Scan,
        sources: Sequence[str],
        labels: Mapping[str, str] | None,
        heatmaps: Path | None,
        maps: Path | None,
    ) -> None:
        self._found, self._sources, self._labels = found, sources, labels
        self._heatmaps, self._maps = heatmaps, maps
        self._pictures = heatmap_names(sources) if heatmaps is not None else []

    def __len__(self) -> int:
        return len(self._sources)

    def of(self, number: int) -> Job:
        """Return the job of one file."""
        path, source = self._found.images[number], self._sources[number]
        drawn = Place(self._heatmaps, self._pictures[number], source) if self._heatmaps is not None else None
        saved = Place(self._maps, map_name(source), source) if self._maps is not None else None
        return Job(path, source, self._label(path), drawn, saved)

    def from_number(self, first: int, again: int) -> Iterator[Job]:
        """Yield the jobs from number `again` on; of those before number `first`, nothing is drawn."""
        for number in range(again, first):
            path = self._found.images[number]
            yield Job(path, self._sources[number], self._label(path))
        for number in range(first, len(self)):
            yield self.of(number)

    def labelled(self) -> bool:
        """Say whether any file has a label."""
        return any(self._label(path) is not None for path in self._found.images)

    def _label(self, path: Path) -> str | None:
        if self._labels is not None:
            return self._labels.get(self._found.source_of(path))
        return label_of(path, self._found.root)
