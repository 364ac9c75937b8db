"""The results folder: what this tool writes there, when it may, and the record of a run (run.json).

scores.csv  scores.jsonl  heatmaps/  report.html  run.json  inputs.jsonl  metrics.json (only where labels are known)
maps/ (only on request)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qfae_runtime.errors import OutputError
from qfae_runtime.results import ROWS_NAME, RUN_NAME, read_record
from qfae_runtime.writers.heatmap import is_ours
from qfae_runtime.writers.maps import is_map, listed_names
from qfae_runtime.writers.records import Row, drop_torn_line, keep_rows, read_rows, removed
from qfae_runtime.writers.whole import part_of, whole_file

_FILES = ("scores.csv", ROWS_NAME, "report.html", RUN_NAME, "inputs.jsonl", "metrics.json")


@dataclass(frozen=True)
class Finished:
    """How far a run came that is gone on with: `files` with all their `rows`."""

    files: int = 0
    rows: int = 0


class ResultsFolder:
    """Paths inside one output folder. Nothing outside it is ever written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.csv, self.jsonl, self.report, self.run, self.inputs, self.metrics = (root / name for name in _FILES)
        self.heatmaps, self.maps = root / "heatmaps", root / "maps"
        self._held: int | None = None

    def prepare(self, *, overwrite: bool, resume: bool) -> None:
        """Make the folder ready: create it, or clear it of what this tool wrote, or leave it to be resumed.

        Raises:
            OutputError: it holds results and neither `overwrite` nor `resume` was asked for, or holds files of their
                names that are not this tool's, or a link that leads out of it, or cannot be written.

        """
        try:
            self._check(overwrite=overwrite, resume=resume)
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock()
            if overwrite:
                self._clear()
        except OSError as error:
            raise OutputError(f"{self.root}: cannot be written ({error.strerror}); choose another --out") from None

    def _lock(self) -> None:
        """Keep other runs out of this folder until `release`; two that append to the same rows would spoil both."""
        try:
            import fcntl
        except ModuleNotFoundError:  # no Unix
            return
        self._held = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise OutputError(
                f"{self.root}: another qfae-run is writing there; wait for it, or choose another --out"
            ) from None
        except OSError:  # a file system without locks: nothing can be said
            self.release()

    def release(self) -> None:
        """Let other runs in."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _check(self, *, overwrite: bool, resume: bool) -> None:
        for path in self._own_files():
            refuse_link(path)
        present = [path.name for path in self._own_files() if os.path.lexists(path)]
        ours = bool(self.read_run())
        # Rows without a run.json are refused by finished_sources, which knows what is missing.
        if present and not ours and not (resume and self.jsonl.exists()):
            raise OutputError(
                f"{self.root}: holds {', '.join(present)}, but no run.json of qfae-run, so they may be someone else's "
                "and are not touched; move them away or choose another --out"
            )
        if present and not (overwrite or resume):
            raise OutputError(
                f"{self.root}: already holds results ({', '.join(present)}); add --resume to go on with that run, "
                "--overwrite to replace it, or choose another --out"
            )

    def begun(self) -> dict[str, Any]:
        """Return the fingerprint of the run in this folder that has rows; empty where there are none.

        Raises:
            OutputError: there are rows, but no run.json that says whose they are.

        """
        if not self.jsonl.exists():
            return {}
        before = self.read_run().get("fingerprint")
        if not isinstance(before, dict) or not before:
            raise OutputError(
                f"{self.run}: missing or damaged, so the run cannot be resumed; "
                "remove the results or choose another --out"
            )
        return before

    def refuse_another_run(self, changed: list[str]) -> None:
        """Raise OutputError that says what `changed`, if anything did, since the run in this folder began."""
        if changed:
            raise OutputError(
                f"{self.root}: cannot be resumed, this is another run than the one in it:\n  "
                + "\n  ".join(changed)
                + "\nrepeat the options of the first run on the same files in the same place, or start afresh with "
                "--overwrite"
            )

    def last_seen(self) -> float:
        """Return when the run in this folder wrote a row or its record last, in seconds since 1970; 0 if never."""
        times = [0.0]
        for path in (self.run, self.jsonl):
            with suppress(OSError):
                times.append(path.stat().st_mtime)
        return max(times)

    def finished_sources(self, sources: Sequence[str], untrusted_from_row: object = None) -> Finished:
        """Return how far an interrupted run of these files came; an unfinished last row is dropped.

        So are the rows from number `untrusted_from_row` on, counted from 1, if that is a number.

        So are the rows of its last file where they are numbered by frames: nothing tells whether they are all of them,
        unless the run came to its end.

        Raises:
            OutputError: a row is damaged, or of another file than comes next.

        """
        if not self.jsonl.exists():
            return Finished()
        drop_torn_line(self.jsonl)
        if isinstance(untrusted_from_row, int) and untrusted_from_row > 0:
            keep_rows(self.jsonl, untrusted_from_row - 1)
        done, rows, rows_before_last = 0, 0, 0
        last: Row | None = None
        for row in read_rows(self.jsonl):
            if last is None or row.source != last.source:
                if done >= len(sources) or row.source != sources[done]:
                    raise OutputError(
                        f"{self.jsonl}: row {rows + 1} is of another file than the input list has there; "
                        "start afresh with --overwrite"
                    )
                done, rows_before_last = done + 1, rows
            elif row.frame is None or last.frame is None or row.frame != last.frame + 1:
                raise OutputError(
                    f"{self.jsonl}: row {rows + 1} is not the next frame of its file; start afresh with --overwrite"
                )
            last, rows = row, rows + 1
        if last is not None and last.frame is not None and not self.is_finished():
            keep_rows(self.jsonl, rows_before_last)
            return Finished(done - 1, rows_before_last)
        return Finished(done, rows)

    def read_run(self) -> dict[str, Any]:
        """Return run.json; empty when it is missing, illegible or not ours."""
        return read_record(self.run)

    def is_finished(self) -> bool:
        """Say whether the run in this folder came to its end and its files are all there, metrics.json apart."""
        whole = all(path.is_file() for path in (self.csv, self.jsonl, self.report))
        return whole and self.read_run().get("status") == "done"

    def read_metrics(self) -> dict[str, Any] | None:
        """Return metrics.json; None when there is none.

        Raises:
            OutputError: it is illegible.

        """
        try:
            stored = json.loads(self.metrics.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            stored = None
        if not isinstance(stored, dict):
            raise OutputError(f"{self.metrics}: cannot be read or is damaged; start afresh with --overwrite")
        return stored

    def write_json(self, path: Path, values: dict[str, Any]) -> None:
        """Write one JSON file of this folder, atomically."""
        self.write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")

    def write_text(self, path: Path, text: str) -> None:
        """Write one text file of this folder, atomically."""
        self.write_lines(path, [text])

    def write_lines(self, path: Path, lines: Iterable[str]) -> None:
        """Write one text file of this folder, atomically, line by line."""
        with (
            whole_file(path) as temporary,
            temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
        ):
            file.writelines(lines)

    def _own_files(self) -> list[Path]:
        return [*(self.root / name for name in _FILES), self.heatmaps, self.maps]

    def _single_files(self) -> list[Path]:
        # run.json goes last, for without it nothing here would be ours, and a clearing could not be repeated.
        return [self.csv, self.jsonl, self.report, self.inputs, self.metrics, self.run]

    def _clear(self) -> None:
        # A run without a report is not finished: what is half cleared cannot be taken for whole. Then the pictures:
        # scores.jsonl says which maps are ours, and a clearing that is cut short can be repeated.
        self.report.unlink(missing_ok=True)
        maps = listed_names(self.jsonl)
        _remove(self.heatmaps, is_ours)
        _remove(self.maps, lambda path: path.relative_to(self.root).as_posix() in maps and is_map(path))
        for path in self._single_files():
            path.unlink(missing_ok=True)
            part_of(path).unlink(missing_ok=True)


def make_parent(path: Path, inside: Path) -> None:
    """Create the folders above a file that is to be written, none of which may lead out of the folder `inside`.

    Raises:
        OutputError: the file, or a folder between it and `inside`, is a symbolic link; or `inside` is gone.

    """
    if not inside.is_dir():  # made again, it would hold a few pictures and no rows
        raise removed(inside)
    below = [one for one in path.parents if inside in one.parents]
    for one in (path, *below):
        refuse_link(one)
    for folder in reversed(below):
        try:
            folder.mkdir(exist_ok=True)  # one by one: mkdir(parents=True) would make `inside` again
        except (FileNotFoundError, NotADirectoryError):
            raise removed(inside) from None
    if not path.parent.resolve().is_relative_to(inside.resolve()):
        raise OutputError(f"{path}: lies outside {inside}; results stay inside --out, name the images by plain paths")


def refuse_link(path: Path) -> None:
    """Raise OutputError if a path is a symbolic link, dangling or not."""
    if path.is_symlink():
        raise OutputError(f"{path}: is a symbolic link; remove it, results stay inside --out")


def _remove(root: Path, ours: Callable[[Path], bool]) -> None:
    """Remove the files below `root` that are `ours`, and every folder that is empty then."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            path = Path(folder) / name
            if not path.is_symlink() and ours(path):
                path.unlink()
        if not any(Path(folder).iterdir()):
            Path(folder).rmdir()
