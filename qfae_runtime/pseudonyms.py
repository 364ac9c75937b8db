"""--deidentify: keyed hashes in the place of names, so that results can leave the house and still lead back.

A pseudonym is the first 32 hex digits of HMAC-SHA256(key, source), `source` the path below the run's root in UTF-8
(bytes that are none are taken as they are). Whoever has the key and the files can compute it again; nobody else can,
nor can they try out names, as they could with a plain hash. What stands in a picture itself, burnt-in text say, stays.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from pathlib import Path

from qfae_runtime.errors import UsageError

_LEAST_BYTES, _MOST_BYTES = 16, 4096
_DIGITS = 32
_LEAST_NAME = 3  # a file called 1.png: its 1 may be any number in the sentence

# DICOM UIDs: numbers with dots between, at least five of them (versions of software have fewer), at most 64 characters.
_UID = re.compile(r"(?<![\w.])\d+(?:\.\d+){4,}(?![\w.])")


@dataclass(frozen=True)
class Pseudonyms:
    """Makes pseudonyms with one key."""

    key: bytes = field(repr=False)

    @classmethod
    def from_file(cls, path: Path) -> Pseudonyms:
        """Take the bytes of a file for the key, white space around them left out.

        Raises:
            UsageError: it cannot be read, or is too short to keep a secret or too long to be meant.

        """
        try:
            with path.open("rb") as file:
                key = file.read(_MOST_BYTES + 1).strip()
        except OSError as error:
            raise UsageError(
                f"--deidentify {path}: cannot be read ({error.strerror or error}); name a file that holds a secret, "
                "e.g. made with: openssl rand -hex 32"
            ) from None
        if not _LEAST_BYTES <= len(key) <= _MOST_BYTES:
            count = "more than " + str(_MOST_BYTES) if len(key) > _MOST_BYTES else len(key)
            raise UsageError(
                f"--deidentify {path}: holds {count} bytes, expected a secret of {_LEAST_BYTES} to {_MOST_BYTES}, e.g. "
                "made with: openssl rand -hex 32"
            )
        return cls(key)

    def of(self, text: str) -> str:
        """Return the pseudonym of a source or UID."""
        code = text.encode("utf-8", errors="surrogateescape")
        return hmac.new(self.key, code, hashlib.sha256).hexdigest()[:_DIGITS]

    def scrub(self, text: str, path: Path, pseudonym: str) -> str:
        """Return a sentence about a file with its pseudonym in the place of its names, and pseudonyms for UIDs."""
        names = [str(path), *(name for name in (path.name, path.stem) if len(name) >= _LEAST_NAME)]
        longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        text = re.sub(rf"(?<!\w)(?:{longest_first})(?!\w)", pseudonym, text)
        return _UID.sub(lambda found: self.of(found.group()), text)

    def key_sha256(self) -> str:
        """Return what tells keys apart without giving them away."""
        return hashlib.sha256(b"qfae pseudonyms\0" + self.key).hexdigest()
