"""Taking values out of untrusted JSON: every fault names the key, what was got and what was expected."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from qfae_runtime.errors import ManifestError

_CURE = "export the engine again"
_LONGEST_TEXT = 4096
_PLAIN_TEXT = "characters that can be printed (no escapes, line ends or turns of direction)"
# Control, format (turns of direction, widths of zero), surrogate; ends of lines and paragraphs.
_CONTROLS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def parse_json(text: str | bytes, where: str, cure: str = _CURE) -> Any:
    """Parse strict JSON: NaN, Infinity, duplicate keys and numbers that overflow are refused.

    Raises:
        ManifestError: naming `where` and the fault.

    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not valid JSON: {error}; {cure}") from None


def has_controls(text: str) -> bool:
    """Say whether a text holds what a terminal or a browser obeys: escapes, line ends, turns of direction."""
    return any(unicodedata.category(one) in _CONTROLS for one in text)


def escaped(value: Any) -> Any:
    """Return a JSON value in whose texts and keys such characters are written out."""
    if isinstance(value, str):
        return "".join(ascii(one)[1:-1] if has_controls(one) else one for one in value)
    if isinstance(value, dict):
        return {escaped(key): escaped(inner) for key, inner in value.items()}
    return [escaped(inner) for inner in value] if isinstance(value, list | tuple) else value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a finite number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is not a finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


class Fields:
    """One JSON object being taken apart. `finish` refuses keys that nobody asked for."""

    def __init__(self, value: Any, where: str, key: str = "", cure: str = _CURE) -> None:
        self._where = where
        self._cure = cure
        self._key = key
        self._taken: set[str] = set()
        if not isinstance(value, dict):
            raise self._fault(key or "the whole file", value, "an object")
        self._values: Mapping[str, Any] = value

    def text(self, key: str) -> str:
        """Take a non-empty string without characters that a terminal or a browser would obey."""
        value = self._take(key)
        if not isinstance(value, str) or not value:
            raise self._fault(self._path(key), value, "a non-empty string")
        if len(value) > _LONGEST_TEXT or has_controls(value):
            raise self._fault(self._path(key), value, f"{_PLAIN_TEXT} of up to {_LONGEST_TEXT}")
        return value

    def optional_text(self, key: str) -> str | None:
        """Take a non-empty string or null."""
        return None if self._values.get(key, "") is None and self._take(key) is None else self.text(key)

    def digest(self, key: str) -> str:
        """Take a SHA-256 in lower-case hex."""
        value = self.text(key)
        if len(value) != 64 or set(value) - set("0123456789abcdef"):
            raise self._fault(self._path(key), value, "a SHA-256 (64 lower-case hex digits)")
        return value

    def whole(self, key: str, low: int, high: int) -> int:
        """Take a whole number in low..high."""
        value = self._take(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._fault(self._path(key), value, f"a whole number in {low}..{high}")
        return value

    def number(self, key: str) -> float:
        """Take a finite number."""
        value = self._take(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self._fault(self._path(key), value, "a finite number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Take a finite number or null."""
        return None if self._values.get(key, 0) is None and self._take(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """Take true or false."""
        value = self._take(key)
        if not isinstance(value, bool):
            raise self._fault(self._path(key), value, "true or false")
        return value

    def array(self, key: str) -> list[Any]:
        """Take a list."""
        value = self._take(key)
        if not isinstance(value, list):
            raise self._fault(self._path(key), value, "a list")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """Take an object as it is."""
        value = self._take(key)
        if not isinstance(value, dict):
            raise self._fault(self._path(key), value, "an object")
        return value

    def free_form(self, key: str) -> dict[str, Any]:
        """Take an object of any values whose texts and keys are such strings as `text` takes; of any length."""
        value = self.mapping(key)
        if value != escaped(value):
            raise self._fault(self._path(key), value, f"an object whose texts are {_PLAIN_TEXT}")
        return value

    def inner(self, key: str) -> Fields:
        """Take an object to be taken apart in turn."""
        return Fields(self._take(key), self._where, self._path(key), self._cure)

    def is_null(self, key: str) -> bool:
        """Say whether a key holds null, and count it as taken if so."""
        return self._take(key) is None

    def fault(self, key: str, expected: str) -> ManifestError:
        """Build the error for a key whose value is wrong for a reason only the caller knows."""
        return self._fault(self._path(key), self._values.get(key), expected)

    def finish(self) -> None:
        """Refuse keys that were not asked for."""
        extra = sorted(set(self._values) - self._taken)
        if extra:
            known = ", ".join(sorted(self._taken))
            raise ManifestError(f"{self._where}: unknown key {self._path(extra[0])!r}; known here are {known}")

    def _take(self, key: str) -> Any:
        if key not in self._values:
            raise ManifestError(f"{self._where}: key {self._path(key)!r} is missing; {self._cure}")
        self._taken.add(key)
        return self._values[key]

    def _path(self, key: str) -> str:
        return f"{self._key}.{key}" if self._key else key

    def _fault(self, path: str, got: Any, expected: str) -> ManifestError:
        shown = repr(got)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return ManifestError(f"{self._where}: key {path!r}: expected {expected}, got {shown}")
