"""--deidentify: keyed hashes in the place of names, so that results can leave the house and still lead back.

A pseudonym is the first 32 hex digits of HMAC-SHA256(key, source), `source` the path below the run's root in UTF-8
(bytes that are none are taken as they are). Whoever has the key and the files can compute it again; nobody else can,
nor can they try out names, as they could with a plain hash. What stands in a picture itself, burnt-in text say, stays.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from qfae_runtime.errors import UsageError
from qfae_runtime.ordinary_words import ORDINARY

_LEAST_BYTES, _MOST_BYTES = 16, 4096
_DIGITS = 32
_LEAST_NAME = 3  # a file called 1.png: its 1 may be any number in the sentence
_MOST_DIGITS = 5  # 512.png: pixels, frames and bits have as many

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
        """Return a sentence about a file with its pseudonym in the place of its names, and pseudonyms for UIDs.

        Names are the file's path in every form that a message may have it in, the ends of that path, other files in its
        folders, its name with or without suffix, and the folders' names. A name that is an ordinary word, as not.png
        has, is one where it stands in quotes or in a path; elsewhere it is that word.
        """
        for pattern in _patterns(path):
            text = pattern.sub(pseudonym, text)
        return _UID.sub(lambda found: self.of(found.group()), text)

    def key_sha256(self) -> str:
        """Return what tells keys apart without giving them away."""
        return hashlib.sha256(b"qfae pseudonyms\0" + self.key).hexdigest()


_QUOTES = "'\"`\u2018\u2019\u201c\u201d"
_IN_PATHS = rf"[^\s<>|{_QUOTES}]"
_LAST_IN_PATHS = rf"[^\s<>|:;,.)\]}}{_QUOTES}]"


def _patterns(path: Path) -> list[re.Pattern[str]]:
    """Return what matches the names of a file in a sentence, the most of a path first."""
    stems = [path.name, path.stem, path.stem.removesuffix(".nii")]
    stem = _any(form for one in stems for form in _forms(one))
    rest = rf"(?:[/\\](?:{stem})?(?:{_IN_PATHS}*{_LAST_IN_PATHS})?)?"
    whole = {form for one in {path, path.absolute()} for form in _forms(str(one))}
    ends = {form for count in range(2, len(path.parts)) for form in _forms("/".join(path.parts[-count:]))}
    folders = {form for one in path.parents if len(one.parts) > 1 for form in _forms(str(one))}
    patterns = [
        _any(form for form in whole | ends if re.search(r"[/\\]", form)),
        *(_bounded(form) + rest for form in sorted(folders, key=len, reverse=True) if re.search(r"[/\\]", form)),
    ]
    known = [one for one in stems if len(one) >= _LEAST_NAME]
    patterns += [_bounded(form) for form in _forms(path.name) if path.suffix and path.name in known]
    patterns += [_bounded(form, r"\.[^\W\d_]\w{0,7}") for one in known for form in _forms(one)]
    for name in sorted({*known, *path.parts[:-1]}, key=len, reverse=True):
        if len(name) >= _LEAST_NAME:
            quoted = _any(_forms(name))
            patterns.append(rf"(?<=[{_QUOTES}])(?:{quoted})(?=[{_QUOTES}])")
            patterns += [_bounded(form) for form in _forms(name) if not _ordinary(name)]
    return [re.compile(pattern, re.IGNORECASE) for pattern in patterns if pattern]


def _forms(text: str) -> set[str]:
    """Return how a message may write a name: as it is, composed otherwise, escaped, or as a part of a URL."""
    found = {text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))}
    code = text.encode("utf-8", errors="surrogateescape")
    found |= {repr(text)[1:-1], ascii(text)[1:-1], repr(code)[2:-1], quote(code)}
    found |= {code.decode("utf-8", errors) for errors in ("replace", "backslashreplace", "ignore")}
    return found - {""}


def _any(forms: Iterable[str]) -> str:
    return "|".join(re.escape(form) for form in sorted(set(forms), key=len, reverse=True))


def _bounded(form: str, more: str = "") -> str:
    """Match a form, and `more`, as a word of its own: 12 is not in 512, nor Ann in Annotation, but in Ann_1."""
    left = r"(?<![^\W_])" if form[0].isdigit() else r"(?<![^\W\d_])"
    right = r"(?![^\W_])" if more or form[-1].isdigit() else r"(?![^\W\d_])"
    return left + re.escape(form) + more + right


def _ordinary(name: str) -> bool:
    """Say whether a name consists of words, or numbers, that stand in sentences about any file."""
    return all(
        len(word) < _LEAST_NAME or word in ORDINARY or (word.isdigit() and len(word) <= _MOST_DIGITS)
        for word in name.casefold().split()
    )
