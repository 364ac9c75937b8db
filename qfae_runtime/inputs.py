"""inputs.jsonl: the files of a run as they were when it began, one line each, in the order of the rows.

A run is gone on with only on the same files. Digests of their list stand in run.json; where one of them differs, this
file tells which files are others.

{"source": "ward3/scan7.png", "state": "48213 1764009600000000000", "sha256": null}

`source` is the name in rows, `state` the size in bytes and the time of change in nanoseconds, `sha256` the content's
with --hash-inputs. Under pseudonyms `state` and `sha256` are keyed hashes too: a time may be that of an examination.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qfae_runtime.hashing import sha256_of
from qfae_runtime.pseudonyms import Pseudonyms

NONE = "none"
"""State and hash of a file that is not there or cannot be looked at."""

FINGERPRINT_KEYS = ("inputs", "inputs_sha256", "inputs_state_sha256", "inputs_content_sha256")
_SHOWN = 3


@dataclass(frozen=True)
class Inputs:
    """The files of a run: their names in rows, and of each its state and, where asked for, its content's hash.

    With `names`, inputs.jsonl holds pseudonyms of states and hashes.
    """

    sources: Sequence[str]
    states: Sequence[str]
    contents: Sequence[str] | None
    names: Pseudonyms | None = None

    @classmethod
    def of(cls, paths: Sequence[Path], sources: Sequence[str], names: Pseudonyms | None, *, hashed: bool) -> Self:
        """Look at the files; `hashed` says whether into them as well."""
        return cls(sources, [_state_of(path) for path in paths], _hashes_of(paths) if hashed else None, names)

    def fingerprint(self) -> dict[str, Any]:
        """Return their number and digests, by FINGERPRINT_KEYS."""
        contents = _digest(self.contents) if self.contents is not None else None
        return dict(
            zip(
                FINGERPRINT_KEYS,
                (len(self.sources), _digest(self.sources), _digest(self.states), contents),
                strict=True,
            )
        )

    def lines(self) -> Iterator[str]:
        """Yield the lines of inputs.jsonl; ASCII, whatever the names are."""
        for source, state, content in self._told():
            yield json.dumps({"source": source, "state": state, "sha256": content}) + "\n"

    def changes(self, path: Path) -> list[str]:
        """Say in a line for each kind of change which files are others than those of an inputs.jsonl."""
        try:
            before = _read(path)
        except (OSError, ValueError, KeyError, TypeError):
            return [f"inputs: other files than before; {path.name} is missing or damaged, so it is not known which"]
        now = set(self.sources)
        changed, rewritten = [], []
        for source, state, content in self._told():
            state_before, content_before = before.get(source, (state, content))
            if state != state_before:
                changed.append(source)
            elif None not in (content, content_before) and content != content_before:
                rewritten.append(source)
        lines = [
            _told("new", [source for source in self.sources if source not in before]),
            _told("missing", [source for source in before if source not in now]),
            _told("with another size or time of change", changed),
            _told("with another content, size and time of change as they were", rewritten),
        ]
        return [line for line in lines if line]

    def _told(self) -> Iterator[tuple[str, str, str | None]]:
        """Yield source, state and hash as inputs.jsonl holds them."""
        shown = self.names.of if self.names is not None else str
        for number, source in enumerate(self.sources):
            content = shown(self.contents[number]) if self.contents is not None else None
            yield source, shown(self.states[number]), content


def _told(what: str, sources: list[str]) -> str:
    if not sources:
        return ""
    more = f" and {len(sources) - _SHOWN} more" if len(sources) > _SHOWN else ""
    return f"inputs: {len(sources)} {what}: {', '.join(repr(source) for source in sources[:_SHOWN])}{more}"


def _read(path: Path) -> dict[str, tuple[str, str | None]]:
    with path.open("rb") as file:
        lines = (json.loads(line) for line in file)
        return {line["source"]: (line["state"], line["sha256"]) for line in lines}


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        digest.update(b"\0" * (number > 0) + text.encode("utf-8", errors="surrogateescape"))
    return digest.hexdigest()


def _hashes_of(paths: Sequence[Path]) -> list[str]:
    def one(path: Path) -> str:
        try:
            return sha256_of(path) if path.is_file() else NONE
        except OSError:
            return NONE

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, paths))


def _state_of(path: Path) -> str:
    # Size and time of change instead of the content: a run must not read its inputs twice to find them unchanged.
    try:
        status = path.stat()
    except OSError:
        return NONE
    return f"{status.st_size} {status.st_mtime_ns}"
